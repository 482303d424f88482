"""The reader of W&B's files, on files of our own making: one that is still being written must not stop it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.wandb_file import read_run

pb2 = pytest.importorskip("wandb.proto.wandb_internal_pb2")


def _written(values: list[int]) -> bytes:
    """What W&B would write: a header, then each record with checksum, length and kind."""
    data = b":W&B\x00\x00\x00"
    for value in values:
        record = pb2.Record()
        record.history.item.add(key="step", value_json=str(value))
        content = record.SerializeToString()
        data += b"\0\0\0\0" + len(content).to_bytes(2, "little") + b"\x01" + content
    return data


@pytest.mark.parametrize("missing", [0, 1, 5, 12])
def test_a_file_is_read_to_its_last_whole_record(tmp_path: Path, missing: int) -> None:
    data = _written([1, 2, 3])
    (tmp_path / "run-x.wandb").write_bytes(data[: len(data) - missing])

    found = read_run(tmp_path, patience=0)

    assert not found.finished
    assert found.history == [{"step": step} for step in ([1, 2, 3] if missing == 0 else [1, 2])]
