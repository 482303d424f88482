"""Passes over data that estimate the moments of the inputs of batch-norm layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from itertools import compress
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm.auto import tqdm
from typing_extensions import override

from pl_personalize.functional.batches import (
    Forward,
    batch_size,
    batch_tensors,
    concatenate_batches,
    copy_batch,
    slice_batch,
)
from pl_personalize.functional.moments import MEAN, VARIANCE, channel_moments, in_precision_of, mean_and_variance
from pl_personalize.per_sample.module_state import buffers_kept
from pl_personalize.per_sample.norm_calls import statistics_replaced

AllReduce = Callable[[Tensor], Tensor]
Statistics = tuple[Tensor, Tensor]


class Batches:
    """Batches on a device, which can be read several times; with a progress bar of a title, if there is one."""

    def __init__(self, source: Iterable[Any], device: torch.device, *, title: str | None = None) -> None:
        self._source, self._device, self._title = source, device, title
        self._kept: list[Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        if self._kept is not None:
            yield from (copy_batch(batch) for batch in self._kept)
            return
        hidden = self._title is None
        for batch in tqdm(self._source, desc=self._title, unit="batch", delay=2, disable=hidden, leave=False):
            if batch_size(batch):
                yield move_data_to_device(batch, self._device)

    def keep(self, max_bytes: int) -> list[Any] | None:
        """Keep all batches for later reads, if they fit; ``None`` otherwise."""
        if isinstance(self._source, Iterator):
            self._source = list(self._source)  # an iterator can be read only once
        kept, size = [], 0
        for batch in self:
            kept.append(batch)
            size += sum(tensor.numel() * tensor.element_size() for tensor in batch_tensors(batch))
            if size > max_bytes:
                return None
        self._kept = kept
        return kept


class StatisticsPass(ABC):
    """Base class for passes that choose how each batch-norm layer, in eval mode, normalizes; no buffer changes."""

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, _BatchNorm],
        forward: Forward,
        prior_samples: float,
        all_reduce: AllReduce | None,
    ) -> None:
        self.model, self.layers, self.prior_samples, self.all_reduce = model, layers, prior_samples, all_reduce
        self.moments: dict[str, Tensor] = {}
        self.num_samples = 0
        self._forward = forward
        self._old: dict[str, tuple[Tensor, Tensor]] = {}

    @abstractmethod
    def see(self, name: str, x: Tensor) -> Statistics | None:
        """Mean and variance by which a layer normalizes its input; ``None`` for its present ones."""

    @abstractmethod
    def estimate(self, data: Batches, max_bytes: int) -> None:
        """Estimate the moments of every layer, holding at most ``max_bytes`` of data and activations at once."""

    def forward(self, batch: Any) -> None:
        """Run the model on a batch."""
        with statistics_replaced(self.layers, self._statistics_for):
            self._forward(self.model, batch)

    def statistics(self) -> dict[str, Tensor]:
        """Running statistics computed from the moments."""
        found: dict[str, Tensor] = {}
        for name, moments in self.moments.items():
            if moments[0].max() <= 1 and not self.prior_samples:
                raise ValueError(
                    f"The batch-norm layer {name!r} saw a single value for each channel, which has no variance: pass "
                    "more samples, or prior_samples= to count the present statistics as some."
                )
            for what, value in zip((MEAN, VARIANCE), self._blend(name, moments, unbiased=True), strict=True):
                if not torch.isfinite(value).all():
                    raise ValueError(f"The {what} of the batch-norm layer {name!r} is not finite on these data.")
                found[f"{name}.{what}".removeprefix(".")] = in_precision_of(
                    getattr(self.layers[name], what), value, f"{what} of the batch-norm layer {name!r}"
                )
        return found

    def _statistics_for(self, name: str, x: Tensor, mean: Tensor, variance: Tensor) -> Statistics:
        """Statistics by which the layer normalizes ``x``, in the precision of its own."""
        if name not in self._old:  # taken from the call, as a forward may run the model with other buffers
            self._old[name] = mean.double().clone(), variance.double().clone()
        found = self.see(name, x) or self._old[name]
        return found[0].to(mean), in_precision_of(variance, found[1], f"{VARIANCE} of the batch-norm layer {name!r}")

    def _blend(self, name: str, moments: Tensor, *, unbiased: bool) -> Statistics:
        """Statistics of the data and of the prior."""
        mean, variance = mean_and_variance(moments, unbiased=unbiased)
        layer: Any = self.layers[name]
        old_mean, old_variance = self._old.get(name) or (layer.running_mean.double(), layer.running_var.double())
        if moments[0].max() <= 1:
            variance = old_variance  # a single value has none
        if not self.prior_samples and moments[0].max() > 1:
            return mean.to(old_mean), variance.to(old_variance)  # even where the old ones are NaN
        share = self.num_samples / (self.num_samples + self.prior_samples)
        return old_mean.lerp(mean.to(old_mean), share), old_variance.lerp(variance.to(old_variance), share)

    @property
    def _device(self) -> torch.device:
        return next(buffer.device for layer in self.layers.values() for buffer in layer.buffers())

    def _sum(self, values: Tensor) -> Tensor:
        return values if self.all_reduce is None else self.all_reduce(values)

    def _count(self, samples: int) -> None:
        self.num_samples = int(self._sum(torch.tensor(samples, device=self._device)))
        if self.num_samples == 0:
            raise ValueError("The dataloader has no samples; pass at least one.")


class BatchwisePass(StatisticsPass):
    """One pass, in which each layer normalizes by the current batch."""

    @override
    def estimate(self, data: Batches, max_bytes: int) -> None:
        """Sum the moments over all batches."""
        count = 0
        for batch in data:
            count += batch_size(batch)
            self.forward(batch)
        self._count(count)
        seen = {name: self.moments.get(name, _no_moments(layer)) for name, layer in self.layers.items()}
        summed = {name: self._sum(moments) for name, moments in seen.items()}
        self.moments = {name: moments for name, moments in summed.items() if moments[0].max() > 0}

    @override
    def see(self, name: str, x: Tensor) -> Statistics | None:
        moments = channel_moments(x)
        self.moments[name] = self.moments[name] + moments if name in self.moments else moments
        if moments[0, 0] <= 1:  # a single value cannot be normalized by itself, but by all values so far
            moments = self.moments[name]
        return mean_and_variance(moments, unbiased=False) if moments[0, 0] > 1 else None


class _Reached(BaseException):
    """Raised to end a forward at the layer whose statistics are being estimated."""


class ExactPass(StatisticsPass):
    """Passes in which each call of a layer normalizes by the moments over all data."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._known: dict[str, list[Tensor]] = {name: [] for name in self.layers}
        self._found: dict[str, Tensor] = {}
        self._calls: Counter[str] = Counter()
        self._all_at_once = False

    @override
    def estimate(self, data: Batches, max_bytes: int) -> None:
        """Use one batch of everything, or else go layer by layer."""
        kept = data.keep(max_bytes)
        whole = concatenate_batches(kept) if kept and self.all_reduce is None else None
        if whole is None or kept is None or not self._at_once(kept[0], whole, max_bytes):
            while self._next_layer(data):
                pass
        self.moments = {name: torch.stack(calls).sum(0) for name, calls in self._known.items() if calls}

    def _at_once(self, first: Any, whole: Any, max_bytes: int) -> bool:
        """One pass over one batch of everything; ``False`` if it does not fit or the model does not accept it."""
        known, self._all_at_once = self._known, True
        try:
            with buffers_kept(self.model):
                if not self._fits(first, batch_size(whole), max_bytes):
                    return False
            self._count(batch_size(whole))
            self._known = {name: [] for name in self.layers}
            self._calls.clear()
            with buffers_kept(self.model):
                self.forward(whole)
        except Exception:  # the model may accept only the loader's batches; real errors come again
            self._known = known
            return False
        finally:
            self._all_at_once = False
        return True

    def _next_layer(self, data: Iterable[Any]) -> bool:
        """One pass up to the first call with unknown moments; ``False`` if there is none."""
        self._found = {}
        count = 0
        for batch in data:
            count += batch_size(batch)
            self._calls.clear()
            with suppress(_Reached):
                self.forward(batch)
        if not self.num_samples:
            self._count(count)
        reached = torch.tensor([int(name in self._found) for name in self.layers], device=self._device)
        times = self._sum(reached).tolist()
        for name in compress(self.layers, times):
            self._known[name].append(self._sum(self._found.get(name, _no_moments(self.layers[name]))))
        return any(times)

    @override
    def see(self, name: str, x: Tensor) -> Statistics:
        call = self._calls[name]
        self._calls[name] += 1
        if call == len(self._known[name]):
            moments = channel_moments(x)
            if not self._all_at_once:
                self._found[name] = self._found[name] + moments if name in self._found else moments
                raise _Reached
            self._known[name].append(moments)
        return self._blend(name, self._known[name][call], unbiased=False)

    def _fits(self, batch: Any, num_samples: int, max_bytes: int) -> bool:
        """Whether the activations of everything fit, estimated as three times the largest output of a module."""
        largest = 0

        def measure(module: nn.Module, args: Any, output: Any) -> None:
            nonlocal largest
            largest = max(largest, sum(t.numel() * t.element_size() for t in batch_tensors(output)))

        count = min(2, batch_size(batch))
        sample = copy_batch(slice_batch(batch, batch_size(batch), slice(0, count)))
        with ExitStack() as hooks:
            for layer in self.model.modules():
                hooks.callback(layer.register_forward_hook(measure).remove)
            self._forward(self.model, sample)
        return 3 * largest * num_samples <= max_bytes * count


def _no_moments(layer: Any) -> Tensor:
    return torch.zeros_like(channel_moments(layer.running_mean[None]))
