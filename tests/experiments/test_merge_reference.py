"""Merging the experts that the published code trained, if they and the images are available."""

import re
from pathlib import Path

import pytest
from scripts import refusal, run_script

# The published code's own figures, less one point.
AT_LEAST = {"FIM-IMM": 94.7, "MAS-IMM": 92.3, "MAS-RACL": 92.8, "FIM-RACL": 94.6}


@pytest.mark.slow
def test_the_merges_are_as_good_as_the_published_ones(shared_data):
    experts = Path(shared_data).parent / "reference" / "numbers-experts.safetensors"
    if not experts.exists():
        pytest.skip(f"no experts at {experts}")
    sources = f"[{shared_data}/meter-digits, mnist]"
    output = run_script(
        "merge_reference.py",
        *("--experts", experts, "--data_dir", shared_data, "--sources", sources, "--split_seeds", "[1]"),
    )
    found = {m: float(value) for m, value in re.findall(r"split 1 +(\S+) +([\d.]+)", output)}
    assert {method for method, least in AT_LEAST.items() if found[method] < least} == set()
    assert found["mean-IMM"] < min(found[method] for method in AT_LEAST)


def test_a_missing_file_and_an_unknown_method_are_named(tmp_path):
    missing = tmp_path / "no.safetensors"
    said = refusal("merge_reference.py", "--experts", missing)
    assert said.strip() == f"error: no file of experts at {missing}; say where it is with --experts."
    missing.touch()
    said = refusal("merge_reference.py", "--experts", missing, "--methods", "[FIM-IMM, EWC]")
    assert "methods must be of MAS-RACL, FIM-RACL, MAS-IMM, FIM-IMM, mean-IMM" in said
    assert "got 'EWC'" in said
