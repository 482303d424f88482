"""Merging on a device equals estimating importances there and merging on a server, whatever is kept in files."""

import copy
import tempfile

import pytest
import torch
from torch import nn

from pl_personalize import estimate_importance, merge, merge_on_device
from pl_personalize.models import TaskNetwork, cnn_bn, mlp


def _experts(count=3):
    """Experts of tasks with different numbers of classes."""
    experts = []
    for k in range(count):
        torch.manual_seed(k)
        experts.append(mlp((6,), k + 2, hidden=(8, 5)))
    return experts


def _images(experts, *shape):
    return [[torch.randn(4, *(shape or (6,))), torch.randn(3, *(shape or (6,)))] for _ in experts]


def _by_a_server(experts, images, kind, module, **options):
    importances = [estimate_importance(e, x, kind, module=module) for e, x in zip(experts, images, strict=True)]
    parts = experts if module is None else [expert.get_submodule(module) for expert in experts]
    return merge([part.state_dict() for part in parts], importances, **options)


def _same(one, other):
    assert list(one) == list(other)
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=0, atol=0)


@pytest.mark.parametrize("max_memory_mb", [256, 0.0005, 0])
@pytest.mark.parametrize("kind", ["mas", "fisher"])
def test_a_device_merges_as_a_server_does(kind, max_memory_mb):
    experts = _experts()
    images = _images(experts)
    expected = _by_a_server(experts, images, kind, "body")
    before = copy.deepcopy([expert.state_dict() for expert in experts])

    merged = merge_on_device(experts, images, kind, module="body", max_memory_mb=max_memory_mb)

    _same(merged, expected)
    for expert, state in zip(experts, before, strict=True):
        _same(expert.state_dict(), state)


@pytest.mark.parametrize("max_memory_mb", [256, 0])
def test_experts_may_be_loaded_one_after_the_other_into_one_module(max_memory_mb):
    """Statistics of batch norm come from the last expert, and the result has the versions of the modules."""
    experts = []
    for k in range(2):
        torch.manual_seed(k)
        expert = cnn_bn((3, 8, 8), 2).eval()
        for layer in expert.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.normal_()
        experts.append(expert)
    images = _images(experts, 3, 8, 8)
    expected = _by_a_server(experts, images, "mas", None)

    def loaded():
        network = copy.deepcopy(experts[0])
        for expert in experts:
            network.load_state_dict(expert.state_dict())
            yield network

    merged = merge_on_device(loaded(), iter(images), "mas", max_memory_mb=max_memory_mb)

    _same(merged, expected)
    assert dict(merged._metadata) == dict(expected._metadata)


def test_options_reach_the_estimate_and_the_merge():
    experts = _experts(2)
    images = _images(experts)
    out = {name: torch.zeros_like(value) for name, value in experts[0].body.state_dict().items()}
    importances = [
        estimate_importance(e, x, "fisher", module="body", draws="all", generator=3)
        for e, x in zip(experts, images, strict=True)
    ]
    expected = merge([e.body.state_dict() for e in experts], importances, normalize="max")

    merged = merge_on_device(
        experts, images, "fisher", module="body", draws="all", generator=3, normalize="max", out=out
    )

    _same(merged, expected)
    assert all(merged[name] is out[name] for name in out)


def test_no_file_is_left(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    experts = _experts(2)
    made = []

    def spied():
        for expert in experts:
            yield expert
            made.append(len(list(tmp_path.glob("*/*.safetensors"))))

    merge_on_device(spied(), _images(experts), "mas", module="body", max_memory_mb=0)
    assert made == [2, 4]  # the importances and the weights of each expert
    assert not list(tmp_path.iterdir())

    with pytest.raises(ValueError, match="Expert 2: The dataloader has no samples"):
        merge_on_device(iter(experts), [[torch.randn(2, 6)], []], "mas", module="body", max_memory_mb=0)
    assert not list(tmp_path.iterdir())


def test_entries_that_are_no_tensors_stay_in_memory():
    class Noted(nn.Linear):
        def get_extra_state(self):
            return {"note": 1}

        def set_extra_state(self, state):
            pass

    experts = [Noted(6, 2) for _ in range(2)]
    merged = merge_on_device(iter(experts), _images(experts), "mas", max_memory_mb=0)
    assert merged["_extra_state"] == {"note": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda experts, images: ([], []), "no experts to merge"),
        (lambda experts, images: (experts, images[:1]), "no images for expert 2"),
        (lambda experts, images: (experts[:1], images), "more than the 1 experts"),
        (lambda experts, images: (experts, [images[0], [torch.full((2, 6), torch.nan)]]), "Expert 2: "),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    experts = _experts(2)
    with pytest.raises(ValueError, match=message):
        merge_on_device(*change(experts, _images(experts)), "mas", module="body")


def test_experts_of_different_architectures_are_refused():
    experts = [TaskNetwork(nn.Linear(6, width), nn.Linear(width, 2)) for width in (3, 4)]
    with pytest.raises(ValueError, match="only models of one architecture can be merged"):
        merge_on_device(experts, _images(experts), "mas", module="body")
