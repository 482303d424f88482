"""ParameterPenalty trains as a loss with the penalty in it would, on modules that know nothing of this project."""

import copy
import gc
import pickle
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors.torch import save_file
from small_runs import NoTraining, quiet_trainer, run_forked
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pl_personalize import Importance, estimate_importance
from pl_personalize.callbacks import FisherImportance, MASImportance, ParameterPenalty, parameter_penalty
from pl_personalize.datamodules.loader import tensor_loader
from pl_personalize.functional.penalties import quadratic_penalty

ROWS = 16


class Net(LightningModule):
    """A user's own module, with a head."""

    def __init__(self, norm: bool = True, seed: int = 0, momentum: float = 0.9, classes: int = 3):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            norms = [nn.BatchNorm1d(5)] if norm else []
            self.body = nn.Sequential(nn.Linear(6, 5), *norms, nn.Tanh(), nn.Linear(5, 4))
            self.head = nn.Linear(4, classes)
        self.momentum, self.lr = momentum, 0.1

    def forward(self, x):
        return self.head(self.body(x))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]).to(batch[0].dtype), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("score", F.cross_entropy(self(batch[0]), batch[1]))

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr, momentum=self.momentum)


class WithTerm(Net):
    """The same, with the penalty written into its loss: one parameter at a time, as in the papers."""

    def __init__(self, strength, omega, anchor, **options):
        super().__init__(**options)
        self.strength, self.omega, self.anchor = strength, omega, anchor

    def penalty(self):
        total = 0.0
        for name, p in self.named_parameters():
            if name in self.omega:
                total = total + (self.omega[name].to(p.dtype) * (p - self.anchor[name].to(p.dtype)) ** 2).sum()
        return self.strength * total

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + self.penalty()


def data(rows=ROWS, seed=1, dtype=torch.float32, **options):
    x = torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return DataLoader(TensorDataset(x, torch.arange(rows) % 3), **({"batch_size": 4} | options))


def trainer(tmp_path, *callbacks, **options):
    return quiet_trainer(tmp_path, *callbacks, **({"max_epochs": 3} | options))


def trained(tmp_path, net, *callbacks, loader=None, **options):
    trainer(tmp_path, *callbacks, **options).fit(net, data() if loader is None else loader)
    return net


def random_omega(net, seed=5, names=None):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(p.shape, generator=generator, dtype=torch.float64)
        for name, p in net.named_parameters()
        if names is None or name in names
    }


def point(net):
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def distance(net, other):
    """The largest difference of a parameter, relative to the parameters' size."""
    return max(
        float((p.double() - q.double()).abs().max() / p.double().abs().max())
        for p, q in zip(point(net).values(), point(other).values(), strict=True)
    )


class Gradients(Callback):
    """What each optimiser step starts with; it comes after the penalty in the list of hooks."""

    def __init__(self):
        self.steps = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.steps.append(
            {name: None if p.grad is None else p.grad.clone() for name, p in pl_module.named_parameters()}
        )


# The gradient


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("part", ["all", "body", "no head", "some"])
@pytest.mark.parametrize("importances", ["none", "one", "two"])
def test_the_gradient_is_that_of_loss_and_penalty(tmp_path, norm, part, importances):
    net, other = Net(norm), Net(norm, seed=3)
    prefix = "body." if part == "body" else ""
    names = {
        "all": list(point(net)),
        "body": [name for name in point(net) if name.startswith("body.")],
        "no head": [name for name in point(net) if not name.startswith("head.")],
        "some": ["body.0.weight", "head.bias"],
    }[part]
    omegas = [random_omega(net, seed, names) for seed in {"none": [], "one": [5], "two": [5, 6]}[importances]]
    if not omegas:
        names = list(point(net)) if part == "some" else names
        total = {name: torch.ones_like(p) for name, p in point(net).items() if name in names}
    else:
        total = {name: sum(omega[name] for omega in omegas) for name in names}
    relative = [{name.removeprefix(prefix): value for name, value in omega.items()} for omega in omegas]
    callback = ParameterPenalty(
        7.0,
        relative or None if len(relative) != 1 else relative[0],
        point(other),
        module="body" if part == "body" else None,
        exclude=["head"] if part == "no head" else (),
    )
    gradients = Gradients()
    start = copy.deepcopy(net).double()
    trained(tmp_path, net, callback, gradients, loader=data(dtype=torch.float64), precision="64-true", max_steps=1)

    batch = next(iter(data(dtype=torch.float64)))
    loss = Net.training_step(start, batch, 0)
    for name, p in start.named_parameters():
        if name in total:
            loss = loss + 7.0 * (total[name].double() * (p - point(other)[name].double()) ** 2).sum()
    loss.backward()
    for name, p in start.named_parameters():
        torch.testing.assert_close(gradients.steps[0][name], p.grad, rtol=1e-12, atol=1e-12)


