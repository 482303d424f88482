"""Running a script of ``experiments`` in this process, as Python would."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


def run_script(script: str, *options: object) -> str:
    """Run a script with options and return what it printed."""
    output = io.StringIO()
    threads, environment = torch.get_num_threads(), dict(os.environ)
    with pytest.MonkeyPatch.context() as monkeypatch, torch.random.fork_rng(), contextlib.redirect_stdout(output):
        monkeypatch.syspath_prepend(str(EXPERIMENTS))
        monkeypatch.setattr(sys, "argv", [script, *map(str, options)])
        try:
            runpy.run_path(str(EXPERIMENTS / script), run_name="__main__")
        finally:
            torch.set_num_threads(threads)
            os.environ.clear()
            os.environ.update(environment)
    return output.getvalue()


def refusal(script: str, *options: object) -> str:
    """The message, of one line, with which a script refuses its options."""
    errors = io.StringIO()
    with pytest.raises(SystemExit) as end, contextlib.redirect_stderr(errors):
        run_script(script, *options)
    assert end.value.code not in (0, None)
    if isinstance(end.value.code, str):
        assert end.value.code.startswith("error: ")
    return f"{end.value.code} {errors.getvalue()}"


def rows_of(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
