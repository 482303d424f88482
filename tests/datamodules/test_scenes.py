"""SceneDataModule: tasks and users, loaders, augmentation, shared images and options."""

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from scene_files import SIZE, TABLE, catprior, names_of, transprior
from torch import Tensor

from pl_personalize.datamodules.image_store import ImageStore
from pl_personalize.datamodules.scenes import normalize

TASKS = ("home", "leisure", "public", "store")


def images_of(loader) -> Tensor:
    return torch.cat([batch if isinstance(batch, Tensor) else batch[0] for batch in loader])


def labels_of(loader) -> list[int]:
    return [int(y) for batch in loader for y in batch[1]]


# Tasks, classes and users


def test_tasks_are_supercategories_and_classes_their_alphabetical_ranks(scenes):
    data = catprior(scenes)
    assert data.tasks == TASKS
    assert data.classes == (
        ("attic", "bath", "cellar"), ("bar", "gym", "rink"), ("church", "subway", "tram"), ("bakery", "deli", "mall"),
    )  # fmt: skip
    assert catprior(scenes, tasks=["work", "home"]).classes[0] == ("lab", "office")


@pytest.mark.parametrize(
    ("allocation_seeds", "users"),
    [
        ([1], ("user1", "user2")),
        ([5], ("user1", "user2")),
        ([1, 4], ("user1-seed1", "user1-seed4", "user2-seed1", "user2-seed4")),
    ],
)
def test_users_are_profiles_and_allocation_seeds(scenes, allocation_seeds, users):
    assert catprior(scenes, num_users=2, allocation_seeds=allocation_seeds).users == users


def test_the_server_has_the_listed_training_images(scenes, scene_names):
    data = catprior(scenes)
    train, val = data.server_split("leisure")
    assert (len(train.labels), len(val.labels)) == (24, 6)
    files = data.server_files("leisure")
    for split, names in zip((train, val), files, strict=True):
        assert names_of(split.images[:], scene_names) == list(names)
        assert [data.classes[1][y] for y in split.labels] == [name.partition("/")[0] for name in names]
    listed = {
        line for line in (scenes / "TrainImages.txt").read_text().split() if TABLE[line.split("/")[0]] == "leisure"
    }
    assert {*files.train, *files.val} == listed
    assert transprior(scenes).server_files("leisure") == files


# Loaders


@pytest.mark.parametrize("make", [catprior, transprior])
def test_every_loader_gives_normalized_images(scenes, make, plain_distortions):
    data = make(scenes, task="public", user="user2")
    data.prepare_data()
    for stage in ("fit", "validate", "test", "predict"):
        data.setup(stage)
    server, user = data.server_split("public"), data.user_split("user2", "public")
    expected = {
        "train": (data.train_dataloader(), server[0]),
        "val": (data.val_dataloader(), server[1]),
        "predict": (data.predict_dataloader(), user[0]),
        "adapt": (data.adapt_dataloader("public"), user[0]),
        "adapt with labels": (data.adapt_dataloader(2, labels=True, shuffle=True, seed=3, batch_size=2), user[0]),
        "server train": (data.server_dataloader("public", "train"), server[0]),
        "server val": (data.server_dataloader("public", "val", batch_size=2), server[1]),
        "test": (data.test_dataloader()[2], user[1]),
    }
    for what, (loader, split) in expected.items():
        found, wanted = images_of(loader), normalize(split.images[:])
        assert found.shape == (len(split.labels), 3, SIZE, SIZE), what
        assert sorted(found.flatten(1).tolist()) == sorted(wanted.flatten(1).tolist()), what
        assert found.dtype == torch.float32, what
    both = images_of(data.server_dataloader("public"))
    assert torch.equal(both, torch.cat([normalize(split.images[:]) for split in server]))
    assert len(next(iter(data.adapt_dataloader("public", batch_size=9)))) == 9


def test_labels_stay_with_their_images_in_every_loader(scenes, scene_names):
    data = catprior(scenes, user=0)
    every = [
        *((task, data.view(task=task).train_dataloader()) for task in range(4)),
        *enumerate(data.test_dataloader()),
        *((task, data.adapt_dataloader(task, labels=True, shuffle=True)) for task in range(4)),
    ]
    for task, loader in every:
        names = [name.partition("/")[0] for name in names_of(images_of(loader), scene_names)]
        assert [data.classes[task][y] for y in labels_of(loader)] == names


def test_joint_data_share_the_images(scenes, scene_names):
    data = catprior(scenes)
    loader = data.train_dataloader()
    scene = [name for names in data.classes for name in names]
    names = names_of(images_of(loader), scene_names)
    assert [scene[y] for y in labels_of(loader)] == [name.partition("/")[0] for name in names]
    assert len(names) == 4 * 24
    pools = loader.dataset.tensors[0].pools
    assert [pool.data_ptr() for pool in pools] == [data.server_split(t)[0].images.pools[0].data_ptr() for t in range(4)]


