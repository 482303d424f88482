"""Refitted and adapted heads as adaptations, also of several tasks together and in a run."""

import csv
from dataclasses import replace

import pytest
import torch
from head_cases import CAMERA, MIX, SERVER, accuracy, data, loader, network
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tiny_benchmark import Tiny, call, experiment, plain
from torch import nn

from pl_personalize import adapt_head, refit_head
from pl_personalize.adaptations import Case, Received, find_adaptation
from pl_personalize.models import TaskNetwork


class Device:
    """A user's images of a task."""

    user = "ann"

    def __init__(self, tensors=None):
        self.tensors = data(MIX, count=200, seed=5) if tensors is None else tensors

    def images(self):
        return loader(self.tensors[:1])

    def labelled_images(self, seed):
        return loader(self.tensors)

    def server_images(self, split="val"):
        return SERVER[split == "val"]

    def as_input(self, batch):
        return batch[0]


def adapted(name, device=None, **options):
    model = network()
    found = find_adaptation(name, options).adapt(model, device or Device(), Received(0, 0))
    return model, found


def test_refit_is_refit_head_and_sends_the_reference():
    model, expected = network(), network()
    reference = refit_head(expected, *SERVER)
    model, found = adapted("refit")
    assert {name for name in found if not name.startswith("sent.")} == {"head.weight", "head.bias"}
    assert torch.equal(found["head.weight"], expected.head.weight)
    assert torch.equal(model.head.weight, expected.head.weight)
    for name, value in reference.tensors.items():
        assert torch.equal(found[f"sent.reference.{name}"], value)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("priors", {"shift": "label"}),
        ("bbse", {"shift": "label", "estimator": "bbse"}),
        ("standardize", {"shift": "covariate"}),
        ("auto", {}),
    ],
)
def test_the_device_steps_are_adapt_head(name, options):
    expected = network()
    reference = refit_head(expected, *SERVER)
    adapt_head(expected, Device().images(), reference, **options)
    model, _ = adapted(f"refit+{name}")
    torch.testing.assert_close(model.head.weight, expected.head.weight)
    torch.testing.assert_close(model.head.bias, expected.head.bias)


def test_tasks_are_judged_together():
    devices = [Device(data(count=40, seed=seed, camera=0.25 * CAMERA)) for seed in (5, 6, 7)]
    cases = [Case(network(), device, Received(2, task)) for task, device in enumerate(devices)]
    found = find_adaptation("refit+auto").adapt_tasks(cases)
    expected = [network() for _ in devices]
    references = [refit_head(model, *SERVER) for model in expected]
    adapt_head(expected, [device.images() for device in devices], references)
    for one, model in zip(found, expected, strict=True):
        torch.testing.assert_close(one["head.bias"], model.head.bias)


def with_norm():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        body = nn.Sequential(nn.Linear(12, 30), nn.BatchNorm1d(30), nn.Tanh())
        return TaskNetwork(body, nn.Linear(30, 5))


def test_batch_norm_is_adapted_only_to_another_camera():
    for camera, changes in ((None, False), (CAMERA, True)):
        model = with_norm()
        device = Device(data(MIX if camera is None else None, count=300, seed=5, camera=camera))
        found = find_adaptation("recalibrate+refit+auto").adapt(model, device, Received(0, 0))
        recalibrated = find_adaptation("recalibrate").adapt(with_norm(), device, Received(0, 0))
        same = torch.equal(found["body.1.running_mean"], recalibrated["body.1.running_mean"])
        assert same != changes


@pytest.mark.parametrize(
    ("device", "adapted"),
    [
        (Device(data(MIX, count=300, seed=5)), False),
        (Device(data(count=300, seed=5)), False),
        (Device(data(count=300, seed=5, camera=CAMERA)), True),
    ],
)
def test_adabn_is_for_users_whose_images_differ_in_more_than_class_frequencies(device, adapted):
    found = find_adaptation("recalibrate+refit+tested-AdaBN").adapt(with_norm(), device, Received(0, 0))
    name = "AdaBN" if adapted else "recalibrate"
    expected = find_adaptation(name).adapt(with_norm(), device, Received(0, 0))
    refitted = find_adaptation("recalibrate+refit").adapt(with_norm(), device, Received(0, 0))
    torch.testing.assert_close(found["body.1.running_mean"], expected["body.1.running_mean"])
    assert torch.equal(found["head.weight"], refitted["head.weight"])
    assert find_adaptation("refit+tested-AdaBN").why_not(network()) == "'tested-AdaBN' needs a network with batch norm"


