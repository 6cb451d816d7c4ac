"""Files that somebody else made: nothing in them runs, and whatever is in them ends in one line."""
import io
import json
import math
import os
import struct
import zipfile
import zlib
from dataclasses import fields

import numpy as np
import pytest
import torch
from fake_sets import grey, write_cmaterdb, write_idx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays, scalar_dtypes
from PIL import Image

from nioodd import GarbageDetector, LayerwiseDetector
from nioodd.app.cli import main, printable
from nioodd.app.export import Exported, export
from nioodd.benchmark.recipes import Recipe, load_classifier, read_recipe
from nioodd.benchmark.scoreboard import Cell, check_rows, missing, plan, read_rows, refusals, scoreboard
from nioodd.core.datasets import load
from nioodd.core.detector import Detector, describe_network, read_detector, write_detector
from nioodd.core.errors import NiooddError
from nioodd.core.files import (
    load_tensors,
    parse_json,
    read_json_lines,
    save_signed,
    save_tensors,
    with_prefix,
    write_json,
    write_json_lines,
)
from nioodd.core.forward import logits_of
from nioodd.core.images import Preparation, decode, from_arrays, read_images
from nioodd.core.metrics import METRICS
from nioodd.core.models import Classifier
from nioodd.core.options import to_dict, with_values
from nioodd.inversion.config import Config, stored_config
from nioodd.inversion.invert import loss_weights
from nioodd.inversion.loop import read_run
from nioodd.inversion.report import before_after, format_table
from nioodd.trust.detector import TrustOptions