# The training

SETTINGS = {
    "momentum": {},
    "no batch norm": {"norm": False},
    "accumulation": {"accumulate_grad_batches": 2},
    "clipping by norm": {"gradient_clip_val": 0.3},
    "clipping by value": {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"},
    "accumulation and clipping": {"accumulate_grad_batches": 4, "gradient_clip_val": 0.3},
    "64-true": {"precision": "64-true", "tolerance": 1e-12},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "bf16-true": {"precision": "bf16-true", "tolerance": 0.05},
}


@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "L2"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_run_equals_one_with_the_penalty_in_the_loss(tmp_path, setting, weighted):
    options = dict(SETTINGS[setting])
    tolerance, norm = options.pop("tolerance", 2e-5), options.pop("norm", True)
    dtype = {"64-true": torch.float64, "bf16-true": torch.bfloat16}.get(options.get("precision"), torch.float32)
    anchor, loader = point(Net(norm, seed=3)), data(dtype=dtype)
    names = [name for name in anchor if not name.startswith("head.")]
    omega = random_omega(Net(norm), names=names) if weighted else {name: torch.ones(()) for name in names}
    penalty = ParameterPenalty(1.0, omega if weighted else None, anchor, exclude=["head"])

    mine = trained(tmp_path, Net(norm), penalty, loader=loader, **options)
    right = trained(tmp_path, WithTerm(1.0, omega, anchor, norm=norm), loader=loader, **options)
    plain = trained(tmp_path, Net(norm), loader=loader, **options)

    assert distance(mine, right) < tolerance
    assert distance(mine, plain) > 4 * tolerance
    assert distance(mine, plain) > 0.1


def test_a_parameter_without_gradient_in_a_step_is_pulled_all_the_same(tmp_path):
    """As autograd of the penalty would: the branch is used in every other step."""

    class Branches(Net):
        def __init__(self):
            super().__init__(norm=False)
            self.extra = nn.Linear(4, 3, bias=False)
            nn.init.ones_(self.extra.weight)

        def forward(self, x):
            used = super().forward(x)
            return used + self.extra(self.body(x)) if self.trainer.global_step % 2 else used

    class BranchesWithTerm(Branches):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + sum((p - 0.5).square().sum() for p in self.parameters())

    anchor = {name: torch.full_like(p, 0.5) for name, p in point(Branches()).items()}
    gradients = Gradients()
    mine = trained(tmp_path, Branches(), ParameterPenalty(1.0, None, anchor), gradients)
    right = trained(tmp_path, BranchesWithTerm())
    assert distance(mine, right) < 1e-5
    assert gradients.steps[0]["extra.weight"].unique().tolist() == [1.0]  # 2 (1 - 0.5)


def test_frozen_parameters_stay_until_they_are_thawed(tmp_path):
    class Thaw(Callback):
        def __init__(self):
            self.before = None

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                self.before = point(pl_module)
                pl_module.body.requires_grad_(True)

    net, anchor, thaw = Net(norm=False), {n: torch.zeros_like(p) for n, p in point(Net(norm=False)).items()}, Thaw()
    net.body.requires_grad_(False)
    start = point(net)
    trained(tmp_path, net, ParameterPenalty(1.0, None, anchor), thaw, max_epochs=2)
    assert all(torch.equal(thaw.before[n], start[n]) == n.startswith("body") for n in start)
    assert not any(torch.equal(p, start[n]) for n, p in net.named_parameters())


def test_a_parameter_that_no_optimiser_has_is_left_alone(tmp_path):
    class HeadOnly(Net):
        def configure_optimizers(self):
            return torch.optim.SGD(self.head.parameters(), 0.1)

    net, gradients = HeadOnly(norm=False), Gradients()
    anchor = {name: torch.zeros_like(p) for name, p in point(net).items()}
    trained(tmp_path, net, ParameterPenalty(5.0, None, anchor), gradients, max_steps=1)
    reference = Net(norm=False)
    Net.training_step(reference, next(iter(data())), 0).backward()
    for name, p in reference.named_parameters():
        pull = 10 * p.detach() if name.startswith("head") else 0
        torch.testing.assert_close(gradients.steps[0][name], p.grad + pull)

    with pytest.warns(UserWarning, match=r"No optimizer has any of the parameters that ParameterPenalty pulls"):
        trained(tmp_path, HeadOnly(), ParameterPenalty(5.0, module="body"))


class Two(Net):
    """Manual optimisation: body and head have optimisers of their own, and the head takes two steps."""

    def __init__(self, term=None):
        super().__init__(norm=False)
        self.automatic_optimization, self.term = False, term

    def training_step(self, batch, batch_idx):
        body, head = self.optimizers()
        for optimizer, part in ((head, self.head), (body, self.body), (head, self.head)):
            optimizer.zero_grad()
            loss = Net.training_step(self, batch, batch_idx)
            if self.term is not None:
                loss = loss + self.term(part)
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.body.parameters(), 0.1, 0.9), torch.optim.Adam(self.head.parameters(), 0.02)]


