"""The sources of a merged model's batch-norm statistics, against models that are put together by hand."""

import copy
import re
from dataclasses import dataclass

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from pl_personalize import BatchNormStatistics, MergeModule, adapt_batchnorm, merge
from pl_personalize.adaptations import Adaptation, AdaptationSequence, find_adaptation
from pl_personalize.datamodules import TaskIncrementalDataModule
from pl_personalize.datamodules.base import LabelledImages
from pl_personalize.models import TaskNetwork
from pl_personalize.modules import SequenceEvaluator

TASKS = 3


class Images(TaskIncrementalDataModule):
    def __init__(self, user=None):
        super().__init__("abc", [("x", "y")] * TASKS, ["ann", "bob"], user=user, eval_batch_size=16)

    def split(self, *key, shift):
        generator = torch.Generator().manual_seed(hash(key) % 1000)
        labels = torch.randint(2, (24,), generator=generator)
        return LabelledImages(
            torch.randn(24, 3, 4, 4, generator=generator) * 2 + shift + labels[:, None, None, None], labels
        )

    def load_server(self, task):
        return self.split(task, 0, shift=task), self.split(task, 1, shift=task)

    def load_user(self, user, task):
        return self.split(user, task, 2, shift=3 * user + task), self.split(user, task, 3, shift=3 * user + task)


def expert(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(24, 5))
        body.append(nn.BatchNorm1d(5))
        for layer in (body[1], body[5]):
            for value in (layer.running_mean, layer.weight, layer.bias):
                nn.init.normal_(value)
            nn.init.uniform_(layer.running_var, 0.5, 2)
        return TaskNetwork(body, nn.Linear(5, 2))


EXPERTS = [expert(seed) for seed in range(TASKS)]
STATES = [one.state_dict() for one in EXPERTS]
RANDOM = torch.Generator().manual_seed(0)
IMPORTANCES = [{n: torch.rand(p.shape, generator=RANDOM) for n, p in one.body.named_parameters()} for one in EXPERTS]


def run(module, tmp_path, datamodule, **options):
    trainer(tmp_path, **options).test(module, datamodule=datamodule, verbose=False)
    return module


