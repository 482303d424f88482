"""MergeModule: what it tests and exports against a merge and an evaluation in plain Python."""

import gc
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from reference import naive_merge
from safetensors.torch import save_file
from torch import nn

from pl_personalize import ArtifactError, Importance, estimate_importance
from pl_personalize.artifacts import TensorFile, save_tensors
from pl_personalize.datamodules import tensor_loader
from pl_personalize.models import MultiHeadNetwork, TaskNetwork, mlp
from pl_personalize.modules import MergeModule, TaskLearner

CLASSES, ROWS = (2, 4, 3), (25, 31, 29)
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def network(seed, classes=2) -> TaskNetwork:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU())
        nn.init.normal_(body[1].running_mean)
        nn.init.uniform_(body[1].running_var, 0.5, 2)
        nn.init.normal_(body[1].weight)
        body[1].num_batches_tracked.fill_(10 + seed)
        return TaskNetwork(body, nn.Linear(5, classes))


def rows(task):
    generator = torch.Generator().manual_seed(100 + task)
    return torch.randn(ROWS[task], 6, generator=generator), torch.randint(
        CLASSES[task], (ROWS[task],), generator=generator
    )


def importance(k, user="ann"):
    batch = rows(k)[0] + (0 if user == "ann" else 3 * torch.arange(6))
    return estimate_importance(EXPERTS[k], [batch], "mas", module="body")


EXPERTS = [network(seed, classes) for seed, classes in enumerate(CLASSES)]
STATES = [expert.state_dict() for expert in EXPERTS]
ANN, BOB = ([importance(k, user) for k in range(3)] for user in ("ann", "bob"))


class Data(LightningDataModule):
    def __init__(self, user=None):
        super().__init__()
        self.user = user

    def test_dataloader(self):
        return [tensor_loader(*rows(task), batch_size=7) for task in range(3)]


def merges(*args, **options):
    return MergeModule(network(9), *args, bn_policy="last", **options)


def evaluate(module, tmp_path, user=None):
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    return trainer.test(module, datamodule=Data(user), verbose=False)[0]


def plain_body(importances, t, **options) -> dict:
    """The merge of experts 0..t, entry by entry; batch-norm statistics are those of expert t."""
    bodies = [expert.body.state_dict() for expert in EXPERTS[: t + 1]]
    if t == 0:
        return bodies[0]
    body = {}
    for name, last in bodies[-1].items():
        if name.rpartition(".")[2] in STATISTICS:
            body[name] = last
        else:
            omegas = None if importances is None else [importances[k][name] for k in range(t + 1)]
            body[name] = naive_merge([b[name] for b in bodies], omegas, **options).float()
    return body


def predictions(body, i) -> torch.Tensor:
    model = network(0, CLASSES[i]).eval()
    model.body.load_state_dict(body)
    model.head.load_state_dict(EXPERTS[i].head.state_dict())
    return model(rows(i)[0])


def plain_matrix(importances, **options) -> list[list[float]]:
    return [
        [float((predictions(body, i).argmax(1) == rows(i)[1]).double().mean()) for i in range(t + 1)]
        for t in range(3)
        for body in [plain_body(importances, t, **options)]
    ]


def matrix(module) -> list[list[float]]:
    return [module.matrix[t, : t + 1].tolist() for t in range(3)]


def assert_matrix(module, wanted):
    assert matrix(module) == [pytest.approx(row) for row in wanted]


# Merging and evaluation


@pytest.mark.parametrize("importances", [None, ANN, BOB], ids=["mean", "ann", "bob"])
def test_the_matrix_is_that_of_a_plain_merge_and_evaluation(tmp_path, importances):
    module = merges(STATES, importances)
    results = evaluate(module, tmp_path)
    wanted = plain_matrix(importances)

    assert_matrix(module, wanted)
    lost = [wanted[i][i] - wanted[2][i] for i in range(2)]
    assert results == pytest.approx(
        {f"test/acc/t{t + 1}/task{i + 1}": wanted[t][i] for t in range(3) for i in range(t + 1)}
        | {"test/avg_acc": sum(wanted[2]) / 3, "test/forgetting": sum(lost) / 3, "test/forgetting_cl": sum(lost) / 2}
    )


def test_the_merges_that_are_compared_differ():
    merges = [plain_matrix(importances) for importances in (None, ANN, BOB)]
    assert merges[0] != merges[1] != merges[2] != merges[0]


def test_only_the_last_merge(tmp_path):
    module = merges(STATES, ANN, models="last")
    results = evaluate(module, tmp_path)
    wanted = plain_matrix(ANN)[2]
    assert results == pytest.approx(
        {f"test/acc/t3/task{i + 1}": wanted[i] for i in range(3)} | {"test/avg_acc": sum(wanted) / 3}
    )


