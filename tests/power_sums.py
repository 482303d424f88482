"""Power sums of per-sample gradients, by the engine and one sample at a time."""

import torch

from pl_personalize.functional.batches import call_model
from pl_personalize.per_sample.power_sums import PerSamplePowerSums


def engine_of(model, power=1, forward=call_model, max_scratch_bytes=2**20, parameters=None):
    return PerSamplePowerSums(
        model,
        parameters or dict(model.named_parameters()),
        power=power,
        forward=forward,
        max_scratch_bytes=max_scratch_bytes,
    )


def directions(logits, count=1):
    """Fixed gradients of an objective with respect to the logits, different for each entry."""
    return [(logits + k).sin() + 0.5 for k in range(count)]


def naive_sums(model, x, power, count=1):
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for i in range(x.shape[0]):
        logits = model.eval()(x[i : i + 1])
        for direction in directions(logits.detach(), count):
            gradients = torch.autograd.grad(
                logits, list(parameters.values()), direction, retain_graph=True, materialize_grads=True
            )
            for name, gradient in zip(parameters, gradients, strict=True):
                total[name] += gradient.abs() ** power
    return total


def sums_of(model, batches, power=1, count=1, **options):
    with engine_of(model, power, **options) as engine:
        for batch in batches:
            engine.add(batch, batch.shape[0], lambda logits: directions(logits, count))
    return engine.sums, engine.routes