def test_bounds_are_no_worse_than_what_they_bound():
    test = data(MIX, count=3000, seed=6, camera=CAMERA)
    device = Device(data(MIX, count=300, seed=5, camera=CAMERA))
    names = ("refit", "refit+true-priors", "refit+true-moments", "refit+true-both")
    plain_, priors, moments, both = (accuracy(adapted(name, device)[0], test) for name in names)
    assert both > moments > plain_
    assert both > priors


def test_a_device_step_needs_the_server_step_before_it():
    assert find_adaptation("refit+priors").why_not(network()) is None
    for name in ("priors", "priors+refit", "FT+auto"):
        step = name.split("+")[-1] if name == "FT+auto" else "priors"
        assert find_adaptation(name).why_not(network()) == f"'{step}' must come after 'refit', as in 'refit+{step}'"


def test_options_are_checked():
    with pytest.raises(MisconfigurationException, match="refit: cameras must be 0 or more"):
        find_adaptation("refit", {"cameras": -1})


def test_in_a_run(tmp_path):
    options = {"data": Tiny(images=40), "methods": ["mean-IMM", "Experts", "Joint"], "network": plain}
    rows = call(tmp_path, adaptations=["none", "refit", "refit+auto"], **options)
    assert {row.label for row in rows} == {
        f"{method}{adaptation}"
        for method in ("mean-IMM", "Experts", "Joint")
        for adaptation in ("", "+refit", "+refit+auto")
    }
    kept = sorted(path.stem for path in (tmp_path / "adapted" / "experts" / "seed1").iterdir())
    assert kept == [
        *("ann-Experts-refit+auto", "ann-mean-IMM-refit+auto", "bob-Experts-refit+auto", "bob-mean-IMM-refit+auto"),
        *("server-Experts-refit", "server-mean-IMM-refit"),
    ]
    with open(tmp_path / "results.csv") as file:
        before = list(csv.DictReader(file))
    again = call(tmp_path, adaptations=["none", "refit", "refit+auto"], **options)
    with open(tmp_path / "results.csv") as file:
        assert list(csv.DictReader(file)) == before
    assert len(again) == len(rows)
    with pytest.raises(MisconfigurationException, match="'auto' must come after 'refit'"):
        call(tmp_path / "other", adaptations=["auto"], **options)
    assert replace(experiment(tmp_path / "third"), adaptations=("refit",)).adaptations == ("refit",)


def two_cameras():
    """A device of a user with one of the server's two cameras, and with preferences."""
    splits = []
    for count, seed in ((400, 1), (300, 2)):
        halves = data(count=count, seed=seed), data(count=count, seed=seed + 10, camera=CAMERA)
        splits.append(loader(tuple(torch.cat(parts) for parts in zip(*halves, strict=True))))
    device = Device(data(MIX, count=200, seed=5))
    device.server_images = lambda split="val": splits[split == "val"]
    return device


@pytest.mark.parametrize("name", ["auto", "tested-AdaBN"])
def test_batch_norm_is_left_to_users_with_one_of_the_servers_cameras(name):
    device = two_cameras()
    outcome = find_adaptation(f"recalibrate+refit+{name}").adapt(with_norm(), device, Received(0, 0))
    before = find_adaptation("recalibrate+refit").adapt(with_norm(), device, Received(0, 0))
    assert torch.equal(*(entries["body.1.running_mean"] for entries in (outcome, before)))
    assert torch.equal(outcome["head.bias"], before["head.bias"]) == (name == "tested-AdaBN")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("refit+auto+recalibrate", "'recalibrate' reads the server's images, and 'auto' before it stays on the user's"),
        ("refit+priors+refit", "'refit' reads the server's images, and 'priors' before it stays"),
        ("refit+priors+priors", "'priors' must come directly after 'refit'; 'priors' changes the network"),
        ("refit+true-priors+priors", "'priors' must come directly after 'refit'"),
        ("refit+FT+auto", "'auto' must come directly after 'refit'; 'FT' changes the network"),
        ("recalibrate+refit+early-AdaBN+auto", None),
        ("learned+refit+auto", None),
        ("FT+recalibrate", None),
    ],
)
def test_sequences_that_cannot_work_are_refused_at_once(name, why):
    torch.manual_seed(0)
    network = TaskNetwork(nn.Sequential(nn.Linear(12, 30), nn.BatchNorm1d(30)), nn.Linear(30, 5))
    found = find_adaptation(name).why_not(network)
    assert found == why or (found or "").startswith(why or "none")
