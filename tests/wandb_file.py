"""Reading back what an offline run of W&B wrote."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_BLOCK = 32768  # LevelDB's log format: blocks of records, each with checksum (4), length (2) and type (1)
_HEADER = 7
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


@dataclass
class WandbRun:
    """What is in the file, as W&B's server would see it."""

    run: Any = None
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    step_metrics: dict[str, str] = field(default_factory=dict)
    hidden: set[str] = field(default_factory=set)
    artifacts: list[Any] = field(default_factory=list)
    folder: Path = Path()
    finished: bool = False

    def curve(self, name: str) -> list[tuple[Any, Any]]:
        """(step on its own axis, value) of a metric."""
        axis = self.step_metrics.get(name) or next(
            step
            for pattern, step in self.step_metrics.items()
            if pattern.endswith("*") and name.startswith(pattern[:-1])
        )
        return [(row[axis], row[name]) for row in self.history if name in row]

    def table(self, name: str) -> list[dict[str, Any]]:
        """The rows of a table."""
        reference = next(row[name] for row in self.history if name in row)
        content = json.loads((self.folder / "files" / reference["path"]).read_text())
        return [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]


def _records(data: bytes) -> list[bytes]:
    """The records of the file; its first seven bytes say what it is."""
    assert data[:4] == b":W&B"
    place, parts, found = _HEADER, [], []
    while place + _HEADER <= len(data):
        room = _BLOCK - place % _BLOCK
        if room < _HEADER:  # the rest of a block that no header fits in
            place += room
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        if place + _HEADER + length > len(data):  # W&B's own process is still writing it
            break
        parts.append(data[place + _HEADER : place + _HEADER + length])
        place += _HEADER + length
        if kind in (_FULL, _LAST):
            found.append(b"".join(parts))
            parts = []
        else:
            assert kind in (_FIRST, _MIDDLE)
    return found


def _items(items: Any) -> dict[str, Any]:
    """Keys and values; what came in parts, such as a table's path and size, as one dict."""
    found: dict[str, Any] = {}
    for item in items:
        first, *inner = item.nested_key or [item.key]
        value = json.loads(item.value_json)
        if inner:
            found.setdefault(first, {})[".".join(inner)] = value
        else:
            found[first] = value
    return found


def read_run(folder: Path, patience: float = 20.0) -> WandbRun:
    """The run in a folder ``offline-run-…``; W&B's own process may write its end a moment after it said so."""
    end = time.monotonic() + patience
    while not (found := _read(folder)).finished and time.monotonic() < end:
        time.sleep(0.1)
    return found


def _read(folder: Path) -> WandbRun:
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("run-*.wandb")
    found = WandbRun(folder=folder)
    for content in _records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(content)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found.run = record.run
            found.config |= _items(record.run.config.update)
        elif kind == "config":
            found.config |= _items(record.config.update)
        elif kind == "history":
            found.history.append(_items(record.history.item))
        elif kind == "summary":
            found.summary |= _items(record.summary.update)
        elif kind == "metric":
            name = record.metric.name or record.metric.glob_name
            if record.metric.step_metric:
                found.step_metrics[name] = record.metric.step_metric
            if record.metric.options.hidden:
                found.hidden.add(name)
        elif kind == "artifact":
            found.artifacts.append(record.artifact)
        elif kind == "exit":
            found.finished = True
    return found
