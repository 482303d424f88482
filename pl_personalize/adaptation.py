"""Adaptation of batch norm to unlabelled data: new running statistics, unchanged parameters."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from pl_personalize.batchnorm import BatchNormStatistics, batchnorm_layers
from pl_personalize.functional.batches import Forward, call_model
from pl_personalize.functional.names import some
from pl_personalize.per_sample.batchnorm_pass import AllReduce, Batches, BatchwisePass, ExactPass
from pl_personalize.per_sample.module_state import evaluating, isolated, model_kept


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
    apply: bool = True,
) -> BatchNormStatistics:
    r"""Re-estimate the running statistics of a model's batch-norm layers on unlabelled data (AdaBN, Li et al., 2016).

    Only ``running_mean`` and ``running_var`` change; parameters, ``num_batches_tracked`` and modes do not. Everything
    but batch norm runs in eval mode (no dropout). Labels in the batches are ignored.

    By default, there is one pass over the data, in which each layer normalizes by the current batch, as in training.
    Moments are summed over all batches in float64: there is no momentum, and a short batch counts by its size. The
    input of a layer still depends on how earlier layers normalized, so beyond the first layer the result depends on the
    batch size, more so for small batches. A batch with a single value per channel is normalized by the moments so far.

    With ``exact=True``, each layer normalizes by the statistics of the whole data, so the result is that of a single
    batch of everything. If data and activations fit into ``max_scratch_mb`` and the model accepts it, this is one pass
    with one batch; otherwise, one pass for each layer in turn, which stops there.

    With ``prior_samples`` = N, the present statistics count as N samples beside n new ones (Schneider et al., NeurIPS
    2020):

    .. math::
        \mu = \frac{N \mu_\mathrm{old} + n \mu_\mathrm{new}}{N + n}, \qquad
        \sigma^2 = \frac{N \sigma^2_\mathrm{old} + n \sigma^2_\mathrm{new}}{N + n}

    With ``exact``, the layers already normalize by these during the passes; by default, they are computed at the end.

    Args:
        model: Any module. Without batch norm, there is a warning and nothing changes.
        dataloader: Iterable of batches. A batch is a tensor, a tuple whose first item is the input, or a dict of
            keyword arguments of the model. The first dimension is the batch, or the input is a list of samples.
        exact: See above.
        prior_samples: See above; 0 discards the present statistics.
        module: Submodule whose layers are adapted. Names in the result are relative to it.
        forward: ``(model, batch) -> anything``, if calling the model on the input is not enough.
        max_scratch_mb: Memory for ``exact``, in MiB.
        progress: Show a progress bar if a pass takes more than two seconds.
        all_reduce: Sums a tensor over processes that each hold part of the data, all of which must call this function.
        apply: Copy the statistics into the model; otherwise, it does not change.

    Returns:
        The statistics. Variances are unbiased, as running variances are; during a pass, a batch
        is normalized by its biased variance, as in training. Layers that the forward does not reach keep their
        statistics and are not in the result. A layer shared under several names appears once.

    Raises:
        ValueError: If there are no samples, a layer keeps no running statistics, a layer sees a single value per
            channel (one image without spatial dimensions) and there is no prior, a layer normalizes without
            ``F.batch_norm``, or a statistic is not finite or too large for the layer's precision. The model is then
            unchanged.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm1d(1))
        >>> adapt_batchnorm(model, [torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0]])])
        BatchNormStatistics(1 layers, num_samples=3)
        >>> model[0].running_mean.item(), model[0].running_var.item()
        (3.0, 4.0)
    """
    check_adaptation(prior_samples, max_scratch_mb)
    layers = batchnorm_layers(model, module)
    if not layers:
        rank_zero_warn(f"{type(model).__name__} has no batch-norm layers, so there is nothing to adapt.")
        return BatchNormStatistics({})
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    data = Batches(dataloader, device, title="Batch norm" if progress else None)
    with isolated(device), torch.no_grad(), model_kept(model), evaluating(model):
        run = (ExactPass if exact else BatchwisePass)(model, layers, forward or call_model, prior_samples, all_reduce)
        run.estimate(data, int(max_scratch_mb * 2**20))
        found = run.statistics()
        if missing := [name for name in layers if name not in run.moments]:
            rank_zero_warn(
                f"The forward does not reach the batch-norm layers {some(missing)}, which keep their statistics."
            )
    statistics = BatchNormStatistics(found, num_samples=run.num_samples)
    if apply:
        statistics.apply(model if module is None else model.get_submodule(module))
    return statistics


estimate_batchnorm = partial(adapt_batchnorm, apply=False)
"""As :func:`adapt_batchnorm`, without changing the model."""


def check_adaptation(prior_samples: float, max_scratch_mb: float) -> None:
    """Check options of :func:`adapt_batchnorm`.

    Raises:
        ValueError: If one is out of range.
    """
    if not 0 <= prior_samples < float("inf"):
        raise ValueError(f"prior_samples must be 0 or more, and finite; got {prior_samples}.")
    if not 0 < max_scratch_mb < float("inf"):
        raise ValueError(f"max_scratch_mb must be positive; got {max_scratch_mb}.")
