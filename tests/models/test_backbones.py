"""Networks of torchvision and timm by name, taken apart into body and head."""

import copy
import warnings
from collections import OrderedDict
from contextlib import contextmanager

import pytest
import torch
from lightning.pytorch import Trainer
from safetensors.torch import load_file, save_file
from torch import nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset
from torchvision import models as torchvision_models

from pl_personalize import MergeModule, TaskLearner, adapt_batchnorm, estimate_importance, merge
from pl_personalize.artifacts import save_tensors
from pl_personalize.models import (
    ConvHead,
    MultiHeadNetwork,
    backbone,
    backbone_names,
    check_backbone,
    mlp,
    split,
)
from pl_personalize.models.splitting import possible_heads
from pl_personalize.modules.merge_module import EXPERT_KIND

SLOW = pytest.mark.slow
# The smallest of each family; its head in torchvision, the side of an image that it takes, and options.
FAMILIES = [
    pytest.param("alexnet", "classifier.6", 64, {}),
    pytest.param("vgg11", "classifier.6", 32, {}),
    pytest.param("vgg11_bn", "classifier.6", 32, {}),
    pytest.param("squeezenet1_0", "classifier.1", 64, {}),
    pytest.param("squeezenet1_1", "classifier.1", 64, {}),
    pytest.param("resnet18", "fc", 32, {}),
    pytest.param("resnext50_32x4d", "fc", 32, {}),
    pytest.param("mobilenet_v2", "classifier.1", 32, {}),
    pytest.param("mobilenet_v3_small", "classifier.3", 32, {}),
    pytest.param("efficientnet_b0", "classifier.1", 32, {}),
    pytest.param("efficientnet_v2_s", "classifier.1", 32, {}),
    pytest.param("densenet121", "classifier", 32, {}),
    pytest.param("convnext_tiny", "classifier.2", 32, {}),
    pytest.param("vit_b_32", "heads.head", 32, {"image_size": 32}),
    pytest.param("swin_t", "head", 32, {}),
    pytest.param("swin_v2_t", "head", 32, {}),
    pytest.param("maxvit_t", "classifier.5", 224, {}, marks=SLOW),
    pytest.param("regnet_x_400mf", "fc", 32, {}),
    pytest.param("regnet_y_400mf", "fc", 32, {}),
    pytest.param("shufflenet_v2_x0_5", "fc", 32, {}),
    pytest.param("mnasnet0_5", "classifier.1", 32, {}),
    pytest.param("googlenet", "fc", 32, {}),
    pytest.param("inception_v3", "fc", 75, {}),
]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def with_random_statistics(network, seed=0):
    """Batch norm that has seen something: at first all layers have the same."""
    generator = seeded(seed)
    for name, buffer in network.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(std=0.1, generator=generator)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2, generator=generator)
    return network


