"""`estimate_importance` leaves the model and the process as they were, however it ends and wherever it is stopped."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from interrupts import (
    Moment,
    count_moments,
    during_the_pass,
    interrupt,
    on_entering,
    on_leaving,
    on_swapping_parameters,
)
from networks import make_network
from reference import relative_error
from snapshots import differences, snapshot
from torch import Tensor, nn

from pl_personalize import estimate_importance

# Each network, and a layer behind others of it.
LAYERS = {
    "mlp": "3",
    "batch_norm": "8",
    "attention": "norm",
    "transformer": "encoder.layers.1.linear1",
    "parametrised": "2",
    "tied": "b",
    "data_dependent": "a",
}
REDUCTIONS = ("sample", "batch")
NUM_BATCHES = 4

pytestmark = [
    # From torch, in a loop over samples: a layer that nothing before it trains has no input that needs a gradient.
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
    # An interrupt that falls on the end of a generator is lost, as in any program.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

each_network = pytest.mark.parametrize("name", LAYERS)
each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


@pytest.fixture(autouse=True)
def _python_handles_signals() -> Iterator[None]:
    """Where tests run in the background, the signal of Ctrl-C is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def fast_path() -> Iterator[None]:
    """On at first, as in a new process, and after the test as it was."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(True)
    yield
    torch.backends.mha.set_fastpath_enabled(enabled)


def used_network(name: str) -> tuple[nn.Module, Tensor]:
    """A network in the middle of somebody's work: mixed modes, some gradients, a frozen parameter, hooks of all kinds.

    Its inputs are a multiple of the number of batches.
    """
    model, x = make_network(name, 2 * NUM_BATCHES)
    modules, parameters = list(model.modules()), list(model.parameters())
    for k, module in enumerate(modules):
        module.training = k % 3 != 1
    for k, parameter in enumerate(parameters):
        parameter.grad = torch.full_like(parameter, float(k)) if k % 2 else None
    parameters[1].requires_grad_(False)
    parameters[-1].register_hook(lambda gradient: None)
    parameters[-1].register_post_accumulate_grad_hook(lambda parameter: None)
    for module in (model, model.get_submodule(LAYERS[name])):
        module.register_forward_pre_hook(lambda module, args: None)
        module.register_forward_hook(lambda module, args, output: None, always_call=True)
        module.register_state_dict_pre_hook(lambda module, prefix, keep: None)
        module.register_state_dict_post_hook(lambda module, state, prefix, metadata: None)
        module.register_load_state_dict_post_hook(lambda module, keys: None)
    module.register_full_backward_pre_hook(lambda module, gradients: None)
    module.register_full_backward_hook(lambda module, inputs, outputs: None)
    return model, x


def batches(x: Tensor, before_batch: Callable[[int], None] = lambda k: None) -> Iterator[tuple[Tensor, Tensor]]:
    """A loader that draws random numbers; ``before_batch(k)`` is called before batch k, from 0."""
    for k, part in enumerate(x.chunk(NUM_BATCHES)):
        before_batch(k)
        np.random.rand(), random.random(), torch.rand(1)
        yield part, torch.arange(len(part)) % 3


def raise_at(k: int, error: BaseException) -> Callable[[int], None]:
    def before_batch(batch: int) -> None:
        if batch == k:
            raise error

    return before_batch


def send_sigint_at(k: int) -> Callable[[int], None]:
    def before_batch(batch: int) -> None:
        if batch == k:
            signal.raise_signal(signal.SIGINT)

    return before_batch


# How a call ends


@pytest.mark.parametrize("kind", ["mas", "fisher", "empirical_fisher"])
@each_reduction
@each_network
def test_success_changes_nothing(name: str, reduction: str, kind: str) -> None:
    model, x = used_network(name)
    before = snapshot(model)

    estimate_importance(model, batches(x), kind, reduction=reduction)

    assert differences(before, snapshot(model)) == []


@pytest.mark.parametrize(
    ("before_batch", "error"),
    [
        pytest.param(raise_at(0, RuntimeError("broken file")), RuntimeError, id="error in the first batch"),
        pytest.param(raise_at(1, RuntimeError("broken file")), RuntimeError, id="error in the second batch"),
        pytest.param(raise_at(3, RuntimeError("broken file")), RuntimeError, id="error in the last batch"),
        pytest.param(raise_at(2, KeyboardInterrupt()), KeyboardInterrupt, id="interrupt in the third batch"),
        pytest.param(raise_at(1, SystemExit()), SystemExit, id="exit in the second batch"),
        pytest.param(send_sigint_at(0), KeyboardInterrupt, id="signal in the first batch"),
        pytest.param(send_sigint_at(2), KeyboardInterrupt, id="signal in the third batch"),
    ],
)
@each_reduction
@each_network
def test_a_loader_that_stops_changes_nothing(
    name: str, reduction: str, before_batch: Callable[[int], None], error: type[BaseException]
) -> None:
    model, x = used_network(name)
    before = snapshot(model)

    with pytest.raises(error):
        estimate_importance(model, batches(x, before_batch), "mas", reduction=reduction)

    assert differences(before, snapshot(model)) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@each_reduction
@each_network
def test_a_layer_that_fails_on_a_later_batch_changes_nothing(
    name: str, reduction: str, error: type[BaseException]
) -> None:
    model, x = used_network(name)
    current = -1

    def note(batch: int) -> None:
        nonlocal current
        current = batch

    def fail(module: nn.Module, args: tuple[Any, ...]) -> None:
        if current == 1:
            raise error("in a layer")

    model.get_submodule(LAYERS[name]).register_forward_pre_hook(fail)
    before = snapshot(model)

    with pytest.raises(error, match="in a layer"):
        estimate_importance(model, batches(x, note), "mas", reduction=reduction)

    assert differences(before, snapshot(model)) == []


# What a model does in its own forward and backward


class KeepsActivation(nn.Module):
    """Keeps its last hidden activation, for others to look at."""

    def __init__(self, before: str) -> None:
        super().__init__()
        self.scale, self.first, self.last = nn.Parameter(torch.rand(6)), nn.Linear(6, 5), nn.Linear(5, 3)
        if before != "absent":
            self.hidden = None if before == "None" else torch.zeros(2, 5)

    def forward(self, x: Tensor) -> Tensor:
        self.hidden = self.first(x * self.scale).tanh()
        return self.last(self.hidden)


@each_reduction
@pytest.mark.parametrize("before", ["tensor", "None", "absent"])
def test_an_activation_that_the_model_keeps_is_not_one_of_the_pass(before: str, reduction: str) -> None:
    """It would keep the graph alive; and one from inside torch.func is of no use to anybody."""
    model, x = KeepsActivation(before), torch.randn(8, 6)
    as_it_was = snapshot(model)

    estimate_importance(model, batches(x), "mas", reduction=reduction)

    assert differences(as_it_was, snapshot(model)) == []


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@each_reduction
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_the_weight_of_an_old_style_norm_is_put_back(norm: Callable[[nn.Module], nn.Module], reduction: str) -> None:
    model, x = nn.Sequential(norm(nn.Linear(6, 5)), nn.ReLU(), nn.Linear(5, 3)), torch.randn(8, 6)
    before = snapshot(model)

    estimate_importance(model, batches(x), "mas", reduction=reduction)

    assert differences(before, snapshot(model)) == []


@each_reduction
def test_hooks_on_gradients_are_for_training_alone(reduction: str) -> None:
    """Such as one that clips, or masks what must not change; it is no part of the derivative."""
    model, x = make_network("mlp", 2 * NUM_BATCHES)
    right = estimate_importance(model, batches(x), "mas", reduction=reduction)
    calls: list[int] = []
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: (calls.append(1), 2 * gradient)[1])

    importance = estimate_importance(model, batches(x), "mas", reduction=reduction)

    assert (len(calls), relative_error(importance, right)) == (0, 0.0)


# Where it is interrupted


class CountedCalls:
    """Raises a KeyboardInterrupt at the call of a given number."""

    def __init__(self) -> None:
        self.calls = 0
        self.failing: int | None = None

    def __call__(self) -> None:
        self.calls += 1
        if self.calls == self.failing:
            raise KeyboardInterrupt(f"call {self.calls}")


class Counted(torch.autograd.Function):
    """The identity, whose backward counts its calls."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, count: CountedCalls) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, CountedCalls], output: Tensor) -> None:
        ctx.count = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.count()
        return gradient.clone(), None


