"""Every script says in one line that a file or folder cannot be read or written, before it does anything."""

import pytest
from scripts import refusal


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("run_digits.py", []),
        ("run_numbers.py", ["--sources", "[photos]"]),
        ("run_catprior.py", ["--data_dir", "scenes", "--network.weights", "null"]),
        ("run_transprior.py", ["--data_dir", "scenes", "--network.weights", "null"]),
        ("importance_analysis.py", []),
        ("bench_importance.py", ["--networks", "[mlp]"]),
        ("bench_memory.py", ["--networks", "[mlp]"]),
        ("bench_merge.py", ["--networks", "[mlp]"]),
    ],
)
def test_a_file_in_place_of_a_folder_is_refused(tmp_path, monkeypatch, script, options):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").touch()

    said = refusal(script, *options, "--output_dir", tmp_path / "taken" / "here")

    assert said.startswith("error: ")
    assert str(tmp_path / "taken") in said
    assert "output_dir" in said
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("compare.py", [".", "."]),
        ("merge_reference.py", ["--experts", "nothing.safetensors"]),
        ("batchnorm_study.py", ["--run_dir", "nothing"]),
        ("importance_analysis.py", ["--run_dir", "nothing"]),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path, monkeypatch, script, options):
    monkeypatch.chdir(tmp_path)
    assert refusal(script, *options).startswith("error: ")
    assert not list(tmp_path.iterdir())
