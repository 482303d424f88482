"""Refitting a head to the body that it was merged with, on the server."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
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
from pl_personalize.functional.feature_shift import (
    CameraShifts,
    covariate_statistic,
    nearest_centers,
    outside_directions,
    span_basis,
    standardized,
)
from pl_personalize.functional.label_shift import bbse_priors, confusion, em_priors, label_shift_evidence
from pl_personalize.functional.names import some
from pl_personalize.heads.cameras import Camera, on_inputs, random_cameras
from pl_personalize.heads.features import Gather, HeadOf, read_everywhere, written
from pl_personalize.heads.reference import HeadReference, head_fingerprint

SIZES = (10, 40, 160)
_SETS, _ELEMENTS, _LOSSES = 100, 100_000, 1_000_000  # simulated users of a size, their logits and losses at most
_CONCENTRATION = 0.5  # of their class mixes
_ALPHAS, _EM_SCALES = (1.0, 2.0, 4.0, 8.0), (1.0, 1.5, 2.0)
_STRENGTHS = (0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
_FOLDS = 5
_GROUPS, _GROUP_SIZE, _CLUSTERED = 16, 8, 2000  # clusters of a class at most, their samples, and the class's samples
CAMERA_ALPHA = 2.0  # pseudo-counts where a camera was corrected
_CAMERA_BATCH, _CAMERA_SETS, _CAMERA_SIZE = 64, 6, 80  # simulated users of each camera, and their images
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
        samples = _Samples(torch.cat([kept.double(), features]), torch.cat([kept_classes, classes]))
        factor, bias, left_out = _cross_calibration(everything, shrinkage, *samples)
        trained = [layer.linear] if _is_candidate(layer.linear, final) else []
        candidates = [discriminant.scaled(factor, bias), *trained]
        weights = _combination(candidates, features, classes)
        unseen = combined(candidates, weights)  # which has not seen the validation samples
        refitted = combined([final.scaled(factor, bias), *trained], weights)
        predicted = _Predicted(unseen(features), classes)
        if left_out is not None and not any(weights[1:]):
            predicted = _Predicted(weights[0] * left_out, samples.classes)
        reference = _reference(everything, samples, len(classes), predicted, directions)
        if not reference.can_tell_cameras:
            rank_zero_warn(
                f"The {len(everything.counts)} class means span the {features.shape[1]} features of the head "
                f"{layer.name!r}, or there are too few validation samples: devices cannot tell another camera from "
                "other class frequencies. adapt_head then finds no shift; pass shift='label' if cameras do not differ."
            )
        if chosen is not None:
            taken = random_cameras(cameras) if isinstance(cameras, int) else cameras
            reference = replace(reference, **_cameras(layer, chosen, taken, unseen, reference))
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


class _Samples(NamedTuple):
    features: Tensor
    classes: Tensor


class _Predicted(NamedTuple):
    """Calibrated logits (n, K) of samples by heads that have not seen them, and their classes (n,)."""

    logits: Tensor
    classes: Tensor


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

    def gathered(self, gather: Gather) -> _Chosen:
        """The first samples of all processes."""
        found = _Chosen(self._count)
        parts = torch.stack(self.inputs), torch.stack(self.features), torch.tensor(self.classes)
        found._keep(*map(gather, parts))
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


def _reference(
    moments: ClassMoments, samples: _Samples, num_val: int, predicted: _Predicted, directions: int
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


def _prior_null(predicted: _Predicted, source: Tensor, matrix: Tensor, size: int) -> tuple[list[float], list[float]]:
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


def _cameras(
    layer: HeadOf, chosen: _Chosen, cameras: Sequence[Camera], unseen: Linear, reference: HeadReference
) -> dict[str, Any]:
    """The fields of the reference for cameras, each of which is tested as if it were unknown."""
    inputs, before, classes = torch.stack(chosen.inputs), torch.stack(chosen.features), torch.tensor(chosen.classes)
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
