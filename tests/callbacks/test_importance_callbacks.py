"""MASImportance and FisherImportance on Trainers and modules that know nothing of this project."""

import copy
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from reference import relative_error
from small_runs import ROWS, Data, NoTraining, Rows, in_order, run_forked, shuffled
from small_runs import quiet_trainer as trainer
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SubsetRandomSampler

from pl_personalize import Importance, estimate_importance
from pl_personalize.callbacks import FisherImportance, MASImportance
from pl_personalize.callbacks.importance_callback import ImportanceCallback, _histogram


class Net(LightningModule):
    """A user's own module: classifier of (n, 6), with or without batch norm; dropout, so that modes matter."""

    def __init__(self, norm: bool = True, lr: float = 0.1):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            norms = [nn.BatchNorm1d(5)] if norm else []
            self.features = nn.Sequential(nn.Linear(6, 5), *norms, nn.Tanh(), nn.Dropout(0.3))
            self.classifier = nn.Linear(5, 3)
        self.lr = lr
        self.score = iter(())

    def forward(self, x):
        return self.classifier(self.features(x))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("score", next(self.score, 0.0))

    def predict_step(self, batch, batch_idx):
        return self(batch if isinstance(batch, torch.Tensor) else batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)


def fitted(tmp_path, callback, *, net=None, loader=None, **options) -> LightningModule:
    net = net or Net()
    trainer(tmp_path, callback, **options).fit(net, in_order(Rows()) if loader is None else loader)
    return net


def wanted(net, dataset, kind="mas", **options) -> Importance:
    return estimate_importance(net, [(dataset.x, dataset.y)], kind, **options)


def assert_same(values, reference, tolerance=1e-6):
    assert relative_error(values, reference) < tolerance


def assert_no_result(callback):
    assert callback.path is None
    with pytest.raises(MisconfigurationException, match="has no importances yet"):
        _ = callback.importance


# What is estimated


@pytest.mark.parametrize("norm", [True, False], ids=["batch norm", "no batch norm"])
def test_the_train_data_in_order_each_sample_once(tmp_path, norm):
    data, callback = Rows(), MASImportance()
    net = Net(norm)
    trainer(tmp_path, callback, Forget(data)).fit(net, in_order(data))

    assert data.read == list(range(ROWS))
    assert_same(callback.importance, wanted(net, data))
    assert (callback.importance.num_samples, callback.importance.kind) == (ROWS, "mas")
    assert all(value.dtype == torch.float32 for value in callback.importance.values())


class Forget(Callback):
    """Forgets the reads of training; it comes before the callback in the list of hooks."""

    def __init__(self, data):
        self.data = data

    def on_train_epoch_end(self, trainer, pl_module):
        self.data.read.clear()


def test_the_file_is_the_importance(tmp_path):
    callback = MASImportance()
    fitted(tmp_path, callback)
    loaded = Importance.load(callback.path)
    assert Path(callback.path) == tmp_path / "importances" / "mas.safetensors"
    assert {n: v.tolist() for n, v in loaded.items()} == {n: v.tolist() for n, v in callback.importance.items()}
    assert (loaded.kind, loaded.num_samples) == ("mas", ROWS)


def test_folder_and_name_may_be_chosen(tmp_path):
    callback = FisherImportance(dirpath=tmp_path / "a" / "b", filename="task-1")
    fitted(tmp_path, callback)
    assert Path(callback.path) == tmp_path / "a" / "b" / "task-1.safetensors"
    assert Importance.load(callback.path).kind == "fisher"


@pytest.mark.parametrize(
    ("run", "loader"),
    [
        pytest.param("fit", lambda data, sampler: in_order(data, sampler=sampler), id="fit"),
        pytest.param("predict", lambda data, sampler: DataLoader(data, batch_size=4, sampler=sampler), id="predict"),
        # Not with predict: there Lightning drops the sampler inside a batch sampler and predicts all the rows.
        pytest.param(
            "fit",
            lambda data, sampler: DataLoader(data, batch_sampler=BatchSampler(sampler, 4, False)),
            id="batch sampler",
        ),
    ],
)
def test_a_subset_sampler_says_which_samples_there_are(tmp_path, run, loader):
    """The rest may be the validation split."""
    data, rows, callback, net = Rows(), [15, 3, 8, 1, 20, 9, 2], MASImportance(), Net()
    getattr(trainer(tmp_path, callback), run)(net, loader(data, SubsetRandomSampler(rows)))
    assert callback.importance.num_samples == 7
    assert_same(callback.importance, estimate_importance(net, [data.x[sorted(rows)]], "mas"))


