"Batch jobs: any number of files, interrupted, sharded, in three kinds of files; what is bad, what is not mixed."
import csv
import errno
import json
import os

import pytest
import torch
from fake_sets import refused
from PIL import Image
from small_networks import small_classifier, small_images

from nioodd.app import score
from nioodd.app.cli import main
from nioodd.app.score import BatchJudge, Options, ParquetFolder, Printed, image_paths, in_shard, parts_of, score_files
from nioodd.core.errors import NiooddError
from nioodd.inversion.detector import GarbageDetector
from nioodd.posthoc.layerwise import LayerwiseDetector


@pytest.fixture(scope="module")
def detector():
    detector = LayerwiseDetector(small_classifier(), classes=["=a", "b", "c\n", "d"])
    return detector.fit(small_images(300), small_images(200, 1), bank=50)


@pytest.fixture
def place(tmp_path):
    "Sixty image files in two folders, one damaged and one hidden."
    for k, image in enumerate(small_images(60, 2)):
        path = tmp_path / "files" / "ab"[k % 2] / f"{k:02}{'=' if k == 7 else ''}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(path)
    (tmp_path / "files/b/99.png").write_bytes(b"no image")
    (tmp_path / "files/a/._0.png").write_bytes(b"macOS puts such files there")
    return tmp_path


def rows_of(path):
    if path.suffix == ".jsonl": return [json.loads(line) for line in path.read_text().splitlines()]
    if path.suffix == ".csv": return [*csv.DictReader(path.open(newline=""))]
    from pyarrow import parquet
    return parquet.read_table(path).to_pylist()


@pytest.fixture(params=[".jsonl", ".csv", ".parquet"])
def suffix(request):
    if request.param == ".parquet": pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    return request.param


class Mortal:
    "A detector that is interrupted after so many calls."
    def __init__(self, detector, calls): self.detector, self.calls = detector, calls
    def __getattr__(self, name): return getattr(self.detector, name)

    def verdict(self, x):
        self.calls -= 1
        if self.calls < 0: raise KeyboardInterrupt
        return self.detector.verdict(x)


@pytest.mark.parametrize("n", [1, 5, 63, 64, 65, 1000, 4096, 10_000])
@pytest.mark.parametrize("shards", [1, 3, 64])
def test_parts_hold_every_file_once_and_shards_every_part(n, shards):
    parts = parts_of([*range(n)])
    assert sum(map(list, parts), []) == [*range(n)] and max(map(len, parts)) <= 64
    assert sum((in_shard(parts, (i, shards)) for i in range(1, shards + 1)), []) == parts
    if n >= 64: assert len(parts) > 32  # so that 64 machines have something to do


def test_files_are_found_once_and_in_order(place):
    found = image_paths([place / "files/b", place / "files", place / "files/b/01.png"])
    assert len(found) == len({*found}) == 61 and found[0].parent.name == "b"
    assert not any(path.name.startswith(".") for path in found)
    refused(image_paths, [place / "none"], says="does not exist")


@pytest.mark.parametrize("killed_after", [0, 1, 20, 59])
def test_an_interrupted_job_goes_on_and_gives_the_same_bytes(detector, place, suffix, killed_after, monkeypatch):
    monkeypatch.setattr(ParquetFolder, "rows_each", 8)
    whole, out = place / f"whole{suffix}", place / f"out{suffix}"
    assert score_files(detector, [place / "files"], out=whole).judged == 60
    with pytest.raises(KeyboardInterrupt): score_files(Mortal(detector, killed_after), [place / "files"], out=out)
    before = len(rows_of(out)) if out.exists() and (out.is_file() or [*out.iterdir()]) else 0
    done = score_files(detector, [place / "files"], out=out)
    assert (done.before, done.judged, done.bad) == (before, 60 - before, 1)
    assert rows_of(out) == rows_of(whole) and len(rows_of(out)) == 60
    if suffix != ".parquet": assert out.read_bytes() == whole.read_bytes()
    assert score_files(Mortal(detector, 1), [place / "files"], out=out).judged == 0  # the damaged one is tried again
    written = {f"{name}{suffix}{more}" for name in ("whole", "out") for more in ("", ".about.json")}
    assert {p.name for p in place.iterdir()} == {"files", *written}


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_row_cut_anywhere_is_judged_again(detector, place, suffix):
    whole, out = place / f"whole{suffix}", place / f"out{suffix}"
    score_files(detector, [place / "files/a"], out=whole)
    score_files(detector, [place / "files/a"], out=out)
    content = whole.read_bytes()
    for cut in [0, 1, 30, *range(len(content) - 200, len(content), 7)]:
        out.write_bytes(content[:cut])
        score_files(detector, [place / "files/a"], out=out)
        assert out.read_bytes() == content, cut


