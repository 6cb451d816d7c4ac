"Binarised networks: the integer form is the float form, and files give it back"
import pytest
import torch

from nioodd.core.errors import NiooddError
from nioodd.neighbours.binarised import UNIT, BinaryMLP, IntegerNetwork, as_images, binarise, sign, train_binarised


def random_bits(n, d, seed=0): return torch.rand(n, d, generator=torch.Generator().manual_seed(seed)) < .5


def random_mlp(fan_in, seed=0):
    "Untrained, with batch norm far from its beginning: positive, negative and zero factors."
    torch.manual_seed(seed)
    network = BinaryMLP((36, 30, 5), fan_in).eval()
    with torch.no_grad():
        network.norm.running_mean.normal_(0, 3)
        network.norm.running_var.uniform_(.5, 9)
        network.norm.weight.normal_()
        network.norm.weight[:3] = 0
        network.norm.bias.normal_()
        network.offset.normal_()
    return network


@pytest.mark.parametrize("fan_in", [None, 5])
@pytest.mark.parametrize("seed", range(3))
def test_integers_answer_as_floats(fan_in, seed):
    network, bits = random_mlp(fan_in, seed), random_bits(2000, 36)
    exact = network.integers()
    with torch.no_grad():
        hidden = sign(network.norm(network.hidden(bits.float() * 2 - 1))) > 0
        assert torch.equal(exact.hidden(bits), hidden)
        assert torch.equal(exact.predict(bits), network(bits).argmax(1))
    assert exact.weights.abs().sum(1).unique().tolist() == [fan_in or 36]


def test_scores_by_hand():
    weights = torch.tensor([[1, -1, 0], [0, 1, 1]], dtype=torch.int8)
    network = IntegerNetwork(weights, torch.tensor([2, 1]), torch.tensor([[1, 1], [1, -1]], dtype=torch.int8),
                             torch.tensor([0, UNIT]))
    bits = torch.tensor([[True, False, False], [True, True, False], [False, True, False]])
    assert network.hidden(bits).tolist() == [[True, False], [False, True], [False, True]]
    assert (network.scores(bits) / UNIT).tolist() == [[0, 3], [0, -1], [0, -1]]
    assert network.predict(bits).tolist() == [1, 0, 0]


def test_training_learns_and_is_repeatable():
    bits = random_bits(400, 36)
    labels = (bits[:, :12].sum(1) > 6).long()
    networks = []
    for _ in range(2):
        torch.manual_seed(0)
        networks.append(train_binarised(BinaryMLP((36, 20, 2)), bits, labels, 10, batch_size=10).integers())
    assert torch.equal(networks[0].scores(bits), networks[1].scores(bits))
    assert (networks[0].predict(bits) == labels).float().mean() > .85


def test_files(tmp_path):
    network, bits = random_mlp(5).integers(), random_bits(50, 36)
    again = IntegerNetwork.load(network.save(tmp_path/"net.safetensors"))
    assert torch.equal(again.scores(bits), network.scores(bits)) and again.weights.dtype == torch.int8
    (tmp_path/"bad.safetensors").write_bytes(b"no tensors")
    with pytest.raises(NiooddError): IntegerNetwork.load(tmp_path/"bad.safetensors")


def test_bits_and_pictures():
    images = torch.zeros(1, 1, 28, 28, dtype=torch.uint8)
    images[..., :2, :2] = 64 # A quarter of 255 is 63.75
    images[..., 2:4, :2] = 63
    assert binarise(images).nonzero().tolist() == [[0, 0]]
    bits = random_bits(4, 196)
    assert torch.equal(binarise(as_images(bits)), bits)


@pytest.mark.parametrize("call", [
    lambda: BinaryMLP((4, 4)), lambda: BinaryMLP((4, 4, 1)), lambda: BinaryMLP((4, 4, 2), 5),
    lambda: BinaryMLP((4, 4, 2), 0),
    lambda: random_mlp(5)(torch.zeros(3, 36)), lambda: random_mlp(5)(random_bits(3, 35)),
    lambda: train_binarised(random_mlp(5), random_bits(3, 36), torch.tensor([0, 1, 5])),
    lambda: train_binarised(random_mlp(5), random_bits(3, 36), torch.tensor([0, 1])),
    lambda: as_images(random_bits(2, 35)), lambda: binarise(torch.zeros(1, 1, 28, 28)),
    lambda: binarise(torch.zeros(1, 3, 28, 28, dtype=torch.uint8))])
def test_mistakes_are_one_line(call):
    with pytest.raises(NiooddError) as e: call()
    assert "\n" not in str(e.value) and "expected" in str(e.value) or "takes" in str(e.value)
