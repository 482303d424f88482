"""Leaving a model, and the random number generators, as they were."""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import nn


@contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """Put the global generators of torch, NumPy and Python back, whatever happens inside."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def uncompiled() -> AbstractContextManager[object]:
    """Compiled modules run as they are written inside: hooks do not reach into compiled code."""
    if "torch._dynamo" not in sys.modules:  # nothing was compiled; importing it takes seconds
        return nullcontext()
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance


_CONTAINERS = (dict, list, set, deque)
_MACHINERY = frozenset(vars(nn.Module())) - {"training"}  # where parameters, submodules and hooks are


class ForwardState:
    """What a forward may set in a model: attributes, what their containers hold, and which tensors are its buffers.

    Containers are dicts, lists, sets and deques, also inside one another. What tensors hold is not looked at, nor what
    is inside other objects. To make one, and to compare, costs a few microseconds a module.

    Args:
        model: The model, as it is to be found again.
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

    def put_back(self) -> None:
        """Make the model what it was when this object was made."""
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
    alike = all(map(is_, container, before))  # of a dict, the keys
    return alike and (not isinstance(container, dict) or all(map(is_, container.values(), before.values())))


@contextmanager
def forward_state_kept(model: nn.Module) -> Iterator[ForwardState]:
    """Put back what forwards inside have set in a model: see :class:`ForwardState`, which one gets.

    Between two forwards, its ``put_back`` has the second one compute anew what the first has kept, such as a table that
    follows from parameters.
    """
    state = ForwardState(model)
    try:
        yield state
    finally:
        state.put_back()


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Put back every buffer: itself, and what it held."""
    with _tensors_kept([module._buffers for module in model.modules()]):
        yield


@contextmanager
def _tensors_kept(places: Iterable[dict[str, Any]]) -> Iterator[None]:
    tensors = [
        (own, name, tensor, tensor.detach().clone())
        for own in places
        for name, tensor in own.items()
        if tensor is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for own, name, tensor, value in tensors:
                own[name] = tensor  # a forward may have put another in its place
                if not torch.equal(tensor, value):
                    tensor.copy_(value)


@contextmanager
def model_kept(model: nn.Module) -> Iterator[None]:
    """The model is as it was at the end: modes, parameters, buffers and what these hold, and every other attribute.

    Hooks on gradients of parameters are for training, and do not run inside.
    """
    parameters = list(model.parameters())
    needs_grad, hooks = [p.requires_grad for p in parameters], [p._backward_hooks for p in parameters]
    # The one forward of torch that changes a parameter.
    renormed = [
        (module.weight, module.weight.detach().clone())
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None
    ]
    entries = {
        module: (dict(module._parameters), dict(module._buffers))
        for module in model.modules()
        if not isinstance(module, torch.jit.ScriptModule)  # there nothing is put in a parameter's place
    }
    state = ForwardState(model)
    try:
        for parameter in parameters:
            parameter._backward_hooks = None
        with buffers_kept(model):
            yield
    finally:
        state.put_back()
        for module, (own_parameters, own_buffers) in entries.items():
            module._parameters.update(own_parameters)
            module._buffers.update(own_buffers)
        with torch.no_grad():
            for weight, value in renormed:
                weight.copy_(value)
        for parameter, needs, own_hooks in zip(parameters, needs_grad, hooks, strict=True):
            parameter.requires_grad_(needs)
            parameter._backward_hooks = own_hooks


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every submodule in eval mode inside, each in its own mode after; see :func:`computing_anew`."""
    with computing_anew(model):
        for module in model.modules():
            module.training = False
        yield


@contextmanager
def computing_anew(model: nn.Module) -> Iterator[None]:
    """Modules have forgotten what they keep in eval mode; modes, and what forwards set, are put back after.

    A module whose ``train()`` does more than to change its mode, as to forget such a table, or to take adapters out of
    its weights, does so first. What it does in ``eval()`` stays where its forward needs it: where ``eval()`` makes
    attributes that were not there, such as a table that follows from parameters.
    """
    modes = {module: module.training for module in model.modules()}
    own = [module for module in modes if _has_its_own_train(module)]
    with forward_state_kept(model), _tensors_kept([held for m in own for held in (m._parameters, m._buffers)]):
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


def _has_its_own_train(module: nn.Module) -> bool:
    return not isinstance(module, torch.jit.ScriptModule) and type(module).train is not nn.Module.train
