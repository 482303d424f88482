"""LwFLearner: the loss and its gradient, what is trained, what is kept, and how it is resumed."""

import copy

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from small_runs import quiet_trainer, run_script
from torch import nn

from pl_personalize import LwFLearner
from pl_personalize.datamodules import tensor_loader
from pl_personalize.models import TaskNetwork


def made(seed=0, heads=2):
    """A network with batch norm and dropout, and heads of earlier tasks with other numbers of classes."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        body = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.2))
        body[1].running_mean.normal_()
        return TaskNetwork(body, nn.Linear(5, 3)), [nn.Linear(5, 2 + k) for k in range(heads)]


def data(rows=12, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 6, generator=generator), torch.arange(rows) % 3


def fit(tmp_path, learner, *callbacks, ckpt_path=None, **options):
    trainer = quiet_trainer(tmp_path, *callbacks, enable_checkpointing=bool(callbacks), **options)
    loaders = tensor_loader(*data(), batch_size=4), tensor_loader(*data(7, 2), batch_size=4)
    trainer.fit(learner, *loaders, ckpt_path=ckpt_path)


def test_the_loss_is_that_of_the_new_head_and_each_earlier_one():
    (network, heads), (x, y) = made(), data()
    learner = LwFLearner(network, heads, strength=0.7, temperature=3.0).train()
    teacher = [copy.deepcopy(part).eval() for part in (network.body, *heads)]
    with torch.no_grad():  # the student moves on
        for p in learner.parameters():
            p.add_(0.1 * torch.randn_like(p))
    torch.manual_seed(5)
    found = learner.training_loss(x, y)

    torch.manual_seed(5)
    features = network.body(x)
    right = F.cross_entropy(network.head(features), y)
    for head, before in zip(heads, teacher[1:], strict=True):
        target = (before(teacher[0](x)) / 3.0).softmax(1)
        right = right - 0.7 * (target * (head(features) / 3.0).log_softmax(1)).sum(1).mean()
    assert found.item() == pytest.approx(right.item(), rel=1e-6)


def test_without_earlier_heads_it_is_plain_training():
    (network, _), (x, y) = made(), data()
    learner = LwFLearner(network).eval()

    assert torch.equal(learner.training_loss(x, y), F.cross_entropy(network(x), y))


def test_body_and_all_heads_are_trained_and_the_teacher_is_not(tmp_path):
    network, heads = made()
    learner = LwFLearner(network, heads, lr=0.1)
    before = copy.deepcopy(learner.state_dict())
    teacher = copy.deepcopy(learner._teacher[0].state_dict())

    fit(tmp_path, learner)

    changed = {name for name, value in learner.state_dict().items() if not torch.equal(value, before[name])}
    assert {name for name, _ in learner.named_parameters()} <= changed
    assert all(torch.equal(value, teacher[name]) for name, value in learner._teacher[0].state_dict().items())
    assert not any(module.training for module in learner._teacher[0].modules())
    assert not any("teacher" in name for name in learner.state_dict())


def test_what_is_kept_names_every_head():
    network, heads = made()
    state = LwFLearner(network, heads).model_state()
    assert state._metadata == network.state_dict()._metadata  # versions of modules, for what loads them

    assert {name.partition(".")[0] for name in state} == {"body", "head", "old_heads"}
    assert torch.equal(state["old_heads.1.bias"], heads[1].bias)
    assert torch.equal(state["head.bias"], network.head.bias)


def test_a_resumed_run_ends_as_the_uninterrupted_one(tmp_path):
    def learner():
        return LwFLearner(*made(), lr=0.1, seed=3)

    whole, first, second = learner(), learner(), learner()
    fit(tmp_path, whole, max_epochs=4)
    checkpoint = ModelCheckpoint(tmp_path, "half", every_n_epochs=2, save_top_k=-1)
    fit(tmp_path, first, checkpoint, max_epochs=2)
    fit(tmp_path, second, max_epochs=4, ckpt_path=checkpoint.best_model_path)

    for name, value in second.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name


@pytest.mark.parametrize("name", ["strength", "temperature"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_numbers_out_of_range_are_refused(name, value):
    with pytest.raises(MisconfigurationException, match=f"{name} must be (0 or more|positive); got {value}"):
        LwFLearner(*made(), **{name: value})


def test_what_would_train_something_else_is_refused():
    network, heads = made()
    with pytest.raises(MisconfigurationException, match="takes no l2_transfer"):
        LwFLearner(network, heads, l2_transfer=1.0)
    with pytest.raises(MisconfigurationException, match="sequence of heads, one for each earlier task; got a Linear"):
        LwFLearner(network, heads[0])
    with pytest.raises(MisconfigurationException, match=r"call network.new_head\(num_classes\) first"):
        LwFLearner(network, [*heads, network.head])


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
def test_the_teacher_has_the_precision_of_the_trainer(tmp_path, precision):
    network, heads = made()
    learner = LwFLearner(network, heads, lr=0.1)
    fit(tmp_path, learner, precision=precision)
    assert {p.dtype for p in learner._teacher[0].parameters()} == {p.dtype for p in learner.parameters()}


# Two processes

DDP_SCRIPT = """
import sys
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pl_personalize import LwFLearner
from pl_personalize.models import TaskNetwork

FOLDER = Path(sys.argv[1])


class Noted(LwFLearner):
    def on_train_end(self):
        state = self.state_dict() | {f"teacher.{n}": v for n, v in self._teacher[0].state_dict().items()}
        torch.save(state, FOLDER / f"{self.trainer.world_size}-{self.global_rank}.pt")


def run(processes):
    torch.manual_seed(0)
    network = TaskNetwork(nn.Sequential(nn.Linear(6, 5), nn.Tanh()), nn.Linear(5, 3))
    learner = Noted(network, [nn.Linear(5, 2), nn.Linear(5, 4)], strength=3.0, lr=0.1)
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    Trainer(
        accelerator="cpu", devices=processes, strategy="ddp" if processes == 1 else "ddp_fork", max_epochs=3,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=FOLDER, precision="64-true",
    ).fit(learner, DataLoader(TensorDataset(x, torch.arange(16) % 3), batch_size=4 // processes))


if __name__ == "__main__":
    run(2)
    run(1)
"""


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    run_script(tmp_path, DDP_SCRIPT)
    zero, one, alone = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("2-0", "2-1", "1-0"))
    assert all(torch.equal(value, one[name]) for name, value in zero.items())
    for name, value in alone.items():
        torch.testing.assert_close(zero[name], value, rtol=1e-10, atol=1e-12)
    moved = {name for name, value in alone.items() if "teacher" not in name}
    assert {"network.body.0.weight", "network.head.weight", "old_heads.0.weight", "old_heads.1.bias"} <= moved
    assert not torch.equal(alone["old_heads.0.weight"], alone["teacher.1.weight"])
