"""Contexts and calls that leave a model and the random number generators as they were."""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from operator import is_
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call


@contextmanager
def isolated(device: torch.device) -> Iterator[None]:
    """Run without inference mode, autocast or compiled code, and restore the random number generators."""
    with random_state_kept(device), torch.inference_mode(False), torch.autocast(device.type, enabled=False):
        compiled = "torch._dynamo" in sys.modules  # the import takes seconds; hooks do not reach into compiled code
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            yield


@contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """Restore the global generators of torch, NumPy and Python on exit."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


_CONTAINERS = (dict, list, set, deque)
_MACHINERY = frozenset(vars(nn.Module())) - {"training"}  # parameters, submodules and hooks


class ForwardState:
    """Snapshot of the state that a forward may set in a model; as a context manager, it restores that state on exit.

    The state is: attributes of modules, the items of dicts, lists, sets and deques in them (also nested), and which
    tensors are buffers. Neither the values of tensors nor other objects are included.
    """

    def __init__(self, model: nn.Module) -> None:
        self._attributes = [(vars(module), dict(vars(module))) for module in model.modules()]
        self._contents: dict[int, tuple[Any, Any]] = {}
        for module in model.modules():
            if not isinstance(module, torch.jit.ScriptModule):
                self._note(module._buffers)
        for _, attributes in self._attributes:
            for name, value in attributes.items():
                if name not in _MACHINERY:
                    self._note(value)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.put_back()

    def put_back(self) -> None:
        """Restore the state. The next forward then recomputes what an earlier one cached, such as a table."""
        for now, before in self._attributes:
            if not (len(now) == len(before) and all(map(is_, now.values(), before.values()))):
                for name in now.keys() - before.keys():
                    del now[name]
                now.update({name: value for name, value in before.items() if name not in _MACHINERY})
        for container, before in self._contents.values():
            if not _holds_the_same(container, before):
                container.clear()
                container.extend(before) if isinstance(container, list | deque) else container.update(before)

    def _note(self, value: Any) -> None:
        if isinstance(value, _CONTAINERS):
            if id(value) in self._contents:
                return
            kept = dict(value) if isinstance(value, dict) else set(value) if isinstance(value, set) else list(value)
            self._contents[id(value)] = (value, kept)
        elif not isinstance(value, tuple):
            return
        for item in value.values() if isinstance(value, dict) else value:
            self._note(item)


def _holds_the_same(container: Any, before: Any) -> bool:
    if len(container) != len(before):
        return False
    if isinstance(container, set):
        return bool(container == before)
    alike = all(map(is_, container, before))  # keys, if it is a dict
    return alike and (not isinstance(container, dict) or all(map(is_, container.values(), before.values())))


def buffers_kept(model: nn.Module) -> AbstractContextManager[None]:
    """Context that restores every buffer on exit: the tensor itself and its values."""
    return _tensors_kept([module._buffers for module in model.modules()])


@contextmanager
def _tensors_kept(places: Iterable[dict[str, Any]]) -> Iterator[None]:
    held = [(own, name, tensor) for own in places for name, tensor in own.items() if tensor is not None]
    tensors = [(own, name, tensor, tensor.detach().clone()) for own, name, tensor in held]
    try:
        yield
    finally:
        with torch.no_grad():
            for own, name, tensor, value in tensors:
                own[name] = tensor  # a forward may have replaced it
                if not torch.equal(tensor, value):
                    tensor.copy_(value)


@contextmanager
def model_kept(model: nn.Module) -> Iterator[None]:
    """Restore modes, parameters, buffers, their values, and every other attribute of a model on exit.

    Hooks on gradients of parameters do not run inside.
    """
    parameters = [(p, p.requires_grad, p._backward_hooks) for p in model.parameters()]
    modules = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    entries = [(module._parameters, dict(module._parameters)) for module in modules]
    embeddings = [m for m in modules if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
    renormed = [m._parameters for m in embeddings if m.max_norm is not None]  # no other forward changes a parameter
    try:
        for parameter, *_ in parameters:
            parameter._backward_hooks = None
        with _tensors_kept(renormed), ForwardState(model), buffers_kept(model):
            yield
    finally:
        for now, before in entries:
            now.update(before)
        for parameter, needs_grad, hooks in parameters:
            parameter.requires_grad_(needs_grad)
            parameter._backward_hooks = hooks


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every submodule in eval mode, and restore its mode on exit; see :func:`computing_anew`."""
    with computing_anew(model):
        for module in model.modules():
            module.training = False
        yield


@contextmanager
def computing_anew(model: nn.Module) -> Iterator[None]:
    """Discard values that modules cache in eval mode; restore modes and the forward state on exit.

    A module that overrides ``train()``, for example to discard a table or to take adapters out of its weights, has it
    called first. The effect of its ``eval()`` is kept only if its forward needs it: if ``eval()`` adds attributes, such
    as a table computed from parameters.
    """
    modes = {module: module.training for module in model.modules()}
    own = [m for m in modes if not isinstance(m, torch.jit.ScriptModule) and type(m).train is not nn.Module.train]
    with ForwardState(model), _tensors_kept([held for m in own for held in (m._parameters, m._buffers)]):
        try:
            for module in own:
                module.train()
                known = _names(module)
                module.eval()
                if _names(module) == known:
                    module.train()
            for module, training in modes.items():
                module.training = training
            yield
        finally:
            for module, training in modes.items():
                module.training = training


def _names(module: nn.Module) -> set[str]:
    return vars(module).keys() | module._buffers.keys()


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
