"""The base of all benchmarks, on a benchmark whose every image carries its own number."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from pl_personalize.datamodules import ImageRows, LabelledImages, TaskIncrementalDataModule
from pl_personalize.datamodules.labelled_images import random_split

TASKS, CLASSES, USERS = ["home", "shop", "work"], [("a", "b"), ("c", "d", "e"), ("f", "g")], ["ann", "bob"]
# Rows of each split; what is asked for is noted, so that a test can say what was loaded.
SIZES = {"train": 11, "val": 5, "adapt": 7, "eval": 6}


class Numbered(TaskIncrementalDataModule):
    def __init__(self, **options):
        super().__init__(TASKS, CLASSES, USERS, **options)
        self.loaded: list[tuple] = []

    def load_server(self, task):
        self.loaded.append(("server", task))
        return self.split("train", 0, task), self.split("val", 0, task)

    def load_user(self, user, task):
        self.loaded.append((user, task))
        return self.split("adapt", user, task), self.split("eval", user, task)

    @staticmethod
    def split(name, user, task) -> LabelledImages:
        rows = torch.arange(SIZES[name])
        number = 1000 * (list(SIZES).index(name) + 1) + 100 * user + 20 * task + rows
        return LabelledImages(number.float().view(-1, 1, 1, 1), rows % len(CLASSES[task]))


def images(loader) -> list[int]:
    """The numbers of the images, in the loader's order."""
    return [int(v) for batch in loader for v in (batch if isinstance(batch, Tensor) else batch[0]).flatten()]


def labels(loader) -> list[int]:
    return [int(v) for _, y in loader for v in y]


def expected(name, user=0, task=0) -> list[int]:
    return [int(v) for v in Numbered.split(name, user, task).images.flatten()]


# Which task, which user


@pytest.mark.parametrize("task", [1, "shop"])
@pytest.mark.parametrize("user", [1, "bob"])
@pytest.mark.parametrize("when", ["in the constructor", "later"])
def test_task_and_user_are_given_by_index_or_name(task, user, when):
    data = Numbered(task=task, user=user) if when == "in the constructor" else Numbered()
    data.task, data.user = task, user

    assert (data.task, data.user) == ("shop", "bob")
    assert sorted(images(data.train_dataloader())) == expected("train", task=1)
    assert images(data.predict_dataloader()) == expected("adapt", user=1, task=1)
    assert images(data.test_dataloader()[2]) == expected("eval", user=1, task=2)
    assert (data.task_index(task), data.user_index(user)) == (1, 1)


def test_they_may_be_changed_and_unset():
    data = Numbered(task=0, user=0)
    data.task, data.user = 2, 1
    assert sorted(images(data.train_dataloader())) == expected("train", task=2)
    data.task = data.user = None
    assert (data.task, data.user) == (None, None)


def test_tasks_users_and_classes_are_known_by_name():
    data = Numbered()
    assert (data.tasks, data.users, data.classes) == (tuple(TASKS), tuple(USERS), tuple(CLASSES))
    assert [data.num_classes(task) for task in (0, "shop", 2, None)] == [2, 3, 2, 7]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": 3}, "no task 3; choose one of 'home', 'shop', 'work' .or 0 to 2"),
        ({"task": -1}, "no task -1"),
        ({"task": "Home"}, "no task 'Home'"),
        ({"user": 2}, "no user 2; choose one of 'ann', 'bob' .or 0 to 1"),
        ({"user": "eve"}, "no user 'eve'"),
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"eval_batch_size": -2}, "eval_batch_size must be at least 1; got -2"),
    ],
)
def test_what_is_not_there_is_refused(options, message):
    with pytest.raises(MisconfigurationException, match=message):
        Numbered(**options)


@pytest.mark.parametrize(
    "ask",
    [
        lambda data: data.test_dataloader(),
        lambda data: data.predict_dataloader(),
        lambda data: data.adapt_dataloader(0),
        lambda data: data.setup("predict"),
        lambda data: data.setup("test"),
    ],
)
def test_without_a_user_there_are_no_images_of_a_user(ask):
    with pytest.raises(MisconfigurationException, match="No user is set: set user= to one of 'ann', 'bob'"):
        ask(Numbered(task=0))


