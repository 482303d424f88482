"""Memory layouts behind norms, half precision, complex numbers, and images in lists."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference import naive_importance, relative_error
from torch import Tensor, nn

from pl_personalize import estimate_importance

each_reduction = pytest.mark.parametrize("reduction", ["sample", "batch"])


@contextmanager
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


# Batches in lists


class Detector(nn.Module):
    """Takes a list of images, of several sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

    def forward(self, images: list[Tensor]) -> Tensor:
        return self.head(torch.stack([self.conv(image[None])[0].relu().mean((1, 2)) for image in images]))


def test_a_list_of_images_is_as_many_samples() -> None:
    torch.manual_seed(0)
    model = Detector().double()
    images = [torch.randn(3, 6, 6 + k % 2, dtype=torch.float64) for k in range(7)]
    batches = [(images[:3], [{}] * 3), (images[3:], [{}] * 4)]  # three images of three channels first
    right = [naive_importance(model, [image], "mas", forward=lambda m, x: m(list(x))) for image in images]

    found = estimate_importance(model, batches, "mas")

    assert found.num_samples == 7
    assert relative_error(found, {name: sum(r[name] for r in right) / 7 for name in right[0]}) < 1e-10


# Norms whose gradients come in another memory layout


class Tokens(nn.Module):
    """Makes a sequence of a map, behind batch norm."""

    def __init__(self, then: nn.Module, norm: nn.Module, functional: bool = False) -> None:
        super().__init__()
        self.conv, self.norm, self.then, self.head = nn.Conv2d(3, 8, 3), norm, then, nn.Linear(8, 3)
        self.functional, self.written_out = functional, False

    def forward(self, x: Tensor) -> Tensor:
        x, norm = self.conv(x), self.norm
        if self.written_out and norm.running_mean is not None:
            mean, scale = norm.running_mean.view(1, -1, 1, 1), (norm.running_var + norm.eps).rsqrt().view(1, -1, 1, 1)
            x = (x - mean) * scale * norm.weight.view(1, -1, 1, 1) + norm.bias.view(1, -1, 1, 1)
        elif self.functional:
            x = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)
        else:
            x = norm(x)
        x = self.then(x.flatten(2).transpose(1, 2))
        return self.head(x[0] if isinstance(x, tuple) else x).mean(1)


class ClassToken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token, self.norm = nn.Parameter(torch.randn(1, 1, 8)), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.token.expand(len(x), -1, -1), x], 1).tanh()


class Normed(nn.BatchNorm2d):
    """A batch norm that does more."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.0


_THEN: dict[str, Callable[[], nn.Module]] = {
    "layer norm": lambda: nn.LayerNorm(8),
    "class token": ClassToken,
    "encoder layer": lambda: nn.TransformerEncoderLayer(8, 2, 12, batch_first=True),
    "recurrent": lambda: nn.Sequential(nn.LayerNorm(8), nn.GRU(8, 8, batch_first=True)),
}
_NORMS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.BatchNorm2d(8),
    "subclass": lambda: Normed(8),
    "instance norm": lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
}


@pytest.mark.parametrize("sizes", [[6], [5, 1], [1] * 6], ids=str)
@pytest.mark.parametrize("norm", [*_NORMS, "function"])
@pytest.mark.parametrize("then", _THEN)
def test_norms_before_something_that_turns_maps_to_sequences(then: str, norm: str, sizes: list[int]) -> None:
    torch.manual_seed(0)
    model = Tokens(_THEN[then](), _NORMS.get(norm, _NORMS["batch norm"])(), norm == "function").double().eval()
    nn.init.normal_(model.norm.running_mean, std=0.1)
    nn.init.uniform_(model.norm.running_var, 0.5, 2.0)
    x = torch.randn(6, 3, 6, 6, dtype=torch.float64)
    model.written_out = True
    right = naive_importance(model, x, "mas")
    model.written_out = False

    with no_warning() if then != "class token" else pytest.warns(UserWarning, match="then.norm.weight"):
        found = estimate_importance(model, x.split(sizes), "mas")

    assert relative_error(found, right) < 1e-10
    if norm == "batch norm" and then != "recurrent":
        assert set(found.routes.values()) <= {"closed form", "none"}


@pytest.mark.parametrize("size", [6, 1])
def test_norms_before_sequences_in_single_precision_and_in_the_published_estimate(size: int) -> None:
    torch.manual_seed(0)
    model, x = Tokens(nn.LayerNorm(8), nn.BatchNorm2d(8)), torch.randn(6, 3, 6, 6)
    model.written_out = True
    right = naive_importance(model, x, "mas")
    by_batch = estimate_importance(model, x.split(size), "mas", reduction="batch")
    model.written_out = False

    found = estimate_importance(model, x.split(size), "mas")

    assert relative_error(found, right) < 1e-4
    assert set(found.routes.values()) == {"closed form"}
    assert relative_error(estimate_importance(model, x.split(size), "mas", reduction="batch"), by_batch) < 1e-4


# Half precision, complex numbers


@each_reduction
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_confident_expert_in_half_precision(dtype: torch.dtype, reduction: Any) -> None:
    x, y = torch.ones(8, 1), torch.zeros(8, dtype=torch.long)
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 2))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[1].weight.copy_(torch.tensor([[4.0], [-4.0]]))
        model[1].bias.zero_()
    right = estimate_importance(model, [(x, y)], "empirical_fisher", reduction=reduction)

    found = estimate_importance(model.to(dtype), [(x.to(dtype), y)], "empirical_fisher", reduction=reduction)

    assert relative_error(found, right) < 3e-2


class Spectral(nn.Module):
    """A filter in the frequency domain."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.head = nn.Parameter(torch.randn(5, dtype=torch.cdouble)), nn.Linear(8, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.fft.irfft(torch.fft.rfft(x) * self.w, n=8).tanh())


@each_reduction
@pytest.mark.parametrize("kind", ["mas", "empirical_fisher"])
def test_complex_parameters_have_real_importances(kind: Any, reduction: Any) -> None:
    torch.manual_seed(0)
    model, x, y = Spectral(), torch.randn(6, 8, dtype=torch.float64), torch.arange(6) % 3
    right = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in model.named_parameters()}
    for i in range(6):
        output = model(x[i : i + 1])
        loss = output.square().sum() if kind == "mas" else F.cross_entropy(output, y[i : i + 1])
        for total, gradient in zip(right.values(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
            total += gradient.abs() ** (1 if kind == "mas" else 2) / 6
    # The gradient of a complex number is that of its two parts.
    step = 1e-6 * torch.tensor([1.0, 1.0j])
    if kind == "mas":
        with torch.no_grad():
            slopes = []
            for k in range(2):
                model.w[1] += step[k]
                up = model(x[:1]).square().sum()
                model.w[1] -= 2 * step[k]
                slopes.append(float(up - model(x[:1]).square().sum()) / 2e-6)
                model.w[1] += step[k]
        alone = estimate_importance(model, [x[:1]], "mas")["w"][1]
        assert float(alone) == pytest.approx((slopes[0] ** 2 + slopes[1] ** 2) ** 0.5, rel=1e-5)

    batches = [(x, y)] if reduction == "sample" else [(x[i : i + 1], y[i : i + 1]) for i in range(6)]
    found = estimate_importance(model, batches, kind, reduction=reduction)

    assert found["w"].dtype == torch.float64
    assert relative_error(found, right) < 1e-10
