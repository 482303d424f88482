"""Merging the experts that the published code trained, where they and the images are at hand."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "experiments" / "merge_reference.py"
# The published code's own figures, less one point.
AT_LEAST = {"FIM-IMM": 94.7, "MAS-IMM": 92.3, "MAS-RACL": 92.8, "FIM-RACL": 94.6}


@pytest.mark.slow
def test_the_merges_are_as_good_as_the_published_ones(shared_data):
    experts = Path(shared_data).parent / "reference" / "numbers-experts.safetensors"
    if not experts.exists():
        pytest.skip(f"no experts at {experts}")
    sources = f"[{shared_data}/meter-digits, mnist]"
    options = ["--experts", experts, "--data_dir", shared_data, "--sources", sources, "--draws", "[1]"]
    done = subprocess.run(
        [sys.executable, SCRIPT, *map(str, options)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = {method: float(value) for method, value in re.findall(r"draw 1 +(\S+) +([\d.]+)", done.stdout)}
    assert {method for method, least in AT_LEAST.items() if found[method] < least} == set()
    assert found["mean-IMM"] < min(found[method] for method in AT_LEAST)


def test_a_missing_file_is_named(tmp_path):
    done = subprocess.run(
        [sys.executable, SCRIPT, "--experts", str(tmp_path / "no.safetensors")], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert (
        done.stderr.strip()
        == f"error: no file of experts at {tmp_path / 'no.safetensors'}; say where it is with --experts."
    )
