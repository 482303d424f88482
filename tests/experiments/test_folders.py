"""Every script says in one line that its folder cannot be written, before it does anything."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("digits.py", []),
        ("numbers.py", ["--sources", "[photos]"]),
        ("importance_analysis.py", []),
        ("bench_importance.py", ["--networks", "[mlp]"]),
        ("bench_memory.py", ["--networks", "[mlp]"]),
        ("bench_merge.py", ["--networks", "[mlp]"]),
    ],
)
def test_a_file_in_the_place_of_a_folder_is_one_line(tmp_path, script, options):
    (tmp_path / "taken").touch()
    done = subprocess.run(
        [sys.executable, str(EXPERIMENTS / script), *options, "--output_dir", str(tmp_path / "taken" / "here")],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert str(tmp_path / "taken") in line
    assert "output_dir" in line
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


@pytest.mark.parametrize("script", ["compare.py", "merge_reference.py", "batchnorm_study.py"])
def test_a_file_that_cannot_be_read_is_one_line(tmp_path, script):
    options = {
        "compare.py": [str(tmp_path), str(tmp_path)],
        "merge_reference.py": ["--experts", "nothing.safetensors"],
        "batchnorm_study.py": ["--run_dir", str(tmp_path / "nothing")],
    }
    done = subprocess.run(
        [sys.executable, str(EXPERIMENTS / script), *options[script]],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
