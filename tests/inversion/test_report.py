"""The report of a run: what it writes, and what it says of an unfinished or damaged run."""
import csv
import json

import pytest
import torch

from nioodd.core.errors import NiooddError
from nioodd.core.files import load_tensors, save_tensors
from nioodd.core.forward import features_of
from nioodd.core.metrics import ood_metrics
from nioodd.core.models import Classifier
from nioodd.core.options import to_dict
from nioodd.core.scores import garbage_log_odds
from nioodd.inversion import report
from nioodd.inversion.config import preset
from nioodd.inversion.report import before_after, format_table, open_run, write_report

SETS = ("letters", "folder:/a b/<i>&")
N_KNOWN = 3


def info(**values):
    config = to_dict(preset("quickstart")) | dict(rounds=2, ood_sets=list(SETS))
    made = dict(config=config, preset="quickstart", seed=0, versions=dict(python="3.11"), commit=None,
                command="nioodd run <script>alert(1)</script>", status="finished", rounds_done=2, best_round=1,
                n_known=N_KNOWN, classes=["a", "b<b>", "c"], threads=1, device="cpu", seconds=60.0)
    return made | values


def metrics_row(r, value):
    high = dict.fromkeys(("detected", "auroc", "aupr_in", "aupr_out"), value)
    ood = {name: high | dict(fpr95_id_positive=1 - value, fpr95_ood_positive=1 - value) for name in SETS}
    made = dict(inversion_accuracy=0.5, garbage_share=0.1, collapsed=r == 2, kl=1.0, ce=1.0, cosine=-0.1, ortho=0.0,
                grad_kl=1.0, grad_ce=2.0, grad_cosine=0.0, grad_ortho=0.0)
    row = dict(round=r, classifier=dict(loss=1.0, accuracy=0.9), ood=ood,
               id=dict(accuracy_known=value, accuracy_all=value, rejected=1 - value),
               ue=dict(mean=0.9, per_class=[0.9, 0.8, None]), excluded=7, seconds=dict(train=1.0))
    return row | (dict(generator=made) if r else {})


def write_run(folder, rows=3, logits=("before", "after"), samples=2, **values):
    "A run's folder of 3 classes whose logits come from a real, untrained classifier of 12 × 12 colour images."
    torch.manual_seed(0)
    model = Classifier(N_KNOWN + 1, channels=3, size=12)
    images = torch.randint(0, 256, (60, 3, 12, 12), dtype=torch.uint8)
    z, features = features_of(model, images)
    labels = torch.arange(60) % N_KNOWN
    for i, state in enumerate(logits):
        tensors = {"id": z.clone(), "id_labels": labels.clone(), "id_features": features.clone(),
                   "id_feature_labels": labels.clone(), "garbage_features": features[:20] + 1}
        tensors |= {f"ood/{name}": z + torch.tensor([0.0] * N_KNOWN + [0.05 * i]) for name in SETS}
        save_tensors(folder / f"logits/{state}.safetensors", tensors)
    for r in range(1, samples + 1):
        drawn = dict(images=images, conditions=z.softmax(1), labels=torch.arange(60) % (N_KNOWN + 1),
                     predicted=z.argmax(1))
        save_tensors(folder / f"samples/round_{r:03}.safetensors", drawn)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(info(**values)))
    lines = [json.dumps(metrics_row(r, 0.5 + 0.1 * r)) + "\n" for r in range(rows)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture
def undrawn(monkeypatch):
    "Pictures are laid out, but not drawn: other tests draw the same ones."
    monkeypatch.setattr(report, "png", lambda figure: b"a picture")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("runs") / "finished")
    write_report(folder, progress=False)
    return folder


def fails(call, *words):
    with pytest.raises(NiooddError) as e: call()
    assert "\n" not in str(e.value)
    for word in words: assert word in str(e.value)


