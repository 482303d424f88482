"""Who gets which images: the protocol's arithmetic, on the true numbers of MIT Indoor Scenes."""

import json
from collections import Counter

import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from scene_files import write_table

from pl_personalize.datamodules import CatPriorDataModule, TransPriorDataModule
from pl_personalize.datamodules.scene_folder import Pools, classes_of_tasks, read_supercategories
from pl_personalize.datamodules.scene_preferences import read_preferences

TASKS = ("home", "leisure", "public", "store", "work")
# Images of each class in the official list of test images, in alphabetical order; the other list has the rest of 100.
TEST_COUNTS = {
    "home": [18, 21, 18, 18, 21, 18, 18, 21, 20, 20, 20, 20, 20, 21],
    "leisure": [18, 20, 20, 19, 20, 17, 20, 18, 21, 20, 20],
    "public": [20, 19, 20, 21, 23, 21, 20, 21, 23, 20, 20, 21, 20, 21],
    "store": [19, 20, 18, 19, 19, 21, 22, 22, 20, 19, 22, 22],
    "work": [20, 18, 18, 18, 21, 20, 20, 20, 22, 22, 21, 19, 23, 19, 18, 21],
}
TABLE = read_supercategories(None)
CLASSES = dict(zip(TASKS, classes_of_tasks(TABLE, TASKS), strict=True))
FOUR = {task: CLASSES[task] for task in TASKS[:4]}


def listing(extra: int | dict[str, int] = 350) -> Pools:
    """MIT Indoor's images, with so many extra ones of each class."""
    test = {scene: n for task in TASKS for scene, n in zip(CLASSES[task], TEST_COUNTS[task], strict=True)}

    def some(what, counts):
        return {scene: tuple(f"{scene}/{what}{k:04}" for k in range(n)) for scene, n in counts.items()}

    extras = dict.fromkeys(test, extra) if isinstance(extra, int) else dict.fromkeys(test, 350) | extra
    return Pools(
        some("train", {scene: 100 - n for scene, n in test.items()}), some("test", test), some("extra", extras)
    )


def preferred(task, num_users=5):
    return [chosen[task] for chosen in read_preferences(None, FOUR, num_users, 3)]


def catprior_files(pools, task, seed=1):
    data = CatPriorDataModule()
    return data.allocate(pools, data.task_index(task), seed)


def transprior_files(pools, task, extra_images=1000, seed=1):
    data = TransPriorDataModule(extra_images=extra_images)
    return data.allocate(pools, data.task_index(task), seed)[0]


def server_files(pools, task, split_seed=27):
    data = TransPriorDataModule(tasks=TASKS, split_seed=split_seed)
    data.pools = lambda: pools
    return data.server_files(task)


def test_an_image_that_is_in_two_pools_is_noticed():
    pools = listing()
    twice = dict(pools.extra)
    twice["casino"] = (*pools.test["casino"][:3], *twice["casino"])
    broken = pools._replace(extra=twice)
    with pytest.raises(AssertionError, match=r"'casino/test0.*' is allocated twice"):
        catprior_files(broken, "leisure")
    with pytest.raises(AssertionError, match=r"'casino/test0.*' is allocated twice"):
        transprior_files(broken, "leisure", sum(len(twice[scene]) for scene in CLASSES["leisure"]))


def of(names, kind):
    return [name for name in names if f"/{kind}" in name]


def test_the_tables_are_those_of_mit_indoor():
    assert [len(CLASSES[task]) for task in TASKS] == [14, 11, 14, 12, 16]
    assert len(TABLE) == 67
    assert CLASSES["home"][0] == "bathroom"
    assert all(list(scenes) == sorted(scenes) for scenes in CLASSES.values())


@pytest.mark.parametrize(
    ("task", "train", "val"),
    [("home", 900, 226), ("leisure", 709, 178), ("public", 888, 222), ("store", 765, 192), ("work", 1024, 256)],
)
def test_the_server_has_80_percent_for_training(task, train, val):
    found = server_files(listing(), task)
    assert (len(found.train), len(found.val)) == (train, val)
    assert len({*found.train, *found.val}) == train + val
    assert found == server_files(listing(), task)
    assert found != server_files(listing(), task, 28)
    assert list(found.train) != sorted(found.train)


# CatPrior