def test_a_dataset_of_whole_batches(tmp_path):
    """``DataLoader(batch_size=None)``: an item is a batch."""
    data, net, callback = Rows(), Net(), MASImportance()
    parts = [(data.x[k : k + 4], data.y[k : k + 4]) for k in range(0, ROWS, 4)]
    fitted(tmp_path, callback, net=net, loader=DataLoader(parts, batch_size=None, shuffle=True))
    assert callback.importance.num_samples == ROWS
    assert_same(callback.importance, wanted(net, data))


def test_own_collate_and_workers_are_kept(tmp_path):
    data, callback, net = Rows(), MASImportance(), Net()

    def collate(items):
        return torch.stack([x for x, _ in items]) * 2, torch.stack([y for _, y in items])

    loader = in_order(data, collate_fn=collate, num_workers=1)
    fitted(tmp_path, callback, net=net, loader=loader)
    assert_same(callback.importance, estimate_importance(net, [data.x * 2], "mas"))


def test_several_train_loaders_count_one_after_the_other(tmp_path):
    class Two(Net):
        def training_step(self, batch, batch_idx):
            return sum(super(Two, self).training_step(part, batch_idx) for part in batch.values())

    net, callback, (a, b) = Two(), MASImportance(), (Rows(), Rows(10, seed=2))
    fitted(tmp_path, callback, net=net, loader={"a": in_order(a), "b": in_order(b)})
    assert callback.importance.num_samples == 33
    assert_same(callback.importance, estimate_importance(net, [a.x, b.x], "mas"))


