"""Merge rules: how one parameter tensor is computed from that tensor in several experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from pl_personalize.functional.state_dicts import Bounds


@dataclass(frozen=True)
class MergeInputs:
    """One parameter tensor in all experts, the input of a merge rule.

    Attributes:
        parameters: The tensor in each expert.
        weights: One positive factor for each expert.
        importances: Its importance in each expert, finite and not negative; or ``None``.
        base: The tensor in the base model, for rules that need one.
        scales: For rules that compute prefixes themselves: factors that normalize the importances; ``None`` for 1.
        bounds: For such rules: the range of each importance, if known.
    """

    parameters: Sequence[Tensor]
    weights: Sequence[float]
    importances: Sequence[Tensor] | None = None
    base: Tensor | None = None
    scales: Sequence[float] | None = None
    bounds: Sequence[Bounds] | None = None

    def first(self, count: int) -> MergeInputs:
        """The first experts on the last one's device, in at least float32 precision, importances normalized."""
        device = self.parameters[count - 1].device
        parameters = [_prepared(tensor, device) for tensor in self.parameters[:count]]
        base = None if self.base is None else _prepared(self.base, device)
        importances = None
        if self.importances is not None:
            importances = [_prepared(tensor, device) for tensor in self.importances[:count]]
            if self.scales is not None:
                importances = [value * scale for value, scale in zip(importances, self.scales, strict=False)]
        return MergeInputs(parameters, self.weights[:count], importances, base)


@dataclass(frozen=True)
class MergeRule:
    """A named rule for merging experts, computed for one parameter tensor at a time.

    Attributes:
        name: The name that :func:`~pl_personalize.merge` takes.
        reference: The paper.
        function: A pure function from :class:`MergeInputs` and the options to the merged tensor.
        options: A dataclass of the rule's options, which checks its values and raises ``ValueError``; ``None`` without
            options.
        needs_base: Whether the rule reads the parameters of a base model.
        uses_importances: Whether the rule reads importances.
        prefixes: For rules that can compute the merges of experts 1..t incrementally: a function of the inputs, the
            options, the first merge to return (from 0) and tensors to write to, or ``None`` for new ones. By default
            each merge is computed by itself.

    Example:
        >>> rule = MergeRule("largest", "none", lambda inputs, options: torch.stack(inputs.parameters).amax(0))
        >>> inputs = MergeInputs([torch.ones(1), torch.zeros(1)], weights=[1, 1])
        >>> [merged.item() for merged in rule.merge(inputs, rule.make_options({}))]
        [1.0, 1.0]
    """

    name: str
    reference: str
    function: Callable[[MergeInputs, Any], Tensor]
    options: type | None = None
    needs_base: bool = False
    uses_importances: bool = True
    prefixes: Callable[[MergeInputs, Any, int, Sequence[Tensor] | None], list[Tensor]] | None = None

    def make_options(self, given: Mapping[str, Any]) -> Any:
        """The options by name, or a ``ValueError`` if the rule does not take them."""
        known = [] if self.options is None else [field.name for field in fields(self.options)]
        if unknown := [name for name in given if name not in known]:
            raise ValueError(
                f"The merge rule {self.name!r} has no option {', '.join(unknown)}; its options: "
                f"{', '.join(known) or 'none'}."
            )
        return None if self.options is None else self.options(**given)

    def merge(
        self, inputs: MergeInputs, options: Any, *, start: int = 0, out: Sequence[Tensor] | None = None
    ) -> list[Tensor]:
        """The tensor in the merges of experts 1, 1..2, …, 1..T from ``start`` (0) on; the first is expert 1 itself.

        ``out`` are contiguous tensors to write to, by default new ones. A single one may be an expert's own.

        Raises:
            FloatingPointError: If a merged entry is NaN or infinite.
            ValueError: If the rule changed the shape.
        """
        if self.prefixes is not None:
            return self.prefixes(inputs, options, start, out)
        like = inputs.parameters[start:]
        results = out or [torch.empty_like(value, memory_format=torch.contiguous_format) for value in like]
        for t, result in enumerate(results, start):
            merged = inputs.parameters[0] if t == 0 else self.function(inputs.first(t + 1), options)
            if merged.shape != result.shape:
                shapes = f"{tuple(merged.shape)}; expected {tuple(result.shape)}"
                raise ValueError(f"The merge rule {self.name!r} returned a tensor of shape {shapes}.")
            if not bool(merged.isfinite().all()):
                raise FloatingPointError("A merged entry is NaN or infinite.")
            result.detach().copy_(merged.detach())
        return list(results)


def _prepared(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.detach().to(device, torch.promote_types(tensor.dtype, torch.float32))