def changes_by_interrupted_call(
    model: nn.Module, x: Tensor, reduction: str, count: CountedCalls
) -> tuple[int, dict[int, list[str]]]:
    """How often the counted place is reached, and for each time what an interrupt there changes."""
    right = estimate_importance(model, batches(x), "mas", reduction=reduction)
    total, before, changed = count.calls, snapshot(model), {}
    for k in range(1, total + 1):
        count.calls, count.failing = 0, k
        with pytest.raises(KeyboardInterrupt, match=f"call {k}"):
            estimate_importance(model, batches(x), "mas", reduction=reduction)
        if found := differences(before, snapshot(model)):
            changed[k] = found
    count.failing = None
    assert relative_error(estimate_importance(model, batches(x), "mas", reduction=reduction), right) == 0.0
    return total, changed


@each_reduction
@each_network
def test_an_interrupt_in_any_forward_of_a_layer_changes_nothing(name: str, reduction: str) -> None:
    (model, x), count = used_network(name), CountedCalls()
    model.get_submodule(LAYERS[name]).register_forward_pre_hook(lambda module, args: count())

    total, changed = changes_by_interrupted_call(model, x, reduction, count)

    assert total >= (NUM_BATCHES if reduction == "batch" else 2 * NUM_BATCHES)
    assert changed == {}