def test_an_iterable_dataset_is_taken_as_it_is(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([data[k] for k in range(ROWS)])

    data, callback, net = Rows(), MASImportance(), Net()
    fitted(tmp_path, callback, net=net, loader=DataLoader(Stream(), batch_size=4))
    assert_same(callback.importance, wanted(net, data))


@pytest.mark.parametrize("kind", ["mas", "all", "true", "sampled"])
def test_kinds(tmp_path, kind):
    data, net = Rows(), Net()
    callback = {
        "mas": MASImportance,
        "all": lambda: FisherImportance(draws="all"),
        "true": lambda: FisherImportance(labels="true"),
        "sampled": lambda: FisherImportance(draws=4, generator=torch.Generator().manual_seed(6)),
    }[kind]()
    fitted(tmp_path, callback, net=net, loader=in_order(data))
    reference = {
        "mas": lambda: wanted(net, data),
        "all": lambda: wanted(net, data, "fisher", draws="all"),
        "true": lambda: wanted(net, data, "empirical_fisher"),
        "sampled": lambda: estimate_importance(
            net,
            [data.x[k : k + 4] for k in range(0, ROWS, 4)],
            "fisher",
            draws=4,
            generator=torch.Generator().manual_seed(6),
        ),
    }[kind]()
    assert_same(callback.importance, reference)
    assert callback.importance.kind == reference.kind
    assert Path(callback.path).stem == reference.kind


def test_part_of_the_module(tmp_path):
    data, net, callback = (
        Rows(),
        Net(),
        MASImportance(module="features", exclude=["features.1", "features.0.bias"]),
    )
    fitted(tmp_path, callback, net=net, loader=in_order(data))
    assert list(callback.importance) == ["0.weight"]
    assert_same(callback.importance, {"0.weight": wanted(net, data)["features.0.weight"]})


def test_own_forward_and_published_reduction(tmp_path):
    data, net = Rows(), Net()
    scaled = MASImportance(forward=lambda model, batch: 3 * model(batch[0]), filename="a")
    published = MASImportance(reduction="batch", filename="b")
    trainer(tmp_path, scaled, published).fit(net, in_order(data))
    assert_same(scaled.importance, {name: 9 * value for name, value in wanted(net, data).items()})
    batches = [data.x[k : k + 4] for k in range(0, ROWS, 4)]
    assert_same(published.importance, estimate_importance(net, batches, "mas", reduction="batch"))
    assert relative_error(published.importance, wanted(net, data)) > 0.01


# Where the data come from


def test_an_iterable_of_batches(tmp_path):
    net, data = Net(), Rows(9, seed=2)
    callback = MASImportance([data.x[:5], data.x[5:]])
    fitted(tmp_path, callback, net=net)
    assert_same(callback.importance, wanted(net, data))


@pytest.mark.parametrize(
    ("name", "stage", "parts"),
    [
        ("train", "fit", [Rows()]),
        ("val", "validate", [Rows(9, seed=2)]),
        ("test", "test", [Rows(5, seed=3), Rows(6, seed=4)]),
        ("predict", "predict", [Rows(7, seed=5)]),
    ],
)
def test_the_name_of_a_stage_of_the_datamodule(tmp_path, name, stage, parts):
    net, data, callback = Net(), Data(), MASImportance(name)
    trainer(tmp_path, callback, limit_val_batches=0).fit(net, datamodule=data)
    assert data.stages == (["fit"] if name == "train" else ["fit", stage])
    assert_same(callback.importance, estimate_importance(net, [part.x for part in parts], "mas"))
    assert callback.importance.num_samples == sum(map(len, parts))


def test_the_name_of_a_stage_of_the_module(tmp_path):
    class Serving(Net):
        def predict_dataloader(self):
            return DataLoader(Rows(7, seed=5, labels=False), batch_size=4)

    net, callback = Serving(), MASImportance("predict")
    fitted(tmp_path, callback, net=net)
    assert_same(callback.importance, wanted(net, Rows(7, seed=5)))


def test_predict_alone_on_unlabelled_images(tmp_path):
    """Lightning predicts in inference mode; a fit of the same module comes after it."""
    net, data = Net(), Rows(labels=False)
    before = copy.deepcopy(net.state_dict())
    callbacks = [MASImportance(), FisherImportance(draws="all")]
    predictions = trainer(tmp_path, *callbacks).predict(net, DataLoader(data, batch_size=4))

    for callback, reference in zip(
        callbacks, (wanted(net, data), wanted(net, data, "fisher", draws="all")), strict=True
    ):
        assert_same(callback.importance, reference)
        assert_same(Importance.load(callback.path), reference)
        assert not any(value.is_inference() for value in callback.importance.values())
    torch.testing.assert_close(torch.cat(predictions), net.eval()(data.x))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())

    again = MASImportance()
    fitted(tmp_path, again, net=net.train())
    assert not torch.equal(net.features[0].weight, before["features.0.weight"])
    assert not any(value.is_inference() for value in net.state_dict().values())
    assert_same(again.importance, wanted(net, Rows()))


@pytest.mark.parametrize("options", [{}, {"dataloader": DataLoader(Rows(), batch_size=4)}], ids=["predicted", "given"])
@pytest.mark.parametrize("why", ["no data", "no batches"])
def test_a_predict_run_without_a_batch_is_refused(tmp_path, why, options):
    callback = MASImportance(**options)
    limit = {"limit_predict_batches": 0} if why == "no batches" else {}
    with pytest.raises(MisconfigurationException, match="MASImportance: the predict run has no batches"):
        trainer(tmp_path, callback, **limit).predict(Net(), DataLoader(Rows(0 if why == "no data" else 5)))
    assert_no_result(callback)
    trainer(tmp_path, callback).predict(Net(), DataLoader(Rows(5)))  # the next user has some
    assert callback.importance.num_samples == (ROWS if options else 5)


def test_a_predict_run_without_a_batch_is_fine_where_nothing_is_to_be_estimated(tmp_path):
    class Never(MASImportance):
        def should_estimate(self, trainer, pl_module):
            return False

    trainer(tmp_path, Never()).predict(Net(), DataLoader(Rows(0)))


