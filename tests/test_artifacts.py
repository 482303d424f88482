"""Files come back whole and unchanged, or not at all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from pl_personalize import ArtifactError
from pl_personalize.artifacts import (
    TensorFile,
    file_checksum,
    load_tensors,
    read_json,
    save_tensors,
    write_atomically,
    write_json,
)
from pl_personalize.functional.state_dicts import shared_entries


def _tensors():
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(3, 4, generator=generator)
    return {
        "plain": plain,
        "transposed": plain.T,
        "strided": plain[:, ::2],
        "expanded": torch.tensor([1.5]).expand(2, 3),
        "channels_last": torch.randn(2, 3, 4, 5, generator=generator).to(memory_format=torch.channels_last),
        "scalar": torch.tensor(-0.0),
        "empty": torch.empty(0, 3),
        "bfloat16": torch.tensor([1.0, -3.0e38, 1e-40, float("inf"), float("nan")]).bfloat16(),
        "float16": torch.tensor([6e-8, 65504.0]).half(),
        "float64": torch.tensor([1.0 + 2**-52], dtype=torch.float64),
        "int64": torch.tensor(2**53 + 1),
        "uint8": torch.arange(5, dtype=torch.uint8),
        "bool": torch.tensor([True, False]),
        "needs a gradient, ünïcode": torch.ones(2, requires_grad=True),
    }


def _bits(tensor):
    """Bits, so that NaN and -0.0 count."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8).tolist() if tensor.numel() else []


def _same(a, b):
    return a.keys() == b.keys() and all(
        (a[name].dtype, a[name].shape, _bits(a[name])) == (b[name].dtype, b[name].shape, _bits(b[name])) for name in a
    )


@pytest.fixture
def saved(tmp_path):
    return save_tensors(
        tmp_path / "user-7.safetensors",
        {"weight": torch.arange(6.0).view(2, 3), "bias": torch.tensor([0.5, -1.0]), "tied": torch.ones(2)},
        kind="importance",
        metadata={"num_samples": 8, "paths": {"weight": "loop"}},
    )


def test_everything_comes_back_bit_by_bit(tmp_path):
    tensors = _tensors()
    metadata = {"a": [1, 2.5, None, True], "ü": {"nested": "text"}}

    path = save_tensors(tmp_path / "new" / "folder" / "x.safetensors", tensors, kind="expert", metadata=metadata)
    loaded, found = load_tensors(path, kind="expert")

    assert path == tmp_path / "new" / "folder" / "x.safetensors"
    assert _same(loaded, tensors)
    assert found == metadata
    assert all(t.is_contiguous() and not t.requires_grad for t in loaded.values())


def test_no_tensors_and_no_metadata(tmp_path):
    assert load_tensors(save_tensors(tmp_path / "x", {}, kind="expert"), kind="expert") == ({}, {})


def test_what_is_saved_is_not_changed(tmp_path):
    tensors = _tensors()

    save_tensors(tmp_path / "x", tensors, kind="expert")

    assert _same(tensors, _tensors())
    assert tensors["needs a gradient, ünïcode"].requires_grad
    assert tensors["expanded"].stride() == (0, 0)


def test_shared_storage_is_stored_once_and_comes_back_shared(tmp_path):
    weight = torch.randn(100, 100)
    tensors = {"b": weight, "a": weight, "copy": weight.clone(), "view": weight[:50], "c": weight}

    path = save_tensors(tmp_path / "x", tensors, kind="expert")
    loaded, _ = load_tensors(path, kind="expert")

    assert shared_entries(tensors) == {"a": "b", "c": "b"}
    assert _same(loaded, tensors)
    assert loaded["a"] is loaded["b"] is loaded["c"]
    assert len({loaded[name].data_ptr() for name in tensors}) == 3
    assert path.stat().st_size < (100 * 100 * 2 + 50 * 100) * 4 + 2000


def test_tensor_file_is_a_lazy_mapping(tmp_path):
    weight = torch.randn(2, 2)
    path = save_tensors(
        tmp_path / "x", {"b": weight, "a": weight, "c": torch.ones(1)}, kind="expert", metadata={"t": 3}
    )

    file = TensorFile(path, kind="expert")

    assert list(file) == ["b", "a", "c"]
    assert len(file) == 3
    assert file.metadata == {"t": 3}
    assert "a" in file
    assert "d" not in file
    assert shared_entries(file) == {"a": "b"}
    assert _same(dict(file), {"a": weight, "b": weight, "c": torch.ones(1)})
    assert torch.equal(file["a"], weight)
    with pytest.raises(KeyError, match="d"):
        file["d"]


def test_changing_what_was_read_does_not_change_the_file(saved):
    before = saved.read_bytes()

    TensorFile(saved, kind="importance")["weight"].zero_()
    load_tensors(saved, kind="importance")[0]["weight"].zero_()

    assert saved.read_bytes() == before
    assert load_tensors(saved, kind="importance")[0]["weight"][1, 2] == 5.0


