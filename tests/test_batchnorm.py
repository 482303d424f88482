"""Statistics of batch-norm layers apart from the model."""

import copy
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import batch_norm_network
from torch import nn

from pl_personalize import ArtifactError, BatchNormStatistics, Importance
from pl_personalize.batchnorm import batchnorm_layers


def network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return batch_norm_network()


def values(statistics):
    return {name: value.tolist() for name, value in statistics.items()}


def state(model):
    return copy.deepcopy(model.state_dict())


def assert_same_state(model, before):
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Shared(nn.Module):
    """One layer under two names."""

    def __init__(self):
        super().__init__()
        self.a = nn.BatchNorm1d(2)
        self.b = self.a
        self.rest = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))


# of, apply


def test_of_is_a_copy_of_means_and_variances_by_their_names_in_the_state_dict():
    model = network()
    found = BatchNormStatistics.of(model)
    expected = {name: v for name, v in model.state_dict().items() if "running" in name}
    assert list(found) == list(expected)
    assert list(found) == [f"{n}.running_{what}" for n in (1, 4, 9) for what in ("mean", "var")]
    assert values(found) == values(expected)
    assert found.layers == ["1", "4", "9"]
    assert len(found) == 6
    assert (found.num_samples, found.fingerprint) == (0, None)
    assert repr(found) == "BatchNormStatistics(3 layers, num_samples=0)"
    model[1].running_mean.fill_(7)
    assert not (found["1.running_mean"] == 7).any()
    assert not any(v.requires_grad for v in found.values())


def test_a_layer_alone_has_no_prefix():
    layer = nn.BatchNorm1d(2)
    found = BatchNormStatistics.of(layer)
    assert values(found) == {"running_mean": [0.0, 0.0], "running_var": [1.0, 1.0]}
    assert found.layers == [""]
    BatchNormStatistics({"running_mean": torch.ones(2), "running_var": torch.zeros(2)}).apply(layer)
    assert layer.running_mean.tolist() == [1, 1]
    assert layer.running_var.tolist() == [0, 0]


def test_a_shared_layer_is_there_once():
    model = Shared()
    found = BatchNormStatistics.of(model)
    assert found.layers == ["a", "rest.1"]
    found["a.running_mean"].fill_(3)
    found.apply(model)
    assert model.b.running_mean.tolist() == [3, 3]


def test_statistics_may_be_applied_by_the_other_name_of_a_shared_layer():
    model = Shared()
    BatchNormStatistics({"b.running_mean": torch.ones(2), "b.running_var": torch.ones(2) * 2}).apply(model)
    assert model.a.running_var.tolist() == [2, 2]


def test_apply_copies_into_the_buffers_and_changes_nothing_else():
    source, model = network(1), network(2)
    buffers = {name: b for name, b in model.named_buffers()}
    versions = {name: p._version for name, p in model.named_parameters()}
    before = state(model)
    BatchNormStatistics.of(source).apply(model)

    running = {name: v for name, v in source.state_dict().items() if "running" in name}
    assert_same_state(model, before | running)
    assert all(b is buffers[name] for name, b in model.named_buffers())
    assert {name: p._version for name, p in model.named_parameters()} == versions
    # Not bound to the model: further changes of its statistics do not show in what was applied.
    statistics = BatchNormStatistics.of(source)
    statistics.apply(model)
    model[1].running_mean.zero_()
    assert statistics["1.running_mean"].abs().sum() > 0


def test_apply_to_a_model_of_another_type():
    model = network().double()
    statistics = BatchNormStatistics.of(network(1))
    statistics.apply(model)
    assert model[1].running_mean.dtype == torch.float64
    torch.testing.assert_close(model[1].running_mean, statistics["1.running_mean"].double(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"9.running_mean": torch.zeros(7), "9.running_var": torch.ones(7)}, r"'9\.running_mean'.*\(7,\).*\(8,\)"),
        ({"10.running_mean": torch.zeros(8), "10.running_var": torch.ones(8)}, r"'10\.running_mean'.*there is none"),
        ({"9.running_mean": torch.zeros(8), "9.running_var": torch.ones(9)}, r"'9\.running_var'.*\(9,\).*\(8,\)"),
    ],
    ids=["shape", "name", "shape of the variance"],
)
def test_apply_is_all_or_nothing(wrong, message):
    model = network()
    before = state(model)
    fitting = {name: v + 1 for name, v in BatchNormStatistics.of(model).items() if name.startswith(("1.", "4."))}
    with pytest.raises(ValueError, match=message):
        BatchNormStatistics(fitting | wrong).apply(model)
    assert_same_state(model, before)


