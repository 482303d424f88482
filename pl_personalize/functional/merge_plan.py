"""The checked arguments of a merge: which tensors are merged with which."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from pl_personalize.functional.factors import warn_of_factors
from pl_personalize.functional.merge_rule import MergeInputs, MergeRule
from pl_personalize.functional.merging import check_importance
from pl_personalize.functional.names import prefix_hint, some
from pl_personalize.functional.state_dicts import (
    Bounded,
    StateDict,
    Versions,
    kind_of,
    module_versions,
    shared_entries,
)

Normalize = Literal["sum", "layer", "max"]
_BATCH_NORM_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class MergePlan:
    """Plan of a merge: the treatment of each entry, checked before anything is computed.

    Arguments are those of :func:`~pl_personalize.merge`, and the chosen rule with its options by name.
    """

    def __init__(
        self,
        experts: Sequence[StateDict],
        importances: Sequence[StateDict | None] | None,
        rule: MergeRule,
        options: Mapping[str, Any],
        base: StateDict | None,
        parameters: Sequence[str] | None,
        weights: Sequence[float] | None,
        normalize: Normalize | None,
    ) -> None:
        if not isinstance(experts, Sequence):
            raise ValueError(f"experts must be a sequence of state dicts; got a {type(experts).__name__}.")
        if not experts:
            raise ValueError("There are no experts to merge.")
        for k, expert in enumerate(experts):
            if not isinstance(expert, Mapping):
                raise ValueError(f"Expert {k + 1} is a {type(expert).__name__}; pass its state dict.")
            _check_tensors(expert, f"Expert {k + 1} has")
        if normalize is not None and normalize not in get_args(Normalize):
            raise ValueError(f"normalize must be None or one of {', '.join(get_args(Normalize))}; got {normalize!r}.")
        for what, value, reads in (
            ("importances", importances, rule.uses_importances),
            ("base", base, rule.needs_base),
        ):
            if value is not None and not reads:
                raise ValueError(f"The merge rule {rule.name!r} does not use {what}: leave them out.")
        if rule.needs_base and not isinstance(base, Mapping):
            raise ValueError(f"The merge rule {rule.name!r} needs base=, the state dict that the experts started from.")
        self.experts, self.rule, self.base, self.normalize = experts, rule, base, normalize
        self.options = rule.make_options(options)
        self._ties = [shared_entries(expert) for expert in experts]
        self.importances = self._check_importances(importances)
        self._known = [i.bounds if isinstance(i, Bounded) else lambda name: None for i in self.importances or ()]
        self.weights = self._check_weights(weights)
        self.groups = self._groups(parameters)
        self._check_entries()
        self._check_versions()
        self._sources = {name: self._sources_of(name) for name in self.groups}
        self.scales = self._scales()
        warn_of_factors(experts, [name for names in self.groups.values() for name in names])

    def run(self, *, start: int, out: Mapping[str, Tensor] | None = None) -> Iterator[tuple[list[str], list[Tensor]]]:
        """For each merged tensor, its names and its values in the merges from ``start`` (0: of expert 1) on."""
        for source, names in self.groups.items():
            targets = [] if out is None else [out[name] for name in names]
            try:
                values = self.rule.merge(self._inputs(source), self.options, start=start, out=targets[:1])
            except FloatingPointError as error:
                raise ValueError(f"The parameter {source!r} of an expert has NaN or infinite entries.") from error
            for target in targets[1:]:
                if not _same_memory(target, targets[0]):
                    target.detach().copy_(values[-1].detach())
            yield names, values

    def key(self, name: str, count: int | None = None) -> tuple[str, ...]:
        """Equal for entries that are one tensor in each of the first ``count`` experts, by default in all."""
        return tuple(ties.get(name, name) for ties in self._ties[:count])

    def versions(self, t: int) -> Versions | None:
        """The module versions of expert t, counted from 0, or of the nearest one before it that has any."""
        known = (module_versions(expert) for expert in reversed(self.experts[: t + 1]))
        return next((versions for versions in known if versions is not None), None)

    def check_out(self, out: Mapping[str, Tensor]) -> None:
        """Check that the merge can be written to ``out``."""
        last = {name: value for name, value in self.experts[-1].items() if isinstance(value, Tensor)}
        if missing := [name for name in last if name not in out]:
            raise ValueError(f"out has no entries {some(missing)}; it has {some(out)}.{prefix_hint(missing, out)}")
        for name, value in last.items():
            if (found := _description(out[name])) != (expected := _description(value)):
                raise ValueError(f"out[{name!r}] is {found}; the experts' is {expected}.")
        merged, tied = {name for names in self.groups.values() for name in names}, shared_entries(out)
        first: dict[str, str] = {}
        for name in last:
            other = first.setdefault(tied.get(name, name), name)
            ours, others = ((self.key(n) if n in merged else self._ties[-1].get(n, n)) for n in (name, other))
            if ours != others:
                raise ValueError(
                    f"The entries {other!r} and {name!r} of out are one tensor, but two in at least one of the "
                    "experts. Pass an out in which they are separate."
                )
        if scattered := [n for n in last if n in merged and (out[n].is_conj() or not out[n].is_contiguous())]:
            raise ValueError(f"Entries of out are not contiguous in memory: {some(scattered)}.")

    def _inputs(self, source: str) -> MergeInputs:
        thetas = [expert[source] for expert in self.experts]
        base = None if self.base is None else self.base[source]
        if self.importances is None:
            return MergeInputs(thetas, self.weights, base=base)
        names = self._sources[source]
        omegas = [importance[name] for importance, name in zip(self.importances, names, strict=True)]
        bounds = [
            self._known[k](name) or check_importance(name, omegas[k], f" for expert {k + 1}")
            for k, name in enumerate(names)
        ]
        scales = self.scales
        if self.normalize == "layer":
            scales = [1 / (high or 1.0) for _, high in bounds]
        return MergeInputs(thetas, self.weights, omegas, base, scales, bounds)

    def _sources_of(self, source: str) -> list[str]:
        """The name of a parameter's importance in each expert: its own, or that of an entry tied to it there."""
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
            value, parameter = importance[name], self.experts[-1][source]
            if not isinstance(value, Tensor) or value.shape != parameter.shape:
                raise ValueError(
                    f"The importance of {name!r} for expert {k + 1} is {_description(value)}; the parameter is "
                    f"{_description(parameter)}."
                )
            found.append(name)
        return found

    def _apart(self, source: str) -> str:
        """A sentence about an entry that is tied to a parameter in some experts only, or nothing."""
        for k, ties in enumerate(self._ties):
            for name in self.experts[k]:
                if ties.get(name, name) == ties.get(source, source) and self.key(name) != self.key(source):
                    return (
                        f" In expert {k + 1} it is one tensor with {name!r}, in others it is not, so they are merged "
                        "separately, and each needs an importance where they are separate. Estimate both, or choose "
                        "the entries to merge with parameters=."
                    )
        return ""

    def _check_importances(self, importances: Sequence[StateDict | None] | None) -> list[StateDict] | None:
        if importances is None:
            return None
        if isinstance(importances, Mapping):
            raise ValueError("importances must be a sequence with one mapping per expert; got a single mapping.")
        if len(importances) != len(self.experts):
            raise ValueError(f"There are {len(self.experts)} experts but {len(importances)} importances.")
        found = []
        for k, importance in enumerate(importances):
            if not isinstance(importance, Mapping) or len(importance) == 0:
                raise ValueError(
                    f"Expert {k + 1} of {len(self.experts)} has no importances but {_description(importance)}. Pass "
                    "one mapping per expert, such as Importance.load(path), or importances=None for the plain mean."
                )
            _check_tensors(importance, f"The importances of expert {k + 1} have")
            found.append(importance)
        kinds = {kind for importance in found if (kind := kind_of(importance)) is not None}
        if len(kinds) > 1:
            raise ValueError(f"The importances are of different kinds, {sorted(kinds)}, with different scales.")
        return found

    def _check_weights(self, weights: Sequence[float] | None) -> list[float]:
        if weights is None:
            return [1.0] * len(self.experts)
        if len(weights) != len(self.experts):
            raise ValueError(f"There are {len(self.experts)} experts but {len(weights)} weights.")
        if not all(0 < weight < float("inf") for weight in weights):
            raise ValueError(f"weights must be positive and finite; got {list(weights)}.")
        return [float(weight) for weight in weights]

    def _groups(self, parameters: Sequence[str] | None) -> dict[str, list[str]]:
        """The tensors to merge: all names of each, by one of them, that of an importance if there is one."""
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
        if missing := [name for name in chosen if name not in last]:
            raise ValueError(
                f"The experts have no entries {some(missing)}; they have {some(last)}.{prefix_hint(missing, last)}"
            )
        if not chosen:
            raise ValueError("There is nothing to merge: no parameter was chosen.")
        if parameters is None:  # an importance has one name for entries that are tied in its expert
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
        if self.base is not None and (missing := [name for name in self.groups if name not in self.base]):
            raise ValueError(
                f"base has no entries {some(missing)}; it has {some(self.base)}.{prefix_hint(missing, self.base)}"
            )
        others = [(f"expert {k + 1}", expert) for k, expert in enumerate(self.experts)]
        others += [] if self.base is None else [("base", self.base)]
        for source in self.groups:
            if not _can_be_averaged(value := last[source]):
                raise ValueError(f"{source!r} is {_description(value)} and cannot be averaged: leave it out.")
            for where, other in ((where, state[source]) for where, state in others):
                fits = isinstance(other, Tensor) and other.is_complex() == value.is_complex()
                if not fits or other.shape != value.shape:
                    raise ValueError(
                        f"{source!r} is {_description(other)} in {where} and {_description(value)} in expert {count}; "
                        "only models of one architecture can be merged. If only their heads differ, merge the state "
                        "dicts of the shared part, such as expert.body.state_dict()."
                    )

    def _check_versions(self) -> None:
        """Reject experts whose modules would convert their entries in different ways when they are loaded."""
        first: dict[str, tuple[int, Any]] = {}
        for k, expert in enumerate(self.experts):
            for module, entry in (module_versions(expert) or {}).items():
                j, version = first.setdefault(module, (k, entry.get("version")))
                if version != entry.get("version"):
                    raise ValueError(
                        f"The module {module!r} has version {version} in expert {j + 1} and {entry.get('version')} in "
                        f"expert {k + 1}, so their entries may mean different things. Load each expert into its model, "
                        "and merge the models' state dicts."
                    )

    def _scales(self) -> list[float] | None:
        """The factor of each expert's importances for ``normalize="sum"`` and ``"max"``."""
        if self.importances is None or self.normalize not in ("sum", "max"):
            return None
        scales = []
        for k, importance in enumerate(self.importances):
            # Once per tensor, where two parameters share an importance.
            values = (importance[name] for name in dict.fromkeys(names[k] for names in self._sources.values()))
            if self.normalize == "sum":
                scales.append(sum(float(value.sum(dtype=torch.float64)) for value in values))
            else:
                scales.append(max((float(value.max()) for value in values if value.numel()), default=0.0))
        return [1 / (scale or 1.0) for scale in scales]


def _check_tensors(state: StateDict, has: str) -> None:
    """Reject a mapping that contains a state dict instead of being one."""
    if len(state) == 0 or any(isinstance(state[name], Tensor) for name in state):
        return
    inside = [name for name in state if isinstance(state[name], Mapping)]
    named = "state_dict" if "state_dict" in inside else next(iter(inside), None)
    raise ValueError(
        f"{has} no tensors but the entries {some(map(str, state))}"
        + (", as a checkpoint has" if named == "state_dict" else "")
        + (f"; pass its entry {named!r}." if named else "; pass tensors by name.")
    )


def _description(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _can_be_averaged(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.device == other.device
