"""Outputs that are kept: the same from the file, and a file of something else is said to be one."""
import pytest
import torch

from nioodd.core.errors import NiooddError
from nioodd.core.files import save_tensors
from nioodd.core.models import Classifier
from nioodd.posthoc.outputs import Outputs, kept_outputs, network_outputs


def test_a_kept_file_of_something_else(tmp_path):
    net = Classifier(3, size=8).eval()
    x = torch.randint(256, (5, 1, 8, 8), dtype=torch.uint8)
    kept = kept_outputs(net, x, tmp_path)
    for a, b in zip(kept, network_outputs(net, x)): assert torch.equal(a, b)
    (path,) = tmp_path.glob("*.safetensors")
    good = kept._asdict()
    for wrong, says in (({"a": torch.zeros(2)}, r"holds a \[2\]; expected logits, features, before of 5 images"),
                        ({}, "holds nothing"), (good | {"more": torch.zeros(5, 1)}, "more"),
                        ({k: v[:4] for k, v in good.items()}, r"logits \[4, 3\]"),
                        (good | {"before": torch.zeros(())}, r"before \[\]")):
        save_tensors(path, {k: v.clone() for k, v in wrong.items()})
        with pytest.raises(NiooddError, match=says) as e: kept_outputs(net, x, tmp_path)
        assert "\n" not in str(e.value) and "delete it" in str(e.value)
    path.write_bytes(b"no tensors")
    with pytest.raises(NiooddError, match="cannot be read"): kept_outputs(net, x, tmp_path)
    path.unlink()
    assert kept_outputs(net, x, tmp_path)._fields == Outputs._fields
