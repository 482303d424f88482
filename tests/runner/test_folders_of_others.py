"""Runs in folders that cannot be written, in processes of their own: root can write everywhere."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tiny_benchmark import Tiny, call

from pl_personalize import ArtifactError

TESTS = Path(__file__).parents[1]
BEGINS = "Here it begins."
# Root imports everything that a run needs, also from folders that nobody else can read; then it is root no longer.
SCRIPT = f"""
import os, sys, tempfile
from pathlib import Path
sys.path.insert(0, {str(TESTS)!r})
from tiny_benchmark import call
from pl_personalize.runner.command_line import errors_in_one_line
with tempfile.TemporaryDirectory() as folder:
    call(Path(folder, "run"), methods=["mean-IMM", "Experts"])
print({BEGINS!r}, flush=True)
print({BEGINS!r}, file=sys.stderr, flush=True)
if hasattr(os, "geteuid") and os.geteuid() == 0:
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
with errors_in_one_line():
    call(Path(sys.argv[1]), methods=sys.argv[2].split(), loggers=sys.argv[3].split())
"""


@pytest.fixture
def place():
    """A folder that everybody can reach, which pytest's own is not."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)
        subprocess.run(["chmod", "-R", "u+w", folder], check=True)


def run(folder, methods="mean-IMM", loggers=""):
    """The status, and what is printed, of a run by somebody who may write in no protected folder."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), methods, loggers],
        capture_output=True,
        text=True,
        timeout=200,
        cwd="/",
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert BEGINS in done.stdout, done.stderr
    return done.returncode, done.stdout.split(BEGINS)[1], done.stderr.split(BEGINS)[1]


def protect(folder):
    subprocess.run(["chmod", "-R", "a-w,a+rX", str(folder)], check=True)


def content(folder):
    return {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in folder.rglob("*")}


def test_a_finished_run_in_a_read_only_folder_prints_its_tables(place, capsys):
    call(place / "run", methods=["mean-IMM"])
    printed = capsys.readouterr().out
    protect(place / "run")
    before = content(place / "run")
    status, said, errors = run(place / "run")
    assert status == 0, errors
    (row,) = [line for line in printed.splitlines() if line.startswith("| mean-IMM ")]
    assert row in said
    assert "Nothing was written" in said
    assert content(place / "run") == before


@pytest.mark.parametrize(
    ("methods", "loggers", "left"),
    [("mean-IMM Experts", "", "stages are not finished"), ("mean-IMM", "csv", "the loggers csv were not told all")],
)
def test_what_would_have_to_be_written_in_a_read_only_folder_is_refused(place, methods, loggers, left):
    call(place / "run", methods=["mean-IMM"])
    protect(place / "run")
    before = content(place / "run")
    status, _, errors = run(place / "run", methods, loggers)
    assert status == 1
    (line,) = errors.strip().splitlines()
    assert line.startswith(f"error: {place / 'run'} cannot be written, and ")
    assert left in line
    assert "--output_dir" in line
    assert content(place / "run") == before


@pytest.mark.parametrize("there", [False, True])
def test_a_new_run_in_a_read_only_folder_is_one_line(place, there):
    folder = place / "mine" / "run"
    (folder if there else folder.parent).mkdir(parents=True)
    protect(place / "mine")
    status, _, errors = run(folder)
    assert status == 1
    (line,) = errors.strip().splitlines()
    assert line.startswith(f"error: The folder {folder} of a run cannot be made or written")


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


def test_a_home_folder_is_written_out(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    call(Path("~/run"))
    assert (tmp_path / "run" / "manifest.json").is_file()


class Split(Tiny):
    """Labels of one user's task are counted through."""

    def load_user(self, user, task):
        adapt, evaluation = super().load_user(user, task)
        shift = 2 if (user, task) == (1, 1) else 0
        return adapt, evaluation._replace(labels=evaluation.labels + shift)


def test_labels_are_checked_before_any_training(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"user 'bob', task 'b', eval: label [23] .*subtract 2\."):
        call(tmp_path, data=Split(), methods=["Experts", "Joint"])
    assert [path.name for path in tmp_path.iterdir() if path.name != ".lock"] == ["manifest.json"]
