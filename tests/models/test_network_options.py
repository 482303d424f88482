"""Networks chosen by name: what is checked when they are chosen, and what is built."""

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from pl_personalize.models import NetworkOptions, backbone, cnn_bn, mlp

SHAPE = (3, 28, 28)


def seeded(make):
    torch.manual_seed(0)
    return make().eval()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "cnn-bn"}, "did you mean cnn_bn"),
        ({"hidden": []}, r"hidden must be positive integers, at least one; got \[\]"),
        ({"hidden": [10, 0]}, r"hidden must be positive integers, at least one; got \[10, 0\]"),
        ({"name": "cnn_bn", "hidden": [10]}, r"hidden=\[10\] applies to mlp only, not to cnn_bn"),
        ({"weights": "DEFAULT"}, "weights='DEFAULT' applies to torchvision and timm models only, not to mlp"),
        ({"name": "cnn_bn", "resize_to": 64}, "resize_to=64 applies to torchvision and timm models only"),
        ({"name": "alexnet", "resize_to": 0}, "resize_to must be a positive integer; got 0"),
        ({"channels_last": True}, "channels_last does not apply to mlp"),
    ],
)
def test_options_that_do_not_fit_the_network_are_rejected(options, message):
    with pytest.raises(MisconfigurationException, match=message):
        NetworkOptions(**options)


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        ({"name": "squeezenet1_1"}, (3, 4, 8), "squeezenet1_1 cannot process images of 4×8 pixels"),
        ({"name": "squeezenet1_1", "resize_to": 8}, SHAPE, "squeezenet1_1 cannot process images of 8×8 pixels"),
        ({"name": "squeezenet1_1"}, (1, 64, 64), "squeezenet1_1 cannot process images of 64×64 pixels"),
        ({"name": "resnet18", "weights": "nowhere.pth"}, SHAPE, "weights='nowhere.pth' is neither a file"),
    ],
)
def test_check_rejects_a_network_that_cannot_take_the_images(options, shape, message):
    with pytest.raises(MisconfigurationException, match=message):
        NetworkOptions(**options).check(shape)


def test_check_names_weights_that_cannot_be_downloaded(monkeypatch):
    def fails(*args, **kwargs):
        raise OSError("no connection")

    monkeypatch.setattr("pl_personalize.models.network_options.backbone", fails)
    with pytest.raises(MisconfigurationException, match=r"'DEFAULT' of alexnet cannot be downloaded \(no connection\)"):
        NetworkOptions("alexnet", weights="DEFAULT").check(SHAPE)


@pytest.mark.parametrize(
    "options", [{}, {"name": "cnn_bn"}, {"name": "squeezenet1_1", "resize_to": 40, "channels_last": True}]
)
def test_check_leaves_random_numbers_as_they_are(options):
    before = torch.get_rng_state()
    NetworkOptions(**options).check(SHAPE)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("options", "title", "expected"),
    [
        ({}, "MLP 100-100", lambda: mlp(SHAPE, 3)),
        ({"hidden": [7, 5, 4]}, "MLP 7-5-4", lambda: mlp(SHAPE, 3, (7, 5, 4))),
        ({"name": "cnn_bn"}, "CNN-BN", lambda: cnn_bn(SHAPE, 3)),
        ({"name": "shufflenet_v2_x0_5"}, "shufflenet_v2_x0_5", lambda: backbone("shufflenet_v2_x0_5", 3)),
    ],
)
def test_make_builds_the_network_of_that_name(options, title, expected):
    options = NetworkOptions(**options)
    found, wanted = seeded(lambda: options.make(SHAPE, 3)), seeded(expected)
    assert options.title == title
    images = torch.randn(2, *SHAPE)
    assert found.state_dict().keys() == wanted.state_dict().keys()
    assert torch.equal(found(images), wanted(images))


def test_weights_are_loaded(tmp_path):
    wanted = seeded(lambda: backbone("shufflenet_v2_x0_5", 3))
    state = {name.replace("head.", "fc.").removeprefix("body."): value for name, value in wanted.state_dict().items()}
    torch.save(state, tmp_path / "weights.pth")
    options = NetworkOptions("shufflenet_v2_x0_5", weights=str(tmp_path / "weights.pth"))
    images = torch.randn(2, *SHAPE)
    assert torch.equal(options.make(SHAPE, 3).eval()(images), wanted(images))


def test_images_are_resized_inside_the_network():
    images = torch.randn(2, *SHAPE)
    plain = seeded(lambda: backbone("squeezenet1_1", 3))
    resizing = seeded(lambda: NetworkOptions("squeezenet1_1", resize_to=40).make(SHAPE, 3))
    assert torch.equal(resizing(images), plain(F.interpolate(images, (40, 40), mode="bilinear", antialias=True)))


@pytest.mark.parametrize("options", [{"name": "cnn_bn"}, {"name": "squeezenet1_1", "resize_to": 40}])
def test_channels_last_changes_the_memory_format_of_the_images_alone(options):
    seen = []
    network = seeded(lambda: NetworkOptions(**options, channels_last=True).make(SHAPE, 3))
    plain = seeded(lambda: NetworkOptions(**options).make(SHAPE, 3))
    convolution = next(module for module in network.modules() if isinstance(module, torch.nn.Conv2d))
    convolution.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    images = torch.randn(2, *SHAPE)
    torch.testing.assert_close(network(images), plain(images))
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert not seen[0].is_contiguous()


def test_every_option_has_help_on_the_command_line():
    parsing = pytest.importorskip("jsonargparse")
    parser = parsing.ArgumentParser()
    parser.add_class_arguments(NetworkOptions, "network")
    text = " ".join(parser.format_help().split())
    for words in (
        "a multi-layer perceptron",
        "Widths of the hidden",
        "published weights",
        "resizes its input",
        "memory",
    ):
        assert words in text
    chosen = parser.parse_args(["--network.hidden", "[8]"])
    assert parser.instantiate(chosen).network == NetworkOptions(hidden=(8,))
