"""Refitting a head to the body that it was merged with, on the server."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from pl_personalize.functional.batches import Forward, Labels, as_input, batch_labels, call_model
from pl_personalize.functional.discriminant import (
    SHRINKAGES,
    ClassMoments,
    Linear,
    best_factors,
    best_scale,
    calibration,
    combined,
    linear_discriminant,
    smoothed_loss,
)
from pl_personalize.functional.names import some
from pl_personalize.heads.cameras import Camera, random_cameras
from pl_personalize.heads.features import Gather, HeadOf, read_everywhere, written
from pl_personalize.heads.limits import Predicted, Samples, camera_fields, make_reference
from pl_personalize.heads.reference import HeadReference, head_fingerprint

_FOLDS = 5
_KEPT = 64_000_000  # features of training samples that calibrate, at most


def refit_head(
    model: nn.Module,
    train: Iterable[Any],
    val: Iterable[Any],
    *,
    head: str | None = None,
    forward: Forward | None = None,
    labels: Labels | None = None,
    directions: int = 40,
    cameras: int | Sequence[Camera] = 0,
    camera_images: int = 16,
    gather: Gather | None = None,
    progress: bool = False,
) -> HeadReference:
    r"""Refit the last layer of a network to its features, in place and in closed form.

    Merging changes the features that a head was trained on. The new head is linear discriminant analysis on the
    features of the merged body: class means and a shrunk, pooled within-class covariance. The shrinkage has the least
    negative log-likelihood on the validation samples, which also choose by cross-validation among the trained head, the
    discriminant, and the sum of both. Cross-validation over all samples calibrates the logits (scale, and a small bias
    for each class). With shrinkage and calibration found, the moments of all samples are used. A head that is already
    the discriminant of these data is no candidate, as it has seen the validation samples; refit a sum of both again
    from the trained head only.

    The data are read once, in eval mode. Only the weight and the bias of the last layer change. The order of the
    samples does not matter, except for the choice of images for cameras and beyond 64 million features of training
    samples.

    Args:
        model: Any module that returns logits (n, K), linear in the input of its last linear layer or 1×1 convolution
            (averaged over positions).
        train: Batches of the server's training samples with labels from 0 to K - 1, without augmentation.
        val: Batches of the server's validation samples, which no weight was trained on.
        head: Name of the last layer; by default the last linear layer or convolution that a forward pass calls.
        forward: ``(model, batch) -> logits``, if calling the model on the input is not enough.
        labels: Labels in a batch: a function of it, an index, or a key; by default the second of two items.
        directions: Number of directions in which covariate shift is tested, 1 or more. They are outside the span of the
            class means: with as many classes as features there are none, and a device finds no shift.
        cameras: For image inputs (n, channels, height, width): the number of random cameras, or functions of images in
            [0, 1] that imitate cameras. The network also reads some validation images through each. A device can then
            tell a camera from a class mix where both differ; with 0, it corrects one of the two.
        camera_images: Number of validation samples of each class for the cameras.
        gather: Concatenates the rows of a tensor over processes that each hold part of the data, all of which must
            call this function.
        progress: Show a progress bar if a pass takes more than two seconds.

    Returns:
        What a device needs to know of the server's data to adapt the head, see :func:`adapt_head`.

    Raises:
        ValueError: If there are no samples, a class of the head has no training samples, a label is no class of the
            head, a feature is not finite, all features are constant, the network is not linear in its features, or
            another process fails. The model is then unchanged.
    """
    check_refit_options(directions, cameras, camera_images)
    with torch.inference_mode(False), torch.autocast("cpu", enabled=False):
        layer = HeadOf(model, head, forward or _caller(labels))
        chosen = _Chosen(camera_images) if cameras else None
        moments, kept, kept_classes, features, classes = read_everywhere(
            lambda: (*_training(layer, train, labels, progress), *_samples(layer, val, labels, progress, chosen)),
            gather,
        )
        if gather is not None:
            moments = ClassMoments(*(gather(part[None]).sum(0) for part in moments))
            kept, kept_classes, features, classes = map(gather, (kept, kept_classes, features, classes))
            if chosen is not None:
                chosen = chosen.gathered(gather)
        _check_samples(moments)
        (kept, kept_classes), (features, classes) = _in_order(kept, kept_classes), _in_order(features, classes)

        shrinkage, discriminant = _best_discriminant(moments, features, classes)
        everything = moments.plus(ClassMoments.of(features, classes, len(moments.counts)))
        final = linear_discriminant(everything, shrinkage)
        assert final is not None
        samples = Samples(torch.cat([kept.double(), features]), torch.cat([kept_classes, classes]))
        factor, bias, left_out = _cross_calibration(everything, shrinkage, *samples)
        trained = [layer.linear] if _is_candidate(layer.linear, final) else []
        candidates = [discriminant.scaled(factor, bias), *trained]
        weights = _combination(candidates, features, classes)
        unseen = combined(candidates, weights)  # which has not seen the validation samples
        refitted = combined([final.scaled(factor, bias), *trained], weights)
        predicted = Predicted(unseen(features), classes)
        if left_out is not None and not any(weights[1:]):
            predicted = Predicted(weights[0] * left_out, samples.classes)
        reference = make_reference(everything, samples, len(classes), predicted, directions)
        if not reference.can_tell_cameras:
            rank_zero_warn(
                f"The {len(everything.counts)} class means span the {features.shape[1]} features of the head "
                f"{layer.name!r}, or there are too few validation samples: devices cannot tell another camera from "
                "other class frequencies. adapt_head then finds no shift; pass shift='label' if cameras do not differ."
            )
        if chosen is not None:
            taken = random_cameras(cameras) if isinstance(cameras, int) else cameras
            reference = replace(reference, **camera_fields(layer, chosen.tensors, taken, unseen, reference))
        body = layer.body_fingerprint
        with written([(layer, refitted)]):
            return replace(reference, fingerprint=head_fingerprint(layer.linear), body_fingerprint=body)


def check_refit_options(directions: int, cameras: int | Sequence[Camera], camera_images: int = 1) -> None:
    """Refuse invalid options.

    Raises:
        ValueError: If ``directions`` or ``camera_images`` is not a positive integer, or ``cameras`` neither an integer
            of 0 or more nor a sequence of functions.
    """
    counts = {"directions": (directions, 1), "camera_images": (camera_images, 1)}
    if isinstance(cameras, Sequence) and not all(map(callable, cameras)):
        raise ValueError(f"cameras must be a number or functions of images; got {cameras!r}.")
    counts |= {} if isinstance(cameras, Sequence) else {"cameras": (cameras, 0)}
    for name, (value, least) in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be an integer of {least} or more; got {value!r}.")


def try_refit(
    model: nn.Module,
    batches: Iterable[Any],
    head: str | None,
    forward: Forward | None,
    labels: Labels | None,
    cameras: int | Sequence[Camera],
) -> None:
    """Read some batches as :func:`refit_head` does, to find errors early; raises as it does."""
    layer, chosen = HeadOf(model, head, forward or _caller(labels)), _Chosen(1)
    for batch, features in layer.read(batches):
        classes = _labels(batch, labels, len(features), layer)
        if cameras:
            chosen.add(batch, features, classes)


def _caller(labels: Labels | None) -> Forward:
    """Calls a model on a batch without its labels."""
    return partial(call_model, label_key=labels if isinstance(labels, str) else None)


def _in_order(features: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """The samples in an order that only depends on their features."""
    generator = torch.Generator().manual_seed(0)
    keys = features.double() @ torch.randn(features.shape[1], dtype=torch.float64, generator=generator)
    order = keys.argsort(stable=True)
    return features[order], classes[order]


def _is_candidate(trained: Linear, discriminant: Linear) -> bool:
    """Whether a trained head is finite, and not the discriminant of an earlier call, which saw validation samples."""
    one, other = trained.weight, discriminant.weight
    multiple = (one * other).sum() / other.square().sum()
    return bool((one - multiple * other).norm() > 0.01 * one.norm()) and bool(trained.bias.isfinite().all())


def _training(
    layer: HeadOf, batches: Iterable[Any], labels: Labels | None, progress: bool
) -> tuple[ClassMoments, Tensor, Tensor]:
    """Moments of all training samples, and the features and labels of as many as fit into memory, from all parts."""
    total: ClassMoments | None = None
    kept: list[tuple[Tensor, Tensor]] = []
    seen, stride = 0, 1
    for batch, features in layer.read(batches, progress=progress):
        classes = _labels(batch, labels, len(features), layer)
        found = ClassMoments.of(features, classes, layer.num_classes)
        total = found if total is None else total.plus(found)
        rows = (torch.arange(seen, seen + len(features)) % stride == 0).nonzero()[:, 0]
        kept.append((features[rows].float(), classes[rows]))
        seen += len(features)
        while sum(part.numel() for part, _ in kept) > _KEPT:
            joined = [torch.cat(parts)[::2] for parts in zip(*kept, strict=True)]
            kept, stride = [(joined[0], joined[1])], 2 * stride
    if total is None:
        raise ValueError("There are no training samples: pass batches of samples with labels.")
    return total, torch.cat([part for part, _ in kept]), torch.cat([part for _, part in kept])


class _Chosen:
    """The first samples of each class: their inputs, features and labels."""

    def __init__(self, count: int) -> None:
        self._count, self._seen = count, Counter[int]()
        self.inputs: list[Tensor] = []
        self.features: list[Tensor] = []
        self.classes: list[int] = []

    def add(self, batch: Any, features: Tensor, classes: Tensor) -> None:
        if not isinstance(batch, list | tuple) or len(batch) != 2:
            raise ValueError("cameras= calls the network on batches (images, labels): give such, or leave it out.")
        inputs = as_input(batch)
        if not isinstance(inputs, Tensor) or inputs.dim() != 4 or not inputs.is_floating_point():
            raise ValueError("cameras= needs float images (n, channels, height, width) as the input; leave it out.")
        if self.inputs and inputs.shape[1:] != self.inputs[0].shape:
            sizes = f"{tuple(self.inputs[0].shape)} and {tuple(inputs.shape[1:])}"
            raise ValueError(f"cameras= needs images of one size; got {sizes}. Resize them, or leave it out.")
        self._keep(inputs.cpu(), features, classes)

    def _keep(self, inputs: Tensor, features: Tensor, classes: Tensor) -> None:
        for row, number in enumerate(classes.tolist()):
            if self._seen[number] < self._count:
                self._seen[number] += 1
                self.inputs.append(inputs[row].clone())
                self.features.append(features[row])
                self.classes.append(number)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs, features and classes."""
        return torch.stack(self.inputs), torch.stack(self.features), torch.tensor(self.classes)

    def gathered(self, gather: Gather) -> _Chosen:
        """The first samples of all processes."""
        found = _Chosen(self._count)
        found._keep(*map(gather, self.tensors))
        return found


