"""Refitting a head to the body that it was merged with, on the server."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pl_personalize.functional.batches import Forward, Labels, batch_labels
from pl_personalize.functional.discriminant import (
    SHRINKAGES,
    ClassMoments,
    Linear,
    best_scale,
    calibration,
    linear_discriminant,
    negative_log_likelihood,
)
from pl_personalize.functional.feature_shift import outside_directions
from pl_personalize.functional.label_shift import em_priors, label_shift_evidence
from pl_personalize.functional.names import some
from pl_personalize.heads.features import Gather, HeadOf
from pl_personalize.heads.reference import HeadReference, head_fingerprint

SIZES = (5, 10, 20, 40, 80, 160, 320)
_SETS = 200  # simulated users of each size
_ALPHAS, _EM_SCALES = (1.0, 2.0, 4.0, 8.0), (1.0, 1.5, 2.0)
_FOLDS = 5


def refit_head(
    model: nn.Module,
    train: Iterable[Any],
    val: Iterable[Any],
    *,
    head: str | None = None,
    forward: Forward | None = None,
    labels: Labels | None = None,
    directions: int = 40,
    gather: Gather | None = None,
    progress: bool = False,
) -> HeadReference:
    r"""Refit the last layer of a network to its features, in place and in closed form.

    Merging changes the features that a head was trained on. The new head is linear discriminant analysis on the
    features of the merged body: class means and a shrunk, pooled within-class covariance. The shrinkage has the least
    negative log-likelihood on the validation samples; the same samples calibrate the logits (scale, and a small bias
    for each class) and choose by cross-validation among the trained head, the discriminant, and the sum of both. With
    the shrinkage and the calibration found, the moments of all samples are used.

    The data are read once, in eval mode. Only the weight and the bias of the last layer change.

    Args:
        model: Any module that returns logits (n, K), linear in the input of its last linear layer or 1×1 convolution
            (averaged over positions).
        train: Batches of the server's training samples with labels from 0 to K - 1, without augmentation.
        val: Batches of the server's validation samples, which no weight was trained on.
        head: Name of the last layer; by default the last linear layer or convolution that a forward pass calls.
        forward: ``(model, batch) -> logits``, if calling the model on the input is not enough.
        labels: Labels in a batch: a function of it, an index, or a key; by default the second of two items.
        directions: Number of directions in which covariate shift is tested.
        gather: Concatenates the rows of a tensor over processes that each hold part of the data, all of which must
            call this function.
        progress: Show a progress bar if a pass takes more than two seconds.

    Returns:
        What a device needs to know of the server's data to adapt the head, see :func:`adapt_head`.

    Raises:
        ValueError: If there are no samples, a class of the head has no training samples, a label is no class of the
            head, a feature is not finite, all features are constant, or the network is not linear in its features. The
            model is then unchanged.
    """
    layer = HeadOf(model, head, forward)
    moments = _moments(layer, train, labels, progress)
    moments = ClassMoments(*(_summed(part, gather) for part in moments))
    features, classes = _samples(layer, val, labels, progress)
    if gather is not None:
        features, classes = gather(features), gather(classes)
    trained = layer.linear
    num_classes = len(trained.bias)
    _check_samples(moments, classes, num_classes)

    shrinkage, discriminant = _best_discriminant(moments, features, classes)
    everything = moments.plus(ClassMoments.of(features, classes, num_classes))
    final = linear_discriminant(everything, shrinkage)
    assert final is not None
    honest, refitted = _calibrated([trained, discriminant], [trained, final], features, classes)
    reference = _reference(everything, features, honest(features), classes, refitted, directions)
    layer.write(refitted)
    return reference


def _moments(layer: HeadOf, batches: Iterable[Any], labels: Labels | None, progress: bool) -> ClassMoments:
    total: ClassMoments | None = None
    for batch, features in layer.read(batches, progress=progress):
        found = ClassMoments.of(features, _labels(batch, labels, len(features), layer), len(layer.linear.bias))
        total = found if total is None else total.plus(found)
    if total is None:
        raise ValueError("There are no training samples: pass batches of samples with labels.")
    return total


def _samples(layer: HeadOf, batches: Iterable[Any], labels: Labels | None, progress: bool) -> tuple[Tensor, Tensor]:
    parts = [
        (features, _labels(batch, labels, len(features), layer))
        for batch, features in layer.read(batches, progress=progress)
    ]
    if not parts:
        raise ValueError("There are no validation samples: pass batches of samples with labels.")
    features, classes = zip(*parts, strict=True)
    return torch.cat(features), torch.cat(classes)


def _labels(batch: Any, labels: Labels | None, count: int, layer: HeadOf) -> Tensor:
    found = batch_labels(batch, labels).detach().cpu()
    num_classes = len(layer.linear.bias)
    if found.shape != (count,) or found.is_floating_point():
        raise ValueError(f"Labels must be {count} class indices, (n,); got {found.dtype} of shape {tuple(found.shape)}.")
    if found.min() < 0 or found.max() >= num_classes:
        raise ValueError(f"The head has the classes 0 to {num_classes - 1}; labels go from {found.min()} to {found.max()}.")
    return found.long()


def _summed(value: Tensor, gather: Gather | None) -> Tensor:
    return value if gather is None else gather(value[None]).sum(0)


def _check_samples(moments: ClassMoments, classes: Tensor, num_classes: int) -> None:
    if missing := (moments.counts == 0).nonzero()[:, 0].tolist():
        raise ValueError(
            f"There are no training samples of the classes {some(missing)} of the head's {num_classes} classes. Pass "
            "samples of every class, or give the head only the classes that there are."
        )
    if not moments.within.diagonal().sum() > 1e-12 * moments.squares.diagonal().sum():
        raise ValueError("The features are constant within every class, so they have no covariance: check the model.")


def _best_discriminant(moments: ClassMoments, features: Tensor, classes: Tensor) -> tuple[float, Linear]:
    """The shrinkage with the least negative log-likelihood on validation samples, and its classifier."""
    best: tuple[float, float, Linear] | None = None
    for shrinkage in SHRINKAGES:
        found = linear_discriminant(moments, shrinkage)
        if found is None:
            continue
        logits = found(features)
        loss = negative_log_likelihood(logits * best_scale(logits, classes), classes)
        if best is None or loss < best[0]:
            best = loss, shrinkage, found
    assert best is not None  # with shrinkage 1, the covariance is a multiple of the identity
    return best[1:]


def _calibrated(
    candidates: list[Linear], final: list[Linear], features: Tensor, classes: Tensor
) -> tuple[Linear, Linear]:
    """The best combination of the candidates, and the same combination of the final ones, calibrated.

    Candidates did not see the validation samples; the final ones may have.
    """
    logits = [candidate(features) for candidate in candidates]
    folds = torch.arange(len(classes)) % _FOLDS
    best: tuple[float, tuple[int, ...]] | None = None
    for chosen in ((0,), (1,), (0, 1)):
        loss = 0.0
        for fold in range(_FOLDS):
            inside, outside = folds != fold, folds == fold
            if not outside.any() or not inside.any():
                continue
            factors, bias = calibration([logits[k][inside] for k in chosen], classes[inside])
            combined = sum((f * logits[k][outside] for f, k in zip(factors, chosen, strict=True)), bias)
            loss += float(F.cross_entropy(combined, classes[outside], reduction="sum"))
        if best is None or loss < best[0]:
            best = loss, chosen
    assert best is not None
    factors, bias = calibration([logits[k] for k in best[1]], classes)

    def combine(parts: list[Linear]) -> Linear:
        weight = sum(f * parts[k].weight for f, k in zip(factors, best[1], strict=True))
        shift = sum(f * parts[k].bias for f, k in zip(factors, best[1], strict=True))
        return Linear(weight, shift + bias)  # type: ignore[arg-type]

    return combine(candidates), combine(final)


def _reference(
    moments: ClassMoments, features: Tensor, logits: Tensor, classes: Tensor, refitted: Linear, directions: int
) -> HeadReference:
    """The reference, whose limits come from simulated users: validation samples drawn with replacement."""
    mean, std = features.mean(0), features.std(0, correction=0)
    rows = outside_directions(moments, directions)
    scores = (features - mean) @ rows.T
    generator = torch.Generator().manual_seed(0)
    present = torch.bincount(classes, minlength=len(moments.counts))
    priors = present / present.sum()
    camera, prior, settings = [], [], []
    for size in SIZES:
        count = int(max(20, min(_SETS, 4e6 // (size * len(priors)))))
        mixes = _dirichlet(0.5, count, present)
        drawn = torch.multinomial(_sample_weights(mixes, classes, present), size, replacement=True, generator=generator)
        statistic = size * scores[drawn].mean(1).square().sum(1)
        camera.append([float(statistic.mean()), float(statistic.var())])
        alpha, scale = _best_settings(logits, classes, moments.priors, mixes, drawn, present)
        settings.append([alpha, scale])
        plain = torch.randint(len(classes), (count, size), generator=generator)
        estimated = em_priors(logits[plain], moments.priors, alpha=alpha, scale=scale, max_iter=100)
        evidence = label_shift_evidence(logits[plain], moments.priors, estimated)
        prior.append([float(evidence.mean()), float(evidence.var())])
    return HeadReference(
        moments.priors.float(),
        mean.float(),
        std.float(),
        rows.float(),
        torch.tensor(SIZES),
        torch.tensor(camera),
        torch.tensor(prior),
        torch.tensor(settings),
        num_samples=len(classes),
        fingerprint=head_fingerprint(refitted),
    )


def _dirichlet(concentration: float, count: int, present: Tensor) -> Tensor:
    """Random class mixes (count, K) of the classes that are present."""
    raw = np.random.default_rng(0).gamma(concentration, size=(count, len(present))) + 1e-12
    mixes = torch.from_numpy(raw) * (present > 0)
    return mixes / mixes.sum(1, keepdim=True)


def _sample_weights(mixes: Tensor, classes: Tensor, present: Tensor) -> Tensor:
    """The probability (count, n) of each sample under class mixes."""
    return (mixes / present.clamp_min(1))[:, classes]


def _best_settings(
    logits: Tensor, classes: Tensor, source: Tensor, mixes: Tensor, drawn: Tensor, present: Tensor
) -> tuple[float, float]:
    """Pseudo-counts and scale of EM whose priors give the simulated users the least negative log-likelihood."""
    weights = _sample_weights(mixes, classes, present)
    best: tuple[float, float, float] | None = None
    for alpha in _ALPHAS:
        for scale in _EM_SCALES:
            priors = em_priors(logits[drawn], source, alpha=alpha, scale=scale, max_iter=50, tol=1e-4)
            shifted = logits + (priors / source).log()[:, None]
            losses = -shifted.log_softmax(2)[:, torch.arange(len(classes)), classes]
            loss = float((losses * weights).sum(1).mean())
            if best is None or loss < best[0]:
                best = loss, alpha, scale
    assert best is not None
    return best[1:]
