"""Estimation of parameter importances."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from tqdm.auto import tqdm

from pl_personalize.functional.batch_fields import map_tensors
from pl_personalize.functional.batches import Forward, Labels, batch_size, call_model
from pl_personalize.functional.importance_kinds import IMPORTANCE_KINDS, KindOptions
from pl_personalize.functional.names import prefix_hint, some, submodule
from pl_personalize.importance import Importance, Kind, Reduction
from pl_personalize.per_sample.interrupts import InterruptsHeld
from pl_personalize.per_sample.module_state import isolated, model_kept
from pl_personalize.per_sample.power_sums import BatchPowerSums, PerSamplePowerSums


def estimate_importance(
    model: nn.Module,
    dataloader: Iterable[Any],
    kind: Kind,
    *,
    reduction: Reduction = "sample",
    module: str | None = None,
    exclude: Sequence[str] = (),
    draws: int | Literal["all"] = 1,
    generator: torch.Generator | int | None = None,
    labels: Labels | None = None,
    class_dim: int | None = None,
    forward: Forward | None = None,
    max_scratch_mb: float = 256,
    progress: bool = False,
    all_reduce: Callable[[Tensor], Tensor] | None = None,
) -> Importance:
    r"""Estimate how important each parameter is, exactly per sample.

    * ``"mas"``: the mean over samples of :math:`|\partial \|f(x)\|_2^2 / \partial \theta|`
      (Aljundi et al., ECCV 2018). Needs no labels.
    * ``"fisher"``: the mean over samples of :math:`(\partial \log p(\hat y | x) / \partial \theta)^2` with
      :math:`\hat y` drawn from the model's own softmax: the diagonal of the Fisher information. Needs no labels.
    * ``"empirical_fisher"``: the same with the true labels (as in Kirkpatrick et al., PNAS 2017).

    The absolute value or square is taken per sample, so the result does not depend on the batch size. The pass runs in
    eval mode without autocast and leaves the model unchanged: modes, ``requires_grad``, ``.grad``, buffers, hooks,
    values cached by modules, and the global random number generators. Values that a forward caches in a module, such as
    a table computed from parameters, are recomputed by the next forward, with a gradient.

    The first two samples are checked against plain autograd, which decides how each parameter's gradients are computed.
    Layers that a later batch uses differently, as in networks that route their samples, are computed in a loop over
    samples from there on; the check cannot detect rows selected by value whose number happens to equal the number of
    samples. A warning names the parameters that no gradient reaches.

    Args:
        model: A module that maps an input to logits (N, classes), or to other logits with ``class_dim``; any output
            (N, \*) for ``"mas"``.
        dataloader: Iterable of batches. A batch is a tensor, a tuple whose first item is the input, or a dict of
            keyword arguments of the model. The first dimension of every tensor is the batch; a list has one item per
            sample.
        kind: Name of an entry of :data:`~pl_personalize.functional.importance_kinds.IMPORTANCE_KINDS`, see above.
        reduction: ``"sample"``, or ``"batch"`` for the estimate of the published DUA code: the mean over batches of
            |gradient of the batch mean| (MAS) or its square (Fisher; ``"fisher"`` adds 1e-8). It depends on the batch
            size and the order of the data, and is kept for comparison.
        module: Submodule whose parameters count. Names in the result are relative to it.
        exclude: Names of parameters or modules to leave out, relative to ``model``.
        draws: For ``"fisher"``: labels drawn per sample, or ``"all"`` for the exact expectation over the classes, at
            the cost of one backward pass per class (and position).
        generator: Source of the drawn labels, or a seed. By default a copy of the global generator: it does not
            advance, so consecutive calls draw the same labels.
        labels: For ``"empirical_fisher"``: location of the labels in a batch, as a function ``batch -> labels``, an
            index, a key, or an attribute name. By default the second of two items, or the entry ``labels``, ``label``,
            ``targets``, ``target`` or ``y`` of a dict.
        class_dim: For Fisher: dimension of the classes if each sample has several positions: -1 for sequences
            (N, T, classes), 1 for maps (N, classes, H, W). The log-likelihood of a sample is the sum over positions.
            One label is drawn per position; true labels are (N, \*), and -100 marks ignored positions.
        forward: ``(model, batch) -> logits``, if calling the model on the input is not enough.
        max_scratch_mb: Memory for per-sample gradients of layers without a closed form, in MiB.
        progress: Show a progress bar if the pass takes more than two seconds.
        all_reduce: Sums a tensor over processes that each hold part of the data. Called for every sum, and last for
            the counts of samples and batches.

    Returns:
        Importances by the names of ``model.named_parameters()`` that require a gradient, in float32 (float64 for
        float64 parameters), on the model's device. For complex parameters, the absolute value is that of the gradient
        :math:`\partial / \partial a + i\, \partial / \partial b`.

    Raises:
        ValueError: If an option is invalid, no parameter requires a gradient, there are no samples, labels are needed
            and missing, the output is not finite, or the model mixes the samples of a batch.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.ones_(model.weight)
        >>> batch = torch.tensor([[1.0, 2.0], [1.0, -4.0]])  # outputs 3 and -3; |2 f(x) x| = (6, 12) and (6, 24)
        >>> estimate_importance(model, [batch], "mas")["weight"].tolist()
        [[6.0, 18.0]]
    """
    check_options(
        kind, reduction, draws, max_scratch_mb, generator=generator, labels=labels, class_dim=class_dim, forward=forward
    )
    chosen = IMPORTANCE_KINDS[kind]
    if isinstance(generator, int):
        generator = torch.Generator().manual_seed(generator)
    options = KindOptions(draws, labels, class_dim, generator)
    forward = forward or partial(call_model, label_key=labels if isinstance(labels, str) else None)
    parameters = select_parameters(model, module, exclude)
    device = next(iter(parameters.values())).device
    num_samples = num_batches = 0
    with InterruptsHeld() as interrupts, isolated(device), torch.enable_grad():
        sums: PerSamplePowerSums | BatchPowerSums
        if reduction == "sample":
            scratch = int(max_scratch_mb * 2**20)
            sums = PerSamplePowerSums(model, parameters, power=chosen.power, forward=forward, max_scratch_bytes=scratch)
        else:
            sums = BatchPowerSums(model, parameters, power=chosen.power, forward=forward)
        with model_kept(model), sums, interrupts.let_through():
            for batch in _batches(dataloader, device, progress):
                chosen.labels(batch, options)  # missing labels are an error before any work
                if size := batch_size(batch):
                    sums.add(batch, size, partial(chosen.cotangents, batch, options))
                    num_samples, num_batches = num_samples + size, num_batches + 1
        totals, found = sums.sums, sums.reached
        reached = torch.tensor([int(name in found) for name in parameters], device=device)
        counts = torch.tensor([num_samples, num_batches], device=device)
        if all_reduce is not None:
            for name in totals:  # one at a time, so that no second set of tensors is held
                totals[name] = all_reduce(totals[name])
            reached, counts = all_reduce(reached), all_reduce(counts)
        num_samples, num_batches = counts.tolist()
        if num_samples == 0:
            raise ValueError("The dataloader has no samples; pass at least one.")
        floor = chosen.batch_floor if reduction == "batch" else 0.0
        for total in totals.values():
            total.div_(num_samples if reduction == "sample" else num_batches).add_(floor)
    unreached = [name for name, times in zip(totals, reached.tolist(), strict=True) if not times]
    if unreached:
        rank_zero_warn(
            f"No gradient reached {some(unreached)} in any of {num_samples} samples, so their importances are "
            f"{floor:g}: the output did not depend on them (unused, detached, or cached from an earlier forward). If "
            f"that is intended, pass exclude=({', '.join(map(repr, unreached[:5]))}, {'...' * (len(unreached) > 5)})."
        )
    routes = sums.routes | dict.fromkeys(unreached, "none")
    return Importance(totals, kind=kind, num_samples=num_samples, reduction=reduction, routes=routes)


def check_options(
    kind: str,
    reduction: str,
    draws: int | Literal["all"],
    max_scratch_mb: float,
    *,
    forward: Forward | None = None,
    **options: Any,
) -> None:
    """Raise a ``ValueError`` if options of :func:`estimate_importance` are unknown, out of range or incompatible."""
    chosen = IMPORTANCE_KINDS.find(kind)
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction must be one of {', '.join(get_args(Reduction))}; got {reduction!r}.")
    if not 0 < max_scratch_mb < float("inf"):
        raise ValueError(f"max_scratch_mb must be positive and finite; got {max_scratch_mb}.")
    chosen.check(KindOptions(draws, **options), reduction)
    if options.get("labels") == 0 and forward is None:
        raise ValueError("labels=0 is also the model's input: pass forward=lambda model, batch: ... to select another.")


def select_parameters(model: nn.Module, module: str | None, exclude: Sequence[str]) -> dict[str, nn.Parameter]:
    """The :func:`named_parameters` that need a gradient, or a ``ValueError`` if there are none."""
    chosen = {name: p for name, p in named_parameters(model, module, exclude).items() if p.requires_grad}
    if not chosen:
        where = f" in {module!r}" if module else ""
        raise ValueError(f"No parameter needs a gradient{where}: all are frozen or excluded. Unfreeze or include some.")
    return chosen


def named_parameters(model: nn.Module, module: str | None, exclude: Sequence[str]) -> dict[str, nn.Parameter]:
    """All parameters of the model, or of ``module`` with names relative to it, except those excluded."""
    if isinstance(exclude, str):
        raise ValueError(f"exclude must be a sequence of names; got the string {exclude!r}. Write ({exclude!r},).")
    every = dict(model.named_parameters(remove_duplicate=False))
    part = model if module is None else submodule(model, module.removesuffix("."))
    excluded: set[int] = set()
    for name in exclude:
        found = {id(p) for known, p in every.items() if below(known, name)}
        if not found:
            raise ValueError(
                f"exclude={name!r} is no parameter or module of the model; its parameters are {some(every)}."
                + prefix_hint([name.removesuffix(".")], [*dict(model.named_modules()), *every])
            )
        excluded |= found
    return {name: p for name, p in part.named_parameters() if id(p) not in excluded}


def below(parameter: str, name: str) -> bool:
    """Whether ``name`` is the name of the parameter, or of a module that contains it."""
    name = name.removesuffix(".")
    return parameter == name or parameter.startswith(f"{name}.")


def _batches(dataloader: Iterable[Any], device: torch.device, progress: bool) -> Iterator[Any]:
    def usable(tensor: Tensor) -> Tensor:  # inference tensors cannot be part of a graph
        return tensor.clone() if tensor.is_inference() else tensor.detach()

    for batch in tqdm(dataloader, desc="Importance", unit="batch", delay=2, disable=not progress, leave=False):
        yield map_tensors(move_data_to_device(batch, device), usable)