def test_shards_are_the_whole(detector, place):
    score_files(detector, [place / "files"], out=place / "whole.jsonl")
    for i in range(1, 5):
        score_files(detector, [place / "files"], out=place / f"{i}.jsonl", options=Options(shard=(i, 4)))
    assert b"".join((place / f"{i}.jsonl").read_bytes() for i in range(1, 5)) == (place / "whole.jsonl").read_bytes()
    says = "another detector or shard"
    refused(score_files, detector, [place / "files"], out=place / "1.jsonl", options=Options(shard=(2, 4)), says=says)


def test_what_is_not_mixed(detector, place):
    score_files(detector, [place / "files/a"], out=place / "a.csv", name="one")
    refused(score_files, detector, [place / "files/a"], out=place / "a.csv", name="two", says="another detector")
    (place / "mine.csv").write_text("my,own\n")
    refused(score_files, detector, [place / "files/a"], out=place / "mine.csv", says="not written by nioodd score")
    refused(score_files, detector, [place / "files/a"], out=place / "a.xlsx", says=".jsonl")
    assert (place / "mine.csv").read_text() == "my,own\n"


def test_two_processes_do_not_write_one_file(detector, place):
    class Second(Mortal):
        def verdict(self, x):
            refused(score_files, detector, [place / "files"], out=place / "a.jsonl", says="another process")
            return self.detector.verdict(x)
    assert score_files(Second(detector, 0), [place / "files/a"], out=place / "a.jsonl").judged == 30


def test_strict_stops_and_keeps_what_was_judged(detector, place):
    out = place / "a.jsonl"
    with pytest.raises(NiooddError, match="99.png"):
        score_files(detector, [place / "files/b"], out=out, options=Options(strict=True))
    assert len(rows_of(out)) == 30


def test_cells_are_no_formulas_and_names_come_back(detector, place, monkeypatch):
    monkeypatch.chdir(place / "files/a")
    os.rename("00.png", "=1+1\n\u2028.png")
    out = place / "a.csv"
    for _ in range(2): done = score_files(detector, ["=1+1\n\u2028.png", "02.png"], out=out)
    assert done.before == 2 and rows_of(out)[0]["file"] == "./=1+1\n\u2028.png"
    assert {row["class"] for row in rows_of(out)} <= {"'=a", "b", "c\n", "d"}


def test_memory_holds_a_few_parts_only(detector, place, monkeypatch):
    decoded, judged = [], []
    monkeypatch.setattr(score, "MOST_AT_ONCE", 4)
    real = score.read_ahead

    def watched(parts, *args):
        def handed():
            for part in parts:
                decoded.append(len(part))
                assert sum(decoded) - sum(judged) <= 4 * 4
                yield part
        return real(handed(), *args)

    class Watching(Mortal):
        def verdict(self, x):
            judged.append(len(x))
            return self.detector.verdict(x)
    monkeypatch.setattr(score, "read_ahead", watched)
    assert score_files(Watching(detector, 0), [place / "files"]).judged == 60


# From the command line

