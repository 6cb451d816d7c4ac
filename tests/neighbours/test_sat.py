"Questions to a SAT solver, against brute force"
import sys
from itertools import product

import pytest
import torch

from nioodd.core.errors import NiooddError
from nioodd.neighbours import sat
from nioodd.neighbours.binarised import UNIT, IntegerNetwork

needs_solver = pytest.mark.skipif(not sat.has_solver(), reason="python-sat is not installed: pip install 'nioodd[sat]'")


def random_network(n_in=12, n_hidden=9, n_out=4, seed=0, dense=False):
    rng = torch.Generator().manual_seed(seed)
    weights = torch.randint(-1, 2, (n_hidden, n_in), generator=rng).to(torch.int8)
    if dense: weights[weights == 0] = 1
    thresholds = (weights.abs().sum(1) // 2 + torch.randint(-1, 3, (n_hidden,), generator=rng)).long()
    output = torch.randint(0, 2, (n_out, n_hidden), generator=rng).to(torch.int8) * 2 - 1
    return IntegerNetwork(weights, thresholds, output, torch.randint(-3, 4, (n_out,), generator=rng) * (UNIT // 2))


EVERY = torch.tensor([*product((False, True), repeat=12)])


@needs_solver
@pytest.mark.parametrize("encoding", sat.ENCODINGS)
@pytest.mark.parametrize("seed", [0, 1])
def test_every_image_of_a_toy_network(encoding, seed):
    "All 2^12 inputs: what the solver finds of a class is what the table says. Ties of scores occur."
    network = random_network(seed=seed)
    answers = network.predict(EVERY)
    label = answers.bincount(minlength=4).clamp_min(1).argmin().item()
    formula, found = sat.Formula(network, encoding), set()
    for literal in formula.wins(label): formula.add(literal)
    with sat.SolverProcess("minisat22") as solver:
        while (model := solver.solve(formula)[1]) is not None:
            bits = model[formula.bits]
            found.add(tuple(bits.tolist()))
            formula.add(*(-x for x in formula.given(bits)))
    assert found == {tuple(row) for row in EVERY[answers == label].tolist()}


@needs_solver
@pytest.mark.parametrize("encoding", sat.ENCODINGS)
def test_inference(encoding):
    network, bits = random_network(seed=2, dense=True), EVERY[::40]
    assert torch.equal(sat.infer(network, bits, encoding), network.predict(bits))


@needs_solver
@pytest.mark.parametrize("dense", [True, False])
def test_certificates_are_brute_force(dense):
    network = random_network(seed=3, dense=dense)
    answers = network.predict(EVERY)
    for image, own in zip(EVERY[::1024], answers[::1024]):
        distance = (EVERY ^ image).sum(1)
        for radius in (0, 1, 2, 3):
            inside = answers[distance <= radius]
            certificate = sat.certify(network, image, radius)
            assert (certificate.status == "robust") == bool((inside == own).all())
            if certificate.counterexample is not None:
                assert (certificate.counterexample ^ image).sum() <= radius
                assert network.predict(certificate.counterexample[None]) != own


@needs_solver
def test_priors_and_distance():
    network = random_network(16, 9, 4, seed=1)
    near = torch.zeros(16, dtype=torch.bool)
    priors = sat.Priors(ink=(4, 9), smooth=12, near=(near, 8))
    found = sat.invert_sat(network, 0, 4, 3, priors)
    assert found.status in ("sat", "unsat") and (network.predict(found.bits) == 0).all()
    assert ((found.bits.sum(1) >= 4) & (found.bits.sum(1) <= 8)).all() and (sat.neighbours(found.bits) <= 12).all()
    distance = (found.bits[:, None] ^ found.bits).sum(2) + 99 * torch.eye(len(found.bits), dtype=torch.long)
    assert not len(found.bits) or distance.min() >= 3
    assert found.images.shape[1:] == (1, 4, 4)


@needs_solver
def test_unsat_means_that_there_is_none():
    network = random_network(seed=0)
    answers, ink = network.predict(EVERY), EVERY.sum(1)
    for label, most in product(range(4), (0, 2)):
        exists = ((answers == label) & (ink <= most)).any()
        status = sat.invert_sat(network, label, priors=sat.Priors(ink=(0, most))).status
        assert status == ("sat" if exists else "unsat")


@needs_solver
def test_a_proof_is_checked():
    network = random_network(seed=0)
    answers = network.predict(EVERY)
    distance = (EVERY ^ EVERY[0]).sum(1)
    other = max(set(answers.tolist()) - {answers[0].item()}, key=lambda k: distance[answers == k].min())
    radius = distance[answers == other].min().item() - 1
    certificate = sat.certify(network, EVERY[0], radius, target=other, proof=True)
    assert certificate.status == "robust" and sat.check_proof(certificate.clauses, certificate.proof)
    answered = sat.certify(network, EVERY[0], radius + 1, target=other)
    assert answered.status == "counterexample"
    assert not sat.check_proof(answered.clauses, certificate.proof) and not sat.check_proof(answered.clauses, [[]])


def test_the_checker_needs_no_solver():
    clauses = sat.Clauses()
    x, y = clauses.new(), clauses.new()
    for clause in ((x, y), (x, -y), (-x, y), (-x, -y)): clauses.add(*clause)
    assert sat.check_proof(clauses, [[x], []])
    assert not sat.check_proof(clauses, [[]]) # It does not follow in one step
    satisfiable = sat.Clauses()
    x, y = satisfiable.new(), satisfiable.new()
    satisfiable.add(x, y)
    assert not sat.check_proof(satisfiable, [[x], []])


@needs_solver
def test_time_is_up():
    clauses = sat.Clauses() # Eleven pigeons in ten holes
    holes = [[clauses.new() for _ in range(10)] for _ in range(11)]
    for row in holes: clauses.add(*row)
    for column in zip(*holes): clauses.add(clauses.at_most(column, 1, "adder"))
    with sat.SolverProcess("minisat22") as solver:
        assert solver.solve(clauses, (), .3) == ("unknown", None)
        assert solver.solve(clauses, (), .3) == ("unknown", None) # It stays ended


@needs_solver
def test_dimacs_is_what_the_solver_reads(tmp_path):
    from pysat.formula import CNF
    formula = sat.Formula(random_network())
    read = CNF(from_file=str(formula.dimacs(tmp_path/"net.cnf")))
    assert read.nv == formula.n_variables and len(read.clauses) == formula.n_clauses
    assert [x for clause in read.clauses for x in (*clause, 0)] == formula.numbers.tolist()


@needs_solver
def test_mistakes_are_one_line():
    network, image = random_network(), EVERY[0]
    for call in (
        lambda: sat.invert_sat(network, 4), lambda: sat.invert_sat(network, 0, apart=13),
        lambda: sat.invert_sat(network, 0, 0),
        lambda: sat.invert_sat(network, 0, time_limit=0), lambda: sat.invert_sat(network, 0, solver="cadical"),
        lambda: sat.invert_sat(network, 0, encoding="adders"), lambda: sat.Formula(torch.nn.Linear(3, 3)),
        lambda: sat.invert_sat(network, 0, priors=sat.Priors(ink=(5, 3))),
        lambda: sat.invert_sat(network, 0, priors=sat.Priors(ink=(13, 14))),
        lambda: sat.invert_sat(network, 0, priors=sat.Priors(smooth=3)),
        lambda: sat.invert_sat(network, 0, priors=sat.Priors(near=(image.float(), 3))),
        lambda: sat.certify(network, image, -1), lambda: sat.certify(network, image[:3], 1),
        lambda: sat.certify(network, image, 1, target=network.predict(image[None]).item())):
        with pytest.raises(NiooddError) as e: call()
        assert "\n" not in str(e.value)


def test_without_python_sat(monkeypatch):
    "A question is one line that names the extra."
    for module in ("pysat", "pysat.solvers"): monkeypatch.setitem(sys.modules, module, None)
    assert not sat.has_solver()
    with pytest.raises(NiooddError, match=r"^python-sat is not installed; .*pip install 'nioodd\[sat\]'$"):
        sat.invert_sat(random_network(), 0)