def test_options_reach_the_merge(tmp_path):
    zeros = [Importance({n: v * (v > v.median()) for n, v in i.items()}, kind="mas", num_samples=1) for i in ANN]
    weights = [3.0, 1.0, 0.5]
    module = merges(STATES, zeros, zero="reference", weights=weights)
    torch.testing.assert_close(
        {n: v for n, v in module.export().items() if n.startswith("body.")},
        {f"body.{n}": v for n, v in plain_body(zeros, 2, zero="reference", weights=weights).items()},
    )
    with pytest.raises(ValueError, match="normalize"):
        merges(STATES, ANN, normalize="nonsense").export()


# Whose importances


def test_importances_follow_the_user_of_the_datamodule(tmp_path):
    module = merges(STATES, {"ann": ANN, "bob": BOB})
    for user, importances in (("bob", BOB), ("ann", ANN)):
        evaluate(module, tmp_path, user)
        assert_matrix(module, plain_matrix(importances))


def test_a_user_that_is_given_comes_first(tmp_path):
    module = merges(STATES, {"ann": ANN, "bob": BOB}, user="bob")
    evaluate(module, tmp_path, "ann")
    assert_matrix(module, plain_matrix(BOB))
    torch.testing.assert_close(module.export()["body.0.weight"], plain_body(BOB, 2)["0.weight"])
    torch.testing.assert_close(module.export("ann")["body.0.weight"], plain_body(ANN, 2)["0.weight"])


@pytest.mark.parametrize("user", ["eve", None])
def test_an_unknown_user_is_named(tmp_path, user):
    module = merges(STATES, {"ann": ANN, "bob": BOB})
    message = f"importances for the users 'ann', 'bob', and the user is {user!r}. Set user="
    with pytest.raises(MisconfigurationException, match=message):
        evaluate(module, tmp_path, user)
    with pytest.raises(MisconfigurationException, match=message):
        module.export(user)


def test_numbers_must_fit():
    with pytest.raises(MisconfigurationException, match="3 experts but 2 importances; give one for each"):
        merges(STATES, ANN[:2])
    with pytest.raises(MisconfigurationException, match="3 experts but 1 importances of user 'bob'"):
        merges(STATES, {"ann": ANN, "bob": BOB[:1]})
    with pytest.raises(MisconfigurationException, match="one body and one head per task; got 0 and 0"):
        merges([])


def test_a_state_dict_that_is_no_expert_is_refused():
    with pytest.raises(MisconfigurationException, match="below 'head'"):
        merges([{"body.0.weight": torch.zeros(1)}])


def test_names_may_be_relative_to_the_network(tmp_path):
    prefixed = [{f"body.{name}": value for name, value in one.items()} for one in ANN]
    module = merges(STATES, prefixed)
    wanted = merges(STATES, ANN).export()
    assert all(torch.equal(value, wanted[name]) for name, value in module.export().items())
    files = [
        str(Importance(p, kind="mas", num_samples=1).save(tmp_path / f"{k}.safetensors"))
        for k, p in enumerate(prefixed)
    ]
    module = merges(STATES, files)
    assert all(torch.equal(value, wanted[name]) for name, value in module.export().items())


# Files


@pytest.fixture
def files(tmp_path):
    experts = [
        save_tensors(tmp_path / f"expert-{k}.safetensors", state, kind="expert") for k, state in enumerate(STATES)
    ]
    importances = [one.save(tmp_path / f"importance-{k}.safetensors") for k, one in enumerate(ANN)]
    return experts, importances


def test_files_give_what_state_dicts_give(tmp_path, files):
    from_files, from_memory = merges(*files), merges(STATES, ANN)
    assert evaluate(from_files, tmp_path) == evaluate(from_memory, tmp_path)
    exported = from_files.export()
    assert all(torch.equal(value, exported[name]) for name, value in from_memory.export().items())
    assert set(exported) == set(from_memory.export())


def test_files_are_read_when_needed_and_one_parameter_after_the_other(files, monkeypatch):
    read, alive, most = [], [], []
    real = TensorFile.__getitem__

    def spy(self, name):
        tensor = real(self, name)
        read.append(name)
        alive.append(weakref.ref(tensor))
        most.append(sum(ref() is not None for ref in alive))
        return tensor

    monkeypatch.setattr(TensorFile, "__getitem__", spy)
    gc.collect()
    module = merges(*files)
    assert read == []
    module.export()
    assert len(read) > 3 * 6
    assert max(most) <= 6  # one of each, of 3 experts with 9 entries and 3 importances with 6


