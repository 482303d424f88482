"""Published weights, from files and by name."""

import copy
import pickle
import re
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision import models as torchvision_models

from pl_personalize import ArtifactError
from pl_personalize.models import backbone, efficientnet_lite_to_timm

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
NAME = "squeezenet1_1"


@pytest.fixture(scope="module")
def published():
    """The state dict of torchvision's network with five classes."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return torchvision_models.get_model(NAME, num_classes=5).state_dict()


def write(folder, state, kind="pth"):
    path = folder / f"weights.{kind}"
    if kind == "safetensors":
        save_file(dict(state), path)
    else:
        torch.save({"state_dict": state} if kind == "ckpt" else state, path)
    return path


@pytest.mark.parametrize("kind", ["pth", "ckpt", "safetensors"])
@pytest.mark.parametrize("classes", [3, 5])
def test_weights_of_a_file(published, tmp_path, kind, classes):
    path = write(tmp_path, published, kind)
    torch.manual_seed(0)
    network = backbone(NAME, classes, weights=str(path) if kind == "pth" else path).eval()
    for name, value in network.body.state_dict().items():
        assert torch.equal(value, published[name])
    assert network(X).shape == (2, classes)
    loaded = network.head.weight.shape == (5, 512, 1, 1) and torch.equal(
        network.head.weight, published["classifier.1.weight"]
    )
    assert loaded == (classes == 5)
    assert network.head.weight.requires_grad


def test_a_body_alone_is_enough(published, tmp_path):
    body = {name: value for name, value in published.items() if not name.startswith("classifier")}
    network = backbone(NAME, 5, weights=write(tmp_path, body))
    assert torch.equal(network.body.features[0].weight, published["features.0.weight"])


def without(state, name):
    return {other: value for other, value in state.items() if other != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: without(s, "features.0.bias"), r"SqueezeNet. Entries missing: features.0.bias\.$"),
        (lambda s: s | {"features.99.bias": X}, r"Entries unexpected: features.99.bias\.$"),
        (lambda s: without(s, "features.0.bias") | {"other": X}, "missing: features.0.bias; unexpected: other"),
        (lambda s: s | {"features.0.bias": torch.zeros(7)}, r"of another shape: features.0.bias \(7,\) instead of"),
        (lambda s: {f"module.{n}": v for n, v in s.items()}, r"missing: .* 45 more; unexpected: module.* 47 more"),
        (lambda s: s | {"epoch": 3}, r"Entries unexpected: epoch\.$"),
        (lambda s: s | {"features.0.bias": 1.0}, r"of another shape: features.0.bias float instead of \(64,\)"),
        (lambda s: {"model": s}, "holds no tensors but the entries model"),
        (lambda s: [X], "an object of the class list, not a state dict"),
        (lambda s: nn.Linear(2, 2), "of the class torch.nn.modules.linear.Linear, not a state dict"),  # would run code
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit(published, tmp_path, change, message):
    path = write(tmp_path, change(dict(published)))
    with pytest.raises(ArtifactError, match=message) as refusal:
        backbone(NAME, 3, weights=path)
    assert str(refusal.value).startswith(str(path))


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_a_file_that_is_broken(published, tmp_path, kind):
    path = write(tmp_path, published, kind)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ArtifactError, match=r"cannot be read|is not a readable"):
        backbone(NAME, 3, weights=path)
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ArtifactError, match=re.escape(str(path))):
        backbone(NAME, 3, weights=path)


def test_weights_that_are_nowhere(tmp_path):
    message = r"weights='nowhere.pth' is neither a file nor .* torchvision's squeezenet1_1, .* IMAGENET1K_V1"
    with pytest.raises(ValueError, match=message):
        backbone(NAME, 3, weights="nowhere.pth")


@pytest.mark.parametrize("name", ["DEFAULT", "IMAGENET1K_V1"])
def test_weights_by_name_are_torchvisions(tmp_path, monkeypatch, name):
    """From torchvision's cache of downloads, where a file of that name lies."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    state = torchvision_models.get_model(NAME).state_dict()
    torch.save(state, cache / Path(torchvision_models.get_model_weights(NAME).DEFAULT.url).name)

    network = backbone(NAME, 3, weights=name)
    assert all(torch.equal(value, state[name]) for name, value in network.body.state_dict().items())
    assert network.head.weight.shape == (3, 512, 1, 1)
    assert torch.equal(backbone(NAME, 1000, weights=name).head.weight, state["classifier.1.weight"])


def test_auxiliary_classifiers_of_a_file_are_left_out(tmp_path):
    state = torchvision_models.googlenet(aux_logits=True, init_weights=False).state_dict()
    assert any(name.startswith("aux1.") for name in state)
    network = backbone("googlenet", 3, weights=write(tmp_path, state))
    assert torch.equal(network.body.conv1.conv.weight, state["conv1.conv.weight"])


