"""What both benchmarks on scenes do: allocation on disk, loaders, memory and files, refusals."""

import re
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image
from scene_files import COUNTS, SIZE, TABLE, catprior, names_of, transprior, write_table
from torch import Tensor

from pl_personalize.datamodules.image_store import ImageStore
from pl_personalize.datamodules.scene_transforms import normalize

TASKS = ("home", "leisure", "public", "store")


@pytest.fixture
def copy(scenes, tmp_path):
    """Scenes that may be changed."""
    return shutil.copytree(scenes, tmp_path / "copy")


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
def test_users_are_profiles_in_iterations(scenes, allocation_seeds, users):
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


def test_another_mean_and_deviation(scenes):
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
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 8


def test_users_and_iterations_of_catprior_share_the_images(scenes):
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


def refused(folder, message, make=catprior, **options):
    with pytest.raises(MisconfigurationException, match=message):
        make(folder, **options).prepare_data()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scene,super\nattic,home\n", "must have the columns scene_class and supercategory"),
        ("scene_class,supercategory\nattic,home\nattic,store\n", "with each class once; got .*store"),
        ("scene_class,supercategory\nattic,\n", "must have the columns"),
        ("", "has no classes; add lines scene_class,supercategory"),
    ],
)
def test_a_table_that_is_none_is_refused(scenes, tmp_path, text, message):
    (tmp_path / "table.csv").write_text(text)
    refused(scenes, message, supercategories=tmp_path / "table.csv")


def test_missing_data_are_named_with_the_ways_to_get_them(tmp_path):
    refused(
        catprior_folder_of(tmp_path),
        r"No Images and no TrainImages\.txt and no TestImages\.txt found in data_dir=.*/nothing.*download=True",
    )


def catprior_folder_of(tmp_path):
    (tmp_path / "nothing").mkdir()
    write_table(tmp_path / "nothing" / "supercategories.csv", TABLE)
    return tmp_path / "nothing"


def test_a_missing_list_alone_is_named(copy):
    (copy / "TestImages.txt").unlink()
    refused(copy, r"No TestImages\.txt found in")


def test_a_list_that_names_a_missing_image_is_refused(copy):
    (copy / "Images" / "gym" / "00_train.png").unlink()
    refused(copy, r"TrainImages\.txt names 'gym/00_train\.png', which is not in .*Images \(1 of 140 lines\)")


@pytest.mark.parametrize("written", ["GYM/00_train.PNG", "gym\\00_train.png"])
def test_a_list_that_writes_a_name_otherwise_is_told_how_it_is_written(copy, written):
    (copy / "TrainImages.txt").write_text(written)
    refused(copy, r"which is not in .*Images, where it is 'gym/00_train\.png' \(1 of 1 lines\)")


@pytest.mark.parametrize("name", ["TrainImages.txt", "TestImages.txt"])
def test_an_empty_list_is_refused(copy, name):
    (copy / name).write_text("\ufeff\n")
    refused(copy, rf"The list .*{name} is empty; add a line <class>/<file>")


def test_an_image_in_both_lists_is_refused(copy):
    with open(copy / "TestImages.txt", "a") as file:
        file.write("\ngym/00_train.png\n")
    refused(copy, r"'gym/00_train\.png' is in both TrainImages\.txt and TestImages\.txt \(1 such images\)")


def test_an_image_twice_in_a_list_is_refused(copy):
    with open(copy / "TrainImages.txt", "a") as file:
        file.write("gym/00_train.png\n")
    refused(copy, r"TrainImages\.txt names 'gym/00_train\.png' twice")


def test_a_class_without_a_supercategory_is_refused(copy):
    shutil.copytree(copy / "Images" / "gym", copy / "Images" / "zoo")
    refused(copy, r"the class\(es\) 'zoo' have no supercategory; add them to the table")


def test_a_class_that_the_table_writes_otherwise_is_refused_with_its_name(copy):
    table = {scene.title() if scene == "gym" else scene: task for scene, task in TABLE.items()}
    refused(copy, "'gym' have no supercategory, where it is 'Gym'", supercategories=write_table(copy / "t.csv", table))


def test_a_table_with_an_unknown_class_is_refused(copy):
    write_table(copy / "supercategories.csv", TABLE | {"zoo": "public"})
    refused(copy, r"names the class\(es\) 'zoo', for which there is no folder in .*Images; pass the table of these")


