"""Adapting batch norm to unlabelled data: running statistics estimated anew, every parameter left alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from functools import partial
from types import TracebackType
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch.utilities import rank_zero_warn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm.auto import tqdm

from pl_personalize.batchnorm import MEAN, VARIANCE, BatchNormStatistics, batchnorm_layers
from pl_personalize.functional.batches import (
    batch_size,
    batch_tensors,
    call_model,
    join_batch,
    slice_batch,
    split_batch,
)
from pl_personalize.functional.module_state import buffers_kept, evaluating, random_state_kept
from pl_personalize.functional.moments import channel_moments, mean_and_variance

Forward = Callable[[nn.Module, Any], Any]
AllReduce = Callable[[Tensor], Tensor]


def adapt_batchnorm(
    model: nn.Module,
    dataloader: Iterable[Any],
    *,
    exact: bool = False,
    prior_samples: float = 0,
    module: str | None = None,
    forward: Forward | None = None,
    max_scratch_mb: float = 256,
    progress: bool = False,
    all_reduce: AllReduce | None = None,
) -> BatchNormStatistics:
    r"""Re-estimate the running statistics of a model's batch-norm layers on unlabelled data (AdaBN, Li et al., 2016).

    Only ``running_mean`` and ``running_var`` change: not a parameter, not ``num_batches_tracked``, no mode. Everything
    but batch norm runs in eval mode (no dropout). Labels in the batches are not looked at.

    By default one pass over the data, in which each layer normalises by the batch at hand, as in training; moments are
    summed over all batches in float64, so momentum, ``momentum=None``, the order and a short last batch do not matter.
    What a layer sees still depends on how the layers before it normalised, so beyond the first layer the result depends
    on the batch size (more for small batches).

    With ``exact=True`` it does not: each layer normalises by the statistics of the whole data, so the result is that of
    a single batch of everything. Where the data and the activations fit into ``max_scratch_mb`` that is one pass with
    one batch; else the layers are done one after the other, with a pass for each that stops there.

    With ``prior_samples`` = N the present statistics count as N samples beside n new ones (Schneider et al., NeurIPS
    2020):

    .. math::
        \mu = \frac{N \mu_\mathrm{old} + n \mu_\mathrm{new}}{N + n}, \qquad
        \sigma^2 = \frac{N \sigma^2_\mathrm{old} + n \sigma^2_\mathrm{new}}{N + n}

    Args:
        model: Any module. Without batch norm there is a warning, and nothing is changed.
        dataloader: Any iterable of batches. A batch is a tensor, a tuple whose first item is the input, or a dict
            (keyword arguments of the model); the first dimension is the batch.
        exact: See above.
        prior_samples: See above; 0 forgets the present statistics.
        module: Only the layers below this submodule; names in the result are relative to it.
        forward: ``(model, batch) -> anything`` where calling the model on the input is not enough.
        max_scratch_mb: For ``exact``, in 2**20 bytes.
        progress: Show a progress bar if it takes more than two seconds.
        all_reduce: Sums a tensor over processes that each hold a part of the data. All processes must call this.

    Returns:
        What was copied into the model. Variances are unbiased, as running variances are; while estimating, a batch is
        normalised by its biased variance, as in training. A layer that the forward does not reach keeps its statistics
        and is not in the result; nor is one that is shared under several names more than once.

    Raises:
        ValueError: If there are no samples, a layer keeps no running statistics, a layer sees a single value for each
            channel (one image, behind no spatial dimensions) and there is no prior, or a statistic is not finite; then
            nothing was changed.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm1d(1))
        >>> adapt_batchnorm(model, [torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0]])])
        BatchNormStatistics(1 layers, num_samples=3)
        >>> model[0].running_mean.item(), model[0].running_var.item()
        (3.0, 4.0)
    """
    statistics = estimate_batchnorm(
        model,
        dataloader,
        exact=exact,
        prior_samples=prior_samples,
        module=module,
        forward=forward,
        max_scratch_mb=max_scratch_mb,
        progress=progress,
        all_reduce=all_reduce,
    )
    statistics.apply(model if module is None else model.get_submodule(module))
    return statistics


def estimate_batchnorm(
    model: nn.Module,
    dataloader: Iterable[Any],
    *,
    exact: bool = False,
    prior_samples: float = 0,
    module: str | None = None,
    forward: Forward | None = None,
    max_scratch_mb: float = 256,
    progress: bool = False,
    all_reduce: AllReduce | None = None,
) -> BatchNormStatistics:
    """What :func:`adapt_batchnorm` would copy into the model, which is left as it was."""
    check_adaptation(prior_samples, max_scratch_mb)
    layers = batchnorm_layers(model, module)
    if not layers:
        rank_zero_warn(f"{type(model).__name__} has no batch-norm layers: there is nothing to adapt.")
        return BatchNormStatistics({})
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    data = _Data(dataloader, device, progress=progress)
    with (
        random_state_kept(device),
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
        torch.compiler.set_stance("force_eager"),  # compiled code does not see the hooks
        evaluating(model),
        buffers_kept(model),
    ):
        run = (_Exact if exact else _Batchwise)(model, layers, forward or call_model, prior_samples, all_reduce)
        if isinstance(run, _Exact):
            run.estimate(data, int(max_scratch_mb * 2**20))
        else:
            run.estimate(data)
        found = run.statistics()
        if missing := [name for name in layers if name not in run.moments]:
            rank_zero_warn(f"The forward does not reach the batch-norm layers {missing}: they keep their statistics.")
    return BatchNormStatistics(found, num_samples=run.num_samples)


def check_adaptation(prior_samples: float, max_scratch_mb: float) -> None:
    """Check options of :func:`adapt_batchnorm`.

    Raises:
        ValueError: If one is out of range.
    """
    if not 0 <= prior_samples < float("inf"):
        raise ValueError(f"prior_samples must be 0 or more, and finite; got {prior_samples}.")
    if not 0 < max_scratch_mb < float("inf"):
        raise ValueError(f"max_scratch_mb must be positive; got {max_scratch_mb}.")


class _Data:
    """Batches on the device, to be read once or several times."""

    def __init__(self, source: Iterable[Any], device: torch.device, *, progress: bool) -> None:
        self._source, self._device, self._progress = source, device, progress
        self._kept: list[Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        if self._kept is not None:
            yield from (_copy(batch) for batch in self._kept)
            return
        hidden = not self._progress
        for batch in tqdm(self._source, desc="Batch norm", unit="batch", delay=2, disable=hidden, leave=False):
            if batch_size(batch):
                yield move_data_to_device(batch, self._device)

    def keep(self, max_bytes: int) -> list[Any] | None:
        """Keep all batches, if they fit: whoever reads again then gets the same."""
        if isinstance(self._source, Iterator):
            self._source = list(self._source)  # it could not be read again
        kept, size = [], 0
        for batch in self:
            kept.append(batch)
            size += sum(tensor.numel() * tensor.element_size() for tensor in batch_tensors(batch))
            if size > max_bytes:
                return None
        self._kept = kept
        return kept


class _Run:
    """A forward in which each batch-norm layer normalises by what a subclass says.

    The layers stay in eval mode; before each call the statistics to normalise by are written into their buffers.
    """

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

    def see(self, name: str, x: Tensor) -> Tensor | None:
        """The moments by which a layer normalises its input; ``None`` for its present statistics."""
        raise NotImplementedError

    def forward(self, batch: Any) -> None:
        """Run the model on a batch."""
        with ExitStack() as stack:
            for name, layer in self.layers.items():
                stack.enter_context(_Hook(layer, partial(self._on_input, name)))
            self._forward(self.model, batch)

    def statistics(self) -> dict[str, Tensor]:
        """The running statistics that follow from the moments."""
        found: dict[str, Tensor] = {}
        for name, moments in self.moments.items():
            if moments[0].max() <= 1 and not self.prior_samples:
                raise ValueError(
                    f"The batch-norm layer {name!r} saw a single value for each channel, which has no variance: give "
                    "more than one sample, or let the present statistics count as some, prior_samples=."
                )
            for what, value in zip((MEAN, VARIANCE), self._blend(name, moments, unbiased=True), strict=True):
                if not torch.isfinite(value).all():
                    raise ValueError(f"The {what} of the batch-norm layer {name!r} is not finite on these data.")
                found[f"{name}.{what}".removeprefix(".")] = value.to(getattr(self.layers[name], what).dtype)
        return found

    def _on_input(self, name: str, layer: _BatchNorm, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> None:
        assert layer.running_mean is not None
        assert layer.running_var is not None
        if name not in self._old:
            self._old[name] = layer.running_mean.double().clone(), layer.running_var.double().clone()
        moments = self.see(name, args[0] if args else kwargs["input"])
        if moments is None:
            mean, variance = self._old[name]
        else:
            mean, variance = self.normalise_by(name, moments)
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(variance)

    def normalise_by(self, name: str, moments: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance."""
        return mean_and_variance(moments, unbiased=False)

    def _blend(self, name: str, moments: Tensor, *, unbiased: bool) -> tuple[Tensor, Tensor]:
        mean, variance = mean_and_variance(moments, unbiased=unbiased)
        old_mean, old_variance = self._old[name] if name in self._old else _present(self.layers[name])
        if moments[0].max() <= 1:
            variance = old_variance  # a single value says nothing of it
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
            raise ValueError("The dataloader has no samples; statistics need at least one.")


