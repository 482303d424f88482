"""ParameterPenalty against the published methods, and in two processes."""

import copy

import torch
import torch.nn.functional as F
from penalty_runs import ROWS, Net, continued, data, distance, point, trained
from small_runs import run_forked

from pl_personalize import estimate_importance
from pl_personalize.callbacks import FisherImportance, ParameterPenalty


def server_gradients(net, loader, objective):
    """For each batch, the gradient of the sum over its samples, in eval mode."""
    net.eval()
    for x, y in loader:
        yield torch.autograd.grad(objective(net(x), y), list(net.body.parameters()))
    net.train()


def test_the_published_ewc(tmp_path):
    """F = 1/n Σ_b (Σ_{i in b} ∇ log p(y_i|x_i))², gradient 2 · 400 F (θ − θ_ref)."""
    net, loader = trained(tmp_path, Net()), data()
    fisher = [torch.zeros_like(p) for p in net.body.parameters()]
    for gradients in server_gradients(net, loader, lambda z, y: F.cross_entropy(z, y, reduction="sum")):
        for total, gradient in zip(fisher, gradients, strict=True):
            total += gradient**2 / ROWS

    importance = estimate_importance(net, loader, "empirical_fisher", reduction="batch", module="body")
    penalty = ParameterPenalty(400 * 4, importance, module="body")
    names = [f"body.{name}" for name, _ in net.body.named_parameters()]
    right = continued(net, dict(zip(names, fisher, strict=True)), point(net))
    plain = copy.deepcopy(net)
    net.lr = right.lr = plain.lr = 0.001  # as published; 0.1 would diverge under 400
    right.strength = 400.0
    trained(tmp_path, right, loader=data(seed=2), max_epochs=10)
    trained(tmp_path, net, penalty, loader=data(seed=2), max_epochs=10)
    assert distance(net, right) < 1e-5
    assert distance(net, trained(tmp_path, plain, loader=data(seed=2), max_epochs=10)) > 0.01

    callback = FisherImportance(labels="true", reduction="batch", module="body")  # the same from a Trainer
    last = Net()
    trained(tmp_path, last, callback)
    for value, reference in zip(callback.importance.values(), fisher, strict=True):
        torch.testing.assert_close(4 * value, reference, rtol=1e-4, atol=1e-9)


def test_the_published_mas(tmp_path):
    """Ω = Σ_tasks 1/B Σ_b |1/N ∇ Σ_i ‖f(x_i)‖²|, gradient 2 · 1 · Ω (θ − θ_ref)."""
    net = Net()
    omega = {f"body.{name}": torch.zeros_like(p) for name, p in net.body.named_parameters()}
    importances = []
    for seed in (1, 2):
        loader = data(seed=seed)
        trained(tmp_path, net, loader=loader)
        for gradients in server_gradients(net, loader, lambda z, y: z.square().sum()):
            for total, gradient in zip(omega.values(), gradients, strict=True):
                total += (gradient / 4).abs() / len(loader)
        importances.append(estimate_importance(net, loader, "mas", reduction="batch", module="body"))

    right = continued(net, omega, point(net))
    trained(tmp_path, right, loader=data(seed=3))
    trained(tmp_path, net, ParameterPenalty(1.0, importances, module="body"), loader=data(seed=3))
    assert distance(net, right) < 1e-5


DDP_SCRIPT = """
import sys
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pl_personalize.callbacks import ParameterPenalty

FOLDER = Path(sys.argv[1])


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
        self.idle = nn.Parameter(torch.ones(2))  # no gradient but the penalty's

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def on_train_start(self):
        with torch.no_grad():
            self.idle.add_(1)

    def on_train_end(self):
        torch.save(self.state_dict(), FOLDER / f"{self.trainer.world_size}-{self.global_rank}.pt")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


def run(processes):
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    omega = {name: p.detach().abs() for name, p in Net().named_parameters()}
    Trainer(
        accelerator="cpu", devices=processes, max_epochs=3, logger=False, enable_checkpointing=False,
        strategy="ddp_find_unused_parameters_true" if processes == 1 else "ddp_fork_find_unused_parameters_true",
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=FOLDER, precision="64-true",
        accumulate_grad_batches=2, gradient_clip_val=0.5, callbacks=[ParameterPenalty(2.0, [omega, omega])],
    ).fit(Net(), DataLoader(TensorDataset(x, torch.arange(16) % 3), batch_size=4 // processes))


if __name__ == "__main__":
    run(2)
    run(1)
"""


def test_two_processes_train_as_one(tmp_path):
    run_forked(tmp_path, DDP_SCRIPT)
    zero, one, alone = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("2-0", "2-1", "1-0"))
    assert all(torch.equal(value, one[name]) for name, value in zero.items())
    for name, value in alone.items():
        torch.testing.assert_close(zero[name], value, rtol=1e-10, atol=1e-12)
    assert not torch.equal(alone["idle"], torch.full((2,), 2.0, dtype=torch.float64))