@contextmanager
def cheaper(fill):
    """Most of the time of a large network goes into drawing normal numbers, and into its widest linear layers."""
    make, narrow = nn.Linear.__init__, {4096: 64, 3072: 64}

    def make_narrow(self, in_features, out_features, *args, **kwargs):
        make(self, narrow.get(in_features, in_features), narrow.get(out_features, out_features), *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(nn.Linear, "__init__", make_narrow)
        for name in ("normal_", "uniform_", "trunc_normal_", "kaiming_normal_", "kaiming_uniform_", "xavier_uniform_"):
            patch.setattr(nn.init, name, lambda tensor, *args, **kwargs: fill(tensor))
        yield


def uniform(tensor):
    bound = (3 / max(tensor[0].numel(), 3)) ** 0.5
    return tensor.uniform_(-bound, bound)


def original_of(name, head, network, **options):
    """torchvision's network with the same parameters; that they fit is half of the test."""
    with cheaper(lambda tensor: tensor):
        model = torchvision_models.get_model(name, num_classes=network.num_classes, **options)
    entries = OrderedDict(network.body.state_dict())
    entries.update({f"{head}.{name}": value for name, value in network.head.state_dict().items()})
    entries._metadata = model.state_dict()._metadata
    model.load_state_dict(entries)
    if name.startswith("squeezenet"):
        model.classifier[2] = nn.Identity()  # the ReLU after the head
    return model


@pytest.mark.parametrize(("name", "head", "side", "options"), FAMILIES)
def test_a_network_of_torchvision_is_itself(name, head, side, options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        with cheaper(uniform):
            network = with_random_statistics(backbone(name, 3, **options))
        auxiliary = {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
        original = original_of(name, head, network, **options, **auxiliary)
        x = torch.randn(2 if side < 224 else 1, 3, side, side)

    assert network.training
    assert {name for name, _ in original.named_parameters()} == (
        {name for name, _ in network.body.named_parameters()}
        | {f"{head}.{name}" for name, _ in network.head.named_parameters()}
    )
    assert not {name for name in network.body.state_dict() if name.startswith(f"{head}.")}

    network.eval(), original.eval()
    with torch.no_grad():
        logits = network(x)
        assert logits.shape == (len(x), 3)
        assert float(logits.std()) > 0
        assert torch.equal(logits, original(x))
        assert torch.equal(logits, network.head(network.body(x)))

    network.train()(x).square().sum().backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in network.parameters())


def test_every_family_of_torchvision_is_tested():
    """Networks of one family are made by one module of torchvision, from one class."""

    def families(names):
        return {torchvision_models.get_model_builder(name).__module__ for name in names}

    every = families(torchvision_models.list_models(module=torchvision_models))
    assert families(family.values[0] for family in FAMILIES) == every


@pytest.mark.parametrize(
    "name", ["efficientnet_v2_l", "convnext_large", "vit_h_14", "swin_v2_b", "densenet161", "wide_resnet101_2", "vgg19"]
)
def test_large_networks_of_torchvision_end_with_their_heads(name):
    """The last linear layer in the order of registration, without building what takes gigabytes."""
    with torch.device("meta"):
        model = torchvision_models.get_model(name, num_classes=7)
    assert model.get_submodule(possible_heads(model)[-1]).weight.shape[0] == 7


SMALL = ["squeezenet1_1", "shufflenet_v2_x0_5", "mnasnet0_5"]
X = torch.randn(4, 3, 32, 32, generator=seeded())


def small(name, num_classes=3, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return with_random_statistics(backbone(name, num_classes), seed).eval()


@pytest.mark.parametrize("name", SMALL)
def test_a_new_head_starts_as_the_protocol_says(name):
    network = small(name)
    before = {name: p.clone() for name, p in network.body.named_parameters()}
    features = network.head.weight.shape[1]
    torch.manual_seed(3)
    head = network.new_head(5)
    assert network.num_classes == 5
    assert network(X).shape == (4, 5)
    assert all(torch.equal(p, before[name]) for name, p in network.body.named_parameters())
    if isinstance(head, ConvHead):
        assert head.weight.shape == (5, 512, 1, 1)
        assert float(head.weight.detach().std()) == pytest.approx(0.01, rel=0.1)
        assert float(head.bias.detach().abs().max()) == 0
    else:
        torch.manual_seed(3)
        assert torch.equal(head.weight, nn.Linear(features, 5).weight)


def test_torchvisions_own_initialisation_of_a_head_is_replaced():
    """A vision transformer's starts at zero there."""
    network = backbone("convnext_tiny", 3)
    assert float(network.head.weight.detach().std()) == pytest.approx(1 / (3 * 768) ** 0.5, rel=0.1)


def test_the_head_of_squeezenet_is_its_convolution_and_the_mean():
    network = small("squeezenet1_1")
    features, head = network.body(X), network.head
    assert features.dim() == 4
    by_hand = torch.einsum("nchw,kc->nkhw", features, head.weight[:, :, 0, 0]) + head.bias[:, None, None]
    torch.testing.assert_close(network(X), by_hand.mean((2, 3)))
    torch.testing.assert_close(head(features.mean((2, 3))), by_hand.mean((2, 3)))
    assert float(network(X).detach().min()) < 0  # no ReLU


@pytest.mark.parametrize("name", SMALL)
def test_other_parameters_for_one_call(name):
    network, other = small(name), small(name, seed=1)
    with torch.no_grad():
        wanted = other(X)
        assert torch.equal(functional_call(network, other.state_dict(), (X,)), wanted)
        assert not torch.equal(network(X), wanted)


@pytest.mark.parametrize("name", SMALL)
def test_copies_and_files(name, tmp_path):
    network = small(name)
    twin = copy.deepcopy(network)
    with torch.no_grad():
        wanted = network(X)
        assert torch.equal(twin(X), wanted)
        for parameter in network.parameters():
            parameter.add_(1)
        assert torch.equal(twin(X), wanted)

        save_file(twin.state_dict(), tmp_path / "network.safetensors")  # refuses what is there twice
        network.load_state_dict(load_file(tmp_path / "network.safetensors"), strict=True)
        assert torch.equal(network(X), wanted)
        other = small(name, seed=5)
        other.body.load_state_dict(dict(twin.body.state_dict()))
        assert torch.equal(other.body(X), twin.body(X))


def test_what_is_frozen_stays_frozen():
    network = small("shufflenet_v2_x0_5")
    network.body.conv1.requires_grad_(False)
    network.body.stage2.eval()
    network.new_head(2)
    frozen = [name for name, p in network.named_parameters() if not p.requires_grad]
    assert frozen == ["body.conv1.0.weight", "body.conv1.1.weight", "body.conv1.1.bias"]
    before = network.body.conv1[0].weight.clone()
    data = DataLoader(TensorDataset(X, torch.tensor([0, 1, 0, 1])), batch_size=4)
    trainer = Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, accelerator="cpu", enable_progress_bar=False
    )
    trainer.fit(TaskLearner(network, lr=0.1), data, data)
    assert torch.equal(network.body.conv1[0].weight, before)


def test_importances_of_a_convolutional_networks_body_are_the_originals():
    network = small("squeezenet1_1")
    original = original_of("squeezenet1_1", "classifier.1", network)
    options = {"kind": "mas"}
    found = estimate_importance(TaskLearner(network), [X[:3]], module="network.body", **options)
    wanted = estimate_importance(original, [X[:3]], exclude=["classifier"], **options)
    assert list(found) == list(wanted) == [name for name, _ in network.body.named_parameters()]
    assert set(found.routes.values()) == {"closed form"}
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=0)
        assert float(found[name].max()) > 0


def test_importances_of_a_transformers_body_are_the_originals():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        original = torchvision_models.VisionTransformer(16, 8, 2, 2, 16, 32, num_classes=3)
        nn.init.normal_(original.heads.head.weight)
    x = torch.randn(3, 3, 16, 16, generator=seeded(1))
    network = split(original, "heads.head", x)
    found = estimate_importance(network, [x], "fisher", draws="all", module="body")
    wanted = estimate_importance(original, [x], "fisher", draws="all", exclude=["heads"])
    assert list(found) == list(wanted)
    assert found.routes == wanted.routes
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=0)


