"What siblings cost beside plain passes; the report; what each acceleration saves."
import json
import time

import pytest
import torch

from nioodd.app.cli import main
from nioodd.core.errors import NiooddError
from nioodd.speed.siblings import (
    FOREIGN,
    Case,
    acceleration_cases,
    acceleration_row,
    bench_trust,
    contestants,
    images_for,
    learning_jobs,
    learning_row,
    measure_accelerations,
    race,
)


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(autouse=True)
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_cheaper_than_plain_forward_passes():
    "C1, a batch of 128: in CPU time of one thread, with room for a busy machine (it was 0.5)."
    (r,) = race("C1", 2, (128,), rounds=5, limit=20, clock=time.process_time)
    assert r.ratio("siblings", "plain") < 0.9 and r.rate("siblings") > 0


def test_report():
    options = dict(rounds=2, limit=1, progress=False, clock=time.process_time)
    report = bench_trust(architectures=("C1",), members=(2,), batches=(1, 8), **options)
    for words in ("C1 S=2   batch 1", "C1 S=2   batch 8", "siblings : plain", "one by one", "ensemble",
                  "1,111,946 parameters", "C1 batch 8: training", "MC layers"): assert words in report
    with pytest.raises(NiooddError, match="nothing to measure"): bench_trust(architectures=())
    with pytest.raises(NiooddError, match="batches of 0, 8"): bench_trust(batches=(0, 8))


def test_report_names_its_command(capsys):
    assert main(["bench", "trust", "--members", "2", "--batches", "1", "--seconds", "0"]) == 0
    command = "nioodd bench trust --networks C1 --members 2 --batches 1 --seconds 0, commit "
    assert capsys.readouterr().out.startswith(command)
    assert main(["bench", "trust", "--batches", "1,many"]) == 2
    assert "--batches is '1,many'; expected whole numbers" in capsys.readouterr().err


def test_contestants_answer():
    x = images_for("C1", 3)
    for name, way in contestants("C1", 2).items():
        z = torch.stack(list(way(x)))
        assert z.shape == (2, 3, 10), name
    jobs = learning_jobs("C1", 4)
    jobs["training"](), jobs["intervals"]()


@pytest.mark.parametrize("case, switches", [
    (Case("C1", 2, 1), {"fold norms", "side by side", "pack weights"}),
    (Case("C3", 2, 2, which="head"), {"share trunk"}),
    (Case(FOREIGN, 2, 2), {"fold norms"}),
])
def test_a_row_has_each_acceleration_that_can_matter(case, switches):
    ratios = acceleration_row(case, rounds=2)["ratios"]
    assert ratios.keys() == switches | {"one by one"} and min(ratios.values()) > 0


def test_learning_without_folding_is_the_same_step():
    assert learning_row("C3", 4, rounds=2)["ratios"]["fold norms"] > 0


def test_rows_are_kept_as_they_come(tmp_path, monkeypatch):
    monkeypatch.setattr("nioodd.speed.siblings.acceleration_cases", lambda threads: iter([Case("C1", 2, 1)]))
    monkeypatch.setattr("nioodd.speed.siblings.learning_row", lambda *a, **k: dict(network=a[0], which="learning"))
    threads = torch.get_num_threads()
    found = json.loads(measure_accelerations(tmp_path/"a.json", rounds=2).read_text())
    assert [r["network"] for r in found["rows"]] == ["C1", "C3", "C1", "C1", "C3"] and found["commit"]
    assert torch.get_num_threads() == threads


def test_cases_cover_both_thread_counts():
    cases = [*acceleration_cases()]
    assert {c.threads for c in cases} == {1, 2} and {c.batch for c in cases} == {1, 64, 256}
    assert {c.network for c in cases} == {"C1", "C3", "C4", FOREIGN} and len(set(cases)) == len(cases)
