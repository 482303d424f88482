"""The entries that each adaptation replaces, against plain computations on one layer of batch norm."""

import copy

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tiny_benchmark import Tiny, plain, with_norm
from torch import nn

from pl_personalize.adaptations import AdaptationSequence, Received, find_adaptation
from pl_personalize.adaptations.adaptation import load_entries
from pl_personalize.callbacks import AdaBNS
from pl_personalize.models import TaskNetwork

STATISTICS = ["running_mean", "running_var"]
MODEL, TASK = 2, 1
DATA = Tiny(images=10)


class Device:
    """The data of a user for a task, and plain SGD; notes what is trained."""

    def __init__(self, split=None):
        self.user, self.trained = "bob", []
        self.split = DATA.user_split("bob", TASK)[0] if split is None else split

    def images(self):
        return self.split.images.split(4)

    def labelled_images(self, seed):
        return list(zip(self.split.images.split(4), self.split.labels.split(4), strict=True))

    def server_images(self):
        images, labels = DATA.server_split(TASK)[1]
        return list(zip(images.split(4), labels.split(4), strict=True))

    def as_input(self, batch):
        return batch[0] if isinstance(batch, tuple) else batch

    def train(self, network, *, epochs, lr, seed, model, callbacks=()):
        self.trained.append((epochs, lr, seed, model, [type(callback) for callback in callbacks]))
        self.state_before = copy.deepcopy(network.state_dict())
        for callback in callbacks:  # only batch norm
            assert isinstance(callback, AdaBNS)
        only = network.body[1] if callbacks else network
        optimizer = torch.optim.SGD(only.parameters(), lr=lr)
        for _ in range(epochs):
            for x, y in self.labelled_images(seed):
                optimizer.zero_grad()
                F.cross_entropy(network.eval()(x), y).backward()
                optimizer.step()


def network(seed, make=with_norm):
    torch.manual_seed(seed)
    made = make(2)
    if make is with_norm:
        for name in ("weight", "bias", "running_mean"):
            torch.nn.init.normal_(getattr(made.body[1], name))
        torch.nn.init.uniform_(made.body[1].running_var, 0.5, 2)
    return made.eval()


def received(**options):
    bodies = [network(seed).body.state_dict() for seed in range(MODEL + 1)]
    experts = [network(10 + seed).body.state_dict() for seed in range(MODEL + 1)]
    return Received(MODEL, TASK, **({"seed": 3, "experts": experts, "bodies": bodies} | options))


def adapt(name, given=None, device=None, make=with_norm, **options):
    one = find_adaptation(name, options)
    return one.adapt(network(9, make), device or Device(), given or received())


def features(images):
    return network(9).body[0](images)


def assert_entries(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_none_replaces_nothing():
    assert adapt("none") == {}


def test_statistics_of_the_last_expert():
    last = received().experts[-1]
    assert_entries(adapt("last"), {f"body.1.{name}": last[f"1.{name}"] for name in STATISTICS})
    assert adapt("last", received(experts=())) == {}  # no merge keeps its own


def test_statistics_of_the_expert_of_the_task():
    one = received().experts[TASK]
    assert_entries(adapt("expert"), {f"body.1.{name}": one[f"1.{name}"] for name in STATISTICS})


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 5.0]])
def test_statistics_of_the_mixture_of_the_experts(weights):
    given = received(weights=weights)
    means, variances = (torch.stack([one[f"1.{name}"] for one in given.experts]) for name in STATISTICS)
    share = torch.tensor(weights or [1.0] * 3)[:, None] / sum(weights or [1.0] * 3)
    mean = (share * means).sum(0)
    variance = (share * (variances + means**2)).sum(0) - mean**2
    assert_entries(adapt("average", given), {"body.1.running_mean": mean, "body.1.running_var": variance})


def test_the_published_code_takes_scales_and_shifts_of_the_earlier_model():
    given = received()
    earlier, last = given.bodies[TASK], given.experts[-1]
    expected = {f"body.1.{name}": earlier[f"1.{name}"] for name in ("weight", "bias")}
    assert_entries(adapt("reference"), expected | {f"body.1.{name}": last[f"1.{name}"] for name in STATISTICS})


@pytest.mark.parametrize("prior_samples", [0, 7])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", ["recalibrate", "AdaBN"])
def test_statistics_are_those_of_the_images(name, exact, prior_samples):
    images = DATA.server_split(TASK)[1].images if name == "recalibrate" else Device().split.images
    layer, values = network(9).body[1], features(images)
    n = len(values)
    mean = (prior_samples * layer.running_mean + n * values.mean(0)) / (prior_samples + n)
    variance = (prior_samples * layer.running_var + n * values.var(0)) / (prior_samples + n)
    found = adapt(name, exact=exact, prior_samples=prior_samples)
    assert_entries(found, {"body.1.running_mean": mean.detach(), "body.1.running_var": variance.detach()})