def test_batch_norm_is_adapted_as_in_the_original():
    network = small("shufflenet_v2_x0_5")
    original = original_of("shufflenet_v2_x0_5", "fc", network).eval()
    adapt_batchnorm(network, [X], module="body")
    adapt_batchnorm(original, [X])
    buffers = dict(original.named_buffers())
    assert all(torch.equal(value, buffers[name]) for name, value in network.body.named_buffers())


def test_experts_of_squeezenet_merge(tmp_path):
    experts = [small("squeezenet1_1", classes, seed=classes) for classes in (2, 3)]
    paths = [
        save_tensors(tmp_path / f"{k}.safetensors", one.state_dict(), kind=EXPERT_KIND) for k, one in enumerate(experts)
    ]
    importances = [estimate_importance(one, [X], "mas", module="body") for one in experts]
    module = MergeModule(small("squeezenet1_1", 2), paths, importances)

    merged = MultiHeadNetwork(small("squeezenet1_1").body, [one.head for one in copy.deepcopy(experts)]).eval()
    merged.load_state_dict(module.export(), strict=True)
    body = merge([one.body.state_dict() for one in experts], importances)
    for task, expert in enumerate(experts):
        by_hand = copy.deepcopy(expert)
        by_hand.body.load_state_dict(body)
        with torch.no_grad():
            assert torch.equal(merged(X, task), by_hand(X))

    labels = [torch.zeros(4, dtype=torch.long), merged(X, 1).argmax(1)]
    loaders = [DataLoader(TensorDataset(X, y), batch_size=2) for y in labels]
    trainer = Trainer(logger=False, accelerator="cpu", enable_progress_bar=False)
    trainer.test(module, loaders, verbose=False)
    assert float(module.matrix[1, 1]) == 1


def test_auxiliary_classifiers_are_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torchvision's about the initialisation
        network = backbone("googlenet", 2)
    assert not [name for name, _ in network.named_modules() if "aux" in name]
    with pytest.raises(ValueError, match="googlenet has two outputs with aux_logits=True"):
        backbone("googlenet", 2, aux_logits=True)