def test_predict_with_other_data_for_the_importances(tmp_path):
    net, other = Net(), Rows(9, seed=2)
    callback = MASImportance([other.x])
    trainer(tmp_path, callback).predict(net, DataLoader(Rows(labels=False), batch_size=4))
    assert_same(callback.importance, wanted(net, other))


def test_it_runs_where_it_should(tmp_path):
    class Never(MASImportance):
        def should_estimate(self, trainer, pl_module):
            return False

    callback = Never()
    net = fitted(tmp_path, callback)
    trainer(tmp_path, callback).predict(net, DataLoader(Rows(labels=False), batch_size=4))
    assert_no_result(callback)
    assert not (tmp_path / "importances").exists()


# Which weights


class Watch(Callback):
    """The weights after each epoch, and at the end."""

    def __init__(self):
        self.epochs, self.end = [], None

    def on_train_epoch_end(self, trainer, pl_module):
        self.epochs.append(copy.deepcopy(pl_module.state_dict()))


def best_of_three(tmp_path, callback, scores=(0.1, 0.9, 0.3), net=None, **options):
    net, watch = net or Net(), Watch()
    net.score = iter(scores)
    options = {"monitor": "score", "mode": "max"} | options
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", **options)
    t = trainer(tmp_path, watch, callback, checkpoint, max_epochs=3, enable_checkpointing=True)
    t.fit(net, in_order(Rows()), DataLoader(Rows(3), batch_size=3))
    return net, watch, checkpoint


@pytest.mark.parametrize("norm", [True, False])
def test_the_best_weights_are_used_and_the_last_put_back(tmp_path, norm):
    callback = MASImportance()
    net, watch, checkpoint = best_of_three(tmp_path, callback, net=Net(norm))

    assert "epoch=1" in checkpoint.best_model_path
    assert all(torch.equal(value, watch.epochs[2][name]) for name, value in net.state_dict().items())
    best = Net(norm)
    best.load_state_dict(watch.epochs[1])
    assert_same(callback.importance, wanted(best, Rows()))
    assert relative_error(callback.importance, wanted(net, Rows())) > 1e-3


def test_the_last_weights_are_used_if_asked_for(tmp_path):
    callback = MASImportance(weights="last")
    net, _, _ = best_of_three(tmp_path, callback)
    assert_same(callback.importance, wanted(net, Rows()))


def test_a_checkpoint_that_monitors_nothing_has_no_best(tmp_path):
    callback = MASImportance()
    net, _, checkpoint = best_of_three(tmp_path, callback, monitor=None, save_top_k=1, mode="min")
    assert checkpoint.best_model_path
    assert_same(callback.importance, wanted(net, Rows()))


def test_a_best_checkpoint_that_cannot_be_read_is_not_replaced_by_other_weights(tmp_path):
    class Break(Callback):
        def on_train_end(self, trainer, pl_module):
            Path(trainer.checkpoint_callback.best_model_path).write_bytes(b"broken")

    callback, net = MASImportance(), Net()
    net.score = iter([0.5])
    t = trainer(tmp_path, Break(), callback, ModelCheckpoint(tmp_path, monitor="score"), enable_checkpointing=True)
    with pytest.raises(MisconfigurationException, match=r"best checkpoint cannot be used: .*ckpt.* weights='last'"):
        t.fit(net, in_order(Rows()), DataLoader(Rows(3), batch_size=3))
    assert_no_result(callback)


def test_a_module_that_saves_a_part_of_its_weights(tmp_path):
    """Lightning's ``strict_loading = False``: the frozen part is not in the checkpoint."""

    class Adapter(Net):
        def __init__(self):
            super().__init__()
            self.strict_loading = False

        def on_save_checkpoint(self, checkpoint):
            weights = checkpoint["state_dict"]
            checkpoint["state_dict"] = {name: v for name, v in weights.items() if name.startswith("classifier.")}

    callback = MASImportance()
    net, watch, _ = best_of_three(tmp_path, callback, net=Adapter())
    mixed = Net()
    classifier = {name: v for name, v in watch.epochs[1].items() if name.startswith("classifier.")}
    mixed.load_state_dict(watch.epochs[2] | classifier)
    assert_same(callback.importance, wanted(mixed, Rows()))
    assert all(torch.equal(value, watch.epochs[2][name]) for name, value in net.state_dict().items())