def test_several_optimisers_pull_what_they_step(tmp_path):
    net = Two()
    anchor = {name: torch.full_like(p, 0.2) for name, p in point(net).items()}
    t = trainer(tmp_path, ParameterPenalty(2.0, None, anchor), log_every_n_steps=1)
    t.fit(mine := net, data())
    assert t.callback_metrics["penalty"] > 0
    right = trained(tmp_path, Two(lambda part: 2.0 * sum((p - 0.2).square().sum() for p in part.parameters())))
    assert distance(mine, right) < 1e-5
    assert distance(mine, trained(tmp_path, Two())) > 0.1


def test_a_batch_that_is_skipped_is_no_step(tmp_path):
    class Skips(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) if batch_idx < 2 else None

    class Watch(Callback):
        def __init__(self):
            self.points = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.points.append(point(pl_module))

    anchor = {name: torch.zeros_like(p) for name, p in point(Net()).items()}
    watch = Watch()
    trained(tmp_path, Skips(), ParameterPenalty(1.0, None, anchor), watch, max_epochs=1)
    moved = [
        any(not torch.equal(a[n], b[n]) for n in a) for a, b in zip(watch.points[:-1], watch.points[1:], strict=True)
    ]
    assert moved == [True, False, False]


def test_fused_optimisers_that_unscale_gradients_themselves(tmp_path):
    """Under 16-mixed, their gradients are still multiplied by the loss's scale when the hook runs."""

    class Fused(Net):
        def __init__(self, fused):
            super().__init__(norm=False)
            self.fused = fused

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9, fused=self.fused)

    anchor = {name: torch.zeros_like(p) for name, p in point(Net(norm=False)).items()}

    def run(fused, *callbacks):
        plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
        return trained(tmp_path, Fused(fused), *callbacks, plugins=[plugin])

    scaled, unscaled = (run(fused, ParameterPenalty(0.5, None, anchor)) for fused in (True, False))
    assert getattr(scaled.optimizers().optimizer, "_step_supports_amp_scaling", False)
    assert distance(scaled, unscaled) < 1e-3
    assert distance(scaled, run(True)) > 0.1


def test_small_importances_in_half_precision(tmp_path):
    """1e-9 is zero in float16; what it adds, times λ, is not."""
    omega = {name: torch.full_like(p, 1e-9) for name, p in point(Net(norm=False)).items()}
    anchor, gradients = {name: p + 0.5 for name, p in point(Net(norm=False)).items()}, [Gradients(), Gradients()]
    options = {"loader": data(dtype=torch.float16), "precision": "16-true", "max_steps": 1}
    trained(tmp_path, Net(norm=False), ParameterPenalty(1e8, omega, anchor), gradients[0], **options)
    trained(tmp_path, Net(norm=False), gradients[1], **options)
    for name, gradient in gradients[0].steps[0].items():
        added = gradient - gradients[1].steps[0][name]
        torch.testing.assert_close(added.float(), torch.full(added.shape, -0.1), rtol=0, atol=2e-3)


def test_a_strength_of_zero_changes_nothing(tmp_path):
    class Idle(Net):
        def __init__(self):
            super().__init__()
            self.idle = nn.Parameter(torch.ones(1))

    gradients = Gradients()
    anchor = {name: torch.zeros_like(p) for name, p in point(Idle()).items()}
    net = trained(tmp_path, Idle(), ParameterPenalty(0.0, None, anchor), gradients)
    assert distance(net, trained(tmp_path, Idle())) == 0
    assert {step["idle"] for step in gradients.steps} == {None}


