"""Locks: of several processes that share a cache, one makes a folder and the others wait for it."""

from __future__ import annotations

import os
import platform
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

DAY = 24 * 3600
PATIENCE = 3.0
"""Seconds after which a process says what it waits for."""


def owner() -> str:
    """Return what tells this process from every other that may write to the same disk."""
    return f"{_node()}-{os.getpid()}"


def _node() -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", platform.node())


def without_owner(folder: Path, start: str) -> list[Path]:
    """Return what is called `start` and then as `owner` says, of processes that are gone: what a kill left.

    Of another machine's processes nothing is known; theirs count as gone after a day.

    Args:
        folder: Where to look.
        start: How the names begin.
    """
    here, names = f"{_node()}-", (entry.name for entry in os.scandir(folder) if entry.name.startswith(start))
    left = [(folder / name, name.removeprefix(start)) for name in names]
    return [path for path, whose in left if _gone(path, whose.removeprefix(here), whose.startswith(here))]


def outlived(path: Path, end: str) -> bool:
    """Say whether a name ends as `owner` says, of a process that is gone; see `without_owner`.

    Args:
        path: The file or folder.
        end: The end of its name, after that of what the process made: its kind may stand before the owner.
    """
    whose = end.removeprefix("partial-").removeprefix("old-")
    here = f"{_node()}-"
    return _gone(path, whose.removeprefix(here), whose.startswith(here))


def _gone(path: Path, number: str, local: bool) -> bool:
    if not local:
        numbered = number.rpartition("-")[2].isdigit() and "-" in number
        return numbered and path.exists() and time.time() - path.lstat().st_mtime > DAY
    if not number.isdigit() or int(number) == os.getpid():
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except OSError:  # it runs, and is somebody else's
        pass
    return False


def held(folder: Path) -> bool:
    """Return whether some process holds the lock of a folder or file right now, without waiting for it."""
    if not (file := _file(folder)).is_file():
        return False
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


def _file(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder (or file) that several processes may want to make; the second one waits.

    The operating system drops the lock with the process that holds it, however that ends, so none is ever stale. Look
    again, inside the block, whether what you want is there: another process may have made it while you waited.

    Args:
        folder: What is going to be made; it need not exist. The lock is a hidden file next to it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(_file(folder))
    try:
        lock.acquire(timeout=PATIENCE)
    except Timeout:
        sys.stderr.write(f"byom: waiting for {folder} (another process makes it)\n")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
