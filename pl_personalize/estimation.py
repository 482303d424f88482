"""Estimating how important each parameter of a model is for the data at hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from tqdm.auto import tqdm

from pl_personalize.functional.batches import as_logits, batch_labels, batch_size, call_model, check_logits
from pl_personalize.functional.interrupts import InterruptsHeld, LetThrough
from pl_personalize.functional.module_state import evaluating, model_kept, random_state_kept, uncompiled
from pl_personalize.functional.names import prefix_hint, some
from pl_personalize.functional.objectives import (
    expected_fisher_cotangents,
    fisher_cotangents,
    label_cotangent,
    mas_cotangent,
    sample_labels,
)
from pl_personalize.functional.per_sample import Forward, Path, PerSamplePowerSums
from pl_personalize.importance import Importance, Kind, Reduction


def estimate_importance(
    model: nn.Module,
    dataloader: Iterable[Any],
    kind: Kind,
    *,
    reduction: Reduction = "sample",
    module: str | None = None,
    exclude: Sequence[str] = (),
    draws: int | Literal["all"] = 1,
    generator: torch.Generator | None = None,
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

    How each parameter's gradients are computed is decided on the first two samples, with plain autograd beside it; what
    they do not show, such as rows that a layer picks by their values, is not seen.

    The absolute value or square is taken for each sample, not for the mean over a batch: the result does not depend on
    the batch size. It is computed in eval mode and without autocast, and the model is left as it was: modes,
    ``requires_grad``, ``.grad``, buffers, hooks and the state of the random number generators.

    Args:
        model: Any module that maps an input to logits (N, classes); (N, \*) for ``"mas"``.
        dataloader: Any iterable of batches. A batch is a tensor, a tuple whose first item is the input, or a dict
            (keyword arguments of the model); every tensor's first dimension is the batch.
        kind: See above.
        reduction: ``"sample"``, or ``"batch"``: the estimate of the published DUA code, the mean over batches of
            |gradient of the batch mean| (MAS) or its square (Fisher; for ``"fisher"`` plus 1e-8). It depends on the
            batch size and the order, and is kept for comparison.
        module: Name of the submodule whose parameters count; names in the result are relative to it.
        exclude: Names of parameters, or of modules, that do not count. Relative to ``model``.
        draws: For ``"fisher"``: labels drawn for each sample, or ``"all"`` for the exact expectation over the classes,
            at the cost of one backward pass for each class.
        generator: Source of the drawn labels. By default a copy of the global generator: the global one does not move,
            so calls in a row draw the same.
        forward: ``(model, batch) -> logits`` where calling the model on the input is not enough.
        max_scratch_mb: Memory for per-sample gradients (in 2**20 bytes) where a layer has no closed form.
        progress: Show a progress bar if it takes more than two seconds.
        all_reduce: Sums a tensor over processes that each hold a part of the data; called for every sum, and last for
            the number of samples (and batches).

    Returns:
        Importances by the names of ``model.named_parameters()`` that need a gradient, in float32 (float64 for float64
        parameters), on the model's device.

    Raises:
        ValueError: If the options are wrong, no parameter needs a gradient, there are no batches, the batch has no
            labels where needed, the output is not finite, or the model mixes the samples of a batch.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.ones_(model.weight)
        >>> batch = torch.tensor([[1.0, 2.0], [1.0, -4.0]])  # outputs 3 and -3; |2 f(x) x| = (6, 12) and (6, 24)
        >>> estimate_importance(model, [batch], "mas")["weight"].tolist()
        [[6.0, 18.0]]
    """
    check_options(kind, reduction, draws, max_scratch_mb)
    parameters = select_parameters(model, module, exclude)
    device = next(iter(parameters.values())).device
    batches = _batches(dataloader, device, progress)
    estimate = _sums_per_sample if reduction == "sample" else _sums_per_batch
    with (
        InterruptsHeld() as interrupts,
        random_state_kept(device),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
        uncompiled(),
    ):
        with model_kept(model):
            sums, counts, paths = estimate(
                model,
                parameters,
                batches,
                kind,
                draws=draws,
                generator=generator,
                forward=forward or call_model,
                max_scratch_bytes=int(max_scratch_mb * 2**20),
                interruptible=interrupts.let_through(),
            )
        if all_reduce is not None:
            for name in sums:  # one after the other, so that no second set of them is held
                sums[name] = all_reduce(sums[name])
            counts = all_reduce(counts)
        num_samples, denominator = int(counts[0]), int(counts[-1])
        if num_samples == 0:
            raise ValueError("The dataloader has no samples; importances need at least one.")
        floor = 1e-8 if (kind, reduction) == ("fisher", "batch") else 0.0
        for total in sums.values():
            total.div_(denominator).add_(floor)
    return Importance(sums, kind=kind, num_samples=num_samples, reduction=reduction, paths=paths)


