"""Locks: of several processes that share a cache, one makes a folder and the others wait for it."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

PATIENCE = 3.0
"""Seconds after which a process says what it waits for."""


def owner() -> str:
    """Return what tells this process from every other that may write to the same disk."""
    return f"{re.sub(r'[^A-Za-z0-9._-]', '_', platform.node())}-{os.getpid()}"


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder (or file) that several processes may want to make; the second one waits.

    The operating system drops the lock with the process that holds it, however that ends, so none is ever stale. Look
    again, inside the block, whether what you want is there: another process may have made it while you waited.

    Args:
        folder: What is going to be made; it need not exist. The lock is a hidden file next to it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(timeout=PATIENCE)
    except Timeout:
        sys.stderr.write(f"byom: waiting for {folder} (another process makes it)\n")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