def _samples(
    layer: HeadOf, batches: Iterable[Any], labels: Labels | None, progress: bool, chosen: _Chosen | None
) -> tuple[Tensor, Tensor]:
    parts = []
    for batch, features in layer.read(batches, progress=progress):
        parts.append((features, _labels(batch, labels, len(features), layer)))
        if chosen is not None:
            chosen.add(batch, *parts[-1])
    if not parts:
        raise ValueError("There are no validation samples: pass batches of samples with labels.")
    return torch.cat([part for part, _ in parts]), torch.cat([part for _, part in parts])


def _labels(batch: Any, labels: Labels | None, count: int, layer: HeadOf) -> Tensor:
    found = batch_labels(batch, labels).detach().cpu()
    num_classes = layer.num_classes
    if found.shape != (count,) or found.is_floating_point():
        raise ValueError(f"Labels must be class indices, ({count},); got {found.dtype} of shape {tuple(found.shape)}.")
    if found.min() < 0 or found.max() >= num_classes:
        raise ValueError(
            f"The head has the classes 0 to {num_classes - 1}; labels go from {found.min()} to {found.max()}."
        )
    return found.long()


def _check_samples(moments: ClassMoments) -> None:
    if missing := (moments.counts == 0).nonzero()[:, 0].tolist():
        raise ValueError(
            f"There are no training samples of the classes {some(map(str, missing))} of the head's "
            f"{len(moments.counts)} classes. Pass samples of every class, or give the head only the classes that exist."
        )
    if not moments.within.diagonal().sum() > 1e-12 * moments.squares.diagonal().sum():
        raise ValueError(
            "The features are constant within every class, so they have no covariance: pass several training samples "
            "of each class, and check the model."
        )


