"""What the project writes to disk: tensors as safetensors with checked metadata, and JSON. Written whole or not at all.

A file has one metadata entry, a JSON object: ``kind``, ``version``, ``names`` (in order), ``aliases``, ``metadata`` and
``sha256`` (of all of it). One entry, because the order of several differs from process to process, and with it the
bytes of the file. Tensors that are the same storage are stored once and come back as one.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

_KEY = "pl_personalize"
_VERSION = 1
_FIELDS = {"kind", "version", "names", "aliases", "metadata", "sha256"}


class ArtifactError(ValueError):
    """A file is missing, broken, or not what was expected; the message names it."""


def write_atomically(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write ``data`` so that ``path`` holds either what it held before, or all of it.

    Args:
        path: Where to; missing folders are made.
        data: The bytes.

    Returns:
        The path.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return target


def write_json(path: str | os.PathLike[str], value: Any) -> Path:
    """Write ``value`` as indented JSON, atomically."""
    return write_atomically(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file.

    Raises:
        ArtifactError: If it is missing or not JSON.
    """
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read as JSON: {error}") from error


def file_checksum(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensor_checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of named tensors on any device: names, types, shapes and values."""
    return _checksum({}, {name: tensor.detach().cpu() for name, tensor in tensors.items()})


def save_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    *,
    kind: str,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write named tensors as a safetensors file of ours.

    Args:
        path: Where to; ``.safetensors`` by custom.
        tensors: The tensors, on any device. Names that are one storage (tied weights) are stored once.
        kind: What they are, checked when the file is opened.
        metadata: Anything that JSON can hold.

    Returns:
        The path.
    """
    aliases = shared_entries(tensors)
    unique = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items() if name not in aliases}
    content = {
        "kind": kind,
        "version": _VERSION,
        "names": list(tensors),
        "aliases": aliases,
        "metadata": dict(metadata or {}),
    }
    content["sha256"] = _checksum(content, unique)
    return write_atomically(path, save(unique, {_KEY: json.dumps(content, sort_keys=True)}))


def shared_entries(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The entries that are the same storage as an earlier one (tied weights), each with that one's name.

    A mapping that reads its tensors from a file knows this itself, as its attribute ``aliases``.
    """
    known: dict[str, str] | None = getattr(tensors, "aliases", None)
    if known is not None:
        return known
    first: dict[Any, str] = {}
    shared: dict[str, str] = {}
    for name, tensor in tensors.items():
        if tensor.numel() == 0:
            continue
        storage = tensor.untyped_storage().data_ptr()
        key = (tensor.device, storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if key in first:
            shared[name] = first[key]
        else:
            first[key] = name
    return shared


class TensorFile(Mapping[str, Tensor]):
    """A safetensors file of ours, its tensors read one by one when asked for.

    Args:
        path: The file.
        kind: What it must hold.
        verify: Compare the checksum (reads the whole file once, one tensor at a time).

    Raises:
        ArtifactError: If the file is missing, truncated, changed, not ours or of another kind.
    """

    def __init__(self, path: str | os.PathLike[str], *, kind: str, verify: bool = True) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ArtifactError(f"{path} does not exist; expected a file of kind {kind!r}.")
        try:
            self._file = safe_open(self.path, framework="pt")
            content = json.loads((self._file.metadata() or {}).get(_KEY, "null"))
            self._names = set(self._file.keys())
        except (SafetensorError, ValueError, OSError) as error:
            raise ArtifactError(f"{path} is no readable safetensors file (truncated or damaged?): {error}") from error
        if not isinstance(content, dict) or content.keys() != _FIELDS:
            raise ArtifactError(f"{path} was not written by pl_personalize; expected a file of kind {kind!r}.")
        if content["kind"] != kind:
            raise ArtifactError(f"{path} holds {content['kind']!r}; expected {kind!r}.")
        if content["version"] != _VERSION:
            raise ArtifactError(f"{path} has format version {content['version']}; this release reads {_VERSION}.")
        self._order: list[str] = content["names"]
        self.aliases: dict[str, str] = content["aliases"]
        self.metadata: dict[str, Any] = content["metadata"]
        if not verify:
            return
        expected = content.pop("sha256")
        if (found := _checksum(content, _Lazy(self._file, self._names))) != expected:
            raise ArtifactError(
                f"{path} was changed after it was written: the SHA-256 of its content is {found}, expected {expected}."
            )

    def __getitem__(self, name: str) -> Tensor:
        target = self.aliases.get(name, name)
        if target not in self._names:
            raise KeyError(name)
        tensor: Tensor = self._file.get_tensor(target)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._order)

    def __len__(self) -> int:
        return len(self._order)

    def load(self) -> dict[str, Tensor]:
        """All tensors in memory; names that were one storage are one again."""
        loaded = {name: self._file.get_tensor(name) for name in sorted(self._names)}
        return {name: loaded[self.aliases.get(name, name)] for name in self}

    def __repr__(self) -> str:
        return f"TensorFile({str(self.path)!r}, {len(self)} tensors)"


def load_tensors(path: str | os.PathLike[str], *, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read all tensors and the metadata of a file of ours.

    Raises:
        ArtifactError: As :class:`TensorFile` does.
    """
    file = TensorFile(path, kind=kind)
    return file.load(), file.metadata


class _Lazy(Mapping[str, Tensor]):
    def __init__(self, file: Any, names: set[str]) -> None:
        self._file, self._names = file, names

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _checksum(content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the tensors and of what is said about them."""
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        if tensor.numel():
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """TEMPORARY."""
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True)["state_dict"])
    except Exception as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error