WRITE = """
import sys, torch
from pl_personalize.artifacts import save_tensors
shared = torch.arange(5.0)
tensors = {"w": shared, "tied": shared, "b": torch.ones(3).bfloat16(), "n": torch.tensor(3), "e": torch.empty(0)}
metadata = {"paths": {"w": "loop", "b": "layer"}, "kind": "mas", "num_samples": 3, "reduction": "sample"}
save_tensors(sys.argv[1], tensors, kind="importance", metadata=metadata)
"""


def test_another_process_writes_the_same_bytes(tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    monkeypatch.setattr(sys, "argv", ["", str(here)])
    exec(WRITE, {})

    subprocess.run([sys.executable, "-c", WRITE, there], env={**os.environ, "PYTHONHASHSEED": "1"}, check=True)

    assert there.read_bytes() == here.read_bytes()
    assert file_checksum(there) == file_checksum(here)
    assert len(load_tensors(there, kind="importance")[0]) == 5


def _refused(path, kind="importance"):
    """The error's message, empty if the file was accepted."""
    try:
        load_tensors(path, kind=kind)
    except ArtifactError as error:
        return str(error)
    return ""


def test_a_truncated_file_is_refused_at_every_length(saved, tmp_path):
    data = saved.read_bytes()
    accepted = []
    for length in range(len(data)):
        path = tmp_path / f"{length}.part"
        path.write_bytes(data[:length])
        if str(path) not in _refused(path):
            accepted.append(length)

    assert accepted == []


def test_bytes_at_the_end_are_refused(saved):
    saved.write_bytes(saved.read_bytes() + b"\0")

    assert str(saved) in _refused(saved)


def _flipped(data, bit):
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_a_flipped_bit_anywhere_is_refused(saved, tmp_path):
    """In the length of the header, the header with its metadata, and the tensors."""
    data = saved.read_bytes()
    wrong = {}
    for bit in range(8 * len(data)):
        path = tmp_path / f"{bit}.flipped"
        path.write_bytes(_flipped(data, bit))
        try:
            tensors, metadata = load_tensors(path, kind="importance")
            wrong[bit] = f"accepted: {sorted(tensors)}, {metadata}"
        except ArtifactError as error:
            if str(path) not in str(error):
                wrong[bit] = f"does not name the file: {error}"
        except Exception as error:
            wrong[bit] = repr(error)
        path.unlink()

    assert not wrong, f"{len(wrong)} of {8 * len(data)}: {list(wrong.items())[:3]} … {list(wrong.items())[-3:]}"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"[2,3]", b"[3,2]"),
        (b'"F32"', b'"I32"'),
        (b'"bias":', b'"bits":'),
        (b'num_samples\\": 8', b'num_samples\\": 9'),
    ],
    ids=["shape", "type", "name", "metadata"],
)
def test_a_header_that_still_fits_the_data_is_refused(saved, old, new):
    data = saved.read_bytes()
    assert old in data
    saved.write_bytes(data.replace(old, new, 1))

    assert str(saved) in _refused(saved)


def test_changed_data_are_refused(saved):
    data = bytearray(saved.read_bytes())
    data[-1] ^= 1
    saved.write_bytes(data)

    assert str(saved) in _refused(saved)


def _write_foreign(path):
    safetensors.torch.save_file({"weight": torch.ones(2)}, path)


def _write_foreign_with_metadata(path):
    safetensors.torch.save_file({"weight": torch.ones(2)}, path, metadata={"format": "pt"})


def _write_our_key(value):
    return lambda path: safetensors.torch.save_file({"weight": torch.ones(2)}, path, metadata={"pl_personalize": value})


_HEAD = {"kind": "importance", "version": 1, "sha256": "0" * 64}


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(_write_foreign, id="no metadata"),
        pytest.param(_write_foreign_with_metadata, id="other metadata"),
        pytest.param(_write_our_key("[]"), id="a list"),
        pytest.param(_write_our_key("{"), id="no JSON"),
        pytest.param(_write_our_key(json.dumps({**_HEAD})), id="incomplete"),
        pytest.param(_write_our_key(json.dumps({**_HEAD, "aliases": {}})), id="no metadata in ours"),
        pytest.param(
            _write_our_key(json.dumps({**_HEAD, "aliases": [], "metadata": {}})), id="aliases of another type"
        ),
        pytest.param(_write_our_key(json.dumps({**_HEAD, "aliases": {}, "metadata": {}})), id="wrong checksum"),
        pytest.param(_write_our_key(json.dumps({**_HEAD, "version": 2, "aliases": {}, "metadata": {}})), id="newer"),
        pytest.param(lambda path: torch.save({"weight": torch.ones(2)}, path), id="pickle"),
        pytest.param(lambda path: path.write_bytes(b""), id="empty"),
        pytest.param(lambda path: path.write_text("weight: 1"), id="text"),
        pytest.param(lambda path: path.mkdir(), id="a folder"),
        pytest.param(lambda path: None, id="missing"),
    ],
)
def test_what_is_no_file_of_ours_is_refused_by_name(tmp_path, write):
    path = tmp_path / "foreign.safetensors"
    write(path)

    assert str(path) in _refused(path)


def test_a_file_of_another_kind_is_refused_with_both_kinds(saved):
    assert _refused(saved, kind="importance") == ""
    message = _refused(saved, kind="expert")
    assert str(saved) in message
    assert "'importance'" in message
    assert "'expert'" in message


