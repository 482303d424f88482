"""What a penalty reads: anchors in checkpoints with hyperparameters of any class, and importances that are none."""

import pathlib

import numpy as np
import pytest
import torch
from torch import nn

from pl_personalize.callbacks.penalty_sources import anchor_of, read_anchor, sum_of_importances


@pytest.mark.parametrize("learning_rate", [0.1, np.float64(0.1), pathlib.Path("x")])
def test_an_anchor_beside_hyperparameters_of_any_class(tmp_path, learning_rate):
    state = nn.Linear(2, 1).state_dict()
    torch.save({"state_dict": state, "hyper_parameters": {"lr": learning_rate}}, tmp_path / "best.ckpt")

    anchor = read_anchor(tmp_path / "best.ckpt")

    assert list(anchor) == list(state)
    assert all(torch.equal(anchor[name], value) for name, value in state.items())


def test_an_anchor_is_tensors_alone():
    assert list(read_anchor({"w": torch.ones(1), "_extra_state": {"steps": 3}})) == ["w"]


def test_an_anchor_that_is_an_importance_is_refused(tmp_path):
    from pl_personalize import Importance

    path = Importance({"w": torch.ones(1)}, kind="mas", num_samples=1).save(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"the anchor .*x\.safetensors holds 'importance'"):
        read_anchor(path)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([None], r"importances\[0\] is None: has it been estimated\? Pass a mapping"),
        ([{"w": torch.ones(1)}, None], r"importances\[1\] is None: has it been estimated"),
        ([{"w": torch.ones(1)}, 3], r"importances\[1\] is a int\. Pass a mapping"),
        ([{"w": 1.0}], r"importances\[0\] has a float for 'w': pass a tensor"),
        ([{"w": torch.ones(1, dtype=torch.complex64)}], r"'w' is torch\.complex64; importances are real"),
    ],
)
def test_what_is_no_importance_is_refused_by_its_number(given, message):
    with pytest.raises(ValueError, match=message):
        sum_of_importances(given, lambda name: False)


def test_a_complex_anchor_of_a_real_parameter_is_refused():
    value = torch.ones(1, dtype=torch.complex64)
    with pytest.raises(ValueError, match=r"the anchor of 'w' is torch\.complex64, and the parameter torch\.float32"):
        anchor_of({"w": torch.ones(1)}, {"w": value}, None)
    assert anchor_of({"w": value}, {"w": torch.ones(1)}, None)["w"].tolist() == [1.0]