def _best_discriminant(moments: ClassMoments, features: Tensor, classes: Tensor) -> tuple[float, Linear]:
    """The shrinkage with the least negative log-likelihood on validation samples, and its classifier."""
    best: tuple[Tensor, float, Linear] | None = None
    for shrinkage in SHRINKAGES:
        found = linear_discriminant(moments, shrinkage)
        if found is None:
            continue
        logits = found(features)
        loss = smoothed_loss(logits * best_scale(logits, classes), classes)
        if best is None or loss < best[0]:
            best = loss, shrinkage, found
    assert best is not None  # with shrinkage 1, the covariance is a multiple of the identity
    return best[1:]


def _cross_calibration(
    moments: ClassMoments, shrinkage: float, features: Tensor, classes: Tensor
) -> tuple[float, Tensor, Tensor | None]:
    """Factor and bias that calibrate discriminants, and calibrated logits of each by one that has not seen it.

    Without calibration and logits if a class has too few samples.
    """
    generator = torch.Generator().manual_seed(0)
    folds = torch.randperm(len(classes), generator=generator) % _FOLDS
    logits = torch.zeros(len(classes), len(moments.counts), dtype=features.dtype)
    for fold in range(_FOLDS):
        out = folds == fold
        rest = moments.minus(ClassMoments.of(features[out], classes[out], len(moments.counts)))
        found = linear_discriminant(rest, shrinkage) if rest.counts.min() > 0 else None
        if found is None:  # a class with a single sample
            return 1.0, torch.zeros_like(logits[0]), None
        logits[out] = found(features[out])
    factor, bias = calibration(logits, classes)
    return factor, bias, factor * logits + bias


