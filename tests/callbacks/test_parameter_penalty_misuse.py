"""ParameterPenalty: misuse that is refused before training, and LightningCLI."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from penalty_runs import Gradients, Net, data, distance, point, random_omega, trained, trainer
from small_runs import NoTraining

from pl_personalize import Importance
from pl_personalize.callbacks import ParameterPenalty


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
