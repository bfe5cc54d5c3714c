"""Manifests: the files that byom wrote into a folder, so that it is replaced only where nobody changed it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

LARGE = 100 << 20
"""Bytes from which a file is known by its size alone."""


def noted(folder: Path, name: str, notes: Mapping[str, Any]) -> None:
    """Write notes as JSON, with the list of all other files of the folder.

    Args:
        folder: The folder, complete but for this file.
        name: The file's name.
        notes: What else it says.
    """
    files = {f.relative_to(folder).as_posix(): _mark(f) for f in sorted(folder.rglob("*")) if f.is_file()}
    text = json.dumps({**notes, "files": files}, indent=1, ensure_ascii=False) + "\n"
    (folder / name).write_text(text, encoding="utf-8")


def own(folder: Path, name: str) -> Callable[[Path], bool]:
    """Return what tells the files that `noted` listed, and that nobody changed since, from all others.

    Args:
        folder: The folder; without a manifest none of its files is byom's.
        name: The manifest's name.
    """
    root = folder.resolve()
    try:
        files = dict(json.loads((root / name).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        files = {}

    def is_own(path: Path) -> bool:
        relative = path.relative_to(root).as_posix()
        return (relative == name and bool(files)) or (relative in files and files[relative] == _mark(path))

    return is_own


def _mark(file: Path) -> str:
    """Return a small file's digest, and the size of weights, which have checksums of their own."""
    size = file.stat().st_size
    if file.suffix == ".safetensors" or size > LARGE:
        return f"{size} bytes"
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]