class _Batchwise(_Run):
    """One pass; each layer normalises by the batch."""

    def estimate(self, data: Iterable[Any]) -> None:
        """Sum the moments over all batches."""
        count = 0
        for batch in data:
            count += batch_size(batch)
            self.forward(batch)
        self._count(count)
        seen = {name: self.moments.get(name, _no_moments(layer)) for name, layer in self.layers.items()}
        summed = {name: self._sum(moments) for name, moments in seen.items()}
        self.moments = {name: moments for name, moments in summed.items() if moments[0].max() > 0}

    def see(self, name: str, x: Tensor) -> Tensor | None:
        moments = channel_moments(x)
        self.moments[name] = self.moments[name] + moments if name in self.moments else moments
        if moments[0, 0] > 1:
            return moments
        # A batch of one image cannot be normalised by itself: by all so far, if there are others.
        return self.moments[name] if self.moments[name][0, 0] > 1 else None


class _Reached(BaseException):
    """A forward has come to a layer whose statistics are being estimated."""


class _Exact(_Run):
    """Each layer, and each call of it in a forward, normalises by the moments over all data."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._known: dict[str, list[Tensor]] = {name: [] for name in self.layers}
        self._found: dict[str, Tensor] = {}
        self._calls: Counter[str] = Counter()
        self._all_at_once = False

    def estimate(self, data: _Data, max_bytes: int) -> None:
        """With one batch of everything, or layer by layer."""
        kept = data.keep(max_bytes)
        whole = _concatenated(kept) if kept and self.all_reduce is None else None
        if whole is not None and kept is not None and self._fits(kept[0], batch_size(whole), max_bytes):
            self._count(batch_size(whole))
            self._all_at_once = True
            self._calls.clear()
            self.forward(whole)
        else:
            while self._next_layer(data):
                pass
        self.moments = {name: torch.stack(calls).sum(0) for name, calls in self._known.items() if calls}

    def _next_layer(self, data: Iterable[Any]) -> bool:
        """One pass up to the first call whose moments are not known; ``False`` if all are."""
        self._found = {}
        count = 0
        for batch in data:
            count += batch_size(batch)
            self._calls.clear()
            with suppress(_Reached):
                self.forward(batch)
        if not self.num_samples:
            self._count(count)
        new = False
        reached = torch.tensor([int(name in self._found) for name in self.layers], device=self._device)
        for (name, layer), times in zip(self.layers.items(), self._sum(reached).tolist(), strict=True):
            if times:
                self._known[name].append(self._sum(self._found.get(name, _no_moments(layer))))
                new = True
        return new

    def see(self, name: str, x: Tensor) -> Tensor | None:
        call = self._calls[name]
        self._calls[name] += 1
        if call < len(self._known[name]):
            return self._known[name][call]
        moments = channel_moments(x)
        if not self._all_at_once:
            self._found[name] = self._found[name] + moments if name in self._found else moments
            raise _Reached
        self._known[name].append(moments)
        return moments

    def normalise_by(self, name: str, moments: Tensor) -> tuple[Tensor, Tensor]:
        return self._blend(name, moments, unbiased=False)

    def _fits(self, batch: Any, num_samples: int, max_bytes: int) -> bool:
        """Whether the activations of everything fit: three times the largest that a module returns."""
        largest = 0

        def measure(module: nn.Module, args: Any, output: Any) -> None:
            nonlocal largest
            largest = max(largest, sum(t.numel() * t.element_size() for t in batch_tensors(output)))

        count = min(2, batch_size(batch))
        sample = _copy(slice_batch(batch, batch_size(batch), slice(0, count)))
        handles = [layer.register_forward_hook(measure) for layer in self.model.modules()]
        try:
            self._forward(self.model, sample)
        finally:
            for handle in handles:
                handle.remove()
        return 3 * largest * num_samples <= max_bytes * count


class _Hook(AbstractContextManager[None]):
    def __init__(self, layer: nn.Module, function: Callable[..., None]) -> None:
        self._handle = layer.register_forward_pre_hook(function, with_kwargs=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._handle.remove()


def _present(layer: _BatchNorm) -> tuple[Tensor, Tensor]:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return layer.running_mean.double(), layer.running_var.double()


def _no_moments(layer: _BatchNorm) -> Tensor:
    assert layer.running_mean is not None
    return torch.zeros_like(channel_moments(layer.running_mean[None]))


def _copy(batch: Any) -> Any:
    """A batch that a model may change in place."""
    return apply_to_collection(batch, Tensor, Tensor.clone)


def _form(batch: Any) -> Any:
    """What a batch is beside the tensors that have a row for each sample, in order."""
    size = batch_size(batch)
    form = apply_to_collection(batch, Tensor, lambda t: t.shape[1:] if t.dim() and t.shape[0] == size else t.tolist())
    return list(form.items()) if isinstance(form, Mapping) else form


def _concatenated(batches: Sequence[Any]) -> Any | None:
    """All batches as one, or ``None`` where they do not fit together."""
    sizes = [batch_size(batch) for batch in batches]
    rows = [split_batch(batch, size) for batch, size in zip(batches, sizes, strict=True)]
    shapes = {tuple((tensor.shape[1:], tensor.dtype) for tensor in tensors) for tensors in rows}
    try:
        alike = len(shapes) == 1 and all(bool(_form(batch) == _form(batches[0])) for batch in batches)
    except (ValueError, RuntimeError):  # things that cannot be compared, such as arrays
        alike = False
    if not alike:
        return None
    return join_batch(batches[0], sizes[0], [torch.cat(column) for column in zip(*rows, strict=True)])
