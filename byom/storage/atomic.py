"""Writing that is all or nothing: a reader sees the old file or folder or the new one, never a part."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from byom.errors import CheckpointError
from byom.storage.lock import owner, without_owner

HERE, EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux

TRIES, PAUSE = 20, 0.05


@contextmanager
def drafted(path: Path, *, settled: bool = False) -> Iterator[Path]:
    """Give a draft next to `path` that takes its place when the block ends well, and vanishes otherwise.

    Args:
        path: The file; missing folders are made.
        settled: Whether the draft is given the mode that the umask asks for and is on the disk before it takes the
            place: for large files, and for writers that choose a mode themselves.

    Yields:
        The draft's path.

    Raises:
        CheckpointError: If it cannot be written, such as on a full disk.
    """
    draft = path.with_name(f".{path.name}.{owner()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        clear(path, "")
        yield draft
        if settled:
            with draft.open("r+b") as handle:  # Windows writes nothing out through a handle that only reads
                os.fsync(handle.fileno())
            umask = os.umask(0)
            os.umask(umask)
            draft.chmod(0o666 & ~umask)
        _put(draft, path)
    except (OSError, SafetensorError) as error:
        raise unwritten(path, error) from error
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)


def _put(draft: Path, path: Path) -> None:
    """Move a draft to its place; Windows refuses that for as long as another process has the old file open."""
    for _ in range(TRIES if os.name == "nt" else 0):
        try:
            draft.replace(path)
            return
        except PermissionError:
            time.sleep(PAUSE)
    draft.replace(path)


def write_bytes(path: Path, content: bytes) -> Path:
    """Write a file, and return its path."""
    with drafted(path) as draft:
        draft.write_bytes(content)
    return path


def write_text(path: Path, text: str) -> Path:
    """Write a text file in UTF-8 with Unix line ends, and return its path."""
    return write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> Path:
    """Write JSON with sorted keys, and return the file's path."""
    return write_text(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def require_own(folder: Path, own: Callable[[Path], bool]) -> None:
    """Refuse to replace a folder with files of other people's, or the one that is worked in; see `replacing`.

    Raises:
        CheckpointError: Naming some of the files, or the folder.
    """
    folder = folder.resolve()
    foreign = [f.name for f in folder.rglob("*") if f.is_file() and not own(f)] if folder.is_dir() else []
    if foreign or folder.is_file():
        raise CheckpointError(
            f"{folder} holds files that byom did not write ({', '.join(foreign[:3]) or 'it is a file'}) "
            "and would lose them; choose a new folder"
        )
    if Path.cwd().is_relative_to(folder):
        raise CheckpointError(
            f"{folder} is the folder that you work in, or one above it, and is replaced as a whole; name a new one"
        )


@contextmanager
def replacing(folder: Path, own: Callable[[Path], bool]) -> Iterator[Path]:
    """Give a scratch folder that takes the place of `folder` when the block ends well, and vanishes otherwise.

    Args:
        folder: The folder to create or replace.
        own: Says which files of an earlier folder the caller wrote; with any other file in it nothing is replaced.

    Yields:
        The scratch folder, next to it.

    Raises:
        CheckpointError: If the folder holds other files or its parent cannot be written.
    """
    require_own(folder, own)
    folder = folder.resolve()  # what a link points at is replaced, and the link stays
    partial = folder.with_name(f".{folder.name}.partial-{owner()}")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # left by a killed process that had this number
        partial.mkdir(parents=True)
        clear(folder, "partial-")
        yield partial
        _swap(partial, folder)
        clear(folder, "old-")
    except (OSError, SafetensorError) as error:
        raise unwritten(folder, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def clear(path: Path, kind: str) -> None:
    """Remove what killed processes left next to a file or folder.

    Args:
        path: The file or folder.
        kind: What stands between its name and the process's.
    """
    for left in without_owner(path.parent, f".{path.name}.{kind}"):
        clear(left, kind)  # a draft of a draft lies next to it
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def unwritten(path: Path, error: Exception) -> CheckpointError:
    """Return the error that says why a file or folder cannot be written, and what to do about it."""
    return CheckpointError(f"cannot write {path}: {error}. Free space or choose another folder")


def _swap(partial: Path, folder: Path) -> None:
    """Put a folder in the place of another, in one step where the system can, so that no kill falls in between."""
    if not folder.exists() or not _exchanged(partial, folder):
        _moved(partial, folder)


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange two folders in one step, and say whether that could be done."""
    try:
        exchange = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # not Linux
        return False
    return exchange(HERE, os.fsencode(one), HERE, os.fsencode(other), EXCHANGE) == 0


def _moved(partial: Path, folder: Path) -> None:
    old = folder.with_name(f".{folder.name}.old-{owner()}")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.replace(old)
    try:
        partial.replace(folder)
    except OSError:
        if old.exists():
            old.replace(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
