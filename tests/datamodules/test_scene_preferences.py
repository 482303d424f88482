"""Stored and drawn preferences."""

import json
from collections import Counter

import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from pl_personalize.datamodules.scene_preferences import read_preferences, sample_preferences

CLASSES = {"home": ("attic", "bath", "cellar"), "store": ("deli", "mall")}


def extra(**counts):
    return {scene: tuple(range(counts.get(scene, 100))) for scenes in CLASSES.values() for scene in scenes}


def stored(tmp_path, content):
    path = tmp_path / "preferences.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


ANN = {"home": ["bath", "attic"], "store": ["mall", "deli"]}


def test_the_first_users_of_a_file_count(tmp_path):
    path = stored(tmp_path, {"ann": ANN, "bob": {"home": ["cellar", "attic"], "store": ["deli", "mall"]}, "eve": {}})
    found = read_preferences(path, CLASSES, 2, 2)
    assert found[0] == {"home": ("bath", "attic"), "store": ("mall", "deli")}
    assert found[1]["home"] == ("cellar", "attic")
    assert len(found) == 2


@pytest.mark.parametrize("prefix", ["user", "", "USER_", "user-"])
def test_users_are_found_by_name(tmp_path, prefix):
    path = stored(tmp_path, {f"{prefix}{k}": ANN | {"home": [["cellar", "attic"], ["bath", "attic"]][k == 2]}
                             for k in (1, 10, 11, 2)})  # fmt: skip
    found = read_preferences(path, CLASSES, 2, 2)
    assert [chosen["home"] for chosen in found] == [("cellar", "attic"), ("bath", "attic")]


@pytest.mark.parametrize("names", [["0", "1"], ["0", "1", "2"], ["1", "user1"], ["user2", "ann"], ["User1", "3"]])
def test_names_that_leave_open_who_is_who_are_refused(tmp_path, names):
    with pytest.raises(MisconfigurationException, match=f"must name its users user1, .*; got {', '.join(names)}"):
        read_preferences(stored(tmp_path, dict.fromkeys(names, ANN)), CLASSES, 2, 2)


def test_a_byte_order_mark_does_not_matter(tmp_path):
    path = stored(tmp_path, "\ufeff" + json.dumps({"USER 1": ANN}))
    assert read_preferences(path, CLASSES, 1, 2)[0]["home"] == ("bath", "attic")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "cannot be read from .*preferences.json"),
        ({}, r"0 user\(s\), but num_users=1\. Pass .*preferences=1"),
        ({"ann": ANN | {"home": ["bath"]}}, r"user 'ann' prefers in 'home' \['bath'\], not 2 different classes"),
        ({"ann": ANN | {"home": ["bath", "bath"]}}, r"not 2 different classes \(preferred_classes=2\)"),
        ({"ann": {"home": ["bath", "attic"]}}, r"prefers in 'store' \[\], not 2 different"),
        ({"ann": ANN | {"home": "ab"}}, r"prefers in 'home' 'ab', not 2 different"),
        ({"ann": ANN | {"home": ["bath", "garage"]}}, r"prefers in 'home' 'garage', which is in no task"),
        ({"ann": ANN | {"home": ["bath", "deli"]}}, r"prefers in 'home' 'deli', which belongs to 'store'"),
        ({"ann": ANN | {"home": [["bath"], "attic"]}}, r"prefers in 'home' \['bath'\], which is in no task"),
        ([1], "must be a JSON object: user -> task -> list of classes"),
        ("{", "cannot be read from .*preferences.json"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path, content, message):
    with pytest.raises(MisconfigurationException, match=message):
        read_preferences(stored(tmp_path, content), CLASSES, 1, 2)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"cannot be read from .*/none\.json"):
        read_preferences(tmp_path / "none.json", CLASSES, 1, 2)


def test_drawn_preferences_follow_from_the_seed():
    drawn = [sample_preferences(extra(), CLASSES, 6, 2, 10, seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    for chosen in drawn[0]:
        for task, scenes in chosen.items():
            assert len(set(scenes)) == 2
            assert set(scenes) <= set(CLASSES[task])
    assert len({chosen["home"] for chosen in drawn[0]}) > 2


@pytest.mark.parametrize("seed", range(20))
def test_drawing_succeeds_whenever_it_is_possible(seed):
    """The attic has room for all, the other two together for one each: a careless draw would run into a dead end."""
    drawn = sample_preferences(extra(attic=40, bath=20, cellar=20), CLASSES, 4, 2, 10, seed)
    assert Counter(scene for chosen in drawn for scene in chosen["home"]) == {"attic": 4, "bath": 2, "cellar": 2}


def test_drawing_is_refused_with_the_arithmetic():
    with pytest.raises(
        MisconfigurationException,
        match=r"for .home.: 4 users × 2 preferred classes need 8 shares of 10 extra .* room for 7, with 40, 20, 19",
    ):
        sample_preferences(extra(attic=40, bath=20, cellar=19), CLASSES, 4, 2, 10, 1)


def test_a_class_cannot_be_preferred_twice_by_a_user():
    with pytest.raises(MisconfigurationException, match="1 users × 3 preferred classes"):
        sample_preferences(extra(), CLASSES, 1, 3, 1, 1)


def test_without_extra_images_any_class_may_be_preferred():
    assert len(sample_preferences(extra(attic=0, bath=0, cellar=0), CLASSES, 5, 2, 0, 1)) == 5


@pytest.mark.parametrize("blank", [" ", "\t", "\u00a0", "\u200b"])
def test_blanks_around_names_do_not_count(tmp_path, blank):
    content = {f"{blank}user{k}": {f"{task}{blank}": [f"{blank}{name}{blank}" for name in ANN[task]] for task in ANN}
               for k in (1, 2)}  # fmt: skip
    plain = {f"user{k}": ANN for k in (1, 2)}
    found = read_preferences(stored(tmp_path, content), CLASSES, 2, 2)
    assert found == read_preferences(stored(tmp_path, plain), CLASSES, 2, 2)
    assert found[0] == {"home": ("bath", "attic"), "store": ("mall", "deli")}


def test_a_class_or_task_that_is_written_otherwise_is_told_how_it_is_written(tmp_path):
    path = stored(tmp_path, {"ann": ANN | {"home": ["Bath", "attic"]}})
    with pytest.raises(MisconfigurationException, match="'Bath', which is in no task, where it is 'bath'"):
        read_preferences(path, CLASSES, 1, 2)
    path = stored(tmp_path, {"ann": {"Home": ANN["home"], "store": ANN["store"]}})
    with pytest.raises(
        MisconfigurationException, match=r"prefers in 'home'.*it has 'Home', which is spelled differently"
    ):
        read_preferences(path, CLASSES, 1, 2)


@pytest.mark.parametrize("second", ["ann", "ann ", "\u00a0ann"])
def test_a_name_that_is_there_twice_is_refused(tmp_path, second):
    content = json.dumps({"ann": ANN, "second": ANN}).replace("second", second)
    with pytest.raises(MisconfigurationException, match="'ann' appears twice"):
        read_preferences(stored(tmp_path, content), CLASSES, 1, 2)
