"""Files that are whole, checkpoints, and folders in which a task begins or goes on."""
import json
import os
import sys
import time
from unittest.mock import patch

import pytest
import torch
from torch import nn

from nioodd.core.errors import NiooddError
from nioodd.core.files import (
    ResumableFolder,
    check_empty,
    check_schema,
    load_tensors,
    provenance,
    read_json_lines,
    restore_checkpoint,
    save_checkpoint,
    save_tensors,
    write_atomic,
    write_json,
    write_json_lines,
)

CAKE = ResumableFolder("cake.json", "cake", "`bake`", required=("recipe.flour", "status"), required_at_end=("taste",))
GOOD = dict(recipe=dict(flour=200), status="running")


def fails(call, *words):
    with pytest.raises(NiooddError) as e: call()
    assert "\n" not in str(e.value)
    for word in words: assert word in str(e.value)


def test_the_name_of_the_checksum_is_under_it_too(tmp_path):
    "A file whose checksum has another name is no older one without a checksum."
    path = save_tensors(tmp_path/"t.safetensors", dict(a=torch.arange(5.)))
    path.write_bytes(path.read_bytes().replace(b'"sha256"', b'"sha257"'))
    with pytest.raises(NiooddError, match="its head is another"): load_tensors(path)


def test_the_grammar_of_addresses_waits_until_it_is_asked_for(tmp_path, monkeypatch):
    (tmp_path/"rfc3987_syntax.py").write_text("def is_valid_syntax(rule, text): return (rule, text) == ('iri', 'good')")
    monkeypatch.syspath_prepend(tmp_path)
    with patch.dict(sys.modules):
        for name in [n for n in sys.modules if n.partition(".")[0] in ("jsonschema", "rfc3987_syntax")]:
            del sys.modules[name]
        check_schema(3, {"type": "integer"}, "it")
        fails(lambda: check_schema("a", {"type": "integer"}, "it"), "it: 'a' is not of type 'integer'")
        assert "rfc3987_syntax" not in sys.modules
        conforms = sys.modules["jsonschema"].FormatChecker().conforms
        assert conforms("good", "iri") and not conforms("bad", "iri") and "rfc3987_syntax" in sys.modules


# --- files ----------------------------------------------------------------------------------------------------------

@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the machine has no /dev/full")
def test_the_real_full_device_is_named_as_such(tmp_path, monkeypatch):
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, *rest: real("/dev/full", os.O_WRONLY))
    fails(lambda: write_atomic(tmp_path / "x", b"123"), "the disk is full", "another place")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    write_atomic(tmp_path / "x", "old")

    def fails_now(fd): raise OSError(5, "Input/output error")
    monkeypatch.setattr(os, "fsync", fails_now)
    fails(lambda: write_atomic(tmp_path / "x", "new"), "Input/output error")
    assert (tmp_path / "x").read_text() == "old" and os.listdir(tmp_path) == ["x"]


def test_old_parts_of_this_file_are_removed_and_no_others(tmp_path):
    two_hours = time.time() - 7200
    for name, old in ((".x.a.part", True), (".x.b.part", False), (".y.a.part", True)):
        (tmp_path / name).touch()
        if old: os.utime(tmp_path / name, (two_hours, two_hours))
    write_atomic(tmp_path / "x", "")
    assert sorted(os.listdir(tmp_path)) == [".x.b.part", ".y.a.part", "x"]


def test_json_lines(tmp_path):
    path, rows = tmp_path / "log.jsonl", [dict(round=0), dict(round=1, loss=0.5)]
    assert read_json_lines(path, "round") == []
    assert read_json_lines(write_json_lines(path, rows), "round") == rows
    for line in ("[1]", "{", '{"loss": 1}', ""):
        path.write_text('{"round": 0}\n' + line + "\n")
        fails(lambda: read_json_lines(path, "round"), "log.jsonl, line 2")


def test_tensors_come_back_whatever_their_memory(tmp_path):
    tensors = dict(strided=torch.arange(6).view(2, 3).T, channels_last=torch.rand(2, 3, 4, 4),
                   half=torch.ones(2).half(), one=torch.tensor(3))
    tensors["channels_last"] = tensors["channels_last"].to(memory_format=torch.channels_last)
    tensors["again"] = tensors["half"]
    path = save_tensors(tmp_path / "t.safetensors", tensors, dict(a=[1, None]))
    loaded, meta = load_tensors(path)
    assert meta == dict(a=[1, None]) and loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[k], t) and loaded[k].dtype == t.dtype for k, t in tensors.items())
    before = path.read_bytes()
    save_tensors(path, dict(reversed(tensors.items())), dict(a=[1, None]))
    assert path.read_bytes() == before  # the order of names does not matter