def test_another_mean_and_std(scenes):
    data = catprior(scenes, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 4.0), user=0)
    stored, batch = data.user_split(0, 0)[0].images[:], next(iter(data.adapt_dataloader(0)))
    scale = torch.tensor([1.0, 2.0, 4.0]).view(3, 1, 1)
    expected = (stored[: len(batch)] / 255 - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / scale

    torch.testing.assert_close(batch, expected)


@pytest.mark.parametrize(
    "options",
    [
        {"mean": [0.5]}, {"mean": [124, 117, 104]}, {"mean": "abc"}, {"std": [1.0, 1.0]},
        {"std": [1.0, 0.0, 1.0]}, {"std": [1e-300] * 3}, {"std": [float("inf")] * 3},
    ],
)  # fmt: skip
def test_a_mean_or_std_that_does_not_fit_is_refused(scenes, options):
    with pytest.raises(MisconfigurationException, match="three channels"):
        catprior(scenes, **options)


def test_a_row_by_index_is_normalized_too(scenes):
    data = catprior(scenes, task=0)
    dataset = data.train_dataloader().dataset
    image, label = dataset[3]
    split = data.server_split(0)[0]
    assert torch.equal(image, normalize(split.images[3:4])[0])
    assert label == split.labels[3]


# Augmentation


def batches(loader, epoch) -> list[Tensor]:
    loader.sampler.set_epoch(epoch)
    return [x for x, _ in loader]


def test_augmentation_is_for_training_alone_and_new_in_every_epoch(textured_scenes):
    plain, data = (catprior(textured_scenes, task=1, user=0, augment=augment) for augment in (False, True))
    first, second = (batches(data.train_dataloader(), epoch) for epoch in (0, 1))
    labels = labels_of(data.train_dataloader())
    assert labels == labels_of(plain.train_dataloader())
    reference = batches(plain.train_dataloader(), 0)
    assert not any(torch.equal(a, b) for a, b in zip(first, reference, strict=True))
    stored = normalize(data.server_split(1)[0].images[:]).flatten(1).tolist()
    for epoch in (first, second):
        assert not [row for batch in epoch for row in batch.flatten(1).tolist() if row in stored]
    for ask in (
        lambda d: d.val_dataloader(),
        lambda d: d.predict_dataloader(),
        lambda d: d.server_dataloader(1, "train", shuffle=True),
        lambda d: d.adapt_dataloader(1, labels=True, shuffle=True),
        lambda d: d.test_dataloader()[3],
    ):
        assert torch.equal(images_of(ask(data)), images_of(ask(plain)))


def test_augmentation_follows_from_seed_epoch_and_position(textured_scenes):
    def found(epoch, **options):
        loader = catprior(textured_scenes, task=1, augment=True, **options).train_dataloader()
        return torch.cat(batches(loader, epoch))

    assert torch.equal(found(1), found(1))
    assert not torch.equal(found(1).sort(0)[0], found(2).sort(0)[0])
    assert not torch.equal(found(1), found(1, seed=1))
    torch.manual_seed(3)
    state = torch.get_rng_state()
    found(0)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_same_image_is_cut_differently_at_each_place(textured_scenes):
    data = catprior(textured_scenes, task=1, augment=True)
    dataset = data.train_dataloader().dataset
    cuts = [dataset.batch([2, 2], *place)[0] for place in ((0, 0, 0), (0, 1, 0), (1, 0, 0), (0, 0, 1))]
    rows = [row for cut in cuts for row in cut.flatten(1).tolist()]
    assert len({tuple(row) for row in rows}) == 8


@pytest.mark.parametrize("taken", [0, 1, 4])
def test_a_resumed_epoch_has_the_same_augmented_images(textured_scenes, taken):
    def loader():
        return catprior(textured_scenes, task=1, augment=True).train_dataloader()

    whole, first, resumed = batches(loader(), 2), loader(), loader()
    first.sampler.set_epoch(2)
    iterator = iter(first)
    for _ in range(taken):
        next(iterator)
    resumed.load_state_dict(first.state_dict())
    rest = batches(resumed, 2)
    assert len(rest) == len(whole) - taken
    assert all(torch.equal(a, b) for a, b in zip(rest, whole[taken:], strict=True))


# In memory and on disk


@pytest.mark.parametrize("make", [catprior, transprior])
def test_mapped_files_have_the_same_images(scenes, tmp_path, make, plain_distortions):
    memory, disk = make(scenes), make(scenes, cache_dir=tmp_path / "cache")
    for data in (memory, disk):
        data.prepare_data()
    for task in range(4):
        splits = [(*data.server_split(task), *data.user_split("user3", task)) for data in (memory, disk)]
        for a, b in zip(*splits, strict=True):
            assert torch.equal(a.images[:], b.images[:])
            assert torch.equal(a.labels, b.labels)
    assert len(list((tmp_path / "cache").glob("*.bin"))) == 8


def test_users_and_allocation_seeds_of_catprior_share_the_images(scenes):
    data = catprior(scenes, allocation_seeds=[1, 2])
    pools = {id(data.user_split(user, 0)[k].images.pools[0]) for user in range(6) for k in (0, 1)}
    assert len(pools) == 1
    assert data.view(user=3).user_split(3, 0)[0].images is data.user_split(3, 0)[0].images


def test_setup_decodes_what_the_stage_needs(scenes):
    data = catprior(scenes, task="store", user=0)
    data.setup("fit")
    assert set(data._store._pools) == {"server-store"}
    data.setup("predict")
    assert set(data._store._pools) == {"server-store", "users-store"}


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_users": 0}, "num_users must be at least 1; got 0"),
        ({"image_size": 0}, "image_size must be at least 1; got 0"),
        ({"allocation_seeds": []}, r"allocation_seeds must be one or several different seeds; got \[\]"),
        ({"allocation_seeds": [2, 2]}, r"different seeds; got \[2, 2\]"),
        (
            {"tasks": ["home", "garden"]},
            r"out of home, leisure, public, store, work; got \['home', 'garden'\]",
        ),
        ({"tasks": ["home", "home"]}, "tasks must be different supercategories"),
        ({"tasks": []}, r"got \[\]"),
        ({"extra_images": -1}, "extra_images must be at least 0; got -1"),
        ({"extra_images": 3.0}, r"extra_images must be an integer; got 3\.0"),
        ({"num_users": 2.0}, r"num_users must be an integer; got 2\.0"),
        ({"image_size": 8.0}, r"image_size must be an integer; got 8\.0"),
        ({"split_seed": "x"}, "split_seed must be an integer; got 'x'"),
        ({"allocation_seeds": [1.5]}, r"allocation_seeds must be an integer; got 1\.5"),
        ({"num_users": True}, "num_users must be an integer; got True"),
        ({"supercategories": "none.csv"}, r"cannot be read from none\.csv"),
    ],
)
@pytest.mark.parametrize("make", [catprior, transprior])
def test_options_out_of_range_are_refused(scenes, make, options, message):
    with pytest.raises(MisconfigurationException, match=message):
        make(scenes, **options)


