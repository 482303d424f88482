"""The benchmarks on the smallest network: their options have the same names, and their tables are written."""

import csv
import runpy
import sys
from pathlib import Path

import pytest
import torch

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
COMMON = ["--networks", "[mlp]", "--device", "cpu", "--num_threads", "1"]
NAMED = {
    "bench_importance.py": ("importance.csv", ["--rounds", "1", "--slow_rounds", "1", "--alternatives", "[]"]),
    "bench_memory.py": ("memory.csv", ["--batch_sizes", "[2]"]),
    "bench_merge.py": ("merge.csv", ["--rounds", "1", "--num_experts", "2"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("script", NAMED)
def test_it_runs_and_writes_its_table(script, tmp_path, monkeypatch, capsys):
    table, own = NAMED[script]
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    monkeypatch.setattr(sys, "argv", [script, *COMMON, *own, "--output_dir", str(tmp_path)])
    with torch.random.fork_rng():
        runpy.run_path(str(EXPERIMENTS / script), run_name="__main__")

    rows = list(csv.DictReader((tmp_path / table).open()))
    assert {row["network"] for row in rows} == {"MLP 100-100"}
    assert (tmp_path / table).with_suffix(".md").read_text() in capsys.readouterr().out


@pytest.mark.parametrize("script", NAMED)
def test_an_unknown_network_is_refused(script, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    monkeypatch.setattr(sys, "argv", [script, "--networks", "[mlp, AlexNet]", "--output_dir", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"networks must be of mlp, alexnet, .*; got 'AlexNet'"):
        runpy.run_path(str(EXPERIMENTS / script), run_name="__main__")
    assert not list(tmp_path.iterdir())
