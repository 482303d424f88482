"""Location of a callback's result, shared with the process that launched the others."""

from __future__ import annotations

import torch


class ResultSlot:
    """Mark of a run and path of its file, in memory shared with spawned and forked processes.

    Lightning does not return callbacks from processes that it spawns or forks (``ddp_spawn``, notebooks).

    Example:
        >>> slot = ResultSlot()
        >>> slot.path is None
        True
        >>> slot.write("run-1", "importances/mas.safetensors")
        >>> slot.mark, slot.path
        ('run-1', 'importances/mas.safetensors')
    """

    def __init__(self) -> None:
        self._bytes = torch.zeros(2**13, dtype=torch.uint8)
        self._bytes.share_memory_()  # type: ignore[no-untyped-call]

    def write(self, mark: str, path: str | None) -> None:
        """Store the mark of a run and its file; ``None`` if it wrote none."""
        data = f"{mark}\0{path or ''}\0".encode()
        if len(data) > len(self._bytes):
            raise ValueError(f"The path of {len(data)} bytes is too long: {path}.")
        self._bytes[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)

    @property
    def mark(self) -> str | None:
        """Mark of the last run; ``None`` before the first."""
        return self._read()[0] or None

    @property
    def path(self) -> str | None:
        """File of the last run, if it wrote one."""
        return self._read()[1] or None

    def _read(self) -> list[str]:
        return bytes(self._bytes.tolist()).decode(errors="replace").split("\0")[:2]
