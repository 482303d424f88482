"""Estimating how important each parameter of a model is for the data at hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch.utilities import rank_zero_warn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from tqdm.auto import tqdm

from pl_personalize.functional.batches import Labels, as_logits, batch_labels, batch_size, call_model, check_logits
from pl_personalize.functional.names import prefix_hint, some
from pl_personalize.functional.objectives import (
    expected_fisher_cotangents,
    fisher_cotangents,
    label_cotangent,
    mas_cotangent,
)
from pl_personalize.importance import Importance, Kind, Reduction
from pl_personalize.per_sample.gradient_tape import sum_type
from pl_personalize.per_sample.interrupts import InterruptsHeld, LetThrough
from pl_personalize.per_sample.layer_rules import raise_to
from pl_personalize.per_sample.module_state import ForwardState, evaluating, model_kept, random_state_kept, uncompiled
from pl_personalize.per_sample.norm_gradients import RightNormGradients
from pl_personalize.per_sample.power_sums import Forward, PerSamplePowerSums


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

    How each parameter's gradients are computed is decided on the first two samples, with plain autograd beside it. A
    layer that a later batch uses otherwise, as in networks that route their samples, is done by a loop from there on;
    rows that a layer picks by their values are not seen where they happen to be as many as the samples.

    The absolute value or square is taken for each sample, not for the mean over a batch: the result does not depend on
    the batch size. It is computed in eval mode and without autocast, and the model is left as it was: modes,
    ``requires_grad``, ``.grad``, buffers, hooks, what modules keep, and the state of the random number generators. What
    a forward keeps in a module (a table that follows from parameters, say) the next one computes anew, with a gradient.
    Parameters that no gradient reaches nevertheless are named in a warning.

    Args:
        model: Any module that maps an input to logits (N, classes), or to others with ``class_dim``; (N, \*) for
            ``"mas"``.
        dataloader: Any iterable of batches. A batch is a tensor, a tuple whose first item is the input, or a dict
            (keyword arguments of the model); the first dimension of every tensor is the batch, or a list has one item
            for each sample.
        kind: See above.
        reduction: ``"sample"``, or ``"batch"``: the estimate of the published DUA code, the mean over batches of
            |gradient of the batch mean| (MAS) or its square (Fisher; for ``"fisher"`` plus 1e-8). It depends on the
            batch size and the order, and is kept for comparison.
        module: Name of the submodule whose parameters count; names in the result are relative to it.
        exclude: Names of parameters, or of modules, that do not count. Relative to ``model``.
        draws: For ``"fisher"``: labels drawn for each sample, or ``"all"`` for the exact expectation over the classes,
            at the cost of one backward pass for each class (and position).
        generator: Source of the drawn labels, or a seed, with which each call draws the same. By default a copy of the
            global generator: the global one does not move, so calls in a row draw the same, too.
        labels: For ``"empirical_fisher"``: where a batch has its labels, as a function ``batch -> labels``, an index, a
            key, or the name of an attribute. By default they are the second of two items, or in a dict the entry
            ``labels``, ``label``, ``targets``, ``target`` or ``y``.
        class_dim: For Fisher: the dimension of the classes where each sample has several positions: -1 for sequences
            (N, T, classes), 1 for maps (N, classes, H, W). The log-likelihood of a sample is the sum over positions.
            A label is drawn at each; true ones are (N, \*), and -100 marks a position that does not count.
        forward: ``(model, batch) -> logits`` where calling the model on the input is not enough.
        max_scratch_mb: Memory for per-sample gradients (in 2**20 bytes) where a layer has no closed form.
        progress: Show a progress bar if it takes more than two seconds.
        all_reduce: Sums a tensor over processes that each hold a part of the data; called for every sum, and last for
            the number of samples (and batches).

    Returns:
        Importances by the names of ``model.named_parameters()`` that need a gradient, in float32 (float64 for float64
        parameters), on the model's device. Those of complex parameters are real: of a gradient
        :math:`\partial / \partial a + i\, \partial / \partial b`, they take the absolute value.

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
    check_options(
        kind, reduction, draws, max_scratch_mb, generator=generator, labels=labels, class_dim=class_dim, forward=forward
    )
    parameters = select_parameters(model, module, exclude)
    device = next(iter(parameters.values())).device
    batches = _batches(dataloader, device, progress)
    if isinstance(generator, int):
        generator = torch.Generator().manual_seed(generator)
    objective = _Objective(kind, draws, generator, labels, class_dim)
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
            found = estimate(
                model,
                parameters,
                batches,
                objective,
                forward=forward or partial(call_model, label_key=labels if isinstance(labels, str) else None),
                max_scratch_bytes=int(max_scratch_mb * 2**20),
                interruptible=interrupts.let_through(),
            )
        sums, reached, counts = found.sums, found.reached, found.counts
        if all_reduce is not None:
            for name in sums:  # one after the other, so that no second set of them is held
                sums[name] = all_reduce(sums[name])
            reached, counts = all_reduce(reached), all_reduce(counts)
        num_samples, denominator = int(counts[0]), int(counts[-1])
        if num_samples == 0:
            raise ValueError("The dataloader has no samples; importances need at least one.")
        floor = 1e-8 if (kind, reduction) == ("fisher", "batch") else 0.0
        for total in sums.values():
            total.div_(denominator).add_(floor)
    unreached = [name for name, times in zip(sums, reached.tolist(), strict=True) if not times]
    if unreached:
        rank_zero_warn(
            f"No gradient reached {some(unreached)} in any of {num_samples} samples: their importances are {floor:g}, "
            "because the output as it was computed did not depend on them (not used, detached, or by way of something "
            f"that is kept from an earlier forward). If that is right, leave them out: exclude={_as_tuple(unreached)}."
        )
    paths = found.paths | dict.fromkeys(unreached, "none")
    return Importance(sums, kind=kind, num_samples=num_samples, reduction=reduction, paths=paths)


def _as_tuple(names: Sequence[str]) -> str:
    return f"({', '.join(map(repr, names[:5]))}, ...)" if len(names) > 5 else repr(tuple(names))


def check_options(
    kind: str,
    reduction: str,
    draws: int | str,
    max_scratch_mb: float,
    *,
    generator: torch.Generator | int | None = None,
    labels: Labels | None = None,
    class_dim: int | None = None,
    forward: Forward | None = None,
) -> None:
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
    if isinstance(generator, bool) or not isinstance(generator, torch.Generator | int | None):
        raise ValueError(f"generator must be a torch.Generator or a seed; got {generator!r}.")
    if isinstance(labels, bool) or not (labels is None or callable(labels) or isinstance(labels, int | str)):
        raise ValueError(f"labels must be a function of the batch, an index or a key; got {labels!r}.")
    if labels is not None and kind != "empirical_fisher":
        raise ValueError(f"labels={labels!r} has a meaning for kind='empirical_fisher' alone; got kind={kind!r}.")
    if not callable(labels) and labels == 0 and forward is None:
        raise ValueError("labels=0 is what the model gets: say how it is called, forward=lambda model, batch: ...")
    if class_dim is not None and (isinstance(class_dim, bool) or not isinstance(class_dim, int) or class_dim == 0):
        raise ValueError(f"class_dim must be a dimension other than 0, which is the samples; got {class_dim!r}.")
    if class_dim is not None and kind == "mas":
        raise ValueError(f"class_dim={class_dim} has a meaning for a Fisher information alone; got kind='mas'.")


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


@dataclass(frozen=True)
class _Objective:
    """What is differentiated, as gradients with respect to the logits."""

    kind: Kind
    draws: int | Literal["all"]
    generator: torch.Generator | None
    labels: Labels | None
    class_dim: int | None

    def check_batch(self, batch: Any) -> None:
        """Refuse a batch without labels, where they are needed, before any work is done."""
        if self.kind == "empirical_fisher":
            batch_labels(batch, self.labels)

    def cotangents(self, batch: Any, logits: Tensor) -> Iterable[Tensor]:
        """One or more directions, whose powers are summed."""
        if self.kind == "mas":
            return [mas_cotangent(logits)]
        scores = self._class_logits(logits)
        if self.kind == "empirical_fisher":
            labels = batch_labels(batch, self.labels)
            found: Iterable[Tensor] = [label_cotangent(scores, labels, may_ignore=self.class_dim is not None)]
        elif self.draws == "all":
            found = expected_fisher_cotangents(scores)
        else:
            found = fisher_cotangents(scores, self.draws, self.generator)
        return (direction.movedim(1, self.class_dim or 1) for direction in found)

    def _class_logits(self, logits: Tensor) -> Tensor:
        """The logits as (n, classes, *)."""
        dim, shape = self.class_dim, tuple(logits.shape)
        if dim is not None:
            if not -len(shape) < dim < len(shape) or shape[dim] < 2:
                raise ValueError(f"class_dim={dim} is no dimension of at least two classes in logits {shape}.")
            return logits.movedim(dim, 1)
        if len(shape) == 2 and shape[1] > 1:
            return logits
        way = (
            "For one logit z and a sigmoid, take 0 and z, the logits of the same two classes: forward=lambda model, "
            "batch: torch.nn.functional.pad(model(batch[0]).view(-1, 1), (1, 0)). Of a probability p, z is "
            "torch.logit(p)."
            if len(shape) < 3
            else "Where each sample has several positions, say which dimension is the classes: class_dim=-1 for "
            "sequences, class_dim=1 for maps."
        )
        raise ValueError(f"A Fisher information needs logits (N, classes) of at least two classes; got {shape}. {way}")


@dataclass(frozen=True)
class _Sums:
    """Sums over this process's data: powers of gradients; which parameters were reached; samples, and batches."""

    sums: dict[str, Tensor]
    reached: Tensor
    counts: Tensor
    paths: dict[str, str]


