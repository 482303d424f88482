"""Adapting a head to a user's unlabelled images, on their device."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, cast, get_args, overload

import torch
from torch import Tensor, nn

from pl_personalize.artifacts import ArtifactError, load_tensors, save_tensors
from pl_personalize.functional.batches import Forward
from pl_personalize.functional.discriminant import Linear
from pl_personalize.functional.feature_shift import standardized
from pl_personalize.functional.label_shift import bbse_priors, em_priors, label_shift_evidence
from pl_personalize.heads.features import Gather, HeadOf, read_everywhere, written
from pl_personalize.heads.limits import CAMERA_ALPHA
from pl_personalize.heads.reference import HeadReference, head_fingerprint, tail

ARTIFACT_KIND = "head-adaptation"
Shift = Literal["none", "label", "covariate", "both"]
Estimator = Literal["em", "bbse"]
_LABEL_RATIO = 1.8  # of the evidence of label shift beside a camera to what similar cameras show without any
_SIMILAR = 3  # cameras
_TOLERANCE = 0.005  # mean squared shift, in variances, that is not worth a correction
_DOUBT, _LEVELS = 0.01, {"covariate": 1e-5, "label": 0.01}


@dataclass(frozen=True, eq=False)
class HeadAdaptation:
    """Outcome of adapting a head to a user's images of one task: the shift that was found, and the head for it.

    It describes the user (their class priors!) and is meant to stay on their device.

    Attributes:
        shift: The shift that was found: ``"none"``, ``"label"`` (other class frequencies than the server's),
            ``"covariate"`` (other features than class frequencies explain, such as those of another camera), or
            ``"both"``.
        class_priors: Estimated class priors, (K,), if there is label shift, else ``None``.
        evidence: What the tests found, pooled over the user's tasks; empty if the shift was given. The p-value
            ``"covariate"``; without suspicion of a camera the p-value ``"label"``, and with a camera and references
            that have cameras ``"label_ratio"``, the evidence of label shift relative to what cameras alone show.
        num_images: Number of images.
        head: Name of the layer.
        before: Original weight and bias of the layer.
        after: Adapted weight and bias; equal to the original ones without a shift.
    """

    shift: Shift
    class_priors: Tensor | None
    evidence: dict[str, float]
    num_images: int
    head: str
    before: Linear
    after: Linear

    def is_applied(self, model: nn.Module) -> bool:
        """Whether a model has the adapted head; another model has not."""
        try:
            return _has(HeadOf(model, self.head), self.after)
        except ValueError:
            return False

    def apply(self, model: nn.Module) -> None:
        """Write the adapted head into a model that has the original head.

        Raises:
            ValueError: If the model has another head.
        """
        self._replace(model, self.before, self.after)

    def undo(self, model: nn.Module) -> None:
        """Write the original head into a model that has the adapted head; raises as :meth:`apply` does."""
        self._replace(model, self.after, self.before)

    def _replace(self, model: nn.Module, old: Linear, new: Linear) -> None:
        layer = HeadOf(model, self.head)
        if not _has(layer, old) and not _has(layer, new):
            raise ValueError(f"The head {self.head!r} of the model is not the one that this adaptation belongs to.")
        layer.write(new)

    def __repr__(self) -> str:
        found = ", ".join(f"{name} {value:.2g}" for name, value in self.evidence.items())
        return f"HeadAdaptation({self.shift!r}, {self.num_images} images, {found})"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, atomically, that only its owner can read."""
        tensors = {"before.weight": self.before.weight, "before.bias": self.before.bias}
        tensors |= {"after.weight": self.after.weight, "after.bias": self.after.bias}
        tensors |= {} if self.class_priors is None else {"class_priors": self.class_priors}
        metadata = {"shift": self.shift, "evidence": self.evidence, "num_images": self.num_images, "head": self.head}
        os.chmod(save_tensors(path, tensors, kind=ARTIFACT_KIND, metadata=metadata), 0o600)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a file written by :meth:`save`.

        Raises:
            ArtifactError: If the file is missing, damaged, of another kind, or of another release.
        """
        tensors, metadata = load_tensors(path, kind=ARTIFACT_KIND)
        try:
            before, after = (Linear(tensors[f"{name}.weight"], tensors[f"{name}.bias"]) for name in ("before", "after"))
            known: dict[str, Any] = {key: metadata[key] for key in ("shift", "evidence", "num_images", "head")}
        except KeyError as error:
            raise ArtifactError(f"{path} lacks {error}. Was it written by another release?") from error
        return cls(class_priors=tensors.get("class_priors"), before=before, after=after, **known)


@overload
def adapt_head(
    model: nn.Module,
    images: Iterable[Any],
    reference: HeadReference,
    *,
    head: str | None = None,
    forward: Forward | None = None,
    shift: Shift | None = None,
    estimator: Estimator = "em",
    gather: Gather | None = None,
    progress: bool = False,
) -> HeadAdaptation: ...


@overload
def adapt_head(
    model: Sequence[nn.Module],
    images: Sequence[Iterable[Any]],
    reference: Sequence[HeadReference],
    *,
    head: str | None = None,
    forward: Forward | None = None,
    shift: Shift | None = None,
    estimator: Estimator = "em",
    gather: Gather | None = None,
    progress: bool = False,
) -> list[HeadAdaptation]: ...


def adapt_head(
    model: nn.Module | Sequence[nn.Module],
    images: Any,
    reference: HeadReference | Sequence[HeadReference],
    *,
    head: str | None = None,
    forward: Forward | None = None,
    shift: Shift | None = None,
    estimator: Estimator = "em",
    gather: Gather | None = None,
    progress: bool = False,
) -> HeadAdaptation | list[HeadAdaptation]:
    r"""Adapt the last layer of a network to a user's unlabelled images, in place and in closed form.

    One forward pass over the images tells which shift there is:

    * *Covariate shift*, such as another camera: the mean of the features differs from the server's in directions in
      which no class mix moves it. Features are then standardized to the server's moments; or, if the reference has
      cameras, corrected by the combination of these that explains the difference (which leaves the part of it that a
      class mix causes), and label shift is tested on what remains.
    * *Label shift*: other class frequencies than the server's, by a likelihood ratio. Class priors are then estimated
      by expectation maximization (see :func:`~pl_personalize.functional.label_shift.em_priors`), and
      :math:`\log q_k / \pi_k` is added to the bias.

    Pseudo-counts, scales and the distributions without a shift come from the server's data alone (:func:`refit_head`);
    the levels of the tests are constants. Without a shift, and in doubt about a camera, nothing changes. Without
    cameras, a user with both shifts gets features standardized, which takes part of their class mix for the camera and
    can be worse than nothing: refit with ``cameras=`` where this may be.

    Images are taken as independent: many photographs of one scene can be mistaken for another camera. Labels in the
    batches are ignored.

    Args:
        model: A network after :func:`refit_head`; or those of all tasks of a user, which share their camera, so that
            the tests are pooled.
        images: Batches of the user's images; or for each task.
        reference: What :func:`refit_head` returned; or for each task.
        head: Name of the last layer; by default the last linear layer or convolution that a forward pass calls.
        forward: ``(model, batch) -> logits``, if calling the model on the input is not enough.
        shift: The shift to correct, if it is known; by default it is tested.
        estimator: How class priors are estimated under label shift alone: ``"em"``, or ``"bbse"`` by regularized
            black-box shift estimation, see :func:`~pl_personalize.functional.label_shift.bbse_priors`. Under both
            shifts, it is always EM.
        gather: See :func:`refit_head`.
        progress: Show a progress bar if a pass takes more than two seconds.

    Returns:
        What was found and changed; for several tasks a list.

    Raises:
        ValueError: If there are no images, a feature is not finite, a reference belongs to another model, the numbers
            of models, images and references differ, or ``shift="both"`` is given and a reference has no cameras; also
            if another process fails. Nothing has changed then, nor after an interruption.
        TypeError: If a reference is not a :class:`HeadReference`.
    """
    check_shift(shift)
    check_estimator(estimator)
    if isinstance(model, nn.Module):
        models, all_images, references = [model], [images], [cast("HeadReference", reference)]
    else:
        given = [reference] if isinstance(reference, HeadReference) else list(reference)
        models, all_images, references = list(model), list(images), given
    for one in references:
        if not isinstance(one, HeadReference):
            raise TypeError(f"A reference must be a HeadReference, such as HeadReference.load(path); got {one!r}.")
        if shift == "both" and one.cameras is None:
            raise ValueError("shift='both' needs a reference with cameras: refit_head(…, cameras=60).")
    if not len(models) == len(all_images) == len(references) or not models:
        raise ValueError(
            f"Give one model, one iterable of images and one reference per task; got {len(models)}, "
            f"{len(all_images)} and {len(references)}."
        )
    with torch.inference_mode(False), torch.autocast("cpu", enabled=False):
        tasks = [
            _Task(HeadOf(one, head, forward), batches, ref, estimator, gather, progress)
            for one, batches, ref in zip(models, all_images, references, strict=True)
        ]
        if len({id(task.layer.layer) for task in tasks}) < len(tasks):
            raise ValueError("Two tasks have the same head: give each task a model with a head of its own.")
        evidence: dict[str, float] = {}
        if shift is None:
            shift = _found(tasks, evidence)
        found = [task.adapted(shift, evidence) for task in tasks]
        pairs = list(zip(tasks, found, strict=True))
        with written([(task.layer, one.after) for task, one in pairs]):
            outcomes = [replace(one, after=task.layer.linear) for task, one in pairs]  # as rounded
    return outcomes[0] if isinstance(model, nn.Module) else outcomes


def check_shift(shift: str | None) -> None:
    """Refuse a shift that does not exist.

    Raises:
        ValueError: If it is neither ``None`` nor a :data:`Shift`.
    """
    if shift is not None and shift not in get_args(Shift):
        raise ValueError(f"shift must be one of {', '.join(get_args(Shift))}, or None to test; got {shift!r}.")


def check_estimator(estimator: str) -> None:
    """Refuse an estimator that does not exist.

    Raises:
        ValueError: If it is no :data:`Estimator`.
    """
    if estimator not in get_args(Estimator):
        raise ValueError(f"estimator must be one of {', '.join(get_args(Estimator))}; got {estimator!r}.")


def _found(tasks: Sequence[_Task], evidence: dict[str, float]) -> Shift:
    """The shift that the tasks show together; the evidence is noted."""
    evidence["covariate"] = _pooled(task.camera() for task in tasks)
    if not any(task.reference.can_tell_cameras for task in tasks):
        return "none"  # a camera would pass for class priors
    if evidence["covariate"] >= _DOUBT:
        evidence["label"] = _pooled(task.label() for task in tasks)
        return "label" if evidence["label"] < _LEVELS["label"] else "none"
    if evidence["covariate"] >= _LEVELS["covariate"]:
        return "none"  # class priors estimated beside a camera cost more than they gain
    if any(task.reference.cameras is None for task in tasks):
        return "covariate"
    seen, expected, left = (sum(values) for values in zip(*(task.label_beside_camera() for task in tasks), strict=True))
    evidence["label_ratio"] = seen / expected / max(1.0, left / len(tasks))
    return "both" if evidence["label_ratio"] > _LABEL_RATIO else "covariate"


def _pooled(statistics: Iterable[tuple[float, float, float]]) -> float:
    """The p-value of the sum of statistics, each with its mean and variance."""
    return tail(*(sum(values) for values in zip(*statistics, strict=True)))


def _has(layer: HeadOf, head: Linear) -> bool:
    return head_fingerprint(layer.linear) == head_fingerprint(head)


class _Task:
    """The features of a user's images of one task, beside the server's reference."""

    def __init__(
        self,
        layer: HeadOf,
        batches: Iterable[Any],
        reference: HeadReference,
        estimator: Estimator,
        gather: Gather | None,
        progress: bool,
    ) -> None:
        self.layer, self.reference, self.estimator = layer, reference, estimator

        def read() -> Tensor:
            parts = [features for _, features in layer.read(batches, progress=progress)]
            if not parts:
                where = "" if gather is None else " on one of the processes, each of which needs some"
                raise ValueError(f"There are no images to adapt to{where}: pass at least one batch.")
            for other, same in (
                ("head", head_fingerprint(layer.linear) == reference.fingerprint),
                ("body", layer.body_fingerprint == reference.body_fingerprint),
            ):
                if not same:
                    raise ValueError(
                        f"The reference belongs to another {other} than that of this {type(layer.model).__name__} with "
                        f"the head {layer.name!r}: pass the model that refit_head changed, in the same precision and "
                        "before it is adapted, and the reference that it returned."
                    )
            return torch.cat(parts)

        features = read_everywhere(read, gather)
        self.features = features if gather is None else gather(features)
        self.head = layer.linear
        self.source = reference.class_priors.double()

    @property
    def count(self) -> int:
        return len(self.features)

    def camera(self) -> tuple[float, float, float]:
        """The statistic of covariate shift, and its mean and variance without a shift."""
        mean, variance, leak = self.reference.camera_null.tolist()
        growth = 1 + (leak + _TOLERANCE) * self.reference.effective_count(self.count)
        return self.reference.covariate_statistic(self.features), mean * growth, variance * growth**2

    def label_beside_camera(self) -> tuple[float, float, float]:
        """The statistic of label shift after the correction of the camera, and what limits it.

        These are its mean for similar cameras without label shift, and the statistic of covariate shift that is left.
        """
        ref, head = self.reference, self._without_camera
        cameras = ref.cameras
        assert cameras is not None
        logits = head(self.features)
        evidence = label_shift_evidence(logits, self.source, em_priors(logits, self.source, alpha=CAMERA_ALPHA))
        shifts, seen = cameras.outside(self.features.mean(0) - ref.mean.double(), ref.span, ref.std.double())
        nearest = (shifts - seen).square().sum(1).argsort()[:_SIMILAR]
        shift, ratio = self._camera_shift
        mean = ref.mean.double()
        left = ref.covariate_statistic((self.features - mean - shift) / ratio + mean) / max(1, len(ref.directions))
        return float(evidence), float(ref.camera_evidence[nearest].mean()), left

    @property
    def _camera_shift(self) -> tuple[Tensor, Tensor]:
        """Shift and ratio of the stds, each (d,), that the cameras of the reference explain."""
        ref = self.reference
        cameras = ref.cameras
        assert cameras is not None
        return cameras.predict(self.features.mean(0) - ref.mean.double(), ref.span, ref.std.double())

    @property
    def _without_camera(self) -> Linear:
        """The calibrated head on features without the shift of the camera."""
        shift, ratio = self._camera_shift
        mean, scale = self.reference.mean.double(), float(self.reference.camera_scale)
        return standardized(self.head, mean + shift, ratio, mean, torch.ones_like(ratio)).scaled(scale)

    def priors(self, head: Linear) -> Tensor:
        """Class priors of the images."""
        logits = head(self.features)
        alpha, scale, strength = self.reference.at("prior_settings", self.count)
        if self.estimator == "em":
            return em_priors(logits, self.source, alpha=alpha, scale=scale)
        predicted = logits.softmax(1).mean(0)
        return bbse_priors(predicted, self.reference.confusion.double(), self.source, strength=strength)

    def label(self) -> tuple[float, float, float]:
        """The statistic of label shift, and its mean and variance without a shift."""
        evidence = label_shift_evidence(self.head(self.features), self.source, self.priors(self.head))
        mean, variance, leak = self.reference.at("prior_null", self.count)
        growth = 1 + (leak + _TOLERANCE) * self.count
        return float(evidence), mean * growth, variance * growth**2

    def adapted(self, shift: Shift, evidence: dict[str, float]) -> HeadAdaptation:
        """The head for a shift."""
        head, priors, ref = self.head, None, self.reference
        if shift in ("covariate", "both") and ref.cameras is not None:
            head = self._without_camera
        elif shift in ("covariate", "both"):
            mean, std = self.features.mean(0), self.features.std(0, correction=0)
            head = standardized(head, mean, std, ref.mean.double(), ref.std.double())
        if shift == "label":
            priors = self.priors(head)
        elif shift == "both":
            priors = em_priors(head(self.features), self.source, alpha=CAMERA_ALPHA)
        if priors is not None:
            head = Linear(head.weight, head.bias + (priors / self.source).log())
        assert self.layer.name is not None
        return HeadAdaptation(shift, priors, dict(evidence), self.count, self.layer.name, self.head, head)