def test_a_table_of_other_data_names_the_first_classes_alone(scenes):
    refused(
        scenes, r"'attic', 'bakery', 'bar', 'bath', 'cellar' and \d+ more have no supercategory",
        supercategories=write_table(scenes.parent / "other.csv", {"x": "home", "y": "store"}), tasks=["home"],
        preferred_classes=1,
    )  # fmt: skip


def test_a_class_without_training_images_is_refused(copy):
    lines = [line for line in (copy / "TrainImages.txt").read_text().split() if not line.startswith("gym/")]
    (copy / "TrainImages.txt").write_text("\n".join(lines))
    refused(copy, r"the class\(es\) 'gym' have no image in TrainImages\.txt")


@pytest.mark.parametrize(
    ("what", "message"),
    [("truncated", "cannot be read as an image"), ("16 bits", "is grayscale with more than 8 bits; convert it to 8")],
)
@pytest.mark.parametrize("cached", [False, True])
def test_an_image_that_cannot_be_decoded_is_named(copy, tmp_path, what, message, cached):
    data = catprior(copy, cache_dir=tmp_path / "cache" if cached else None)
    data.prepare_data()
    name = data.server_files("home").val[0]
    path = copy / "Images" / name
    if what == "truncated":
        path.write_bytes(path.read_bytes()[:40])
    else:
        Image.new("I;16", (4, 4)).save(path)
    with pytest.raises(MisconfigurationException, match=f"{name} {message}"):
        data.server_split("home")
    data.server_split("store")


def test_files_that_are_no_images_are_no_extra_images(copy):
    for scene in ("attic", "bar"):
        for name in ("Thumbs.db", ".hidden.png", "notes.txt"):
            (copy / "Images" / scene / name).write_text("no image")
    (copy / "Images" / ".cache").mkdir()
    (copy / "Images" / "notes.txt").write_text("no class")
    data = catprior(copy)
    data.prepare_data()
    assert {len(names) for names in data.pools().extra.values()} == {COUNTS["extra"]}


def test_every_class_folder_may_have_capitals_in_suffixes(copy):
    path = copy / "Images" / "attic" / "00_extra.png"
    path.rename(path.with_suffix(".PNG"))
    assert len(catprior(copy).pools().extra["attic"]) == COUNTS["extra"]


def test_extra_images_may_have_every_suffix_and_be_in_subfolders(copy):
    attic = copy / "Images" / "attic"
    for k, name in enumerate(("a.jfif", "b.jpe", "c.avif", "d.jp2", "more/e.png", "more/f.gif")):
        (attic / name).parent.mkdir(exist_ok=True)
        shutil.copy(attic / "00_extra.png", attic / name)
        assert len(catprior(copy).pools().extra["attic"]) == COUNTS["extra"] + k + 1
    for name in ("._a.jfif", "more/.g.png", "@eaDir/h.png"):
        (attic / name).parent.mkdir(exist_ok=True)
        shutil.copy(attic / "00_extra.png", attic / name)
    (copy / "Images" / "__MACOSX").mkdir()
    assert catprior(copy).pools().extra["attic"][-2:] == ("attic/more/e.png", "attic/more/f.gif")


def test_images_in_subfolders_may_be_listed_and_keep_their_class(copy):
    (copy / "Images" / "gym" / "more").mkdir()
    listed = (copy / "TrainImages.txt").read_text().split()
    moved = [name.replace("gym/", "gym/more/") for name in listed]
    for old, new in zip(listed, moved, strict=True):
        (copy / "Images" / old).rename(copy / "Images" / new)
    (copy / "TrainImages.txt").write_text("\n".join(moved))
    data, before = catprior(copy), Counter(labels_of(catprior(copy).server_dataloader("leisure")))
    assert before == {0: COUNTS["train"], 1: COUNTS["train"], 2: COUNTS["train"]}
    names = data.server_files("leisure").train
    labels = data.server_split("leisure")[0].labels
    assert all(data.classes[1][label] == name.split("/")[0] for name, label in zip(names, labels, strict=True))


def test_an_image_of_a_subfolder_is_distorted_by_its_own_seed(copy, plain_distortions):
    for place in ("a", "b"):
        (copy / "Images" / "gym" / place).mkdir()
        shutil.copy(copy / "Images" / "gym" / "00_extra.png", copy / "Images" / "gym" / place / "00_extra.png")
    data = transprior(copy)
    images = [copy / "Images" / "gym" / place / "00_extra.png" for place in (".", "a", "b")]
    seeds = [int(data.read_distorted(path, 0)[0, 0, 1]) for path in images]
    assert len(set(seeds)) == 3


