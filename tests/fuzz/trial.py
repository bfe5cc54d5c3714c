"""One damaged folder, brought to a door: the fault that it shows, if it shows one."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from byom.errors import ByomError
from tests.fuzz.doors import Door
from tests.fuzz.mutations import Files

SECONDS = 10.0
SPARE = 48 << 20
"""Bytes that a reader may take whatever the size of a file: its own objects, and the allocator's pages."""


class Hang(BaseException):
    """A reader has not come back."""


def trial(door: Door, files: Files, folder: Path) -> tuple[str, str] | None:
    """Bring a folder to a door.

    Args:
        door: The door.
        files: Names and contents.
        folder: Where they are written; what was there is removed.

    Returns:
        None if it was read rightly or refused by a sentence; otherwise the kind of fault, and where.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    limit = 2 * sum(map(len, files.values())) + SPARE
    try:
        with _in_time(), _in_memory(limit), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = door.enter(folder)
    except ByomError as error:
        return (
            None if str(folder) in str(error) or "base" in str(error) else ("a sentence without its file", str(error))
        )
    except Hang:
        return "hang", ""
    except _Large as error:
        return "memory", str(error)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "/byom/" in f.filename]
        return type(
            error
        ).__name__, f"{frames[-1].filename.rpartition('/byom/')[2]}:{frames[-1].lineno} {error}" if frames else str(
            error
        )
    return _compared(door, folder, found)


def _compared(door: Door, folder: Path, found: Mapping[str, Mapping[str, Tensor]]) -> tuple[str, str] | None:
    for road, state in found.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                expected = door.expected(folder, road)
        except Exception as error:
            return "read what another reader refuses", f"{road}: {type(error).__name__} {error}"
        if expected is None:
            continue
        if set(expected) != set(state):
            return "other tensors", f"{road}: {sorted(set(expected) ^ set(state))}"
        if wrong := [name for name in state if not _same(state[name], expected[name], exact=road != "adapter")]:
            return "a silently different tensor", f"{road}: {wrong}"
    return None


def _same(a: Tensor, b: Tensor, *, exact: bool) -> bool:
    if a.shape != b.shape or (exact and a.dtype != b.dtype):
        return False
    if not exact:
        return torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-4)
    if not a.numel():
        return True
    flat = [tensor.contiguous().reshape(-1).as_strided((tensor.numel(),), (1,)) for tensor in (a, b)]
    return torch.equal(*(tensor.view(torch.uint8) for tensor in flat))


@contextlib.contextmanager
def _in_time() -> Iterator[None]:
    def late(*_: Any) -> None:
        raise Hang

    before: Callable[..., Any] | int | None = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class _Large(Exception):
    pass


@contextlib.contextmanager
def _in_memory(limit: int) -> Iterator[None]:
    """Compare the peak of resident memory with what it was, where the system tells."""
    mark = Path("/proc/self/clear_refs")
    if not os.access(mark, os.W_OK):
        yield
        return
    mark.write_text("5", encoding="utf-8")
    before = _status("VmRSS")
    yield
    if (more := _status("VmHWM") - before) > limit:
        raise _Large(f"{more >> 20} MiB")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    return 0
