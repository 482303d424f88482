"""Merging experts: state dicts in, state dict out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from pl_personalize.artifacts import shared_entries
from pl_personalize.functional.merging import Bounds, Zero, check_importance, prefix_merges
from pl_personalize.functional.names import prefix_hint, some

Normalize = Literal["sum", "layer", "max"]
StateDict = Mapping[str, Tensor]
_BATCH_NORM_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def merge(
    experts: Sequence[StateDict],
    importances: Sequence[StateDict | None] | None = None,
    *,
    parameters: Sequence[str] | None = None,
    weights: Sequence[float] | None = None,
    zero: Zero = "mean",
    normalize: Normalize | None = None,
    out: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    r"""Merge experts into one, each parameter entry weighted by its importance.

    .. math::
        \theta = \sum_k \frac{w_k \Omega_k}{\sum_j w_j \Omega_j} \theta_k

    With importances from server data this is importance-weighted IMM, with a user's own it is RACL
    (De Lange et al., CVPR 2020); without importances it is the plain mean (mean-IMM).

    Parameters are merged one after the other, so experts may be lazily opened files
    (:class:`~pl_personalize.artifacts.TensorFile`). Entries of a state dict that share storage are merged once and stay
    shared. What is not merged comes from the last expert.

    Args:
        experts: At least one state dict; all with the same entries and shapes.
        importances: One mapping for each expert, or ``None`` for the plain mean.
        parameters: Names of the entries to merge; by default those of the importances, or without importances every
            floating entry except batch-norm statistics.
        weights: One positive factor for each expert; by default equal.
        zero: What an entry becomes that is important to no expert: ``"mean"``, or ``"reference"`` for 0 as in the
            published code.
        normalize: Divide each expert's importances by their ``"sum"`` or their ``"max"`` over all merged parameters, or
            by the largest of each parameter tensor (``"layer"``), so that their scales count no longer.
        out: Where to write, instead of into new tensors: a state dict with all the entries, such as that of a model, or
            of an expert that is not needed any more. New memory takes longer to get than a merge takes. After an error
            some of it may be written.

    Returns:
        A state dict with the last expert's entries in the last expert's order: new tensors, or those of ``out``.

    Raises:
        ValueError: If the numbers of experts, importances and weights differ, an entry or an importance is missing or
            has another shape, an importance is negative, NaN or infinite, or ``out`` does not fit.

    Example:
        >>> import torch
        >>> a, b = {"w": torch.tensor([0.0, 0.0])}, {"w": torch.tensor([1.0, 1.0])}
        >>> merge([a, b], [{"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([3.0, 0.0])}])["w"].tolist()
        [0.75, 0.5]
    """
    plan = _Plan(experts, importances, parameters, weights, zero, normalize)
    if out is not None:
        plan.check_out(out)
    merged = {name: values[-1] for names, values in plan.run(keep_all=False, out=out) for name in names}
    return _complete(merged, experts[-1], out)


def merge_prefixes(
    experts: Sequence[StateDict],
    importances: Sequence[StateDict | None] | None = None,
    *,
    parameters: Sequence[str] | None = None,
    weights: Sequence[float] | None = None,
    zero: Zero = "mean",
    normalize: Normalize | None = None,
) -> list[dict[str, Tensor]]:
    """The merges of experts 1, 1..2, …, 1..T, as a server has them after each task, in one pass over the files.

    The first is expert 1 itself; the last equals :func:`merge` of all. Arguments and errors are those of :func:`merge`.

    Returns:
        T state dicts. What is not merged comes from expert t in the t-th.
    """
    plan = _Plan(experts, importances, parameters, weights, zero, normalize)
    merged: list[dict[str, Tensor]] = [{} for _ in experts]
    for names, values in plan.run(keep_all=True):
        for state, value in zip(merged, values, strict=True):
            state.update(dict.fromkeys(names, value))
    return [_complete(state, expert) for state, expert in zip(merged, experts, strict=True)]


def _complete(
    merged: Mapping[str, Tensor], expert: StateDict, out: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The merged entries, and copies of all others of an expert; what shared storage in it shares it still."""
    if out is not None:
        for name in expert:
            if name not in merged:
                out[name].detach().copy_(expert[name].detach())
        return {name: out[name] for name in expert}
    shared = shared_entries(expert)
    copies = {n: expert[n].detach().clone() for n in expert if n not in merged and shared.get(n, n) == n}
    return {name: merged[name] if name in merged else copies[shared.get(name, name)] for name in expert}


def kind_of(importance: StateDict | None) -> str | None:
    """The kind of importances and how they were reduced, where the mapping knows it."""
    kind, reduction = getattr(importance, "kind", None), getattr(importance, "reduction", None)
    metadata: dict[str, Any] = getattr(importance, "metadata", {})
    kind, reduction = metadata.get("kind", kind), metadata.get("reduction", reduction)
    return f"{kind} ({reduction})" if reduction is not None else kind


class _Plan:
    """Checked arguments of a merge: what is merged with what, before a tensor is computed."""

    def __init__(
        self,
        experts: Sequence[StateDict],
        importances: Sequence[StateDict | None] | None,
        parameters: Sequence[str] | None,
        weights: Sequence[float] | None,
        zero: Zero,
        normalize: Normalize | None,
    ) -> None:
        if not isinstance(experts, Sequence):
            raise ValueError(f"experts must be a sequence of state dicts; got a {type(experts).__name__}.")
        if not experts:
            raise ValueError("There are no experts to merge.")
        for k, expert in enumerate(experts):
            if not isinstance(expert, Mapping):
                raise ValueError(f"Expert {k + 1} is a {type(expert).__name__}; give its state dict.")
        if zero not in get_args(Zero):
            raise ValueError(f"zero must be one of {', '.join(get_args(Zero))}; got {zero!r}.")
        if normalize is not None and normalize not in get_args(Normalize):
            raise ValueError(f"normalize must be None or one of {', '.join(get_args(Normalize))}; got {normalize!r}.")
        self.experts, self.zero, self.normalize = experts, zero, normalize
        self.importances = self._check_importances(importances)
        self.weights = self._check_weights(weights)
        self.groups = self._groups(parameters)
        self._check_entries()
        self.scales = self._scales()

    def run(
        self, *, keep_all: bool, out: Mapping[str, Tensor] | None = None
    ) -> Iterator[tuple[list[str], list[Tensor]]]:
        """For each merged tensor its names and its value after each expert, or (not ``keep_all``) after the last."""
        for source, names in self.groups.items():
            start = 0 if keep_all else len(self.experts) - 1
            thetas = [expert[source] for expert in self.experts]
            omegas, bounds = (None, None) if self.importances is None else self._importances_of(source)
            target = None if out is None else [out[names[0]]]
            try:
                values = prefix_merges(
                    thetas,
                    omegas,
                    self.weights,
                    self.zero,
                    scales=self._scales_of(omegas),
                    start=start,
                    bounds=bounds,
                    out=target,
                )
            except FloatingPointError as error:
                raise ValueError(f"The parameter {source!r} of an expert has NaN or infinite entries.") from error
            del thetas, omegas  # those of the next parameter take their place
            if out is not None:
                for name in names[1:]:
                    if not _same_memory(out[name], out[names[0]]):
                        out[name].detach().copy_(values[-1].detach())
            yield names, values

    def check_out(self, out: Mapping[str, Tensor]) -> None:
        """Refuse to write where the merge does not fit."""
        last = self.experts[-1]
        if missing := [name for name in last if name not in out]:
            raise ValueError(f"out has no entries {some(missing)}; it has {some(out)}.{prefix_hint(missing, out)}")
        for name, value in last.items():
            if out[name].shape != value.shape or out[name].dtype != value.dtype:
                raise ValueError(
                    f"out[{name!r}] is {tuple(out[name].shape)} of {out[name].dtype}; the experts' is "
                    f"{tuple(value.shape)} of {value.dtype}."
                )
        own, tied = shared_entries(last), shared_entries(out)
        for name in last:
            if tied.get(name, name) != name and own.get(name, name) != own.get(tied[name], tied[name]):
                raise ValueError(
                    f"The entries {tied[name]!r} and {name!r} of out are one tensor, and two in the experts."
                )
        if scattered := [name for names in self.groups.values() for name in names if not out[name].is_contiguous()]:
            raise ValueError(f"Entries of out are not contiguous in memory: {some(scattered)}.")

    def _importances_of(self, source: str) -> tuple[list[Tensor], list[Bounds] | None]:
        """A parameter's importances, looked at where nobody has done it before; and their bounds, if all are known."""
        assert self.importances is not None
        found = [importance[source] for importance in self.importances]
        bounds: list[Bounds | None] = []
        for k, (importance, value) in enumerate(zip(self.importances, found, strict=True)):
            known_bounds = getattr(importance, "bounds", None)
            if known_bounds is not None:
                bounds.append(known_bounds(source) or self._check_importance(k, source, value))
            else:
                bounds.append(self._check_importance(k, source, value) if kind_of(importance) is None else None)
        known = [bound for bound in bounds if bound is not None]
        return found, known if len(known) == len(bounds) else None

    def _scales_of(self, omegas: Sequence[Tensor] | None) -> list[float] | None:
        if omegas is None or self.normalize is None:
            return None
        if self.scales is not None:
            return [1 / scale for scale in self.scales]
        return [1 / (float(omega.max()) or 1.0) if omega.numel() else 1.0 for omega in omegas]

    def _check_importance(self, k: int, source: str, value: Tensor) -> Bounds:
        try:
            return check_importance(source, value)
        except ValueError as error:
            raise ValueError(f"Expert {k + 1}: {error}") from error

    def _check_importances(self, importances: Sequence[StateDict | None] | None) -> list[StateDict] | None:
        if importances is None:
            return None
        if isinstance(importances, Mapping):
            raise ValueError("importances must be a sequence with one mapping for each expert; got a single mapping.")
        if len(importances) != len(self.experts):
            raise ValueError(f"There are {len(self.experts)} experts but {len(importances)} importances.")
        for k, importance in enumerate(importances):
            if importance is not None and not isinstance(importance, Mapping):
                raise ValueError(
                    f"The importances of expert {k + 1} are a {type(importance).__name__}; give a mapping, such as "
                    "Importance.load(path)."
                )
        for k, importance in enumerate(importances):
            if importance is None or len(importance) == 0:
                raise ValueError(
                    f"Expert {k + 1} of {len(self.experts)} has no importances. Give one mapping for each expert, or "
                    "importances=None for the plain mean."
                )
        kinds = {kind for importance in importances if (kind := kind_of(importance)) is not None}
        if len(kinds) > 1:
            raise ValueError(f"The importances are of different kinds, {sorted(kinds)}, whose sizes do not compare.")
        return [importance for importance in importances if importance is not None]

    def _check_weights(self, weights: Sequence[float] | None) -> list[float]:
        if weights is None:
            return [1.0] * len(self.experts)
        if len(weights) != len(self.experts):
            raise ValueError(f"There are {len(self.experts)} experts but {len(weights)} weights.")
        if not all(0 < weight < float("inf") for weight in weights):
            raise ValueError(f"weights must be positive and finite; got {list(weights)}.")
        return [float(weight) for weight in weights]

    def _groups(self, parameters: Sequence[str] | None) -> dict[str, list[str]]:
        """The tensors to merge: the name that its importance has, and all the names that share its storage."""
        last = self.experts[-1]
        if isinstance(parameters, str):
            raise ValueError(f"parameters must be a sequence of names; got the string {parameters!r}.")
        if parameters is not None:
            chosen = list(parameters)
        elif self.importances is not None:
            chosen = list(dict.fromkeys(name for importance in self.importances for name in importance))
        else:
            chosen = [
                name
                for name, value in last.items()
                if value.is_floating_point() and name.rpartition(".")[2] not in _BATCH_NORM_STATISTICS
            ]
        missing = [name for name in chosen if name not in last]
        if missing:
            raise ValueError(
                f"The experts have no entries {some(missing)}; they have {some(last)}.{prefix_hint(missing, last)}"
            )
        if not chosen:
            raise ValueError("There is nothing to merge: no parameter was chosen.")
        shared = shared_entries(last)
        storages = {shared.get(name, name) for name in chosen}
        groups: dict[str, list[str]] = {}
        for name in last:
            if shared.get(name, name) in storages:
                groups.setdefault(shared.get(name, name), []).append(name)
        if self.importances is None:
            return groups
        known = {name for importance in self.importances for name in importance}
        return {next((name for name in names if name in known), first): names for first, names in groups.items()}

    def _check_entries(self) -> None:
        last = self.experts[-1]
        for k, expert in enumerate(self.experts):
            if different := sorted(set(expert) ^ set(last)):
                raise ValueError(
                    f"Expert {k + 1} and expert {len(self.experts)} have different entries: {some(different)}."
                    + prefix_hint([name for name in expert if name not in last], last)
                )
        for source in self.groups:
            shape = tuple(last[source].shape)
            if not last[source].is_floating_point():
                raise ValueError(f"{source!r} is {last[source].dtype} and cannot be averaged; leave it out.")
            for k, expert in enumerate(self.experts):
                if tuple(expert[source].shape) != shape:
                    raise ValueError(
                        f"{source!r} has shape {tuple(expert[source].shape)} in expert {k + 1} and {shape} in expert "
                        f"{len(self.experts)}; only experts of one architecture can be merged. Of models with other "
                        "heads, merge the state dicts of what they have in common, such as expert.body.state_dict()."
                    )
            for k, importance in enumerate(self.importances or ()):
                if source not in importance:
                    raise ValueError(
                        f"Expert {k + 1} has no importance for {source!r}; it has those for {some(importance)}."
                        + prefix_hint([source], importance)
                    )
                if tuple(importance[source].shape) != shape:
                    raise ValueError(
                        f"The importance of {source!r} for expert {k + 1} has shape {tuple(importance[source].shape)}; "
                        f"the parameter has {shape}."
                    )

    def _scales(self) -> list[float] | None:
        """Each expert's divisor for ``normalize="sum"`` and ``"max"``."""
        if self.importances is None or self.normalize not in ("sum", "max"):
            return None
        scales = []
        for importance in self.importances:
            values = (importance[source] for source in self.groups)
            if self.normalize == "sum":
                scale = sum(float(value.sum(dtype=torch.float64)) for value in values)
            else:
                scale = max((float(value.max()) for value in values if value.numel()), default=0.0)
            scales.append(scale or 1.0)
        return scales


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.device == other.device
