"""Safetensors on disk: lazy reading with checksums, writing that is all or nothing."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from byom.errors import CheckpointError
from byom.storage import foreign
from byom.storage.atomic import drafted
from byom.storage.folder import PYTORCH, SAFETENSORS, indexed, parsed, require_agreement
from byom.storage.quantised import DEQUANTISED

INDEX, SINGLE = SAFETENSORS.index_file, SAFETENSORS.single_file
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "C64": torch.complex64,
}  # fmt: skip
"""Types that are read. Of the others, F4 and F6 pack several values into a byte, and F8_E8M0 holds scales of blocks."""
CODES = {dtype: code for code, dtype in DTYPES.items()}


def crc32(tensor: Tensor) -> str:
    """Return the CRC-32 of a tensor's bytes in row-major order, as 8 hexadecimal digits."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    flat = flat.as_strided((flat.numel(),), (1,))  # of one value, a stride of any size counts as contiguous
    return f"{zlib.crc32(flat.view(torch.uint8).numpy().data) if flat.numel() else 0:08x}"


def digest(value: Any) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def size(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Return a tensor's size in bytes."""
    return torch.Size(shape).numel() * dtype.itemsize


class TensorFiles:
    """One safetensors file, or a folder of shards, opened without reading any tensor."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.specs: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self.ties: dict[str, str] = {}
        self._handles: dict[str, Any] = {}
        self._recorded: dict[str, str] = {}
        self._verified: set[str] = set()
        self._verifying = Lock()
        if (path / INDEX).is_file():
            places = indexed(path, SAFETENSORS)
            held = [(name, shard) for shard in sorted(set(places.values())) for name in self._add(path / shard)]
            require_agreement(path / INDEX, places, held)
        else:
            self._add(_file(path))
        if lost := sorted(set(self.ties.values()) - set(self.specs)):
            raise _damaged(path, f"its notes tie tensors to {lost[0]}, which it lacks")

    def read(self, name: str) -> Tensor:
        """Return one tensor; the first read of a tensor with a recorded checksum verifies it."""
        try:
            tensor = self._handles[name].get_tensor(name)
        except SafetensorError as error:
            raise _damaged(self.path, str(error)) from error
        if name in self._recorded and name not in self._verified:
            self._verify(name, tensor)
        return tensor

    def checksum(self, name: str) -> str:
        """Return the recorded checksum of a tensor, or compute it, once."""
        if name not in self._recorded:
            self._recorded[name] = crc32(self.read(name))
            self._verified.add(name)
        return self._recorded[name]

    def _verify(self, name: str, tensor: Tensor) -> None:
        with self._verifying:  # of several threads that read a model, one computes a checksum
            if name in self._verified:
                return
            if crc32(tensor) != self._recorded[name]:
                raise _damaged(self.path, f"tensor '{name}' does not match its checksum")
            self._verified.add(name)

    def _add(self, file: Path) -> list[str]:
        """Open a file, and return its tensors' names."""
        with _readable(file):
            _require_names_once(file)
            handle = safe_open(file, framework="pt")
        names = list(handle.keys())
        for name in names:
            part = handle.get_slice(name)
            self.specs[name] = (tuple(part.get_shape()), _dtype(file, name, part.get_dtype()))
            self._handles[name] = handle
        notes = _notes(file, handle)
        self.ties |= _table(file, notes, "ties", set(names))
        self._recorded |= _table(file, notes, "crc32")
        return names


def write_file(
    path: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, Any], header: Mapping[str, str] | None = None
) -> None:
    """Write one safetensors file with checksums and notes, atomically and with the umask's permissions.

    Args:
        path: The file; replaced only when the new one is complete.
        tensors: Name to tensor.
        notes: JSON metadata stored next to the checksums.
        header: Further entries of the file's header, for readers of other formats.
    """
    tensors = _apart(tensors)
    for name, tensor in tensors.items():
        if tensor.dtype not in CODES:
            raise unheld(name, tensor.dtype)
    notes = dict(notes) | {"crc32": {name: crc32(tensor) for name, tensor in tensors.items()}}
    with drafted(path, settled=True) as draft:  # safetensors writes 0600, which a shared cache cannot use
        metadata = {**(header or {}), "format": "pt", "byom": json.dumps(notes, sort_keys=True)}
        save_file(tensors, draft, metadata=metadata)