# Loaders


def test_train_is_shuffled_anew_each_epoch_and_the_others_are_in_order():
    data = Numbered(task=0, user=1, batch_size=4, eval_batch_size=3)
    train = data.train_dataloader()
    first = images(train)
    train.sampler.set_epoch(1)
    assert sorted(first) == sorted(images(train)) == expected("train")
    assert first != expected("train") != images(train) != first
    assert [len(y) for _, y in train] == [4, 4, 3]

    assert images(data.val_dataloader()) == expected("val")
    assert [len(y) for _, y in data.val_dataloader()] == [3, 2]
    assert images(data.server_dataloader("home")) == expected("train") + expected("val")
    assert labels(data.server_dataloader(0)) == [k % 2 for k in range(11)] + [k % 2 for k in range(5)]
    assert images(data.adapt_dataloader("work")) == expected("adapt", 1, 2)
    assert [len(x) for x in data.adapt_dataloader("work")] == [3, 3, 1]


def test_labels_stay_with_their_images():
    data = Numbered(task=1)
    for x, y in data.train_dataloader():
        assert ((x.flatten().long() - 1020) % 3).tolist() == y.tolist()


def test_the_order_depends_on_seed_and_task():
    def order(**options):
        return [n % 20 for n in images(Numbered(**options).train_dataloader())]

    assert order(task=1, seed=5) == order(task="shop", seed=5)
    assert len({tuple(order(task=task, seed=seed)) for task in (0, 1) for seed in (0, 5)}) == 4


def test_test_is_a_list_with_one_loader_for_each_task():
    loaders = Numbered(task=1, user=1).test_dataloader()
    assert [images(loader) for loader in loaders] == [expected("eval", 1, task) for task in range(3)]
    assert [labels(loader) for loader in loaders] == [[k % n for k in range(6)] for n in (2, 3, 2)]


def test_predict_has_no_labels():
    batches = list(Numbered(task=1, user=0).predict_dataloader())
    assert all(isinstance(batch, Tensor) for batch in batches)
    assert images(batches) == expected("adapt", 0, 1)


def test_predict_for_no_task_is_a_list():
    loaders = Numbered(user=1).predict_dataloader()
    assert isinstance(loaders, list)
    assert [images(loader) for loader in loaders] == [expected("adapt", 1, task) for task in range(3)]
    assert all(isinstance(batch, Tensor) for loader in loaders for batch in loader)


def test_adapt_has_labels_where_they_are_asked_for():
    data = Numbered(user=0)
    assert images(data.adapt_dataloader(1, labels=True)) == expected("adapt", 0, 1)
    assert labels(data.adapt_dataloader("shop", labels=True)) == [0, 1, 2, 0, 1, 2, 0]


def test_for_no_task_labels_are_counted_through():
    data = Numbered()
    val = [(n, y) for task, offset in enumerate((0, 2, 5)) for n, y in zip(
        expected("val", task=task), [offset + k % len(CLASSES[task]) for k in range(5)], strict=True)]  # fmt: skip
    assert list(zip(images(data.val_dataloader()), labels(data.val_dataloader()), strict=True)) == val

    pairs = [(int(n), int(y)) for x, ys in data.train_dataloader() for n, y in zip(x.flatten(), ys, strict=True)]
    joint = {
        n: offset + k % len(CLASSES[t])
        for t, offset in enumerate((0, 2, 5))
        for k, n in enumerate(expected("train", task=t))
    }
    assert len(pairs) == 33
    assert dict(pairs) == joint
    # The splits themselves keep the labels of their task.
    assert data.server_split(2)[0].labels.tolist() == [k % 2 for k in range(11)]


# What is loaded, and when


@pytest.mark.parametrize(
    ("stage", "task", "loaded"),
    [
        ("fit", 1, [("server", 1)]),
        ("validate", 1, [("server", 1)]),
        ("fit", None, [("server", 0), ("server", 1), ("server", 2)]),
        ("predict", 2, [(1, 2)]),
        ("predict", None, [(1, 0), (1, 1), (1, 2)]),
        ("test", 1, [(1, 0), (1, 1), (1, 2)]),
    ],
)
def test_setup_loads_what_the_stage_needs(stage, task, loaded):
    data = Numbered(task=task, user=1)
    assert data.loaded == []
    data.setup(stage)
    assert data.loaded == loaded
    data.setup(stage)
    assert data.loaded == loaded  # once


