"""Folders of scenes: lists, tables and image files that do not fit, and names written in other ways."""

import re
import shutil
from collections import Counter

import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image
from scene_files import COUNTS, TABLE, catprior, transprior, write_table

TASKS = ("home", "leisure", "public", "store")


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
    data, loader = catprior(copy), catprior(copy).server_dataloader("leisure")
    before = Counter(int(label) for batch in loader for label in batch[1])
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
