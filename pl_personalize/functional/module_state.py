"""Leaving a model, and the random number generators, as they were."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

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


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Put back every buffer: itself, and what it held."""
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                module._buffers[name] = buffer  # a forward may have put another in its place
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


@contextmanager
def model_kept(model: nn.Module) -> Iterator[None]:
    """The model is as it was at the end: modes, parameters, buffers and what these hold, and every other attribute.

    What a forward changes inside a list or a dict of its own stays changed. Hooks on gradients of parameters are for
    training, and do not run inside.
    """
    parameters = list(model.parameters())
    needs_grad, hooks = [p.requires_grad for p in parameters], [p._backward_hooks for p in parameters]
    # The one forward of torch that changes a parameter.
    renormed = [
        (module.weight, module.weight.detach().clone())
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None
    ]
    contents = {module: dict(vars(module)) for module in model.modules()}
    entries = {
        module: (dict(module._parameters), dict(module._buffers))
        for module in contents
        if not isinstance(module, torch.jit.ScriptModule)  # there nothing is put in a parameter's place
    }
    try:
        for parameter in parameters:
            parameter._backward_hooks = None
        with buffers_kept(model):
            yield
    finally:
        for module, attributes in contents.items():
            for name in vars(module).keys() - attributes.keys():
                del vars(module)[name]
            vars(module).update(attributes)
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
    """Every submodule in eval mode inside, each in its own mode after."""
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:
            module.training = False
        yield
    finally:
        for module, training in modes.items():
            module.training = training