def test_a_file_that_is_no_expert_is_named(files):
    experts, importances = files
    with pytest.raises(ArtifactError, match=r"importance-0.safetensors holds 'importance'; expected 'expert'"):
        merges([*experts[:2], importances[0]])
    with pytest.raises(ArtifactError, match=r"missing.safetensors does not exist"):
        merges([*experts[:2], "missing.safetensors"])


# Export


@pytest.mark.parametrize("importances", [None, ANN], ids=["mean", "ann"])
def test_an_export_is_the_model_that_was_tested(tmp_path, importances):
    module = merges(STATES, importances)
    evaluate(module, tmp_path)
    state = module.export()

    target = MultiHeadNetwork(network(7).body, [nn.Linear(5, classes) for classes in CLASSES]).eval()
    target.load_state_dict(state, strict=True)
    body = plain_body(importances, 2)
    for i in range(3):
        torch.testing.assert_close(target(rows(i)[0], i), predictions(body, i))
        accuracy = float((target(rows(i)[0], i).argmax(1) == rows(i)[1]).double().mean())
        assert float(module.matrix[2, i]) == pytest.approx(accuracy)
    assert int(state["body.1.num_batches_tracked"]) == 12


def test_an_export_shares_nothing_with_the_experts():
    state = merges(STATES, ANN).export()
    for value in state.values():
        value.zero_()
    assert all(float(expert.head.weight.abs().sum()) > 0 for expert in EXPERTS)
    assert float(EXPERTS[2].body[1].running_var.min()) > 0


def test_a_single_expert_is_exported_as_it_is():
    state = merges(STATES[:1]).export()
    assert all(torch.equal(state[f"body.{n}"], v) for n, v in EXPERTS[0].body.state_dict().items())
    assert torch.equal(state["heads.0.weight"], EXPERTS[0].head.weight)


def test_the_experts_are_left_as_they_were(tmp_path):
    before = [{name: value.clone() for name, value in state.items()} for state in STATES]
    evaluate(merges(STATES, ANN), tmp_path)
    for state, same in zip(STATES, before, strict=True):
        assert all(torch.equal(state[name], same[name]) for name in same)


@pytest.mark.parametrize("prefix", ["", "body.", "network.body."])
def test_importances_of_a_whole_network_or_learner_fit(prefix):
    """Those of the head have no part in a merge."""
    torch.manual_seed(0)
    experts = [mlp((4,), 2, [3]).state_dict() for _ in range(2)]
    names = [name for name in experts[0] if name.startswith("body.")]
    importances = [
        {prefix + name.removeprefix("body."): torch.rand(experts[0][name].shape) for name in names} for _ in range(2)
    ]
    plain = MergeModule(
        mlp((4,), 2, [3]), experts, [{k.removeprefix(prefix): v for k, v in i.items()} for i in importances]
    )
    if prefix:
        head = prefix.replace("body.", "head.weight")
        importances = [{**importance, head: torch.rand(2, 3)} for importance in importances]
    merged = MergeModule(mlp((4,), 2, [3]), experts, importances).export()
    assert all(torch.equal(value, plain.export()[name]) for name, value in merged.items())


def test_a_learners_state_dict_is_an_expert():
    networks = [mlp((4,), 2, [3]) for _ in range(2)]
    expected = MergeModule(networks[0], [network.state_dict() for network in networks]).export()
    merged = MergeModule(networks[0], [TaskLearner(network).state_dict() for network in networks]).export()
    assert merged.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in merged.items())


def test_importances_of_different_kinds_are_refused():
    experts = [mlp((4,), 2, [3]).state_dict() for _ in range(2)]
    values = {n.removeprefix("body."): torch.ones_like(v) for n, v in experts[0].items() if n.startswith("body.")}
    importances = [Importance(values, kind=kind, num_samples=1) for kind in ("mas", "fisher")]
    with pytest.raises(ValueError, match=r"different kinds, \['fisher \(sample\)', 'mas \(sample\)'\]"):
        MergeModule(mlp((4,), 2, [3]), experts, importances).export()


# Files of other formats, and what networks keep


def _with_hyperparameters(state, path):
    torch.save({"state_dict": state, "hyper_parameters": {"lr": np.float64(0.1), "folder": Path("x")}}, path)


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(_with_hyperparameters, id="checkpoint"),
        pytest.param(
            lambda state, path: _with_hyperparameters({f"network.{n}": v for n, v in state.items()}, path), id="learner"
        ),
        pytest.param(torch.save, id="state dict"),
        pytest.param(lambda state, path: save_file(dict(state), path), id="safetensors"),
    ],
)
def test_experts_in_files_of_other_formats(tmp_path, write):
    for k, state in enumerate(STATES):
        write(state, tmp_path / f"{k}.ckpt")

    module = merges([tmp_path / f"{k}.ckpt" for k in range(3)], ANN)

    assert evaluate(module, tmp_path) == evaluate(merges(STATES, ANN), tmp_path)
    right = merges(STATES, ANN).export()
    assert all(torch.equal(value, right[name]) for name, value in module.export().items())