def test_damaged_tensors_are_one_line(tmp_path):
    path = save_tensors(tmp_path / "t.safetensors", dict(a=torch.zeros(9)))
    path.write_bytes(path.read_bytes()[:-1])
    fails(lambda: load_tensors(path), "t.safetensors cannot be read", "damaged")
    fails(lambda: load_tensors(tmp_path / "no"), "does not exist")


def test_provenance_is_json():
    origin = provenance("cpu")
    assert json.loads(json.dumps(origin)) == origin and origin["device"] == "cpu"
    assert origin["versions"].keys() >= {"python", "torch", "nioodd"}


# --- checkpoints ----------------------------------------------------------------------------------------------------

def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))


def steps(parts, n):
    "n steps of each network with its optimiser, on random inputs."
    for _ in range(n):
        for net, optimiser in parts:
            optimiser.zero_grad()
            net(torch.randn(6, 4)).square().mean().backward()
            optimiser.step()


KINDS = dict(adam=lambda p: torch.optim.AdamW(p, 0.1), momentum=lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
             plain=lambda p: torch.optim.SGD(p, 0.1))


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_goes_on_bit_for_bit(kind, tmp_path):
    "Two networks, one with a name that begins as the other's; dropout shows that the random stream goes on too."
    def parts(seed):
        nets = [network(seed), network(seed + 1)]
        return [(net, KINDS[kind](net.parameters())) for net in nets]

    def named(parts):
        (a, opt_a), (b, opt_b) = parts
        return dict(net=a, net_b=b), dict(net_optimiser=opt_a, optimiser=opt_b)
    whole, part = parts(0), parts(7)
    torch.manual_seed(1)
    steps(whole, 3)
    path = save_checkpoint(tmp_path / "c.safetensors", *named(whole), dict(rows=[1, 2]))
    steps(whole, 2)
    torch.manual_seed(99)
    assert restore_checkpoint(path, *named(part)) == dict(rows=[1, 2])
    steps(part, 2)
    for (a, _), (b, _) in zip(whole, part):
        for x, y in zip(a.state_dict().values(), b.state_dict().values()): assert torch.equal(x, y)
    assert torch.equal(torch.randn(3), _continued(whole, path, named))


def _continued(whole, path, named):
    "What the random stream gives after the checkpoint and two steps."
    restore_checkpoint(path, *named(whole))
    steps(whole, 2)
    return torch.randn(3)


# --- folders --------------------------------------------------------------------------------------------------------

def test_a_new_folder_and_one_to_go_on_with(tmp_path):
    assert not CAKE.begun(tmp_path / "new", resume=False)
    (tmp_path / "empty").mkdir()
    assert not CAKE.begun(tmp_path / "empty", resume=False) and not CAKE.begun(tmp_path / "empty", resume=True)
    (tmp_path / "empty/.cake.json.x.part").touch()  # of a process that was killed before its first file
    assert not CAKE.begun(tmp_path / "empty", resume=True)
    write_json(tmp_path / "cake/cake.json", GOOD)
    assert CAKE.begun(tmp_path / "cake", resume=True) and CAKE.read(tmp_path / "cake") == GOOD


def test_folders_that_do_not_fit(tmp_path):
    write_json(tmp_path / "cake/cake.json", GOOD)
    fails(lambda: CAKE.begun(tmp_path / "cake", resume=False), "holds another cake", "--resume")
    fails(lambda: CAKE.begun(tmp_path / "new", resume=True), "holds no cake", "nothing to resume")
    write_atomic(tmp_path / "x/thesis.tex", "")
    for resume in (False, True):
        fails(lambda: CAKE.begun(tmp_path / "x", resume), "not empty and holds no cake", "new folder")
    fails(lambda: CAKE.begun(tmp_path / "x/thesis.tex", resume=False), "is a file")
    fails(lambda: check_empty(tmp_path / "x"), "x is not empty; give")


def test_options_that_changed(tmp_path):
    CAKE.check_same(tmp_path, "recipe", [])
    fails(lambda: CAKE.check_same(tmp_path, "recipe", ["flour: 1 → 2", "seed: 0 → 1"]),
          "begun with another recipe (flour: 1 → 2; seed: 0 → 1)")


@pytest.mark.parametrize("text, words", [
    ("{", "not valid JSON"),
    ("[]", "lacks recipe.flour, status"),
    ('{"recipe": 3, "status": ""}', "lacks recipe.flour"),
    ('{"recipe": {"flour": 1}, "status": "finished"}', "lacks taste")])
def test_damaged_descriptions(text, words, tmp_path):
    (tmp_path / "cake.json").write_text(text)
    fails(lambda: CAKE.read(tmp_path), "cake.json", words)


def test_what_is_required_only_here(tmp_path):
    write_json(tmp_path / "cake.json", GOOD)
    fails(lambda: CAKE.read(tmp_path, also=("baker",)), "is not the JSON of a cake: it lacks baker", "`bake`")
    fails(lambda: CAKE.read(tmp_path / "no"), "holds no cake (no cake.json)", "folder of a `bake`")
