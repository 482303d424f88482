"""Metrics of the stages of an experiment: first to a file, from there to whoever tracks the run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import override

from pl_personalize.artifacts import write_atomically


class Record(NamedTuple):
    """Metrics of one step of a stage."""

    stage: str
    step: int
    metrics: dict[str, float]


class MetricsLog:
    """Appends records to a file of JSON lines, and hands them on.

    A stage that is begun again, or resumed at an earlier step, is logged again from there; :meth:`read` gives each step
    once, as it was logged last.

    Args:
        path: The file.

    Attributes:
        followers: Who gets each record, too.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.followers: list[Callable[[Record], None]] = []

    def append(self, record: Record) -> None:
        """Write a record, and hand it to the followers."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a+b") as file:
            if file.tell() and (file.seek(-1, 2), file.read(1))[1] != b"\n":  # the process was killed in a line
                file.write(b"\n")
            file.write((json.dumps(record._asdict()) + "\n").encode())
        for follower in self.followers:
            follower(record)

    def drop(self, stage: str, *, from_step: int) -> None:
        """Forget the records of a stage, and of its parts, from a step on: it will log them again."""
        kept = [r for r in self.read() if not f"{r.stage}/".startswith(f"{stage}/") or r.step < from_step]
        text = "".join(json.dumps(record._asdict()) + "\n" for record in kept)
        if self._path.exists():
            write_atomically(self._path, text.encode())

    def read(self) -> list[Record]:
        """All records, by stage in the order in which stages began, and by step."""
        steps: dict[str, dict[int, dict[str, float]]] = {}
        for line in self._path.read_text().splitlines() if self._path.exists() else ():
            try:
                stage, step, metrics = (json.loads(line)[key] for key in Record._fields)
            except (ValueError, KeyError, TypeError):  # a line that was cut when the process was killed
                continue
            steps.setdefault(stage, {}).setdefault(step, {}).update(metrics)
        return [
            Record(stage, step, metrics) for stage, found in steps.items() for step, metrics in sorted(found.items())
        ]


class StageLogger(Logger):
    """A Lightning logger that writes the metrics of one stage.

    Args:
        log: Where to.
        stage: Name of the stage, such as ``seed1/expert/task2``.
    """

    def __init__(self, log: MetricsLog, stage: str) -> None:
        super().__init__()
        self._log, self._stage = log, stage

    @property
    @override
    def name(self) -> str:
        return self._stage

    @property
    @override
    def version(self) -> str:
        return "0"

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        values = {key: float(value) for key, value in metrics.items() if key != "epoch"}
        if values:
            self._log.append(Record(self._stage, step or 0, values))

    @override
    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: the options of a run are in its manifest."""
