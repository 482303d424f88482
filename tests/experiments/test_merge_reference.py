"""Merging the experts that the published code trained, if they and the images are available."""

import re
import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "experiments" / "merge_reference.py"
# The published code's own figures, less one point.
AT_LEAST = {"FIM-IMM": 94.7, "MAS-IMM": 92.3, "MAS-RACL": 92.8, "FIM-RACL": 94.6}


def run_here(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, *map(str, options)])
    runpy.run_path(str(SCRIPT), run_name="__main__")


@pytest.mark.slow
def test_the_merges_are_as_good_as_the_published_ones(shared_data, monkeypatch, capsys):
    experts = Path(shared_data).parent / "reference" / "numbers-experts.safetensors"
    if not experts.exists():
        pytest.skip(f"no experts at {experts}")
    sources = f"[{shared_data}/meter-digits, mnist]"
    run_here(
        monkeypatch,
        *("--experts", experts, "--data_dir", shared_data, "--sources", sources, "--split_seeds", "[1]"),
    )
    found = {m: float(value) for m, value in re.findall(r"split 1 +(\S+) +([\d.]+)", capsys.readouterr().out)}
    assert {method for method, least in AT_LEAST.items() if found[method] < least} == set()
    assert found["mean-IMM"] < min(found[method] for method in AT_LEAST)


def test_a_missing_file_is_named(tmp_path, monkeypatch):
    missing = tmp_path / "no.safetensors"
    with pytest.raises(SystemExit) as end:
        run_here(monkeypatch, "--experts", missing)
    assert end.value.code == f"error: no file of experts at {missing}; say where it is with --experts."
