"""Forms of batches and outputs, modes of the caller, several processes, and progress."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from networks import labelled_batches, make_network
from reference import relative_error
from torch import nn

from pl_personalize import estimate_importance

# What a batch may be, and the state of the caller


class _Keywords(nn.Module):
    def __init__(self, network, wrap=lambda logits: logits):
        super().__init__()
        self.network, self.wrap = network, wrap

    def forward(self, pixels, shift=0.0):
        return self.wrap(self.network(pixels + shift))


@pytest.mark.parametrize("reduction", ["sample", "batch"])
@pytest.mark.parametrize(
    ("as_batch", "wrap", "forward"),
    [
        pytest.param(lambda x, y: [x, y], lambda z: z, None, id="list"),
        pytest.param(lambda x, y: {"pixels": x, "labels": y}, lambda z: z, None, id="dict"),
        pytest.param(lambda x, y: {"y": y, "shift": torch.zeros(1), "pixels": x}, lambda z: z, None, id="dict, more"),
        pytest.param(lambda x, y: (x, y), lambda z: SimpleNamespace(logits=z), None, id="logits"),
        pytest.param(lambda x, y: (x, y), lambda z: {"logits": z, "loss": 0}, None, id="logits in a dict"),
        pytest.param(lambda x, y: (x, y), lambda z: (0, z), lambda m, batch: m(batch[0])[1], id="forward"),
        pytest.param(lambda x, y: ({"i": x}, y), lambda z: z, lambda m, batch: m(batch[0]["i"]), id="nested"),
    ],
)
def test_batches_and_outputs_of_all_forms(as_batch, wrap, forward, reduction):
    network, x = make_network("mlp", 5)
    batches = labelled_batches(x, [3, 2])
    right = estimate_importance(network, batches, "empirical_fisher", reduction=reduction)

    importance = estimate_importance(
        _Keywords(network, wrap),
        [as_batch(*batch) for batch in batches],
        "empirical_fisher",
        module="network",
        forward=forward,
        reduction=reduction,
    )

    assert relative_error(importance, right) <= 1e-12


@pytest.mark.parametrize("reduction", ["sample", "batch"])
@pytest.mark.parametrize("name", ["mlp", "batch_norm", "attention", "data_dependent"])
@pytest.mark.parametrize(
    "caller",
    [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16), torch.enable_grad],
    ids=["inference_mode", "no_grad", "autocast", "enable_grad"],
)
def test_the_callers_modes_do_not_matter(name, caller, reduction):
    model, x = make_network(name, 5, torch.float32)
    right = estimate_importance(model, x.split(3), "mas", reduction=reduction)

    with caller():
        importance = estimate_importance(model, x.split(3), "mas", reduction=reduction)

    assert relative_error(importance, right) == 0.0
    # Later a penalty trains with them, and autograd refuses tensors made in inference mode.
    assert not any(value.is_inference() or value.requires_grad for value in importance.values())
    weights = torch.ones_like(importance[next(iter(importance))], requires_grad=True)
    (importance[next(iter(importance))] * weights).sum().backward()


@pytest.mark.parametrize("reduction", ["sample", "batch"])
@pytest.mark.parametrize("name", ["mlp", "attention"])
def test_batches_made_in_inference_mode_or_with_gradients(name, reduction):
    model, x = make_network(name, 5)
    right = estimate_importance(model, [x], "mas", reduction=reduction)
    with torch.inference_mode():
        made = x.clone()

    for batch in (made, x.clone().requires_grad_()):
        importance = estimate_importance(model, [{"input": batch}, batch][1:], "mas", reduction=reduction)
        assert relative_error({n: v.detach() for n, v in importance.items()}, right) <= 1e-12
        assert not any(value.requires_grad for value in importance.values())
    assert made.is_inference()


# Several processes, and progress


@pytest.mark.parametrize(
    ("kind", "reduction"), [("mas", "sample"), ("empirical_fisher", "sample"), ("mas", "batch"), ("fisher", "batch")]
)
def test_all_reduce_gives_the_importance_of_all_processes_data(kind, reduction):
    """Two processes of different size; what the other one sends is recorded first."""
    model, x = make_network("batch_norm", 8)
    batches = labelled_batches(x, [3, 3, 2])
    if kind == "fisher":  # labels are drawn: make each batch draw the same on any process
        nn.init.zeros_(model[11].weight), nn.init.constant_(model[11].bias, 0.0)
        model[11].bias.data[1] = 100.0
    sent = []
    estimate_importance(
        model, batches[:1], kind, reduction=reduction, all_reduce=lambda total: (sent.append(total.clone()), total)[1]
    )
    received = iter(sent)

    importance = estimate_importance(
        model, batches[1:], kind, reduction=reduction, all_reduce=lambda total: total + next(received)
    )

    right = estimate_importance(model, batches, kind, reduction=reduction)
    assert next(received, None) is None
    assert importance.num_samples == 8
    assert relative_error(importance, right) <= 1e-10


def test_a_process_without_data_takes_part():
    model, x = make_network("mlp", 8)
    sent = []
    estimate_importance(model, [x], "mas", all_reduce=lambda total: (sent.append(total.clone()), total)[1])
    received = iter(sent)

    importance = estimate_importance(model, [], "mas", all_reduce=lambda total: total + next(received))

    assert importance.num_samples == 8
    assert relative_error(importance, estimate_importance(model, [x], "mas")) <= 1e-12


@pytest.mark.parametrize("progress", [True, False])
def test_progress_writes_nothing_for_a_short_pass(capfd, progress):
    model, x = make_network("mlp", 4)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimate_importance(model, [x], "mas", progress=progress)

    assert capfd.readouterr() == ("", "")
