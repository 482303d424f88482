"""Values that modules cache in eval mode, and parameters that no gradient reaches."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference import naive_importance, relative_error
from snapshots import differences, snapshot
from torch import Tensor, nn

from pl_personalize import Importance, estimate_importance

each_reduction = pytest.mark.parametrize("reduction", ["sample", "batch"])


@contextmanager
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


# What modules keep


class Table(nn.Module):
    """A table that follows from a parameter, kept in eval mode in one of several places."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.b, self.where = nn.Parameter(torch.randn(6)), where
        self.cache: Any = {"inner": {}} if where == "nested" else [] if where == "list" else {}
        self.kept: Tensor | None = None
        self.register_buffer("stored", None, persistent=False)
        self.index = torch.tensor([0, 1, 2, 3, 4, 5, 0, 1])
        self.cached = lru_cache(self.compute)

    def compute(self) -> Tensor:
        return self.b[self.index]

    def table(self) -> Tensor:
        if self.training or self.where == "nowhere":
            return self.compute()
        if self.where == "attribute":
            self.kept = self.compute() if self.kept is None else self.kept
            return self.kept
        if self.where == "buffer":
            self.stored = self.compute() if self.stored is None else self.stored
            return self.stored
        if self.where == "lru_cache":
            return self.cached()
        if self.where == "list":
            if not self.cache:
                self.cache.append(self.compute())
            return self.cache[0]
        cache = self.cache["inner"] if self.where == "nested" else self.cache
        if "table" not in cache:
            cache["table"] = self.compute()
        return cache["table"]

    def forward(self, x: Tensor) -> Tensor:
        return x * self.table()


class Forgets(Table):
    """Forgets its table when training begins, as LeViT, EfficientFormer and TinyViT do."""

    def train(self, mode: bool = True) -> Forgets:
        super().train(mode)
        if mode:
            self.cache = {}
        return self


def _with_table(where: str, kind: type[Table] = Table) -> tuple[nn.Module, Tensor, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), kind(where), nn.Linear(8, 3)).double()
    x = torch.randn(6, 8, dtype=torch.float64)
    model[1].where = "nowhere"
    right = naive_importance(model, x, "mas")
    model[1].where = where
    return model, x, right


@pytest.mark.parametrize("sizes", [6, 1, 4])
@pytest.mark.parametrize("where", ["dict", "nested", "list", "attribute", "buffer"])
def test_a_kept_table_is_computed_anew_and_not_left_behind(where: str, sizes: int) -> None:
    model, x, right = _with_table(where)
    before = snapshot(model.train())

    with no_warning():
        found = estimate_importance(model, x.split(sizes), "mas")

    assert relative_error(found, right) < 1e-10
    assert differences(before, snapshot(model)) == []
    assert not model[1].cache or not model[1].cache.get("inner")
    other = _with_table(where)[0]
    nn.init.normal_(other[1].b)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(model.eval()(x), other.eval()(x))


@pytest.mark.parametrize("where", ["dict", "attribute"])
def test_a_kept_table_and_the_published_estimate(where: str) -> None:
    model, x, _ = _with_table(where)
    model[1].where = "nowhere"
    right = estimate_importance(model, x.split(2), "mas", reduction="batch")
    model[1].where = where

    found = estimate_importance(model, x.split(2), "mas", reduction="batch")

    assert relative_error(found, right) < 1e-10


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_kept_table_is_not_left_behind_after_an_error(error: type[BaseException]) -> None:
    model, x, _ = _with_table("dict")
    model.train()

    def batches() -> Iterator[Tensor]:
        yield x
        raise error("broken")

    with pytest.raises(error, match="broken"):
        estimate_importance(model, batches(), "mas")

    assert model[1].cache == {}
    assert model[1].training