def test_an_artifact_error_is_a_value_error():
    assert issubclass(ArtifactError, ValueError)


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["fsync", "chmod", "replace"])
def test_a_failure_in_the_middle_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step, error):
    path = tmp_path / "x"
    write_atomically(path, b"old")

    def fail(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        with pytest.raises(type(error)):
            write_atomically(path, b"new")
        with pytest.raises(type(error)):
            save_tensors(path, {"w": torch.ones(2)}, kind="expert")

    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["x"]


def test_readers_see_the_old_file_until_the_new_one_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "x"
    write_atomically(path, b"old")
    seen = []
    replace = os.replace
    monkeypatch.setattr(
        os, "replace", lambda a, b: (seen.append((path.read_bytes(), Path(a).read_bytes())), replace(a, b))
    )

    write_atomically(path, b"new")

    assert seen == [(b"old", b"new")]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_others_may_read_what_the_umask_allows(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        path = write_atomically(tmp_path / "x", b"data")
        assert os.umask(umask) == umask
    finally:
        os.umask(before)

    assert path.stat().st_mode & 0o777 == mode


def test_metadata_that_json_cannot_hold_leaves_the_old_file(saved):
    before = saved.read_bytes()

    with pytest.raises(TypeError, match="JSON"):
        save_tensors(saved, {"w": torch.ones(1)}, kind="importance", metadata={"path": Path("x")})

    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


def test_file_checksum(tmp_path):
    path = tmp_path / "abc"
    path.write_bytes(b"abc")

    assert file_checksum(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize("value", [{"b": [1, 2.5, None, True], "a": "ü — 猫"}, [], "text", 1.1, 10**30])
def test_json_comes_back(tmp_path, value):
    path = write_json(tmp_path / "new" / "x.json", value)

    assert read_json(path) == value
    assert path.read_bytes().endswith(b"\n")


def test_json_bytes_do_not_depend_on_the_order_of_keys(tmp_path):
    write_json(tmp_path / "1", {"a": 1, "b": {"c": 2, "d": 3}})
    write_json(tmp_path / "2", {"b": {"d": 3, "c": 2}, "a": 1})

    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    assert (tmp_path / "1").read_text().startswith('{\n  "a": 1,\n  "b": {\n    "c": 2')


@pytest.mark.parametrize("data", [None, b"", b'{"a": 1', b"\xff\xfe"])
def test_json_that_cannot_be_read_is_refused_by_name(tmp_path, data):
    path = tmp_path / "x.json"
    if data is not None:
        path.write_bytes(data)

    with pytest.raises(ArtifactError, match=r"x\.json cannot be read as JSON"):
        read_json(path)


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path):
    path = write_json(tmp_path / "x.json", {"a": 1})

    with pytest.raises(TypeError):
        write_json(path, {"a": {1, 2}})

    assert read_json(path) == {"a": 1}


def _content(path):
    with safetensors.safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["pl_personalize"])


def test_the_versions_of_modules_are_stored_with_a_state_dict(tmp_path):
    state = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)).state_dict()
    state._metadata["0"]["made by"], state._metadata["1"]["object"] = "us", object()

    file = TensorFile(save_tensors(tmp_path / "x", state, kind="expert", metadata={"a": 1}), kind="expert")

    versions = {"": {"version": 1}, "0": {"version": 1, "made by": "us"}, "1": {"version": 2}}
    assert file.metadata == {"a": 1}
    assert dict(file.load()._metadata) == dict(file._metadata) == versions
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    model.load_state_dict(file)
    assert torch.equal(model[0].weight, state["0.weight"])


def test_a_file_without_versions_is_as_it_always_was(tmp_path):
    path = save_tensors(tmp_path / "x", {"w": torch.ones(1)}, kind="expert", metadata={"a": 1})

    content = _content(path)
    assert content.keys() == {"kind", "version", "names", "aliases", "metadata", "sha256"}
    assert (content["version"], content["metadata"]) == (1, {"a": 1})
    assert not hasattr(TensorFile(path, kind="expert").load(), "_metadata")


def test_a_file_with_versions_has_the_fields_that_earlier_releases_read(tmp_path):
    path = save_tensors(tmp_path / "x", torch.nn.Linear(1, 1).state_dict(), kind="expert")

    content = _content(path)
    assert content.keys() == {"kind", "version", "names", "aliases", "metadata", "sha256"}
    assert content["version"] == 1


def test_entries_that_are_no_tensors_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"entries _extra_state are not tensors.*torch\.save"):
        save_tensors(tmp_path / "x", {"w": torch.ones(1), "_extra_state": {"steps": 3}}, kind="expert")
    assert not (tmp_path / "x").exists()


def test_a_type_that_files_do_not_have_is_refused_by_name(tmp_path):
    tensors = {"w": torch.ones(1), "z": torch.ones(1, dtype=torch.complex128)}
    with pytest.raises(ValueError, match=r"cannot hold torch\.complex128: z\."):
        save_tensors(tmp_path / "x", tensors, kind="expert")