# The run around it


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


# Loggers


def logged_summary(callback) -> dict[str, float]:
    return {
        f"importance/mas/{what}/{name}": value
        for name, values in callback.importance.summary().items()
        for what, value in values.items()
    }


def test_the_summary_is_the_norm_and_the_share_of_zeros():
    importance = Importance({"w": torch.tensor([3.0, 0.0, 4.0, 0.0])}, kind="mas", num_samples=1)
    assert importance.summary() == {"w": {"norm": 5.0, "zeros": 0.5}}


@pytest.mark.parametrize("run", ["fit", "predict"])
def test_csv_logger(tmp_path, run):
    logger, callback = CSVLogger(tmp_path, name="runs"), MASImportance()
    getattr(trainer(tmp_path, callback, logger=logger), run)(Net(), DataLoader(Rows(), batch_size=4))
    header, *lines = (line.split(",") for line in Path(logger.log_dir, "metrics.csv").read_text().splitlines())
    row = dict(zip(header, lines[-1], strict=True))
    assert {name: float(row[name]) for name in logged_summary(callback)} == pytest.approx(logged_summary(callback))
    assert row["step"] == ("6" if run == "fit" else "0")
    assert Path(callback.path) == Path(logger.log_dir, "importances", "mas.safetensors")


def test_tensorboard_logger(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger, callback = TensorBoardLogger(tmp_path), MASImportance()
    fitted(tmp_path, callback, logger=logger)
    events = EventAccumulator(logger.log_dir).Reload()
    scalars = {name: events.Scalars(name)[0].value for name in logged_summary(callback)}
    assert scalars == pytest.approx(logged_summary(callback))
    for name, value in callback.importance.items():
        histogram = events.Histograms(f"importance/mas/log10/{name}")[0].histogram_value
        nonzero = value[value > 0]
        assert histogram.num == nonzero.numel()
        assert histogram.sum == pytest.approx(sum(math.log10(v) for v in nonzero.flatten().tolist()), rel=1e-4)
    assert Path(callback.path).parent == Path(logger.log_dir, "importances")


def test_wandb_logger_offline(tmp_path, global_state):
    import wandb
    from wandb.sdk.lib.runid import generate_id

    logger, callback = (
        WandbLogger(project="tests", save_dir=str(tmp_path), offline=True, id=generate_id()),
        MASImportance(),
    )
    logged: list[dict] = []
    try:
        run = logger.experiment
        real = run.log
        run.log = lambda data, *args, **options: (logged.append(dict(data)), real(data, *args, **options))
        fitted(tmp_path, callback, logger=logger)
    finally:
        wandb.finish()
    scalars = {name: value for data in logged for name, value in data.items() if not isinstance(value, wandb.Histogram)}
    histograms = {name: value for data in logged for name, value in data.items() if isinstance(value, wandb.Histogram)}

    assert {name: scalars[name] for name in logged_summary(callback)} == pytest.approx(logged_summary(callback))
    for name, value in callback.importance.items():
        assert sum(histograms[f"importance/mas/log10/{name}"].histogram) == int((value > 0).sum())
    assert list(tmp_path.rglob("*.wandb"))
    assert Path(callback.path).is_relative_to(tmp_path)


def test_all_loggers_are_told_and_none_is_needed(tmp_path):
    loggers = [CSVLogger(tmp_path, name="a"), CSVLogger(tmp_path, name="b")]
    callback = MASImportance()
    fitted(tmp_path, callback, logger=loggers)
    for logger in loggers:
        assert "importance/mas/norm/classifier.weight" in Path(logger.log_dir, "metrics.csv").read_text()
    fitted(tmp_path, callback, logger=False)
    assert Path(callback.path).parent == tmp_path / "importances"


# Misuse: before any training


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy])
def test_strategies_that_shard_are_refused(strategy):
    fake = object.__new__(strategy)
    with pytest.raises(MisconfigurationException, match=f"MASImportance needs whole parameters .* {strategy.__name__}"):
        MASImportance().setup(SimpleNamespace(strategy=fake), Net(), "fit")