def read_header(path: Path) -> dict[str, str]:
    """Return all entries of a safetensors file's header that are not its tensors."""
    with _readable(path), safe_open(path, framework="pt") as handle:
        return handle.metadata() or {}


def unheld(name: str, dtype: torch.dtype) -> CheckpointError:
    """Return the error about a tensor of a type that safetensors do not hold."""
    return CheckpointError(f"tensor '{name}' is of {dtype}, which safetensors do not hold. Cast it first")


def read_notes(path: Path) -> dict[str, Any]:
    """Return the notes that `write_file` stored in a safetensors file."""
    with _readable(path), safe_open(path, framework="pt") as handle:
        return _notes(path, handle)


def written(*names: str) -> Callable[[Path], bool]:
    """Return what tells files that byom wrote: tensors with its notes, their index, and files of some names.

    Args:
        names: Names of the files that the caller writes next to tensors.
    """
    return lambda file: bool(read_notes(file)) if file.suffix == ".safetensors" else file.name in {INDEX, *names}


def _file(path: Path) -> Path:
    """Return the one file that a path stands for."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(foreign.missing(path))
    if any((path / name).is_file() for name in (foreign.ADAPTER, foreign.BUNDLE)):
        raise CheckpointError(foreign.unclear(path, (".safetensors",)))
    if (path / SINGLE).is_file():
        return path / SINGLE
    files = sorted(path.glob("*.safetensors"))
    others = [path / name for name in (PYTORCH.single_file, PYTORCH.index_file)]  # what transformers would read
    unsure = len(files) != 1 or foreign.is_shard(files[0].name) or not files[0].is_file()
    if unsure or any(other.is_file() for other in others):
        raise CheckpointError(foreign.unclear(path, (".safetensors",)))
    return files[0]


def _require_names_once(file: Path) -> None:
    """Refuse a table with a name twice, of which every reader takes one or the other."""
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if length <= file.stat().st_size:  # if not, opening the file says so
            parsed(handle.read(length).decode())


def _dtype(file: Path, name: str, stored: str) -> torch.dtype:
    if stored not in DTYPES:
        raise CheckpointError(
            f"{file}: tensor '{name}' has the type {stored}, in which models are quantised (MXFP4, MXFP8 and their "
            "kin) "
            f"and not merged. {DEQUANTISED}"
        )
    return DTYPES[stored]


def _notes(file: Path, handle: Any) -> dict[str, Any]:
    try:
        notes = parsed((handle.metadata() or {}).get("byom", "{}"))
    except ValueError as error:
        raise _damaged(file, f"its notes are no JSON: {error}") from error
    if not isinstance(notes, dict):
        raise _damaged(file, "its notes are no table")
    return notes


def _table(file: Path, notes: Mapping[str, Any], key: str, tensors: set[str] | None = None) -> dict[str, str]:
    """Return an entry of the notes: names and texts; where `tensors` are given, other names of these."""
    table = notes.get(key, {})
    fits = isinstance(table, dict) and all(isinstance(value, str) for value in table.values())
    if not fits or (tensors is not None and (table.keys() & tensors)):
        raise _damaged(file, f"its notes have {key}={str(table)[:60]}")
    return table


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        raise CheckpointError(
            f"{file} cannot be read ({error.strerror}). Give yourself the right to read it"
        ) from error
    except (SafetensorError, OSError, ValueError) as error:
        if why := foreign.misplaced(file):
            raise CheckpointError(f"{file} {why}") from error
        if foreign.is_pickle(file):
            raise CheckpointError(
                f"{file} is PyTorch's own file, not safetensors. Read it with {foreign.READ}"
            ) from error
        raise _damaged(file, str(error)) from error


def _damaged(path: Path, why: str, what: str = "a safetensors file") -> CheckpointError:
    return CheckpointError(f"{path} is damaged or not {what} ({why}). Delete it and make or fetch it again")


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy what overlaps another tensor, which safetensors refuses to write; not what merely shares a mapped file."""
    apart = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    end = 0
    for name, tensor in sorted(apart.items(), key=lambda item: item[1].data_ptr()):
        if tensor.data_ptr() < end:
            apart[name] = tensor.clone()
        end = max(end, tensor.data_ptr() + tensor.nbytes)
    return apart
