"""The loader's order is a function of seed and epoch, it is exact under DDP, and a run resumes inside an epoch."""

import copy
from collections import Counter
from itertools import chain

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn

from pl_personalize.datamodules import DigitsDataModule, TensorLoader, tensor_loader
from pl_personalize.datamodules.loader import TaskSampler, TensorBatches
from pl_personalize.models import TaskNetwork
from pl_personalize.modules import TaskLearner

ROWS, BATCH = 23, 5


def numbers(**options) -> TensorLoader:
    return tensor_loader(torch.arange(ROWS), batch_size=BATCH, **options)


def epoch_order(loader: TensorLoader, epoch: int) -> list[int]:
    loader.sampler.set_epoch(epoch)
    return torch.cat(list(loader)).tolist()


# Batches


def test_batches_are_cut_in_order_and_the_last_is_smaller():
    images, labels = torch.randn(ROWS, 3, 2, 2), torch.arange(ROWS)
    batches = list(tensor_loader(images, labels, batch_size=BATCH))

    assert [len(x) for x, _ in batches] == [5, 5, 5, 5, 3]
    assert torch.equal(torch.cat([x for x, _ in batches]), images)
    assert torch.equal(torch.cat([y for _, y in batches]), labels)
    assert all(isinstance(batch, tuple) for batch in batches)


def test_a_single_tensor_gives_tensors():
    batches = list(numbers())

    assert all(isinstance(batch, Tensor) for batch in batches)
    assert [batch.tolist() for batch in batches] == [list(range(k, min(k + 5, ROWS))) for k in range(0, ROWS, 5)]
    assert len(numbers()) == 5


def test_a_single_row_is_read_by_index():
    x, y = torch.randn(4, 2), torch.arange(4)
    assert torch.equal(TensorBatches(x)[2], x[2])
    assert [torch.equal(a, b) for a, b in zip(TensorBatches(x, y)[3], (x[3], y[3]), strict=True)] == [True, True]


def test_no_rows_give_no_batches():
    loader = tensor_loader(torch.zeros(0, 3), torch.zeros(0), batch_size=4, shuffle=True, repeat=True)
    assert len(loader) == 0
    assert list(loader) == []


@pytest.mark.parametrize("tensors", [(), (torch.zeros(3), torch.zeros(2))])
def test_tensors_of_different_length_are_refused(tensors):
    with pytest.raises(ValueError, match="one length"):
        TensorBatches(*tensors)


# Order


def test_the_order_depends_on_seed_and_epoch_alone():
    loader = numbers(shuffle=True, seed=4)
    first = [epoch_order(loader, epoch) for epoch in (0, 1, 2)]
    torch.manual_seed(99)
    again = numbers(shuffle=True, seed=4)

    assert [epoch_order(again, epoch) for epoch in (2, 0, 1)] == [first[2], first[0], first[1]]
    assert [epoch_order(loader, epoch) for epoch in (1, 1)] == [first[1], first[1]]
    assert len({tuple(order) for order in first}) == 3
    assert all(sorted(order) == list(range(ROWS)) for order in first)
    assert epoch_order(numbers(shuffle=True, seed=5), 0) != first[0]


def test_iteration_leaves_the_global_random_numbers_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    list(numbers(shuffle=True, repeat=True))
    list(numbers())
    assert torch.equal(torch.get_rng_state(), before)


# Transforms


def doubled(x, seed):
    return 2 * x if seed is None else seed * torch.ones_like(x)


def test_a_transform_acts_on_the_images_alone():
    loader = tensor_loader(torch.arange(ROWS), torch.arange(ROWS), batch_size=BATCH, transform=doubled)
    assert all(torch.equal(x, 2 * y) for x, y in loader)
    assert [value.tolist() for value in loader.dataset[3]] == [6, 3]
    assert [value.tolist() for value in loader.dataset.__getitems__([3, 1])] == [[6, 2], [3, 1]]


def test_what_is_random_depends_on_seed_epoch_position_and_process():
    def seeds(epoch, rank=0, **options):
        loader = numbers(transform=doubled, augment=True, **options)
        loader.sampler.rank = rank
        loader.sampler.set_epoch(epoch)
        return [int(batch[0]) for batch in loader]

    found = [seeds(0), seeds(1), seeds(0, seed=1), seeds(0, rank=1)]
    assert len({seed for batches in found for seed in batches}) == 20
    assert seeds(1) == found[1]
    assert seeds(0, shuffle=True) == found[0]


