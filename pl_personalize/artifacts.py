"""Files of tensors and JSON, written atomically, and state dicts from files of other programs.

A file of tensors is a safetensors file with one metadata entry, a JSON object: ``kind``, ``version``, ``names`` (in
order), ``aliases``, ``metadata`` and ``sha256`` (of all of it). A single entry, because the order of several, and with
it the bytes of the file, differs between processes. Tied tensors are stored once. The module versions of a state dict
are in ``metadata`` under a reserved name, so that earlier releases can read the file.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from pl_personalize.functional.inert_pickle import InertFile
from pl_personalize.functional.names import some
from pl_personalize.functional.state_dicts import (
    NamedEntries,
    Versions,
    module_versions,
    shared_entries,
    with_versions,
)

_KEY = "pl_personalize"
_VERSION = 1
_FIELDS = {"kind", "version", "names", "aliases", "metadata", "sha256"}
_MODULES = "state_dict._metadata"
_EXPECTED = "a Lightning checkpoint, a state dict saved with torch.save, or a safetensors file"


class ArtifactError(ValueError):
    """A file is missing, broken, or not what was expected; the message names it."""


def write_atomically(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write a file, in a new folder if need be, so that it has either its old content or all of the new."""
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
    """Read a JSON file, or raise an :class:`ArtifactError` if it is missing or not valid JSON."""
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
    """Write named tensors to a safetensors file, atomically and with a checksum.

    Args:
        path: The file, by convention ``.safetensors``.
        tensors: The tensors, on any device. Tied tensors are stored once, and the module versions in a state dict's
            ``_metadata`` are stored with it.
        kind: The kind of content, checked when the file is opened.
        metadata: JSON-serializable metadata.

    Raises:
        ValueError: If an entry is not a tensor, or has a type that safetensors files cannot hold.
    """
    if others := [name for name, value in tensors.items() if not isinstance(value, Tensor)]:
        raise ValueError(
            f"The entries {some(others)} are not tensors, the only content of a safetensors file: leave them out, or "
            "save the state dict with torch.save."
        )
    aliases = shared_entries(tensors)
    unique = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items() if name not in aliases}
    content: dict[str, Any] = {
        "kind": kind,
        "version": _VERSION,
        "names": list(tensors),
        "aliases": aliases,
        "metadata": dict(metadata or {}),
    }
    if (versions := module_versions(tensors)) is not None:
        content["metadata"][_MODULES] = {
            module: {what: value for what, value in entry.items() if isinstance(value, str | int | float | None)}
            for module, entry in versions.items()
        }
    content["sha256"] = _checksum(content, unique)
    try:
        data = save(unique, {_KEY: json.dumps(content, sort_keys=True)})
    except KeyError as error:  # safetensors' error for an unknown type
        wrong = [name for name, value in unique.items() if value.dtype in error.args]
        raise ValueError(
            f"A safetensors file cannot hold {error.args[0]}: {some(wrong)}. Convert these entries, or leave them out."
        ) from error
    return write_atomically(path, data)


class _LazyTensors(NamedEntries[Tensor]):
    """The tensors of any safetensors file, read on access."""

    def __init__(self, file: Any) -> None:
        self._file, self._entries = file, {name: name for name in file.keys()}  # noqa: SIM118 (no mapping)
        self.aliases: dict[str, str] = {}

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(self._entries[name])
        return tensor


class TensorFile(_LazyTensors):
    """A file of :func:`save_tensors` whose tensors are read one at a time, on access.

    Args:
        path: The file.
        kind: The expected kind of content.

    Attributes:
        aliases: Tied entries, see :func:`~pl_personalize.functional.state_dicts.shared_entries`.
        metadata: The metadata that the file was written with.

    Raises:
        ArtifactError: If the file is missing, truncated, modified, of another program or of another kind.
    """

    def __init__(self, path: str | os.PathLike[str], *, kind: str) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ArtifactError(f"{path} does not exist; expected a file of kind {kind!r}.")
        file, content = _open(self.path)
        super().__init__(file)
        if not isinstance(content, dict) or content.keys() != _FIELDS:
            raise ArtifactError(f"{path} was not written by pl_personalize; expected a file of kind {kind!r}.")
        if content["kind"] != kind:
            raise ArtifactError(f"{path} holds {content['kind']!r}; expected {kind!r}.")
        if content["version"] != _VERSION:
            raise ArtifactError(f"{path} has format version {content['version']}; this release reads {_VERSION}.")
        self.metadata: dict[str, Any] = {n: v for n, v in content["metadata"].items() if n != _MODULES}
        self._metadata: Versions | None = content["metadata"].get(_MODULES)
        expected = content.pop("sha256")
        if (found := _checksum(content, _LazyTensors(file))) != expected:
            raise ArtifactError(
                f"{path} was modified after it was written: its content has the SHA-256 {found}; expected {expected}."
            )
        self.aliases = content["aliases"]
        self._entries = {name: self.aliases.get(name, name) for name in content["names"]}

    def load(self) -> dict[str, Tensor]:
        """Read all tensors into a state dict, in which tied entries are one tensor."""
        loaded = {name: self[name] for name in sorted(self) if name not in self.aliases}
        return with_versions({name: loaded[self.aliases.get(name, name)] for name in self}, module_versions(self))

    def __repr__(self) -> str:
        return f"TensorFile({str(self.path)!r}, {len(self)} tensors)"