def _sums_per_sample(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    batches: Iterator[Any],
    objective: _Objective,
    *,
    forward: Forward,
    max_scratch_bytes: int,
    interruptible: LetThrough,
) -> _Sums:
    power = 1 if objective.kind == "mas" else 2
    engine = PerSamplePowerSums(model, parameters, power=power, forward=forward, max_scratch_bytes=max_scratch_bytes)
    count = 0
    with engine, interruptible:
        for batch in batches:
            objective.check_batch(batch)
            num_samples = batch_size(batch)
            if num_samples:
                engine.add(batch, num_samples, partial(objective.cotangents, batch))
            count += num_samples
    device, reached = next(iter(parameters.values())).device, engine.reached
    return _Sums(
        engine.sums,
        torch.tensor([int(name in reached) for name in parameters], device=device),
        torch.tensor([count], device=device),
        dict(engine.paths),
    )


def _sums_per_batch(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    batches: Iterator[Any],
    objective: _Objective,
    *,
    forward: Forward,
    max_scratch_bytes: int,
    interruptible: LetThrough,
) -> _Sums:
    """The published code's estimates (De Lange et al., CVPR 2020): |mean gradient of a batch|, or its square."""
    sums = {name: torch.zeros_like(p, dtype=sum_type(p)) for name, p in parameters.items()}
    reached: set[str] = set()
    count = num_batches = 0
    with evaluating(model), RightNormGradients(), interruptible:
        state = ForwardState(model)
        for batch in batches:
            objective.check_batch(batch)
            num_samples = batch_size(batch)
            if num_samples == 0:
                continue
            logits = as_logits(forward(model, batch))
            check_logits(logits, num_samples)
            if not logits.requires_grad:
                raise ValueError("The model's output has no gradient with respect to any of the parameters that count.")
            (direction,) = objective.cotangents(batch, logits.detach())
            gradients = torch.autograd.grad(
                logits, list(parameters.values()), direction / num_samples, allow_unused=True
            )
            for (name, total), gradient in zip(sums.items(), gradients, strict=True):
                if gradient is not None:  # half precision would lose its square
                    total.add_(raise_to(gradient.abs().to(total.dtype), 1 if objective.kind == "mas" else 2))
                    reached.add(name)
            state.put_back()
            count += num_samples
            num_batches += 1
    device = next(iter(parameters.values())).device
    return _Sums(
        sums,
        torch.tensor([int(name in reached) for name in parameters], device=device),
        torch.tensor([count, num_batches], device=device),
        dict.fromkeys(parameters, "batch"),
    )