@pytest.mark.parametrize(
    "options", [{"module": "feature"}, {"exclude": ["classifier", "feat"]}, {"exclude": ["classifier.w"]}]
)
def test_unknown_names_are_refused(tmp_path, options):
    with pytest.raises(MisconfigurationException, match=r"Net: .*'(feature|feat|classifier\.w)'"):
        trainer(tmp_path, NoTraining(), MASImportance(**options)).fit(Net(), in_order(Rows()))


@pytest.mark.parametrize("stage", ["val", "test", "predict"])
def test_a_stage_without_dataloader_is_refused(tmp_path, stage):
    with pytest.raises(MisconfigurationException, match=f"needs a datamodule or a module with {stage}_dataloader"):
        trainer(tmp_path, NoTraining(), MASImportance(stage)).fit(Net(), in_order(Rows()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MASImportance("validate"), "'validate'"),
        (lambda: MASImportance(weights="first"), "'first'"),
        (lambda: MASImportance(reduction="mean"), "'mean'"),
        (lambda: MASImportance(max_scratch_mb=0), "max_scratch_mb"),
        (lambda: FisherImportance(draws=0), "draws"),
        (lambda: FisherImportance(draws="every"), "draws"),
        (lambda: FisherImportance(draws="all", labels="true"), "draws"),
        (lambda: FisherImportance(draws=2, reduction="batch"), "draws"),
        (lambda: FisherImportance(labels="ground_truth"), "'ground_truth'"),
        (lambda: MASImportance(module="features", exclude=["features"]), "features"),
    ],
    ids=[
        "stage",
        "weights",
        "reduction",
        "scratch",
        "draws 0",
        "draws every",
        "draws of true labels",
        "draws of a batch",
        "labels",
        "everything excluded",
    ],
)
def test_wrong_options_are_refused_before_training(tmp_path, make, message):
    with pytest.raises(MisconfigurationException, match=message):
        trainer(tmp_path, NoTraining(), make()).fit(Net(), in_order(Rows()))


def test_a_module_that_is_built_in_configure_model_can_be_named(tmp_path):
    """Lightning calls the hook after the callbacks' ``setup``."""

    class Late(Net):
        def __init__(self):
            LightningModule.__init__(self)
            self.features = self.classifier = None
            self.lr, self.score = 0.1, iter(())

        def configure_model(self):
            if self.features is None:
                built = Net()
                self.features, self.classifier = built.features, built.classifier

    net, callback = Late(), MASImportance(module="features")
    fitted(tmp_path, callback, net=net)
    assert_same(callback.importance, wanted(net, Rows(), module="features"))


# LightningCLI


class CLIData(LightningDataModule):
    def train_dataloader(self):
        return in_order(Rows())

    def val_dataloader(self):
        return DataLoader(Rows(9, seed=2), batch_size=4)


