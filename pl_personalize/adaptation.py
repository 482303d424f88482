"""Adapting batch norm to unlabelled data: running statistics estimated anew, every parameter left alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from tqdm.auto import tqdm

from pl_personalize.batchnorm import BatchNormStatistics, batchnorm_layers
from pl_personalize.functional.batches import batch_size, batch_tensors, call_model, copy_batch
from pl_personalize.functional.names import some
from pl_personalize.per_sample.batchnorm_pass import AllReduce, BatchwisePass, ExactPass, Forward
from pl_personalize.per_sample.module_state import (
    buffers_kept,
    evaluating,
    forward_state_kept,
    random_state_kept,
    uncompiled,
)


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
    summed over all batches in float64, so that momentum does not matter, and a short batch counts for what it has. What
    a layer sees still depends on how the layers before it normalised, so beyond the first layer the result depends on
    the division into batches (more for small ones). A batch with a single value for each channel is normalised by the
    moments so far.

    With ``exact=True`` it does not: each layer normalises by the statistics of the whole data, so the result is that of
    a single batch of everything. Where the data and the activations fit into ``max_scratch_mb`` that is one pass with
    one batch, if the model takes it; else the layers are done one after the other, with a pass for each that stops
    there.

    With ``prior_samples`` = N the present statistics count as N samples beside n new ones (Schneider et al., NeurIPS
    2020):

    .. math::
        \mu = \frac{N \mu_\mathrm{old} + n \mu_\mathrm{new}}{N + n}, \qquad
        \sigma^2 = \frac{N \sigma^2_\mathrm{old} + n \sigma^2_\mathrm{new}}{N + n}

    With ``exact`` the layers normalise by these while estimating; in the default pass they are formed at the end.

    Args:
        model: Any module. Without batch norm there is a warning, and nothing is changed.
        dataloader: Any iterable of batches. A batch is a tensor, a tuple whose first item is the input, or a dict
            (keyword arguments of the model); the first dimension is the batch, or the input is a list of samples.
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
            channel (one image, behind no spatial dimensions) and there is no prior, a layer normalises without
            ``F.batch_norm``, or a statistic is not finite or too large for the layer's precision; then nothing was
            changed.

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
        uncompiled(),
        evaluating(model),
        forward_state_kept(model),
        buffers_kept(model),
    ):
        run = (ExactPass if exact else BatchwisePass)(model, layers, forward or call_model, prior_samples, all_reduce)
        run.estimate(data, int(max_scratch_mb * 2**20))
        found = run.statistics()
        if missing := [name for name in layers if name not in run.moments]:
            rank_zero_warn(
                f"The forward does not reach the batch-norm layers {some(missing)}: they keep their statistics."
            )
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
            yield from (copy_batch(batch) for batch in self._kept)
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