@pytest.mark.parametrize("make", [catprior, transprior])
def test_every_option_arrives(scenes, make):
    options = {
        "num_users": 2, "tasks": ("store", "home"), "allocation_seeds": (4, 7), "image_size": 6, "augment": True,
        "mean": (0.1, 0.2, 0.3), "std": (1.0, 2.0, 3.0), "download": True, "archive_md5": "0" * 32,
        "batch_size": 3, "eval_batch_size": 9, "seed": 11, "split_seed": 12, "extra_images": 2,
    }  # fmt: skip
    data = make(scenes, task="home", user="user2-seed4", cache_dir=scenes / "cache", **options)
    assert {name: getattr(data, name) for name in options} == options
    assert (data.task, data.user, data._store.cache_dir) == ("home", "user2-seed4", scenes / "cache")


@pytest.mark.parametrize("make", [catprior, transprior])
def test_numpys_integers_and_single_values_will_do(scenes, tmp_path, make):
    numbers = {"num_users": 2, "image_size": 6, "extra_images": 2, "split_seed": 5}
    plain = make(scenes, tasks=["home"], allocation_seeds=[3], **numbers)
    arrays = make(scenes, tasks=np.array(["home"]), allocation_seeds=np.array([3]), **numbers)
    assert (arrays.tasks, arrays.allocation_seeds) == (("home",), (3,))
    other = make(
        scenes, tasks="home", allocation_seeds=np.int64(3), cache_dir=tmp_path,
        **{name: np.int64(value) for name, value in numbers.items()},
    )  # fmt: skip
    assert other.user_files(1, 0) == plain.user_files(1, 0)
    assert torch.equal(other.user_split(1, 0)[0].images[:], plain.user_split(1, 0)[0].images[:])


def test_preferences_are_a_file_or_a_whole_number(scenes):
    assert catprior(scenes, preferences=np.int64(1)).preferences() == catprior(scenes, preferences=1).preferences()
    for neither in ({}, True):
        with pytest.raises(MisconfigurationException, match="unless a file, must be an integer; got "):
            catprior(scenes, preferences=neither)


@pytest.mark.parametrize("make", [catprior, transprior])
def test_pools_are_in_sorted_order(scenes, make, monkeypatch, plain_distortions):
    asked = []
    pool = ImageStore.pool
    monkeypatch.setattr(ImageStore, "pool", lambda self, n, files, *o: asked.append(files) or pool(self, n, files, *o))
    data = make(scenes)
    data.server_split(0)
    data.user_split(0, 0)
    assert len(asked) == 2  # in the order of a set, another process would decode them again
    assert all(files == sorted(files) and len(files) > 10 for files in asked)