def test_lightning_cli_yaml(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(
        f"""
seed_everything: false
trainer:
  accelerator: cpu
  max_epochs: 1
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  default_root_dir: {tmp_path}
  callbacks:
    - class_path: pl_personalize.callbacks.MASImportance
      init_args:
        dataloader: val
        weights: last
        module: features
        exclude: [features.1]
        dirpath: {tmp_path / "cli"}
        filename: mine
    - class_path: pl_personalize.callbacks.FisherImportance
      init_args:
        labels: true
        draws: 1
        max_scratch_mb: 16
    - class_path: pl_personalize.callbacks.FisherImportance
      init_args:
        dataloader: [train, val]
        labels: "sampled"
        generator: 3
        filename: both
    - class_path: pl_personalize.callbacks.PlateauSchedule
      init_args:
        monitor: score
        lr_patience: 2
model:
  norm: true
"""
    )
    cli = LightningCLI(Net, CLIData, args=["--config", str(config)], run=False, save_config_callback=None)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    mas, fisher, both = (c for c in cli.trainer.callbacks if isinstance(c, ImportanceCallback))

    assert list(mas.importance) == ["0.weight", "0.bias"]
    reference = wanted(cli.model, Rows(9, seed=2))
    assert_same(mas.importance, {name: reference[f"features.{name}"] for name in mas.importance})
    assert Path(mas.path) == tmp_path / "cli" / "mine.safetensors"
    assert_same(fisher.importance, wanted(cli.model, Rows(), "empirical_fisher"))
    loaders = [*in_order(Rows()), *in_order(Rows(9, seed=2))]
    assert_same(both.importance, estimate_importance(cli.model, loaders, "fisher", generator=3))


def test_lightning_cli_from_the_command_line(tmp_path):
    arguments = [
        "--seed_everything=false", "--trainer.accelerator=cpu", "--trainer.logger=false",
        f"--trainer.default_root_dir={tmp_path}", "--trainer.callbacks=pl_personalize.callbacks.FisherImportance",
        "--trainer.callbacks.draws=all", "--trainer.callbacks.module=features",
    ]  # fmt: skip
    cli = LightningCLI(Net, CLIData, args=arguments, run=False, save_config_callback=None)
    (callback,) = (c for c in cli.trainer.callbacks if isinstance(c, ImportanceCallback))
    assert (callback.kind, callback.module, callback.dataloader, callback.weights) == (
        "fisher",
        "features",
        None,
        "best",
    )
    assert callback._options["draws"] == "all"


# Two processes

DDP_SCRIPT = """
import json
import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, SubsetRandomSampler

from pl_personalize import Importance
from pl_personalize.callbacks import FisherImportance, MASImportance

FOLDER, NORM = Path(sys.argv[1]), sys.argv[2] == "norm"
ROWS = [(torch.randn(6, generator=torch.Generator().manual_seed(k)), k % 3) for k in range(23)]
save = Importance.save


def noted_save(importance, path):
    with open(FOLDER / "saves.txt", "a") as file:
        file.write(f"{path}\\n")
    return save(importance, path)


Importance.save = noted_save


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        norm = nn.BatchNorm1d(5) if NORM else nn.Identity()
        self.net = nn.Sequential(nn.Linear(6, 5), norm, nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 3))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class After(Callback):
    def note(self, trainer, pl_module, what):
        torch.save(pl_module.state_dict(), FOLDER / f"{what}-weights-{trainer.global_rank}.pt")
        results = [
            [c.path, c.importance.num_samples, sum(float(v.sum()) for v in c.importance.values())]
            for c in trainer.callbacks
            if isinstance(c, MASImportance | FisherImportance)
        ]
        (FOLDER / f"{what}-{trainer.global_rank}.json").write_text(json.dumps(results))

    def on_fit_end(self, trainer, pl_module):
        self.note(trainer, pl_module, "fit")

    def on_predict_end(self, trainer, pl_module):
        self.note(trainer, pl_module, "predict")


def trainer(*callbacks):
    return Trainer(
        accelerator="cpu", devices=2, strategy="ddp_fork", max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=FOLDER, callbacks=[*callbacks, After()],
    )


if __name__ == "__main__":
    subset = {"sampler": SubsetRandomSampler([15, 3, 8, 1, 20, 9, 2])}
    net = Net()
    trainer(
        MASImportance(filename="train"),
        MASImportance(DataLoader(ROWS[:1]), filename="one"),
        FisherImportance(DataLoader(ROWS, batch_size=4), draws="all", filename="exact"),
    ).fit(net, DataLoader(ROWS, batch_size=4, **({"shuffle": True} if NORM else subset)))
    trainer(MASImportance(filename="predict")).predict(net, DataLoader(ROWS, batch_size=4))
"""


@pytest.mark.parametrize("variant", ["norm", "subset"])
def test_two_processes_give_what_one_gives(tmp_path, variant):
    """Of 23 rows, 7 rows or 1 row; with batch norm, whose statistics each process has its own of after training."""
    run_forked(tmp_path, DDP_SCRIPT, variant)

    x = torch.stack([torch.randn(6, generator=torch.Generator().manual_seed(k)) for k in range(ROWS)])
    norm = nn.BatchNorm1d(5) if variant == "norm" else nn.Identity()
    net = nn.Module()
    net.net = nn.Sequential(nn.Linear(6, 5), norm, nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 3))
    train = x if variant == "norm" else x[[1, 2, 3, 8, 9, 15, 20]]
    data = {"train": (train, "mas"), "one": (x[:1], "mas"), "exact": (x, "fisher"), "predict": (x, "mas")}
    folder = tmp_path / "importances"
    errors = {}
    for name, (rows, kind) in data.items():
        weights = "predict-weights-0.pt" if name == "predict" else "fit-weights-0.pt"
        net.load_state_dict(torch.load(tmp_path / weights, weights_only=True))
        draws = {"draws": "all"} if kind == "fisher" else {}
        reference = estimate_importance(net, [rows], kind, forward=lambda model, batch: model.net(batch), **draws)
        found = Importance.load(folder / f"{name}.safetensors")
        errors[name] = (found.num_samples, relative_error(found, reference))
    assert {name: count for name, (count, _) in errors.items()} == {name: len(rows) for name, (rows, _) in data.items()}
    assert {name: error for name, (_, error) in errors.items() if error > 1e-6} == {}

    assert sorted((tmp_path / "saves.txt").read_text().split()) == sorted(
        str(folder / f"{n}.safetensors") for n in data
    )
    for what in ("fit", "predict"):
        ranks = [json.loads((tmp_path / f"{what}-{rank}.json").read_text()) for rank in (0, 1)]
        assert ranks[0] == ranks[1]