@pytest.fixture(scope="module")
def guard(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guard")
    detector = GarbageDetector(small_classifier(), classes=["a", "b", "c"])
    detector.fit(held_out=small_images(400, seed=1)).save(folder / "d")
    return str(folder / "d")


def test_exit_codes_and_what_is_said(guard, place, capsys):
    good = str(place / "files/a")
    assert main(["score", guard, good, "--format", "jsonl"]) == 0
    said = capsys.readouterr()
    printed = said.out.splitlines()
    assert len(printed) == 30 and "middle 8×8" in said.err
    assert main(["score", guard, str(place / "files"), "--out", str(place / "r.csv")]) == 1
    said = capsys.readouterr()
    assert "60 images judged" in said.out and "99.png" in said.err and "1 of 61 files" in said.err
    any_ood = any(json.loads(line)["ood"] for line in printed)
    assert main(["score", guard, good, "--fail-if-ood", "0"]) == (3 if any_ood else 0)
    capsys.readouterr()
    assert main(["score", guard, str(place / "files"), "--strict"]) == 2
    assert "99.png" in capsys.readouterr().err


@pytest.mark.parametrize("share, code", [("0.4", 3), ("0.5", 0), ("1", 0)])
def test_a_gate(guard, place, share, code, capsys, monkeypatch):
    def half(self, x):
        ood = torch.arange(len(x)) % 2 == 0
        return dict(label=torch.zeros(len(x), dtype=torch.int64), score=torch.zeros(len(x)), ood=ood)
    monkeypatch.setattr(GarbageDetector, "verdict", half)
    monkeypatch.setattr(score, "MOST_AT_ONCE", 2)
    monkeypatch.setattr(score, "parts_of", lambda paths: [paths[i:i + 2] for i in range(0, len(paths), 2)])
    assert main(["score", guard, str(place / "files/a"), "--fail-if-ood", share, "--format", "jsonl"]) == code
    assert (code == 3) == ("more than" in capsys.readouterr().err)


@pytest.mark.parametrize("wrong", [["--shard", "0/4"], ["--shard", "5/4"], ["--shard", "x"], ["--fail-if-ood", "2"]])
def test_wrong_options_are_one_line(guard, place, wrong, capsys):
    try: code = main(["score", guard, str(place / "files"), *wrong])
    except SystemExit as e: code = e.code
    assert code == 2 and "expected" in capsys.readouterr().err


def test_json_is_one_list(guard, place, capsys):
    assert main(["score", guard, str(place / "files/a"), "--format", "json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 30


def test_a_table_of_many_rows_is_printed_in_blocks(capsys):
    printed = Printed("table")
    for k in range(150): printed.add([dict(file=f"{k}.png", ood=False)])
    printed.close()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 151 and lines[1].split() == ["0.png", "no"] and lines[150].split() == ["149.png", "no"]


def test_a_carriage_return_in_a_name_does_not_lose_rows(detector, place, monkeypatch):
    monkeypatch.chdir(place / "files/a")
    os.rename("00.png", "a\rb.png")
    out = place / "a.csv"
    assert score_files(detector, ["."], out=out).judged == 30
    assert (score_files(detector, ["."], out=out).before, len(rows_of(out))) == (30, 30)


@pytest.mark.parametrize("keep", [1, 2])
def test_a_head_is_written_once(detector, place, keep):
    out = place / "a.csv"
    score_files(detector, [place / "files/a"], out=out)
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:keep])[:-5 if keep == 2 else None])
    score_files(detector, [place / "files/a"], out=out)
    assert out.read_text() == "".join(lines)


@pytest.mark.parametrize("spoil", [lambda t: t.replace("\n", "\nx\n", 3), lambda t: t.replace("file", "name")])
def test_rows_that_somebody_changed_are_not_thrown_away(detector, place, spoil):
    for suffix in (".csv", ".jsonl"):
        out = place / f"a{suffix}"
        score_files(detector, [place / "files/a"], out=out)
        out.write_text(changed := spoil(out.read_text()))
        refused(score_files, detector, [place / "files/a"], out=out, says="was changed")
        assert out.read_text() == changed


