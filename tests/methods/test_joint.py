"""Joint training: one model of all classes, tested with those of the task at hand."""

import pytest
import torch
from tiny_benchmark import Tiny, call, matrix, plain

from pl_personalize.artifacts import TensorFile
from pl_personalize.datamodules.base import LabelledImages


class Uneven(Tiny):
    """A first task of two classes, and a second of three."""

    def __init__(self):
        super().__init__()
        self.classes = (("x", "y"), ("x", "y", "z"))

    def load_server(self, task):
        return tuple(self.with_classes(one, task) for one in super().load_server(task))

    def load_user(self, user, task):
        return tuple(self.with_classes(one, task) for one in super().load_user(user, task))

    def with_classes(self, split, task):
        return LabelledImages(split.images, torch.arange(len(split.labels)) % len(self.classes[task]))


def test_tasks_of_different_sizes_have_their_own_classes_of_the_one_head(tmp_path):
    data = Uneven()
    call(tmp_path, data=data, methods=["Joint"])
    network = plain(5)
    network.load_state_dict(TensorFile(tmp_path / "checkpoints/Joint/seed1/all.safetensors", kind="expert").load())
    found = matrix(tmp_path, "Joint/seed1/test/Joint/ann")[-1]
    for task, classes in enumerate((slice(0, 2), slice(2, 5))):
        images, labels = data.user_split("ann", task)[1]
        with torch.no_grad():
            right = (network(images)[:, classes].argmax(1) == labels).float().mean().item()
        assert found[task] == pytest.approx(right)