class Rejected(Net):
    """A batch norm that mixes the samples of a batch in eval mode."""

    def __init__(self):
        super().__init__()
        self.features.append(nn.BatchNorm1d(5, track_running_stats=False))


@pytest.mark.parametrize(
    ("net", "make", "message"),
    [
        (Rejected, MASImportance, "mix samples"),
        (Net, lambda: MASImportance([]), "no samples"),
        (Net, lambda: FisherImportance([torch.zeros(4, 6)], labels="true"), "labels are needed"),
    ],
    ids=["mixes samples", "empty loader", "no labels"],
)
def test_what_only_the_data_show_is_refused_before_training(tmp_path, net, make, message):
    class Steps(Callback):
        count = 0

        def on_train_batch_end(self, *args):
            Steps.count += 1

    with pytest.raises(MisconfigurationException, match=message):
        trainer(tmp_path, make(), Steps()).fit(net(), in_order(Rows()))
    assert Steps.count == 0


def test_two_callbacks_do_not_write_one_file(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"the same file, mas\.safetensors"):
        trainer(tmp_path, MASImportance(), MASImportance()).fit(Net(), in_order(Rows()))
    trainer(tmp_path, MASImportance(), MASImportance(filename="other")).fit(Net(), in_order(Rows()))
    assert {path.stem for path in (tmp_path / "importances").iterdir()} == {"mas", "other"}


def test_a_datamodule_made_from_datasets_has_its_stages(tmp_path):
    datamodule = LightningDataModule.from_datasets(Rows(), predict_dataset=Rows(), batch_size=4)
    callback = MASImportance("predict")
    trainer(tmp_path, callback).fit(Net(), datamodule=datamodule)
    assert callback.importance.num_samples == ROWS


def test_predict_counts_what_was_predicted(tmp_path):
    callback = MASImportance()
    trainer(tmp_path, callback, limit_predict_batches=2).predict(Net(), DataLoader(Rows(), batch_size=4))
    assert callback.importance.num_samples == 8


def test_a_stream_is_not_looked_at_before_it_is_used(tmp_path):
    """What is read of it is gone."""
    data, callback = Rows(), MASImportance(batch for batch in DataLoader(Rows(), batch_size=4))
    trainer(tmp_path, callback).fit(Net(), in_order(data))
    assert callback.importance.num_samples == ROWS


@pytest.mark.parametrize("values", [[2.0], [1.0, 1.0], [1.0, 1.0 + 1e-7], [0.0, 1.0, 5.0]])
def test_histograms_of_values_that_hardly_differ(values):
    counts, edges = _histogram(torch.tensor(values))
    assert counts.sum() == len(values)
    assert len(edges) == 65
    assert (edges[1:] > edges[:-1]).all()
