"""Several threads, three detectors, and the network's owner: each gets the answers that it gets alone."""
import copy
import os
import pickle
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from foreign_networks import make, same_state, state

from nioodd import GarbageDetector, LayerwiseDetector, TrustIntervalDetector
from nioodd.inversion.invert import invert
from nioodd.trust.fast_siblings import _one_at_a_time
from nioodd.trust.intervals import TrustIntervals, uniform_sigma

CALLS = int(os.environ.get("NIOODD_THREAD_CALLS", 25)) # Of each of 8 threads to each detector


def images(n, seed=0):
    return torch.randint(256, (n, 1, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def switches_often():
    "Threads take turns every 0.1 ms."
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


def detectors(net):
    return [LayerwiseDetector(net).fit(images(150), images(150, 1)), GarbageDetector(net, threshold=0.0),
            TrustIntervalDetector(net, uniform_sigma(net, 0.1)).fit(held_out=images(60, 2))]


@pytest.mark.parametrize("training", [False, True])
def test_eight_threads_beside_the_owner(training):
    net = make("plain").train(training)
    asked = detectors(net)
    batches = [images(4, seed) for seed in range(5)]
    alone = [[d.predict(x) for x in batches] for d in asked]
    x = images(4) / 127.5 - 1
    own, before = None if training else net(x).detach(), state(net)
    asked[2].siblings.redraw(asked[2].siblings.seed) # The first thread draws again, and traces the network

    def ask(number):
        wrong = 0
        for i in range(CALLS):
            k = (number + i) % len(batches)
            for d, expected in zip(asked, alone):
                wrong += not torch.allclose(d.predict(batches[k]), expected[k], rtol=1e-4)
        return wrong

    def use(_):
        "The owner's own calls, which see no hook, mode or weight of ours."
        return 0 if training else sum(not torch.equal(net(x).detach(), own) for _ in range(3 * CALLS))

    with ThreadPoolExecutor(9) as pool:
        used = pool.submit(use, 0)
        assert sum(pool.map(ask, range(8))) == 0 and used.result() == 0
    assert same_state(before, state(net))


def test_learning_and_inverting_beside_the_owner():
    net = make("view").eval()
    x, y = images(32) / 127.5 - 1, torch.arange(32) % 4
    own, before = net(x).detach(), state(net)

    def learn(): return TrustIntervals(net).fit([(x, y)], steps=4, progress=False)[-1]["nll"]
    def turn(): return invert(net, 8, size=12, channels=1, steps=4, batch_size=8, progress=False).images
    learnt, turned = learn(), turn()
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(learn), pool.submit(turn)]
        while not all(j.done() for j in jobs): assert torch.equal(net(x).detach(), own)
    # Both use torch's one random stream, so only what does not draw from it is the same
    assert abs(jobs[0].result() - learnt) < 1 and jobs[1].result().shape == turned.shape
    assert same_state(before, state(net))


def test_what_has_judged_can_be_copied_and_pickled():
    net, x = make("plain").eval(), images(4)
    for d in detectors(net):
        scores = d.predict(x)
        for again in (copy.deepcopy(d), pickle.loads(pickle.dumps(d))):
            assert torch.allclose(again.predict(x), scores, rtol=1e-5)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the machine cannot fork")
def test_a_process_forked_while_others_judge():
    "Locks that their threads hold would never be opened in the child."
    net, x = make("plain").eval(), images(4)
    d = TrustIntervalDetector(net, uniform_sigma(net, 0.1), threshold=0.0)
    expected = d.predict(x)
    with d.siblings._drawing, _one_at_a_time:
        child = os.fork()
        if not child:
            signal.alarm(20)
            d.siblings.redraw(d.siblings.seed)  # It traces again, too
            os._exit(0 if torch.allclose(d.predict(x), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the machine cannot fork")
def test_a_forked_process_judges(tmp_path):
    net, x = make("plain").eval(), images(4)
    asked = detectors(net)
    expected = [d.predict(x) for d in asked]
    child = os.fork()
    if not child: os._exit(0 if all(torch.allclose(d.predict(x), e) for d, e in zip(asked, expected)) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
