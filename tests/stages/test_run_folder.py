import errno
import hashlib
import json
import tempfile

import pytest

from pl_personalize import ArtifactError
from pl_personalize.stages import run_folder
from pl_personalize.stages.run_folder import RunFolder, check_writable, refuse_folder


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


@pytest.mark.parametrize("first", [{"data": 1}, {"data": 1, "turns": 2}])
def test_an_option_that_one_call_lacks_is_refused_but_for_methods_and_adaptations(tmp_path, first):
    RunFolder(tmp_path, first | {"method.a.strength": 1.0})
    other = RunFolder(tmp_path, first | {"adaptation.b.lr": 0.1})
    assert other.options == first | {"method.a.strength": 1.0, "adaptation.b.lr": 0.1}
    with pytest.raises(ArtifactError, match=r"with other options \(turns: "):
        RunFolder(tmp_path, {"data": 1} if "turns" in first else {"data": 1, "turns": 2})


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


def test_a_folder_below_a_file_is_refused_with_both_names_and_the_option(tmp_path):
    (tmp_path / "taken").touch()
    with pytest.raises(ArtifactError, match=r"taken/run of a run cannot be made.*taken is a file.*--output_dir"):
        RunFolder(tmp_path / "taken" / "run", {})


WRITTEN = ["results.csv", "results.md", "comparisons.csv", "metrics.jsonl", "figures", "checkpoints", "merged", "csv"]


@pytest.mark.parametrize("name", WRITTEN)
def test_a_folder_of_another_program_is_refused_and_left_alone(tmp_path, name):
    (tmp_path / name).write_text("of somebody else")
    (tmp_path / "notes.txt").touch()
    for refuse in (refuse_folder, lambda path: RunFolder(path, {})):
        with pytest.raises(ArtifactError, match=rf"has {name}, and no manifest\.json of a run.*output_dir"):
            refuse(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "notes.txt"])
    assert (tmp_path / name).read_text() == "of somebody else"


@pytest.mark.parametrize("name", [".lock", ".gitignore", ".DS_Store", "log.txt", "wandb"])
def test_a_folder_with_nothing_that_would_be_replaced_will_do(tmp_path, name):
    (tmp_path / name).touch()
    RunFolder(tmp_path, {}).finish("train")
    (tmp_path / "results.csv").touch()
    assert RunFolder(tmp_path, {}).finished("train") is not None


def fails(number, name=None):
    def fail(*args, **kwargs):
        raise OSError(number, "no", *([] if name is None else [str(name)]))

    return fail


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EIO])
def test_a_manifest_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, number):
    monkeypatch.setattr(run_folder, "write_json", fails(number, tmp_path / "run" / "manifest.json"))
    with pytest.raises(ArtifactError, match=r"run cannot be read or written: .*manifest\.json.*--output_dir") as error:
        RunFolder(tmp_path / "run", {})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC])
def test_a_disk_that_refuses_without_a_name_is_named_by_the_folder(tmp_path, number):
    folder = RunFolder(tmp_path / "run", {})
    with pytest.raises(ArtifactError, match="run cannot be read or written"), folder.explained():
        fails(number)()


@pytest.mark.parametrize(("number", "name"), [(errno.EACCES, "elsewhere/data.csv"), (errno.ECONNREFUSED, None)])
def test_errors_of_other_files_stay_what_they_are(tmp_path, number, name):
    folder = RunFolder(tmp_path / "run", {})
    with pytest.raises(OSError, match="no"), folder.explained():
        fails(number, None if name is None else tmp_path / name)()


def test_a_folder_that_cannot_be_written_is_not_locked(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path / "run", {})
    with folder.locked() as writable:
        assert writable
    (tmp_path / "run" / ".lock").unlink(missing_ok=True)
    monkeypatch.setattr(tempfile, "TemporaryFile", fails(errno.EROFS, tmp_path / "run"))
    with folder.locked() as writable:
        assert not writable
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["manifest.json"]


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    class Unlockable:
        def __init__(self, path):
            pass

        def acquire(self, timeout):
            raise NotImplementedError("no flock here")

    monkeypatch.setattr(run_folder, "FileLock", Unlockable)
    with pytest.raises(ArtifactError, match="cannot be locked: no flock here"), RunFolder(tmp_path, {}).locked():
        pass


def test_a_folder_for_tables_can_be_made_or_is_refused_with_its_option(tmp_path):
    check_writable(tmp_path / "a" / "b", "output_dir")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "taken").touch()
    with pytest.raises(ArtifactError, match=r"output_dir: .*taken/b cannot be made or written"):
        check_writable(tmp_path / "taken" / "b", "output_dir")
