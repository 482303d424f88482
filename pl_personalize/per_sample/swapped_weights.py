"""A forward with other weights than a module's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from pl_personalize.per_sample.module_state import computing_anew


def call_with_weights(module: nn.Module, state: Mapping[str, Tensor], x: Any) -> Any:
    """Call a module with other weights; its own are neither used nor changed.

    Unlike plain ``functional_call``, this also works for modules that cache values computed from their parameters in
    eval mode: every call starts without cached values and leaves none behind.
    """
    entries = {f"module.{name}": value for name, value in state.items()}
    return functional_call(_WithoutCache(module), entries, (x,), tie_weights=False)


class _WithoutCache(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Any) -> Any:
        with computing_anew(self.module):
            return self.module(x)