def test_loaders_load_nothing_again_after_setup():
    data = Numbered(task=0, user=0)
    data.setup("fit"), data.setup("test")
    loaded = list(data.loaded)
    data.train_dataloader(), data.val_dataloader(), data.test_dataloader(), data.adapt_dataloader(2)
    data.server_dataloader(0)
    assert data.loaded == loaded


def test_fit_needs_no_user_and_test_no_task():
    Numbered(task=0).setup("fit")
    Numbered(user=0).setup("test")


def test_a_view_shares_the_data_in_memory():
    data = Numbered(task=0, user=0)
    data.setup("fit"), data.setup("test")
    view = data.view(task="shop", user="bob")

    assert (view.task, view.user, data.task, data.user) == ("shop", "bob", "home", "ann")
    assert type(view) is Numbered
    assert view.server_split(0)[0].images.data_ptr() == data.server_split(0)[0].images.data_ptr()
    view.setup("fit")
    assert data.server_split(1)[0].images is view.server_split(1)[0].images  # what a view loads, all have
    assert data.loaded.count(("server", 1)) == 1
    assert images(view.predict_dataloader()) == expected("adapt", 1, 1)
    assert images(data.predict_dataloader()) == expected("adapt", 0, 0)


def test_a_view_has_no_trainer(tmp_path):
    data = Numbered(task=0, user=0)
    trainer = quiet_trainer(tmp_path)
    trainer.predict(Numbers(), datamodule=data)
    assert data.trainer is trainer
    assert data.view(task=1).trainer is None
    assert data.trainer is trainer


# With a Trainer


class Numbers(LightningModule):
    """Returns what it is given."""

    def __init__(self):
        super().__init__()
        self.seen: dict[int, list[int]] = {}

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        return batch.flatten().long()

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self.seen.setdefault(dataloader_idx, []).extend(batch[0].flatten().long().tolist())


def quiet_trainer(tmp_path, **options):
    return Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, **options,
    )  # fmt: skip


def test_predict_and_test_with_a_trainer(tmp_path):
    data, module = Numbered(task=1, user=1, eval_batch_size=4), Numbers()
    one = quiet_trainer(tmp_path).predict(module, datamodule=data)
    every = quiet_trainer(tmp_path).predict(module, datamodule=data.view(user=1))
    quiet_trainer(tmp_path).test(module, datamodule=data, verbose=False)

    assert torch.cat(one).tolist() == expected("adapt", 1, 1)
    assert [torch.cat(part).tolist() for part in every] == [expected("adapt", 1, task) for task in range(3)]
    assert module.seen == {task: expected("eval", 1, task) for task in range(3)}


# Division


def test_a_random_split_divides_as_the_protocol_says():
    whole = LabelledImages(torch.arange(23.0).view(-1, 1), torch.arange(23))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, rest = random_split(whole, 0.8, 27, "x")
    assert torch.equal(torch.get_rng_state(), state)

    assert (len(first.labels), len(rest.labels)) == (18, 5)  # floor(0.8 n)
    assert sorted([*first.labels.tolist(), *rest.labels.tolist()]) == list(range(23))
    for part in (first, rest):
        assert part.images.flatten().tolist() == part.labels.tolist()
    assert first.labels.tolist() == random_split(whole, 0.8, 27, "x")[0].labels.tolist()
    assert first.labels.tolist() != random_split(whole, 0.8, 28, "x")[0].labels.tolist()
    assert first.labels.tolist() != random_split(whole, 0.8, 27, "y")[0].labels.tolist()


# Transforms


class Doubled(Numbered):
    def transform(self, images, seed=None):
        return 2 * images if seed is None else -images


