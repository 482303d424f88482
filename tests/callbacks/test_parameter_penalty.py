"""ParameterPenalty: its gradient, and training with it."""

import copy

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from penalty_runs import Gradients, Net, WithTerm, data, distance, point, random_omega, trained, trainer
from torch import nn

from pl_personalize.callbacks import ParameterPenalty


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

    with pytest.warns(UserWarning, match=r"No optimizer has any of the parameters that the penalty pulls"):
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
