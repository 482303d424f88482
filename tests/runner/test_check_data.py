"""Errors in the data that are found before anything is trained."""

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tiny_benchmark import Tiny, call, plain, with_norm
from torch import nn

from pl_personalize.datamodules import LabelledImages
from pl_personalize.methods import METHODS
from pl_personalize.models import TaskNetwork
from pl_personalize.runner import TrainerOptions
from pl_personalize.runner.check_data import check_data


class Changed(Tiny):
    """The eval images of bob's second task are changed."""

    def __init__(self, change, **options):
        super().__init__(**options)
        self.change = change

    def load_user(self, user, task):
        adapt, evaluation = super().load_user(user, task)
        images = self.change(evaluation.images) if (user, task) == (1, 1) else evaluation.images
        return adapt, LabelledImages(images, evaluation.labels)


def refused(folder, message, **options):
    with pytest.raises(MisconfigurationException, match=message):
        call(folder, **options)
    assert not (folder / "checkpoints").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda x: x[:, :3],
            r"cannot take the eval images of the user bob for the task 'b' \(\(3,\), torch\.float32\)",
        ),
        (lambda x: x.double(), r"cannot take the eval images of the user bob .*torch\.float64"),
        (lambda x: (9 * x).to(torch.uint8), r"cannot take the eval images of the user bob .*torch\.uint8"),
        (lambda x: x / 0, "Changed: user 'bob', task 'b', eval: image 0 has NaN or infinite values"),
    ],
)
def test_images_that_the_network_cannot_take_are_named(tmp_path, change, message):
    refused(tmp_path, message, data=Changed(change))


def test_images_of_another_type_will_do_where_the_precision_makes_them_fit():
    doubles = Changed(lambda x: x.double())
    check_data(doubles, plain(2), [METHODS["Experts"]], TrainerOptions("cpu", precision="64-true"))


def test_the_transform_counts(tmp_path):
    class Bytes(Changed):
        def transform(self, images, seed=None):
            return images.float() / (0 if self.to_nothing else 1)

        to_nothing = False

    data = Bytes(lambda x: (9 * x).clamp(0, 9).to(torch.uint8))
    check_data(data, plain(2), [METHODS["Experts"]], TrainerOptions("cpu"))
    data.to_nothing = True
    refused(tmp_path, "transform of the train images of the server for the task 'a' .* makes NaN", data=data)


def test_a_network_that_makes_no_logits_is_named(tmp_path):
    def images_back(classes):
        return TaskNetwork(nn.Linear(4, 5), nn.Sequential(nn.Linear(5, classes), nn.Unflatten(1, (classes, 1))))

    with pytest.raises(MisconfigurationException, match=r"makes \(2, 2, 1\) of 2 images"):
        check_data(Tiny(), images_back(2), [METHODS["Experts"]], TrainerOptions("cpu"))


def test_images_of_several_shapes_are_refused_for_a_model_of_all_tasks_alone():
    class Growing(Tiny):
        def load_server(self, task):
            return tuple(
                split._replace(images=split.images[:, None].repeat(1, task + 1, 1))
                for split in super().load_server(task)
            )

    network = TaskNetwork(nn.Sequential(nn.Flatten(), nn.LazyLinear(4)), nn.Linear(4, 2))
    pooled = TaskNetwork(nn.Sequential(nn.AdaptiveAvgPool1d(4), nn.AdaptiveMaxPool1d(4), Mean()), nn.Linear(4, 2))
    check_data(Growing(), pooled, [METHODS["Experts"]], TrainerOptions("cpu"))
    with pytest.raises(MisconfigurationException, match=r"one shape; got \(1, 4\) in 'a', \(2, 4\) in 'b'"):
        check_data(Growing(), pooled, [METHODS["Experts"], METHODS["Joint"]], TrainerOptions("cpu"))
    with pytest.raises(MisconfigurationException, match=r"cannot take .* for the task 'b' \(\(2, 4\), torch.float32\)"):
        check_data(Growing(), network, [METHODS["Experts"]], TrainerOptions("cpu"))


class Mean(nn.Module):
    """Over the second dimension, if there is one."""

    def forward(self, x):
        return x.mean(1) if x.ndim == 3 else x


def test_a_look_at_the_images_changes_no_result(tmp_path, monkeypatch):
    rows = call(tmp_path / "with", network=with_norm)
    monkeypatch.setattr("pl_personalize.runner.run.check_data", lambda *_: None)
    assert call(tmp_path / "without", network=with_norm) == rows


def test_a_split_without_images_is_named(tmp_path):
    refused(tmp_path, "no train images of the server for the task 'a'", data=Tiny(images=0))