def test_every_loader_transforms_and_train_alone_augments():
    data = Doubled(task=1, user=1)
    twice = {
        "val": data.val_dataloader(),
        "adapt": data.predict_dataloader(),
        "eval": data.test_dataloader()[1],
        "train": data.server_dataloader(1, "train"),
    }
    for name, loader in twice.items():
        user = 0 if name in ("val", "train") else 1
        assert images(loader) == [2 * n for n in expected(name, user, 1)]
    assert images(data.adapt_dataloader(1, labels=True)) == [2 * n for n in expected("adapt", 1, 1)]
    assert sorted(images(data.train_dataloader())) == sorted(-n for n in expected("train", task=1))


def test_loaders_may_be_shuffled_with_batches_of_another_size():
    data = Numbered(user=1)
    for loader, split in (
        (data.adapt_dataloader(1, shuffle=True, seed=4, batch_size=3), ("adapt", 1, 1)),
        (data.server_dataloader(1, "val", shuffle=True, seed=4, batch_size=3), ("val", 0, 1)),
    ):
        first = images(loader)
        assert sorted(first) == expected(*split)
        assert first != expected(*split)
        loader.sampler.set_epoch(1)
        assert images(loader) != first
        assert len(next(iter(loader))) in (2, 3)
    assert [len(x) for x in data.adapt_dataloader(1, batch_size=3)] == [3, 3, 1]


def test_an_unknown_split_is_refused():
    with pytest.raises(KeyError, match="test"):
        Numbered().server_dataloader(0, "test")


# What a benchmark may return


class Given(TaskIncrementalDataModule):
    """Two tasks of two classes for one user; one split is what a test gives."""

    def __init__(self, split, where=("ann", "b", "eval")):
        super().__init__(["a", "b"], [("p", "q"), ("r", "s")], ["ann"], user="ann")
        self.split, self.where = split, where

    def give(self, owner, task, names):
        usual = LabelledImages(torch.zeros(6, 1, 2, 2), torch.arange(6) % 2)
        return tuple(self.split if self.where == (owner, self.tasks[task], name) else usual for name in names)

    def load_server(self, task):
        return self.give("server", task, ("train", "val"))

    def load_user(self, user, task):
        return self.give(self.users[user], task, ("adapt", "eval"))


X, Y = torch.randn(6, 1, 2, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 1, 0, 1, 1])
NAN = X.clone()
NAN[4, 0, 1, 1] = float("nan")
INF = X.clone()
INF[0, 0, 0, 0] = -float("inf")


@pytest.mark.parametrize(
    "split",
    [
        (X, Y),
        [X, Y],
        (X.numpy(), Y.numpy()),
        (list(X), Y.tolist()),
        LabelledImages(X, Y.int()),
        LabelledImages(X, Y.bool()),
        LabelledImages(X, Y.float()),
        LabelledImages(X, Y[:, None]),
        LabelledImages(ImageRows([X], torch.arange(6)), Y.to(torch.uint8)),
    ],
)
def test_splits_in_other_forms_are_converted_exactly(split):
    found = Given(split).user_split("ann", "b")[1]
    assert isinstance(found, LabelledImages)
    assert torch.equal(found.images[:], X)
    assert found.labels.dtype == torch.int64
    assert torch.equal(found.labels, Y)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ((X, Y + 2), r"label 2 \(of sample 0\) is no class of the task, which has 2.*subtract 2\."),
        ((X, Y - 1), r"label -1 \(of sample 0\)"),
        ((X, Y + 1), "seem to count from 1: subtract 1"),
        ((X, torch.full((6,), 255)), "label 255"),
        ((X, Y / 2), "label 0.5 .* is no whole number"),
        ((X, torch.eye(6)[:, :2]), "one-hot"),
        ((X, Y[:5]), "there are 6 images and 5 labels"),
        ((X[:5], Y), "there are 5 images and 6 labels"),
        ((NAN, Y), "image 4 has NaN or infinite values"),
        ((INF, Y), "image 0 has NaN or infinite values"),
        (LabelledImages(ImageRows([NAN], torch.arange(5, -1, -1)), Y), "image 1 has NaN"),
        (LabelledImages(ImageRows([X], torch.arange(1, 7)), Y), "ImageRows has rows outside 0 to 5"),
        ((X,), "must be LabelledImages.images, labels.; got a tuple of 1"),
        (X, "must be LabelledImages.images, labels.; got a Tensor"),
        ({"images": X, "labels": Y}, "got a dict"),
        (None, "got a NoneType"),
        ((["a.png"] * 6, Y), "got a list of str"),
        (([X[0], X[1][:, :1]] * 3, Y), r"with the shapes \(1, 1, 2\), \(1, 2, 2\)"),
        ((torch.zeros(6), Y), r"got the shape \(6,\)"),
    ],
)
@pytest.mark.parametrize("where", [("server", "a", "train"), ("server", "b", "val"), ("ann", "b", "adapt")])
def test_a_split_that_cannot_be_used_is_refused_with_its_place(split, message, where):
    data = Given(split, where)
    if "subtract 2" in message and where[1] == "a":
        message = "label 2"
    owner = "the server" if where[0] == "server" else "user 'ann'"
    with pytest.raises(MisconfigurationException, match=f"Given: {owner}, task '{where[1]}', {where[2]}: .*{message}"):
        data.setup("fit" if where[0] == "server" else "predict")


