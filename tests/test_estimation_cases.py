"""What people bring: labels elsewhere, kept tables, other memory layouts, half precision, maps, complex numbers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
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


# Where the labels are


class Text(nn.Module):
    """Words, and how many of them count."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(10, 4), nn.Linear(4, 8)

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        keep = torch.arange(words.shape[1]) < lengths[:, None]
        return self.head((self.embed(words) * keep[..., None]).sum(1))


def _text() -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    model, words = Text().double(), torch.randint(0, 10, (6, 5))
    return model, words, torch.randint(1, 6, (6,)), torch.randint(0, 8, (6,))


@pytest.mark.parametrize("labels", [2, -1, lambda batch: batch[2]], ids=["index", "from the end", "function"])
def test_labels_beside_more_than_one_input(labels: Any) -> None:
    model, words, lengths, y = _text()
    packed = torch.cat([words, lengths[:, None]], 1)
    right = naive_importance(model, packed, "empirical_fisher", y, lambda m, row: m(row[:, :5], row[:, 5]))

    found = estimate_importance(
        model, [(words, lengths, y)], "empirical_fisher", labels=labels, forward=lambda m, b: m(b[0], b[1])
    )

    assert relative_error(found, right) < 1e-10


@each_reduction
def test_labels_by_a_key_of_the_batch(reduction: Any) -> None:
    model, words, lengths, y = _text()
    right = estimate_importance(
        model, [{"words": words, "lengths": lengths, "labels": y}], "empirical_fisher", reduction=reduction
    )

    found = estimate_importance(
        model, [{"words": words, "lengths": lengths, "tag": y}], "empirical_fisher", labels="tag", reduction=reduction
    )

    assert relative_error(found, right) == 0.0


@each_reduction
def test_unclear_labels_are_refused_before_any_work(reduction: Any) -> None:
    model, words, lengths, y = _text()

    def untouched(model: nn.Module, batch: Any) -> Tensor:
        pytest.fail("the model was called")

    with pytest.raises(ValueError, match=r"3 items \(tuple\).*labels=2"):
        estimate_importance(model, [(words, lengths, y)], "empirical_fisher", forward=untouched, reduction=reduction)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("fisher", {"labels": 2}, "takes no labels; got labels=2. It is for 'empirical_fisher'"),
        ("empirical_fisher", {"labels": True}, "labels must be .* got True"),
        ("empirical_fisher", {"labels": 0}, "labels=0 is also the model's input"),
        ("mas", {"class_dim": 1}, "takes no class_dim; got class_dim=1. It is for 'fisher', 'empirical_fisher'"),
        ("fisher", {"class_dim": 0}, "class_dim must .* got 0"),
        ("fisher", {"class_dim": True}, "class_dim must .* got True"),
        ("fisher", {"generator": True}, "generator must .* got True"),
        ("fisher", {"generator": "7"}, "generator must .* got '7'"),
    ],
)
def test_bad_options_are_refused(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimate_importance(nn.Linear(4, 2), (pytest.fail("read") for _ in range(1)), kind, **options)


def test_a_seed_draws_what_its_generator_draws_each_time() -> None:
    model, x = nn.Linear(4, 3), torch.randn(6, 4)
    right = estimate_importance(model, [x], "fisher", generator=torch.Generator().manual_seed(3))

    for _ in range(2):
        assert relative_error(estimate_importance(model, [x], "fisher", generator=3), right) == 0.0


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


# Fisher information of sequences, maps, and one logit


class Sequence(nn.Module):
    """Logits for each position, in the last dimension, or as a map."""

    def __init__(self, class_dim: int) -> None:
        super().__init__()
        self.layer, self.head, self.class_dim = nn.Linear(4, 6), nn.Linear(6, 5), class_dim

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).tanh()).movedim(-1, self.class_dim)


