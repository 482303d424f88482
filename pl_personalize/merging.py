"""Merging experts: state dicts in, state dict out."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from pl_personalize.functional.merge_plan import MergePlan, Normalize
from pl_personalize.functional.merge_rule import MergeInputs, MergeRule
from pl_personalize.functional.merging import WEIGHTED
from pl_personalize.functional.state_dicts import StateDict, Versions, shared_entries, with_versions
from pl_personalize.registry import Registry

__all__ = ["MERGE_RULES", "MergeInputs", "MergeRule", "Normalize", "merge", "merge_prefixes"]

MERGE_RULES: Registry[MergeRule] = Registry("merge rule", [WEIGHTED])


def merge(
    experts: Sequence[StateDict],
    importances: Sequence[StateDict | None] | None = None,
    *,
    rule: str = "weighted",
    base: StateDict | None = None,
    parameters: Sequence[str] | None = None,
    weights: Sequence[float] | None = None,
    normalize: Normalize | None = None,
    out: Mapping[str, Tensor] | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    r"""Merge experts into one, by default with each parameter entry weighted by its importance.

    .. math::
        \theta = \sum_k \frac{w_k \Omega_k}{\sum_j w_j \Omega_j} \theta_k

    With importances from server data this is importance-weighted IMM, with those of a user it is RACL
    (De Lange et al., CVPR 2020); without importances it is the plain mean (mean-IMM).

    Parameters are merged one at a time, so experts may be lazily opened files
    (:class:`~pl_personalize.artifacts.TensorFile`). Entries that are one tensor in every expert (tied weights) are
    merged once and stay tied; entries that are tied in some experts only are merged separately, each with its own
    importance where it has one. Entries that are not merged, tensors or not, come from the last expert.

    Args:
        experts: At least one state dict; all with the same entries and shapes.
        importances: One mapping per expert, or ``None`` for the plain mean. Real numbers of the parameters' shapes,
            also for complex parameters.
        rule: The merge rule, a name in ``MERGE_RULES``. The merge of a single expert is that expert with every rule.
        base: For rules that need one: the state dict that the experts started from, with all entries to be merged.
        parameters: Names of the entries to merge; by default those of the importances, or without importances every
            floating-point or complex entry except batch-norm statistics.
        weights: One positive factor per expert; by default equal.
        normalize: Divide each expert's importances by their ``"sum"`` or their ``"max"`` over all merged parameters, or
            by the maximum of each parameter tensor (``"layer"``), to remove differences in scale.
        out: A state dict to write to instead of new tensors, such as that of a model, or of an expert that is no longer
            needed: allocating memory takes longer than merging. After an error it may be partly overwritten.
        options: Options of the rule. ``"weighted"`` has ``zero``, the value of entries that are important to no expert:
            ``"mean"`` (default), or ``"reference"`` for 0, as in the published code.

    Returns:
        A state dict with the last expert's entries in the last expert's order: new tensors, or those of ``out``. Like
        that of ``nn.Module.state_dict()``, its ``_metadata`` has the modules' versions, if the experts have them.

    Raises:
        ValueError: If the numbers of experts, importances and weights differ, an expert is a whole checkpoint, an entry
            or an importance is missing or has another shape, an importance is negative, NaN or infinite, the versions
            of a module differ, ``out`` does not fit, or the rule is unknown or rejects its options.

    Example:
        >>> import torch
        >>> a, b = {"w": torch.tensor([0.0, 0.0])}, {"w": torch.tensor([1.0, 1.0])}
        >>> merge([a, b], [{"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([3.0, 0.0])}])["w"].tolist()
        [0.75, 0.5]
    """
    plan = MergePlan(experts, importances, MERGE_RULES.find(rule), options, base, parameters, weights, normalize)
    if out is not None:
        plan.check_out(out)
    merged = {name: values[-1] for names, values in plan.run(start=len(experts) - 1, out=out) for name in names}
    return _complete(merged, experts[-1], plan.versions(len(experts) - 1), out)


def merge_prefixes(
    experts: Sequence[StateDict],
    importances: Sequence[StateDict | None] | None = None,
    *,
    rule: str = "weighted",
    base: StateDict | None = None,
    parameters: Sequence[str] | None = None,
    weights: Sequence[float] | None = None,
    normalize: Normalize | None = None,
    **options: Any,
) -> list[dict[str, Tensor]]:
    """The merges of experts 1, 1..2, …, 1..T, which a server has after each task, in one pass over the files.

    The first is expert 1 itself; the last equals :func:`merge` of all. Arguments and errors are those of :func:`merge`.

    Returns:
        T state dicts. In the t-th, entries that are not merged come from expert t, and entries are tied that are tied
        in each of the experts 1..t.
    """
    plan = MergePlan(experts, importances, MERGE_RULES.find(rule), options, base, parameters, weights, normalize)
    merged: list[dict[str, Tensor]] = [{} for _ in experts]
    for names, values in plan.run(start=0):
        for state, value in zip(merged, values, strict=True):
            state.update(dict.fromkeys(names, value))
    for t, state in enumerate(merged):
        first: dict[tuple[str, ...], Tensor] = {}
        state.update({name: first.setdefault(plan.key(name, t + 1), value) for name, value in state.items()})
    return [
        _complete(state, expert, plan.versions(t))
        for t, (state, expert) in enumerate(zip(merged, experts, strict=True))
    ]


def _complete(
    merged: Mapping[str, Tensor],
    expert: StateDict,
    versions: Versions | None,
    out: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Add copies of an expert's other entries, which stay tied."""
    shared = shared_entries(expert)
    copies: dict[str, Tensor] = {}
    state: dict[str, Tensor] = {}
    for name in expert:
        if name in merged:
            state[name] = merged[name]
            continue
        value: Any = expert[name]
        if not isinstance(value, Tensor):
            state[name] = copy.deepcopy(value)
        elif out is not None:
            state[name] = out[name]
            state[name].detach().copy_(value.detach())
        else:
            first = shared.get(name, name)
            state[name] = copies[first] = copies[first] if first in copies else value.detach().clone()
    return with_versions(state, versions)
