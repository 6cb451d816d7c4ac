"Networks as other people write them, all for small images; each says which images it takes."
from collections import OrderedDict
from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

CLASSES = 4
SHAPE = (1, 12, 12)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {}  # Name → how to make it, shape of an image


def network(name, shape=SHAPE):
    def put(make):
        NETWORKS[name] = make, shape
        return make
    return put


def plain(outputs=CLASSES):
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
                         nn.Linear(150, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, outputs))


network("plain")(plain)


class Net(nn.Module):
    "A body and a head; kinds of it say how they are called."
    def __init__(self, outputs=CLASSES):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.Linear(150, 16)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(16, outputs)

    def features(self, x):
        x = F.max_pool2d(self.norm(self.conv(x)).relu(), 2)
        return self.fc(x.flatten(1)).relu()

    def forward(self, x): return self.head(self.drop(self.features(x)))


@network("view")
class View(Net):
    def features(self, x):
        x = F.max_pool2d(self.norm(self.conv(x)).relu(), 2)
        return self.fc(x.view(x.size(0), -1)).relu()


@network("keyword calls")
class Keywords(Net):
    def features(self, x):
        x = F.max_pool2d(self.norm(input=self.conv(input=x)).relu(), 2)
        return self.fc(input=x.flatten(1)).relu()
    def forward(self, x): return self.head(input=self.features(x=x))


@network("returns an object")
class HuggingFace(Net):
    def forward(self, x): return SimpleNamespace(logits=super().forward(x), hidden_states=None)


@network("returns a dictionary")
class Dictionary(Net):
    def forward(self, x): return {"loss": None, "logits": super().forward(x)}


@network("returns a tuple")
class Tuple(Net):
    def forward(self, x): return super().forward(x), x


@network("writes to its input")
class Writes(Net):
    def forward(self, x):
        x -= 0.1
        return super().forward(x)


@network("doubles the batch")
class Doubles(Net):
    def forward(self, x):
        z = super().forward(torch.cat([x, x.flip(3)]))
        return (z[:len(x)] + z[len(x):]) / 2


@network("one module in two places")
class Shared(Net):
    def __init__(self):
        super().__init__()
        self.again = self.fc2 = nn.Linear(16, 16)
    def forward(self, x): return self.head(self.fc2(self.again(self.features(x))))


@network("a list of modules beside")
class Beside(Net):
    def __init__(self):
        super().__init__()
        self.steps, self.run = [self.drop, self.head], self.features
    def forward(self, x):
        x = self.run(x)
        for step in self.steps: x = step(x)
        return x


@network("squeeze and excitation")
class Squeeze(Net):
    def __init__(self):
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(6, 3, 1), nn.Conv2d(3, 6, 1)
        self.last = nn.Conv2d(6, 6, 1)
    def features(self, x):
        x = self.norm(self.conv(x)).relu()
        x = x * self.excite(self.squeeze(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return self.fc(F.max_pool2d(self.last(x), 2).flatten(1)).relu()


@network("channels last inside")
class ChannelsLast(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 8, 4, 4), nn.LayerNorm(8)
        self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, CLASSES)
    def forward(self, x):
        x = self.stem(x).permute(0, 2, 3, 1)
        x = x + self.down(self.up(self.norm(x)).relu())
        return self.head(x.mean((1, 2)))


@network("tokens")
class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(1, 8, 4, 4), nn.Linear(8, CLASSES)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2)
    def forward(self, x): return self.head(self.blocks(self.stem(x).flatten(2).mT).mean(1))


@network("one logit")
def one_logit(): return plain(1)


@network("one logit, no axis")
class Squeezed(Net):
    def __init__(self): super().__init__(1)
    def forward(self, x): return super().forward(x)[:, 0]


@network("two classes")
def two(): return plain(2)


@network("a thousand classes")
def thousand(): return plain(1000)


@network("float64")
def float64(): return plain().double()


@network("bfloat16")
def bfloat16(): return plain().bfloat16()


@network("float16")
def float16(): return plain().half()


@network("quantised")
def quantised(): return torch.ao.quantization.quantize_dynamic(plain().eval(), {nn.Linear}, dtype=torch.qint8)


@network("compiled")
def compiled(): return torch.compile(plain(), backend="eager")