def _naive_fisher(model: Sequence, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The mean over samples of the squared gradient of the sum over positions of -log p(label)."""
    parameters = dict(model.named_parameters())
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for one, label in zip(x, labels, strict=True):
        scores = model(one[None]).movedim(model.class_dim, -1).log_softmax(-1).reshape(-1, 5)
        loss = sum(-scores[k, int(c)] for k, c in enumerate(label.flatten()) if c != -100)
        for name, gradient in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
            total[name] += gradient.square() / len(x)
    return total


@pytest.mark.parametrize(("shape", "class_dim"), [((3,), -1), ((3,), 1), ((2, 3), 1), ((2, 3), -1), ((), -1), ((), 1)])
def test_fisher_of_sequences_and_maps(shape: tuple[int, ...], class_dim: int) -> None:
    torch.manual_seed(0)
    model, x = Sequence(class_dim).double(), torch.randn(4, *shape, 4, dtype=torch.float64)
    labels = torch.randint(0, 5, (4, *shape))
    if shape:
        labels[1, 0] = -100
    right = _naive_fisher(model, x, labels)

    found = estimate_importance(
        model, [(x[:3], labels[:3]), (x[3:], labels[3:])], "empirical_fisher", class_dim=class_dim
    )
    assert relative_error(found, right) < 1e-10

    chances = model(x).detach().movedim(class_dim, -1).softmax(-1).reshape(-1, 5)
    drawn = torch.multinomial(chances, 1, replacement=True, generator=torch.Generator().manual_seed(7))
    found = estimate_importance(model, [x], "fisher", class_dim=class_dim, generator=7)
    assert relative_error(found, _naive_fisher(model, x, drawn.view(4, *shape))) < 1e-10


def test_the_expectation_over_the_labels_of_two_positions() -> None:
    torch.manual_seed(0)
    model, x = Sequence(-1).double(), torch.randn(1, 2, 4, dtype=torch.float64)
    chances = model(x).detach().softmax(-1)[0]
    right = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for pair in torch.cartesian_prod(torch.arange(5), torch.arange(5)):
        weight = chances[0, pair[0]] * chances[1, pair[1]]
        for name, value in _naive_fisher(model, x, pair[None]).items():
            right[name] += weight * value

    found = estimate_importance(model, [x], "fisher", class_dim=-1, draws="all")

    assert relative_error(found, right) < 1e-10


@pytest.mark.parametrize("class_dim", [3, -4, 2])
def test_a_dimension_that_the_logits_do_not_have_is_refused(class_dim: int) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Unflatten(1, (5, 1)))  # of size 1 in the last dimension
    with pytest.raises(ValueError, match=rf"class_dim={class_dim} is no dimension.*\(2, 5, 1\)"):
        estimate_importance(model, [torch.randn(2, 4)], "fisher", class_dim=class_dim)


def test_positions_without_a_class_dimension_are_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"got \(2, 3, 5\).*class_dim=-1.*class_dim=1"):
        estimate_importance(nn.Linear(4, 5), [torch.randn(2, 3, 4)], "fisher")


@pytest.mark.parametrize("kind", ["fisher", "empirical_fisher"])
def test_one_logit_and_a_sigmoid_by_the_way_that_the_message_shows(kind: Any) -> None:
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 1).double(), torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 2
    with pytest.raises(ValueError, match=r"got \(6, 1\).*forward=lambda.*pad"):
        estimate_importance(model, [(x, y)], kind)
    chance = model(x).sigmoid().detach()
    factor = chance * (1 - chance) if kind == "fisher" else (chance - y[:, None]).square()

    found = estimate_importance(
        model,
        [(x, y)],
        kind,
        draws="all" if kind == "fisher" else 1,
        forward=lambda model, batch: torch.nn.functional.pad(model(batch[0]).view(-1, 1), (1, 0)),
    )

    right = {"weight": (factor * x.square()).mean(0, keepdim=True), "bias": factor.mean(0)}
    assert relative_error(found, right) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("name", ["levit_128s", "tiny_vit_5m_224"])
def test_networks_of_timm_that_keep_tables(name: str) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model, x = timm.create_model(name, num_classes=3).double(), torch.randn(2, 3, 224, 224, dtype=torch.float64)
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
    other = timm.create_model(name, num_classes=3).double()
    estimate_importance(model, [x], "mas", exclude=[key for key in found if key != tables[0]])
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(model.eval()(x), other.eval()(x), rtol=1e-4, atol=1e-4)
