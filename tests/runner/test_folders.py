"""Experiments in folders of others and in folders that cannot be written."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tiny_benchmark import Tiny, call

from pl_personalize import ArtifactError

TESTS = Path(__file__).parents[1]
# A process of its own, as root can write everywhere: root imports everything that an experiment needs, also from
# folders that nobody else can read; then it is root no longer.
SCRIPT = f"""
import contextlib, io, json, os, sys, tempfile
from pathlib import Path
sys.path.insert(0, {str(TESTS)!r})
from tiny_benchmark import call
from pl_personalize.runner.command_line import errors_in_one_line
with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
    call(Path(folder, "run"), methods=["mean-IMM", "Experts"])
if hasattr(os, "geteuid") and os.geteuid() == 0:
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
found = {{}}
for name, (folder, methods, loggers) in json.loads(sys.argv[1]).items():
    said, end = io.StringIO(), None
    try:
        with contextlib.redirect_stdout(said), errors_in_one_line():
            call(Path(folder), methods=methods, loggers=loggers)
    except SystemExit as error:
        end = error.code
    found[name] = [end, said.getvalue()]
print("found:" + json.dumps(found))
"""


def content(folder):
    return {str(path): (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def protected():
    """What is said of folders that cannot be written, the folder of a finished run, and what was in it before."""
    with tempfile.TemporaryDirectory() as name:  # everybody can reach it, other than pytest's own
        place = Path(name)
        os.chmod(place, 0o755)
        call(place / "run", methods=["mean-IMM"])
        (place / "mine" / "run").mkdir(parents=True)
        cases = {
            "finished": [str(place / "run"), ["mean-IMM"], []],
            "another method": [str(place / "run"), ["mean-IMM", "Experts"], []],
            "another logger": [str(place / "run"), ["mean-IMM"], ["csv"]],
            "new": [str(place / "mine" / "other"), ["mean-IMM"], []],
            "empty": [str(place / "mine" / "run"), ["mean-IMM"], []],
        }
        subprocess.run(["chmod", "-R", "a-w,a+rX", place / "run", place / "mine"], check=True)
        before = content(place)
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, json.dumps(cases)],
            capture_output=True,
            text=True,
            timeout=200,
            cwd="/",
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert "found:" in done.stdout, done.stderr
        found = json.loads(done.stdout.split("found:")[1])
        yield SimpleNamespace(place=place, found=found, before=before, after=content(place))
        subprocess.run(["chmod", "-R", "u+w", place], check=True)


def test_a_finished_run_in_a_read_only_folder_prints_its_tables(protected, tmp_path, capsys):
    shutil.copytree(protected.place / "run", tmp_path / "run")
    subprocess.run(["chmod", "-R", "u+w", tmp_path], check=True)
    call(tmp_path / "run", methods=["mean-IMM"])
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| mean-IMM ")]
    end, said = protected.found["finished"]
    assert end is None
    assert row in said
    assert "Nothing was written" in said


def test_nothing_in_a_protected_folder_is_changed(protected):
    assert protected.after == protected.before


@pytest.mark.parametrize(
    ("case", "left"),
    [("another method", "2 stages are unfinished"), ("another logger", "the loggers csv are incomplete")],
)
def test_what_would_have_to_be_written_in_a_read_only_folder_is_refused(protected, case, left):
    end, _ = protected.found[case]
    assert end.startswith(f"error: {protected.place / 'run'} is read-only, and {left}")
    assert "--output_dir" in end
    assert "\n" not in end


@pytest.mark.parametrize(("case", "name"), [("new", "other"), ("empty", "run")])
def test_a_new_run_in_a_read_only_folder_is_one_line(protected, case, name):
    end, _ = protected.found[case]
    folder = protected.place / "mine" / name
    assert end.startswith(f"error: The folder {folder} of a run cannot be made or written")
    assert "\n" not in end


def test_a_folder_of_another_program_is_refused_before_anything_is_fetched(tmp_path):
    class Fetching(Tiny):
        def prepare_data(self):
            raise AssertionError("something was fetched")

    (tmp_path / "results.csv").write_text("of another program")
    with pytest.raises(ArtifactError, match=r"has results\.csv, and no manifest\.json"):
        call(tmp_path, data=Fetching())
    assert [path.name for path in tmp_path.iterdir()] == ["results.csv"]


def test_a_file_that_cannot_be_written_at_the_end_is_one_line(tmp_path):
    call(tmp_path / "run")
    (tmp_path / "run" / "results.csv").unlink()
    (tmp_path / "run" / "results.csv").mkdir()
    with pytest.raises(ArtifactError, match=r"run cannot be read or written: .*results\.csv.*--output_dir"):
        call(tmp_path / "run")


def test_errors_of_data_are_not_taken_for_errors_of_the_folder(tmp_path):
    class Broken(Tiny):
        def load_user(self, user, task):
            raise FileNotFoundError(2, "no", str(tmp_path / "elsewhere.png"))

    with pytest.raises(FileNotFoundError):
        call(tmp_path / "run", data=Broken())


class Shifted(Tiny):
    """Labels of one user's task are counted through."""

    def load_user(self, user, task):
        adapt, evaluation = super().load_user(user, task)
        shift = 2 if (user, task) == (1, 1) else 0
        return adapt, evaluation._replace(labels=evaluation.labels + shift)


def test_labels_are_checked_before_any_training(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"user 'bob', task 'b', eval: label [23] .*subtract 2\."):
        call(tmp_path, data=Shifted(), methods=["Experts", "Joint"])
    assert [path.name for path in tmp_path.iterdir() if path.name != ".lock"] == ["manifest.json"]
