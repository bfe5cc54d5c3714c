"""One safetensors file, written tensor by tensor: while one is checked and written, the next is computed."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from byom.errors import CheckpointError
from byom.storage.atomic import drafted
from byom.storage.tensor_files import CODES, crc32, size, unheld

Spec = tuple[tuple[int, ...], torch.dtype]
Progress = Callable[[int], None]  # takes the bytes of a tensor that has been written

WAITING = 1 << 28  # bytes that may wait for the disk, or one tensor where it is larger
FLUSHED = 1 << 28  # bytes after which the disk is waited for: at the end of a file little is left to wait for
UNKNOWN = "0" * 8  # what the header says of a tensor whose checksum is not known yet


def write_streamed(
    path: Path,
    specs: Mapping[str, Spec],
    read: Callable[[str], Tensor],
    notes: Mapping[str, Any],
    progress: Progress | None = None,
) -> None:
    """Write one safetensors file with checksums and notes, atomically, holding few of its tensors at a time.

    The bytes are those of safetensors' own writer: its order, by type and then by name, and its header.

    Args:
        path: The file; replaced only when the new one is complete.
        specs: Name to shape and dtype.
        read: Gives one tensor by name, and is called once for each.
        notes: JSON metadata stored next to the checksums.
        progress: Called with the bytes of each tensor that has been written, in the caller's thread.

    Raises:
        CheckpointError: If it cannot be written, or a tensor is not what `specs` says.
    """
    names = list(ordered(specs))
    with drafted(path, settled=True) as draft, draft.open("wb") as file:
        file.write(_header(names, specs, notes, dict.fromkeys(names, UNKNOWN)))
        sums = _write_tensors(_Sink(file), names, specs, read, progress or (lambda _: None))
        file.seek(0)
        file.write(_header(names, specs, notes, sums))


@dataclass
class _Sink:
    """The end of a file, whose tensors are written in the order in which they are given."""

    file: BinaryIO
    sums: dict[str, str] = field(default_factory=dict)
    unsettled: int = 0

    def put(self, name: str, tensor: Tensor) -> int:
        """Append a tensor, note its checksum, and return its size in bytes."""
        tensor = tensor.detach().cpu().contiguous()
        self.sums[name] = crc32(tensor)
        if tensor.numel():
            self.file.write(tensor.reshape(-1).as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy().data)
        self.unsettled += tensor.nbytes
        if self.unsettled >= FLUSHED:
            self.file.flush()
            os.fsync(self.file.fileno())
            self.unsettled = 0
        return tensor.nbytes


def _write_tensors(
    sink: _Sink, names: list[str], specs: Mapping[str, Spec], read: Callable[[str], Tensor], progress: Progress
) -> dict[str, str]:
    """Compute the tensors in this thread and write them in another, which is never far behind; return checksums."""
    waiting: deque[tuple[Future[int], int]] = deque()
    with ThreadPoolExecutor(max_workers=1) as writer:
        try:
            for name in names:
                while waiting and sum(nbytes for _, nbytes in waiting) + size(*specs[name]) > WAITING:
                    progress(waiting.popleft()[0].result())
                waiting.append((writer.submit(sink.put, name, _declared(name, specs[name], read)), size(*specs[name])))
            while waiting:
                progress(waiting.popleft()[0].result())
        finally:
            writer.shutdown(cancel_futures=True)
    return sink.sums


def _declared(name: str, spec: Spec, read: Callable[[str], Tensor]) -> Tensor:
    tensor = read(name)
    if (tuple(tensor.shape), tensor.dtype) != (tuple(spec[0]), spec[1]):
        raise CheckpointError(
            f"tensor '{name}' came out as {tuple(tensor.shape)} of {tensor.dtype}, where {tuple(spec[0])} of {spec[1]} "
            "was announced. Make what computes it return the announced shape"
        )
    return tensor


def _header(names: list[str], specs: Mapping[str, Spec], notes: Mapping[str, Any], sums: Mapping[str, str]) -> bytes:
    """Return the table of contents, whose length does not depend on the checksums."""
    said = json.dumps({**notes, "crc32": dict(sums)}, sort_keys=True)
    return header({name: specs[name] for name in names}, {"byom": said, "format": "pt"})[0]


def ordered(specs: Mapping[str, Spec]) -> dict[str, Spec]:
    """Return shapes and dtypes in the order in which safetensors' own writer lays tensors out: by type, then by name.

    Raises:
        CheckpointError: If a dtype is one that safetensors do not hold.
    """
    for name, (_, dtype) in specs.items():
        if dtype not in CODES:
            raise unheld(name, dtype)
    return {name: specs[name] for name in sorted(specs, key=lambda name: (_RANKS[specs[name][1]], name))}


def header(specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """Return how a safetensors file begins, as safetensors' own writer has it, and where its tensors begin.

    Args:
        specs: Name to shape and dtype, in the order of the file; see `ordered`.
        metadata: What the header says besides the tensors.

    Returns:
        The first bytes of the file, and name to the place of a tensor's first byte in the file.
    """
    table: dict[str, Any] = {"__metadata__": dict(metadata)}
    places: dict[str, int] = {}
    start = 0
    for name, (shape, dtype) in specs.items():
        end = start + size(shape, dtype)
        table[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        places[name], start = start, end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    begin = len(text).to_bytes(8, "little") + text
    return begin, {name: len(begin) + place for name, place in places.items()}


_ORDER = (
    "U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16", "F8_E5M2FNUZ", "F8_E4M3FNUZ",
    "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL",
)  # fmt: skip
_RANKS = {dtype: _ORDER.index(code) for dtype, code in CODES.items()}
