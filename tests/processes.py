"""Trainings in processes of their own, to be killed.

They stand here because a child process imports their module by its name, which it cannot do with a test's."""
import multiprocessing
import os
import signal
import sys

import torch

from nioodd.app.cli import main
from nioodd.benchmark.recipes import train_classifier
from nioodd.core.datasets import Problem
from nioodd.core.images import ImageSet
from nioodd.core.options import with_values
from nioodd.inversion.config import Config
from nioodd.inversion.loop import run

# Its children begin with PyTorch loaded, and with torch._dynamo, which an optimiser imports (seconds)
forkserver = multiprocessing.get_context("forkserver")
forkserver.set_forkserver_preload(["nioodd.benchmark.recipes", "nioodd.inversion.loop", "torch._dynamo"])

TINY = ["rounds=3", "pretrain_epochs=1", "generator_steps=3", "samples=44", "eval_images=50",
        "ood_sets=squares", "size=12", "average=0.9", "pixel_images=20", "pixel_steps=2",
        "noise=gaussian,tiles", "temperature=0.3"]


def squares(n, seed, classes=3):
    "Three kinds of 12×12 images that are quickly told apart: bright left, right or middle."
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    images = torch.randint(0, 60, (n, 1, 12, 12), generator=g, dtype=torch.uint8)
    for k in range(classes): images[labels == k, :, 3:9, 4 * k:4 * k + 4] += 150
    return ImageSet("squares", images, labels, [str(k) for k in range(classes)])


def run_loop(out: str, resume: bool):
    torch.set_num_threads(1)
    problem = Problem(squares(300, 0), squares(60, 1), {"squares": squares(60, 2)})
    config = with_values(Config(), [*TINY, "rounds=4", "generator_steps=12"])
    run(config, out, problem=problem, resume=resume, progress=False)


def run_training(recipe, out, resume: bool):
    torch.set_num_threads(1)
    train_classifier(recipe, out, resume=resume, progress=False)


def run_command(errors: str, *args: str):
    "The command `nioodd` with `args`; what it says on stderr goes to the file `errors`."
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is born ignoring interrupts
    torch.set_num_threads(1)
    for name, number in ((os.devnull, 1), (errors, 2)): os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), number)
    sys.exit(main([*args]))