def test_statistics_of_some_layers_may_be_applied():
    model = network()
    before = state(model)
    part = {"4.running_mean": torch.full((6,), 2.0), "4.running_var": torch.full((6,), 3.0)}
    BatchNormStatistics(part).apply(model)
    assert_same_state(model, before | part)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a.running_mean": torch.zeros(2)}, "no running_var of the layer 'a'"),
        ({"a.running_var": torch.zeros(2)}, "no running_mean of the layer 'a'"),
        ({"running_var": torch.zeros(2)}, "no running_mean of the layer ''"),
        ({"a.running_mean": torch.zeros(2), "a.running_var": torch.tensor([1.0, -0.1])}, "running_var.*'a'"),
        ({"a.running_mean": torch.zeros(2), "a.running_var": torch.tensor([1.0, float("inf")])}, "running_var.*'a'"),
        ({"a.running_mean": torch.tensor([float("nan")]), "a.running_var": torch.ones(1)}, "running_mean.*'a'"),
    ],
    ids=["no variance", "no mean", "no mean of the model", "negative", "infinite", "nan"],
)
def test_what_no_data_can_have_is_refused(tensors, message):
    with pytest.raises(ValueError, match=message):
        BatchNormStatistics(tensors)


def test_what_was_given_may_change_afterwards():
    tensors = {"a.running_mean": torch.zeros(1), "a.running_var": torch.ones(1)}
    statistics = BatchNormStatistics(tensors)
    tensors.clear()
    assert values(statistics) == {"a.running_mean": [0.0], "a.running_var": [1.0]}


# average


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=4), st.integers(0, 2**16))
def test_the_average_is_that_of_the_concatenated_mixture(shifts, seed):
    """Estimated with biased variances from sources of one size."""
    generator = torch.Generator().manual_seed(seed)
    data = [torch.randn(5, 3, dtype=torch.float64, generator=generator) + shift for shift in shifts]

    def statistics(x, num_samples=5):
        tensors = {"n.running_mean": x.mean(0), "n.running_var": x.var(0, unbiased=False)}
        return BatchNormStatistics(tensors, num_samples=num_samples, fingerprint="a")

    average, joined = BatchNormStatistics.average([statistics(x) for x in data]), statistics(torch.cat(data))
    for name in ("n.running_mean", "n.running_var"):
        torch.testing.assert_close(average[name], joined[name], rtol=1e-10, atol=1e-12)
    assert average.num_samples == 5 * len(shifts)
    assert average.fingerprint is None


def test_the_average_of_two_models():
    a, b = BatchNormStatistics.of(network(1)), BatchNormStatistics.of(network(2))
    average = BatchNormStatistics.average([a, b])
    assert list(average) == list(a)
    for layer in a.layers:
        mean = (a[f"{layer}.running_mean"] + b[f"{layer}.running_mean"]) / 2
        second = sum((s[f"{layer}.running_var"] + s[f"{layer}.running_mean"] ** 2) / 2 for s in (a, b))
        torch.testing.assert_close(average[f"{layer}.running_mean"], mean)
        torch.testing.assert_close(average[f"{layer}.running_var"], second - mean**2)
        assert (average[f"{layer}.running_var"] >= (a[f"{layer}.running_var"] + b[f"{layer}.running_var"]) / 2).all()


def test_plain_mappings_may_be_averaged_in_any_order_of_names():
    a = {"a.running_mean": torch.zeros(1), "a.running_var": torch.ones(1)}
    b = {"a.running_var": torch.ones(1) * 3, "a.running_mean": torch.ones(1) * 2}
    assert values(BatchNormStatistics.average([a, b])) == {"a.running_mean": [1.0], "a.running_var": [3.0]}


@pytest.mark.parametrize("names", [[], ["a", "b"]], ids=["none", "other layers"])
def test_what_cannot_be_averaged_is_refused(names):
    parts = [{f"{n}.running_mean": torch.zeros(1), f"{n}.running_var": torch.ones(1)} for n in names]
    with pytest.raises(ValueError, match="at least one set"):
        BatchNormStatistics.average(parts)


# Files


def test_what_was_saved_is_loaded_bit_for_bit(tmp_path):
    found = BatchNormStatistics(dict(BatchNormStatistics.of(network(3))), num_samples=41, fingerprint="abc")
    path = tmp_path / "folder" / "user.safetensors"
    found.save(path)
    loaded = BatchNormStatistics.load(path)
    assert list(loaded) == list(found)
    assert values(loaded) == values(found)
    assert {v.dtype for v in loaded.values()} == {torch.float32}
    assert (loaded.num_samples, loaded.fingerprint) == (41, "abc")
    assert [p.name for p in path.parent.iterdir()] == ["user.safetensors"]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ArtifactError, match=r"none\.safetensors does not exist"):
        BatchNormStatistics.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize("damage", ["truncated", "changed", "empty"])