def test_options_reach_torchvision():
    assert backbone("squeezenet1_1", 2, dropout=0.25).body.classifier[0].p == 0.25


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet81", r"Unknown network 'resnet81'; did you mean .*resnet18"),
        ("ResNet-18", "did you mean .*resnet18"),
        ("squeezenet", "did you mean squeezenet1_"),
        ("cnn-bn", "did you mean cnn_bn"),
        ("zzz", r"Unknown network 'zzz'. Known: mlp, cnn_bn, torchvision's"),
    ],
)
def test_a_name_that_is_not_known(name, message):
    with pytest.raises(ValueError, match=message):
        check_backbone(name, ["mlp", "cnn_bn"])


def test_names():
    names = backbone_names()
    assert {"alexnet", "vgg11_bn", "squeezenet1_0", "vit_b_16"} <= set(names)
    assert not {"fasterrcnn_resnet50_fpn", "raft_small", "r3d_18", "quantized_resnet18"} & set(names)
    for name in (*names[:3], "mlp"):
        check_backbone(name, ["mlp"])


def test_a_network_has_classes():
    with pytest.raises(ValueError, match="num_classes must be at least 1; got 0"):
        backbone("alexnet", 0)
    assert mlp((2,), num_classes=4).num_classes == 4


# timm


@pytest.fixture
def timm():
    return pytest.importorskip("timm", reason="timm is not installed")


@pytest.mark.parametrize(
    ("name", "side", "options"),
    [("resnet10t", 64, {}), ("vit_tiny_patch16_224", 32, {"img_size": 32}), ("tf_efficientnet_lite0", 64, {})],
)
def test_a_network_of_timm_is_itself(timm, name, side, options):
    torch.manual_seed(0)
    network = with_random_statistics(backbone(f"timm:{name}", 3, **options)).eval()
    original = timm.create_model(name, num_classes=3, **options).eval()
    (head,) = [name for name, layer in original.named_modules() if layer is original.get_classifier()]
    head_entries = {f"{head}.{name}": value for name, value in network.head.state_dict().items()}
    original.load_state_dict({**network.body.state_dict(), **head_entries})
    x = torch.randn(2, 3, side, side)
    with torch.no_grad():
        assert torch.equal(network(x), original(x))
        assert float(network(x).std()) > 0
    assert float(network.new_head(1000).weight.detach().std()) == pytest.approx(
        (3 * network.head.in_features) ** -0.5, rel=0.1
    )


def test_a_convolution_of_timm_is_a_head(timm):
    network = backbone("timm:resnetv2_50x1_bit", 3).eval()
    assert isinstance(network.head, ConvHead)
    assert network(torch.randn(2, 3, 64, 64)).shape == (2, 3)


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "ghostnet_050", "lcnet_035", "hardcorenas_a"])
def test_linear_layers_of_timms_own_class_are_heads(timm, name):
    network = backbone(f"timm:{name}", 3).eval()
    assert type(network.head) is nn.Linear
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features = network.body(images)
        assert features.shape == (2, network.head.in_features)
        assert torch.equal(network(images), network.head(features))
    assert not any(key.startswith(("classifier", "body.classifier")) for key, _ in network.named_parameters())


def test_a_head_of_timm_that_computes_something_else_is_named(timm, monkeypatch):
    monkeypatch.setattr(timm.layers.Linear, "forward", lambda self, x: 2 * nn.Linear.forward(self, x))
    with pytest.raises(
        ValueError, match=r"lcnet_035 is not a linear .* but a Linear \(timm\..*\), whose forward differs"
    ):
        backbone("timm:lcnet_035", 3)


def test_what_timm_has_that_does_not_fit(timm):
    with pytest.raises(ValueError, match="head of timm's deit_tiny_distilled_patch16_224 is not a linear layer"):
        backbone("timm:deit_tiny_distilled_patch16_224", 3)
    with pytest.raises(ValueError, match="Unknown network 'timm:resnet81'; did you mean timm:resnet"):
        backbone("timm:resnet81", 3)
    with pytest.raises(
        ValueError, match="Unknown network 'tf_efficientnet_lite0'; did you mean timm:tf_efficientnet_lite0"
    ):
        backbone("tf_efficientnet_lite0", 3)
    with pytest.raises(ValueError, match="weights='IMAGENET1K_V1' is not a file; the name of timm's own weights"):
        backbone("timm:resnet10t", 3, weights="IMAGENET1K_V1")
    assert "timm:resnet18" in backbone_names()


def test_timm_is_optional(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(ModuleNotFoundError, match="pip install timm"):
        backbone("timm:resnet18", 3)
