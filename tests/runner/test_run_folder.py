import hashlib
import json

import pytest

from pl_personalize import ArtifactError
from pl_personalize.runner.run_folder import RunFolder


def test_a_finished_stage_is_there_when_the_folder_is_opened_again(tmp_path):
    folder = RunFolder(tmp_path, {"lr": 0.1})
    assert folder.finished("train") is None
    (tmp_path / "model.bin").write_bytes(b"abc")
    folder.finish("train", artifacts=[tmp_path / "model.bin"], result={"acc": 0.5})

    again = RunFolder(tmp_path, {"lr": 0.1}).finished("train")
    assert again.result == {"acc": 0.5}
    assert list(again.artifacts) == ["model.bin"]


@pytest.mark.parametrize("damage", ["change", "remove"])
def test_a_stage_whose_file_is_not_what_it_was_counts_as_not_done(tmp_path, damage):
    path = tmp_path / "model.bin"
    path.write_bytes(b"abc")
    RunFolder(tmp_path, {}).finish("train", artifacts=[path])
    if damage == "change":
        path.write_bytes(b"abd")
    else:
        path.unlink()
    assert RunFolder(tmp_path, {}).finished("train") is None


def test_it_knows_the_checksums_of_what_stages_made(tmp_path):
    folder, path = RunFolder(tmp_path, {}), tmp_path / "room" / "model.bin"
    path.parent.mkdir()
    path.write_bytes(b"abc")
    folder.finish("train", artifacts=[path])
    assert folder.checksums([path]) == {"room/model.bin": hashlib.sha256(b"abc").hexdigest()}
    with pytest.raises(KeyError):
        folder.checksums([tmp_path / "other.bin"])


def test_other_options_are_refused_and_named(tmp_path):
    RunFolder(tmp_path, {"lr": 0.1, "epochs": 3})
    with pytest.raises(ArtifactError, match=r"lr: 0\.1 there, 0\.2 now"):
        RunFolder(tmp_path, {"lr": 0.2, "epochs": 3})


@pytest.mark.parametrize("version", [{}, {"version": 1}, {"version": 99}])
def test_a_folder_of_a_version_with_other_results_is_refused(tmp_path, version):
    RunFolder(tmp_path, {"lr": 0.1}).finish("train")
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    del manifest["version"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | version))
    with pytest.raises(ArtifactError, match=rf"holds a run of version {version.get('version', 1)}; .* other results"):
        RunFolder(tmp_path, {"lr": 0.1})


@pytest.mark.parametrize("content", ["{", json.dumps({"options": {}}), json.dumps([])])
def test_a_damaged_manifest_is_named(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        RunFolder(tmp_path, {})


def test_two_processes_do_not_work_in_one_folder(tmp_path):
    first, second = RunFolder(tmp_path, {}), RunFolder(tmp_path, {})
    with first.locked(), pytest.raises(ArtifactError, match="Another process works in"), second.locked():
        pass
    with second.locked():
        pass


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(ArtifactError, match="is a file; a run needs a folder"):
        RunFolder(tmp_path / "run", {})