@pytest.mark.parametrize("task", TASKS[:4])
def test_users_of_catprior_have_the_sizes_of_the_protocol(task):
    users = catprior_files(listing(), task)
    for scene, count in zip(CLASSES[task], TEST_COUNTS[task], strict=True):
        halves = [
            tuple(len(of([n for n in split if n.startswith(f"{scene}/")], "test")) for split in (u.eval, u.adapt))
            for u in users
        ]
        assert sum(map(sum, halves)) == count  # every test image belongs to somebody
        assert {(count // 5) // 2} <= {half for half, _ in halves} <= {(count // 5) // 2, (count // 5 + 1) // 2}
        assert set(halves) <= {3: {(1, 2), (2, 2)}, 4: {(2, 2), (2, 3)}}[count // 5]  # c = 4 -> 2/2, c = 3 -> 1/2
        assert sorted(map(sum, halves)) == sorted(count // 5 + (k < count % 5) for k in range(5))
    for user, scenes in zip(users, preferred(task), strict=True):
        for split in user:
            assert Counter(name.partition("/")[0] for name in of(split, "extra")) == dict.fromkeys(scenes, 35)


@pytest.mark.parametrize(
    ("task", "evaluation", "adapt"),
    [("home", 131, 134), ("leisure", 125, 127), ("public", 133, 135), ("store", 128, 131)],
)
def test_users_of_catprior_have_about_the_published_sizes(task, evaluation, adapt):
    users = catprior_files(listing(), task)
    assert sum(len(user.eval) for user in users) / 5 == pytest.approx(evaluation, abs=4)
    assert sum(len(user.adapt) for user in users) / 5 == pytest.approx(adapt, abs=4)


@pytest.mark.parametrize("task", TASKS[:4])
@pytest.mark.parametrize("seed", [1, 2])
def test_no_image_of_catprior_is_in_two_places(task, seed):
    users = catprior_files(listing(), task, seed)
    names = [name for user in users for split in user for name in split]
    assert len(set(names)) == len(names)
    assert not of(names, "train")


def test_every_extra_image_can_be_drawn():
    """Five users × 70 of the casino are 350: not one more is needed, and none is left out."""
    users = catprior_files(listing(350), "leisure")
    drawn = {name for user in users for split in user for name in of(split, "extra") if name.startswith("casino/")}
    assert len(drawn) == 350


def test_leftover_test_images_go_to_different_users(tmp_path):
    scenes = [f"c{k}" for k in range(40)]
    table = write_table(tmp_path / "table.csv", dict.fromkeys(scenes, "home"))
    (tmp_path / "users.json").write_text(json.dumps({f"user{k}": {"home": ["c0"]} for k in range(1, 6)}))
    data = CatPriorDataModule(
        supercategories=table, tasks="home", preferences=tmp_path / "users.json", preferred_classes=1, extra_images=0
    )
    pools = Pools({}, {c: tuple(f"{c}/test{i}" for i in range(6)) for c in scenes}, dict.fromkeys(scenes, ()))
    more = [sum(map(len, user)) - 40 for user in data.allocate(pools, 0, 1)]
    assert sum(more) == 40
    assert max(more) < 20  # not always the same


def test_allocation_seeds_of_catprior_draw_anew_and_preferences_stay():
    first, second = (catprior_files(listing(), "home", j) for j in (1, 2))
    for a, b in zip(first, second, strict=True):
        for kind in ("test", "extra"):
            assert set(of(a.adapt + a.eval, kind)) != set(of(b.adapt + b.eval, kind))
        scenes = [{n.partition("/")[0] for n in of(files.adapt + files.eval, "extra")} for files in (a, b)]
        assert scenes[0] == scenes[1]


def test_splits_are_shuffled():
    """Batches of one class after the other would spoil the statistics of batch norm."""
    user = catprior_files(listing(), "home")[0]
    for split in user:
        assert len({name.partition("/")[0] for name in split[:20]}) >= 3


# TransPrior


@pytest.mark.parametrize(
    ("task", "evaluation", "adapt"),
    [("home", 135, 139), ("leisure", 105, 108), ("public", 141, 149), ("store", 119, 124)],
)
def test_users_of_transprior_have_the_sizes_of_the_protocol(task, evaluation, adapt):
    found = transprior_files(listing(), task)
    assert (len(of(found.eval, "test")), len(of(found.adapt, "test"))) == (evaluation, adapt)
    assert (len(of(found.eval, "extra")), len(of(found.adapt, "extra"))) == (500, 500)
    names = [*found.adapt, *found.eval]
    assert len(set(names)) == len(names)
    first = listing().test[CLASSES[task][0]]
    assert set(first[: len(first) // 2]) <= set(found.eval)
    assert set(first[len(first) // 2 :]) <= set(found.adapt)


def test_allocation_seeds_of_transprior_keep_the_test_images():
    first, second = (transprior_files(listing(), "store", seed=j) for j in (1, 2))
    for a, b in zip(first, second, strict=True):
        assert set(of(a, "test")) == set(of(b, "test"))
        assert set(of(a, "extra")) != set(of(b, "extra"))


def test_all_extra_images_of_a_task_may_be_asked_for():
    found = transprior_files(listing(100), "leisure", 1100)
    assert len(of([*found.adapt, *found.eval], "extra")) == 1100


def test_odd_numbers_favour_adapt():
    found = transprior_files(listing(), "home", 7)
    assert (len(of(found.eval, "extra")), len(of(found.adapt, "extra"))) == (3, 4)


# What cannot be


def test_the_papers_preferences_need_350_images_of_the_casino():
    CatPriorDataModule().check(listing(350))
    with pytest.raises(
        MisconfigurationException,
        match=r"'casino': 5 user\(s\) × 70 = 350, there are 349\. .*extra_images= \(at most 69 ",
    ):
        CatPriorDataModule().check(listing({"casino": 349}))


def test_all_classes_with_too_few_are_named_at_once():
    with pytest.raises(MisconfigurationException, match=r"'corridor': .* there are 9; .*'casino': .* there are 8\."):
        CatPriorDataModule().check(listing({"casino": 8, "corridor": 9}))


def test_more_users_than_test_images_are_refused():
    CatPriorDataModule(num_users=8, preferences=1).check(listing(2000))
    with pytest.raises(
        MisconfigurationException,
        match=r"Each of the 9 users .*, 18 in total; .* 'fastfood_restaurant' has 17\. .*num_",
    ):
        CatPriorDataModule(num_users=9, preferences=1).check(listing(2000))


def test_transprior_says_how_many_there_are():
    TransPriorDataModule(extra_images=1100).check(listing(100))
    with pytest.raises(
        MisconfigurationException, match=r"each user gets 1101 of each task, and 'leisure' has 1100\. .*at most 1100"
    ):
        TransPriorDataModule(extra_images=1101).check(listing(100))


def test_transprior_needs_a_test_image_for_each_half():
    pools = listing()
    with pytest.raises(MisconfigurationException, match=r"at least 2 test images.* fewer of 'bar'"):
        TransPriorDataModule(extra_images=10).check(pools._replace(test=dict(pools.test) | {"bar": ("bar/one",)}))
