"""What a model and the process around it look like, so that a test can say what a call has changed."""

from __future__ import annotations

import random
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Snapshot = Mapping[str, Any]


@dataclass(frozen=True)
class _TensorState:
    """Which tensor it is, and all that can be changed of it; values bit for bit, NaN and the sign of zero included."""

    identity: int
    storage: int
    kind: tuple[Any, ...]
    values: bytes
    hooks: tuple[tuple[str, tuple[tuple[int, int], ...]], ...]

    @classmethod
    def of(cls, tensor: Tensor | None) -> _TensorState | None:
        if tensor is None:
            return None
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            return cls(id(tensor), 0, ("inside a torch.func transform",), b"", ())
        hooks = tuple(
            (name, tuple((key, id(hook)) for key, hook in (getattr(tensor, name) or {}).items()))
            for name in ("_backward_hooks", "_post_accumulate_grad_hooks")
        )
        kind = (
            *(type(tensor), tensor.dtype, tensor.device, tuple(tensor.shape), tensor.stride()),
            *(tensor.requires_grad, tensor.is_leaf, tensor.is_inference()),
        )
        values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return cls(id(tensor), tensor.data_ptr(), kind, values, hooks)


def model_snapshot(model: nn.Module) -> Snapshot:
    """Every attribute of every submodule: modes, hooks, tensors, what was set on the instance; and the gradients."""
    facts: dict[str, Any] = {}
    for name, module in model.named_modules():
        place = name or "model"
        facts[f"{place}: type"] = type(module)
        facts[f"{place}: attributes"] = list(vars(module))
        for attribute, value in vars(module).items():
            if attribute in ("_parameters", "_buffers"):
                facts[f"{place}.{attribute}"] = list(value)
                facts |= {f"{place}.{local}": _TensorState.of(tensor) for local, tensor in value.items()}
            elif isinstance(value, Tensor):
                facts[f"{place}.{attribute}"] = _TensorState.of(value)
            elif isinstance(value, dict):
                facts[f"{place}.{attribute}"] = [(key, id(item)) for key, item in value.items()]
            elif isinstance(value, list | set):
                facts[f"{place}.{attribute}"] = value.copy()
            else:
                facts[f"{place}.{attribute}"] = value
    for name, parameter in model.named_parameters():
        facts[f"gradient of {name}"] = _TensorState.of(parameter.grad)
    return facts


def process_snapshot() -> Snapshot:
    """The random generators, torch's modes and switches, the hooks of all modules, the handler of Ctrl-C."""
    global_hooks = torch.nn.modules.module
    return {
        "torch's generator": torch.get_rng_state().numpy().tobytes(),
        "CUDA's generators": [state.numpy().tobytes() for state in _cuda_states()],
        "NumPy's generator": repr(np.random.get_state()),
        "Python's generator": random.getstate(),
        "attention's fast path": torch.backends.mha.get_fastpath_enabled(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "anomaly mode": torch.is_anomaly_enabled(),
        "autocast": [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")],
        "autocast cache": torch.is_autocast_cache_enabled(),
        "default dtype": torch.get_default_dtype(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "torch.func level": torch._C._functorch.maybe_current_level(),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "function modes": torch._C._len_torch_function_stack(),
        "saved tensor hooks": torch._C._autograd._top_saved_tensors_default_hooks(False),
        "hooks of all modules": {
            name: list(hooks)
            for name, hooks in vars(global_hooks).items()
            if name.startswith("_global") and isinstance(hooks, dict)
        },
        "handler of SIGINT": signal.getsignal(signal.SIGINT),
    }


def _cuda_states() -> list[Tensor]:
    return torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


def snapshot(model: nn.Module) -> Snapshot:
    """The model and the process."""
    return {**model_snapshot(model), **process_snapshot()}


def differences(before: Snapshot, after: Snapshot) -> list[str]:
    """The names of what differs."""
    return [
        name
        for name in {**before, **after}
        if name not in before or name not in after or not _same(before[name], after[name])
    ]


def _same(before: Any, after: Any) -> bool:
    return before is after or bool(before == after)
