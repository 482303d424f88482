"""Pieces of work, and the files that they make."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from pl_personalize.stages.run_folder import Stage


class RunFile(NamedTuple):
    """A file of a run: its kind (``experts``, ``importances``, …), its path, and the files that it was made of."""

    kind: str
    path: Path
    sources: Sequence[Path]


class Work(NamedTuple):
    """A stage that may have to be done: its name, the function that does it, and where it keeps checkpoints."""

    name: str
    run: Callable[[], Stage]
    checkpoints: Path | None = None

    @property
    def kind(self) -> str:
        """``train``, ``importance``, ``merge``, ``adapt`` or ``test``."""
        return self.name.split("/")[2]
