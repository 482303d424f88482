"""TaskLearner: the gradient of L2-transfer, the optimizer, what it logs and what it saves.

That a run resumes bit for bit is tested with the loader.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pl_personalize.callbacks import ParameterPenalty, PlateauSchedule
from pl_personalize.datamodules import tensor_loader
from pl_personalize.models import TaskNetwork, mlp
from pl_personalize.modules import TaskLearner


def network(seed=0) -> TaskNetwork:
    """With batch norm: parameters that are pulled, and buffers that are not."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        body = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 4))
        return TaskNetwork(body, nn.Linear(4, 3))


def data(rows=12, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 6, generator=generator), torch.arange(rows) % 3


def trainer(tmp_path, **options):
    defaults = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    return Trainer(
        accelerator="cpu", enable_progress_bar=False, default_root_dir=tmp_path, num_sanity_val_steps=0,
        **(defaults | options),
    )  # fmt: skip


def fit(tmp_path, learner, rows=12, batch=12, **options):
    t = trainer(tmp_path, **options)
    t.fit(learner, tensor_loader(*data(rows), batch_size=batch), tensor_loader(*data(7, seed=2), batch_size=4))
    return t


def penalised_gradient(model: TaskNetwork, batches, anchor, strength) -> dict:
    """By autograd, of the loss with the penalty written out."""
    model = copy.deepcopy(model).train()
    loss = sum(F.cross_entropy(model(x), y) for x, y in batches) / len(batches)
    for name, p in model.body.named_parameters():
        loss = loss + strength * (p - anchor[name]).square().sum()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


