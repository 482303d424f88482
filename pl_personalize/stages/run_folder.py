"""A run's folder: what was asked for, what is finished, and the files of each finished stage."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pl_personalize.artifacts import ArtifactError, file_checksum, read_json, write_json

# Of what stages do: it goes up when the same options come to another result, so that no old stage passes for a new one.
_VERSION = 3
_MANIFEST = "manifest.json"
_GROUPS = ("method.", "adaptation.")  # beginnings of the options of methods and adaptations
# What a run writes, and another program's files must not be replaced by: loggers' folders have names of their own.
_WRITTEN = (
    *("results.csv", "results.md", "comparisons.csv", "metrics.jsonl", "figures"),
    *("checkpoints", "importances", "merged", "adapted", "csv", "tensorboard"),
)
_OF_A_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}
_WAY_OUT = "Choose another folder with output_dir (--output_dir), or let this one be read and written."


def refuse_folder(path: Path) -> None:
    """Refuse a folder that no run can begin or go on in; nothing is made.

    Raises:
        ArtifactError: If the path is a file or below one, the folder has files of another program and no manifest of a
            run, or it has no manifest and cannot be written.
    """
    try:
        if path.exists() and not path.is_dir():
            raise ArtifactError(f"{path} is a file; a run needs a folder. Choose another one with output_dir.")
        if (path / _MANIFEST).exists():
            return
        there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            what = "cannot be written" if there.is_dir() else "is a file"
            raise ArtifactError(f"The folder {path} of a run cannot be made or written: {there} {what}. {_WAY_OUT}")
        if path.exists() and (foreign := sorted({entry.name for entry in path.iterdir()} & {*_WRITTEN})):
            raise ArtifactError(
                f"{path} has {' and '.join(foreign)}, and no {_MANIFEST} of a run: another program wrote them. They "
                "would be replaced: choose another folder with output_dir, or remove them."
            )
    except OSError as error:
        raise ArtifactError(f"The folder {path} of a run cannot be read: {error}. {_WAY_OUT}") from error


def check_writable(path: Path, option: str) -> None:
    """See that files can be written to a folder, which may have to be made; nothing is left there.

    Args:
        path: The folder.
        option: What it was given as.

    Raises:
        ArtifactError: If it cannot be made or written.
    """
    try:
        with tempfile.TemporaryFile(dir=next(one for one in (path, *path.absolute().parents) if one.exists())):
            pass
    except OSError as error:
        raise ArtifactError(f"{option}: {path} cannot be made or written: {error}. Choose another folder.") from error


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
    """Finished stages of an experiment, on disk, so that the same command run again resumes.

    Args:
        path: The folder; it is made if it is missing.
        options: What the results depend on. A folder that was begun with other options is refused.

    Raises:
        ArtifactError: If the folder's manifest is damaged, or was made with other options or by another version; if
            there is none and the folder cannot be made or written, or has files of another program.
    """

    def __init__(self, path: str | os.PathLike[str], options: Mapping[str, Any]) -> None:
        self.path = Path(path)
        refuse_folder(self.path)
        self._manifest = self.path / _MANIFEST
        self.options: dict[str, Any] = json.loads(json.dumps(options))
        self._stages: dict[str, Stage] = {}
        self._verified: set[str] = set()
        with self.explained():
            if self._manifest.exists():
                self._read()
            else:
                self.path.mkdir(parents=True, exist_ok=True)
                self._write()

    @contextmanager
    def locked(self) -> Iterator[bool]:
        """Work in the folder alone; gives whether it can be written.

        One that cannot be needs no lock, and is left untouched: a finished run may be read there.

        Raises:
            ArtifactError: If another process works in it, or the file system has no locks.
        """
        lock = FileLock(self.path / ".lock")
        try:
            with tempfile.TemporaryFile(dir=self.path):  # also where the lock's file could be written, and others not
                lock.acquire(timeout=0)
            writable = True
        except Timeout as error:
            raise ArtifactError(
                f"Another process works in {self.path}; wait for it, or choose another folder."
            ) from error
        except NotImplementedError as error:
            raise ArtifactError(f"{self.path} cannot be locked: {error} {_WAY_OUT}") from error
        except OSError:
            writable = False
        try:
            yield writable
        finally:
            lock.release()

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Say in one line which file of the folder cannot be read or written.

        Raises:
            ArtifactError: For an error of the operating system that is about the folder, or about a disk.
        """
        try:
            yield
        except OSError as error:
            name = error.filename
            here = isinstance(name, str | bytes | os.PathLike) and self._has(Path(os.fsdecode(name)))
            if not here and (name is not None or error.errno not in _OF_A_DISK):
                raise
            raise ArtifactError(f"{self.path} cannot be read or written: {error}. {_WAY_OUT}") from error

    def _has(self, file: Path) -> bool:
        return Path(os.path.abspath(file)).is_relative_to(os.path.abspath(self.path))

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

    def finished_below(self, prefix: str) -> list[str]:
        """Names of the finished stages that begin with a prefix, in the order in which they were finished."""
        return [name for name in self._stages if name.startswith(prefix)]

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
        # Those of methods and adaptations that are new to the folder are added.
        later = {key for key in options.keys() ^ self.options.keys() if key.startswith(_GROUPS)}
        keys = sorted((options.keys() | self.options.keys()) - later)
        if different := [key for key in keys if options.get(key) != self.options.get(key)]:
            changes = ", ".join(
                f"{key}: {options.get(key)!r} there, {self.options.get(key)!r} now" for key in different
            )
            raise ArtifactError(
                f"{self.path} holds a run with other options ({changes}). Choose another folder, or remove this one."
            )
        self.options = {**options, **self.options}

    def _write(self) -> None:
        stages = {name: {"artifacts": stage.artifacts, "result": stage.result} for name, stage in self._stages.items()}
        write_json(self._manifest, {"version": _VERSION, "options": self.options, "stages": stages})