def test_a_folder_that_cannot_be_read_is_said(place, monkeypatch):
    def walk(folder, onerror):
        onerror(PermissionError(13, "Permission denied", "secret"))
        return []
    monkeypatch.setattr(os, "walk", walk)
    refused(image_paths, [place / "files"], says="secret cannot be read")


def test_one_image_that_cannot_be_judged_does_not_end_it(detector, place):
    class Picky(Mortal):
        def verdict(self, x):
            if (x.float().mean((1, 2, 3)) < 1).any(): raise NiooddError("logits hold NaN")
            return self.detector.verdict(x)
    Image.new("L", (8, 8)).save(place / "files/a/50.png")
    done = score_files(Picky(detector, 0), [place / "files/a"])
    assert (done.judged, done.bad) == (29, 1) and "50.png: logits hold NaN" in str(done.errors[0])


def test_the_share_is_that_of_the_files_asked_for(detector, place):
    out = place / "a.jsonl"
    first = score_files(detector, [place / "files/a"], out=out)
    both = score_files(detector, [place / "files/b"], out=out)
    assert (both.before, both.judged) == (0, 30) and first.judged == 30
    again = score_files(detector, [place / "files/a"], out=out)
    assert (again.before, again.judged, again.ood) == (30, 0, first.ood)


def test_what_fails_for_every_image_ends_the_job(detector, place, monkeypatch):
    monkeypatch.setattr(score, "parts_of", lambda paths: [paths[i:i + 10] for i in range(0, len(paths), 10)])
    class Broken(Mortal):
        def verdict(self, x):
            self.calls += 1
            raise NiooddError("the network takes other images")
    broken = Broken(detector, 0)
    refused(score_files, broken, [place / "files/a"], says="takes other images")
    assert broken.calls == 11  # The first part, and its images one by one


def test_names_that_are_no_text_in_parquet(detector, place, monkeypatch):
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    monkeypatch.chdir(place / "files/a")
    os.rename(b"00.png", b"caf\xe9.png")
    for _ in range(2): done = score_files(detector, ["."], out=place / "a.parquet")
    names = {row["file"] for row in rows_of(place / "a.parquet")}
    assert (done.before, done.judged) == (30, 0) and r"caf\udce9.png" in names
    next((place / "a.parquet").glob("*.parquet")).write_bytes(b"damaged")
    refused(score_files, detector, ["."], out=place / "a.parquet", says="was changed")


def test_batches_of_somebody_else_give_the_rows_of_a_batch_job(detector, place):
    detector.save(place/"detector")
    score_files(detector, [place/"files"], out=place/"rows.jsonl")
    expected = {row["file"]: row for row in rows_of(place/"rows.jsonl")}
    paths, judge = [*map(str, image_paths([place/"files"]))], BatchJudge(place/"detector")
    bad = str(place/"files/b/99.png")
    columns = [judge({"file": some}) for some in (paths[:25], paths[25:], [bad, paths[0], paths[0]], [bad])]
    assert all({*c} == {*expected[paths[0]], "error"} for c in columns)
    for c in columns:
        for i, file in enumerate(c["file"]):
            if file == bad: assert "99.png" in c["error"][i] and c["ood"][i] and str(c["score"][i]) == "nan"
            for name, value in expected[file].items() if file != bad else ():
                same = value if isinstance(value, (str, bool)) else pytest.approx(value, rel=1e-4)
                assert c[name][i].item() == same and not c["error"][i]
    assert [len(c["file"]) for c in columns] == [25, len(paths) - 25, 3, 1]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_full_disk_is_one_line_and_the_job_goes_on(detector, place, suffix, monkeypatch):
    def fails(path, mode): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    out = place/f"rows{suffix}"
    with monkeypatch.context() as patch:
        patch.setattr(score, "open", fails, raising=False)
        with pytest.raises(NiooddError, match="No space left"): score_files(detector, [place/"files"], out=out)
    assert score_files(detector, [place/"files"], out=out).judged == 60 == len(rows_of(out))
