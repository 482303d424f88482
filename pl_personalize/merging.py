"""Merging experts: state dicts in, state dict out."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from pl_personalize.functional.merge_plan import MergePlan, Normalize, StateDict, kind_of
from pl_personalize.functional.merging import Zero
from pl_personalize.functional.state_dicts import Versions, shared_entries, with_versions

__all__ = ["Normalize", "StateDict", "kind_of", "merge", "merge_prefixes"]


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
    (:class:`~pl_personalize.artifacts.TensorFile`). Entries that are one tensor in every expert (tied weights) are
    merged once and are one in the result; those that are one in some experts only are merged apart, each with its own
    importance where it has one. What is not merged comes from the last expert, entries that are no tensors among it.

    Args:
        experts: At least one state dict; all with the same entries and shapes.
        importances: One mapping for each expert, or ``None`` for the plain mean. Real numbers of the parameters'
            shapes, also for complex parameters.
        parameters: Names of the entries to merge; by default those of the importances, or without importances every
            floating or complex entry except batch-norm statistics.
        weights: One positive factor for each expert; by default equal.
        zero: What an entry becomes that is important to no expert: ``"mean"``, or ``"reference"`` for 0 as in the
            published code.
        normalize: Divide each expert's importances by their ``"sum"`` or their ``"max"`` over all merged parameters, or
            by the largest of each parameter tensor (``"layer"``), so that their scales count no longer.
        out: Where to write, instead of into new tensors: a state dict with all the tensors, such as that of a model, or
            of an expert that is not needed any more. New memory takes longer to get than a merge takes. After an error
            some of it may be written.

    Returns:
        A state dict with the last expert's entries in the last expert's order: new tensors, or those of ``out``. Like
        ``nn.Module.state_dict()`` it has the modules' versions in its ``_metadata``, if the experts have them.

    Raises:
        ValueError: If the numbers of experts, importances and weights differ, an expert is a whole checkpoint, an entry
            or an importance is missing or has another shape, an importance is negative, NaN or infinite, a module has
            another version in another expert, or ``out`` does not fit.

    Example:
        >>> import torch
        >>> a, b = {"w": torch.tensor([0.0, 0.0])}, {"w": torch.tensor([1.0, 1.0])}
        >>> merge([a, b], [{"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([3.0, 0.0])}])["w"].tolist()
        [0.75, 0.5]
    """
    plan = MergePlan(experts, importances, parameters, weights, zero, normalize)
    if out is not None:
        plan.check_out(out)
    merged = {name: values[-1] for names, values in plan.run(keep_all=False, out=out) for name in names}
    return _complete(merged, experts[-1], plan.versions(len(experts) - 1), out)


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
        T state dicts. What is not merged comes from expert t in the t-th, in which entries are one tensor that are so
        in each of the experts 1..t.
    """
    plan = MergePlan(experts, importances, parameters, weights, zero, normalize)
    merged: list[dict[str, Tensor]] = [{} for _ in experts]
    for names, values in plan.run(keep_all=True):
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
    """The merged entries, and copies of all others of an expert; what shared storage in it shares it still."""
    shared = shared_entries(expert)
    copies: dict[str, Tensor] = {}
    state: dict[str, Tensor] = {}
    for name in expert:
        if name in merged:
            state[name] = merged[name]
            continue
        first = shared.get(name, name)
        value: Any = expert[name]
        if not isinstance(value, Tensor):
            state[name] = copy.deepcopy(value)
        elif out is not None:
            state[name] = out[name]
            state[name].detach().copy_(value.detach())
        else:
            state[name] = copies[first] = copies[first] if first in copies else value.detach().clone()
    return with_versions(state, versions)
