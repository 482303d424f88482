"""The reference that a device gets: moments of the server's features, and limits found with simulated users."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pl_personalize.functional.discriminant import ClassMoments, Linear, best_scale
from pl_personalize.functional.feature_shift import (
    CameraShifts,
    covariate_statistic,
    nearest_centers,
    outside_directions,
    span_basis,
    standardized,
)
from pl_personalize.functional.label_shift import bbse_priors, confusion, em_priors, label_shift_evidence
from pl_personalize.heads.cameras import Camera, on_inputs
from pl_personalize.heads.features import HeadOf
from pl_personalize.heads.reference import HeadReference

SIZES = (10, 40, 160)
_SETS, _ELEMENTS, _LOSSES = 100, 100_000, 1_000_000  # simulated users of a size, their logits and losses at most
_CONCENTRATION = 0.5  # of their class mixes
_ALPHAS, _EM_SCALES = (1.0, 2.0, 4.0, 8.0), (1.0, 1.5, 2.0)
_STRENGTHS = (0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
_GROUPS, _GROUP_SIZE, _CLUSTERED = 16, 8, 2000  # clusters of a class at most, their samples, and the class's samples
CAMERA_ALPHA = 2.0  # pseudo-counts where a camera was corrected
_CAMERA_BATCH, _CAMERA_SETS, _CAMERA_SIZE = 64, 6, 80  # simulated users of each camera, and their images


class Samples(NamedTuple):
    """Features (n, d) and classes (n,)."""

    features: Tensor
    classes: Tensor


class Predicted(NamedTuple):
    """Calibrated logits (n, K) of samples by heads that have not seen them, and their classes (n,)."""

    logits: Tensor
    classes: Tensor


def make_reference(
    moments: ClassMoments, samples: Samples, num_val: int, predicted: Predicted, directions: int
) -> HeadReference:
    """The reference, whose limits come from simulated users.

    They have validation samples, the last ones of ``samples``, in the test of cameras, and those of ``predicted``
    in that of class priors.
    """
    means = [moments.means]
    num_classes, width = moments.means.shape
    most = max(1, min(_GROUPS, width // (2 * num_classes)))  # half of the directions are left
    for label in range(num_classes):
        mine = samples.features[samples.classes == label]
        if not len(mine):
            continue
        mine = mine[:: 1 + len(mine) // _CLUSTERED]  # all parts of the data, which may be sorted
        groups = nearest_centers(mine, max(1, min(most, len(mine) // _GROUP_SIZE)))
        parts = ClassMoments.of(mine, groups, most, squares=False)
        means.append(parts.means[parts.counts > 0])
    features, classes = samples.features[-num_val:], samples.classes[-num_val:]
    mean, std, weights = _moments_at(moments, features, classes)
    mixes = _class_mixes(_SETS, torch.bincount(classes, minlength=num_classes))

    rows = outside_directions(moments.within, span_basis(torch.cat(means) - moments.mean), directions)
    scores = (features - mean) @ rows.T
    spread = scores.square().mean(0).sqrt()
    camera = rows.float(), spread.float(), _camera_null(scores, spread, classes, mixes, moments).float()
    matrix = confusion(*predicted, moments.priors)
    prior, settings = zip(*(_prior_null(predicted, moments.priors, matrix, size) for size in SIZES), strict=True)
    return HeadReference(
        moments.priors.float(),
        moments.means.float(),
        mean.float(),
        std.float(),
        *camera,
        torch.tensor(SIZES),
        torch.tensor(prior),
        torch.tensor(settings),
        matrix.float(),
        *(torch.zeros(0, len(mean), dtype=torch.float16),) * 2,
        torch.zeros(0),
        torch.ones(()),
        num_samples=round(float(1 / weights.square().sum())),
        fingerprint="",
        body_fingerprint="",
    )


def _moments_at(moments: ClassMoments, features: Tensor, classes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and standard deviation of validation features under the server's class priors, and the samples' weights.

    The validation samples may have another class mix; a class without any is known from its training samples.
    """
    weights = _weights(moments.priors[None], classes)[0]
    absent = moments.priors * (torch.bincount(classes, minlength=len(moments.priors)) == 0)
    known = 1 - absent.sum()
    weights = weights / known
    own = weights @ features
    mean = known * own + absent @ moments.means
    variance = known * (weights @ (features - own).square() + (own - mean).square())
    variance += absent @ (moments.means - mean).square() + absent.sum() * moments.within.diagonal()
    return mean, variance.sqrt(), weights


def _class_mixes(count: int, present: Tensor) -> Tensor:
    """Class mixes (count, K) of simulated users: Dirichlet-distributed, of the classes with samples."""
    raw = np.random.default_rng(0).gamma(_CONCENTRATION, size=(count, len(present))) + 1e-12
    mixes = torch.from_numpy(raw) * (present > 0)
    return mixes / mixes.sum(1, keepdim=True)


def _weights(mixes: Tensor, classes: Tensor) -> Tensor:
    """The share (count, n) of each sample in class mixes."""
    return (mixes / torch.bincount(classes, minlength=mixes.shape[1]).clamp_min(1))[:, classes]


