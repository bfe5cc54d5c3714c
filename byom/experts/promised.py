"""Files that must have the bytes that their authors promised."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

from byom.errors import CheckpointError


def require_digest(path: Path, promised: str, what: str) -> None:
    """Refuse a file with another SHA-256.

    Args:
        path: The file.
        promised: Its hash in hexadecimal digits.
        what: Where it is from, for the message.

    Raises:
        CheckpointError: If it has another hash, or is a folder.
    """
    if not path.is_file():
        raise CheckpointError(f"{what} is not one file, so experts.sha256 cannot be compared; leave it out")
    state = path.stat()
    found = _digest(path.resolve(), state.st_size, state.st_mtime_ns)
    if found != promised.lower():
        raise CheckpointError(
            f"{what} has the SHA-256 {found[:16]}, and experts.sha256 promises {promised[:16]}: {path} was damaged, or "
            "its authors replaced it. Delete it and fetch it again; if it is meant to be another file, correct "
            "experts.sha256"
        )


@lru_cache(maxsize=64)
def _digest(path: Path, size: int, time: int) -> str:
    """Return a file's hash; size and time are here so that a changed file is read again."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
