"""What a merge does with which entries: its checked arguments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from pl_personalize.functional.factors import warn_of_factors
from pl_personalize.functional.merging import Bounds, Zero, check_importance, prefix_merges
from pl_personalize.functional.names import prefix_hint, some
from pl_personalize.functional.state_dicts import Versions, module_versions, shared_entries

Normalize = Literal["sum", "layer", "max"]
StateDict = Mapping[str, Tensor]
_BATCH_NORM_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def kind_of(importance: StateDict | None) -> str | None:
    """The kind of importances and how they were reduced, where the mapping knows it."""
    kind, reduction = getattr(importance, "kind", None), getattr(importance, "reduction", None)
    metadata: dict[str, Any] = getattr(importance, "metadata", {})
    kind, reduction = metadata.get("kind", kind), metadata.get("reduction", reduction)
    return f"{kind} ({reduction})" if reduction is not None else kind


class MergePlan:
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
            _check_tensors(expert, f"Expert {k + 1} has")
        if zero not in get_args(Zero):
            raise ValueError(f"zero must be one of {', '.join(get_args(Zero))}; got {zero!r}.")
        if normalize is not None and normalize not in get_args(Normalize):
            raise ValueError(f"normalize must be None or one of {', '.join(get_args(Normalize))}; got {normalize!r}.")
        self.experts, self.zero, self.normalize = experts, zero, normalize
        self._ties = [shared_entries(expert) for expert in experts]
        self.importances = self._check_importances(importances)
        self.weights = self._check_weights(weights)
        self.groups = self._groups(parameters)
        self._check_entries()
        self._check_versions()
        self._sources = {name: self._sources_of(name) for name in self.groups}
        self.scales = self._scales()
        warn_of_factors(experts, [name for names in self.groups.values() for name in names])

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

    def key(self, name: str, count: int | None = None) -> tuple[str, ...]:
        """Equal for entries that are one tensor in each of the first ``count`` experts, by default in all."""
        return tuple(ties.get(name, name) for ties in self._ties[:count])

    def versions(self, t: int) -> Versions | None:
        """The module versions of expert t, from 0; where it has none, those of one before it."""
        known = (module_versions(expert) for expert in reversed(self.experts[: t + 1]))
        return next((versions for versions in known if versions is not None), None)

    def check_out(self, out: Mapping[str, Tensor]) -> None:
        """Refuse to write where the merge does not fit."""
        last = {name: value for name, value in self.experts[-1].items() if isinstance(value, Tensor)}
        if missing := [name for name in last if name not in out]:
            raise ValueError(f"out has no entries {some(missing)}; it has {some(out)}.{prefix_hint(missing, out)}")
        for name, value in last.items():
            if not isinstance(out[name], Tensor):
                raise ValueError(f"out[{name!r}] is a {type(out[name]).__name__}; the experts' is a tensor.")
            if out[name].shape != value.shape or out[name].dtype != value.dtype:
                raise ValueError(
                    f"out[{name!r}] is {tuple(out[name].shape)} of {out[name].dtype}; the experts' is "
                    f"{tuple(value.shape)} of {value.dtype}."
                )
        merged, tied = {name for names in self.groups.values() for name in names}, shared_entries(out)
        first: dict[str, str] = {}
        for name in last:
            other = first.setdefault(tied.get(name, name), name)
            ours, others = ((self.key(n) if n in merged else self._ties[-1].get(n, n)) for n in (name, other))
            if ours != others:
                raise ValueError(
                    f"The entries {other!r} and {name!r} of out are one tensor, and two in the experts or in one of "
                    "them. Pass an out that has them apart."
                )
        if scattered := [n for n in last if n in merged and (out[n].is_conj() or not out[n].is_contiguous())]:
            raise ValueError(f"Entries of out are not contiguous in memory: {some(scattered)}.")

    def _importances_of(self, source: str) -> tuple[list[Tensor], list[Bounds] | None]:
        """A parameter's importances, looked at where nobody has done it before; and their bounds, if all are known."""
        assert self.importances is not None
        found: list[Tensor] = []
        bounds: list[Bounds | None] = []
        for k, (importance, name) in enumerate(zip(self.importances, self._sources[source], strict=True)):
            value = importance[name]
            found.append(value)
            known_bounds = getattr(importance, "bounds", None)
            if known_bounds is not None:
                bounds.append(known_bounds(name) or self._check_importance(k, name, value))
            else:
                bounds.append(self._check_importance(k, name, value) if kind_of(importance) is None else None)
        known = [bound for bound in bounds if bound is not None]
        return found, known if len(known) == len(bounds) else None

    def _sources_of(self, source: str) -> list[str]:
        """The name that a parameter's importance has in each expert: its own, or one that it is tied with there."""
        names = self.groups[source]
        found = []
        for k, importance in enumerate(self.importances or ()):
            ties = self._ties[k]
            tied = [name for name in self.experts[k] if ties.get(name, name) == ties.get(source, source)]
            name = next((name for name in (source, *names, *tied) if name in importance), None)
            if name is None:
                raise ValueError(
                    f"Expert {k + 1} has no importance for {source!r}; it has those for {some(importance)}."
                    + (prefix_hint([source], importance) or self._apart(source))
                )
            value, shape = importance[name], tuple(self.experts[-1][source].shape)
            if not isinstance(value, Tensor):
                raise ValueError(
                    f"The importance of {name!r} for expert {k + 1} is a {type(value).__name__}; give tensors by name."
                )
            if tuple(value.shape) != shape:
                raise ValueError(
                    f"The importance of {name!r} for expert {k + 1} has shape {tuple(value.shape)}; the parameter has "
                    f"{shape}."
                )
            found.append(name)
        return found

    def _apart(self, source: str) -> str:
        """A sentence on the entry that a parameter is one tensor with in some of the experts, and not in others."""
        for k, ties in enumerate(self._ties):
            for name in self.experts[k]:
                if ties.get(name, name) == ties.get(source, source) and self.key(name) != self.key(source):
                    return (
                        f" In expert {k + 1} it is one tensor with {name!r}, in others it is not, so that the two are "
                        "merged apart: both need importances where they are apart. Estimate those of both, or name "
                        "what to merge with parameters=."
                    )
        return ""

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
            _check_tensors(importance, f"The importances of expert {k + 1} have")
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
        """The tensors to merge: one of their names, that of an importance if there is one, and all of them."""
        last = self.experts[-1]
        if isinstance(parameters, str):
            raise ValueError(f"parameters must be a sequence of names; got the string {parameters!r}.")
        known = dict.fromkeys(name for importance in self.importances or () for name in importance)
        if parameters is not None:
            chosen = list(parameters)
        elif self.importances is not None:
            chosen = list(known)
        else:
            chosen = [
                name
                for name, value in last.items()
                if _can_be_averaged(value) and name.rpartition(".")[2] not in _BATCH_NORM_STATISTICS
            ]
        missing = [name for name in chosen if name not in last]
        if missing:
            raise ValueError(
                f"The experts have no entries {some(missing)}; they have {some(last)}.{prefix_hint(missing, last)}"
            )
        if not chosen:
            raise ValueError("There is nothing to merge: no parameter was chosen.")
        if parameters is None:  # importances have one name for what is one tensor in the expert that they are of
            for ties in self._ties:
                tied = {ties.get(name, name) for name in chosen}
                chosen += [name for name in last if ties.get(name, name) in tied]
        keys = {self.key(name) for name in chosen}
        groups: dict[tuple[str, ...], list[str]] = {}
        for name in last:
            if (key := self.key(name)) in keys:
                groups.setdefault(key, []).append(name)
        return {next((name for name in names if name in known), names[0]): names for names in groups.values()}

    def _check_entries(self) -> None:
        last, count = self.experts[-1], len(self.experts)
        for k, expert in enumerate(self.experts):
            if different := sorted(set(expert) ^ set(last)):
                raise ValueError(
                    f"Expert {k + 1} and expert {count} have different entries: {some(different)}."
                    + prefix_hint([name for name in expert if name not in last], last)
                )
        for source in self.groups:
            if not _can_be_averaged(value := last[source]):
                what = value.dtype if isinstance(value, Tensor) else f"a {type(value).__name__}"
                raise ValueError(f"{source!r} is {what} and cannot be averaged; leave it out.")
            shape = tuple(value.shape)
            for k, expert in enumerate(self.experts):
                other = expert[source]
                if not isinstance(other, Tensor) or other.is_complex() != value.is_complex():
                    what = other.dtype if isinstance(other, Tensor) else f"a {type(other).__name__}"
                    raise ValueError(
                        f"{source!r} is {what} in expert {k + 1} and {value.dtype} in expert {count}; leave it out."
                    )
                if tuple(other.shape) != shape:
                    raise ValueError(
                        f"{source!r} has shape {tuple(other.shape)} in expert {k + 1} and {shape} in expert {count}; "
                        "only experts of one architecture can be merged. Of models with other heads, merge the state "
                        "dicts of what they have in common, such as expert.body.state_dict()."
                    )

    def _check_versions(self) -> None:
        """Refuse experts whose modules would convert their entries in different ways when they are loaded."""
        first: dict[str, tuple[int, Any]] = {}
        for k, expert in enumerate(self.experts):
            for module, entry in (module_versions(expert) or {}).items():
                j, version = first.setdefault(module, (k, entry.get("version")))
                if version != entry.get("version"):
                    raise ValueError(
                        f"The module {module!r} has version {version} in expert {j + 1} and {entry.get('version')} in "
                        f"expert {k + 1}, whose entries may mean something else. Load each expert into its model, and "
                        "merge the models' state dicts."
                    )

    def _scales(self) -> list[float] | None:
        """Each expert's divisor for ``normalize="sum"`` and ``"max"``."""
        if self.importances is None or self.normalize not in ("sum", "max"):
            return None
        scales = []
        for k, importance in enumerate(self.importances):
            # Once, where two parameters have the importance of one.
            values = (importance[name] for name in dict.fromkeys(names[k] for names in self._sources.values()))
            if self.normalize == "sum":
                scale = sum(float(value.sum(dtype=torch.float64)) for value in values)
            else:
                scale = max((float(value.max()) for value in values if value.numel()), default=0.0)
            scales.append(scale or 1.0)
        return scales


def _check_tensors(state: StateDict, has: str) -> None:
    """Refuse what is no state dict but contains one."""
    if len(state) == 0 or any(isinstance(state[name], Tensor) for name in state):
        return
    inside = [name for name in state if isinstance(state[name], Mapping)]
    named = "state_dict" if "state_dict" in inside else next(iter(inside), None)
    raise ValueError(
        f"{has} no tensors but the entries {some(map(str, state))}"
        + (", as a checkpoint has" if named == "state_dict" else "")
        + (f"; give its entry {named!r}." if named else "; give tensors by name.")
    )


def _can_be_averaged(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.device == other.device