def _combination(candidates: list[Linear], features: Tensor, classes: Tensor) -> list[float]:
    """Factors of the discriminant and of the trained head, if it is given.

    The discriminant alone, unless the trained head or both together have a cross-validated negative log-likelihood that
    is less by more than two standard errors.
    """
    logits = [candidate(features) for candidate in candidates]
    folds = torch.arange(len(classes)) % min(_FOLDS, len(classes))
    losses: dict[tuple[int, ...], Tensor] = {}
    choices: list[tuple[int, ...]] = [(0,), (1,), (0, 1)][: 3 if len(candidates) > 1 else 1]
    for chosen in choices:
        losses[chosen] = torch.zeros(len(classes), dtype=features.dtype)
        for fold in range(int(folds.max()) + 1 if len(classes) > 1 else 0):
            out = folds == fold
            factors = best_factors([logits[k][~out] for k in chosen], classes[~out])
            mixed = torch.stack([f * logits[k][out] for f, k in zip(factors, chosen, strict=True)]).sum(0)
            losses[chosen][out] = F.cross_entropy(mixed, classes[out], reduction="none")
    best = choices[0]
    for chosen in choices[1:]:
        gain = losses[best] - losses[chosen]
        if gain.mean() > 2 * gain.std() / len(gain) ** 0.5:
            best = chosen
    found = dict(zip(best, best_factors([logits[k] for k in best], classes), strict=True))
    return [found.get(k, 0.0) for k in range(len(candidates))]