EXAMPLES = int(os.environ.get("NIOODD_FUZZ", 60)) # Of each reader; more by NIOODD_FUZZ=20000
fuzz = settings(max_examples=EXAMPLES, deadline=None, derandomize="NIOODD_FUZZ" not in os.environ, database=None,
                suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def one_line(call, *arguments, **options):
    "The call works, or raises a `NiooddError` of one line, and nothing else."
    try: return call(*arguments, **options)
    except NiooddError as e: assert "\n" not in str(e)


# Other bytes at some places, a length to which the file is cut, and what is put behind it
DAMAGE = st.tuples(st.lists(st.tuples(st.integers(0, 40) | st.integers(0, 10**6), st.integers(0, 255)), max_size=4),
                   st.none() | st.integers(0, 10**6), st.just(b"") | st.binary(max_size=8))


def damaged(content, damage):
    changes, length, more = damage
    found = bytearray(content)
    for place, value in changes: found[place % len(found)] = value
    return bytes(found[:None if length is None else length % len(found)]) + more


def images(n, seed=0):
    return torch.randint(256, (n, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    d = LayerwiseDetector(Classifier(3, size=16).eval()).fit(images(120), images(120, 1))
    return d.save(tmp_path_factory.mktemp("saved")/"d")


# --- A .pt2 is a program --------------------------------------------------------------------------------------------

class Payload:
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("program")/"d.pt2"
    export(GarbageDetector(Classifier(3, size=16).eval(), threshold=0.0), path)
    return path


def changed(program, path, change):
    "A copy of the archive with other parts, as `change(name without its folder, content)` gives them."
    with zipfile.ZipFile(program) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            folder, _, inside = name.partition("/")
            content = change(inside, old.read(name))
            if content is not None: new.writestr(name, content)
        extra = change(None, folder)
        if extra: new.writestr(*extra)
    return path


def test_what_we_write_holds_no_pickle(program):
    with zipfile.ZipFile(program) as z: names = z.namelist()
    assert not [n for n in names if n.endswith((".pt", ".pkl")) and zipfile.ZipFile(program).getinfo(n).file_size]
    assert Exported(program).verdict(images(2))["ood"].shape == (2,)


def pickled(payload):
    buffer = io.BytesIO()
    torch.save(((payload,), {}), buffer)
    return buffer.getvalue()


def with_json(part, edit):
    def change(name, content):
        if name != part: return None if name is None else content
        value = json.loads(content)
        edit(value)
        return json.dumps(value).encode()
    return change


KINDS = "sample inputs", "weights", "operation", "expression", "library", "twice", "deflated"


@pytest.mark.parametrize("kind", KINDS)
def test_code_in_a_program_does_not_run(program, tmp_path, kind):
    trap, evil = tmp_path/"EXECUTED", tmp_path/"evil.pt2"
    payload = pickled(Payload(trap))

    def change(name, content):
        if kind == "sample inputs" and name == "data/sample_inputs/model.pt": return payload
        if kind == "library" and name is None: return f"{content}/data/aotinductor/model/a.so", b"\x7fELF"
        if kind == "twice" and name is None: return f"{content}/data/sample_inputs/model.pt", payload
        return None if name is None else content

    if kind == "weights":
        def edit(config):
            for entry in config["config"].values(): entry["use_pickle"] = True
        change = with_json("data/weights/model_weights_config.json", edit)
    if kind == "operation":
        def edit(model): model["graph_module"]["graph"]["nodes"][0].update(target="torch.os.mkdir")
        change = with_json("models/model.json", edit)
    if kind == "expression":
        def edit(model):
            model["graph_module"]["graph"]["sym_int_values"] = {
                "s": {"as_expr": {"expr_str": f"__import__('os').mkdir({str(trap)!r})", "hint": None}}}
        change = with_json("models/model.json", edit)
    changed(program, evil, change)
    if kind == "deflated":
        with zipfile.ZipFile(program) as old, zipfile.ZipFile(evil, "w", zipfile.ZIP_DEFLATED) as new:
            for name in old.namelist(): new.writestr(name, old.read(name))
    with pytest.raises(NiooddError) as e: Exported(evil)
    assert "\n" not in str(e.value) and not trap.exists()
    Image.new("L", (16, 16)).save(tmp_path/"a.png")
    assert main(["score", str(evil), str(tmp_path/"a.png")]) == 2 and not trap.exists()


def test_who_made_it_may_trust_it(program, tmp_path):
    own = changed(program, tmp_path/"own.pt2", lambda name, content: None if name is None else content)
    assert Exported(own).outputs == Exported(own, trust=True).outputs
    buffer = io.BytesIO()
    torch.save(((torch.zeros(2, 1, 16, 16, dtype=torch.uint8),), {}), buffer)
    older = changed(program, tmp_path/"older.pt2", lambda name, content: None if name is None else
                    buffer.getvalue() if name == "data/sample_inputs/model.pt" else content)
    with pytest.raises(NiooddError, match="trust=True"): Exported(older)
    assert Exported(older, trust=True).verdict(images(2))["ood"].shape == (2,)


# --- Images ---------------------------------------------------------------------------------------------------------

def bomb(side):
    "A PNG of side × side black pixels."
    def number(n): return struct.pack(">I", n)
    def chunk(kind, data): return number(len(data)) + kind + data + number(zlib.crc32(kind + data))
    rows = zlib.compressobj(9)
    data = b"".join([rows.compress(bytes(1 + 3 * side)) for _ in range(side)] + [rows.flush()])
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_a_small_file_of_many_pixels_is_not_decoded(tmp_path):
    (tmp_path/"a.png").write_bytes(bomb(5200))
    with pytest.raises(NiooddError, match="5200×5200 pixels"): read_images(tmp_path/"a.png")
    assert read_images(tmp_path/"a.png", 8, most_pixels=30_000_000).shape == (1, 3, 8, 8)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the machine has no named pipes")
def test_a_named_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path/"a.png")
    with pytest.raises(NiooddError, match="no regular file"): read_images(tmp_path/"a.png")


def image_file(form, mode):
    buffer = io.BytesIO()
    Image.effect_noise((9, 7), 50).convert(mode).save(buffer, form)
    return buffer.getvalue()


IMAGES = {"PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"), "JPEG": ("L", "RGB", "CMYK"), "GIF": ("L", "P"),
          "TIFF": ("1", "L", "P", "RGB", "RGBA", "CMYK", "I;16", "F"), "WEBP": ("RGB", "RGBA"),
          "BMP": ("1", "L", "P", "RGB", "RGBA"), "PPM": ("L", "RGB"), "ICO": ("RGBA",), "TGA": ("L", "RGB")}
IMAGES = {form: [image_file(form, mode) for mode in modes] for form, modes in IMAGES.items()}
FORMS = st.sampled_from([*IMAGES]).flatmap(lambda form: st.sampled_from(IMAGES[form]))


@pytest.mark.filterwarnings("ignore")
@fuzz
@given(st.binary(max_size=60) | st.builds(damaged, FORMS, DAMAGE),
       st.sampled_from([Preparation(), Preparation(8, 1), Preparation(5, 3, resize=6)]))
def test_damaged_images(content, preparation):
    x = one_line(decode, io.BytesIO(content), "it", preparation)
    if x is not None: assert x.dtype == torch.uint8 and x.ndim == 3 and min(x.shape) > 0


def test_sound_images_are_read():
    "Damage is tried on files that are read without it."
    unread = [form for form, files in IMAGES.items() for content in files
              if one_line(decode, io.BytesIO(content), "it", Preparation(5, 3)) is None]
    assert unread == ["TIFF"]  # Of floats


def tiff(bits=16, zero_is=1, sign=1):
    "A TIFF of 8 × 8 pixels whose bytes are all 200."
    data = bytes([200]) * (64 * bits // 8)
    tags = [(256, 8), (257, 8), (258, bits), (259, 1), (262, zero_is), (273, 8), (277, 1), (278, 8), (279, len(data)),
            (339, sign)]
    rows = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + rows + bytes(4)


@pytest.mark.parametrize("kind, said", [(dict(bits=12), "neither 8 nor 16"), (dict(zero_is=0), "0 where it is white"),
                                        (dict(bits=8, sign=2), "a sign")])
def test_a_tiff_whose_numbers_mean_something_else(kind, said):
    assert decode(io.BytesIO(tiff()), "it").unique().tolist() == [200]
    assert decode(io.BytesIO(tiff(bits=8, zero_is=0)), "it").unique().tolist() == [55]
    with pytest.raises(NiooddError, match=said): decode(io.BytesIO(tiff(**kind)), "it")


def test_transparent_pixels_of_16_bits_are_white():
    file = io.BytesIO()
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000).save(file, "PNG", transparency=50_000)
    x = decode(file, "it")
    assert x[0, 6, 2] == 255 and x[0, 6, 3] == 51_000 >> 8


def test_postscript_is_not_run(tmp_path, monkeypatch):
    "PIL would hand it on to Ghostscript, whatever the file is called."
    (tmp_path/"gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/RUN\n")
    (tmp_path/"gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (tmp_path/"a.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\n{} loop\n")
    with pytest.raises(NiooddError, match="EPS is a format that another program"): read_images(tmp_path/"a.png")
    assert not (tmp_path/"RUN").exists()


def test_names_that_are_no_line(tmp_path):
    "Nor does an error have several lines because a name has."
    (tmp_path/"a\nb.png").write_text("nothing")
    for name in ("a\nb.png", "none\r\n.png", "a\0b.png", "x" * 5000, 3, b"a.png", None):
        path = tmp_path/name if isinstance(name, str) else name
        with pytest.raises(NiooddError) as e: read_images(path)
        assert str(e.value).isprintable()
    for folder in ("a\nb", "a\0b", "x" * 5000):
        with pytest.raises(NiooddError) as e: Detector.load(tmp_path/folder)
        assert str(e.value).isprintable()


# --- JSON and tensors -----------------------------------------------------------------------------------------------

JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
                    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4))


