"""A forward with other weights than a module's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

# What nn.Module itself keeps; buffers may be made in a forward.
_OF_EVERY_MODULE = vars(nn.Module()).keys() - {"training", "_buffers", "_non_persistent_buffers_set"}


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
        with forward_state_kept(self.module):
            return self.module(x)


@contextmanager
def forward_state_kept(model: nn.Module) -> Iterator[None]:
    """What modules keep from an earlier forward is dropped at the start, where they drop it when their mode changes.

    At the end their attributes are as they were at the start, and so is what lists, dicts and sets among them hold.
    """
    attributes = {
        module: {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}
        for module in model.modules()
    }
    contents = [
        (value, value.copy())
        for values in attributes.values()
        for value in values.values()
        if isinstance(value, dict | list | set)
    ]
    modes = {module: module.training for module in attributes}
    try:
        model.train()
        model.eval()
        for module, training in modes.items():
            module.training = training
        yield
    finally:
        for module, values in attributes.items():
            for name in vars(module).keys() - values.keys() - _OF_EVERY_MODULE:
                del vars(module)[name]
            vars(module).update(values)
        for value, content in contents:
            value.clear()
            if isinstance(value, list):
                value.extend(content)
            else:
                value.update(content)