@pytest.mark.parametrize("found", [None, X, (X, Y, X), {"train": X}])
@pytest.mark.parametrize("method", ["load_server", "load_user"])
def test_what_is_no_pair_of_splits_is_refused(monkeypatch, found, method):
    data = Given(None)
    monkeypatch.setattr(data, method, lambda *_: found)
    with pytest.raises(MisconfigurationException, match=r"task 'a': expected two splits, .* got a"):
        data.setup("fit" if method == "load_server" else "test")


def test_images_of_another_shape_in_another_task_cannot_be_trained_on_together():
    data = Given((torch.zeros(6, 1, 3, 3), Y), ("server", "b", "train"))
    with pytest.raises(MisconfigurationException, match=r"one shape; got \(1, 2, 2\) in 'a', \(1, 3, 3\) in 'b'"):
        data.train_dataloader()
    data.task = "b"
    assert len(data.train_dataloader()) == 1


@pytest.mark.parametrize(
    ("tasks", "classes", "users", "message"),
    [
        (["a", "a"], [("p",), ("q",)], ["ann"], "tasks must be .* different names"),
        (["a"], [("p",)], ["ann", "ann"], "users must be .* different names"),
        (["a"], [("p", "p")], ["ann"], "classes of task 0 must be .* different names"),
        (["a"], [()], ["ann"], "classes of task 0 must be .* one or several"),
        (["a"], ["cat"], ["ann"], "classes of task 0 must be a list of one or several different names; got 'cat'"),
        (["a"], [("p",)], "max", "users must be a list of one or several different names; got 'max'"),
        (["a", "b"], [("p",)], ["ann"], "one list for each of the 2 tasks; got 1"),
        ([], [], ["ann"], "tasks must be .* one or several"),
    ],
)
def test_names_that_tell_nothing_apart_are_refused(tasks, classes, users, message):
    with pytest.raises(MisconfigurationException, match=message):
        TaskIncrementalDataModule(tasks, classes, users)


# The other package of Lightning


@pytest.mark.parametrize("module", ["pytorch_lightning.trainer.trainer", "pytorch_lightning"])
def test_a_trainer_of_the_other_package_is_refused_with_the_import_to_change(module):
    other = type("Trainer", (), {"__module__": module})
    for trainer in (other(), type("Mine", (other,), {})()):
        with pytest.raises(
            MisconfigurationException, match=r"Numbered needs a Trainer of `lightning.pytorch`.* Change `import"
        ):
            Numbered().trainer = trainer


def test_a_trainer_of_the_other_package_says_so_itself(tmp_path):
    other = pytest.importorskip("pytorch_lightning")

    class Module(other.LightningModule):
        def training_step(self, batch, batch_idx):
            raise AssertionError("training began")

        def configure_optimizers(self):
            return None

    trainer = other.Trainer(default_root_dir=tmp_path, logger=False, accelerator="cpu", enable_checkpointing=False)
    with pytest.raises(
        Exception, match=r"Change `import pytorch_lightning as pl` to `import lightning\.pytorch as pl`"
    ):
        trainer.fit(Module(), datamodule=Numbered(task=0))