# Names in users' files

BLANKS = [" ", "\t", "\u00a0", "\u3000", "\u200b"]


@pytest.mark.parametrize("make", [catprior, transprior])
@pytest.mark.parametrize("blank", BLANKS)
def test_blanks_around_names_of_a_table_do_not_count(copy, make, blank):
    lines = ["\ufeffscene_class" + blank + "," + blank + "supercategory", blank]
    lines += [f"{blank}{scene}{blank},{blank}{of}{blank}" for scene, of in TABLE.items()]
    (copy / "supercategories.csv").write_text("\n".join(lines))
    data = make(copy)
    data.prepare_data()
    assert data.classes == make(copy, supercategories=write_table(copy / "plain.csv", TABLE)).classes
    assert data.classes[0] == ("attic", "bath", "cellar")


@pytest.mark.parametrize("make", [catprior, transprior])
@pytest.mark.parametrize("written", ["Home", "HOME", "ho me", "h\u00a0ome"])
def test_a_supercategory_that_differs_in_case_or_blanks_from_a_task_is_refused(copy, make, written):
    table = write_table(copy / "t.csv", TABLE | {"attic": written})
    message = re.escape(f"has {written!r} beside the task 'home', for the class(es) 'attic'")
    refused(copy, message, make, supercategories=table)
    refused(copy, message, make, supercategories=table, tasks=["store", "home"])
    make(copy, supercategories=table, tasks=["store", "leisure"]).prepare_data()


def test_two_tasks_may_differ_in_case_if_both_are_asked_for(copy):
    table = write_table(copy / "t.csv", TABLE | {"attic": "Home", "bar": "Home"})
    data = catprior(copy, supercategories=table, tasks=["home", "Home"], extra_images=1)
    assert data.classes == (("bath", "cellar"), ("attic", "bar"))


def test_a_task_that_is_written_otherwise_is_told_how_it_is_written(scenes):
    refused(scenes, r"got \['Home'\], where it is 'home'\.", tasks=["Home"])
    refused(scenes, r"got \['home '\], where it is 'home'\.", tasks="home ")


def test_a_class_that_is_there_twice_but_for_blanks_is_refused(copy):
    (copy / "t.csv").write_text("scene_class,supercategory\nattic,home\nattic ,store\n")
    refused(copy, "with each class once; got .*store", supercategories=copy / "t.csv")


@pytest.mark.parametrize("written", ["Attic", "at tic", "ATTIC"])
def test_a_class_of_the_table_that_its_folder_writes_otherwise_is_refused_with_both(copy, written):
    (copy / "Images" / "attic").rename(copy / "Images" / "attic2")
    (copy / "Images" / "attic2").rename(copy / "Images" / written)
    for name in ("TrainImages.txt", "TestImages.txt"):
        (copy / name).write_text((copy / name).read_text().replace("attic/", f"{written}/"))
    refused(copy, rf"'{written}' have no supercategory, where it is 'attic'")


@pytest.mark.parametrize("blank", BLANKS)
def test_blanks_around_names_of_lists_do_not_count(copy, scene_names, blank):
    before = catprior(copy).server_files("home")
    for name in ("TrainImages.txt", "TestImages.txt"):
        lines = (copy / name).read_text().split()
        (copy / name).write_text("\ufeff" + "".join(f"{blank}{line}{blank}\r\n{blank}\n" for line in lines))
    assert catprior(copy).server_files("home") == before


def test_a_list_with_blanks_inside_names_is_told_how_they_are_written(copy):
    (copy / "TrainImages.txt").write_text("gym / 00_train.png")
    refused(copy, r"which is not in .*Images, where it is 'gym/00_train\.png'")


def test_classes_of_no_task_are_named_once_for_a_table_of_ones_own(scenes, monkeypatch):
    said = []
    monkeypatch.setattr("pl_personalize.datamodules.scenes.rank_zero_info", said.append)
    data = catprior(scenes, tasks=["home", "store"])
    data.prepare_data()
    data.view(user=1).prepare_data()
    (message,) = said
    assert "8 class(es) are left out" in message
    assert "'leisure' (3), 'public' (3), 'work' (2)" in message
    catprior(scenes, tasks=sorted(set(TABLE.values())), num_users=1).prepare_data()
    assert len(said) == 1