def places(value, path=()):
    "The paths of all values in a JSON value."
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for k, v in inner: yield from places(v, (*path, k))


def replaced(value, path, new):
    if not path: return new
    whole = dict(value) if isinstance(value, dict) else list(value)
    whole[path[0]] = replaced(whole[path[0]], path[1:], new)
    return whole


@fuzz
@given(data=st.data(), new=JSON | st.sampled_from([10**400, -1, 0, 1e308, "..", {}, []]))
def test_any_value_in_detector_json(saved, tmp_path_factory, data, new):
    folder = tmp_path_factory.mktemp("d")
    text = json.loads((saved/"detector.json").read_text())
    where = data.draw(st.sampled_from(list(places(text))))
    (folder/"detector.json").write_text(json.dumps(replaced(text, where, new)))
    (folder/"model.safetensors").symlink_to(saved/"model.safetensors")
    d = one_line(Detector.load, folder)
    if d is not None: one_line(d.verdict, images(2))


ODD = [torch.zeros(0), torch.zeros(3, 3), torch.full((4,), torch.nan), torch.ones(2).long(), torch.zeros(())]


@fuzz
@given(data=st.data(), new=st.sampled_from(ODD))
def test_any_tensor_in_a_detector(saved, tmp_path_factory, data, new):
    folder = tmp_path_factory.mktemp("d")
    description, tensors = read_detector(saved)
    name = data.draw(st.sampled_from(sorted(tensors)))
    write_detector(folder/"x", {k: description[k] for k in description if k not in ("format", "nioodd", "sha256")},
                   tensors | {name: new})
    d = one_line(Detector.load, folder/"x")
    if d is not None and name not in with_prefix(tensors, "network."): one_line(d.verdict, images(2))


@fuzz
@given(st.binary(max_size=200) | st.integers(0, 10**6))
def test_damaged_tensors(tmp_path_factory, damage):
    path = tmp_path_factory.mktemp("t")/"t.safetensors"
    save_tensors(path, dict(a=torch.arange(5.), b=torch.ones(2)), dict(x=1))
    content = bytearray(path.read_bytes())
    if isinstance(damage, int):
        content[damage % len(content)] ^= 1 << damage % 8
        path.write_bytes(content)
        with pytest.raises(NiooddError): load_tensors(path) # Every bit is under the checksum
    else:
        path.write_bytes(damage)
        one_line(load_tensors, path)