def test_strength_may_change_and_should_pull_may_be_overridden(tmp_path):
    class Late(ParameterPenalty):
        def should_pull(self, trainer, pl_module, optimizer):
            return trainer.current_epoch > 0

    class WarmUp(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            penalty.strength = float(trainer.current_epoch > 0)

    anchor = {name: torch.zeros_like(p) for name, p in point(Net()).items()}
    late = trained(tmp_path, Net(), Late(1.0, None, anchor))
    penalty = ParameterPenalty(0.0, None, anchor)
    warmed = trained(tmp_path, Net(), WarmUp(), penalty)
    always = trained(tmp_path, Net(), ParameterPenalty(1.0, None, anchor))
    assert distance(late, warmed) == 0
    assert distance(late, always) > 0.01


# Where it pulls to


def test_without_an_anchor_to_where_fit_began(tmp_path):
    mine = trained(tmp_path, Net(), ParameterPenalty(1.0))
    right = trained(tmp_path, Net(), ParameterPenalty(1.0, anchor=point(Net())))
    assert distance(mine, right) == 0
    assert distance(mine, trained(tmp_path, Net())) > 0.1


@pytest.mark.parametrize("form", ["module", "relative", "checkpoint", "state dict file", "safetensors", "own state"])
def test_forms_of_an_anchor(tmp_path, form):
    net, other = Net(), Net(seed=3)
    right = trained(tmp_path, Net(), ParameterPenalty(1.0, anchor=point(other), module="body"))
    if form == "checkpoint":
        anchor = tmp_path / "other.ckpt"
        other.momentum = 0.0
        t = trainer(tmp_path, max_epochs=0)
        t.fit(other, data())
        t.save_checkpoint(anchor)
    elif form == "state dict file":
        anchor = str(tmp_path / "other.pt")
        torch.save(other.state_dict(), anchor)
    elif form == "safetensors":
        anchor = tmp_path / "other.safetensors"
        save_file(other.body.state_dict(), anchor)
    elif form == "own state":  # which shares memory with the parameters, and moves with them
        net.load_state_dict(other.state_dict())
        anchor = net.state_dict()
        callback = ParameterPenalty(1.0, anchor=anchor, module="body")
        net.load_state_dict(Net().state_dict())
    else:
        anchor = other.state_dict() if form == "module" else other.body.state_dict()
    if form != "own state":
        callback = ParameterPenalty(1.0, anchor=anchor, module="body.")
    assert distance(trained(tmp_path, net, callback), right) == 0


def test_a_sequence_of_tasks(tmp_path):
    """The documented loop, against one that is written out: Ω summed, one reference point, the head free."""
    tasks = [data(seed=seed) for seed in (1, 2, 3)]

    importances, net = [], Net()
    for k, loader in enumerate(tasks):
        mas = MASImportance(module="body", weights="last", filename=f"task-{k}")
        trained(tmp_path, net, ParameterPenalty(1.0, importances, module="body"), mas, loader=loader)
        importances.append(mas.importance if k % 2 else mas.path)

    omega, right = {}, Net()
    for loader in tasks:
        right = continued(right, omega, point(right))
        trained(tmp_path, right, loader=loader)
        found = estimate_importance(right, loader, "mas", module="body")
        omega = {f"body.{name}": value + omega.get(f"body.{name}", 0) for name, value in found.items()}
    assert distance(net, right) < 1e-4


def continued(net, omega, anchor):
    with_term = WithTerm(1.0, omega, anchor)
    with_term.load_state_dict(net.state_dict())
    return with_term.train()


def test_one_callback_for_several_runs_begins_anew_in_each(tmp_path):
    callback, net = ParameterPenalty(1.0), Net()
    again = Net()
    for seed in (1, 2):
        trained(tmp_path, net, callback, loader=data(seed=seed))
        trained(tmp_path, again, ParameterPenalty(1.0), loader=data(seed=seed))
    assert distance(net, again) == 0


@pytest.mark.parametrize("nothing", [[], {}], ids=["no tasks", "no parameters"])
def test_before_the_second_task_nothing_is_pulled(tmp_path, nothing):
    callback = ParameterPenalty(100.0, nothing)
    assert distance(trained(tmp_path, Net(), callback), trained(tmp_path, Net())) == 0
    assert callback.state_dict() == {}


def test_an_old_heads_importance_is_left_out_by_exclude(tmp_path):
    """The old head had other classes, and parts that the new one has not."""
    old = random_omega(Net(classes=7)) | {"head.extra.weight": torch.ones(2)}
    callback = ParameterPenalty(1.0, [old, random_omega(Net())], exclude=["head"])
    summed = {name: 2 * value for name, value in random_omega(Net()).items() if name.startswith("body")}
    assert all(torch.equal(old[name], value / 2) for name, value in summed.items())
    right = ParameterPenalty(1.0, summed)
    assert distance(trained(tmp_path, Net(), callback), trained(tmp_path, Net(), right)) == 0


# The published methods, protocol 3.3 and 3.4


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


# Resuming, checkpoints, memory


class Crash(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 7:
            raise RuntimeError("crash")


def test_crash_and_resume_equals_the_uninterrupted_run(tmp_path):
    """The resumed run is pulled to where the first began, though its module is another and the checkpoint has moved."""

    def penalty():
        return ParameterPenalty(1.0, random_omega(Net()), exclude=["head"])

    def batches():  # a loader that can go on within an epoch
        return tensor_loader(*data().dataset.tensors, batch_size=4, shuffle=True)

    checkpoint = ModelCheckpoint(tmp_path, filename="last", every_n_train_steps=1)
    with pytest.raises(RuntimeError, match="crash"):
        trained(tmp_path, Net(), penalty(), checkpoint, Crash(), loader=batches(), enable_checkpointing=True)
    path = str(tmp_path / "last.ckpt")
    resumed = Net(seed=9)
    trainer(tmp_path, penalty()).fit(resumed, batches(), ckpt_path=path, weights_only=True)
    whole = trained(tmp_path, Net(), penalty(), loader=batches())
    assert all(map(torch.equal, resumed.parameters(), whole.parameters()))

    elsewhere, at_the_crash = Net(seed=9), torch.load(path, weights_only=True)["state_dict"]
    wrong = ParameterPenalty(1.0, random_omega(Net()), at_the_crash, exclude=["head"])
    trainer(tmp_path, wrong).fit(elsewhere, batches(), ckpt_path=path)
    assert distance(elsewhere, whole) > 1e-2


def test_a_checkpoint_that_is_saved_after_fit_can_be_gone_on_with(tmp_path):
    first = trainer(tmp_path, ParameterPenalty(1.0), max_epochs=2)
    first.fit(Net(), data())
    first.save_checkpoint(tmp_path / "two.ckpt")
    resumed = Net(seed=9)
    trainer(tmp_path, ParameterPenalty(1.0), max_epochs=4).fit(resumed, data(), ckpt_path=tmp_path / "two.ckpt")
    whole = trained(tmp_path, Net(), ParameterPenalty(1.0), max_epochs=4)
    assert all(map(torch.equal, resumed.parameters(), whole.parameters()))


def test_a_checkpoint_from_a_run_without_the_penalty_is_an_anchor_with_a_warning(tmp_path):
    first = trainer(tmp_path, max_epochs=2)
    first.fit(net := Net(), data())
    first.save_checkpoint(tmp_path / "plain.ckpt")
    began = point(net)
    with pytest.warns(UserWarning, match=r"resume from has no ParameterPenalty anchor"):
        trainer(tmp_path, penalty := ParameterPenalty(1.0), max_epochs=3).fit(
            Net(), data(), ckpt_path=tmp_path / "plain.ckpt"
        )
    assert all(torch.equal(value, began[name]) for name, value in penalty.state_dict()["anchor"].items())


@pytest.mark.parametrize("given", [True, False])
def test_what_a_checkpoint_holds(tmp_path, given):
    """Where the run began, of what is pulled; nothing if the anchor was given."""
    start = point(Net())
    penalty = ParameterPenalty(1.0, random_omega(Net()), start if given else None, exclude=["head"])
    t = trainer(tmp_path, penalty, max_epochs=1)
    t.fit(Net(), data())
    t.save_checkpoint(tmp_path / "end.ckpt")
    saved = torch.load(tmp_path / "end.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == Net().state_dict().keys()
    if given:
        assert saved["callbacks"] == {}
        return
    ((key, state),) = saved["callbacks"].items()
    assert key == penalty.state_key
    assert "ParameterPenalty" in key
    assert list(state) == ["anchor"]
    assert state["anchor"].keys() == {name for name in start if name.startswith("body")}
    assert all(torch.equal(value, start[name]) for name, value in state["anchor"].items())


@pytest.mark.parametrize("run", ["test", "validate", "predict"])
def test_other_runs_are_left_alone(tmp_path, run):
    """And what they load does not count for the next ``fit``."""
    penalty = ParameterPenalty(1.0)
    first = trainer(tmp_path, penalty)
    first.fit(Net(), data())
    first.save_checkpoint(tmp_path / "end.ckpt")
    again = ParameterPenalty(1.0)
    net = Net(seed=4)
    elsewhere = ParameterPenalty(1.0, "missing.safetensors", log_name="elsewhere")  # needed by nobody but fit
    getattr(trainer(tmp_path, again, elsewhere), run)(net, data(), ckpt_path=tmp_path / "end.ckpt")
    net.load_state_dict(Net().state_dict())
    right = trained(tmp_path, Net(), ParameterPenalty(1.0))
    assert distance(trained(tmp_path, net.train(), again), right) == 0


@pytest.mark.parametrize("breaks", [True, False], ids=["crash", "end"])
def test_nothing_of_the_model_is_kept(tmp_path, breaks):
    penalty, net = ParameterPenalty(1.0, random_omega(Net())), Net()
    t = trainer(tmp_path, penalty, *([Crash()] if breaks else []))
    if breaks:
        with pytest.raises(RuntimeError, match="crash"):
            t.fit(net, data())
    else:
        t.fit(net, data())
    reference = weakref.ref(net.body[0].weight)
    held = [o for o in vars(penalty).values() if isinstance(o, list | dict) and o is not penalty.importances and o]
    assert held == [penalty.state_dict()["anchor"]]
    del net, t, penalty.log, penalty.log_dict  # the last two are Lightning's, on every callback
    gc.collect()
    assert reference() is None


def test_it_can_be_copied_and_pickled(tmp_path):
    penalty = ParameterPenalty(1.0, random_omega(Net()), point(Net(seed=3)), exclude=["head"])
    right = trained(tmp_path, Net(), penalty)
    for twin in (copy.deepcopy(penalty), pickle.loads(pickle.dumps(penalty))):
        assert distance(trained(tmp_path, Net(), twin), right) == 0


# The log


def test_the_value_is_logged_when_lightning_logs_and_computed_only_then(tmp_path, monkeypatch):
    computed = []

    def noted(*arguments):
        computed.append(quadratic_penalty(*arguments))
        return computed[-1]

    class Watch(Callback):
        def __init__(self):
            self.points = []

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.points.append(point(pl_module))

    monkeypatch.setattr(parameter_penalty, "quadratic_penalty", noted)
    logger, watch = CSVLogger(tmp_path), Watch()
    omega, start = random_omega(Net()), point(Net())
    penalty = ParameterPenalty(3.0, omega, log_name="train/penalty")
    t = trainer(tmp_path, penalty, watch, logger=logger, log_every_n_steps=2, accumulate_grad_batches=2)
    t.fit(Net(), data())  # 2 steps in each of 3 epochs
    header, *rows = (line.split(",") for line in Path(logger.log_dir, "metrics.csv").read_text().splitlines())
    logged = {int(row[header.index("step")]): float(row[header.index("train/penalty")]) for row in rows}
    right = {}
    for step in (1, 3, 5):
        p, a, o = zip(*((watch.points[step][name], start[name], omega[name]) for name in omega), strict=True)
        right[step] = quadratic_penalty(p, a, o, 3.0).item()
    assert logged == pytest.approx(right, rel=1e-6)
    assert min(right.values()) > 1e-3
    assert [value.item() for value in computed] == pytest.approx(list(right.values()))
    assert t.callback_metrics["train/penalty"].item() == pytest.approx(right[5])


def test_it_need_not_be_logged(tmp_path):
    t = trainer(tmp_path, ParameterPenalty(1.0, log_name=None), log_every_n_steps=1)
    t.fit(Net(), data())
    assert "penalty" not in t.callback_metrics


def test_two_in_one_trainer_need_different_names(tmp_path):
    with pytest.raises(RuntimeError):  # Lightning's own
        trainer(tmp_path, ParameterPenalty(1.0), ParameterPenalty(2.0))
    weak = ParameterPenalty(0.5, log_name="l2")
    strong = ParameterPenalty(1.0, random_omega(Net()), log_name="ewc")
    both = trained(tmp_path, Net(), weak, strong)
    total = {name: 0.5 + omega for name, omega in random_omega(Net()).items()}
    assert distance(both, trained(tmp_path, Net(), ParameterPenalty(1.0, total))) < 1e-5


# Misuse: before any training


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy])
def test_strategies_that_shard_are_refused(strategy):
    fake = SimpleNamespace(strategy=object.__new__(strategy))
    with pytest.raises(MisconfigurationException, match=f"ParameterPenalty needs whole param.* {strategy.__name__}"):
        ParameterPenalty(1.0).setup(fake, Net(), "fit")


@pytest.mark.parametrize("strength", [-0.1, float("nan"), float("inf")])
def test_strengths_that_are_none_are_refused(strength):
    with pytest.raises(MisconfigurationException, match=f"strength must be finite and not negative; got {strength}"):
        ParameterPenalty(strength)


def ones(**changed):
    return {name: torch.ones_like(p) for name, p in point(Net()).items()} | changed


def of_kind(kind, **options):
    return Importance(ones(), kind=kind, num_samples=1, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"importances": ones(tail=torch.ones(1))},
            r"Net: there is no parameter 'tail', only .*body\.0\.weight.* exclude=",
        ),
        ({"importances": [ones()], "module": "body"}, r"there is no parameter 'body\.0\.weight'.* the same module="),
        (
            {"importances": {f"module.{name}": value for name, value in ones().items()}},
            r"no parameter 'module\.body\.0\.weight', only .* Without the prefix 'module\.' the names would match",
        ),
        (
            {"anchor": {f"model.{name}": value for name, value in ones().items()}},
            r"With the prefix 'model\.' the names",
        ),
        (
            {"importances": ones(**{"head.bias": torch.ones(7)})},
            r"importance of 'head\.bias' is \(7,\), and the parameter \(3,\)\. .*exclude=",
        ),
        (
            {"importances": [ones(**{"head.bias": torch.ones(7)}), ones()]},
            r"importances of 'head\.bias' are \(7,\) for one task and \(3,\) for another.*exclude=",
        ),
        ({"importances": ones(**{"head.bias": torch.tensor([1, torch.nan, 1])})}, r"'head\.bias' has NaN"),
        ({"importances": ones(**{"head.bias": torch.tensor([1.0, -1, 1])})}, r"'head\.bias' has a negative entry"),
        ({"importances": [of_kind("mas"), of_kind("fisher")]}, r"different kinds, .*'fisher'.*'mas'"),
        ({"importances": [of_kind("mas"), of_kind("mas", reduction="batch")]}, r"different kinds, .*'batch'"),
        ({"importances": "missing.safetensors"}, r"missing\.safetensors does not exist"),
        ({"importances": ["README.md"]}, r"README\.md"),
        ({"anchor": {"head.bias": torch.zeros(3)}}, r"anchor has nothing for the parameter 'body\.0\.weight'"),
        ({"anchor": {}}, r"anchor has nothing for the parameter 'body\.0\.weight'.*exclude="),
        ({"anchor": ones(**{"head.bias": torch.zeros(7)})}, r"has \(7,\) for the parameter 'head\.bias'.* is \(3,\)"),
        ({"anchor": ones(**{"head.bias": torch.full((3,), torch.inf)})}, r"anchor of 'head\.bias' is not finite"),
        ({"anchor": "missing.ckpt"}, r"anchor missing\.ckpt does not exist; expected a Lightning checkpoint"),
        ({"anchor": "broken.ckpt"}, r"anchor broken\.ckpt cannot be read"),
        ({"anchor": "broken.safetensors"}, r"anchor broken\.safetensors cannot be read"),
        ({"anchor": "list.pt"}, r"anchor list\.pt holds an object of the class list, not a state dict"),
        ({"module": "bodi"}, r"no module 'bodi'"),
        ({"exclude": ["tail"]}, r"exclude='tail' is no parameter or module"),
        ({"exclude": "head"}, r"exclude must be a sequence of names; got the string 'head'"),
        ({"exclude": ["body", "head"]}, r"there is no parameter to pull\."),
        ({"module": "body", "exclude": ["body"]}, r"there is no parameter to pull below 'body'\."),
    ],
)
def test_misuse_is_refused_before_training(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    Path("README.md").write_text("no importances")
    Path("broken.ckpt").write_bytes(b"broken")
    Path("broken.safetensors").write_bytes(b"broken")
    torch.save([1, 2], "list.pt")
    with pytest.raises(MisconfigurationException, match=f"ParameterPenalty.*{message}"):
        trained(tmp_path, Net(), NoTraining(), ParameterPenalty(1.0, **options))


def test_a_checkpoint_of_other_parameters_is_refused(tmp_path):
    t = trainer(tmp_path, penalty := ParameterPenalty(1.0, exclude=["head"]))
    t.fit(Net(), data())
    t.save_checkpoint(tmp_path / "end.ckpt")
    again = ParameterPenalty(1.0, random_omega(Net()), exclude=["head"])
    assert again.state_key == penalty.state_key
    saved = torch.load(tmp_path / "end.ckpt", weights_only=True)
    del saved["callbacks"][penalty.state_key]["anchor"]["body.0.bias"]
    torch.save(saved, tmp_path / "end.ckpt")
    with pytest.raises(MisconfigurationException, match=r"anchor has nothing for the parameter 'body\.0\.bias'"):
        trainer(tmp_path, again, max_epochs=4).fit(Net(), data(), ckpt_path=tmp_path / "end.ckpt")


class Made(Net):
    """Lightning calls ``configure_model`` after the callbacks' ``setup``."""

    def __init__(self):
        LightningModule.__init__(self)
        self.body = self.head = None
        self.momentum, self.lr = 0.9, 0.1

    def configure_model(self):
        if self.body is None:
            built = Net()
            self.body, self.head = built.body, built.head


def test_a_module_that_is_made_in_configure_model(tmp_path):
    right = trained(tmp_path, Net(), ParameterPenalty(1.0, module="body"))
    assert distance(trained(tmp_path, Made(), ParameterPenalty(1.0, module="body")), right) == 0
    with pytest.raises(MisconfigurationException, match="no module 'bodi'"):
        trained(tmp_path, Made(), NoTraining(), ParameterPenalty(1.0, module="bodi"))


def test_tied_parameters_are_pulled_once(tmp_path):
    class Tied(Net):
        def __init__(self):
            super().__init__(norm=False)
            self.again = self.body[2]

    net, gradients = Tied(), Gradients()
    anchor = {name: torch.zeros_like(p) for name, p in point(net).items()}
    trained(tmp_path, net, ParameterPenalty(1.0, None, anchor), gradients, max_steps=1)
    start = Tied()
    Net.training_step(start, next(iter(data())), 0).backward()
    for name, p in start.named_parameters():
        torch.testing.assert_close(gradients.steps[0][name], p.grad + 2 * p.detach())


# LightningCLI


class CLIData(LightningDataModule):
    def train_dataloader(self):
        return data()


def test_lightning_cli_yaml(tmp_path):
    omegas = [random_omega(Net().body, seed) for seed in (5, 6)]
    for k, omega in enumerate(omegas):
        Importance({n: v.float() for n, v in omega.items()}, kind="mas", num_samples=1).save(tmp_path / f"{k}.st")
    torch.save({"state_dict": Net(seed=3).state_dict()}, tmp_path / "anchor.ckpt")
    config = tmp_path / "config.yaml"
    config.write_text(
        f"""
seed_everything: false
trainer:
  accelerator: cpu
  max_epochs: 3
  logger: false
  log_every_n_steps: 1
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  default_root_dir: {tmp_path}
  callbacks:
    - class_path: pl_personalize.callbacks.ParameterPenalty
      init_args:
        strength: 0.5
        importances: [{tmp_path / "0.st"}, {tmp_path / "1.st"}]
        anchor: {tmp_path / "anchor.ckpt"}
        module: body
        exclude: [body.3]
        log_name: train/penalty
    - class_path: pl_personalize.callbacks.ParameterPenalty
      init_args:
        strength: 0.001
        importances: {tmp_path / "0.st"}
        module: body
model:
  norm: true
"""
    )
    cli = LightningCLI(Net, CLIData, args=["--config", str(config)], run=False, save_config_callback=None)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    first = ParameterPenalty(0.5, omegas, point(Net(seed=3)), module="body", exclude=["body.3"], log_name="a")
    right = trained(tmp_path, Net(), first, ParameterPenalty(0.001, omegas[0], module="body"))
    assert distance(cli.model, right) < 1e-5
    assert "train/penalty" in cli.trainer.callback_metrics


def test_lightning_cli_from_the_command_line(tmp_path):
    arguments = [
        "--seed_everything=false", "--trainer.accelerator=cpu", "--trainer.logger=false",
        f"--trainer.default_root_dir={tmp_path}", "--trainer.callbacks=pl_personalize.callbacks.ParameterPenalty",
        "--trainer.callbacks.strength=0.001", '--trainer.callbacks.exclude=["head"]',
    ]  # fmt: skip
    cli = LightningCLI(Net, CLIData, args=arguments, run=False, save_config_callback=None)
    (callback,) = (c for c in cli.trainer.callbacks if isinstance(c, ParameterPenalty))
    assert (callback.strength, callback.importances, callback.anchor, callback.exclude) == (
        0.001,
        None,
        None,
        ("head",),
    )


# Two processes

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
