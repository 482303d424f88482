"""State dicts in files of several formats, beside objects of any class: read, and nothing run."""

import argparse
import collections
import enum
import functools
import os
import pathlib
import pickle
import sys
import types
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from pl_personalize import ArtifactError, Importance
from pl_personalize.artifacts import TensorFile, open_state_dict, read_state_dict, save_tensors


class Colour(enum.Enum):
    RED = 1


class AttributeDict(dict):
    __getattr__ = dict.__getitem__


class Names(list):
    pass


class Slots:
    __slots__ = ("a", "b")

    def __init__(self):
        self.a, self.b = 1, [2]


class Reduced:
    """An object whose pickle calls what it is told to."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def _state():
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    state = model.state_dict()
    for name in ("0.weight", "0.bias"):
        state[name].normal_(generator=generator)
    return state


def _assert_read(path, state):
    found = read_state_dict(path)
    assert list(found) == list(state)
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in state.items())
    return found


HYPERPARAMETERS = {
    "numpy number": np.float64(0.5),
    "numpy array": np.arange(3),
    "path": pathlib.Path("data") / "images",
    "partial": functools.partial(torch.optim.SGD, lr=0.1),
    "enum": Colour.RED,
    "enum as a key": {Colour.RED: 1},
    "set": {Colour.RED},
    "namespace": argparse.Namespace(lr=0.1, layers=[1, 2]),
    "module": nn.Sequential(nn.Linear(2, 2), nn.GELU()),
    "dict of its own": AttributeDict(lr=0.1, inner=AttributeDict(a=np.float32(1.0))),
    "default dict": collections.defaultdict(list, {"a": [1]}),
    "list of its own": Names(["a", "b"]),
    "deque": collections.deque([1, 2], maxlen=3),
    "slots": Slots(),
    "class": Slots,
    "function": torch.nn.functional.relu,
    "random generator": np.random.default_rng(0),
    "plain": {"lr": 0.1, "layers": [1, 2], "name": "ä", "nothing": None},
}


@pytest.mark.parametrize("what", HYPERPARAMETERS)
@pytest.mark.parametrize("imported", [True, False])
def test_hyperparameters_of_any_class_are_passed_over(tmp_path, monkeypatch, what, imported):
    state, path = _state(), tmp_path / "best.ckpt"
    torch.save({"epoch": 3, "hyper_parameters": {what: HYPERPARAMETERS[what]}, "state_dict": state}, path)
    if not imported:  # as in a process that does not have these classes
        monkeypatch.delitem(sys.modules, __name__, raising=False)

    found = _assert_read(path, state)

    assert found._metadata == state._metadata


def test_a_class_that_does_not_exist_any_more(tmp_path):
    module = types.ModuleType("gone_tomorrow")
    exec("class Settings:\n    pass\nclass Box(dict):\n    pass", vars(module))
    sys.modules["gone_tomorrow"] = module
    try:
        settings, box = module.Settings(), module.Box(a=1)
        settings.lr, box.more = module.Box(lr=0.1), 3
        torch.save({"state_dict": _state(), "hparams": [settings, box]}, tmp_path / "x.ckpt")
    finally:
        del sys.modules["gone_tomorrow"]

    _assert_read(tmp_path / "x.ckpt", _state())


class Net(LightningModule):
    def __init__(self, lr, folder):
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=float(self.hparams.lr))


def test_a_checkpoint_of_lightning(tmp_path):
    net = Net(np.float64(0.1), pathlib.Path("x"))
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path
    )
    trainer.fit(net, torch.randn(4, 2))
    trainer.save_checkpoint(tmp_path / "net.ckpt")

    net.load_state_dict(_assert_read(tmp_path / "net.ckpt", net.state_dict()))


CALLS = {
    "system": (os.system, "touch ran"),
    "eval": (eval, "open('ran', 'w')"),
    "exec": (exec, "open('ran', 'w')"),
    "open": (open, "ran", "w"),
    "getattr": (getattr, pathlib.Path("ran"), "touch"),
    "import": (__import__, "this"),
    "write": (pathlib.Path.write_text, pathlib.Path("ran"), "text"),
}


@pytest.mark.parametrize("where", ["beside", "inside", "whole"])
@pytest.mark.parametrize("what", CALLS)
@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_a_file_is_run(tmp_path, monkeypatch, what, where, zipped):
    monkeypatch.chdir(tmp_path)
    call, state = Reduced(*CALLS[what]), _state()
    content = {
        "beside": {"state_dict": state, "hyper_parameters": {"call": call}},
        "inside": {"state_dict": {**state, "call": call}},
        "whole": call,
    }[where]
    torch.save(content, "evil.ckpt", _use_new_zipfile_serialization=zipped)
    monkeypatch.delitem(sys.modules, "this", raising=False)

    try:
        found = read_state_dict("evil.ckpt")
    except ArtifactError as error:
        assert "evil.ckpt" in str(error)  # noqa: PT017
    else:
        assert where == "beside"
        assert list(found) == list(state)

    assert not pathlib.Path("ran").exists()
    assert "this" not in sys.modules


def test_a_method_that_is_got_and_called_is_not_run(tmp_path, monkeypatch):
    """Two steps: getattr gives a method, which the next one calls."""
    monkeypatch.chdir(tmp_path)
    code = (
        b"\x80\x02cbuiltins\ngetattr\ncpathlib\nPath\nX\x05\x00\x00\x00touch\x86R"
        b"cpathlib\nPath\nX\x03\x00\x00\x00ran\x85R\x85R."
    )
    with zipfile.ZipFile("evil.ckpt", "w") as file:
        file.writestr("evil/data.pkl", code)
        file.writestr("evil/version", "3\n")

    with pytest.raises(ArtifactError, match=r"evil\.ckpt"):
        read_state_dict("evil.ckpt")
    assert not pathlib.Path("ran").exists()


def test_reading_leaves_torchs_list_of_safe_classes_as_it_was(tmp_path):
    torch.save({"state_dict": _state(), "x": Slots()}, tmp_path / "x.ckpt")
    before = set(torch.serialization.get_safe_globals())

    read_state_dict(tmp_path / "x.ckpt")

    assert before == set(torch.serialization.get_safe_globals())
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "x.ckpt", weights_only=True)


FORMATS = {
    "checkpoint": lambda state, path: torch.save({"state_dict": state, "epoch": 1}, path),
    "state dict": torch.save,
    "parameters": lambda state, path: torch.save({n: nn.Parameter(v) for n, v in state.items()}, path),
    "old format": lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
    "ours": lambda state, path: save_tensors(path, state, kind="expert"),
    "safetensors": lambda state, path: safetensors.torch.save_file(dict(state), path, metadata={"format": "pt"}),
}


@pytest.mark.parametrize("form", FORMATS)
def test_every_format(tmp_path, form):
    """The content tells, not the name."""
    state, path = {n: v for n, v in _state().items() if v.is_floating_point()}, tmp_path / "x.ckpt"
    FORMATS[form](state, path)

    found = read_state_dict(path)
    opened = open_state_dict(path)

    assert set(found) == set(opened) == set(state)
    assert all(torch.equal(found[n], value) and torch.equal(opened[n], value) for n, value in state.items())


@pytest.mark.parametrize("form", ["checkpoint", "state dict", "old format", "ours"])
def test_versions_and_tied_entries_come_back(tmp_path, form):
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    model[2].weight = model[0].weight
    FORMATS[form](model.state_dict(), tmp_path / "x")

    found = read_state_dict(tmp_path / "x")

    assert found._metadata["1"] == {"version": 2}
    assert found["0.weight"].data_ptr() == found["2.weight"].data_ptr()


@pytest.mark.parametrize("form", FORMATS)
def test_what_was_read_does_not_depend_on_the_file(tmp_path, form):
    """A checkpoint is written over while a training that is pulled to its weights goes on."""
    state = {"w": torch.arange(1000.0)}
    FORMATS[form](state, tmp_path / "x")
    found = read_state_dict(tmp_path / "x")
    size = (tmp_path / "x").stat().st_size

    with open(tmp_path / "x", "r+b") as file:
        file.write(b"\0" * size)
        file.truncate(0)

    assert torch.equal(found["w"], state["w"])


def test_plain_data_of_a_state_dict_comes_back(tmp_path):
    torch.save({"w": torch.ones(1), "_extra_state": {"steps": [3]}}, tmp_path / "x")

    assert read_state_dict(tmp_path / "x")["_extra_state"] == {"steps": [3]}


@pytest.mark.parametrize("value", [Slots(), {"deep": [(AttributeDict(a=1),)]}, np.float64(1.0), {Colour.RED: 1}])
def test_an_object_inside_the_state_dict_is_refused_by_name(tmp_path, value):
    torch.save({"state_dict": {"w": torch.ones(1), "_extra_state": value}}, tmp_path / "x.ckpt")
    with pytest.raises(ArtifactError, match=r"x\.ckpt has an object of .* in the entry '_extra_state'"):
        read_state_dict(tmp_path / "x.ckpt")


def _write_text(path):
    path.write_text("weights")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "does not exist; expected a Lightning checkpoint, a state dict saved with"),
        (lambda path: path.mkdir(), "is a folder, such as that of a sharded checkpoint; expected"),
        (_write_text, r"cannot be read: .*Expected .*torch\.save\(model\.state_dict\(\), path\)"),
        (lambda path: path.write_bytes(b""), "cannot be read"),
        (lambda path: torch.save(nn.Linear(2, 2), path), "an object of the class torch.nn.modules.linear.Linear"),
        (lambda path: torch.save([torch.ones(2)], path), "holds an object of the class list, not a state dict"),
        (lambda path: torch.save({"model": {"w": torch.ones(2)}, "n": 1}, path), "no tensors but the entries model, n"),
        (lambda path: torch.save({"state_dict": {"w": 1}}, path), "no tensors but the entries w"),
        (lambda path: torch.jit.script(nn.Linear(2, 2)).save(path), "cannot be read"),
        (
            lambda path: Importance({"w": torch.ones(2)}, kind="mas", num_samples=1).save(path),
            "holds 'importance'; expected .*a Lightning checkpoint",
        ),
        (
            lambda path: torch.save({"w": torch.ones(1), "x": Slots()}, path, _use_new_zipfile_serialization=False),
            "cannot be read",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_has_no_state_dict_is_refused_by_name(tmp_path, write, message):
    path = tmp_path / "file.ckpt"
    write(path)
    with pytest.raises(ArtifactError, match=rf"file\.ckpt .*{message}|file\.ckpt {message}"):
        read_state_dict(path)


def test_a_truncated_checkpoint_is_refused(tmp_path):
    path = tmp_path / "x.ckpt"
    torch.save({"state_dict": _state()}, path)
    data = path.read_bytes()
    for size in range(0, len(data), 97):
        path.write_bytes(data[:size])
        with pytest.raises(ArtifactError, match=r"x\.ckpt"):
            read_state_dict(path)


def test_a_file_of_another_kind_is_refused_where_one_is_asked_for(tmp_path):
    save_tensors(tmp_path / "x", {"w": torch.ones(1)}, kind="merged")

    assert isinstance(open_state_dict(tmp_path / "x", kind="merged"), TensorFile)
    with pytest.raises(ArtifactError, match="holds 'merged'; expected 'expert'"):
        open_state_dict(tmp_path / "x", kind="expert")
