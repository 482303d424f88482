"""Running statistics of batch-norm layers apart from their model, to be saved, averaged and applied."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pl_personalize.artifacts import load_tensors, save_tensors
from pl_personalize.functional.moments import MEAN, VARIANCE, in_precision_of, pooled_statistics
from pl_personalize.functional.names import prefix_hint, some, submodule
from pl_personalize.functional.state_dicts import NamedEntries

ARTIFACT_KIND = "batchnorm"


class BatchNormStatistics(NamedEntries[Tensor]):
    """Running means and variances by their names in a state dict: ``{layer}.running_mean``, ``{layer}.running_var``.

    Args:
        tensors: The statistics, each (C,).
        num_samples: Number of samples they were estimated from; 0 if unknown.
        fingerprint: Fingerprint of the parameters they were estimated with, if known.

    Raises:
        ValueError: If a mean or variance has no counterpart, or a variance is negative.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm1d(2))
        >>> sorted(BatchNormStatistics.of(model))
        ['0.running_mean', '0.running_var']
    """

    def __init__(self, tensors: Mapping[str, Tensor], *, num_samples: int = 0, fingerprint: str | None = None) -> None:
        self._entries = dict(tensors)
        self.num_samples, self.fingerprint = num_samples, fingerprint
        for layer in self.layers:
            for what in (MEAN, VARIANCE):
                value = self.get(f"{layer}.{what}".removeprefix("."))
                if value is None:
                    raise ValueError(f"There is no {what} of the layer {layer!r}; there are {some(self)}.")
                if not torch.isfinite(value).all() or (what == VARIANCE and (value < 0).any()):
                    raise ValueError(f"The {what} of the layer {layer!r} has negative, NaN or infinite entries.")

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """A copy of the present statistics of a model.

        Raises:
            ValueError: See :func:`batchnorm_layers`.
        """
        found: dict[str, Tensor] = {}
        for name, layer in batchnorm_layers(model).items():
            for what in (MEAN, VARIANCE):
                found[f"{name}.{what}".removeprefix(".")] = getattr(layer, what).detach().clone()
        return cls(found)

    @classmethod
    def average(cls, parts: Sequence[Mapping[str, Tensor]], weights: Sequence[float] | None = None) -> Self:
        """Statistics of the mixture of several data sets.

        Means and second moments are averaged, so variances include the variance between the means.

        Args:
            parts: Statistics of the data sets.
            weights: Weights of the data sets; by default equal.

        Raises:
            ValueError: If there are none, they are of different layers, the weights do not fit, or a result is too
                large for its type.
        """
        if weights is not None and (len(weights) != len(parts) or min(weights, default=1) < 0 or not sum(weights)):
            raise ValueError(f"weights must be {len(parts)} numbers of 0 or more, not all 0; got {list(weights)}.")
        parts = [part if isinstance(part, BatchNormStatistics) else cls(part) for part in parts]
        if not parts or any(part.keys() != parts[0].keys() for part in parts):
            raise ValueError("To average statistics, pass at least one set, and sets of the same layers only.")
        found: dict[str, Tensor] = {}
        for name in parts[0]:
            if name.endswith(MEAN):
                other = name.removesuffix(MEAN) + VARIANCE
                pooled = pooled_statistics(
                    [part[name].double() for part in parts], [part[other].double() for part in parts], weights
                )
                for entry, value in zip((name, other), pooled, strict=True):
                    found[entry] = in_precision_of(parts[0][entry], value, f"average {entry}")
        return cls(found, num_samples=sum(getattr(part, "num_samples", 0) for part in parts))

    @property
    def layers(self) -> list[str]:
        """Names of the layers."""
        return list(dict.fromkeys(name.rpartition(".")[0] for name in self))

    def apply(self, model: nn.Module) -> None:
        """Copy the statistics into the buffers of a model.

        Raises:
            ValueError: If a layer is missing, has another shape, or a precision too low for a value. The model is then
                unchanged.
        """
        buffers = dict(model.named_buffers(remove_duplicate=False))
        for name, value in self.items():
            if name not in buffers or buffers[name].shape != value.shape:
                found = f"it is {tuple(buffers[name].shape)}" if name in buffers else "there is none"
                hint = prefix_hint(self, buffers) if name not in buffers else ""
                raise ValueError(
                    f"The statistics have {name!r} of shape {tuple(value.shape)}; in the model {found}.{hint}"
                )
        fitting = {name: in_precision_of(buffers[name], value, name) for name, value in self.items()}
        with torch.no_grad():
            for name, value in fitting.items():
                buffers[name].copy_(value)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, atomically."""
        metadata = {"num_samples": self.num_samples, "fingerprint": self.fingerprint}
        save_tensors(path, self, kind=ARTIFACT_KIND, metadata=metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a file written by :meth:`save`.

        Raises:
            ArtifactError: If the file is missing, damaged, or of another kind.
        """
        tensors, metadata = load_tensors(path, kind=ARTIFACT_KIND)
        return cls(tensors, num_samples=metadata["num_samples"], fingerprint=metadata["fingerprint"])

    def __repr__(self) -> str:
        return f"BatchNormStatistics({len(self.layers)} layers, num_samples={self.num_samples})"


def batchnorm_layers(model: nn.Module, module: str | None = None) -> dict[str, _BatchNorm]:
    """Batch-norm layers of a model, by name: BatchNorm1d, 2d and 3d, SyncBatchNorm, and subclasses of these.

    A layer with several names appears once. Fixed layers, such as torchvision's ``FrozenBatchNorm2d``, are not
    included.

    Args:
        model: Any module.
        module: Submodule to search. Names are relative to it.

    Raises:
        ValueError: If a layer keeps no running statistics or is uninitialized, or there is no such module.
    """
    model = model if module is None else submodule(model, module)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, _BatchNorm)}
    for name, layer in layers.items():
        if layer.running_mean is None or layer.running_var is None:
            raise ValueError(
                f"The batch-norm layer {name!r} keeps no running statistics (track_running_stats=False): it normalizes "
                "by each batch, so there is nothing to adapt. Create it with track_running_stats=True."
            )
        if isinstance(layer.running_mean, nn.UninitializedBuffer):
            raise ValueError(
                f"The batch-norm layer {name!r} is lazy and has not seen its first input; run the model once."
            )
    return layers
