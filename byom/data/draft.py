"""A split that is being encoded: a file whose rows are filled in by chunks, and a journal of the chunks that are there.

Several processes fill one draft, each at its own places, and what a kill leaves is gone on with. The draft is a
safetensors file from the start; it takes its place when every chunk is there.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from byom.data.split import LABELS, digest_of
from byom.errors import DataError
from byom.storage.atomic import unwritten, write_bytes
from byom.storage.streamed import Spec, header, ordered
from byom.storage.tensor_files import CODES, size

ROWS = 256
"""Rows of a chunk: what a kill costs each process."""
READ = 1 << 22
"""Bytes of a draft that are looked at together."""
UNKNOWN = "0" * 16  # what the header says before the fingerprint is known


@dataclass(frozen=True)
class Column:
    """The place of a tensor's rows in a file.

    Args:
        offset: Place of the first byte.
        shape: Of a row.
        dtype: Of the values.
    """

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def stride(self) -> int:
        """Bytes of a row."""
        return size(self.shape, self.dtype)


def put(file: BinaryIO, columns: Mapping[str, Column], start: int, rows: Mapping[str, Tensor]) -> dict[str, bytes]:
    """Write rows at their places.

    Args:
        file: A draft that is open for writing.
        columns: Name to the place of its rows.
        start: Place of the first row.
        rows: Name to tensor of as many rows for every column.

    Returns:
        Name to the bytes that were written.

    Raises:
        DataError: If the rows are not what the draft was made for.
    """
    found = {name: (tuple(value.shape[1:]), value.dtype) for name, value in rows.items()}
    if found != (wanted := {name: (column.shape, column.dtype) for name, column in columns.items()}):
        raise DataError(f"the encoder made rows of {found}, where the first example gave {wanted}")
    written = {}
    for name, value in rows.items():
        content = _bytes(value)
        file.seek(columns[name].offset + start * columns[name].stride)
        file.write(content)
        written[name] = content
    return written


def _bytes(value: Tensor) -> bytes:
    flat = value.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


class Draft:
    """A draft and its journal, in a hidden folder next to the file that it becomes; for one process at a time.

    Args:
        path: The file.
        key: What the split is made of; what was left under another key is begun anew.
        labels: ``[N]``.
        rows: Gives name to shape of a row and dtype, of what is encoded; a draft of others is begun anew.
    """

    def __init__(self, path: Path, key: str, labels: Tensor, rows: Callable[[], dict[str, Spec]]) -> None:
        self.path, self.key, self.labels = path, key, labels
        self.folder = work_folder(path)
        self.file = self.folder / "rows.safetensors"
        self.journal = self.folder / "journal.jsonl"
        lines = list(_lines(self.journal))
        found = rows()
        begun = bool(lines) and lines[0] == self._first(found) and self.file.is_file()
        with writing(path):
            self._open(found, lines[1:] if begun else None)

    def _first(self, found: Mapping[str, Spec]) -> dict[str, Any]:
        """Return the first line of the journal, which says what is encoded."""
        rows = {name: [list(shape), CODES[dtype]] for name, (shape, dtype) in found.items()}
        return {"key": self.key, "rows": rows}

    def _open(self, found: dict[str, Spec], noted: list[dict[str, Any]] | None) -> None:
        """Open the draft for rows of some shapes and dtypes; anew where nothing was noted of it."""
        self._specs = ordered(
            {name: ((len(self.labels), *shape), dtype) for name, (shape, dtype) in found.items()}
            | {LABELS: (tuple(self.labels.shape), self.labels.dtype)}
        )
        start, places = header(self._specs, {"fingerprint": UNKNOWN})
        self.columns = {name: Column(places[name], *found[name]) for name in found}
        self._size = len(start) + sum(size(*spec) for spec in self._specs.values())
        if noted is None:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._require_room()
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.file.open("r+b" if self.file.exists() else "w+b") as file:
            file.truncate(self._size)
            file.write(start)
            file.seek(places[LABELS])
            file.write(_bytes(self.labels))
        self.done: dict[int, dict[str, str]] = {
            line["chunk"]: line["crc32"] for line in noted or () if self._holds(line)
        }
        kept = [{"chunk": chunk, "crc32": sums} for chunk, sums in self.done.items()]
        write_bytes(self.journal, "".join(f"{json.dumps(line)}\n" for line in [self._first(found), *kept]).encode())

    @property
    def chunks(self) -> int:
        """The number of chunks, there or not."""
        return (len(self.labels) + ROWS - 1) // ROWS

    def missing(self) -> list[int]:
        """Return the chunks that are not there."""
        return [chunk for chunk in range(self.chunks) if chunk not in self.done]

    def note(self, chunk: int, sums: dict[str, str]) -> None:
        """Note that a chunk is on the disk, with the checksums of its rows."""
        with writing(self.path), self.journal.open("ab") as journal:
            journal.write(f"{json.dumps({'chunk': chunk, 'crc32': sums})}\n".encode())
            journal.flush()
            os.fsync(journal.fileno())
        self.done[chunk] = sums

    def finish(self) -> None:
        """Compute the fingerprint, put it into the header, and let the draft take its place."""
        with writing(self.path):
            with safe_open(self.file, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            found = digest_of(tensors)
            del tensors  # Windows moves no file that is mapped
            with self.file.open("r+b") as file:
                file.write(header(self._specs, {"fingerprint": found})[0])
                file.flush()
                os.fsync(file.fileno())
            self.file.replace(self.path)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _holds(self, line: Mapping[str, Any]) -> bool:
        """Say whether the rows of a chunk are those that the journal notes."""
        chunk, sums = line.get("chunk"), line.get("crc32")
        if not isinstance(chunk, int) or not 0 <= chunk < self.chunks or not isinstance(sums, dict):
            return False
        rows = min(ROWS, len(self.labels) - chunk * ROWS)
        with self.file.open("rb") as file:
            return sums == {name: _crc32(file, column, chunk * ROWS, rows) for name, column in self.columns.items()}

    def _require_room(self) -> None:
        """Refuse a disk that is too full now, not after hours."""
        above = next(folder for folder in self.folder.parents if folder.is_dir())
        taken = 0
        with suppress(OSError, AttributeError):  # Windows says nothing of blocks
            taken = self.file.stat().st_blocks * 512
        free = shutil.disk_usage(above).free
        if self._size - taken > free:
            raise OSError(errno.ENOSPC, f"it takes {self._size / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say of what the system refuses that this file cannot be written."""
    try:
        yield
    except OSError as error:
        raise unwritten(path, error) from error


def work_folder(path: Path) -> Path:
    """Return where the draft of a file lies."""
    return path.with_name(f".{path.name}.encoding")


def _crc32(file: BinaryIO, column: Column, start: int, rows: int) -> str:
    file.seek(column.offset + start * column.stride)
    left, found = rows * column.stride, 0
    while left and (content := file.read(min(READ, left))):
        found, left = zlib.crc32(content, found), left - len(content)
    return f"{found:08x}"


def _lines(journal: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a journal up to the first that a kill or a crash cut."""
    try:
        text = journal.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            return
        if not isinstance(value, dict):
            return
        yield value
