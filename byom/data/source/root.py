"""The folder a source reads from, and the digest that says whether its files are still the same."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from byom.errors import DataError
from byom.storage.atomic import write_bytes


class Root(ABC):
    """A folder with data in it, wherever it came from."""

    @abstractmethod
    def folder(self) -> Path:
        """Return the folder.

        Raises:
            DataError: If it is not there; the message names the remedy.
        """

    @abstractmethod
    def digest(self, files: Iterable[str], cache: Path | None = None) -> str:
        """Return the content digest of `files` and check it against what was promised, if anything was.

        Args:
            files: Paths relative to the folder, with forward slashes.
            cache: Where the digest of unchanged files is remembered; None computes it every time.

        Returns:
            64 hexadecimal digits.

        Raises:
            DataError: If a file is missing or not the one that was promised.
        """


@dataclass(frozen=True)
class Folder(Root):
    """A folder of the user's own; a result's signature covers what is in it, not where it lies.

    Args:
        path: The folder; ``~`` is expanded.
    """

    path: str = field(metadata={"signature": False})

    def folder(self) -> Path:
        """Return the folder, or raise DataError if it does not exist."""
        folder = Path(self.path).expanduser()
        if not folder.is_dir():
            raise DataError(f"the data folder {folder} does not exist; set `root` to the folder that holds the data")
        return folder

    def digest(self, files: Iterable[str], cache: Path | None = None) -> str:
        """Return the content digest of `files`; see `Root.digest`."""
        return content_digest(self.folder(), files, cache)


def promised_digest(folder: Path, files: Iterable[str], cache: Path | None, sha256: str, remedy: str) -> str:
    """Return the content digest of `files`, which must be `sha256` unless that is empty.

    Raises:
        DataError: If it is another one, so that a file was altered, lost or added; the message ends with `remedy`.
    """
    digest = content_digest(folder, files, cache)
    if sha256 and digest != sha256:
        raise DataError(
            f"the data files in {folder} are not the published ones "
            f"(sha256 {digest[:16]}, expected {sha256[:16]}); {remedy}"
        )
    return digest


def content_digest(folder: Path, files: Iterable[str], cache: Path | None = None) -> str:
    """Return the SHA-256 over the sorted pairs (relative path, SHA-256 of the bytes).

    Args:
        folder: What `files` are relative to.
        files: Relative paths with forward slashes; repeats count once.
        cache: A digest is remembered here under the files' sizes and modification times, so that an unchanged
            data set is not read again.

    Returns:
        64 hexadecimal digits.

    Raises:
        DataError: If a file is missing.
    """
    names = sorted(set(files))
    memo = None if cache is None else Path(cache) / "data" / "digests" / _stamp(folder, names)
    known = memo.read_text() if memo is not None and memo.is_file() else ""
    if len(known) == 64:
        return known
    digest = _sha256(_lines((name, hashlib.sha256(_bytes(folder / name)).hexdigest()) for name in names))
    if memo is not None:
        write_bytes(memo, digest.encode())
    return digest


def _stamp(folder: Path, names: list[str]) -> str:
    stats = ((name, (folder / name)) for name in names)
    return _sha256(_lines([str(folder.resolve()), *((name, *_size_and_time(path)) for name, path in stats)]))


def _size_and_time(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except OSError as error:
        raise _unreadable(path, error) from error
    return stat.st_size, stat.st_mtime_ns


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"the data file {path} cannot be read ({error.strerror}); restore it or correct the path")


def _lines(values: Iterable) -> str:
    return "\n".join(json.dumps(value, ensure_ascii=False) for value in values)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