def _camera_null(scores: Tensor, std: Tensor, classes: Tensor, mixes: Tensor, moments: ClassMoments) -> Tensor:
    """Mean and variance of n · |mean score|² of samples under class mixes, and what each sample adds to the factor.

    The sets are small and drawn without replacement, as larger ones would repeat samples. Beyond sampling, a class mix
    moves the mean by the errors of the server's class means, in proportion to n.
    """
    size = max(2, len(classes) // mixes.shape[1])
    generator = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(_weights(mixes, classes) + 1e-9, min(size, len(classes)), generator=generator)
    statistic = covariate_statistic(scores[drawn], std, drawn.shape[1])
    leak = ((mixes - moments.priors).square() / moments.counts).sum(1).mean()
    return torch.stack([statistic.mean(), statistic.var(), leak])


def _prior_null(predicted: Predicted, source: Tensor, matrix: Tensor, size: int) -> tuple[list[float], list[float]]:
    """For sets of a size: the null of the evidence of label shift, and the best settings of EM and BBSE.

    Of the null, mean and variance, and the share by which both grow with each image: calibration made the mean
    predictions of the server's samples right, those of others are off by the error of a sample of that size.
    """
    logits, classes = predicted
    count = int(max(20, min(_SETS, _ELEMENTS // (size * len(source)))))
    generator = torch.Generator().manual_seed(size)
    mixes = _class_mixes(count, torch.bincount(classes, minlength=len(source)))
    drawn = torch.multinomial(_weights(mixes, classes), size, replacement=True, generator=generator)
    rows = classes.argsort(stable=True)[:: 1 + len(classes) * count * len(source) // _LOSSES]
    weights = _weights(mixes, classes[rows])

    def loss(priors: Tensor) -> float:
        """Mean negative log-likelihood of the users' samples under estimated priors."""
        shifted = logits[rows] + (priors / source).log()[:, None]
        losses = shifted.logsumexp(2) - shifted[:, torch.arange(len(rows)), classes[rows]]
        return float((losses * weights).sum(1).mean())

    def em(alpha: float, scale: float) -> Tensor:
        return em_priors(logits[drawn], source, alpha=alpha, scale=scale, max_iter=30, tol=1e-3)

    alpha, scale = min(((a, s) for a in _ALPHAS for s in _EM_SCALES), key=lambda settings: loss(em(*settings)))
    means = logits[drawn].softmax(2).mean(1)
    strength = min(_STRENGTHS, key=lambda s: loss(bbse_priors(means, matrix, source, strength=s)))
    as_server = _weights(source[None], classes).expand(count, -1)
    plain = logits[torch.multinomial(as_server, size, replacement=True, generator=generator)]
    estimated = em_priors(plain, source, alpha=alpha, scale=scale, max_iter=100, tol=1e-4)
    evidence = label_shift_evidence(plain, source, estimated)
    return [float(evidence.mean()), float(evidence.var()), 1 / len(classes)], [alpha, scale, strength]


def camera_fields(
    layer: HeadOf,
    images: tuple[Tensor, Tensor, Tensor],
    cameras: Sequence[Camera],
    unseen: Linear,
    reference: HeadReference,
) -> dict[str, Any]:
    """The fields of the reference for cameras, each of which is tested as if it were unknown.

    Args:
        layer: The head of the network.
        images: Inputs (n, channels, height, width) of samples, their features (n, d) and classes (n,).
        cameras: The cameras.
        unseen: A head that has not seen the samples.
        reference: The reference without cameras.
    """
    inputs, before, classes = images
    low, high = inputs.amin((0, 2, 3)), inputs.amax((0, 2, 3))
    parts = list(zip(torch.split(inputs, _CAMERA_BATCH), torch.split(classes, _CAMERA_BATCH), strict=True))
    batches = ((on_inputs(camera, x, low, high), y) for camera in cameras for x, y in parts)
    features = torch.cat([found for _, found in layer.read(batches)]).view(len(cameras), len(inputs), -1)
    shifts = CameraShifts.of(before, list(features))
    span, mean, std = reference.span, reference.mean.double(), reference.std.double()
    numbers = torch.arange(len(cameras))

    def corrected(number: int, seen: Tensor) -> Linear:
        shift, ratio = shifts.select(numbers != number).predict(seen.mean(0) - mean, span, std)
        return standardized(unseen, mean + shift, ratio, mean, torch.ones_like(ratio))

    logits = torch.cat([corrected(k, features[k])(features[k]) for k in range(len(cameras))])
    scale = best_scale(logits, classes.repeat(len(cameras)))
    source, generator = reference.class_priors.double(), torch.Generator().manual_seed(0)
    evidence = torch.zeros(len(cameras))
    for number in range(len(cameras)):
        for _ in range(_CAMERA_SETS):
            seen = features[number][torch.randint(len(classes), (_CAMERA_SIZE,), generator=generator)]
            found = scale * corrected(number, seen)(seen)
            priors = em_priors(found, source, alpha=CAMERA_ALPHA)
            evidence[number] += float(label_shift_evidence(found, source, priors)) / _CAMERA_SETS
    return {
        "camera_shifts": shifts.shifts.half(),
        "camera_ratios": shifts.log_ratios.half(),
        "camera_evidence": evidence,
        "camera_scale": torch.tensor(scale),
    }