def trainer(tmp_path, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(accelerator="cpu", default_root_dir=tmp_path, **quiet, **options)


def by_hand(policy, t, i, data):
    """Merge of experts 0..t as it is used on task i."""
    network = copy.deepcopy(EXPERTS[i]).eval()
    bodies = [one.body.state_dict() for one in EXPERTS]
    network.body.load_state_dict(merge(bodies[: t + 1], IMPORTANCES[: t + 1]))
    for k in (1, 5):
        layer = network.body[k]
        means = torch.stack([body[f"{k}.running_mean"] for body in bodies[: t + 1]])
        variances = torch.stack([body[f"{k}.running_var"] for body in bodies[: t + 1]])
        if policy == "average":
            layer.running_mean.copy_(means.mean(0))
            layer.running_var.copy_((variances + means**2).mean(0) - means.mean(0) ** 2)
        elif policy == "expert":
            layer.running_mean.copy_(means[i])
            layer.running_var.copy_(variances[i])
        elif policy == "reference":
            earlier = merge(bodies[: i + 1], IMPORTANCES[: i + 1])
            layer.load_state_dict({"weight": earlier[f"{k}.weight"], "bias": earlier[f"{k}.bias"]}, strict=False)
    if policy == "AdaBN":
        adapt_batchnorm(network, data.user_split(data.user, i)[0].images.split(16))
    elif policy == "recalibrate":
        adapt_batchnorm(network, data.server_split(i)[1].images.split(16))
    return network


@pytest.mark.parametrize("policy", ["last", "average", "expert", "recalibrate", "AdaBN", "reference"])
@pytest.mark.parametrize("user", ["ann", "bob"])
def test_each_policy_is_what_it_says(policy, user, tmp_path):
    data = Images(user)
    module = run(MergeModule(expert(9), STATES, IMPORTANCES, bn_policy=policy), tmp_path, data)
    seen = []
    for t in range(TASKS):
        for i in range(t + 1):
            network = by_hand(policy, t, i, data)
            images, labels = data.user_split(user, i)[1]
            with torch.no_grad():
                hits = (network(images).argmax(1) == labels).float().mean()
            assert module.matrix[t, i].item() == pytest.approx(hits.item(), abs=1e-6), (t, i)
            expected = network.state_dict()
            assert module.adapted[t, i] or policy == "none"
            for name, value in module.adapted[t, i].items():
                torch.testing.assert_close(value, expected[name], msg=lambda text, name=name: f"{name}: {text}")
            seen.append(hits.item())
    assert len(set(seen)) > 2  # the data tell models apart


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("policy", ["AdaBN", "recalibrate"])
def test_statistics_are_re_estimated_in_the_precision_of_the_trainer(policy, exact, tmp_path):
    data = Images("ann")
    options = {"bn_policy": policy, "bn_options": {"exact": exact}}
    single = run(MergeModule(expert(9), STATES, IMPORTANCES, **options), tmp_path, data)
    double = run(MergeModule(expert(9), STATES, IMPORTANCES, **options), tmp_path, data, precision="64-true")
    for cell, statistics in single.adapted.items():
        for name, value in statistics.items():
            assert double.adapted[cell][name].dtype == torch.float64
            torch.testing.assert_close(double.adapted[cell][name], value.double(), rtol=1e-4, atol=1e-5)


def test_by_default_a_merge_adapts_to_the_user_if_it_can(tmp_path):
    chosen = run(MergeModule(expert(9), STATES, IMPORTANCES), tmp_path, Images("bob"))
    adapted = run(MergeModule(expert(9), STATES, IMPORTANCES, bn_policy="AdaBN"), tmp_path, Images("bob"))
    assert torch.equal(chosen.adapted[2, 1]["body.1.running_mean"], adapted.adapted[2, 1]["body.1.running_mean"])

    data = Images("bob")
    data.setup("test")
    alone = MergeModule(expert(9), STATES, IMPORTANCES)
    trainer(tmp_path).test(alone, data.test_dataloader(), verbose=False)  # no datamodule: nothing to adapt to
    averaged = MergeModule(expert(9), STATES, IMPORTANCES, bn_policy="average")
    trainer(tmp_path).test(averaged, data.test_dataloader(), verbose=False)
    assert alone.adapted == {}
    assert torch.equal(alone.matrix.nan_to_num(), averaged.matrix.nan_to_num())
    expected = BatchNormStatistics.average([BatchNormStatistics.of(one.body) for one in EXPERTS[:2]])
    for name, value in expected.items():
        torch.testing.assert_close(alone.load_bodies()[1][name], value)


def test_options_reach_the_estimate(tmp_path):
    options = {"exact": True, "prior_samples": 10}
    module = MergeModule(expert(9), STATES, bn_policy="AdaBN", bn_options=options)
    data = Images("ann")
    found = run(module, tmp_path, data).adapted[1, 1]
    network = copy.deepcopy(EXPERTS[1])
    network.body.load_state_dict(merge([one.body.state_dict() for one in EXPERTS[:2]]))
    BatchNormStatistics.average([BatchNormStatistics.of(one.body) for one in EXPERTS[:2]]).apply(network.body)
    expected = adapt_batchnorm(network, data.user_split("ann", 1)[0].images.split(5), module="body", **options)
    for name, value in expected.items():
        torch.testing.assert_close(found[f"body.{name}"], value)


def test_the_network_and_the_experts_are_left_as_they_were(tmp_path):
    network = expert(9)
    before = copy.deepcopy([network.state_dict(), *STATES])
    run(MergeModule(network, STATES, IMPORTANCES, bn_policy="AdaBN"), tmp_path, Images("ann"))
    for state, old in zip([network.state_dict(), *STATES], before, strict=True):
        assert all(torch.equal(state[name], old[name]) for name in old)


def test_for_each_task_only_statistics_are_kept(tmp_path):
    class Spy(MergeModule):
        def on_test_epoch_end(self):
            super().on_test_epoch_end()
            self.seen = dict(self._states)

    module = run(Spy(expert(9), STATES, IMPORTANCES, bn_policy="AdaBN"), tmp_path, Images("ann"))
    first, second = module.seen[2, 0], module.seen[2, 1]
    own = {name for name in first if first[name] is not second[name]}
    assert own == {f"body.{k}.{what}" for k in (1, 5) for what in ("running_mean", "running_var")} | {
        "head.weight",
        "head.bias",
    }


@pytest.mark.parametrize(
    ("policy", "averaged"), [("last", False), ("reference", False), ("average", True), (None, True)]
)
def test_the_statistics_of_an_export(policy, averaged):
    state = MergeModule(expert(9), STATES, bn_policy=policy).export()
    bodies = [one.body.state_dict() for one in EXPERTS]
    expected = (
        torch.stack([body["1.running_mean"] for body in bodies]).mean(0) if averaged else bodies[-1]["1.running_mean"]
    )
    torch.testing.assert_close(state["body.1.running_mean"], expected)


def test_layers_that_share_batch_norm(tmp_path):
    def shared(seed):
        one = expert(seed)
        norm = one.body[5]
        one.body = nn.Sequential(*one.body, nn.ReLU(), nn.Linear(5, 5), norm)
        return one

    experts = [shared(seed) for seed in range(TASKS)]
    network = shared(9)
    before = copy.deepcopy(network.state_dict())
    module = MergeModule(network, [one.state_dict() for one in experts], bn_policy="AdaBN")
    data = Images("ann")
    found = run(module, tmp_path, data).adapted[1, 0]
    merged = copy.deepcopy(experts[0])
    merged.body.load_state_dict(merge([one.body.state_dict() for one in experts[:2]]))
    adapt_batchnorm(merged, data.user_split("ann", 0)[0].images.split(16))
    torch.testing.assert_close(found["body.5.running_mean"], merged.body[8].running_mean)
    images, labels = data.user_split("ann", 0)[1]
    with torch.no_grad():
        accuracy = (merged.eval()(images).argmax(1) == labels).float().mean().item()
    assert module.matrix[1, 0].item() == pytest.approx(accuracy)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_unmerged_models_adapt_too(tmp_path):
    bodies = [one.body.state_dict() for one in EXPERTS]
    heads = [one.head.state_dict() for one in EXPERTS]
    data = Images("bob")
    module = run(SequenceEvaluator(expert(9), bodies, heads, bn_policy="AdaBN"), tmp_path, data)
    network = copy.deepcopy(EXPERTS[1])
    adapt_batchnorm(network, data.user_split("bob", 0)[0].images.split(16))
    torch.testing.assert_close(module.adapted[1, 0]["body.5.running_var"], network.body[5].running_var)


def test_given_entries_are_what_is_tested(tmp_path):
    bodies = [one.body.state_dict() for one in EXPERTS]
    heads = [one.head.state_dict() for one in EXPERTS]
    given = {(2, 0): {"body.1.bias": torch.full((6,), 1e4), "head.bias": torch.tensor([5.0, 0.0])}, (1, 1): {}}
    data = Images("ann")
    module = run(SequenceEvaluator(expert(9), bodies, heads, entries=given), tmp_path, data)
    assert [tuple(cell) for cell in (~module.matrix.isnan()).nonzero().tolist()] == [(1, 1), (2, 0)]
    network = copy.deepcopy(EXPERTS[0]).eval()
    network.body.load_state_dict(bodies[2])
    network.load_state_dict(given[2, 0], strict=False)
    images, labels = data.user_split("ann", 0)[1]
    with torch.no_grad():
        assert module.matrix[2, 0].item() == pytest.approx((network(images).argmax(1) == labels).float().mean().item())


@pytest.mark.parametrize("policy", ["AdaBN", "recalibrate"])
def test_a_policy_that_needs_data_says_so(policy, tmp_path):
    data = Images("ann")
    data.setup("test")
    with pytest.raises(
        MisconfigurationException, match=rf"bn_policy='{policy}' needs a datamodule with \w+_dataloader"
    ):
        trainer(tmp_path).test(MergeModule(expert(9), STATES, bn_policy=policy), data.test_dataloader(), verbose=False)


def test_a_prior_is_the_average_of_the_experts(tmp_path):
    options = {"prior_samples": 1e15}
    module = MergeModule(expert(9), STATES, IMPORTANCES, bn_policy="AdaBN", bn_options=options)
    found = run(module, tmp_path, Images("ann")).adapted[2, 0]
    average = BatchNormStatistics.average([BatchNormStatistics.of(one.body) for one in EXPERTS])
    for name, value in average.items():
        torch.testing.assert_close(found[f"body.{name}"], value)


def test_an_average_has_the_parts_of_the_merge():
    weights = [1, 2, 5]
    state = MergeModule(expert(9), STATES, bn_policy="average", weights=weights).export()
    mean = sum(w * one.body[1].running_mean for w, one in zip(weights, EXPERTS, strict=True)) / 8
    torch.testing.assert_close(state["body.1.running_mean"], mean)
    second = [one.body[1].running_var + one.body[1].running_mean ** 2 for one in EXPERTS]
    variance = sum(w * moment for w, moment in zip(weights, second, strict=True)) / 8 - mean**2
    torch.testing.assert_close(state["body.1.running_var"], variance)


@pytest.mark.parametrize("policy", ["last", "average", "expert", "recalibrate", "AdaBN"])
def test_only_the_last_model(policy, tmp_path):
    every = run(MergeModule(expert(9), STATES, IMPORTANCES, bn_policy=policy), tmp_path, Images("ann"))
    last = MergeModule(expert(9), STATES, IMPORTANCES, bn_policy=policy, models="last")
    assert torch.equal(run(last, tmp_path, Images("ann")).matrix[-1], every.matrix[-1])


def test_the_reference_needs_all_models():
    with pytest.raises(MisconfigurationException, match="models='all'"):
        MergeModule(expert(9), STATES, bn_policy="reference", models="last")


@pytest.mark.parametrize(
    ("policy", "options", "message"),
    [
        ("mean", None, "Unknown adaptation 'mean'[.] Known: none, last, average, expert"),
        ("adapt", None, "Unknown adaptation 'adapt'; did you mean 'AdaBN'"),
        ("AdaBN", {"exakt": True}, "'AdaBN' has no option exakt"),
        ("AdaBN", {"prior_samples": -1}, "AdaBN: prior_samples must be 0 or more"),
        ("AdaBN-S", None, "bn_policy='AdaBN-S' trains, which a test cannot do"),
        ("recalibrate+FT", None, r"bn_policy='recalibrate\+FT' trains, which a test cannot do"),
    ],
)
def test_unknown_policies_and_options_and_those_that_train_are_refused(policy, options, message):
    with pytest.raises(MisconfigurationException, match=message):
        MergeModule(expert(9), STATES, bn_policy=policy, bn_options=options)


@pytest.mark.parametrize("policy", ["average", "expert", "reference", "AdaBN+average"])
def test_policies_that_need_experts_are_for_merges(policy):
    bodies, heads = [EXPERTS[0].body.state_dict()], [EXPERTS[0].head.state_dict()]
    with pytest.raises(MisconfigurationException, match=rf"bn_policy='{re.escape(policy)}' is for merges only"):
        SequenceEvaluator(expert(9), bodies, heads, bn_policy=policy)


def test_an_adaptation_may_be_an_object_and_a_sequence(tmp_path):
    sequence = find_adaptation("recalibrate+AdaBN", {"prior_samples": 5})
    options = {"bn_policy": "recalibrate+AdaBN", "bn_options": {"prior_samples": 5}}
    by_object, by_name = (
        run(MergeModule(expert(9), STATES, IMPORTANCES, **given), tmp_path, Images("ann")).adapted
        for given in ({"bn_policy": sequence}, options)
    )
    data = Images("ann")
    for (t, i), entries in by_object.items():
        network = by_hand("average", t, i, data)
        adapt_batchnorm(network, data.server_split(i)[1].images.split(16), prior_samples=5)
        adapt_batchnorm(network, data.user_split("ann", i)[0].images.split(16), prior_samples=5)
        for name, value in entries.items():
            torch.testing.assert_close(value, network.state_dict()[name])
            assert torch.equal(value, by_name[t, i][name])


@dataclass(frozen=True)
class FirstClass(Adaptation):
    """Everything is the first class."""

    name, text, reads = "first", "the bias of the first class is large", "unlabelled"

    def adapt(self, network, device, received):
        assert device.user == "ann"
        return {"head.bias": torch.tensor([1e6, 0.0])}


@pytest.mark.parametrize("before", [(), (find_adaptation("AdaBN").steps)])
def test_steps_that_need_batch_norm_are_skipped_without_it(tmp_path, before):
    networks = [TaskNetwork(nn.Sequential(nn.Flatten(), nn.Linear(48, 5)), nn.Linear(5, 2)) for _ in range(TASKS)]
    policy = AdaptationSequence((*before, FirstClass()))
    module = MergeModule(networks[0], [one.state_dict() for one in networks], bn_policy=policy)
    data = Images("ann")
    run(module, tmp_path, data)
    assert {tuple(entries) for entries in module.adapted.values()} == {("head.bias",)}
    for i in range(TASKS):
        share = (data.user_split("ann", i)[1].labels == 0).float().mean().item()
        assert module.matrix[2, i].item() == pytest.approx(share)
