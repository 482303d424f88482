"""Importances of transformers, and of layers unlike a plain layer, are exact."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from reference import naive_importance, relative_error
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

from pl_personalize import estimate_importance


class Encoder(nn.Module):
    """A plain transformer encoder with a class token and positions, over (N, T, d) or (T, N, d)."""

    def __init__(self, batch_first: bool, padded: bool = False, **options: object) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first, **options)  # type: ignore[arg-type]
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        shape = (1, 6) if batch_first else (6, 1)
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(*shape, 8))
        self.head, self.batch_first, self.padded = nn.Linear(8, 3), batch_first, padded

    def forward(self, x: Tensor) -> Tensor:
        dim = 1 if self.batch_first else 0
        x = x if self.batch_first else x.transpose(0, 1)
        token = self.token.expand(x.shape[0], -1, -1) if self.batch_first else self.token.expand(-1, x.shape[1], -1)
        x = torch.cat([token, x], dim) + self.positions
        empty = x[..., 0] > 2 if self.padded else None
        if empty is not None and not self.batch_first:
            empty = empty.T
        return self.head(self.layers(x, src_key_padding_mask=empty).select(dim, 0))


class ReturnsWeights(nn.Module):
    """Self-attention as most people call it, with the weights that nobody asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x)[0].mean(1))


class LayerScale(nn.Module):
    """A residual branch with a factor for each channel, as ConvNeXt and many vision transformers have."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.branch = nn.Conv2d(3, 3, 3, padding=1)
        self.scale, self.gain = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.branch(x) * self.gain


class Mean(nn.Module):
    """The mean over positions."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class Checkpointed(nn.Module):
    """Activations that are computed anew in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(lambda x: self.layer(x).tanh(), x, use_reentrant=False).mean(1))


def _convolutions(first: nn.Module) -> nn.Module:
    return nn.Sequential(first, nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.LazyLinear(3))


_SEQUENCE, _IMAGE = (5, 8), (3, 6, 6)
_PARAMETRIZED = {"layer": ("0.parametrizations",)}
_WHOLE = {"model": ("0.",)}
OTHERS = {
    "encoder": (lambda: Encoder(True), _SEQUENCE, {}),
    "encoder, norm first": (lambda: Encoder(True, norm_first=True, activation="gelu"), _SEQUENCE, {}),
    "encoder, padded": (lambda: Encoder(True, padded=True), _SEQUENCE, {}),
    "encoder over time": (lambda: Encoder(False), _SEQUENCE, {}),
    "encoder over time, padded": (lambda: Encoder(False, padded=True), _SEQUENCE, {}),
    "attention with weights": (ReturnsWeights, _SEQUENCE, {}),
    "scale for each channel": (lambda: _convolutions(LayerScale((3, 1, 1))), _IMAGE, {}),
    "scale for the batch": (lambda: _convolutions(LayerScale((1, 3, 1, 1))), _IMAGE, {}),
    "scale for each pixel": (lambda: _convolutions(LayerScale((6, 6))), _IMAGE, {"layer": ("0.scale",)}),
    "instance norm": (lambda: _convolutions(nn.Sequential(nn.PReLU(), nn.InstanceNorm2d(3, affine=True))), _IMAGE, {}),
    "weight norm": (lambda: _convolutions(weight_norm(nn.Conv2d(3, 4, 3))), _IMAGE, _PARAMETRIZED),
    "spectral norm": (lambda: _convolutions(spectral_norm(nn.Conv2d(3, 4, 3))), _IMAGE, _PARAMETRIZED),
    "orthogonal": (lambda: nn.Sequential(orthogonal(nn.Linear(8, 8)), Mean()), _SEQUENCE, _PARAMETRIZED),
    "channels last": (lambda: _convolutions(nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)), _IMAGE, {}),
    "checkpointed": (Checkpointed, _SEQUENCE, {}),
    "scripted": (
        lambda: torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Flatten())),
        _SEQUENCE,
        {"model": ("0",)},
    ),
    "scripted part": (lambda: _convolutions(torch.jit.script(nn.Conv2d(3, 4, 3))), _IMAGE, _WHOLE),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("kind", ["mas", "fisher"])
@pytest.mark.parametrize("name", OTHERS)
def test_other_layers_and_their_paths(name: str, kind: str) -> None:
    make, shape, slower = OTHERS[name]
    torch.manual_seed(0)
    model = make().double().eval()
    x = torch.randn(4, *shape, dtype=torch.float64)
    model(x)  # lazy layers learn their shapes
    options = {"draws": "all"} if kind == "fisher" else {}

    found = estimate_importance(model, [x], kind, **options)  # type: ignore[arg-type]

    assert relative_error(found, naive_importance(model, x, "mas" if kind == "mas" else "expected_fisher")) < 1e-10
    for parameter, path in found.routes.items():
        expected = {path for path, parts in slower.items() if parameter.startswith(parts)} or {"closed form"}
        is_beside = slower is _PARAMETRIZED and parameter == "0.bias"  # a bias is added as always
        assert is_beside or {path} == expected, parameter


@pytest.mark.parametrize("kind", ["mas", "fisher"])
@pytest.mark.parametrize("groups", [1, 8])
def test_a_bias_that_a_norm_takes_away_has_its_closed_form(groups: int, kind: str) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=groups), nn.InstanceNorm2d(8), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Conv2d(8, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    x = torch.randn(4, 3, 64, 64)
    options = {"draws": "all"} if kind == "fisher" else {}

    found = estimate_importance(model, [x], kind, **options)  # type: ignore[arg-type]

    assert set(found.routes.values()) == {"closed form"}  # what is left of its gradient is rounding, on every path
    right = naive_importance(model.double(), x.double(), "mas" if kind == "mas" else "expected_fisher")
    others = {name: value for name, value in found.items() if name != "2.bias"}
    assert relative_error(others, {name: right[name] for name in others}) < 1e-3
    assert float(found["2.bias"].norm()) < 1e-3 * float(found["2.weight"].norm())


class Elsewhere(nn.Module):
    """Uses a convolution's bias, which a norm takes away, in another place, too, with a small factor."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.convolution, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4), nn.Linear(4, 3)
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        features = self.norm(self.convolution(x)).relu().mean((2, 3))
        return self.head(features + self.factor * self.convolution.bias.sin()).float()