# L2-transfer


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("entries", ["state dict", "parameters"])
def test_a_step_follows_the_gradient_of_the_penalty(tmp_path, entries, accumulate):
    start, other = network(), network(seed=5)
    anchor = other.body.state_dict() if entries == "state dict" else dict(other.body.named_parameters())
    before = copy.deepcopy(start)
    x, y = data()
    batches = list(zip(x.split(12 // accumulate), y.split(12 // accumulate), strict=True))
    wanted = penalised_gradient(before, batches, anchor, 0.7)

    learner = TaskLearner(start, lr=0.5, momentum=0.0, l2_transfer=0.7, anchor=anchor)
    fit(tmp_path, learner, batch=12 // accumulate, accumulate_grad_batches=accumulate)

    for (name, p), q in zip(learner.network.named_parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(p, q - 0.5 * wanted[name], msg=lambda text, name=name: f"{name}: {text}")


def test_the_penalty_is_clipped_with_the_gradient(tmp_path):
    """It is a part of the gradient, so clipping and momentum see it."""
    start, before, anchor = network(), network(), {n: p + 3 for n, p in network(5).body.named_parameters()}
    wanted = penalised_gradient(before, [data()], anchor, 0.7)
    norm = torch.cat([g.flatten() for g in wanted.values()]).norm()
    assert norm > 0.1
    fit(tmp_path, TaskLearner(start, lr=0.5, momentum=0.0, l2_transfer=0.7, anchor=anchor), gradient_clip_val=0.1)
    for (name, p), q in zip(start.named_parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(p, q - 0.5 * wanted[name] * 0.1 / (norm + 1e-6))


@pytest.mark.parametrize("options", [{"l2_transfer": 0.0}, {"anchor": None}])
def test_without_strength_or_anchor_nothing_is_pulled(tmp_path, options):
    start, before = network(), network()
    wanted = penalised_gradient(before, [data()], dict(before.body.named_parameters()), 0.0)
    options = {"l2_transfer": 0.7, "anchor": network(5).body.state_dict()} | options
    fit(tmp_path, TaskLearner(start, lr=0.5, momentum=0.0, **options))
    for (name, p), q in zip(start.named_parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(p, q - 0.5 * wanted[name])


def test_with_no_loss_the_body_goes_to_the_anchor_and_the_head_stays(tmp_path):
    """The head's own weights are in the anchor too, as in the expert's whole state: they must have no effect."""

    class NoLoss(TaskLearner):
        def training_step(self, batch, batch_idx):
            return 0.0 * super().training_step(batch, batch_idx)

    start, anchor = network(), network(5).body.state_dict()
    head = copy.deepcopy(start.head.state_dict())
    before = copy.deepcopy(dict(start.body.named_parameters()))
    fit(tmp_path, NoLoss(start, lr=0.1, momentum=0.0, l2_transfer=1.0, anchor=anchor), batch=4)  # 3 steps of 0.8
    for name, p in start.body.named_parameters():
        torch.testing.assert_close(p.detach(), anchor[name] + 0.8**3 * (before[name].detach() - anchor[name]))
    assert all(torch.equal(value, head[name]) for name, value in start.head.state_dict().items())


def test_the_anchor_stays_where_it_was(tmp_path):
    """Training starts from the preceding expert: its own parameters may be given as the anchor."""
    start = network()
    before = copy.deepcopy(start.body.state_dict())
    learner = TaskLearner(start, lr=0.5, anchor=start.body.state_dict())
    fit(tmp_path, learner, batch=4)
    anchor = learner.penalty.anchor
    assert set(anchor) == {name for name, _ in start.body.named_parameters()}
    assert all(torch.equal(value, before[name]) for name, value in anchor.items())
    assert not torch.equal(start.body[0].weight, before["0.weight"])


def test_the_trainers_own_penalty_adds_to_the_learners(tmp_path):
    """Lightning would replace it: the learner's is of a subclass."""
    start, before, anchor = network(), network(), network(5).body.state_dict()
    head = {f"head.{name}": value + 1 for name, value in before.head.state_dict().items()}
    wanted = penalised_gradient(before, [data()], anchor, 0.7)
    for name, p in before.head.named_parameters():
        wanted[f"head.{name}"] = wanted[f"head.{name}"] + 2 * 0.3 * (p - head[f"head.{name}"])
    own = ParameterPenalty(0.3, anchor={f"network.{name}": v for name, v in head.items()}, module="network.head")
    fit(tmp_path, TaskLearner(start, lr=0.5, momentum=0.0, l2_transfer=0.7, anchor=anchor), callbacks=[own])
    for (name, p), q in zip(start.named_parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(p, q - 0.5 * wanted[name])


def test_a_trainer_that_is_used_again_has_the_penalty_of_the_learner_at_hand(tmp_path):
    first, second = (TaskLearner(network(), lr=0.1, anchor=network(k).body.state_dict()) for k in (5, 6))
    t = fit(tmp_path, first)
    loader = tensor_loader(*data(), batch_size=12)
    for learner, wanted in ((first, first.penalty), (second, second.penalty), (TaskLearner(network()), None)):
        t.test(learner, loader, verbose=False)
        assert [c for c in t.callbacks if isinstance(c, ParameterPenalty)] == [wanted] * (wanted is not None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda anchor: anchor.pop("3.weight"), r"has nothing for the parameter '3.weight', which is \(4, 5\)"),
        (lambda anchor: anchor.update({"0.bias": torch.ones(6)}), r"has \(6,\) for .* '0.bias', which is \(5,\)"),
    ],
)
def test_an_anchor_that_does_not_fit_is_refused(change, message):
    anchor = dict(network().body.state_dict())
    change(anchor)
    with pytest.raises(MisconfigurationException, match=message):
        TaskLearner(network(), anchor=anchor)


@pytest.mark.parametrize(("options", "value"), [({"lr": 0.0}, "got 0.0"), ({"l2_transfer": -1.0}, "-1.0")])
def test_numbers_out_of_range_are_refused(options, value):
    with pytest.raises(MisconfigurationException, match=value):
        TaskLearner(network(), **options)


# Optimizer and schedule


def test_the_optimizer_is_the_protocols():
    options = {"momentum": 0.9, "dampening": 0, "nesterov": False, "weight_decay": 0.0, "lr": 0.001}
    group = TaskLearner(network()).configure_optimizers().param_groups[0]
    assert {key: group[key] for key in options} == options


def test_the_numbers_reach_the_optimizer():
    model = network()
    optimizer = TaskLearner(model, lr=0.25, momentum=0.5, weight_decay=0.125).configure_optimizers()
    assert isinstance(optimizer, torch.optim.SGD)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.25, 0.5, 0.125)
    assert {id(p) for p in group["params"]} == {id(p) for p in model.parameters()}


def test_frozen_parameters_are_not_optimized():
    model = network()
    model.body[0].requires_grad_(False)
    (group,) = TaskLearner(model).configure_optimizers().param_groups
    assert len(group["params"]) == len(list(model.parameters())) - 2


def test_the_schedule_is_the_protocols(tmp_path):
    t = trainer(tmp_path, max_epochs=0)
    t.fit(TaskLearner(network(), lr_patience=2, stop_patience=4), tensor_loader(*data(), batch_size=4))
    (schedule,) = [c for c in t.callbacks if isinstance(c, PlateauSchedule)]
    numbers = (schedule.monitor, schedule.mode, schedule.lr_patience, schedule.stop_patience, schedule.factor)
    assert numbers == ("val/acc", "max", 2, 4, 0.1)


def test_a_schedule_of_the_trainer_takes_the_place_of_ours(tmp_path):
    own = PlateauSchedule("val/loss", mode="min", lr_patience=1, stop_patience=2)
    t = trainer(tmp_path, max_epochs=1, callbacks=[own])
    t.fit(TaskLearner(network()), tensor_loader(*data(), batch_size=4), tensor_loader(*data(), batch_size=4))
    assert [c for c in t.callbacks if isinstance(c, PlateauSchedule)] == [own]


def test_stagnation_lowers_the_rate_and_stops(tmp_path):
    """With a rate this small val/acc never changes: one drop after two epochs, stop after four."""
    learner = TaskLearner(network(), lr=1e-12, lr_patience=2, stop_patience=4)
    t = fit(tmp_path, learner, max_epochs=20)
    assert t.current_epoch == 5
    assert t.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-13)


# What is logged


def test_val_acc_is_the_share_of_all_rows(tmp_path):
    learner = TaskLearner(network(), lr=0.1)
    t = fit(tmp_path, learner)
    x, y = data(7, seed=2)  # in batches of 4 and 3: the mean over batches would be another number
    with torch.no_grad():
        logits = learner.eval()(x)
    right = int((logits.argmax(1) == y).sum())
    assert float(t.callback_metrics["val/acc"]) == pytest.approx(right / 7)
    assert float(t.callback_metrics["val/loss"]) == pytest.approx(float(F.cross_entropy(logits, y)), rel=1e-5)
    assert 0 < right < 7


def test_train_loss_is_that_of_the_step(tmp_path):
    before = network()
    learner = TaskLearner(network(), lr=0.1, anchor=network(5).body.state_dict(), l2_transfer=10.0)
    t = fit(tmp_path, learner, log_every_n_steps=1)
    x, y = data()
    loss = F.cross_entropy(before.train()(x), y)  # without the penalty
    assert float(t.callback_metrics["train/loss"]) == pytest.approx(float(loss), rel=1e-6)


def test_test_acc_of_several_loaders_is_each_loaders_own(tmp_path):
    """The datamodules give one test loader for each task."""
    learner, (x, _) = TaskLearner(network()), data(9)
    predicted = learner.eval()(x).argmax(1)
    loaders = [tensor_loader(x, predicted, batch_size=4), tensor_loader(x, (predicted + 1) % 3, batch_size=4)]
    results = trainer(tmp_path).test(learner, loaders, verbose=False)
    assert [value for result in results for value in result.values()] == [1.0, 0.0]


def test_predict_gives_the_logits(tmp_path):
    learner, (x, _) = TaskLearner(network()), data(9)
    logits = torch.cat(trainer(tmp_path).predict(learner, tensor_loader(x, batch_size=4)))
    torch.testing.assert_close(logits, learner.network.eval()(x))


# What is saved


def test_a_checkpoint_loads_with_weights_only_and_holds_no_network(tmp_path):
    learner = TaskLearner(network(), lr=0.25, anchor=network(5).body.state_dict(), seed=4, task=2)
    checkpoint = ModelCheckpoint(tmp_path, filename="x", monitor="val/acc", mode="max")
    fit(tmp_path, learner, enable_checkpointing=True, callbacks=[checkpoint])
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)

    assert saved["hyper_parameters"] == {
        "lr": 0.25, "momentum": 0.9, "weight_decay": 0.0, "l2_transfer": 0.001, "seed": 4, "task": 2,
        "lr_patience": 5, "stop_patience": 11,
    }  # fmt: skip
    assert set(saved["state_dict"]) == {f"network.{name}" for name in network().state_dict()}  # no second copy
    again = TaskLearner.load_from_checkpoint(tmp_path / "x.ckpt", network=network(9))
    assert again.hparams["lr"] == 0.25
    assert all(
        torch.equal(a, b) for a, b in zip(again.state_dict().values(), learner.state_dict().values(), strict=True)
    )


def test_a_plain_dataloader_is_enough(tmp_path):
    learner = TaskLearner(mlp((6,), 3, hidden=(4,)), lr=0.1)
    loader = DataLoader(TensorDataset(*data()), batch_size=5, shuffle=True)
    t = trainer(tmp_path, max_epochs=30)
    t.fit(learner, loader, loader)
    assert float(t.callback_metrics["train/loss"]) < 0.8 < F.cross_entropy(torch.zeros(1, 3), torch.zeros(1).long())


# Randomness


class Noted(TaskLearner):
    """Notes a random number of each step."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.drawn = []

    def training_step(self, batch, batch_idx):
        self.drawn.append(float(torch.rand(1)))
        return super().training_step(batch, batch_idx)


def drawn(tmp_path, global_seed=0, **options):
    torch.manual_seed(global_seed)
    learner = Noted(network(), **options)
    fit(tmp_path, learner, batch=4, max_epochs=2)
    return learner.drawn


def test_the_randomness_of_a_step_follows_from_seed_task_and_step(tmp_path):
    first = drawn(tmp_path, seed=1, task=2)
    assert len(set(first)) == 6
    assert drawn(tmp_path, global_seed=5, seed=1, task=2) == first
    assert not set(drawn(tmp_path, seed=1, task=3)) & set(first)
    assert not set(drawn(tmp_path, seed=2, task=2)) & set(first)


# Labels


def one_batch(*tensors):
    return DataLoader(TensorDataset(*tensors), batch_size=len(tensors[0]))


def features():
    return data()[0]


@pytest.mark.parametrize(
    "form",
    [
        lambda y: y.int(),
        lambda y: y.to(torch.uint8),
        lambda y: y.float(),
        lambda y: y[:, None],
        lambda y: y.double()[:, None],
    ],
)
def test_labels_of_every_type_train_alike(tmp_path, form):
    labels, states = torch.arange(12) % 2, []
    for y in (labels, form(labels)):
        learner = TaskLearner(network(), lr=0.5)
        trainer(tmp_path).fit(learner, one_batch(features(), y))
        states.append(learner.network.state_dict())
        assert trainer(tmp_path).validate(learner, one_batch(features(), y), verbose=False)
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
@pytest.mark.parametrize("wrong", [-1, 9, 255])
def test_a_label_that_is_no_class_is_refused_in_every_stage(tmp_path, stage, wrong):
    labels = torch.arange(12) % 2
    labels[5] = wrong
    with pytest.raises(MisconfigurationException, match=rf"TaskLearner, task 4: label {wrong} \(of sample 5\)"):
        getattr(trainer(tmp_path), stage)(TaskLearner(network(), task=4), one_batch(features(), labels))


def test_labels_have_no_meaning_in_predict(tmp_path):
    loader = one_batch(features(), torch.full((12,), 255))
    (logits,) = trainer(tmp_path).predict(TaskLearner(network()), loader)
    assert len(logits) == 12


def test_what_the_cross_entropy_passes_over_and_probabilities_may_be_trained_on(tmp_path):
    x, y = features(), torch.arange(12) % 2
    models = [mlp((6,), 3, [4]) for _ in range(3)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    y[6:] = -100
    batches = [(x, y), (x[:6], y[:6]), (x[:6], torch.nn.functional.one_hot(y[:6], models[0].num_classes).float())]
    for model, batch in zip(models, batches, strict=True):
        trainer(tmp_path, limit_val_batches=0).fit(TaskLearner(model, lr=0.5), one_batch(*batch))
    for name, value in models[0].state_dict().items():
        torch.testing.assert_close(value, models[1].state_dict()[name])
        torch.testing.assert_close(value, models[2].state_dict()[name])
