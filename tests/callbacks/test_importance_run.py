"""Importance callbacks: effects on the run around them."""

import os

import pytest
import torch
from importance_runs import Net, assert_no_result, assert_same, best_of_three, fitted, wanted
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from reference import relative_error
from small_runs import ROWS, Rows, in_order, shuffled
from small_runs import quiet_trainer as trainer
from torch.utils.data import DataLoader

from pl_personalize import estimate_importance
from pl_personalize.callbacks import FisherImportance, MASImportance


def test_a_run_ends_as_it_would_without_the_callback(tmp_path):
    def end(*callbacks):
        torch.manual_seed(3)
        net = Net()
        trainer(tmp_path, *callbacks, max_epochs=2).fit(net, shuffled(Rows()))
        return (
            net.state_dict(),
            torch.rand(3),
            net.training,
            [(p.requires_grad, p.grad is None) for p in net.parameters()],
        )

    plain, mine = end(), end(MASImportance(), FisherImportance())
    assert all(torch.equal(plain[0][name], value) for name, value in mine[0].items())
    assert torch.equal(plain[1], mine[1])
    assert plain[2:] == mine[2:]


def test_a_second_fit_goes_on_as_it_would_without_the_callback(tmp_path):
    def continued(*callbacks):
        torch.manual_seed(3)
        net = Net()
        trainer(tmp_path, *callbacks, max_epochs=2).fit(net, shuffled(Rows()))
        trainer(tmp_path, max_epochs=2).fit(net, shuffled(Rows()))
        return net.state_dict()

    plain, mine = continued(), continued(MASImportance())
    assert all(torch.equal(plain[name], value) for name, value in mine.items())


def test_of_the_hooks_per_step_only_the_try_out_is_overridden():
    hooks = {name for name in dir(Callback) if name.startswith("on_") or name in ("setup", "teardown")}
    for cls in (MASImportance, FisherImportance):
        mine = {name for name in hooks if getattr(cls, name) is not getattr(Callback, name)}
        around = {"setup", "on_fit_start", "on_train_start", "on_fit_end", "on_predict_start", "on_predict_end"}
        assert mine == around | {"on_train_batch_start", "teardown"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_run_that_breaks_off_leaves_no_file(tmp_path, error):
    class Break(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 2:
                raise error("stop")

    callback = MASImportance()
    with pytest.raises((SystemExit, error)):
        trainer(tmp_path, Break(), callback).fit(Net(), in_order(Rows()))
    assert_no_result(callback)
    assert list(tmp_path.rglob("*importances*")) == []


def test_a_write_that_fails_leaves_no_half_written_file(tmp_path, monkeypatch):
    callback = MASImportance()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(MisconfigurationException, match=r"cannot write .*mas.safetensors \(disk full\).* in memory"):
        fitted(tmp_path, callback, net=(net := Net()))
    assert_same(callback.importance, wanted(net, Rows()))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_the_callback_has_no_state_in_a_checkpoint(tmp_path):
    assert MASImportance().state_dict() == {}
    callback = FisherImportance(
        dirpath=tmp_path, generator=torch.Generator(), forward=lambda model, batch: model(batch[0])
    )
    best_of_three(tmp_path, callback)
    (path,) = (tmp_path / "checkpoints").glob("*.ckpt")
    saved = torch.load(path, weights_only=True)
    assert not any("Importance" in key for key in saved["callbacks"])


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed", "bf16-true"])
def test_precision(tmp_path, precision):
    data, net, callback = Rows(), Net(), MASImportance()
    fitted(tmp_path, callback, net=net, loader=in_order(data), precision=precision)
    double = precision == "64-true"
    assert {value.dtype for value in callback.importance.values()} == {torch.float64 if double else torch.float32}
    x = data.x.to(next(net.parameters()).dtype)
    batches = [x[k : k + 4] for k in range(0, ROWS, 4)]
    assert_same(callback.importance, estimate_importance(net, batches, "mas"), 1e-12 if double else 1e-6)
    if precision == "bf16-mixed":
        rounded = estimate_importance(
            net,
            batches,
            "mas",
            forward=lambda model, batch: torch.autocast("cpu", torch.bfloat16)(model)(batch).float(),
        )
        assert relative_error(callback.importance, rounded) > 1e-4


@pytest.mark.parametrize("run", ["fit", "predict"])
def test_fast_dev_run_takes_as_many_batches(tmp_path, run):
    callback, data, net = MASImportance(), Rows(), Net()
    t = trainer(tmp_path, callback, fast_dev_run=2)
    getattr(t, run)(net, DataLoader(data, batch_size=4))
    assert callback.importance.num_samples == 8
    assert_same(callback.importance, estimate_importance(net, [data.x[:8]], "mas"))
