"""Parameters that are factors of one weight: the product of their means is not the mean of their products."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

_LOW_RANK = (
    (re.compile(r"(^|[._])lora_(embedding_)?A(?=\.|$)"), r"\1lora_\2B"),
    (re.compile(r"(^|[._])lora_down(?=\.|$)"), r"\1lora_up"),
    (re.compile(r"(^|[._])(hada_w[12]|lokr_w[12])_a(?=\.|$)"), r"\1\2_b"),
    (re.compile(r"(^|[._])lokr_w1(?=\.|$)"), r"\1lokr_w2"),
)
_WEIGHT_NORM = (
    (re.compile(r"(^|\.)([^.]+)_g$"), r"\1\2_v"),
    (re.compile(r"(^|\.)parametrizations\.([^.]+)\.original0$"), r"\1parametrizations.\2.original1"),
)


def factor_pairs(entries: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """Names of entries whose product is a weight: low-rank factors, or norm and direction of fitting shapes.

    Example:
        >>> factor_pairs({"q.lora_A.weight": torch.zeros(2, 6), "q.lora_B.weight": torch.zeros(5, 2)})
        [('q.lora_A.weight', 'q.lora_B.weight')]
        >>> factor_pairs({"weight_g": torch.zeros(4, 1), "weight_v": torch.zeros(4, 3), "other_g": torch.zeros(4, 1)})
        [('weight_g', 'weight_v')]
    """
    pairs = []
    for name in entries:
        for pattern, partner in (*_LOW_RANK, *_WEIGHT_NORM):
            other = pattern.sub(partner, name)
            fits = other != name and other in entries
            if fits and ((pattern, partner) in _LOW_RANK or _is_norm_of(entries[name], entries[other])):
                pairs.append((name, other))
    return pairs


def warn_of_factors(experts: Sequence[Mapping[str, Tensor]], names: Sequence[str]) -> None:
    """Warn if factors are merged separately although more than one of them differs between experts.

    Merging is exact if the experts share one of two factors, or the direction that norms belong to.
    """
    chosen = set(names)
    pairs = [pair for pair in factor_pairs(experts[0]) if chosen.issuperset(pair)]
    for pair in pairs:
        is_norm = any(pattern.search(pair[0]) for pattern, _ in _WEIGHT_NORM)
        if all(_differs(experts, name) for name in pair[is_norm:]):
            rank_zero_warn(
                f"{pair[0]!r} and {pair[1]!r} are factors of one weight ({len(pairs)} such pairs), and merging each "
                "separately does not merge the weight. Merge the weights: those of adapters after merge_and_unload(), "
                "those of weight norm after remove_weight_norm() or remove_parametrizations()."
            )
            return


def _differs(experts: Sequence[Mapping[str, Tensor]], name: str) -> bool:
    first = experts[0][name]
    return any(not torch.equal(expert[name].to(first), first) for expert in experts[1:])


def _is_norm_of(norm: Tensor, direction: Tensor) -> bool:
    """Whether a tensor has one number per slice of the direction, or one in total."""
    if norm.ndim == 0:
        return direction.ndim > 0
    fits = norm.ndim == direction.ndim and all(n in (1, d) for n, d in zip(norm.shape, direction.shape, strict=True))
    return fits and norm.numel() < direction.numel()
