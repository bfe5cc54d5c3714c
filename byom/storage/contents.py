"""Contents of files: digests of their bytes, remembered under all that a file system says of unchanged files."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from byom.errors import ByomError, DataError
from byom.storage.atomic import write_bytes

SETTLED = 2_000_000_000
"""Nanoseconds after which another change of a file gets another time; file systems count in up to 2 seconds."""
CHUNK = 1 << 20

Stamp = tuple[int, int, int, int]


def content_digest(
    folder: Path, files: Iterable[str], cache: Path | None = None, error: type[ByomError] = DataError
) -> str:
    """Return the SHA-256 over the sorted pairs (relative path, SHA-256 of the bytes).

    Args:
        folder: What `files` are relative to.
        files: Relative paths with forward slashes; repeats count once.
        cache: A digest is remembered here under the files' sizes, times and places on the disk, so that unchanged
            files are not read again. A copy over a file that keeps its size and time changes the others.
        error: What is raised.

    Returns:
        64 hexadecimal digits.

    Raises:
        ByomError: If a file is missing, of the kind that `error` says.
    """
    names = sorted(set(files))

    def digest() -> str:
        return _sha256(_lines((name, _hashed(folder / name, error)) for name in names))

    return remembered(folder, names, cache, digest, error)


def remembered(
    folder: Path,
    names: Sequence[str],
    cache: Path | None,
    compute: Callable[[], str],
    error: type[ByomError] = DataError,
    *,
    digits: int = 64,
) -> str:
    """Return what a function finds in files, from memory where the files did not change since it was found.

    Args:
        folder: What `names` are relative to.
        names: The files.
        cache: Where it is remembered; None computes it every time.
        compute: Reads the files.
        error: What is raised if a file is missing.
        digits: Length of what `compute` returns, which tells different functions of one file apart.

    Returns:
        Hexadecimal digits.
    """
    stamps = [_stamp(folder / name, error) for name in names]
    memo = None
    if cache is not None:
        kind = "" if digits == 64 else f"-{digits}"
        memo = Path(cache) / "data" / "digests" / f"{stamped(folder, names, error)}{kind}"
    known = memo.read_text(encoding="utf-8", errors="replace") if memo is not None and memo.is_file() else ""
    if re.fullmatch(rf"[0-9a-f]{{{digits}}}", known):  # and not the zeros that a crash of the system leaves
        return known
    start = time.time_ns()
    digest = compute()
    same = stamps == [_stamp(folder / name, error) for name in names]
    if memo is not None and same and all(_settled(stamp, start) for stamp in stamps):
        write_bytes(memo, digest.encode())
    return digest


def _stamp(path: Path, error: type[ByomError]) -> Stamp:
    try:
        stat = path.stat()
    except OSError as cause:
        raise _unreadable(path, cause, error) from cause
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def _settled(stamp: Stamp, start: int) -> bool:
    """Say whether a change that comes after `start` would be seen in the file's times."""
    _, modified, changed, _ = stamp
    return start - (max(modified, changed) if os.name == "nt" else changed) > SETTLED


def stamped(folder: Path, names: Iterable[str], error: type[ByomError] = DataError) -> str:
    """Return a digest of what a file system says of files, without reading them; see `content_digest`."""
    rows = ((name, *_stamp(folder / name, error)) for name in names)
    return _sha256(_lines([str(folder.resolve()), *rows]))


def _hashed(path: Path, error: type[ByomError]) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
    except OSError as cause:
        raise _unreadable(path, cause, error) from cause
    return digest.hexdigest()


def _unreadable(path: Path, cause: OSError, error: type[ByomError]) -> ByomError:
    kind = "data file" if error is DataError else "file"
    return error(f"the {kind} {path} cannot be read ({cause.strerror}); restore it or correct the path")


def _lines(values: Iterable) -> str:
    return "\n".join(json.dumps(value, ensure_ascii=False) for value in values)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()  # of names that are no UTF-8, too