@network("compiled in part")
def compiled_in_part():
    net = Net()
    net.fc = torch.compile(net.fc, backend="eager")
    return net


@network("data parallel")
def data_parallel(): return nn.DataParallel(plain())


@network("scripted")
def scripted(): return torch.jit.trace(plain().eval(), torch.zeros(1, *SHAPE))


@network("exported")
def exported():
    batch = ({0: torch.export.Dim("batch")},)
    return torch.export.export(plain().eval(), (torch.zeros(2, *SHAPE),), dynamic_shapes=batch, strict=False).module()


@network("in training mode")
def training(): return plain().train()


@network("with users' hooks")
def with_hooks():
    net = plain()
    net[2].register_forward_hook(lambda module, args, out: out / 2)
    net[5].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    return net


@network("with weight norm")
def with_weight_norm():
    net = plain()
    nn.utils.parametrizations.weight_norm(net[0])
    nn.utils.parametrizations.spectral_norm(net[5])
    return net


@network("its forward is replaced")
def replaced():
    net = plain().eval()
    old = net.forward
    net.forward = lambda x: old(x) * 2
    return net


@network("modules in an ordered dictionary")
class Ordered(Net):
    def __init__(self):
        super().__init__()
        self.steps = OrderedDict(drop=self.drop, head=self.head)
    def forward(self, x):
        x = self.features(x)
        for step in self.steps.values(): x = step(x)
        return x


@network("tensors that do not copy")
class NotCopied(Net):
    def __init__(self):
        super().__init__()
        self.scale = self.head.weight.square().sum()  # No leaf: deepcopy refuses it
        self.lock = SimpleNamespace(own=(i for i in ()))
    def forward(self, x): return super().forward(x) * self.scale.detach()


@network("signals", (2, 30))
class Signals(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv1d(2, 6, 5), nn.Conv1d(6, 8, 5), nn.Linear(8, CLASSES)
    def forward(self, x): return self.head(self.b(self.a(x).relu()).relu().mean(2))


@network("volumes", (1, 6, 7, 8))
class Volumes(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv3d(1, 4, 3), nn.Conv3d(4, 6, 3), nn.Linear(6, CLASSES)
    def forward(self, x): return self.head(self.b(self.a(x).relu()).relu().mean((2, 3, 4)))


@network("vectors", (20,))
def vectors(): return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 12), nn.ReLU(), nn.Linear(12, CLASSES))


@network("a linear layer only", (20,))
def linear(): return nn.Linear(20, CLASSES)


def make(name: str) -> nn.Module:
    "The network, its weights always the same."
    torch.manual_seed(0)
    return NETWORKS[name][0]()


def images(name: str, n: int, seed: int = 0) -> torch.Tensor:
    "uint8 images, or floats where the network takes no images."
    shape = NETWORKS[name][1]
    generator = torch.Generator().manual_seed(seed)
    if len(shape) in (3, 4): return torch.randint(256, (n, *shape), dtype=torch.uint8, generator=generator)
    return torch.rand(n, *shape, generator=generator) * 2 - 1


def reference(net: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    "What the network itself says in eval mode; None: no logits."
    modes = [(m, m.training) for m in net.modules()]
    for m, _ in modes: m.training = False
    dtype = next((p.dtype for p in net.parameters() if p.is_floating_point()), torch.float32)
    x = (x / 127.5 - 1 if x.dtype == torch.uint8 else x).to(dtype)
    with torch.no_grad(): out = net(x.clone())
    for m, training in modes: m.training = training
    out = out["logits"] if isinstance(out, dict) else getattr(out, "logits", out)
    if not isinstance(out, torch.Tensor): return None
    out = out.reshape(len(x), -1)
    return torch.cat([torch.zeros_like(out), out], 1) if out.shape[1] == 1 else out


def state(net: nn.Module) -> list:
    "What must be as it was: modes, hooks, and values of parameters and buffers."
    tables = [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for m in net.modules()]
    values = [t.detach().clone() for t in net.state_dict().values() if isinstance(t, torch.Tensor)]
    return [*tables, *values, *(p.requires_grad for p in net.parameters()), *(p.grad for p in net.parameters())]


def same_state(a: list, b: list) -> bool:
    def same(x, y): return torch.equal(x, y) if isinstance(x, torch.Tensor) else x is y or x == y
    return len(a) == len(b) and all(map(same, a, b))