@each_reduction
def test_a_table_from_before_is_forgotten_by_modules_that_forget_it_in_train(reduction: Any) -> None:
    model, x, right = _with_table("dict", Forgets)
    with torch.no_grad():
        output = model.eval()(x)
    before = snapshot(model)

    with no_warning():
        found = estimate_importance(model, [x[:1]] if reduction == "batch" else [x], "mas", reduction=reduction)

    if reduction == "sample":
        assert relative_error(found, right) < 1e-10
    assert float(found["1.b"].sum()) > 0
    assert differences(before, snapshot(model)) == []
    torch.testing.assert_close(model(x), output)


class MadeByEval(nn.Module):
    """Makes its table in ``eval()``, and has none in training."""

    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.randn(8))

    def train(self, mode: bool = True) -> MadeByEval:
        super().train(mode)
        if mode:
            vars(self).pop("table", None)
        else:
            self.table = self.b.detach().sin()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.b.sin() if self.training else self.table)


@pytest.mark.parametrize("training", [True, False])
def test_a_table_that_eval_itself_makes_is_reported(training: bool) -> None:
    model, x = nn.Sequential(MadeByEval(), nn.Linear(8, 3)).train(training), torch.randn(5, 8)
    before = snapshot(model)
    with pytest.warns(UserWarning, match=r"No gradient reached 0\.b"):
        found = estimate_importance(model, [x], "mas")
    right = naive_importance(nn.Sequential(copy.deepcopy(model[1])), x * model[0].b.detach().sin(), "mas")
    assert relative_error({"weight": found["1.weight"]}, {"weight": right["0.weight"]}) < 1e-5
    assert differences(before, snapshot(model)) == []


class Adapter(nn.Linear):
    """Adds its adapter to the weight in eval mode, and takes it out in training."""

    def __init__(self) -> None:
        super().__init__(8, 3)
        self.a, self.merged = nn.Parameter(torch.randn(3, 1)), False

    def train(self, mode: bool = True) -> Adapter:
        super().train(mode)
        if mode == self.merged:
            self.weight.data += -self.a.data if mode else self.a.data
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight if self.merged else self.weight + self.a, self.bias)


def test_an_adapter_that_is_merged_in_eval_mode_counts_and_stays_merged() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Adapter()).double(), torch.randn(5, 8, dtype=torch.float64)
    right = naive_importance(model, x, "mas", forward=lambda m, s: _unmerged(m[0], s))
    model.train()
    model.eval()
    before = snapshot(model)

    found = estimate_importance(model, [x], "mas")

    assert relative_error(found, right) < 1e-10
    assert differences(before, snapshot(model)) == []


def _unmerged(layer: Adapter, x: Tensor) -> Tensor:
    weight = layer.weight - layer.a.detach() if layer.merged else layer.weight
    return F.linear(x, weight + layer.a, layer.bias)


class Frozen(nn.BatchNorm1d):
    """Stays in eval mode, whatever is said to it."""

    def train(self, mode: bool = True) -> Frozen:
        return super().train(False)


def test_modes_are_put_back_exactly() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Frozen(4), nn.Sequential(nn.Dropout(), Forgets("dict")), nn.Linear(8, 2))
    model[1].eval()
    model[2][1].eval()
    model[3].train()
    model[2].insert(0, nn.Linear(4, 8))
    modes = [module.training for module in model.modules()]

    estimate_importance(model, [torch.randn(3, 4)], "mas")

    assert [module.training for module in model.modules()] == modes


# What no gradient reaches


class Unreached(nn.Module):
    """A layer that is not used, one behind detach, one whose units are dead, and one behind a table from before."""

    def __init__(self) -> None:
        super().__init__()
        self.unused, self.detached, self.dead, self.last = (nn.Linear(6, 6) for _ in range(4))
        self.table = Table("lru_cache")
        nn.init.constant_(self.dead.bias, -100.0)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.detached(x).detach() + self.dead(x).relu()
        return self.last(x) * self.table(torch.ones(8, dtype=x.dtype))[:6]


