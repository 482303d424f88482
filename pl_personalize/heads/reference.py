"""What a device needs to know of the server's data to adapt a head."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from pl_personalize.artifacts import load_tensors, save_tensors, tensor_checksum
from pl_personalize.functional.discriminant import Linear

ARTIFACT_KIND = "head-reference"


@dataclass(frozen=True)
class HeadReference:
    """Moments of the server's features, and limits beyond which a user's features differ from them; no image.

    Attributes:
        class_priors: The server's class priors, (K,).
        mean: Mean of the features of the server's validation samples, (d,).
        std: Their standard deviation, (d,).
        directions: Directions outside the span of the class means, (r, d), with unit within-class variance.
        camera_null: Mean and variance of the statistic of covariate shift without a shift, but under random class
            mixes, and by what share both grow with each image, (3,).
        sizes: Numbers of images that the following tables were made for, (s,).
        prior_null: Mean and variance of the log-likelihood ratio of label shift without a shift, (s, 2).
        prior_settings: Pseudo-counts and scale of the EM algorithm, (s, 2).
        num_samples: Number of validation samples.
        fingerprint: Checksum of the refitted head.
    """

    class_priors: Tensor
    mean: Tensor
    std: Tensor
    directions: Tensor
    camera_null: Tensor
    sizes: Tensor
    prior_null: Tensor
    prior_settings: Tensor
    num_samples: int
    fingerprint: str

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("num_samples", "fingerprint")}

    @property
    def num_bytes(self) -> int:
        """Size of the tensors in bytes, nearly that of the file."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def __repr__(self) -> str:
        classes, features = len(self.class_priors), len(self.mean)
        return f"HeadReference({classes} classes, {features} features, num_samples={self.num_samples})"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, atomically."""
        metadata = {"num_samples": self.num_samples, "fingerprint": self.fingerprint}
        save_tensors(path, self.tensors, kind=ARTIFACT_KIND, metadata=metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a file written by :meth:`save`.

        Raises:
            ArtifactError: If the file is missing, damaged, or of another kind.
        """
        tensors, metadata = load_tensors(path, kind=ARTIFACT_KIND)
        return cls(**tensors, num_samples=metadata["num_samples"], fingerprint=metadata["fingerprint"])

    def at(self, table: str, num_images: int) -> tuple[float, float]:
        """A row of a table for a number of images, interpolated in its logarithm."""
        sizes, values = self.sizes.double().log(), getattr(self, table).double()
        position = torch.tensor(float(num_images)).log().clamp(sizes[0], sizes[-1])
        upper = int((sizes < position).sum().clamp(1, len(sizes) - 1)) if len(sizes) > 1 else 0
        lower = max(upper - 1, 0)
        gap = sizes[upper] - sizes[lower]
        share = (position - sizes[lower]) / gap if gap > 0 else torch.tensor(0.0)
        first, second = (values[lower] * (1 - share) + values[upper] * share).tolist()
        return first, second


def head_fingerprint(head: Linear) -> str:
    """Checksum of a head in float32."""
    return tensor_checksum({"weight": head.weight.float(), "bias": head.bias.float()})


def tail(value: float, mean: float, variance: float) -> float:
    """The probability that a gamma variable of that mean and variance is at least ``value``.

    Example:
        >>> round(tail(3.0, 1.0, 1.0), 4)  # exponential: exp(-3)
        0.0498
    """
    if value <= 0 or variance <= 0:
        return 1.0
    shape = torch.tensor(mean**2 / variance, dtype=torch.float64)
    return float(torch.special.gammaincc(shape, torch.tensor(value * mean / variance, dtype=torch.float64)))