def test_supervised_adabn_trains_scales_and_shifts_on_the_new_statistics():
    device = Device()
    found = adapt("AdaBN-S", device=device, epochs=3, lr=0.2)
    ((epochs, lr, _, model, callbacks),) = device.trained
    assert (epochs, lr, model, callbacks) == (3, 0.2, MODEL, [AdaBNS])

    statistics = adapt("AdaBN")
    assert all(torch.equal(device.state_before[name], value) for name, value in statistics.items())
    assert found.keys() == statistics.keys() | {"body.1.weight", "body.1.bias"}
    assert all(torch.equal(found[name], value) for name, value in statistics.items())
    by_hand = network(9)
    load_entries(by_hand, statistics)
    Device().train(by_hand, epochs=3, lr=0.2, seed=0, model=0, callbacks=[AdaBNS("keep")])
    assert_entries(found, statistics | {f"body.1.{n}": getattr(by_hand.body[1], n).data for n in ("weight", "bias")})


@pytest.mark.parametrize("make", [plain, with_norm])
def test_fine_tuning_replaces_everything(make):
    device = Device()
    found = adapt("FT", device=device, make=make, epochs=2, lr=0.3)
    by_hand = network(9, make)
    Device().train(by_hand, epochs=2, lr=0.3, seed=0, model=0)
    assert_entries(found, by_hand.state_dict())
    ((epochs, lr, _, model, callbacks),) = device.trained
    assert (epochs, lr, model, callbacks) == (2, 0.3, MODEL, [])
    assert not torch.equal(found["head.weight"], network(9, make).head.weight)


def test_early_adabn_adapts_the_first_layers():
    def deep(classes):
        layers = [layer for _ in range(2) for layer in (nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU())]
        return TaskNetwork(nn.Sequential(*layers), nn.Linear(4, classes))

    device, received = Device(), Received(MODEL, TASK)
    every, half, few = (
        find_adaptation(name, options).adapt(network(0, deep), device, received)
        for name, options in (("AdaBN", {}), ("early-AdaBN", {"depth": 0.5}), ("early-AdaBN", {}))
    )
    assert half.keys() == few.keys() == {f"body.1.{name}" for name in STATISTICS}
    assert every.keys() == half.keys() | {f"body.4.{name}" for name in STATISTICS}
    for name, value in half.items():
        assert torch.equal(value, every[name])
    with pytest.raises(MisconfigurationException, match="depth must be positive, and at most 1; got 2"):
        find_adaptation("early-AdaBN", {"depth": 2})


@pytest.mark.parametrize("name", ["FT", "AdaBN-S"])
def test_the_seed_of_a_training_follows_from_those_of_run_and_task(name):
    seeds = []
    for options in ({}, {}, {"seed": 4}, {"task": 0}):
        device, given = Device(), {"model": MODEL, "task": TASK, "seed": 3} | options
        adapt(name, Received(**given), device)
        seeds.append(device.trained[0][2])
    assert seeds[0] == seeds[1]
    assert len(set(seeds)) == 3


@pytest.mark.parametrize("names", [["recalibrate", "AdaBN"], ["FT", "AdaBN"], ["AdaBN", "FT", "recalibrate"]])
def test_a_sequence_is_its_steps_one_after_the_other(names):
    options = {"prior_samples": 5.0}  # so that each step depends on the one before
    found = adapt("+".join(names), **options)
    model, expected = network(9), {}
    for name in names:
        (step,) = find_adaptation(name, options if name != "FT" else {}).steps
        entries = {key: value.clone() for key, value in step.adapt(model, Device(), received()).items()}
        model.load_state_dict(entries, strict=False)
        expected |= entries
    assert_entries(found, expected)
    alone = adapt(names[-1], **options)
    assert any(not torch.equal(value, found[name]) for name, value in alone.items())


def test_what_a_sequence_found_is_not_the_networks_own():
    model = network(9)
    found = find_adaptation("FT").adapt(model, Device(), received())
    before = {name: value.clone() for name, value in found.items()}
    with torch.no_grad():
        for value in model.state_dict().values():
            value.zero_()
    assert_entries(found, before)
    assert not any(value.requires_grad for value in found.values())


def test_data_that_do_not_allow_it_are_named_with_adaptation_and_task():
    empty = Device(type(Device().split)(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)))
    with pytest.raises(MisconfigurationException, match="The adaptation 'AdaBN' failed on task 2: "):
        adapt("recalibrate+AdaBN", device=empty)


def test_nothing_is_done_without_steps():
    assert AdaptationSequence(()).adapt(network(9), Device(), received()) == {}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"body.1.gamma": torch.zeros(5)}, r"The entry 'body\.1\.gamma' of shape \(5,\) is not there"),
        ({"body.1.weight": torch.zeros(1)}, r"The entry 'body\.1\.weight' of shape \(1,\) is \(5,\) there"),
    ],
)
def test_entries_that_do_not_fit_are_refused_and_nothing_is_loaded(entries, message):
    model = network(9)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        load_entries(model, {"body.1.bias": torch.ones(5)} | entries)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
