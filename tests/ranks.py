"""What each process of `torch.distributed` does in posthoc/test_ranks.py; they import it from here."""
import os

import pytest
import torch
from small_networks import small_classifier, small_images
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

from nioodd.core.detector import shared_images
from nioodd.core.errors import NiooddError
from nioodd.core.forward import SharedImages
from nioodd.posthoc.layerwise import LayerwiseDetector

TRAIN, HELD_OUT, NEW = small_images(600), small_images(301, 1), small_images(50, 2)


class EveryOther(IterableDataset):
    "A stream of which each process reads its part."
    def __init__(self, x, rank, ranks): self.x = x[rank::ranks]
    def __iter__(self): return iter(self.x)


def given(kind, rank, ranks):
    "Training and held-out images as this process has them."
    if kind == "data set": return TensorDataset(TRAIN), HELD_OUT
    if kind == "stream": return [DataLoader(EveryOther(x, rank, ranks), 50) for x in (TRAIN, HELD_OUT)]
    samplers = [DistributedSampler(x, ranks, rank, shuffle=False, drop_last=False) for x in (TRAIN, HELD_OUT)]
    return [DataLoader(TensorDataset(x), 50, sampler=s) for x, s in zip((TRAIN, HELD_OUT), samplers)]


KINDS = {"stream": 250, "data set": 5000}  # Kind of images → how many are kept at most


def fit(rank, ranks, folder):
    "What each process does: a detector of each kind of images."
    torch.set_num_threads(1)
    os.environ |= dict(MASTER_ADDR="localhost", GLOO_SOCKET_IFNAME="lo")
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=ranks)
    for kind, n in KINDS.items():
        detector = LayerwiseDetector(small_classifier())
        detector.fit(*given(kind, rank, ranks), n=n, bank=40, across_ranks=True)
        assert 0 < len(shared_images(TRAIN, n).own) < 600  # It has a part of them
        detector.save(f"{folder}/{kind}/{rank}")
    mine = SharedImages(TRAIN[rank::ranks], torch.arange(rank, 600, ranks), 600)
    others = SharedImages(TRAIN[1 - rank::2], torch.arange(1 - rank, 600, 2), 600)
    with pytest.raises(NiooddError, match="are among"): detector.see(mine, others)  # of another process
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
