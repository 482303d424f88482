"""A forward with other weights than a module's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from pl_personalize.per_sample.module_state import computing_anew


def call_with_weights(module: nn.Module, state: Mapping[str, Tensor], x: Any) -> Any:
    """What ``functional_call`` gives, also of modules that keep what they compute of their parameters in eval mode.

    Some keep a table until ``train()`` is called, so that a forward with other weights would compute with the table of
    the last ones. Here every forward starts without one, and leaves none behind.

    Args:
        module: The architecture; its own parameters are neither used nor changed.
        state: Parameters and buffers by name.
        x: The input.
    """
    entries = {f"module.{name}": value for name, value in state.items()}
    return functional_call(_WithoutMemory(module), entries, (x,), tie_weights=False)


class _WithoutMemory(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Any) -> Any:
        with computing_anew(self.module):
            return self.module(x)
