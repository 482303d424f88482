"""The figure with a row for each user."""

import numpy as np
import pytest
import torch
from PIL import Image
from scene_files import catprior, transprior
from tiny_benchmark import Tiny

from pl_personalize.datamodules import DigitsDataModule, LabelledImages, show_users


@pytest.fixture
def drawn(monkeypatch):
    """What was drawn: the arrays, in order."""
    from matplotlib.axes import Axes

    shown, imshow = [], Axes.imshow
    monkeypatch.setattr(Axes, "imshow", lambda self, image, **o: shown.append(image) or imshow(self, image, **o))
    return shown


def test_a_row_for_each_user_with_images_of_all_tasks_in_turn(scenes, tmp_path, drawn, plain_distortions):
    data = transprior(scenes, tasks=["home", "store"], num_users=2)
    path = show_users(data, tmp_path / "figures" / "users.png", images_per_user=3)
    assert path == tmp_path / "figures" / "users.png"
    assert len(drawn) == 2 * 3
    for user in range(2):
        for column in range(3):
            stored = data.user_split(user, column % 2)[0].images[column // 2]
            assert np.array_equal(np.round(255 * drawn[3 * user + column]), stored.permute(1, 2, 0).numpy())
    assert Image.open(path).width > Image.open(path).height


def test_rows_and_images_say_whose_and_what_they_are(scenes, tmp_path, monkeypatch, plain_distortions):
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **options: figures.append(self))
    data = transprior(scenes)
    show_users(data, tmp_path / "users.png", images_per_user=2)
    rows = [figures[0].axes[k : k + 2] for k in (0, 2, 4)]
    assert [row[0].get_ylabel() for row in rows] == ["user1\nspatter", "user2\nelastic", "user3\nsaturation"]
    for user, row in enumerate(rows):
        labels = [data.user_split(user, task)[0].labels[0] for task in (0, 1)]
        expected = [f"{data.tasks[task]}: {data.classes[task][int(label)]}" for task, label in enumerate(labels)]
        assert [axis.get_title() for axis in row] == expected


def test_every_draw_is_a_row(scenes, tmp_path, drawn):
    show_users(catprior(scenes, allocation_seeds=[1, 2]), tmp_path / "users.png", images_per_user=2)
    assert len(drawn) == 6 * 2


def test_other_benchmarks_are_shown_too(tmp_path, drawn):
    pytest.importorskip("sklearn")
    show_users(DigitsDataModule(), tmp_path / "users.png", images_per_user=3)
    assert [image.shape for image in drawn] == [(16, 16, 3)] * 6
    assert all((image.min(), image.max()) == (0, 1) for image in drawn)


def test_where_there_are_too_few_images_places_stay_empty(tmp_path, drawn):
    class Few(Tiny):
        def load_user(self, user, task):
            split = LabelledImages(torch.rand(1, 1, 5, 5), torch.zeros(1, dtype=torch.long))
            return split, split

    show_users(Few(), tmp_path / "users.png", images_per_user=5)
    assert [image.shape for image in drawn] == [(5, 5)] * 4


def test_no_images_are_refused(scenes, tmp_path):
    with pytest.raises(ValueError, match="images_per_user must be at least 1; got 0"):
        show_users(catprior(scenes), tmp_path / "users.png", images_per_user=0)
