"""Log of the metrics of all stages, which trackers follow."""

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
    """Log of records in a JSON lines file.

    A stage that is restarted, or resumed at an earlier step, logs some steps again; :meth:`read` returns each step only
    once, as it was logged last.

    Args:
        path: The file.

    Attributes:
        followers: Functions called with each record.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.followers: list[Callable[[Record], None]] = []

    def append(self, record: Record) -> None:
        """Write a record, and call the followers."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a+b") as file:
            if file.tell() and (file.seek(-1, 2), file.read(1))[1] != b"\n":  # the process was killed while writing
                file.write(b"\n")
            file.write(_line(record).encode())
        for follower in self.followers:
            follower(record)

    def drop(self, stages: Mapping[str, int]) -> None:
        """Remove the records of stages and their substages, each from a step on."""
        records = self.read()
        kept = [record for record in records if not _is_dropped(record, stages)]
        if len(kept) < len(records):
            write_atomically(self._path, "".join(map(_line, kept)).encode())

    def read(self) -> list[Record]:
        """All records, ordered by the start of their stage and by step."""
        steps: dict[str, dict[int, dict[str, float]]] = {}
        for line in self._path.read_text().splitlines() if self._path.exists() else ():
            try:
                stage, step, metrics = (json.loads(line)[key] for key in Record._fields)
            except (ValueError, KeyError, TypeError):  # a line cut off when the process was killed
                continue
            steps.setdefault(stage, {}).setdefault(step, {}).update(metrics)
        return [
            Record(stage, step, metrics) for stage, found in steps.items() for step, metrics in sorted(found.items())
        ]


def _is_dropped(record: Record, stages: Mapping[str, int]) -> bool:
    parts = record.stage.split("/")
    names = ("/".join(parts[:count]) for count in range(1, len(parts) + 1))
    return any(name in stages and record.step >= stages[name] for name in names)


def _line(record: Record) -> str:
    return json.dumps(record._asdict()) + "\n"


class StageLogger(Logger):
    """Lightning logger that writes the metrics of one stage to a :class:`MetricsLog`.

    Args:
        log: The log.
        stage: Name of the stage, such as ``experts/seed1/train/task2``.
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
        """Do nothing: the manifest holds the options of a run."""
