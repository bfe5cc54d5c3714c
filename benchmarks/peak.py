"""Seconds and peak memory of a piece of work, measured from outside in a fresh process.

Memory is anonymous memory (`RssAnon` of /proc): what was allocated. Pages of memory-mapped checkpoints are the
operating system's cache of files and do not count. It is sampled every `INTERVAL` seconds, so that a peak that is
shorter than that can be missed; touching 10 MB takes about as long.
"""

from __future__ import annotations

import gc
import multiprocessing
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

INTERVAL = 0.005
Report = Callable[[float], None]  # takes the fraction of the work that is done


@dataclass(frozen=True)
class Taken:
    """Time and memory that a piece of work took.

    Args:
        seconds: Its time; the limit where it was stopped there.
        peak: Anonymous memory in bytes at its highest, less that of the interpreter before the work.
        done: Fraction that was done, below 1 where the work was stopped.
        said: What the work returned.
    """

    seconds: float
    peak: int
    done: float = 1.0
    said: Mapping[str, Any] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """True where it came to its end."""
        return self.done == 1.0


def measured(work: Callable[..., Mapping[str, Any]], *arguments: Any, threads: int, limit: float) -> Taken:
    """Run a piece of work in a fresh interpreter with torch imported.

    Args:
        work: A function of a module, called with the arguments and then with a `Report`; it returns JSON.
        arguments: What can be pickled.
        threads: Threads of torch.
        limit: Seconds after which it is stopped.

    Returns:
        What it took.

    Raises:
        RuntimeError: If the work failed; its own message has been printed by its process.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_work, args=(theirs, threads, work, arguments))
    child.start()
    theirs.close()
    try:
        return _watched(child, ours, limit)
    except EOFError as error:
        child.join()
        raise RuntimeError(f"{work.__name__}{arguments} ended with status {child.exitcode}; see above") from error
    finally:
        child.kill()
        child.join()


def _watched(child: BaseProcess, messages: Connection, limit: float) -> Taken:
    floor = messages.recv()
    start, peak, done = time.perf_counter(), floor, 0.0
    while (spent := time.perf_counter() - start) < limit:
        if messages.poll(INTERVAL):
            message = messages.recv()
            if isinstance(message, Taken):
                return Taken(message.seconds, max(peak, message.peak) - floor, said=message.said)
            done = message
        peak = max(peak, anonymous(child.pid))
    return Taken(spent, peak - floor, min(done, 0.999))


def _work(messages: Connection, threads: int, work: Callable[..., Mapping[str, Any]], arguments: tuple) -> None:
    import torch

    torch.set_num_threads(threads)
    gc.collect()
    messages.send(anonymous())
    start = time.perf_counter()
    said = work(*arguments, messages.send)
    messages.send(Taken(time.perf_counter() - start, anonymous(), said=said))


def anonymous(pid: int | None = None) -> int:
    """Return a process's anonymous memory in bytes; 0 if it has just ended."""
    try:
        text = Path(f"/proc/{pid or 'self'}/status").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((1024 * int(line.split()[1]) for line in text.splitlines() if line.startswith("RssAnon")), 0)
