"""Importances of networks that use a layer differently in a later batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from reference import naive_importance, relative_error
from torch import Tensor, nn

from pl_personalize import estimate_importance

# What the first two samples do not show


class Masked(nn.Module):
    """Attention that is given other keys, or none, by the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        keys = x.flip(1) if bool((x > 9).any()) else x
        return self.head(self.attention(x, keys, keys, need_weights=False)[0].mean(1))


class Routed(nn.Module):
    """An expert that sees those samples alone whose first number is large, and as many rows as there are samples."""

    def __init__(self) -> None:
        super().__init__()
        self.expert, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        chosen = x[:, 0, 0] > 9
        y = x.clone()
        if bool(chosen.any()):
            y[chosen] = self.expert(x[chosen].flatten(0, 1)).unflatten(0, (-1, x.shape[1]))
        return self.head(y.mean(1))


@pytest.mark.parametrize(("make", "culprit"), [(Masked, "attention"), (Routed, "expert")])
def test_a_use_that_comes_later_is_done_by_a_loop(make: Callable[[], nn.Module], culprit: str) -> None:
    torch.manual_seed(0)
    model, x = make().double(), torch.randn(10, 5, 8, dtype=torch.float64)
    x[7, 0, 0] = 10.0
    batches = [x[:5], x[5:7], x[7:8], x[8:]]  # flipped keys are of a batch in which one sample asks for them

    found = estimate_importance(model, batches, "mas")

    right = naive_importance(model, x, "mas")
    assert relative_error(found, right) < 1e-10
    assert {path for name, path in found.routes.items() if name.startswith(culprit)} == {"loop"}
    assert found.routes["head.weight"] == "closed form"


class Experts(nn.Module):
    """Sends each sample to one of three experts, and weighs what that returns."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.head = nn.Linear(4, 3), nn.Linear(4, 3)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        chances, y = self.gate(x).softmax(-1), torch.zeros_like(x)
        for k, expert in enumerate(self.experts):
            rows = (chances.argmax(-1) == k).nonzero()[:, 0]
            if len(rows):
                y = y.index_add(0, rows, expert(x[rows]) * chances[rows, k : k + 1])
        return self.head(y)


@pytest.mark.parametrize("kind", ["mas", "fisher"])
@pytest.mark.parametrize("sizes", [6, 5, 1])
def test_experts(sizes: int, kind: str) -> None:
    torch.manual_seed(0)
    model, x = Experts().double(), torch.randn(12, 4, dtype=torch.float64)
    options = {"draws": "all"} if kind == "fisher" else {}

    found = estimate_importance(model, x.split(sizes), kind, **options)  # type: ignore[arg-type]

    assert relative_error(found, naive_importance(model, x, "mas" if kind == "mas" else "expected_fisher")) < 1e-10


class Heads(nn.Module):
    """A head for each task."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.heads = nn.Linear(6, 6), nn.ModuleList(nn.Linear(6, 3) for _ in range(2))

    def forward(self, x: Tensor, task: int = 0) -> Tensor:
        return self.heads[task](self.body(x).tanh())


class EarlyExit(nn.Module):
    """Goes on with those samples alone of which it is not sure."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.early, self.more, self.late = (nn.Linear(6, k) for k in (6, 3, 6, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x).tanh()
        y = self.early(x)
        unsure = y.softmax(1).amax(1) < 0.45
        return y.index_copy(0, unsure.nonzero()[:, 0], self.late(self.more(x[unsure]).relu())) if unsure.any() else y


@pytest.mark.parametrize("sizes", [6, 1])
def test_early_exits(sizes: int) -> None:
    torch.manual_seed(0)
    model, x = EarlyExit().double(), torch.randn(12, 6, dtype=torch.float64)

    found = estimate_importance(model, x.split(sizes), "mas")

    assert relative_error(found, naive_importance(model, x, "mas")) < 1e-10
    assert float(found["late.bias"].sum()) > 0


def test_heads_by_task() -> None:
    torch.manual_seed(0)
    model, x = Heads().double(), torch.randn(8, 6, dtype=torch.float64)
    tasks = [0, 0, 1, 1]

    found = estimate_importance(
        model, [(part, task) for part, task in zip(x.split(2), tasks, strict=True)], "mas", forward=lambda m, b: m(*b)
    )

    halves = [
        naive_importance(model, half, "mas", forward=lambda m, s, t=t: m(s, t)) for t, half in enumerate(x.split(4))
    ]
    assert relative_error(found, {name: (halves[0][name] + halves[1][name]) / 2 for name in found}) < 1e-10
