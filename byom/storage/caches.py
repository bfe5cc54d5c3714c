"""The cache on disk: how large each part of it is, what nothing needs any more, and how it is removed.

Only what bears a name that byom gives is looked at, and folders only where all their files do, so that nothing else
goes with it, whatever folder is named as the cache; and nothing goes that a running process holds the lock of, nor what
runs may read while one is under way.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from filelock import FileLock, Timeout

from byom.errors import ByomError, CheckpointError
from byom.storage.lock import outlived, owner
from byom.storage.tensor_files import read_header

FOLDER = r"[0-9a-f]{12}"
KINDS = {
    "data": ("encoded splits", r"[0-9a-f]{16}-(train|validation|test|shots)\.safetensors|digests"),
    "experts": ("models fine-tuned here", FOLDER),
    "joint": ("models fine-tuned on several tasks", FOLDER),
    "heads": ("heads", rf"{FOLDER}\.safetensors"),
    "statistics": ("statistics of experts", FOLDER),
    "merged": ("merged models", FOLDER),
    "served": ("what variants trained", FOLDER),
    "tuning": ("searches over hyperparameters", rf"{FOLDER}\.json"),
    "hits": ("scores of each example", FOLDER),
    "scores": ("scores of experts", rf"{FOLDER}-[a-z]+(-[a-z0-9]+)?\.json"),
    "cuts": ("cuts of sparse variants", r"[0-9a-f]{16}\.json"),
    "preview": ("scores of previews", rf"{FOLDER}\.json"),
}
"""Kind to what it holds, and to the names that byom gives there."""
NOTES = {"experts": "training.json", "joint": "training.json", "statistics": "cost.json"}
"""The file that is written last into a folder: without it the folder is made again."""
BESIDE = ("merged", "served")  # their note lies next to the folder
WEIGHTS = r"(?:adapter_)?model(?:-\d+-of-\d+)?\.safetensors(?:\.index\.json)?"
OWN = {
    "data": r"[0-9a-f]{64}(?:-\d+)?",
    "experts": rf"{WEIGHTS}|adapter_config\.json|training\.json",
    "joint": rf"{WEIGHTS}|adapter_config\.json|training\.json",
    "statistics": rf"values/{WEIGHTS}|values\.safetensors|cost\.json",
    "merged": WEIGHTS,
    "served": rf"(?:reference|base)/{WEIGHTS}|[^/]+\.safetensors|bundle\.json|heads/[^/]+/head\.safetensors",
    "hits": r"[^/]+\.json",
}
"""Kind to the names of the files in its folders, below them; a folder with any other file is not byom's."""
RUNNING = "running"
"""The folder in which every cell holds a lock while it runs."""
TRAINING, COST, LOCK, ENCODING = ".training", ".cost.json", ".lock", ".encoding"


@dataclass(frozen=True)
class Entry:
    """One thing in the cache.

    Args:
        kind: Which of `KINDS`.
        path: The file or folder.
        beside: A note that belongs to it.
        made: The name of what a process makes while it needs this; its lock says whether one does.
        why: Why nothing needs it; empty where something may.
    """

    kind: str
    path: Path
    beside: tuple[Path, ...] = ()
    made: str = ""
    why: str = ""

    @cached_property
    def files(self) -> list[os.stat_result]:
        """What the system says of every file."""
        return [found for path in (self.path, *self.beside) for found in _stats(path)]

    @property
    def bytes(self) -> int:
        """Bytes of its files."""
        return sum(file.st_size for file in self.files)

    @property
    def used(self) -> float:
        """When it was last written or read, as far as the file system notes it; 0 if it just went."""
        return max((max(file.st_mtime, file.st_atime) for file in self.files), default=0.0)


def entries(cache: Path, kind: str) -> list[Entry]:
    """Return what a part of the cache holds, what is left over included."""
    folder = cache / kind
    if not folder.is_dir():
        return []
    names = sorted(path.name for path in folder.iterdir())
    return [entry for name in names if (entry := _entry(folder, kind, name))]


def leftovers(cache: Path) -> list[Entry]:
    """Return what nothing needs: what killed runs left, and what is damaged and would be made again."""
    return [entry for kind in KINDS for entry in entries(cache, kind) if entry.why and not held(entry)]


def held(entry: Entry) -> bool:
    """Say whether a running process makes or goes on with this."""
    folder = entry.path.parent
    if entry.kind in ("statistics", "cuts"):  # those of one expert, or to one reference, are made under one lock
        return _any_locked(folder)
    return _locked(folder / f".{entry.made}{LOCK}")


def busy(cache: Path) -> bool:
    """Say whether any cell is running, which may read whatever is whole."""
    return _any_locked(cache / RUNNING)


def _any_locked(folder: Path) -> bool:
    return folder.is_dir() and any(_locked(path) for path in folder.iterdir() if path.name.endswith(LOCK))


