"""Files that somebody else made: nothing in them runs, and whatever is in them ends in one line."""
import io
import json
import os
import struct
import zipfile
import zlib

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from nioodd import GarbageDetector, LayerwiseDetector
from nioodd.app.cli import main, printable
from nioodd.app.export import Exported, export
from nioodd.core.detector import Detector, read_detector, write_detector
from nioodd.core.errors import NiooddError
from nioodd.core.files import load_tensors, parse_json, read_json_lines, save_tensors, with_prefix
from nioodd.core.images import decode, read_images
from nioodd.core.models import Classifier
from nioodd.core.options import with_values
from nioodd.inversion.config import Config

EXAMPLES = int(os.environ.get("NIOODD_FUZZ", 60)) # Of each reader; more by NIOODD_FUZZ=20000
fuzz = settings(max_examples=EXAMPLES, deadline=None, derandomize="NIOODD_FUZZ" not in os.environ, database=None,
                suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def one_line(call, *arguments):
    "The call works, or raises a `NiooddError` of one line, and nothing else."
    try: return call(*arguments)
    except NiooddError as e: assert "\n" not in str(e)


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


PNG = io.BytesIO()
Image.new("RGB", (9, 7), (1, 2, 3)).save(PNG, "PNG")


@fuzz
@given(st.binary(max_size=60), st.integers(0, len(PNG.getvalue())), st.integers(0, 255))
def test_damaged_images(noise, place, value):
    content = bytearray(PNG.getvalue())
    content[place:place + 1] = bytes([value])
    for damaged in (noise, bytes(content), PNG.getvalue()[:place]):
        one_line(decode, io.BytesIO(damaged), "it", None, None)


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


@fuzz
@given(st.binary(max_size=120))
def test_any_log(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("log")/"log.jsonl"
    path.write_bytes(content)
    one_line(read_json_lines, path, "round")


@fuzz
@given(st.sampled_from([f for f in Config.__dataclass_fields__]), st.text(max_size=12) | st.integers().map(str))
def test_any_setting(name, value): one_line(with_values, Config(), [f"{name}={value}"])


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