def test_rows_by_index_are_never_augmented():
    """As where somebody else makes a loader of the dataset: for importances, for instance."""
    dataset = numbers(transform=doubled, augment=True).dataset
    assert dataset[4] == 8
    assert dataset.__getitems__([4, 2]).tolist() == [8, 4]


def test_a_resumed_epoch_has_the_same_random_numbers():
    whole = epoch_order(numbers(transform=doubled, augment=True), 2)
    resumed = numbers(transform=doubled, augment=True)
    resumed.load_state_dict({"epoch": 2, "position": 3})
    assert epoch_order(resumed, 2) == whole[3 * BATCH :]


# Place in an epoch


@pytest.mark.parametrize("taken", [0, 1, 3, 4])
@pytest.mark.parametrize("epoch", [0, 2])
def test_a_resumed_epoch_has_the_rest_in_the_same_order(taken, epoch):
    whole = epoch_order(numbers(shuffle=True, seed=4), epoch)
    loader = numbers(shuffle=True, seed=4)
    loader.sampler.set_epoch(epoch)
    iterator = iter(loader)
    seen = [value for _ in range(taken) for value in next(iterator).tolist()]
    state = loader.state_dict()

    resumed = numbers(shuffle=True, seed=4)
    resumed.load_state_dict(state)
    rest = epoch_order(resumed, epoch)

    assert state == {"epoch": epoch, "position": taken}
    assert seen + rest == whole
    assert epoch_order(resumed, epoch) == whole  # the state counts for one pass
    assert epoch_order(resumed, epoch + 1) == epoch_order(loader, epoch + 1)


def test_the_place_goes_on_counting_after_a_resume():
    loader = numbers(shuffle=True)
    loader.load_state_dict({"epoch": 0, "position": 2})
    iterator = iter(loader)
    next(iterator)
    assert loader.state_dict() == {"epoch": 0, "position": 3}


@pytest.mark.parametrize("state", [{"epoch": 0, "position": 3}, {"epoch": 1, "position": 5}])
def test_a_stale_state_is_ignored(state):
    loader = numbers(shuffle=True)
    loader.load_state_dict(state)
    assert epoch_order(loader, 1) == epoch_order(numbers(shuffle=True), 1)


def test_a_state_that_was_loaded_is_the_state_until_a_batch_is_asked_for():
    loader = numbers(shuffle=True)
    loader.load_state_dict({"epoch": 0, "position": 3})
    assert loader.state_dict() == {"epoch": 0, "position": 3}


def test_a_new_epoch_begins_at_its_beginning_even_if_the_last_was_not_finished():
    """As with ``limit_train_batches``: a checkpoint between the epochs must not skip batches of the next."""
    loader = numbers(shuffle=True)
    iterator = iter(loader)
    next(iterator), next(iterator)
    loader.sampler.set_epoch(1)
    resumed = numbers(shuffle=True)
    resumed.load_state_dict(loader.state_dict())

    assert epoch_order(resumed, 1) == epoch_order(numbers(shuffle=True), 1)


# Several processes