def test_a_file_without_a_state_dict_is_named(tmp_path):
    torch.save(EXPERTS[0], tmp_path / "model.pt")
    with pytest.raises(ArtifactError, match=r"model\.pt holds an object of the class .*TaskNetwork, not a state dict"):
        merges([tmp_path / "model.pt", *STATES[1:]])


class Versioned(nn.Linear):
    """A layer whose files of version 1 had the weight transposed."""

    _version = 2

    def _load_from_state_dict(self, state, prefix, metadata, *rest):
        if metadata.get("version", 1) < 2:
            state[prefix + "weight"] = state[prefix + "weight"].T
        super()._load_from_state_dict(state, prefix, metadata, *rest)


@pytest.mark.parametrize("saved", [False, True])
def test_an_export_is_of_the_modules_versions(tmp_path, saved):
    def make():
        return TaskNetwork(nn.Sequential(Versioned(4, 4)), Versioned(4, 4))

    experts = [make() for _ in range(2)]
    states = [expert.state_dict() for expert in experts]
    if saved:
        states = [save_tensors(tmp_path / f"{k}", state, kind="expert") for k, state in enumerate(states)]

    exported = MergeModule(make(), states).export()

    model = MultiHeadNetwork(make().body, [make().head for _ in range(2)])
    model.load_state_dict(exported)
    torch.testing.assert_close(model.body[0].weight, (experts[0].body[0].weight + experts[1].body[0].weight) / 2)
    assert all(torch.equal(head.weight, expert.head.weight) for head, expert in zip(model.heads, experts, strict=True))


class Cached(nn.Module):
    """Keeps a table of its parameter in eval mode until it is trained again."""

    def __init__(self):
        super().__init__()
        self.b, self.cache = nn.Parameter(torch.randn(6)), {}

    def train(self, mode=True):
        if mode:
            self.cache.clear()
        return super().train(mode)

    def forward(self, x):
        if self.training:
            return x + 5 * self.b
        if "b" not in self.cache:
            self.cache["b"] = 5 * self.b
        return x + self.cache["b"]


class Plain(Cached):
    def forward(self, x):
        return x + 5 * self.b


class DataToAdapt(Data):
    def adapt_dataloader(self, task):
        return tensor_loader(*rows(task), batch_size=9)


@pytest.mark.parametrize("bn_policy", ["last", "AdaBN"])
def test_each_merge_is_tested_with_its_own_weights_where_modules_keep_tables(tmp_path, bn_policy):
    """The same accuracies as of a network that keeps nothing."""

    def make(kind, seed, classes=2):
        torch.manual_seed(seed)
        body = nn.Sequential(kind(), nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU())
        return TaskNetwork(body, nn.Linear(5, classes))

    states = [make(Plain, k, classes).state_dict() for k, classes in enumerate(CLASSES)]
    matrices, statistics = [], []
    for kind in (Plain, Cached):
        network = make(kind, 9).eval()
        network(torch.zeros(1, 6))  # it has been used before
        module = MergeModule(network, states, bn_policy=bn_policy)
        trainer = Trainer(
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.test(module, datamodule=DataToAdapt(), verbose=False)
        matrices.append(module.matrix)
        statistics.append(module.adapted)

    assert torch.equal(*(matrix.nan_to_num(-1) for matrix in matrices))
    for cell, found in statistics[0].items():
        assert all(torch.equal(value, statistics[1][cell][name]) for name, value in found.items())


def test_experts_with_entries_that_are_no_tensors(tmp_path):
    class WithExtra(nn.Linear):
        def get_extra_state(self):
            return {"steps": [int(self.out_features)]}

        def set_extra_state(self, state):
            self.steps = state["steps"]

    def make(classes):
        return TaskNetwork(nn.Sequential(WithExtra(6, 5), nn.ReLU()), WithExtra(5, classes))

    experts = [make(classes) for classes in CLASSES]
    module = MergeModule(make(2), [expert.state_dict() for expert in experts])

    evaluate(module, tmp_path)
    exported = module.export()

    assert exported["body.0._extra_state"] == {"steps": [5]}
    assert [exported[f"heads.{k}._extra_state"] for k in range(3)] == [{"steps": [classes]} for classes in CLASSES]
    MultiHeadNetwork(make(2).body, [make(classes).head for classes in CLASSES]).load_state_dict(exported)