def check_options(kind: str, reduction: str, draws: int | str, max_scratch_mb: float) -> None:
    """Check options of :func:`estimate_importance`.

    Raises:
        ValueError: If one is unknown, out of range, or does not go with another.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}; got {kind!r}.")
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction must be one of {', '.join(get_args(Reduction))}; got {reduction!r}.")
    if draws != "all" and (isinstance(draws, bool) or not isinstance(draws, int) or draws < 1):
        raise ValueError(f'draws must be a positive integer or "all"; got {draws!r}.')
    if draws != 1 and (kind, reduction) != ("fisher", "sample"):
        raise ValueError(f"draws={draws!r} has a meaning for kind='fisher' with reduction='sample' alone.")
    if not 0 < max_scratch_mb < float("inf"):
        raise ValueError(f"max_scratch_mb must be positive; got {max_scratch_mb}.")


def select_parameters(model: nn.Module, module: str | None, exclude: Sequence[str]) -> dict[str, nn.Parameter]:
    """The parameters whose importance is estimated, by name; relative to ``module``, if there is one.

    Raises:
        ValueError: If a name is unknown, or no parameter is left.
    """
    chosen = {name: p for name, p in named_parameters(model, module, exclude).items() if p.requires_grad}
    if not chosen:
        raise ValueError(
            "No parameter needs a gradient"
            + (f" below {module!r}" if module else "")
            + " (all are frozen or excluded), so there is nothing to estimate."
        )
    return chosen


def named_parameters(model: nn.Module, module: str | None, exclude: Sequence[str]) -> dict[str, nn.Parameter]:
    """All parameters of the model, or of ``module`` with names relative to it, but for the excluded ones.

    Raises:
        ValueError: If a name is unknown.
    """
    if isinstance(exclude, str):
        raise ValueError(f"exclude must be a sequence of names; got the string {exclude!r}. Write ({exclude!r},).")
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    modules = [name for name, _ in model.named_modules()]
    part = model
    if module is not None:
        module = module.removesuffix(".")
        try:
            part = model.get_submodule(module)
        except AttributeError as error:
            raise ValueError(
                f"The model has no module {module!r}; its parameters are {some(names)}.{prefix_hint([module], modules)}"
            ) from error
    excluded: set[int] = set()
    for name in exclude:
        found = [p for known, p in model.named_parameters(remove_duplicate=False) if below(known, name)]
        if not found:
            raise ValueError(
                f"exclude={name!r} is no parameter or module of the model; its parameters are {some(names)}."
                + prefix_hint([name.removesuffix(".")], [*modules, *names])
            )
        excluded.update(map(id, found))
    return {name: p for name, p in part.named_parameters() if id(p) not in excluded}


def below(parameter: str, name: str) -> bool:
    """Whether a parameter is what ``name`` says, or is in the module of that name."""
    name = name.removesuffix(".")
    return parameter == name or parameter.startswith(f"{name}.")


def _batches(dataloader: Iterable[Any], device: torch.device, progress: bool) -> Iterator[Any]:
    def usable(tensor: Tensor) -> Tensor:  # a batch made in inference mode cannot be part of a graph
        return tensor.clone() if tensor.is_inference() else tensor.detach()

    for batch in tqdm(dataloader, desc="Importance", unit="batch", delay=2, disable=not progress, leave=False):
        yield apply_to_collection(move_data_to_device(batch, device), Tensor, usable)


def _class_logits(logits: Tensor) -> Tensor:
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise ValueError(
            f"A Fisher information needs logits (N, classes) of at least two classes; got {tuple(logits.shape)}."
        )
    return logits


def _sums_per_sample(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    batches: Iterator[Any],
    kind: Kind,
    *,
    draws: int | Literal["all"],
    generator: torch.Generator | None,
    forward: Forward,
    max_scratch_bytes: int,
    interruptible: LetThrough,
) -> tuple[dict[str, Tensor], Tensor, Mapping[str, Path]]:
    def cotangents(batch: Any, logits: Tensor) -> Iterable[Tensor]:
        if kind == "mas":
            return [mas_cotangent(logits)]
        if kind == "empirical_fisher":
            return [label_cotangent(_class_logits(logits), batch_labels(batch))]
        if draws == "all":
            return expected_fisher_cotangents(_class_logits(logits))
        return fisher_cotangents(_class_logits(logits), draws, generator)

    power = 1 if kind == "mas" else 2
    engine = PerSamplePowerSums(model, parameters, power=power, forward=forward, max_scratch_bytes=max_scratch_bytes)
    count = 0
    with engine, interruptible:
        for batch in batches:
            if kind == "empirical_fisher":
                batch_labels(batch)  # before any work is done
            num_samples = batch_size(batch)
            if num_samples:
                engine.add(batch, num_samples, partial(cotangents, batch))
            count += num_samples
    device = next(iter(parameters.values())).device
    return engine.sums, torch.tensor([count], device=device), engine.paths


def _sums_per_batch(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    batches: Iterator[Any],
    kind: Kind,
    *,
    draws: int | Literal["all"],
    generator: torch.Generator | None,
    forward: Forward,
    max_scratch_bytes: int,
    interruptible: LetThrough,
) -> tuple[dict[str, Tensor], Tensor, Mapping[str, str]]:
    """The published code's estimates (De Lange et al., CVPR 2020): |mean gradient of a batch|, or its square."""
    sums = {
        name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for name, p in parameters.items()
    }
    count = num_batches = 0
    with evaluating(model), interruptible:
        for batch in batches:
            num_samples = batch_size(batch)
            if num_samples == 0:
                continue
            logits = as_logits(forward(model, batch))
            check_logits(logits, num_samples)
            if not logits.requires_grad:
                raise ValueError("The model's output has no gradient with respect to any of the parameters that count.")
            if kind == "mas":
                direction = mas_cotangent(logits.detach())
            else:
                chances = _class_logits(logits.detach())
                labels = (
                    batch_labels(batch) if kind == "empirical_fisher" else sample_labels(chances, 1, generator)[:, 0]
                )
                direction = label_cotangent(chances, labels)
            gradients = torch.autograd.grad(
                logits, list(parameters.values()), direction / num_samples, materialize_grads=True
            )
            for total, gradient in zip(sums.values(), gradients, strict=True):
                total.add_(gradient.abs() if kind == "mas" else gradient.square())
            count += num_samples
            num_batches += 1
    counts = torch.tensor([count, num_batches], device=next(iter(parameters.values())).device)
    return sums, counts, dict.fromkeys(parameters, "batch")