@each_reduction
def test_what_no_gradient_reaches_is_reported_and_what_gets_zero_is_not(reduction: Any, tmp_path: Any) -> None:
    torch.manual_seed(0)
    model, x = Unreached(), torch.randn(5, 6)
    silent = {"unused.weight", "unused.bias", "detached.weight", "detached.bias", "table.b"}
    model.eval()(x).sum()
    model.table.cached.cache_clear()
    with torch.no_grad():
        model(x)  # and keeps its table, which is detached

    with pytest.warns(UserWarning, match=r"No gradient reached .*in any of 5 samples.*exclude=\(") as caught:
        found = estimate_importance(model, [x], "mas", reduction=reduction)

    message = str(next(w.message for w in caught if "No gradient reached" in str(w.message)))
    assert all(name in message for name in silent)
    assert "dead" not in message
    assert {name for name, path in found.routes.items() if path == "none"} == silent
    assert not any(found[name].any() for name in (*silent, "dead.weight"))
    found.save(tmp_path / "found.safetensors")
    assert Importance.load(tmp_path / "found.safetensors").routes == found.routes
    with no_warning():
        estimate_importance(model, [x], "mas", reduction=reduction, exclude=sorted(silent))


class OneBranch(nn.Module):
    """Which of two layers a batch uses."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 2) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[int(x.sum() > 0)](x)


@each_reduction
def test_a_parameter_that_another_process_reached_is_reached(reduction: Any) -> None:
    model, x = OneBranch(), torch.rand(4, 4)
    sent: list[Tensor] = []

    def send(total: Tensor) -> Tensor:
        sent.append(total.clone())
        return total

    with pytest.warns(UserWarning, match=r"No gradient reached layers\.0\.weight, layers\.0\.bias"):
        estimate_importance(model, [x], "mas", reduction=reduction, all_reduce=send)
    received = iter(sent)

    with no_warning():
        found = estimate_importance(
            model, [-x], "mas", reduction=reduction, all_reduce=lambda total: total + next(received)
        )

    assert next(received, None) is None
    assert "none" not in found.routes.values()
    assert all(value.any() for value in found.values())


# Narrow ones with a block in each stage.
_OF_TIMM: dict[str, dict[str, Any]] = {
    "levit_128s": {
        "embed_dim": (16, 32, 48),
        "key_dim": 8,
        "num_heads": (2, 3, 4),
        "depth": (1, 1, 1),
        "img_size": 96,
    },
    "tiny_vit_5m_224": {
        "embed_dims": (8, 16, 24, 32),
        "depths": (1, 1, 1, 1),
        "num_heads": (1, 2, 3, 4),
        "window_sizes": (2, 2, 2, 2),
    },
}


@pytest.mark.parametrize("name", _OF_TIMM)
def test_networks_of_timm_that_keep_tables(name: str) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **_OF_TIMM[name]).double()
    size = _OF_TIMM[name].get("img_size", 64)
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)  # of some, 0 at first
    tables = [key for key, _ in model.named_parameters() if "attention_bias" in key]
    right = {key: torch.zeros_like(model.get_parameter(key)) for key in tables}
    for i in range(2):
        model.train()
        output = model.eval()(x[i : i + 1])
        gradients = torch.autograd.grad(output.square().sum(), [model.get_parameter(key) for key in tables])
        for total, gradient in zip(right.values(), gradients, strict=True):
            total += gradient.abs() / 2
    with torch.no_grad():
        model.eval()(x)  # and keeps its tables

    found = estimate_importance(model, [x], "mas")

    rounding = 1e-12 * max(float(value.norm()) for value in right.values())
    assert rounding > 0
    for key in tables:
        assert float((found[key] - right[key]).norm()) < 1e-8 * float(right[key].norm()) + rounding, key
        assert found[key].any(), key
    model.train()
    other = timm.create_model(name, num_classes=3, **_OF_TIMM[name]).double()
    estimate_importance(model, [x], "mas", exclude=[key for key in found if key != tables[0]])
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(model.eval()(x), other.eval()(x), rtol=1e-4, atol=1e-4)
