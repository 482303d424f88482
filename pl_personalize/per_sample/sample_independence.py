"""Check that a network's output for a sample does not depend on the rest of its batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn

from pl_personalize.functional.batches import check_logits

Network = Callable[[Any], Tensor]


def logits_of_independent_samples(
    network: Network, modules: Mapping[nn.Module, str], batch: Any, samples: Sequence[Any]
) -> Tensor:
    """Detached logits (n, *) of a batch, or an error that names the module that makes a sample alone have others."""
    together = network(batch).detach()
    check_logits(together, len(samples))
    if not _is_close(together, network(batch).detach()):
        raise ValueError(
            "The model (or forward=) is random in eval mode: two calls give different outputs, so importances per "
            "sample are undefined. Make it deterministic in eval mode."
        )
    apart = torch.cat([_alone(network, modules, sample).detach() for sample in samples])
    if together.shape != apart.shape or not _is_close(together, apart):
        culprit = _first_to_mix(network, modules, batch, samples)
        raise ValueError(
            f"{'The model' if culprit is None else described(culprit, modules)} mixes the samples of a batch in eval "
            "mode: a sample's output depends on its batch, so importances per sample are undefined. Batch norm with "
            "track_running_stats=False does this."
        )
    return together


def described(module: nn.Module, modules: Mapping[nn.Module, str]) -> str:
    """Name and class of a module, for messages."""
    return f"The module {modules.get(module, '?')!r} ({type(module).__name__})"


def _alone(network: Network, modules: Mapping[nn.Module, str], sample: Any) -> Tensor:
    """Logits of one sample, or an error that names the module that fails on it."""
    try:
        return network(sample)
    except Exception as error:
        entered, _ = _calls(network, modules, sample)
        culprit = described(entered[-1], modules) if entered else "The model"
        raise ValueError(
            f"{culprit} works on a batch but fails on one of its samples alone: {error}. Importances per sample need a "
            "model that accepts batches of one in eval mode and does not mix samples, as batch norm with "
            "track_running_stats=False does."
        ) from error


def _calls(
    network: Network, modules: Mapping[nn.Module, str], batch: Any
) -> tuple[list[nn.Module], list[tuple[nn.Module, Any]]]:
    """The modules that a forward enters, and those that it leaves with their outputs; errors end it."""
    entered: list[nn.Module] = []
    left: list[tuple[nn.Module, Any]] = []
    with ExitStack() as hooks:
        for module in modules:
            hooks.callback(module.register_forward_pre_hook(lambda m, _: entered.append(m)).remove)
            hooks.callback(module.register_forward_hook(lambda m, _, output: left.append((m, output))).remove)
        with suppress(Exception):
            network(batch)
    return entered, left


def _first_to_mix(
    network: Network, modules: Mapping[nn.Module, str], batch: Any, samples: Sequence[Any]
) -> nn.Module | None:
    """The first module whose output for the batch differs from those for its samples, if any."""
    module: nn.Module
    for (module, both), *alone in zip(*(_calls(network, modules, x)[1] for x in (batch, *samples)), strict=False):
        parts = [output for _, output in alone]
        if isinstance(both, Tensor) and all(isinstance(part, Tensor) for part in parts) and both.dim() > 0:
            rows = torch.cat(parts) if parts[0].dim() > 0 else both
            if rows.shape == both.shape and not _is_close(both, rows):
                return module
    return None


def _is_close(a: Tensor, b: Tensor) -> bool:
    tolerance = 1e-3 if a.dtype in (torch.float32, torch.float64) else 5e-2
    if not a.is_floating_point():
        return bool((a == b).all())
    return bool((a - b).norm() <= tolerance * b.norm() + torch.finfo(a.dtype).tiny)