@pytest.mark.parametrize("kind", ["mas", "fisher"])
@pytest.mark.parametrize(("factor", "dtype"), [(1e-5, torch.float32), (1e-7, torch.float64)])
def test_a_small_gradient_is_not_taken_for_rounding(factor: float, dtype: torch.dtype, kind: str) -> None:
    torch.manual_seed(0)
    model, x = Elsewhere(factor).to(dtype), torch.randn(4, 3, 32, 32, dtype=dtype)
    options = {"draws": "all"} if kind == "fisher" else {}

    found = estimate_importance(model, [x], kind, **options)  # type: ignore[arg-type]

    right = naive_importance(model, x, "mas" if kind == "mas" else "expected_fisher")
    name = "convolution.bias"
    assert found.routes[name] != "closed form"
    assert float((found[name] - right[name]).norm()) < 0.05 * float(right[name].norm())


@pytest.mark.parametrize("how", ["wrapped", "in place", "a part"])
def test_compiled_modules_are_computed_as_they_are_written(how: str) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).eval()
    x = torch.randn(4, 3, 6, 6)
    right = estimate_importance(plain, [x], "mas")
    model = plain
    if how == "wrapped":
        model = torch.compile(plain, backend="eager")  # type: ignore[assignment]
    elif how == "in place":
        plain.compile(backend="eager")
    else:
        plain[0] = torch.compile(plain[0], backend="eager")  # type: ignore[assignment]
    before = model(x)

    found = estimate_importance(model, [x], "mas")

    assert [name.replace("_orig_mod.", "") for name in found] == list(right)
    assert list(found) == [name for name, _ in model.named_parameters()]
    for one, other in zip(found.values(), right.values(), strict=True):
        torch.testing.assert_close(one, other)
    assert set(found.routes.values()) == {"closed form"}
    torch.testing.assert_close(model(x), before)


