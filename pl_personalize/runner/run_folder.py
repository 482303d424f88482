"""A run's folder: what was asked for, what is finished, and the files of each finished stage."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pl_personalize.artifacts import ArtifactError, file_checksum, read_json, write_json

# Of what stages do: it goes up when the same options come to another result, so that no old stage passes for a new one.
_VERSION = 2


@dataclass
class Stage:
    """A finished piece of work.

    Attributes:
        artifacts: Files that it made, relative to the folder, each with its SHA-256.
        result: What it found, as JSON.
    """

    artifacts: dict[str, str] = field(default_factory=dict)
    result: Any = None


class RunFolder:
    """Finished stages of an experiment, on disk, so that the same command run again goes on where it was.

    Args:
        path: The folder; it is made if it is missing.
        options: What the results depend on. A folder that was begun with other options is refused.

    Raises:
        ArtifactError: If the folder's manifest is damaged, or was made with other options or by another version.
    """

    def __init__(self, path: str | os.PathLike[str], options: Mapping[str, Any]) -> None:
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise ArtifactError(f"{path} is a file; a run needs a folder.")
        self.path.mkdir(parents=True, exist_ok=True)
        self._manifest = self.path / "manifest.json"
        self.options: dict[str, Any] = json.loads(json.dumps(options))
        self._stages: dict[str, Stage] = {}
        self._verified: set[str] = set()
        if self._manifest.exists():
            self._read()
        else:
            self._write()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Work in the folder alone.

        Raises:
            ArtifactError: If another process works in it.
        """
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise ArtifactError(
                f"Another process works in {self.path}; wait for it, or choose another folder."
            ) from error
        try:
            yield
        finally:
            lock.release()

    @property
    def metrics_file(self) -> Path:
        """Every logged metric, one JSON object a line."""
        return self.path / "metrics.jsonl"

    def finished(self, stage: str) -> Stage | None:
        """The stage, if it is finished and its files are what they were; else ``None``."""
        found = self._stages.get(stage)
        if found is None:
            return None
        if stage not in self._verified:
            for name, checksum in found.artifacts.items():
                if not (self.path / name).is_file() or file_checksum(self.path / name) != checksum:
                    return None
            self._verified.add(stage)
        return found

    def finish(self, stage: str, *, artifacts: Sequence[Path] = (), result: Any = None) -> Stage:
        """Record a stage as finished."""
        done = Stage({str(path.relative_to(self.path)): file_checksum(path) for path in artifacts}, result)
        self._stages[stage] = done
        self._verified.add(stage)
        self._write()
        return done

    def checksums(self, paths: Sequence[Path]) -> dict[str, str]:
        """The SHA-256 of files that finished stages made, by their names in the folder.

        Raises:
            KeyError: If no finished stage made such a file.
        """
        known = {name: checksum for stage in self._stages.values() for name, checksum in stage.artifacts.items()}
        return {name: known[name] for name in (str(path.relative_to(self.path)) for path in paths)}

    def _read(self) -> None:
        content = read_json(self._manifest)
        try:
            options, stages = content["options"], content["stages"]
            self._stages = {name: Stage(stage["artifacts"], stage["result"]) for name, stage in stages.items()}
        except (KeyError, TypeError) as error:
            raise ArtifactError(f"{self._manifest} is no manifest of a run: {error!r} is missing.") from error
        if (version := content.get("version", 1)) != _VERSION:
            raise ArtifactError(
                f"{self.path} holds a run of version {version}; stages of this release, version {_VERSION}, come to "
                "other results. Choose another folder, or remove this one."
            )
        keys = sorted(options.keys() | self.options.keys())
        if different := [key for key in keys if options.get(key) != self.options.get(key)]:
            changes = ", ".join(
                f"{key}: {options.get(key)!r} there, {self.options.get(key)!r} now" for key in different
            )
            raise ArtifactError(
                f"{self.path} holds a run with other options ({changes}). Choose another folder, or remove this one."
            )

    def _write(self) -> None:
        stages = {name: {"artifacts": stage.artifacts, "result": stage.result} for name, stage in self._stages.items()}
        write_json(self._manifest, {"version": _VERSION, "options": self.options, "stages": stages})