def require_inside(cache: Path, entry: Entry) -> None:
    """Refuse what a link puts outside of the cache.

    Raises:
        CheckpointError: Naming the folder.
    """
    folder = entry.path.parent
    if folder.resolve().parent != cache.resolve():
        raise CheckpointError(f"{folder} leads out of the cache {cache}, and nothing there is removed; clean it there")


def remove(cache: Path, entry: Entry) -> bool:
    """Remove something from the cache, and say whether that was done: not if a process holds its lock.

    Raises:
        CheckpointError: If it lies outside of the cache, or the system refuses.
    """
    require_inside(cache, entry)
    if held(entry):
        return False
    try:
        with _claimed(entry.path.parent / f".{entry.made}{LOCK}") as ours:
            for path in (*entry.beside, entry.path) if ours else ():  # without its note a folder counts for nothing
                _delete(path)
    except OSError as error:
        raise CheckpointError(f"cannot remove {entry.path}: {error}") from error
    return ours


def _entry(folder: Path, kind: str, name: str) -> Entry | None:
    """Return what a name stands for; None of what byom did not write, of locks, and of what belongs to another name."""
    path, pattern = folder / name, KINDS[kind][1]
    if name.startswith("."):
        return _hidden(path, kind)
    stem = name.removesuffix(TRAINING).removesuffix(COST)
    if not re.fullmatch(pattern, stem) or not _own(path, kind):
        return None
    if name.endswith(TRAINING):
        return Entry(kind, path, made=stem, why="the state of training that was stopped")
    if name.endswith(COST):
        whole = (folder / stem).exists()
        return None if whole else Entry(kind, path, made=stem, why="a note on what is gone")
    note = folder / f"{name}{COST}"
    return Entry(kind, path, (note,) if note.is_file() else (), name, _incomplete(path, kind))


def _own(path: Path, kind: str) -> bool:
    """Say whether all files of a folder have names that byom gives there; links to folders are not followed."""
    if path.is_symlink() or not path.is_dir() or path.name.endswith(TRAINING):
        return True
    names = (
        Path(above) / name for above, folders, files in os.walk(path) for name in (*files, *_links(above, folders))
    )
    own = OWN.get(kind, "")
    return all(re.fullmatch(rf"{own}|\.(?:{own})\..+", name.relative_to(path).as_posix()) for name in names)


def _links(above: str, folders: list[str]) -> list[str]:
    return [name for name in folders if (Path(above) / name).is_symlink()]


def _hidden(path: Path, kind: str) -> Entry | None:
    pattern = KINDS[kind][1]
    if path.name.endswith(ENCODING) and re.fullmatch(pattern, made := path.name[1:].removesuffix(ENCODING)):
        return Entry(kind, path, made=made, why="a split of which encoding was stopped")
    beside = f"(?:{re.escape(COST)})?"
    if (begun := re.match(rf"\.({pattern}){beside}\.", path.name)) and outlived(path, path.name[begun.end() :]):
        return Entry(kind, path, made=begun[1], why="the draft of a process that is gone")
    return None


def _incomplete(path: Path, kind: str) -> str:
    """Say why something does not count as made; empty if it does."""
    if kind in NOTES and not (path / NOTES[kind]).is_file():
        return "a folder that was not finished"
    if kind in BESIDE and not path.with_name(f"{path.name}{COST}").is_file():
        return "a folder that was not finished"
    readers: dict[str, Callable[[Path], object]] = {".safetensors": read_header, ".json": _parsed}
    try:
        if path.is_file():
            readers[path.suffix](path)
    except (ByomError, OSError, ValueError):
        return "a damaged file"
    return ""


def _parsed(path: Path) -> object:
    return json.loads(path.read_text(encoding="utf-8"))


def _stats(path: Path) -> Iterator[os.stat_result]:
    """Yield what the system says of the files below a path; links are counted, and not followed."""
    try:
        if path.is_symlink() or not path.is_dir():
            yield path.lstat()
            return
        for above, _, names in os.walk(path):
            for name in names:
                yield (Path(above) / name).lstat()
    except FileNotFoundError:  # another process was faster
        return


def _locked(lock: Path) -> bool:
    with _claimed(lock) as ours:
        return not ours


@contextmanager
def _claimed(lock: Path) -> Iterator[bool]:
    """Hold a lock if nobody does, and say so; one that was never made is held by nobody."""
    if not lock.is_file():
        yield True
        return
    handle = FileLock(lock)
    try:
        handle.acquire(timeout=0)
    except (Timeout, OSError, NotImplementedError):
        yield False
        return
    try:
        yield True
    finally:
        handle.release()


def _delete(path: Path) -> None:
    """Delete a file, or a folder, which loses its name first: what is left of it if that fails counts for nothing."""
    if path.is_dir() and not path.is_symlink():
        gone = path if path.name.startswith(".") else path.with_name(f".{path.name}.old-{owner()}")
        shutil.rmtree(path.rename(gone))
    else:
        path.unlink(missing_ok=True)