@each_reduction
@each_network
def test_an_interrupt_in_any_backward_of_a_layer_changes_nothing(name: str, reduction: str) -> None:
    (model, x), count = used_network(name), CountedCalls()
    model.get_submodule(LAYERS[name]).register_forward_hook(lambda module, args, output: Counted.apply(output, count))

    total, changed = changes_by_interrupted_call(model, x, reduction, count)

    assert total >= (NUM_BATCHES if reduction == "batch" else NUM_BATCHES + 2)
    assert changed == {}


def changes_by_moment(name: str, reduction: str, moment: Moment, most: int) -> dict[int, list[str]]:
    """What a SIGINT at up to ``most`` of the moments changes, by the number of the event."""

    def estimate() -> None:
        estimate_importance(model, batches(x), "mas", reduction=reduction)

    model, x = used_network(name)
    estimate()  # what torch does on a first call only is done
    numbers = count_moments(estimate, moment)
    assert numbers
    changed, sent = {}, 0
    chosen = sorted(random.Random(0).sample(numbers, min(most, len(numbers))))
    for number in chosen:
        before = snapshot(model)
        sent += interrupt(estimate, moment, number)
        if found := differences(before, snapshot(model)):
            changed[number] = found
            model, x = used_network(name)
            torch.backends.mha.set_fastpath_enabled(True)
    assert sent >= 0.9 * len(chosen)  # a call may take some events fewer than the one before, and end before the last
    return changed


@each_reduction
@each_network
def test_a_signal_at_any_moment_of_the_pass_changes_nothing(name: str, reduction: str) -> None:
    assert changes_by_moment(name, reduction, during_the_pass, 20) == {}


@pytest.mark.parametrize(
    ("name", "reduction", "moment"),
    [
        ("mlp", "sample", on_entering),
        ("mlp", "batch", on_entering),
        ("mlp", "sample", on_leaving),
        ("mlp", "batch", on_leaving),
        ("parametrised", "sample", on_swapping_parameters),
    ],
)
def test_a_signal_while_the_model_is_prepared_or_put_back_changes_nothing(
    name: str, reduction: str, moment: Moment
) -> None:
    assert changes_by_moment(name, reduction, moment, 30) == {}