def replicas(sampler: TaskSampler, count: int) -> list[list[int]]:
    parts = []
    for rank in range(count):
        sampler.num_replicas, sampler.rank = count, rank
        parts.append(list(sampler))
        assert len(sampler) == len(parts[-1])
    return parts


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("rows", [1, 6, 7, 20])
@pytest.mark.parametrize("shuffle", [True, False])
def test_processes_share_the_data_without_repetition(rows, count, shuffle):
    sampler = TaskSampler(TensorBatches(torch.arange(rows)), shuffle=shuffle, seed=1, repeat=False)
    whole = list(sampler)
    parts = replicas(sampler, count)

    assert sorted(chain.from_iterable(parts)) == list(range(rows))
    assert [whole[rank::count] for rank in range(count)] == parts


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("rows", [1, 6, 7, 20])
def test_repetition_fills_all_processes_to_the_same_number(rows, count):
    sampler = TaskSampler(TensorBatches(torch.arange(rows)), shuffle=True, seed=1, repeat=True)
    parts = replicas(sampler, count)

    assert {len(part) for part in parts} == {-(-rows // count)}
    seen = Counter(chain.from_iterable(parts))
    assert set(seen) == set(range(rows))
    assert max(seen.values()) - min(seen.values()) <= 1


# In a Trainer


def test_predict_transforms_too(tmp_path):
    """Lightning makes the loader anew for ``predict``."""
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    assert torch.equal(torch.cat(trainer.predict(Identity(), numbers(transform=doubled))), 2 * torch.arange(ROWS))


class Identity(LightningModule):
    def predict_step(self, batch, batch_idx):
        return batch


def test_predict_returns_all_rows_in_order(tmp_path):
    """Lightning makes the loader anew for ``predict``, around its own batch sampler."""
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    result = trainer.predict(Identity(), numbers())

    assert [len(batch) for batch in result] == [5, 5, 5, 5, 3]
    assert torch.equal(torch.cat(result), torch.arange(ROWS))


class Crash(Callback):
    """Stops training by an exception, at the end of a step or of an epoch's validation, and keeps every loss."""

    def __init__(self, after_step: int | None = None, after_validation_of: int | None = None) -> None:
        self.after_step, self.after_validation_of = after_step, after_validation_of
        self.losses: dict[int, Tensor] = {}
        self.accuracies: dict[int, Tensor] = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses[trainer.global_step] = trainer.callback_metrics["train/loss"].clone()
        if trainer.global_step == self.after_step:
            raise RuntimeError("power cut")

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.accuracies[trainer.current_epoch] = trainer.callback_metrics["val/acc"].clone()
            if trainer.current_epoch == self.after_validation_of:
                raise RuntimeError("power cut")


def dropout_network() -> TaskNetwork:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        body = nn.Sequential(nn.Flatten(), nn.Linear(768, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.5))
        return TaskNetwork(body, nn.Linear(12, 2))


def anchor() -> dict[str, Tensor]:
    return {name: torch.full_like(p, 0.01) for name, p in dropout_network().body.named_parameters()}


EPOCHS, STEPS = 4, 6


class SmallDigits(DigitsDataModule):
    """Six batches an epoch, the last smaller."""

    def load_server(self, task):
        train, val = super().load_server(task)
        return type(train)(train.images[:115], train.labels[:115]), val


def run(folder, crash: Crash, checkpoint: ModelCheckpoint, *, ckpt_path=None, global_seed: int, plain: bool = False):
    torch.manual_seed(global_seed)
    data = SmallDigits(task=1, seed=3)
    learner = TaskLearner(
        dropout_network(), lr=0.05, anchor=anchor(), l2_transfer=0.01, seed=3, task=1, lr_patience=1, stop_patience=9
    )
    trainer = Trainer(
        accelerator="cpu", max_epochs=EPOCHS, callbacks=[crash, checkpoint], default_root_dir=folder,
        logger=False, enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
    )  # fmt: skip
    assert torch.initial_seed() == global_seed
    trainer.fit(learner, datamodule=data, ckpt_path=ckpt_path)
    return trainer, learner


def differences(left, right, where: str = "") -> list[str]:
    """Where two nested states are not equal bit for bit."""
    if isinstance(left, Tensor):
        return [] if torch.equal(left, right) else [f"{where}: by up to {float((left - right).abs().max())}"]
    if isinstance(left, dict) and left.keys() == right.keys():
        return [line for key in left for line in differences(left[key], right[key], f"{where}/{key}")]
    if isinstance(left, list) and len(left) == len(right):
        return [line for k in range(len(left)) for line in differences(left[k], right[k], f"{where}/{k}")]
    return [] if left == right else [f"{where}: {left!r} and {right!r}"]


def outcome(trainer, learner) -> dict:
    """What a run ends with, weights and optimizer."""
    return copy.deepcopy({"module": learner.state_dict(), "optimizer": trainer.optimizers[0].state_dict()})


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    watch = Crash()
    trainer, learner = run(folder, watch, ModelCheckpoint(folder, monitor="val/acc", mode="max"), global_seed=1)
    return outcome(trainer, learner), watch


def test_the_run_that_is_interrupted_is_a_real_one(uninterrupted):
    """Dropout is on, losses differ, the schedule drops the rate: without these the next tests would say little."""
    end, watch = uninterrupted
    assert sorted(watch.losses) == list(range(1, EPOCHS * STEPS + 1))
    assert len({float(loss) for loss in watch.losses.values()}) == EPOCHS * STEPS
    assert sorted(watch.accuracies) == list(range(EPOCHS))
    assert end["optimizer"]["param_groups"][0]["lr"] < 0.05
    network, x = dropout_network(), torch.ones(4, 3, 16, 16)
    assert not torch.equal(network(x), network(x))


# Not at the last step of an epoch: from a checkpoint there, Lightning goes on without the epoch's validation.
# Checkpoint every `every` steps; the crash comes after step `crash`, or after the validation of an epoch.
@pytest.mark.parametrize(
    ("every", "crash", "resumed_from"),
    [
        pytest.param(2, 5, 4, id="epoch 0, later than its checkpoint"),
        pytest.param(5, 2 * STEPS + 5, 2 * STEPS + 3, id="epoch 2"),
        pytest.param(1, STEPS + 1, STEPS + 1, id="first step of epoch 1"),
        pytest.param(1, 2 * STEPS - 1, 2 * STEPS - 1, id="next to last step of epoch 1"),
    ],
)
def test_a_run_stopped_after_a_step_resumes_bit_for_bit(uninterrupted, tmp_path, every, crash, resumed_from):
    end, watch = uninterrupted
    checkpoint = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=every, save_last=True)
    with pytest.raises(RuntimeError, match="power cut"):
        # ModelCheckpoint comes last: where both have work at one step, the crash waits for the checkpoint.
        run(tmp_path, StepCrash(crash), checkpoint, global_seed=2)
    path = tmp_path / "last.ckpt"
    assert torch.load(path, weights_only=True)["global_step"] == resumed_from

    rest = Crash()
    resumed = run(tmp_path, rest, ModelCheckpoint(tmp_path / "b"), ckpt_path=path, global_seed=7)

    assert rest.losses == {step: loss for step, loss in watch.losses.items() if step > resumed_from}
    assert differences(outcome(*resumed), end) == []
    epochs = range((resumed_from - 1) // STEPS, EPOCHS)
    assert rest.accuracies == {epoch: watch.accuracies[epoch] for epoch in epochs}


class StepCrash(Crash):
    """Crashes when the next step begins, that is after the checkpoint of this step."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses[trainer.global_step] = trainer.callback_metrics["train/loss"].clone()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.after_step:
            raise RuntimeError("power cut")

    def on_validation_start(self, trainer, pl_module):
        if not trainer.sanity_checking and trainer.global_step == self.after_step:
            raise RuntimeError("power cut")


@pytest.mark.parametrize("epoch", [0, 2])
def test_a_run_stopped_between_epochs_resumes_bit_for_bit(uninterrupted, tmp_path, epoch):
    """From the checkpoint of the best epoch so far, as a run has it that knows nothing of steps."""
    end, watch = uninterrupted
    checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, monitor="val/acc", mode="max")
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path, Crash(after_step=(epoch + 1) * STEPS + 2), checkpoint, global_seed=2)

    rest = Crash()
    path = tmp_path / f"epoch={epoch}.ckpt"
    resumed = run(tmp_path, rest, ModelCheckpoint(tmp_path / "b"), ckpt_path=path, global_seed=7)

    assert rest.losses == {step: loss for step, loss in watch.losses.items() if step > (epoch + 1) * STEPS}
    assert differences(outcome(*resumed), end) == []
    assert rest.accuracies == {e: watch.accuracies[e] for e in range(epoch + 1, EPOCHS)}


def test_a_run_that_is_stopped_twice_resumes_bit_for_bit(uninterrupted, tmp_path):
    end, watch = uninterrupted
    path = None
    for stop in (STEPS + 2, STEPS + 4):
        checkpoint = ModelCheckpoint(tmp_path / str(stop), save_top_k=-1, every_n_train_steps=1, save_last=True)
        with pytest.raises(RuntimeError, match="power cut"):
            run(tmp_path, StepCrash(stop), checkpoint, ckpt_path=path, global_seed=stop)
        path = tmp_path / str(stop) / "last.ckpt"
    rest = Crash()
    resumed = run(tmp_path, rest, ModelCheckpoint(tmp_path / "b"), ckpt_path=path, global_seed=7)

    assert sorted(rest.losses) == list(range(STEPS + 5, EPOCHS * STEPS + 1))
    assert rest.losses == {step: watch.losses[step] for step in rest.losses}
    assert differences(outcome(*resumed), end) == []