def load_tensors(path: str | os.PathLike[str], *, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read all tensors and the metadata of a :class:`TensorFile`."""
    file = TensorFile(path, kind=kind)
    return file.load(), file.metadata


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the state dict in a Lightning checkpoint, a file of ``torch.save``, or a safetensors file.

    No code in the file is run. Hyperparameters and other objects beside the state dict can be of any class, even one
    that cannot be imported, and are ignored.

    The format is recognized by the content.

    Returns:
        A state dict with its ``_metadata``, on the CPU: tensors, and other entries (``_extra_state``) if they are plain
        data.

    Raises:
        ArtifactError: If the file is missing, broken, or has no state dict.
    """
    state = open_state_dict(path)
    if isinstance(state, TensorFile):
        state = state.load()
    # Not memory-mapped: the file may be overwritten, as a last checkpoint is, while its tensors are in use.
    return copy.deepcopy(with_versions(state, module_versions(state)))


def open_state_dict(path: str | os.PathLike[str], *, kind: str | None = None) -> Mapping[str, Any]:
    """Open a state dict as :func:`read_state_dict` does, but leave its tensors in the file until they are used.

    Many such files can be open at once, but they must not be modified. Only files in the format that ``torch.save`` had
    before PyTorch 1.6 are read as a whole. ``kind`` is the expected kind of a file of :func:`save_tensors`, by default
    anything but importances.
    """
    source = Path(path)
    if not source.is_file():
        what = "is a folder, such as that of a sharded checkpoint" if source.is_dir() else "does not exist"
        raise ArtifactError(f"{path} {what}; expected {_EXPECTED}.")
    with open(source, "rb") as start:
        is_safetensors = start.read(9)[8:] == b"{"
    if is_safetensors:
        file, content = _open(source)
        found = content.get("kind") if isinstance(content, dict) else None
        if found == "importance" != kind:
            raise ArtifactError(f"{path} holds {found!r}; expected {kind or _EXPECTED!r}.")
        return _LazyTensors(file) if found is None else TensorFile(path, kind=kind or str(found))
    try:
        inert = InertFile(source)
        state = inert.content
        if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
            state = state["state_dict"]
        problem = _no_state_dict(state, inert)
    except Exception as error:  # a broken file can make PyTorch's reader raise anything
        cause = error.__context__ if isinstance(error, UnpicklingError) and error.__context__ else error
        problem = f"cannot be read: {next(iter(str(cause).splitlines()), type(cause).__name__)}"
    if problem:
        raise ArtifactError(
            f"{path} {problem.removesuffix('.')}. Expected {_EXPECTED}. If you trust the file, load it with torch, and "
            "save its state dict only: torch.save(model.state_dict(), path)."
        )
    return state  # type: ignore[no-any-return]


def _no_state_dict(state: Any, file: InertFile) -> str:
    """Why an object is not a state dict; empty if it is one."""
    if not isinstance(state, Mapping):
        return f"holds an object of the class {file.inert_name(state) or type(state).__name__}, not a state dict"
    if state and not any(isinstance(value, Tensor) for value in state.values()):
        return f"holds no tensors but the entries {some(map(str, state))}"
    for name, value in state.items():
        if not isinstance(value, Tensor) and (found := file.inert_name((name, value))):
            return f"has an object of {found} in the entry {name!r} of its state dict, readable only by running code"
    return ""


def _open(path: Path) -> tuple[Any, Any]:
    """Open a safetensors file, and parse the metadata of :func:`save_tensors`."""
    try:
        file = safe_open(path, framework="pt")
        return file, json.loads((file.metadata() or {}).get(_KEY, "null"))
    except (SafetensorError, ValueError, OSError) as error:
        raise ArtifactError(f"{path} is not a readable safetensors file (truncated or damaged?): {error}") from error


def _checksum(content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the metadata and the tensors."""
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        if tensor.numel():
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
