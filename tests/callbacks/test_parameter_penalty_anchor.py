"""ParameterPenalty: anchors, resumed runs and checkpoints."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from penalty_runs import Net, continued, data, distance, point, random_omega, trained, trainer
from safetensors.torch import save_file

from pl_personalize import estimate_importance
from pl_personalize.callbacks import MASImportance, ParameterPenalty
from pl_personalize.datamodules.loader import tensor_loader


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
