"""Small networks, one for each way in which a per-sample gradient can go wrong."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TwiceUsed(nn.Module):
    """One hidden layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.last = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return self.last(self.shared(self.shared(x).tanh()))


class TiedWeights(nn.Module):
    """Two layers with one weight and a bias each."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.b(self.a(x).tanh()).relu())


class FunctionalUse(nn.Module):
    """A layer's weight used once by the layer and once, transposed, by a function."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(6, 4), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.linear(self.layer(x).tanh(), self.layer.weight.T))


class Sequences(nn.Module):
    """A linear layer on (N, T, d)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.last = nn.Linear(4, 5), nn.Linear(5, 5, bias=False), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.mix(self.embed(x).tanh()).relu().mean(1))


class RawParameter(nn.Module):
    """Parameters that belong to no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.rand(6) + 0.5), nn.Parameter(torch.zeros(1))
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last((x * self.scale + self.shift).tanh())


class Attention(nn.Module):
    """A transformer block whose attention works as (T, N, d), where hooks on a linear layer never fire."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.embed, self.norm = nn.Linear(4, 8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), self.embed(x)], dim=1)
        y = self.norm(x)
        return self.last((x + self.attention(y, y, y, need_weights=False)[0])[:, 0])


class Transformer(nn.Module):
    """An encoder with a class token and a positional embedding, as vision transformers have them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.token, self.position = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 6, 8))
        block = nn.TransformerEncoderLayer(8, 2, 12, activation="gelu", norm_first=True, batch_first=True)
        self.encoder, self.last = nn.TransformerEncoder(block, 2, enable_nested_tensor=False), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), self.embed(x)], dim=1) + self.position
        return self.last(self.encoder(x)[:, 0])


class TimeFirst(nn.Module):
    """A linear layer that sees (T, N, d): its first dimension is not the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.embed(x.transpose(0, 1)).tanh().mean(0))


class DataDependent(nn.Module):
    """Python control flow on values: nothing that could be vectorised."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.a, self.last = nn.Parameter(torch.ones(6)), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.stack([row * self.gain if float(row.sum().detach()) > 0 else row.square() * self.gain for row in x])
        return self.last(self.a(x).relu())


class MixesSamples(nn.Module):
    """Normalises over the batch even in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.norm = nn.BatchNorm1d(5, track_running_stats=False)
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)).relu())


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3))


def alexnet_like() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 5, stride=2, padding=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(6, 8, 3, padding=1, groups=2),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(32, 10),
        nn.ReLU(inplace=True),
        nn.Dropout(),
        nn.Linear(10, 3),
    )


def batch_norm_network() -> nn.Module:
    """With running statistics and affine parameters away from their initial values, and in-place activations."""
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 6, 3, dilation=2, padding="same", padding_mode="reflect"),
        nn.BatchNorm2d(6),
        nn.Hardswish(inplace=True),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 8, bias=False),
        nn.BatchNorm1d(8),
        nn.ReLU(inplace=True),
        nn.Linear(8, 3),
    )
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return network


class Residual(nn.Module):
    """A skip connection added in place, pre-activation, and layers without closed form."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm, self.act = nn.GroupNorm(2, 8), nn.PReLU(8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.conv(self.act(self.norm(x)))
        y += x
        return self.last(self.up(y).relu_().mean((2, 3)))


class SharedBranches(nn.Module):
    """One layer on three branches that are added: the gradients of its three outputs are one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.shift, self.last = nn.Linear(6, 6), Shift(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        branches = (x, x.tanh(), x.relu())
        return self.last(sum(self.shared(b) for b in branches).tanh() + sum(self.shift(b) for b in branches))


class Shift(nn.Module):
    """A raw parameter with a batch dimension of one: its gradient is the gradient of the output, the same tensor."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.rand(1, features))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


class Recurrent(nn.Module):
    """Token indices, a padding index, and a layer whose output is a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4, padding_idx=0)
        self.recurrent, self.last = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.recurrent(self.embed(x))[0][:, -1])


class StandardisedLinear(nn.Linear):
    """An instance of Linear that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight / self.weight.norm(dim=1, keepdim=True), self.bias)


def subclassed() -> nn.Module:
    return nn.Sequential(StandardisedLinear(6, 5), nn.ReLU(), StandardisedLinear(5, 3))


def parametrised() -> nn.Module:
    weight_norm = nn.utils.parametrizations.weight_norm
    return nn.Sequential(weight_norm(nn.Linear(6, 5)), nn.ReLU(), weight_norm(nn.Linear(5, 3)))


def patched() -> nn.Module:
    """Old-style surgery: a forward that was replaced on the instance."""
    network = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    layer = network[0]
    layer.forward = lambda x: F.linear(x, layer.weight.square(), layer.bias)
    return network


def logit_shift() -> nn.Module:
    """The last layer's gradient is the objective's own, and other parameters are computed after it."""
    return nn.Sequential(FunctionalUse(), Shift(3))


# Each network and the shape of one input.
NETWORKS = {
    "mlp": (mlp, (12,)),
    "alexnet": (alexnet_like, (3, 21, 21)),
    "batch_norm": (batch_norm_network, (3, 14, 14)),
    "twice_used": (TwiceUsed, (6,)),
    "tied": (TiedWeights, (6,)),
    "functional_use": (FunctionalUse, (6,)),
    "shared_branches": (SharedBranches, (6,)),
    "logit_shift": (logit_shift, (6,)),
    "sequences": (Sequences, (5, 4)),
    "raw": (RawParameter, (6,)),
    "attention": (Attention, (5, 4)),
    "transformer": (Transformer, (5, 4)),
    "time_first": (TimeFirst, (5, 4)),
    "time_first_two_steps": (TimeFirst, (2, 4)),
    "data_dependent": (DataDependent, (6,)),
    "residual": (Residual, (3, 8, 8)),
    "recurrent": (Recurrent, (6,)),
    "parametrised": (parametrised, (6,)),
    "patched": (patched, (6,)),
    "subclassed": (subclassed, (6,)),
}


def make_network(name: str, num_samples: int, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    """A network with fixed weights, and inputs for it."""
    factory, shape = NETWORKS[name]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        network = factory().to(dtype)
        if name == "recurrent":
            return network, torch.randint(0, 7, (num_samples, *shape))
        return network, torch.randn(num_samples, *shape, dtype=dtype)


def labels_of(x: Tensor) -> Tensor:
    """Labels of three classes for some samples."""
    return torch.arange(len(x)) * 2 % 3


def labelled_batches(x: Tensor, sizes: int | list[int]) -> list[tuple[Tensor, Tensor]]:
    """Samples and their labels in batches."""
    return list(zip(x.split(sizes), labels_of(x).split(sizes), strict=True))