def test_a_damaged_file_is_refused(tmp_path, damage):
    path = tmp_path / "user.safetensors"
    BatchNormStatistics.of(network()).save(path)
    data = bytearray(path.read_bytes())
    if damage == "changed":
        data[-1] ^= 1
    path.write_bytes({"truncated": data[: len(data) // 2], "changed": data, "empty": b""}[damage])
    with pytest.raises(ArtifactError, match=r"user\.safetensors"):
        BatchNormStatistics.load(path)


def test_a_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "mas.safetensors"
    Importance({"w": torch.ones(2)}, kind="mas", num_samples=1).save(path)
    with pytest.raises(ArtifactError, match="expected 'batchnorm'"):
        BatchNormStatistics.load(path)


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "user.safetensors"
    BatchNormStatistics.of(network(1)).save(path)
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        BatchNormStatistics.of(network(2)).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["user.safetensors"]


# Which layers


def test_all_kinds_of_layers_are_found_and_only_these():
    class Own(nn.BatchNorm2d):
        pass

    model = nn.ModuleDict(
        {
            "one": nn.BatchNorm1d(2), "two": nn.BatchNorm2d(2), "three": nn.BatchNorm3d(2),
            "sync": nn.SyncBatchNorm(2), "own": Own(2), "instance": nn.InstanceNorm2d(2, track_running_stats=True),
            "group": nn.GroupNorm(1, 2), "layer": nn.LayerNorm(2), "frozen": nn.BatchNorm1d(2, affine=False),
        }
    )  # fmt: skip
    assert list(batchnorm_layers(model)) == ["one", "two", "three", "sync", "own", "frozen"]
    assert all(layer is model[name] for name, layer in batchnorm_layers(model).items())


def test_layers_that_are_made_to_be_fixed_are_none():
    torchvision = pytest.importorskip("torchvision")
    assert batchnorm_layers(nn.Sequential(torchvision.ops.FrozenBatchNorm2d(2))) == {}


def test_layers_below_a_module_have_names_relative_to_it():
    model = Shared()
    assert list(batchnorm_layers(model, "rest")) == ["1"]
    assert list(batchnorm_layers(model, "rest.1")) == [""]
    assert batchnorm_layers(model, "rest.1")[""] is model.rest[1]


@pytest.mark.parametrize("name", ["feature", "rest.7"])
def test_a_module_that_does_not_exist_is_named(name):
    with pytest.raises(ValueError, match=rf"no module '{name}'; it has a, rest\."):
        batchnorm_layers(Shared(), name)


@pytest.mark.parametrize("lazy", [False, True])
def test_a_layer_without_running_statistics_is_named(lazy):
    layer = nn.LazyBatchNorm1d(track_running_stats=False) if lazy else nn.BatchNorm1d(2, track_running_stats=False)
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Sequential(layer))
    for refuses in (batchnorm_layers, BatchNormStatistics.of):
        with pytest.raises(ValueError, match=r"'1\.0' keeps no running statistics \(track_running_stats=False\)"):
            refuses(model)
    assert list(batchnorm_layers(model, "0")) == [""]


def test_a_lazy_layer_is_refused_until_it_has_seen_its_first_input():
    model = nn.Sequential(nn.LazyBatchNorm1d())
    with pytest.raises(ValueError, match="'0' is lazy"):
        batchnorm_layers(model)
    model(torch.randn(3, 2))
    assert BatchNormStatistics.of(model)["0.running_mean"].shape == (2,)


def test_a_model_without_batch_norm_has_no_statistics(tmp_path):
    found = BatchNormStatistics.of(nn.Linear(2, 2))
    assert (dict(found), found.layers) == ({}, [])
    found.apply(nn.Linear(2, 2))
    found.save(tmp_path / "none.safetensors")
    assert dict(BatchNormStatistics.load(tmp_path / "none.safetensors")) == {}


def test_statistics_are_a_mapping():
    found = BatchNormStatistics.of(nn.BatchNorm1d(1))
    assert "running_mean" in found
    assert found.get("nothing") is None
    with pytest.raises(KeyError):
        found["nothing"]
    assert SimpleNamespace(**found).running_var.item() == 1.0
