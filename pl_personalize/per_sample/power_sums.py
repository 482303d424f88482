"""Sums of powers of gradients: exact per sample, by checked closed forms with slower fallbacks, and of batch means."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from math import inf, isfinite
from typing import Any, Literal, Self

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from pl_personalize.functional.batches import (
    Forward,
    are_same,
    as_logits,
    check_logits,
    has_listed_samples,
    join_batch,
    slice_batch,
    split_batch,
)
from pl_personalize.per_sample.comparison import Sketch, beyond_rounding
from pl_personalize.per_sample.gradient_tape import (
    NO_GRADIENT,
    VJP_RULE,
    GradientTape,
    TapeError,
    layers_with,
    sum_type,
)
from pl_personalize.per_sample.interrupts import InterruptsHeld
from pl_personalize.per_sample.layer_rules import add_power_sums_, raise_to
from pl_personalize.per_sample.module_state import ForwardState, evaluating
from pl_personalize.per_sample.norm_calls import right_norm_gradients
from pl_personalize.per_sample.sample_independence import described, logits_of_independent_samples

Route = Literal["closed form", "layer", "model", "loop"]
Cotangents = Callable[[Tensor], Iterable[Tensor]]


class _Network(nn.Module):
    """Maps a batch to logits; a module, so that :func:`torch.func.functional_call` can swap its parameters."""

    def __init__(self, model: nn.Module, forward: Forward) -> None:
        super().__init__()
        self.model = model
        self._forward = forward
        self.state: ForwardState | None = None

    def forward(self, batch: Any) -> Tensor:
        try:
            return as_logits(self._forward(self.model, batch))
        finally:
            self.put_back()

    def put_back(self) -> None:
        """Discard what the last forward cached, through which the next one would have no gradient."""
        if self.state is not None:
            self.state.put_back()


class PerSamplePowerSums:
    r"""Accumulates :math:`\sum_i |\partial \langle c_i, f(x_i) \rangle / \partial \theta|^p`, exact per sample.

    A context manager, inside which the model is in eval mode and none of its parameters requires a gradient; see also
    :func:`~pl_personalize.per_sample.module_state.model_kept`. Each parameter takes the fastest route that equals plain
    autograd on the first two samples: ``"closed form"``, a vectorized product of its ``"layer"``, a vectorized gradient
    of the whole ``"model"``, or a ``"loop"`` over samples, as do parameters of layers that a later batch uses
    differently.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        *,
        power: int,
        forward: Forward,
        max_scratch_bytes: int,
    ) -> None:
        self._network = _Network(model, forward)
        self._parameters = dict(parameters)
        self._device = next(iter(self._parameters.values())).device
        self._power = power
        self._max_scratch_bytes = max_scratch_bytes
        self._contexts = ExitStack()
        layers = layers_with(model, parameters.values())
        self._tape = GradientTape(self._parameters, layers, power, max_scratch_bytes)
        self._layer_names = {
            module: name or type(module).__name__
            for name, module in model.named_modules()
            if not isinstance(module, torch.jit.ScriptModule)
        }
        self._vectorized = True
        self._reached: set[str] = set()
        self._samples_checked = 0

    @property
    def sums(self) -> dict[str, Tensor]:
        """The sums so far, by parameter name."""
        return self._tape.sums

    @property
    def reached(self) -> set[str]:
        """Names of the parameters that the gradient of a sample has reached, even if it is 0."""
        known = self._reached | self._tape.reached
        return known | {name for name, total in self.sums.items() if name not in known and bool(total.any())}

    @property
    def routes(self) -> dict[str, Route]:
        """How each parameter's gradients are computed."""
        whole: Route = "model" if self._vectorized else "loop"
        routes: dict[str, Route] = dict.fromkeys(self._parameters, whole)
        routes |= dict.fromkeys(self._tape.copies.names, "closed form")
        for layer, rule in self._tape.rules.items():
            for _, name in self._tape.owned(layer).values():
                if routes[name] != "layer":
                    routes[name] = "layer" if rule is VJP_RULE else "closed form"
        return routes

    def __enter__(self) -> Self:
        model = self._network.model
        with ExitStack() as contexts:  # undoes everything if an error, or Ctrl-C, comes in between
            for parameter in model.parameters():
                contexts.callback(parameter.requires_grad_, parameter.requires_grad)
                parameter.requires_grad_(False)
            contexts.enter_context(evaluating(model))
            contexts.enter_context(right_norm_gradients())
            contexts.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
            contexts.callback(setattr, self._network, "state", None)
            contexts.callback(self._tape.detach)
            self._tape.attach()
            torch.backends.mha.set_fastpath_enabled(False)  # it would bypass layers
            self._network.state = ForwardState(model)
            self._contexts = contexts.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._contexts.close()

    def add(self, batch: Any, num_samples: int, cotangents: Cotangents) -> None:
        """Add the sums over a batch on the model's device.

        ``cotangents`` maps the (n, *) logits to one or more gradients of the objective with respect to them, over which
        the powers are also summed.
        """
        batch = apply_to_collection(batch, Tensor, Tensor.detach)  # inputs need no gradient
        if self._samples_checked < min(2, num_samples):
            self._check(batch, num_samples)
        while True:
            try:
                logits = self._record(batch, num_samples)
                break
            except TapeError as error:  # nothing of this batch was added yet, and earlier batches were right
                self._tape.forget(error.layer)
                self._vectorized = False  # vmap would not see what depends on a sample's values
        try:
            self._add(logits, batch, num_samples, cotangents)
        except TapeError as error:
            layer = described(self._tape.module_of(error.layer), self._layer_names)
            raise ValueError(
                f"{layer} was used differently in a later batch than in the first one: {error}. Leave it out with "
                "exclude=(its name,), or pass smaller, more regular batches."
            ) from error

    def _record(self, batch: Any, num_samples: int) -> Tensor:
        """Run a forward that the tape records; returns the logits."""
        self._tape.start(num_samples, self._device)
        try:
            logits: Tensor = self._network(batch)
        except BaseException:
            self._tape.clear()
            raise
        finally:
            self._tape.stop()
        return logits

    def _add(self, logits: Tensor, batch: Any, num_samples: int, cotangents: Cotangents) -> None:
        try:
            check_logits(logits, num_samples)
            directions = iter(cotangents(logits.detach()))
            direction = next(directions, None)
            while direction is not None:
                following = next(directions, None)
                self._tape.backward(logits, direction, last=following is None)
                self._add_whole_model(batch, num_samples, direction)
                direction = following
        finally:
            self._tape.clear()
            self._network.put_back()  # activation checkpointing runs forwards in the backward pass

    # Slow routes

    def _unrecorded(self) -> dict[str, nn.Parameter]:
        recorded = set(self._tape.names.values())
        return {name: p for name, p in self._parameters.items() if name not in recorded}

    def _add_whole_model(self, batch: Any, num_samples: int, cotangent: Tensor) -> None:
        parameters = self._unrecorded()
        if not parameters:
            return
        if not self._vectorized or has_listed_samples(batch, num_samples):
            for i in range(num_samples):
                sample = slice_batch(batch, num_samples, slice(i, i + 1))
                self._one_sample(sample, cotangent[i : i + 1], parameters, self._add_power)
            return

        def objective(values: dict[str, Tensor], rows: list[Tensor], direction: Tensor) -> Tensor:
            sample = join_batch(batch, num_samples, [row.unsqueeze(0) for row in rows])
            logits: Tensor = functional_call(self._network, values, (sample,))
            return (logits * direction.unsqueeze(0)).sum()

        full_names = {id(p): name for name, p in self._network.named_parameters()}
        names = {full_names[id(p)]: name for name, p in parameters.items()}
        values = {full: parameters[name].detach() for full, name in names.items()}
        size = sum(p.numel() * p.element_size() for p in parameters.values())
        chunk = max(1, self._max_scratch_bytes // max(1, size))
        gradients = vmap(grad(objective), in_dims=(None, 0, 0))
        tensors = split_batch(batch, num_samples)
        for start in range(0, num_samples, chunk):
            part = slice(start, start + chunk)
            with InterruptsHeld():  # swapped parameters do not survive an interruption
                found = gradients(values, [tensor[part] for tensor in tensors], cotangent[part])
            for full, gradient in found.items():
                add_power_sums_(self.sums[names[full]], gradient, self._power)

    def _one_sample(
        self,
        sample: Any,
        cotangent: Tensor,
        parameters: Mapping[str, nn.Parameter],
        consume: Callable[[str, Tensor], None],
    ) -> bool:
        """Pass each gradient to ``consume`` once it is computed, and keep none; whether there are any."""

        def take(name: str, gradient: Tensor | None) -> Tensor | None:
            if gradient is None:  # a custom function may have none
                return None
            is_dense = gradient.layout == torch.strided
            consume(name, gradient if is_dense else gradient.to_dense())
            self._reached.add(name)
            return gradient.new_zeros(()).expand_as(gradient) if is_dense else gradient  # zeros hold no memory

        with ExitStack() as contexts:
            contexts.callback(self._network.put_back)
            for name, parameter in parameters.items():
                contexts.callback(parameter.requires_grad_, False)
                parameter.requires_grad_(True)
                hook = parameter.register_hook(partial(take, name))  # type: ignore[no-untyped-call]
                contexts.callback(hook.remove)
            logits = self._network(sample)
            if logits.requires_grad:
                torch.autograd.grad(logits, list(parameters.values()), cotangent, allow_unused=True)
            return bool(logits.requires_grad)

    def _add_power(self, name: str, gradient: Tensor) -> None:
        add_power_sums_(self.sums[name], gradient.unsqueeze(0), self._power)

    # The check

    def _check(self, batch: Any, num_samples: int) -> None:
        """Choose each parameter's route on two samples, and refuse a model that mixes samples."""
        other = _other_sample(batch, num_samples)
        count = min(2, num_samples)
        # The sums of a first batch of one sample, which could not be checked fully.
        before = {name: total.clone() for name, total in self.sums.items()} if self._samples_checked else {}
        pair = slice_batch(batch, num_samples, [0, other or 1][:count])
        samples = [slice_batch(pair, count, slice(i, i + 1)) for i in range(count)]
        logits = logits_of_independent_samples(self._network, self._layer_names, pair, samples)

        # A fixed direction without symmetries: the sum of a softmax, for example, has no gradient.
        generator = torch.Generator().manual_seed(0)
        direction = torch.randn(logits.shape, generator=generator, dtype=torch.float64).to(logits)
        # First one sample alone: with two, the dimensions of batch and positions may look the same.
        self._tape.is_learning = True
        while wrong := (
            self._wrong_routes(samples[:1], samples[0], direction[:1])
            or (count > 1 and self._wrong_routes(samples, pair, direction))
        ):
            self._take_slower_route(wrong)
        self._tape.is_learning = False
        self._tape.reset()
        for name, total in before.items():
            self.sums[name].copy_(total)
        self._samples_checked = 1 if other is None else count  # two equal samples count as one

    def _wrong_routes(self, samples: Sequence[Any], batch: Any, direction: Tensor) -> list[str]:
        """Parameters whose sums differ from plain autograd's on the samples, or those of a layer whose rule failed."""
        self._tape.reset()
        try:
            self._add(self._record(batch, len(samples)), batch, len(samples), lambda logits: [direction])
        except TapeError as error:
            return [name for _, name in self._tape.owned(error.layer).values()]
        except Exception:
            if self._tape.copies.names:  # a copied parameter may not fit where it is used
                return self._misfits(batch, len(samples)) or self._tape.copies.names
            # The loop runs what vmap cannot, and shows real errors.
            if not self._vectorized or not self._unrecorded():
                raise
            return list(self._unrecorded())
        # Sketches are compared, so that the sums and the samples' own gradients are never in memory together.
        found, right, alone = (
            {name: Sketch(p.shape, self.sums[name].dtype, p.device) for name, p in self._parameters.items()}
            for _ in range(3)
        )
        for name, total in self.sums.items():
            found[name].add(total)
        self._tape.sums.clear()
        sizes = dict.fromkeys(found, 0.0)

        def take(name: str, gradient: Tensor) -> None:
            size = right[name].add(gradient, self._power)
            sizes[name] = max(sizes[name], size) if isfinite(size) else inf  # max() would skip a NaN

        def take_alone(name: str, gradient: Tensor) -> None:
            alone[name].add(gradient, self._power)

        # Recorded routes are compared on the activations of the batch: those of a sample alone are rounded differently,
        # which changes the gradient at a kink, such as a tie in a pooling window.
        slow = self._unrecorded()
        fast = {name: p for name, p in self._parameters.items() if name not in slow}
        has_gradient = False
        for i, sample in enumerate(samples):
            own_direction = torch.zeros_like(direction)
            own_direction[i] = direction[i]
            has_gradient |= bool(fast) and self._one_sample(batch, own_direction, fast, take)
            has_gradient |= bool(slow) and self._one_sample(sample, direction[i : i + 1], slow, take)
            if fast and len(samples) > 1:
                self._one_sample(sample, direction[i : i + 1], fast, take_alone)
        if not has_gradient:
            raise ValueError(NO_GRADIENT)
        if infinite := [name for name, size in sizes.items() if not isfinite(size)]:
            raise ValueError(
                f"The gradient of {infinite[0]} for a single sample has NaN or infinite entries, so its importances "
                "are undefined. Look for a square root at zero, or an input that is too large."
            )
        counts = {name: p.numel() for name, p in self._parameters.items()}
        loops = [name for name, route in self.routes.items() if route == "loop"]

        def beyond(errors: Mapping[str, float]) -> list[str]:
            return beyond_rounding(
                errors, sizes, counts, direction.dtype, self._power, left=self._tape.bias_rounding, exhausted=loops
            )

        if wrong := beyond({name: found[name].distance(right[name]) for name in sizes}):
            return wrong
        # A kink changes some entries; a backward pass that divides by the batch size scales all of them.
        other = beyond({name: right[name].distance(alone[name]) for name in fast}) if len(samples) > 1 else []
        return [name for name in other if right[name].is_multiple_of(alone[name])]

    def _misfits(self, batch: Any, num_samples: int) -> list[str]:
        """Copied parameters that break the model."""
        found: list[str] = []
        for places in self._tape.copies.alike():
            self._tape.start(num_samples, self._device, places)
            try:
                check_logits(self._network(batch), num_samples)
            except Exception:
                found += places.values()
            finally:
                self._tape.stop()
        return found

    def _take_slower_route(self, names: Sequence[str]) -> None:
        recorded = set(self._tape.names.values())
        if self._tape.copies.try_next(names):  # the shapes of the copies were wrong
            return
        if not recorded.intersection(names):
            if not self._vectorized:
                raise ValueError(
                    f"The gradient of {names[0]} differs from call to call, so importances per sample are undefined. "
                    "Make the model deterministic in eval mode."
                )
            self._vectorized = False
            return
        owners = {
            name: [m for m in self._tape.rules if name in {full for _, full in self._tape.owned(m).values()}]
            for name in recorded.intersection(names)
        }
        exhausted = [ms for ms in owners.values() if all(self._tape.rules[m] is VJP_RULE for m in ms)]
        for layer in {m for ms in owners.values() for m in ms}:
            self._tape.rules[layer] = VJP_RULE
        # All parameters of a layer go together: if the layer is misread, a bias may be right by chance.
        for key in {key for ms in exhausted for m in ms for key, _ in self._tape.owned(m).values()}:
            del self._tape.names[key]


def _other_sample(batch: Any, num_samples: int) -> int | None:
    """Index of the first sample that differs from sample 0, if any."""
    first = slice_batch(batch, num_samples, [0])
    return next((k for k in range(1, num_samples) if not are_same(first, slice_batch(batch, num_samples, [k]))), None)


class BatchPowerSums(ExitStack):
    r"""Accumulates :math:`|\partial \frac1n \sum_i \langle c_i, f(x_i) \rangle / \partial \theta|^p` over batches.

    Counterpart of :class:`PerSamplePowerSums` (De Lange et al., CVPR 2020).
    """

    def __init__(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], *, power: int, forward: Forward
    ) -> None:
        super().__init__()
        self._model, self._parameters, self._power, self._forward = model, list(parameters.values()), power, forward
        self.sums = {name: torch.zeros_like(p, dtype=sum_type(p)) for name, p in parameters.items()}
        self.reached: set[str] = set()
        self.routes = dict.fromkeys(parameters, "batch")

    def __enter__(self) -> Self:
        self.enter_context(evaluating(self._model))
        self.enter_context(right_norm_gradients())
        self._state = ForwardState(self._model)
        return self

    def add(self, batch: Any, num_samples: int, cotangents: Cotangents) -> None:
        """Add the powers of one batch's gradient."""
        logits = as_logits(self._forward(self._model, batch))
        check_logits(logits, num_samples)
        if not logits.requires_grad:
            raise ValueError(NO_GRADIENT)
        directions = list(cotangents(logits.detach()))
        for k, direction in enumerate(directions, start=1):
            gradients = torch.autograd.grad(
                logits, self._parameters, direction / num_samples, k < len(directions), allow_unused=True
            )
            for (name, total), gradient in zip(self.sums.items(), gradients, strict=True):
                if gradient is not None:  # squared in the precision of the sum
                    total.add_(raise_to(gradient.abs().to(total.dtype), self._power))
                    self.reached.add(name)
        self._state.put_back()
