"""CatPrior on small scenes: who has which images, and that they are the ones on disk."""

import json
from collections import Counter

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from scene_files import COUNTS, catprior, names_of

from pl_personalize.datamodules import CatPriorDataModule


def of(names, kind):
    return {name for name in names if name.endswith(f"_{kind}.png")}


def test_the_paper_is_the_default():
    data = CatPriorDataModule()
    assert data.users == ("user1", "user2", "user3", "user4", "user5")
    assert [len(names) for names in data.classes] == [14, 11, 14, 12]
    assert data.preferences()[0]["home"] == ("winecellar", "dining_room", "corridor")
    assert all("casino" in chosen["leisure"] for chosen in data.preferences())
    assert (data.extra_images, data.preferred_classes, data.image_size, data.augment) == (70, 3, 224, False)


def test_users_have_their_files_and_labels(scenes, scene_names):
    data = catprior(scenes)
    for user in data.users:
        for task in range(4):
            files = data.user_files(user, task)
            for split, names in zip(data.user_split(user, task), files, strict=True):
                assert names_of(split.images[:], scene_names) == list(names)
                assert [data.classes[task][y] for y in split.labels] == [n.partition("/")[0] for n in names]


def test_test_images_are_shared_out_and_extra_ones_go_to_who_prefers_them(scenes):
    data = catprior(scenes)
    for task, scenes_of_task in enumerate(data.classes):
        users = [data.user_files(user, task) for user in range(3)]
        every = [name for files in users for split in files for name in split]
        assert len(set(every)) == len(every)
        assert len(of(every, "test")) == len(scenes_of_task) * COUNTS["test"]
        for preferred, files in zip(data.preferences(), users, strict=True):
            found = Counter(name.partition("/")[0] for split in files for name in of(split, "extra"))
            assert found == dict.fromkeys(preferred[data.tasks[task]], 3)
            assert [len(of(split, "extra")) for split in files] == [4, 2]  # 2 classes × 3 images: 2 and 1 of each
            for scene in scenes_of_task:
                halves = [len([n for n in of(split, "test") if n.startswith(f"{scene}/")]) for split in files]
                assert halves in ([1, 1], [2, 1])  # adapt, eval


def test_allocation_seeds_draw_other_images_and_keep_preferences(scenes):
    data = catprior(scenes, allocation_seeds=[1, 2])
    pairs = [[data.user_files(f"user{k}-seed{j}", "store") for j in (1, 2)] for k in (1, 2, 3)]
    for kind in ("test", "extra"):
        first, second = ([of((*f.adapt, *f.eval), kind) for f in draw] for draw in zip(*pairs, strict=True))
        assert first != second
    for pair in pairs:
        preferred = [{n.partition("/")[0] for n in of((*f.adapt, *f.eval), "extra")} for f in pair]
        assert preferred[0] == preferred[1]
    alone = catprior(scenes, allocation_seeds=[2])
    assert [alone.user_files(k, 1) for k in range(3)] == [data.user_files(f"user{k}-seed2", 1) for k in (1, 2, 3)]
    assert alone.server_files(1) == data.server_files(1) == catprior(scenes).server_files(1)


def test_everything_follows_from_the_split_seed(scenes):
    def files(**options):
        data = catprior(scenes, **options)
        return [data.server_files(2), *(data.user_files(user, 2) for user in range(3))]

    assert files() == files(seed=9)
    assert all(a != b for a, b in zip(files(), files(split_seed=28), strict=True))


def test_preferences_are_drawn_by_their_own_seed(scenes):
    drawn = [catprior(scenes, preferences=seed, split_seed=split).preferences() for seed, split in ((1, 1), (1, 2))]
    assert drawn[0] == drawn[1]
    assert len({str(catprior(scenes, preferences=seed).preferences()) for seed in range(5)}) > 1


def test_what_makes_a_user_different(scenes):
    data = catprior(scenes, allocation_seeds=[1, 2], tasks=["home", "store"])
    first = data.preferences()[0]
    assert data.about_user("user1-seed2") == f"home: {', '.join(first['home'])}; store: {', '.join(first['store'])}"


def test_preferences_of_a_file(scenes, tmp_path):
    chosen = {"home": ["attic", "cellar"], "leisure": ["gym", "bar"], "public": ["tram", "church"]}
    stored = {str(k): chosen | {"store": ["mall", "deli"]} for k in (1, 2, 3)}
    path = tmp_path / "preferences.json"
    path.write_text(json.dumps(stored))
    data = catprior(scenes, preferences=path)
    assert data.preferences()[2]["public"] == ("tram", "church")
    assert {n.partition("/")[0] for n in of(data.user_files(2, "public").adapt, "extra")} == {"tram", "church"}


def test_the_papers_preferences_do_not_fit_other_scenes(scenes):
    with pytest.raises(
        MisconfigurationException,
        match=r"The paper's preferences: user '1' prefers in 'home' 'winecellar', which is in no task\. .*=1",
    ):
        catprior(scenes, preferences=None, preferred_classes=3)


def test_too_few_extra_images_are_refused_before_anything_is_decoded(scenes, tmp_path):
    chosen = {"home": ["attic"], "leisure": ["gym"], "public": ["tram"], "store": ["mall"]}
    path = tmp_path / "preferences.json"
    path.write_text(json.dumps({k: chosen for k in "abc"}))
    options = {"preferences": path, "preferred_classes": 1}
    catprior(scenes, **options, extra_images=3).prepare_data()
    data = catprior(scenes, **options, extra_images=4)
    with pytest.raises(
        MisconfigurationException, match=r"'attic': 3 user\(s\) × 4 = 12, there are 9; 'gym'.*at most 3"
    ):
        data.prepare_data()
    with pytest.raises(MisconfigurationException, match=r"9 shares of 4 extra"):
        catprior(scenes, preferred_classes=3, extra_images=4).prepare_data()


def test_more_users_than_test_images_are_refused(scenes):
    with pytest.raises(MisconfigurationException, match=r"Each of the 8 users .*'attic' has 7, .*num_users="):
        catprior(scenes, num_users=8, preferred_classes=1, extra_images=1).prepare_data()


def test_without_extra_images_users_share_out_the_test_images(scenes):
    files = catprior(scenes, extra_images=0).user_files(0, 0)
    assert not of((*files.adapt, *files.eval), "extra")


@pytest.mark.slow
def test_on_real_scenes(shared_data, tmp_path):
    folder = shared_data / "places-indoor"
    if not folder.is_dir():
        pytest.skip(f"no places-indoor in {shared_data}")
    data = CatPriorDataModule(
        folder, supercategories=folder / "supercategories.csv", preferences=1, extra_images=40, image_size=64,
        cache_dir=tmp_path, user=1, task="store",
    )  # fmt: skip
    data.prepare_data()
    data.setup("fit"), data.setup("predict")
    classes = data.num_classes("store")
    assert classes == 7
    train, val = data.server_split("store")
    assert (len(train.labels), len(val.labels)) == (classes * 64, classes * 16)
    adapt, evaluation = data.user_split(1, "store")
    assert len(adapt.labels) == len(evaluation.labels) == classes * 2 + 3 * 20
    batch = next(iter(data.predict_dataloader()))
    assert batch.shape == (len(adapt.labels), 3, 64, 64)
    assert abs(float(batch.mean())) < 0.5
    assert float(batch.std()) == pytest.approx(1.1, abs=0.3)
    assert torch.equal(torch.unique(train.labels), torch.arange(classes))
