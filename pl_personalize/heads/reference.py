"""The server's part of adapting a head: moments of its features, and limits for tests."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor

from pl_personalize.artifacts import ArtifactError, load_tensors, save_tensors, tensor_checksum
from pl_personalize.functional.discriminant import Linear
from pl_personalize.functional.feature_shift import CameraShifts, covariate_statistic, span_basis
from pl_personalize.functional.names import some

ARTIFACT_KIND = "head-reference"
_CHECKSUMS = ("fingerprint", "body_fingerprint")


@dataclass(frozen=True, eq=False)
class HeadReference:
    """Moments of the server's features, and limits beyond which a user's features differ from them; no image.

    Attributes:
        class_priors: The server's class priors, (K,).
        class_means: Means of the features of each class of all the server's samples, (K, d).
        mean: Mean of the features of validation samples under the server's class priors, (d,).
        std: Their standard deviation, (d,).
        directions: Directions outside the span of the means of classes and of clusters within them, (r, d).
        direction_std: Standard deviation of the validation samples along these, (r,).
        camera_null: Mean and variance of the statistic of covariate shift without a shift, but under random class
            mixes, and by what share both grow with each image, (3,).
        sizes: Numbers of images that the following tables were made for, (s,).
        prior_null: Mean and variance of the log-likelihood ratio of label shift without a shift, and by what share it
            grows with each image, because the server's sample is finite, too, (s, 3).
        prior_settings: Pseudo-counts and scale of the EM algorithm, and strength of the regularization of black-box
            shift estimation, (s, 3).
        confusion: Mean predicted probabilities of the server's samples of each class by heads that have not seen them,
            (K, K), row by class.
        camera_shifts: Shifts of the features' means by random cameras, (M, d), float16; M = 0 without cameras.
        camera_ratios: Logarithm of the ratios of their stds, (M, d), float16.
        camera_evidence: Mean log-likelihood ratio of label shift for each camera without one, (M,).
        camera_scale: Factor that calibrates logits after the correction of a camera, ().
        num_samples: Effective number of validation samples.
        fingerprint: Checksum of the refitted head.
        body_fingerprint: Checksum of the parameters of the body, without batch-norm statistics.
    """

    class_priors: Tensor
    class_means: Tensor
    mean: Tensor
    std: Tensor
    directions: Tensor
    direction_std: Tensor
    camera_null: Tensor
    sizes: Tensor
    prior_null: Tensor
    prior_settings: Tensor
    confusion: Tensor
    camera_shifts: Tensor
    camera_ratios: Tensor
    camera_evidence: Tensor
    camera_scale: Tensor
    num_samples: int
    fingerprint: str
    body_fingerprint: str

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Everything as tensors by name; see :meth:`from_tensors`."""
        found = {item.name: getattr(self, item.name) for item in fields(self)}
        found["num_samples"] = torch.tensor(self.num_samples)
        for name in _CHECKSUMS:
            found[name] = torch.frombuffer(bytearray.fromhex(found[name]), dtype=torch.uint8)
        return found

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """The reference whose :attr:`tensors` these are.

        Raises:
            ValueError: If one is missing.
        """
        if missing := [item.name for item in fields(cls) if item.name not in tensors]:
            raise ValueError(f"A head reference has the tensors {some(missing)}, which are missing.")
        found: dict[str, Any] = {item.name: tensors[item.name] for item in fields(cls)}
        found["num_samples"] = int(found["num_samples"])
        found |= {name: bytes(found[name].tolist()).hex() for name in _CHECKSUMS}
        return cls(**found)

    @property
    def num_bytes(self) -> int:
        """Size of the tensors in bytes, nearly that of the file."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def __repr__(self) -> str:
        classes, features = len(self.class_priors), len(self.mean)
        return f"HeadReference({classes} classes, {features} features, num_samples={self.num_samples})"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, atomically."""
        save_tensors(path, self.tensors, kind=ARTIFACT_KIND)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a file written by :meth:`save`.

        Raises:
            ArtifactError: If the file is missing, damaged, of another kind, or of another release.
        """
        tensors = load_tensors(path, kind=ARTIFACT_KIND)[0]
        try:
            return cls.from_tensors(tensors)
        except ValueError as error:
            raise ArtifactError(f"{path}: {error} Was it written by another release?") from error

    @property
    def can_tell_cameras(self) -> bool:
        """Whether there are directions in which another camera shows, and samples that tell how much is usual."""
        return len(self.directions) > 0 and float(self.camera_null[1]) > 0

    def covariate_statistic(self, features: Tensor) -> float:
        """The statistic of covariate shift of features (n, d) in :attr:`directions`."""
        scores = (features - self.mean.double()) @ self.directions.double().T
        return float(covariate_statistic(scores, self.direction_std.double(), self.effective_count(len(features))))

    def effective_count(self, num_images: int) -> float:
        """Number of images that would tell a mean as well as these, as the server's mean is that of a sample, too."""
        return 1 / (1 / num_images + 1 / self.num_samples)

    @property
    def cameras(self) -> CameraShifts | None:
        """The shifts by random cameras, if there are any."""
        if not len(self.camera_shifts):
            return None
        return CameraShifts(self.camera_shifts.double(), self.camera_ratios.double())

    @property
    def span(self) -> Tensor:
        """Orthonormal basis of the span of the class means, (r, d)."""
        means = self.class_means.double()
        return span_basis(means - means.mean(0))

    def at(self, table: str, num_images: int) -> tuple[float, ...]:
        """A row of a table for a number of images, interpolated in its logarithm."""
        sizes, values = self.sizes.double().log(), getattr(self, table).double()
        position = torch.tensor(float(num_images)).log().clamp(sizes[0], sizes[-1])
        upper = int((sizes < position).sum().clamp(1, len(sizes) - 1)) if len(sizes) > 1 else 0
        lower = max(upper - 1, 0)
        gap = sizes[upper] - sizes[lower]
        share = (position - sizes[lower]) / gap if gap > 0 else torch.tensor(0.0)
        return tuple((values[lower] * (1 - share) + values[upper] * share).tolist())


def head_fingerprint(head: Linear) -> str:
    """Checksum of a head in float32."""
    return tensor_checksum({"weight": head.weight.float(), "bias": head.bias.float()})


def tail(value: float, mean: float, variance: float) -> float:
    """The probability that a gamma variable of that mean and variance is at least ``value``.

    Example:
        >>> round(tail(3.0, 1.0, 1.0), 4)  # exponential: exp(-3)
        0.0498
    """
    if not (value > 0 and mean > 0 and variance > 0):
        return 1.0
    shape = torch.tensor(mean**2 / variance, dtype=torch.float64)
    return float(torch.special.gammaincc(shape, torch.tensor(value * mean / variance, dtype=torch.float64)))
