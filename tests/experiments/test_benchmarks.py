"""The benchmarks on the smallest network: their options have the same names, and their tables are written."""

import subprocess

import pytest
from scripts import refusal, rows_of, run_script

COMMON = ["--networks", "[mlp]", "--device", "cpu", "--num_threads", "1"]
NAMED = {
    "bench_importance.py": ("importance.csv", ["--rounds", "1", "--slow_rounds", "1", "--alternatives", "[]"]),
    "bench_memory.py": ("memory.csv", ["--batch_sizes", "[2]"]),
    "bench_merge.py": ("merge.csv", ["--rounds", "1", "--num_experts", "2"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("script", NAMED)
def test_it_runs_and_writes_its_table(script, tmp_path, monkeypatch):
    def in_this_process(command, **options):  # its peaks mean nothing, but no process has to start
        return subprocess.CompletedProcess(command, 0, stdout=run_script(script, *command[2:]))

    monkeypatch.setattr(subprocess, "run", in_this_process)
    table, own = NAMED[script]
    output = run_script(script, *COMMON, *own, "--output_dir", tmp_path)
    assert {row["network"] for row in rows_of(tmp_path / table)} == {"MLP 100-100"}
    assert (tmp_path / table).with_suffix(".md").read_text() in output


@pytest.mark.slow
def test_training_steps_are_timed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = run_script("bench_training.py", "--rounds", "1", "--steps", "2")
    assert output.count("| plain PyTorch") == 2
    assert output.count("| TaskLearner") == 2


@pytest.mark.parametrize("script", NAMED)
def test_an_unknown_network_is_refused(script, tmp_path):
    said = refusal(script, "--networks", "[mlp, AlexNet]", "--output_dir", tmp_path)
    assert said.startswith("error: networks must be of mlp, alexnet, ")
    assert "; got 'AlexNet'" in said
    assert not list(tmp_path.iterdir())