def test_files(finished):
    pictures = {p.name for p in (finished / "pictures").iterdir()}
    assert pictures == {"curves.png", "ue_per_class.png", "round_001.png", "round_002.png", "pca.png", "tsne.png",
                        "roc.png", "histogram_letters.png", "scores_letters.png", "histogram_folder_a_b_i_.png",
                        "scores_folder_a_b_i_.png"}
    assert all((finished / "pictures" / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    assert not [*finished.rglob("*.part")]


def test_page_is_self_contained_and_escaped(finished):
    page = (finished / "report.html").read_text()
    assert page.startswith("<!doctype html>") and page.rstrip().endswith("</html>")
    for outside in ("<script", "<link", "http:", "https:", "src=\"pictures"): assert outside not in page
    assert page.count("data:image/png;base64,") == 11
    assert "&lt;script&gt;" in page and "folder:/a b/&lt;i&gt;&amp;" in page and "<i>" not in page
    assert "prefers-color-scheme" in page
    assert "weight of the KL divergence" in page and len(page) < 3_000_000
    assert "collapsed" in page and "7 images became garbage" in page


def test_same_again(finished):
    files = [p for p in finished.rglob("*") if p.suffix in (".png", ".md", ".csv", ".html")]
    before = {p: p.read_bytes() for p in files}
    assert write_report(finished, progress=False) == finished / "report.html"
    assert {p: p.read_bytes() for p in files} == before


def test_table_is_that_of_the_logits(finished):
    rows = before_after(finished)
    sets = [("digits5k", "ID", 60), *((name, "OOD", 60) for name in SETS)]
    assert [(row["set"], row["role"], row["images"]) for row in rows] == sets
    z = load_tensors(finished / "logits/after.safetensors")[0]
    expected = ood_metrics(garbage_log_odds(z["id"]), garbage_log_odds(z["ood/letters"]))
    for name, value in expected.items(): assert rows[1][f"{name}_after"] == value
    assert rows[1]["auroc_before"] == 0.5 and rows[0]["auroc_before"] is None
    assert rows[1]["accuracy_known_after"] is None
    read = list(csv.DictReader((finished / "table.csv").open(encoding="utf-8")))
    assert float(read[1]["auroc_after"]) == rows[1]["auroc_after"] and read[0]["auroc_after"] == ""
    markdown = (finished / "table.md").read_text()
    assert "| letters | 60 |" in markdown and "round 1" in markdown


def test_kept_round(tmp_path):
    "Without logits the table comes from metrics.jsonl: the kept round of a finished run, the last one of another."
    write_run(tmp_path, logits=(), samples=0)
    row = before_after(tmp_path)[1]
    assert (row["detected_before"], row["detected_after"], row["round_after"], row["images"]) == (0.5, 0.6, 1, None)
    (tmp_path / "run.json").write_text(json.dumps(info(status="running")))
    assert before_after(tmp_path)[1]["round_after"] == 2
    assert "2 of 2 rounds" in write_report(tmp_path, progress=False).read_text()


@pytest.mark.parametrize("rows, logits", [(0, ()), (1, ()), (1, ("before",)), (2, ("before",))])
def test_interrupted(tmp_path, rows, logits, request):
    if rows == 2: request.getfixturevalue("undrawn")
    write_run(tmp_path, rows=rows, logits=logits, samples=max(rows - 1, 0), status="running")
    page = write_report(tmp_path, progress=False).read_text()
    assert "This run is not finished" in page and f"{max(rows - 1, 0)} of 2 rounds" in page
    table = format_table(before_after(tmp_path))
    assert ("Nothing is measured yet" in table) == (rows == 0)
    assert "nan" not in page.replace("finance", "").lower().split("data:image")[0]


def test_control_without_generator(tmp_path):
    "A run without inversion stores only what became garbage, perhaps nothing; round 0 may be the kept one."
    write_run(tmp_path, logits=(), samples=0, best_round=0)
    for r, n in ((1, 5), (2, 0)):
        excluded = torch.zeros(n, 1, 8, 8, dtype=torch.uint8)
        save_tensors(tmp_path / f"samples/round_{r:03}.safetensors", dict(excluded=excluded))
    write_report(tmp_path, progress=False)
    assert len(list((tmp_path / "pictures").glob("round_*.png"))) == 2
    assert before_after(tmp_path)[1]["round_after"] == 0


def test_no_metrics_file(tmp_path):
    write_run(tmp_path, rows=0, logits=(), samples=0, status="running")
    (tmp_path / "metrics.jsonl").unlink()
    assert open_run(tmp_path).rows == [] and write_report(tmp_path, progress=False).is_file()


def test_a_broken_line_is_named(tmp_path):
    write_run(tmp_path, logits=(), samples=0)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0][:20], *lines[1:]]))
    fails(lambda: write_report(tmp_path, progress=False), "metrics.jsonl, line 1")
    path.write_text("\n".join(lines)[:-30])
    fails(lambda: open_run(tmp_path), "metrics.jsonl, line 3")


def test_not_a_run(tmp_path):
    fails(lambda: write_report(tmp_path), "holds no run", "run.json")
    fails(lambda: before_after(tmp_path / "nowhere"), "nowhere")
    (tmp_path / "run.json").write_text("{")
    fails(lambda: write_report(tmp_path), "not valid JSON")
    (tmp_path / "run.json").write_text('{"config": {}}')
    fails(lambda: write_report(tmp_path), "lacks n_known, classes")
    (tmp_path / "run.json").write_text("[]")
    fails(lambda: write_report(tmp_path), "not of type 'object'")


@pytest.mark.parametrize("name", ["logits/after.safetensors", "samples/round_001.safetensors"])
def test_damaged_tensors(tmp_path, name):
    path = write_run(tmp_path) / name
    path.write_bytes(path.read_bytes()[:-100])
    fails(lambda: write_report(tmp_path, progress=False), path.name)


def test_logits_without_labels(tmp_path):
    save_tensors(write_run(tmp_path) / "logits/after.safetensors", dict(id=torch.zeros(2, 4)))
    fails(lambda: before_after(tmp_path), "id_labels")


def test_long_run_shows_a_choice(tmp_path, monkeypatch, undrawn):
    monkeypatch.setattr(report, "GALLERY", 1)
    page = write_report(write_run(tmp_path, logits=()), progress=False).read_text()
    assert "Of 2 rounds 1 are shown" in page


def test_percentages_are_not_rounded_to_all_or_nothing():
    values = (1.0, 0.99998, 0.5, 0.00001, 0.0)
    assert [report._percent(v) for v in values] == ["100.00", ">99.99", "50.00", "<0.01", "0.00"]


def test_table_styles():
    fails(lambda: format_table([], "html"), "'html'", "csv")
    assert format_table([], "csv") == "set,role\n" and "no round" in format_table([], "md")
