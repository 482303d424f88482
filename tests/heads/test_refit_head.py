"""Heads refitted on the server: what is found, which networks, and what is refused."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from head_cases import CLASSES, FEATURES, SERVER, accuracy, changed, data, entries, loader, network
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import nn

from pl_personalize import ArtifactError, HeadReference, refit_head
from pl_personalize.heads import refit
from pl_personalize.models import ConvHead, TaskNetwork, backbone


def test_the_head_is_as_good_as_scikit_learns_discriminant():
    model = network()
    before = entries(model)
    refit_head(model, *SERVER)
    assert changed(model, before) == {"head.weight", "head.bias"}
    (train, labels), test = data(seed=1), data(count=3000, seed=3)
    with torch.no_grad():
        fitted = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.01).fit(
            model.body(train).numpy(), labels.numpy()
        )
        expected = (fitted.predict(model.body(test[0]).numpy()) == test[1].numpy()).mean()
    assert accuracy(network(), test) < 0.5 < 0.8 < expected
    assert accuracy(model, test) == pytest.approx(expected, abs=0.01)


def test_the_logits_are_calibrated():
    model = network()
    refit_head(model, *SERVER)
    inputs, labels = data(count=4000, seed=3)
    with torch.no_grad():
        confidence, predicted = model(inputs).softmax(1).max(1)
    assert float(confidence.mean()) == pytest.approx(float((predicted == labels).float().mean()), abs=0.02)


def test_a_trained_head_that_is_better_is_kept():
    model = network()
    inputs, labels = data(count=20_000, seed=5)
    optimizer = torch.optim.Adam(model.head.parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    trained = accuracy(model, data(count=4000, seed=3))
    few = data(count=25, seed=1)
    refit_head(model, loader(few), SERVER[1])
    assert accuracy(model, data(count=4000, seed=3)) >= trained - 0.01


def test_batch_sizes_do_not_matter():
    references, heads = [], []
    for size in (1, 37, 600):
        model = network()
        references.append(refit_head(model, loader(data(seed=1), size), loader(data(count=400, seed=2), size)))
        heads.append(model.head.weight.detach())
    for head in heads[1:]:
        torch.testing.assert_close(head, heads[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(references[1].class_means, references[0].class_means)


def together(*calls):
    """What calls with an argument ``gather`` return that run together, as processes do."""
    rows, barrier = [None] * len(calls), threading.Barrier(len(calls))

    def run(rank, call):
        def gather(own):
            rows[rank] = own
            barrier.wait()
            found = torch.cat(rows)
            barrier.wait()
            return found

        return call(gather)

    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(run, *item) for item in enumerate(calls)]]


@pytest.mark.parametrize("cameras", [0, 4])
def test_processes_together_find_what_one_finds(cameras):
    def model():
        return nn.Sequential(nn.Flatten(), nn.Linear(768, 20), nn.Tanh(), nn.Linear(20, 2))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = model().state_dict()
    models = [model() for _ in range(3)]
    for one in models:
        one.load_state_dict(state)
    train, val = images(120, 0), images(60, 1)
    options = {"cameras": cameras, "camera_images": 100}
    expected = refit_head(models[2], loader(train), loader(val), **options)

    def part(rank):
        rows = slice(40) if rank == 0 else slice(40, None)
        halves = [loader(tuple(t[rows] for t in split)) for split in (train, val)]
        return lambda gather: refit_head(models[rank], *halves, gather=gather, **options)

    references = together(part(0), part(1))
    for name, value in references[0].tensors.items():
        assert torch.equal(value, references[1].tensors[name]), name
        if "fingerprint" not in name:
            torch.testing.assert_close(value, expected.tensors[name], rtol=1e-3, atol=1e-3)
    assert torch.equal(models[0][3].weight, models[1][3].weight)
    torch.testing.assert_close(models[0][3].weight, models[2][3].weight, rtol=1e-3, atol=1e-3)


def test_what_does_not_fit_into_memory_is_a_part_of_all_samples(monkeypatch):
    inputs, labels = data(seed=1)
    order = labels.argsort()  # the first samples are of one class
    whole, part = network(), network()
    refit_head(whole, *SERVER)
    monkeypatch.setattr(refit, "_KEPT", 120 * FEATURES)
    refit_head(part, loader((inputs[order], labels[order]), 200), SERVER[1])
    torch.testing.assert_close(part.head.bias, whole.head.bias, rtol=0, atol=0.6)
    test = data(count=2000, seed=3)
    assert accuracy(part, test) == pytest.approx(accuracy(whole, test), abs=0.01)


def test_what_is_known_of_the_server():
    reference = refit_head(network(), *SERVER)
    with torch.no_grad():
        features = [network().body(split.dataset.tensors[0]).double() for split in SERVER]
    everything, labels = torch.cat(features), torch.cat([split.dataset.tensors[1] for split in SERVER])
    means = torch.stack([everything[labels == k].mean(0) for k in range(CLASSES)])
    torch.testing.assert_close(reference.class_means.double(), means, rtol=1e-4, atol=1e-5)
    weights = (labels.bincount() / len(labels) / SERVER[1].dataset.tensors[1].bincount())[SERVER[1].dataset.tensors[1]]
    mean = weights.double() @ features[1]
    torch.testing.assert_close(reference.mean.double(), mean, rtol=1e-4, atol=1e-5)
    variance = weights.double() @ (features[1] - mean).square()
    torch.testing.assert_close(reference.std.double(), variance.sqrt(), rtol=1e-4, atol=1e-5)
    assert float(reference.class_priors.sum()) == pytest.approx(1)
    assert repr(reference) == f"HeadReference({CLASSES} classes, {FEATURES} features, num_samples=395)"


@pytest.mark.parametrize("absent", [-1, 3])
def test_moments_are_those_under_the_class_priors_whatever_the_validation_samples_are(absent):
    inputs, labels = data([0.6, 0.1, 0.1, 0.1, 0.1], count=6000, seed=2)
    chosen = labels != absent
    reference = refit_head(network(), SERVER[0], loader((inputs[chosen], labels[chosen])))
    features = network().body(data(count=20_000, seed=3)[0]).detach()
    weights = reference.class_priors[data(count=20_000, seed=3)[1]]
    mean = weights @ features / weights.sum()
    torch.testing.assert_close(reference.mean, mean, rtol=0, atol=0.03)
    variance = weights @ (features - mean).square() / weights.sum()
    torch.testing.assert_close(reference.std, variance.sqrt(), rtol=0.05, atol=0)


def test_samples_that_count_less_are_fewer():
    assert refit_head(network(), SERVER[0], loader(data(count=40, seed=2))).num_samples < 40


def test_a_file_holds_the_reference_and_little_more(tmp_path):
    reference = refit_head(network(), *SERVER)
    path = tmp_path / "home.safetensors"
    reference.save(path)
    loaded = HeadReference.load(path)
    assert loaded.fingerprint == reference.fingerprint
    for name, value in reference.tensors.items():
        assert torch.equal(value, loaded.tensors[name])
    assert reference.num_bytes < path.stat().st_size < reference.num_bytes + 4000
    with pytest.raises(ValueError, match=r"camera_scale.* missing"):
        HeadReference.from_tensors({n: t for n, t in reference.tensors.items() if n != "camera_scale"})
    (tmp_path / "other.safetensors").write_bytes(b"nothing")
    with pytest.raises(ArtifactError):
        HeadReference.load(tmp_path / "other.safetensors")


# Networks


def images(count, seed, size=16):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    return torch.rand(count, 3, size, size, generator=generator) + 0.5 * labels[:, None, None, None], labels


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return self.last(self.conv(x).relu()).mean((2, 3))


@pytest.mark.parametrize(
    ("make", "name", "size"),
    [
        (lambda: backbone("resnet18", 2), "head", 32),
        (lambda: backbone("timm:vit_tiny_patch16_224", 2, img_size=32, depth=2), "head", 32),
        (ConvNet, "last", 16),
        (lambda: TaskNetwork(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), ConvHead(8, 2)), "head", 16),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(768, 64), nn.ReLU(), nn.Linear(64, 2)), "3", 16),
    ],
)
def test_any_network_that_is_linear_in_its_features(make, name, size):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make()
    before = entries(model)
    refit_head(model, loader(images(60, 0, size)), loader(images(40, 1, size)))
    assert changed(model, before) == {f"{name}.weight", f"{name}.bias"}
    assert accuracy(model.eval(), images(40, 2, size)) > 0.9


def test_modes_and_random_numbers_are_left_alone():
    model = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, CLASSES))
    before, state = entries(model), torch.get_rng_state()
    refit_head(model, *SERVER)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert model[2].training
    assert changed(model, before) == {"3.weight", "3.bias"}


class AfterHead(nn.Module):
    def __init__(self, after):
        super().__init__()
        self.body, self.last, self.after = nn.Linear(12, 8), nn.Linear(8, CLASSES), after

    def forward(self, x):
        return self.after(self.last(self.body(x)))


def test_cameras_need_images_of_one_size():
    val = [images(8, 1, 16), images(8, 2, 20)]
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    with pytest.raises(ValueError, match=r"images of one size; got \(3, 16, 16\) and \(3, 20, 20\)"):
        refit_head(model, loader(images(40, 0)), val, cameras=2)
    refit_head(model, loader(images(40, 0)), val)


def test_an_operation_after_the_head_is_found_in_any_batch():
    model = AfterHead(nn.Hardtanh(-30, 30))
    inputs, labels = data(seed=1)
    inputs[-1] *= 1e4
    with pytest.raises(ValueError, match="not linear"):
        refit_head(model, loader((inputs, labels)), SERVER[1])


def no_bias():
    return nn.Sequential(nn.Linear(12, 8), nn.Linear(8, CLASSES, bias=False))


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (AfterHead(nn.Softmax(1)), {}, "AfterHead are not linear in the input of its last layer 'last'"),
        (AfterHead(nn.ReLU()), {}, "not linear"),
        (no_bias(), {}, "'1' has no bias"),
        (nn.Sequential(nn.Linear(12, 8), nn.ReLU()), {}, "not linear in the input of its last layer '0'"),
        (nn.Flatten(), {}, "no linear layer or 1×1 convolution"),
        (network(), {"head": "body.1"}, "'body.1' is a Tanh"),
        (network(), {"head": "body.0"}, "not linear in the input of its last layer 'body.0'"),
    ],
)
def test_other_networks_are_refused_by_name(model, options, message):
    with pytest.raises(ValueError, match=message):
        refit_head(model, *SERVER, **options)


def with_labels(change):
    inputs, labels = data(seed=1)
    return loader((inputs, change(labels)))


@pytest.mark.parametrize(
    ("train", "val", "message"),
    [
        ([], SERVER[1], "no training samples"),
        (SERVER[0], [], "no validation samples"),
        (with_labels(lambda y: y.clamp(max=3)), SERVER[1], "no training samples of the classes 4 of the head's 5"),
        (with_labels(lambda y: y + 1), SERVER[1], "the classes 0 to 4; labels go from 1 to 5"),
        (with_labels(lambda y: y.float()), SERVER[1], "must be class indices"),
        (loader((data()[0],)), SERVER[1], "label"),
        (loader((data(count=5)[0], torch.arange(5))), SERVER[1], "pass several training samples of each class"),
        (loader((torch.zeros(50, 12), torch.arange(50) % 5)), SERVER[1], "constant within every class"),
        (loader((data()[0].fill_(float("nan")), data()[1])), SERVER[1], "NaN or infinite"),
    ],
)
def test_data_that_cannot_be_used_change_nothing(train, val, message):
    model = network()
    before = entries(model)
    with pytest.raises(ValueError, match=message):
        refit_head(model, train, val)
    assert changed(model, before) == set()