class Deep(nn.Module):
    """Gradients that shrink by orders of magnitude down to the first layer, whose weight a function uses, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.middle = nn.Sequential(*(layer for _ in range(9) for layer in (nn.Linear(6, 6), nn.Sigmoid())))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.first(x) + nn.functional.linear(x.sin(), self.first.weight)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_gradients_are_checked_as_large_ones_are(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = Deep().to(dtype), torch.randn(5, 6, dtype=dtype)
    found = estimate_importance(model, [x], "mas")
    right = naive_importance(model, x, "mas")

    assert found.routes["first.weight"] == "model"
    assert relative_error(found, right) < (1e-10 if dtype == torch.float64 else 1e-3)


class Silent(torch.autograd.Function):
    """Has no gradient for its second input."""

    @staticmethod
    def forward(ctx: object, x: Tensor, weight: Tensor) -> Tensor:
        return x * weight.detach()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class WithSilent(nn.Module):
    """A parameter whose gradient is left out on purpose."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.ones(8)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(Silent.apply(x, self.weight).mean(1))


@pytest.mark.parametrize(
    "embedding",
    [
        nn.Embedding(6, 8, scale_grad_by_freq=True),
        nn.Embedding(6, 8, sparse=True),
        nn.Embedding(6, 8, max_norm=0.5),
    ],
    ids=["scaled by frequency", "sparse", "renormed"],
)
def test_embeddings_with_options(embedding: nn.Embedding) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(embedding, Mean(), nn.Linear(8, 3)).double()
    x = torch.tensor([[0, 1, 2], [3, 4, 5], [1, 1, 1], [2, 2, 0]])
    before = embedding.weight.detach().clone()
    right = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for row in x:
        gradients = torch.autograd.grad(model(row[None]).square().sum(), list(model.parameters()))
        for total, gradient in zip(right.values(), gradients, strict=True):
            total += gradient.to_dense().abs() / len(x)
    with torch.no_grad():
        embedding.weight.copy_(before)

    found = estimate_importance(model, [x], "mas")

    assert relative_error(found, right) < 1e-10
    assert torch.equal(embedding.weight, before)


def test_a_function_without_a_gradient_for_a_parameter() -> None:
    torch.manual_seed(0)
    model, x = WithSilent(), torch.randn(4, 5, 8)
    found = estimate_importance(model, [x], "mas", exclude=())

    assert not found["weight"].any()
    assert relative_error({"h": found["head.weight"]}, {"h": naive_importance(model, x, "mas")["head.weight"]}) < 1e-5


@pytest.mark.parametrize("at_zero", [lambda x: x - x.detach(), lambda x: x * 0], ids=["infinite", "NaN"])
def test_infinite_gradients_are_called_that(at_zero: Callable[[Tensor], Tensor]) -> None:
    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + at_zero(x).sqrt()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), Root(), nn.Linear(6, 2))
    with pytest.raises(ValueError, match=r"gradient of 0\.weight for a single sample has NaN or infinite entries"):
        estimate_importance(model, [torch.randn(5, 4)], "mas")


def test_checkpointed_attention() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(checkpoint(self.layer, x, use_reentrant=False).mean(1))

    torch.manual_seed(0)
    model, x = Block().double().eval(), torch.randn(4, 5, 8, dtype=torch.float64)
    found = estimate_importance(model, [x], "mas")

    assert relative_error(found, naive_importance(model, x, "mas")) < 1e-10
    assert set(found.routes.values()) == {"closed form"}