def test_names_of_older_files(tmp_path):
    """torchvision's files of DenseNets are from before a module's name could have no dots."""
    state = torchvision_models.densenet121(num_classes=4).state_dict()
    old = {re.sub(r"(denselayer\d+)\.(norm|conv)([12])\.", r"\1.\2.\3.", name): value for name, value in state.items()}
    old = {name: value for name, value in old.items() if not name.endswith("num_batches_tracked")}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    network = backbone("densenet121", 3, weights=write(tmp_path, old, "safetensors"))
    loaded = network.body.features.denseblock1.denselayer1.norm1.weight
    assert torch.equal(loaded, state["features.denseblock1.denselayer1.norm1.weight"])


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_a_network_that_asks_for_its_version(tmp_path, kind):
    state = torchvision_models.mnasnet0_5(num_classes=4).state_dict()
    network = backbone("mnasnet0_5", 4, weights=write(tmp_path, state, kind))
    assert torch.equal(network.head.weight, state["classifier.1.weight"])


def test_published_weights_of_squeezenet(shared_data):
    path = shared_data / "weights" / "squeezenet1_0-dc-imagenet.pth"
    if not path.is_file():
        pytest.skip(f"no weights at {path}")
    state = torch.load(path, weights_only=True)
    original = torchvision_models.squeezenet1_0().eval()
    original.load_state_dict(state)
    network = backbone("squeezenet1_0", 1000, weights=path).eval()
    before = copy.deepcopy(original)
    before.classifier[2] = nn.Identity()
    with torch.no_grad():
        assert torch.equal(network(X), before(X))
    assert network.new_head(3).weight.shape == (3, 512, 1, 1)


# EfficientNet-Lite


BLOCK = ["_depthwise_conv", "_bn1", "_project_conv", "_bn2"]


def test_an_efficientnet_lite_is_renamed():
    names = ["_conv_stem", "_bn0", *(f"_blocks.0.{layer}" for layer in BLOCK)]
    names += [f"_blocks.{k}.{layer}" for k in (1, 4, 5) for layer in ("_expand_conv", "_bn0", *BLOCK)]
    names += ["_conv_head", "_bn1", "_fc"]
    expanded = ["conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3"]
    wanted = ["conv_stem", "bn1", *(f"blocks.0.0.{layer}" for layer in ("conv_dw", "bn1", "conv_pw", "bn2"))]
    wanted += [f"blocks.{place}.{layer}" for place in ("1.0", "2.1", "3.0") for layer in expanded]
    wanted += ["conv_head", "bn2", "classifier"]

    state = {f"{name}.weight": torch.tensor(k) for k, name in enumerate(names)}
    assert efficientnet_lite_to_timm(state) == {f"{name}.weight": torch.tensor(k) for k, name in enumerate(wanted)}


def test_blocks_are_counted_within_stages():
    state = {f"_blocks.{k}._bn1.bias": torch.tensor(k) for k in range(4)}
    found = efficientnet_lite_to_timm(state, [1, 2])
    assert [name for name in found] == [
        "blocks.0.0.bn1.bias", "blocks.1.0.bn1.bias", "blocks.1.1.bn1.bias", "_blocks.3._bn1.bias",
    ]  # fmt: skip


@pytest.fixture
def in_timm():
    """What is said of a file's network in timm, and of the same file in the package that wrote it."""
    pytest.importorskip("timm", reason="timm is not installed")
    package = pytest.importorskip("efficientnet_lite_pytorch", reason="efficientnet-lite-pytorch is not installed")

    def logits(state, path, name="efficientnet-lite0"):
        number = state["_fc.weight"].shape[0]
        original = package.EfficientNet.from_name(name, num_classes=number).eval()
        original.load_state_dict(state)
        network = backbone(f"timm:tf_{name.replace('-', '_')}", number, weights=path).eval()
        x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            return network(x), original(x)

    return logits


@pytest.mark.parametrize("name", ["efficientnet-lite0", "efficientnet-lite1"])
def test_an_efficientnet_lite_computes_the_same_in_timm(in_timm, tmp_path, name):
    package = pytest.importorskip("efficientnet_lite_pytorch")
    torch.manual_seed(0)
    state = package.EfficientNet.from_name(name, num_classes=5).state_dict()
    state = OrderedDict((n, v.uniform_(0.5, 1.5) if n.endswith("running_var") else v) for n, v in state.items())
    torch.testing.assert_close(*in_timm(state, write(tmp_path, state), name), rtol=1e-4, atol=1e-5)


def test_published_weights_of_efficientnet_lite_compute_the_same_in_timm(in_timm, shared_data):
    path = shared_data / "weights" / "efficientnet-lite0-57934424.pth"
    if not path.is_file():
        pytest.skip(f"no weights at {path}")
    found, wanted = in_timm(torch.load(path, weights_only=True), path)
    assert float(wanted.std()) > 0.1
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_an_efficientnet_lite_fits_timms(tmp_path):
    """Without the package that made it: from timm's names back, by hand for the two that differ most."""
    timm = pytest.importorskip("timm", reason="timm is not installed")
    state = timm.create_model("tf_efficientnet_lite0", num_classes=4).state_dict()
    path = write(tmp_path, state)
    network = backbone("timm:tf_efficientnet_lite0", 4, weights=path)
    assert torch.equal(network.head.weight, state["classifier.weight"])
    with pytest.raises(ArtifactError, match=r"does not fit the network EfficientNet. Entries .*missing"):
        backbone("timm:tf_efficientnet_lite1", 4, weights=path)
