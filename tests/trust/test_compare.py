"Rows of a comparison: disjoint draws, the measures themselves, ΔE against its definition, one line for bad input."
import pytest
import torch
from torch import nn
from trust_networks import images

from nioodd.core.errors import NiooddError
from nioodd.core.forward import as_input
from nioodd.core.metrics import ood_metrics
from nioodd.trust.agreement import MEASURES
from nioodd.trust.compare import (
    PLAIN_SCORES,
    CompareOptions,
    compare,
    error_change,
    format_comparison,
    groups,
    plain_rows,
    score_rows,
)
from nioodd.trust.siblings import call_with


@pytest.fixture
def logits():
    "Known images on which seven members agree, and two sets on which they do not."
    g = torch.Generator().manual_seed(0)
    known = 3 * torch.randn(1, 40, 5, generator=g) + 0.1 * torch.randn(7, 40, 5, generator=g)
    return dict(known=known, near=torch.randn(7, 30, 5, generator=g), far=torch.randn(7, 50, 5, generator=g))


@pytest.mark.parametrize("pool, n, draws", [(18, 2, 18), (18, 5, 4), (18, 10, 2), (3, 5, 0), (4, 5, 1)])
def test_draws_are_disjoint_and_hold_the_network(pool, n, draws):
    found = groups(pool, n)
    assert len(found) == draws
    assert all(len(members) == n and members[0] == 0 for members in found)
    siblings = [i for members in found for i in members[1:]]
    assert len(set(siblings)) == len(siblings)
    assert set(siblings) <= set(range(1, pool + 1))


def test_rows_are_the_measures_of_the_draws(logits):
    rows = score_rows(logits, sizes=(2, 3), noise="learnt")
    assert len(rows) == (6 + 3) * len(MEASURES) * 2
    keys = {(r["members"], r["draw"], r["score"], r["ood"]) for r in rows}
    assert len(keys) == len(rows)
    for row in rows[::7]:
        members = groups(6, row["members"])[row["draw"]]
        known, unknown = (MEASURES[row["score"]](logits[k][members]) for k in ("known", row["ood"]))
        assert row["noise"] == "learnt"
        assert ood_metrics(known, unknown).items() <= row.items()
    assert max(r["auroc"] for r in rows) > 0.8  # The siblings of the fixture do disagree


def test_rows_without_siblings(logits):
    rows = plain_rows({k: z[0] for k, z in logits.items()})
    assert [(r["score"], r["ood"]) for r in rows] == [(s, k) for s in PLAIN_SCORES for k in ("near", "far")]
    assert {(r["noise"], r["members"], r["draw"]) for r in rows} == {("none", 1, 0)}


def test_error_change_is_right_to_second_order():
    "Of a smooth network: halving Δw makes what is left over eight times smaller."
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 36, 4)).double().eval()
    x = as_input(images(6), net)
    y = net(x).argmax(1)
    g = torch.Generator().manual_seed(1)
    direction = {k: torch.randn(p.shape, generator=g, dtype=p.dtype) for k, p in net.named_parameters()}

    def left_over(t):
        step = {k: t * d for k, d in direction.items()}
        own = dict(net.named_parameters())

        def errors(weights):
            with torch.no_grad(): z = call_with(net, weights, x)
            return nn.functional.cross_entropy(z, y, reduction="none")

        change = errors({k: own[k].detach() + d for k, d in step.items()}) - errors({})
        return (change - error_change(net, step, x)).abs().max().item()

    first, second = left_over(0.02), left_over(0.01)
    assert 0 < second < first / 7


def test_table_has_a_line_per_score_and_a_column_per_set(logits):
    text = format_comparison(dict(rows=score_rows(logits, sizes=(2,), noise="learnt")))
    head, *lines = text.splitlines()
    assert head.split() == ["noise", "S", "score", "near", "far"]
    assert len(lines) == len(MEASURES)
    assert all("±" in line for line in lines)


def test_errors_in_one_line(tmp_path):
    with pytest.raises(NiooddError, match="pool is 0"): CompareOptions(pool=0)
    (tmp_path / "rows.json").write_text("{}")
    with pytest.raises(NiooddError, match="exists; give another --out"):
        compare(tmp_path, out=tmp_path / "rows.json")
    assert (tmp_path / "rows.json").read_text() == "{}"