@fuzz
@given(st.text(max_size=80) | JSON.map(json.dumps))
def test_any_json(text):
    try: parse_json(text)
    except ValueError: pass


def test_a_name_is_there_once(saved, tmp_path):
    "Of two thresholds a reader sees the first, and the program would take the second."
    with pytest.raises(ValueError, match="'a' is there twice"): parse_json('{"b": [{"a": 1, "c": 2, "a": 1}]}')
    text = (saved/"detector.json").read_text().rstrip()
    (tmp_path/"detector.json").write_text(text[:-1] + ', "threshold": 1e9}')
    (tmp_path/"model.safetensors").symlink_to(saved/"model.safetensors")
    with pytest.raises(NiooddError, match="'threshold' is there twice"): Detector.load(tmp_path)


@fuzz
@given(st.binary(max_size=120))
def test_any_log(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("log")/"log.jsonl"
    path.write_bytes(content)
    one_line(read_json_lines, path, "round")


SETTINGS = [(options, f.name) for options in (Config(), Recipe(), TrustOptions()) for f in fields(options)]
VALUES = st.text(max_size=12) | st.integers().map(str) | st.floats().map(str) | st.sampled_from(
    ["1e400", "-0", "1_000", "٣", "true", "a:1", "a:b:c,d", "kl:1", "ce:nan", "mnist[0,2]", "folder:", "[", "0x10"])


@fuzz
@given(st.sampled_from(SETTINGS), VALUES, st.text(max_size=6))
def test_any_setting(setting, value, name):
    options, known = setting
    for text in (f"{known}={value}", f"{name}={value}", name): one_line(with_values, options, [text])
    found = one_line(with_values, options, [f"{known}={value}"])
    if isinstance(found, Config): one_line(lambda: loss_weights(found.loss_weights))


# --- Data sets, results, folders ------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    "A folder with MNIST's test files and CMATERdb, of a few small images each."
    root = tmp_path_factory.mktemp("sets")
    for part in ("train", "t10k"):
        write_idx(root/f"MNIST/raw/{part}-images-idx3-ubyte", grey(4, 3))
        write_idx(root/f"MNIST/raw/{part}-labels-idx1-ubyte", np.arange(4, dtype=np.uint8))
    write_cmaterdb(root)
    return root


def with_content(path, content, call, *arguments, **options):
    "`one_line` of a call while a file has another content."
    whole = path.read_bytes()
    path.write_bytes(content)
    try: return one_line(call, *arguments, **options)
    finally: path.write_bytes(whole)


def check_set(s):
    assert s.images.dtype == torch.uint8 and s.images.ndim == 4 and len(s)
    assert s.labels.dtype == torch.int64 and 0 <= s.labels.min() and s.labels.max() < len(s.classes)


@fuzz
@given(DAMAGE, st.sampled_from(["images-idx3", "labels-idx1"]))
def test_damaged_idx_files(sets, damage, kind):
    path = sets/f"MNIST/raw/t10k-{kind}-ubyte"
    s = with_content(path, damaged(path.read_bytes(), damage), load, "mnist", "test", root=sets, size=4)
    if s is not None: check_set(s)


@pytest.mark.filterwarnings("ignore")
@fuzz
@given(DAMAGE)
def test_damaged_npz_files(sets, damage):
    path = sets/"CMATERdb/bangla-numerals/testing-images.npz"
    s = with_content(path, damaged(path.read_bytes(), damage), load, "cmaterdb", "test", root=sets, size=4)
    if s is not None: check_set(s)


ARRAYS = arrays(scalar_dtypes(), array_shapes(min_dims=0, max_dims=4, max_side=3))


@pytest.mark.filterwarnings("ignore")
@fuzz
@given(ARRAYS, ARRAYS | st.sampled_from([np.arange(2), np.array([None, "a"], object)]))
def test_any_arrays_in_an_npz_file(sets, images, labels):
    content = io.BytesIO()
    np.savez(content, images=images, labels=labels)
    path = sets/"CMATERdb/bangla-numerals/testing-images.npz"
    s = with_content(path, content.getvalue(), load, "cmaterdb", "test", root=sets, size=4)
    if s is not None: check_set(s)
    s = one_line(from_arrays, images, labels)
    if s is not None: check_set(s)


ROW = dict(network="C1", seed=0, detector="msp", ood="gaussian", n_id=30, at_most=30, weights="0123456789abcdef",
           fit_seconds=0.1, score_seconds=0.2, quantiles=dict(id=[0.1, 0.2]), **dict.fromkeys(METRICS, 0.5))
ROWS = [ROW, ROW | dict(ood="gaussian-like"), dict(ROW, detector="energy", not_run="it cannot be computed")]
CELLS = [Cell("C1", 0, detector, ood) for detector in ("msp", "energy") for ood in ("gaussian", "gaussian-like")]
NEW = JSON | st.sampled_from([10**400, 10**19, -1, 0, 1e308, math.nan, "..", {}, []])


def read_results(out):
    rows = read_rows(out)
    missing(CELLS, out), check_rows(CELLS, out, out/"models", 30), plan(CELLS, out, out/"models"), refusals(rows)
    for metric in ("auroc", "fpr95_id_positive"): scoreboard(rows, "C1", metric)


@fuzz
@given(place=st.integers(0, 200), new=NEW, damage=st.none() | DAMAGE)
def test_any_result_file(tmp_path_factory, place, new, damage):
    out = tmp_path_factory.mktemp("results")
    where = [*places(ROWS)]
    rows = replaced(ROWS, where[place % len(where)] or (0,), new)
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (out/"C1-seed0.jsonl").write_bytes(content if damage is None else damaged(content, damage))
    one_line(read_results, out)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "The folder of a trained network, and of a run."
    folder = tmp_path_factory.mktemp("trained")
    net = Classifier(2, size=16).eval()
    sha256 = save_signed(folder/"net"/"model.safetensors", net.state_dict())
    write_json(folder/"net"/"model.json", dict(
        format=1, status="finished", architecture="C1", network=describe_network(net), recipe=to_dict(Recipe()), seed=0,
        data="mnist", classes=["a", "b"], epochs_done=10, epochs=10, sha256=sha256, accuracy=dict(test=0.5)))
    scores = dict(images=5, **dict.fromkeys(METRICS, 0.5))
    row = dict(round=0, id=dict(accuracy_known=0.5, images=5), ood=dict(letters=scores))
    write_json_lines(folder/"run"/"metrics.jsonl", [row, row | dict(round=1)])
    write_json(folder/"run"/"run.json", dict(
        status="finished", config=to_dict(Config()), rounds_done=1, best_round=1, seconds=1.0, n_known=2, seed=0,
        classes=["a", "b"], sizes=dict(train=5), trust=dict(id={}, ood=dict(letters=scores), strength=0.1)))
    return folder


def copied(folder, to, name, place, new):
    "The folder with another value in one of its JSON files, at a place counted through."
    for path in folder.iterdir():
        if path.name != name: (to/path.name).symlink_to(path)
    values = [json.loads(line) for line in (folder/name).read_text().splitlines()] if name.endswith("l") else [
        json.loads((folder/name).read_text())]
    where = [*places(values)][1:]
    values = replaced(values, where[place % len(where)], new)
    (to/name).write_text("\n".join(map(json.dumps, values)))
    return to


@fuzz
@given(place=st.integers(0, 200), new=NEW)
def test_any_value_in_model_json(trained, tmp_path_factory, place, new):
    folder = copied(trained/"net", tmp_path_factory.mktemp("net"), "model.json", place, new)
    found = one_line(load_classifier, folder)
    if found is not None: one_line(logits_of, found[0], images(2))
    one_line(read_recipe, folder)


@fuzz
@given(place=st.integers(0, 200), new=NEW, name=st.sampled_from(["run.json", "metrics.jsonl"]))
def test_any_value_in_a_run(trained, tmp_path_factory, place, new, name):
    folder = copied(trained/"run", tmp_path_factory.mktemp("run"), name, place, new)
    rows = one_line(before_after, folder)
    for style in ("text", "md", "csv"):
        if rows is not None: one_line(format_table, rows, style)
    info = one_line(read_run, folder)
    if info is not None: one_line(stored_config, info["config"])


# --- What is printed ------------------------------------------------------------------------------------------------

@fuzz
@given(st.text(max_size=20))
def test_a_terminal_gets_no_orders(text): assert printable(text).isprintable()


def test_names_that_are_formulas_or_orders(saved, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("=1+1.png", "\x1b[31m.png"): Image.new("L", (16, 16)).save(name)
    assert main(["score", str(saved), "=1+1.png", "--format", "csv"]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("./=1+1.png,")
    assert main(["score", str(saved), "\x1b[31m.png"]) == 0
    assert "\x1b" not in capsys.readouterr().out
