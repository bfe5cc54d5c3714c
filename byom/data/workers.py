"""Processes that encode, each its own chunks: how they are started, fed, heard and ended.

They are commands of their own (`byom.data.worker`) and neither forks, which a library's threads may hang, nor
multiprocessing's, which would run the user's script again and outlive a parent that is killed.
"""

from __future__ import annotations

import os
import pickle
import queue
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from threading import Lock, Thread
from typing import Any

from byom.data.encode import Examples, Filling
from byom.errors import DataError

EACH = 600_000_000
"""Bytes of memory of a process: an interpreter with torch and the encoder's library, and about 0.1 GB of images."""

START = (
    "import pickle, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    "sys.path[:] = pickle.load(sys.stdin.buffer); from byom.data.worker import run; run()"
)
"""What each of them runs: with this process's search path, and interrupts left to this process. (``-P`` keeps files of
the folder that is worked in from standing for modules that this process finds elsewhere.)"""

READY = b"byom answers\n"
"""What a process says before its first answer; what was printed earlier, as some do while Python starts, is none."""

Chunk = tuple[int, int, Examples]  # number, first row, examples


class NoWorkers(Exception):
    """No process can be given this work, such as that of a class of the user's own script."""


def usable() -> int:
    """Return how many processes are worth it: one for each processor, with a quarter of the memory for all of them."""
    try:
        processors = len(os.sched_getaffinity(0))
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):  # not Linux
        return min(os.cpu_count() or 1, 4)
    return max(1, min(processors, memory // 4 // EACH))


def filled(
    filling: Filling, chunks: Sequence[int], take: Callable[[int], Chunk], count: int
) -> Generator[tuple[int, dict[str, str]]]:
    """Fill a draft by several processes, and yield chunks as they are done, with the checksums of their rows.

    Args:
        filling: What each process is given.
        chunks: Their numbers.
        take: Gives a chunk by number, with examples that can be pickled.
        count: How many processes.

    Raises:
        NoWorkers: If work cannot be handed to another process; what was not yielded is still to be done.
        DataError: If a process was killed.
        Exception: Whatever one of them raised.
    """
    try:
        first = pickle.dumps(sys.path) + pickle.dumps(pickle.dumps(filling))
    except Exception as error:
        raise NoWorkers(str(error)) from error
    left, lock = iter(chunks), Lock()

    def following() -> Chunk | None:
        with lock:
            number = next(left, None)
            return None if number is None else take(number)

    answers: queue.Queue[tuple[int, Any]] = queue.Queue()
    processes = [_Process() for _ in range(min(count, len(chunks)))]
    threads = [Thread(target=process.serve, args=(first, following, answers), daemon=True) for process in processes]
    try:
        _begun(processes)
        for thread in threads:
            thread.start()
        yield from _heard(answers, len(chunks), filling)
    finally:
        for process in processes:
            process.kill()
        for thread in threads:
            if thread.is_alive():  # its process has ended, and so does it
                thread.join()
        for process in processes:
            process.close()


def _begun(processes: Sequence[_Process]) -> None:
    """Start processes; a system that grants no more of them, or knows no interpreter, leaves the work to this one."""
    try:
        for process in processes:
            process.start()
    except OSError as error:
        raise NoWorkers(f"no process can be started: {error}") from error


def _heard(answers: queue.Queue[tuple[int, Any]], count: int, filling: Filling) -> Iterator[tuple[int, dict[str, str]]]:
    for _ in range(count):
        number, said = _next(answers)
        if isinstance(said, _Ended):
            raise DataError(
                f"a process that encodes {filling.path} {said}; what is finished is kept, run the same command to go on"
            )
        if isinstance(said, BaseException):
            raise said
        yield number, said


def _next(answers: queue.Queue[tuple[int, Any]]) -> tuple[int, Any]:
    while True:
        try:
            return answers.get(timeout=1)  # Windows hears of no interrupt while it waits for ever
        except queue.Empty:
            continue


def _pickled(chunk: Chunk) -> bytes:
    """Return what a process is sent of a chunk.

    Raises:
        NoWorkers: If its examples cannot be sent; encoding them here says which one is damaged, if any is.
    """
    try:
        return pickle.dumps(pickle.dumps(chunk[1:]))
    except Exception as error:
        raise NoWorkers(f"{type(error).__name__}: {error}") from error


class _Ended(Exception):
    """A process ended without an answer."""


class _Process:
    """A process and what is said to it."""

    def __init__(self) -> None:
        self._running: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it."""
        alone = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._running = subprocess.Popen(
            [sys.executable, "-P", "-c", START], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | alone
        )

    def serve(self, first: bytes, following: Callable[[], Chunk | None], answers: queue.Queue[tuple[int, Any]]) -> None:
        """Hand it chunk after chunk, and pass its answers on; for a thread of its own."""
        number = -1
        try:
            self._begin(first)
            while (chunk := following()) is not None:
                number = chunk[0]
                found, said = self._asked(_pickled(chunk))
                answers.put((number, said))
                if not found:
                    return
        except BaseException as error:
            answers.put((number, error))

    def _begin(self, first: bytes) -> None:
        try:
            found, said = self._asked(first, READY)
        except _Ended as error:
            raise NoWorkers(f"a process {error}") from error
        if not found:
            raise NoWorkers(f"{type(said).__name__}: {said}") from said

    def _asked(self, message: bytes, after: bytes = b"") -> tuple[bool, Any]:
        """Return the answer to a message, and pass over the lines up to one that ends in `after`."""
        running = self._running
        assert running is not None and running.stdin is not None and running.stdout is not None
        try:
            running.stdin.write(message)
            running.stdin.flush()
            while after and not running.stdout.readline().endswith(after):
                if running.poll() is not None:
                    raise EOFError
            return pickle.load(running.stdout)
        except (EOFError, OSError) as error:
            status = running.wait()
            raise _Ended(
                f"was killed by signal {-status}, most often because memory ran out"
                if status < 0
                else f"ended with status {status}"
            ) from error

    def kill(self) -> None:
        """End it, whatever it does."""
        if self._running is not None:
            self._running.kill()

    def close(self) -> None:
        """Wait for its end, and let go of what led to it."""
        if self._running is not None:
            self._running.wait()
            for pipe in (self._running.stdin, self._running.stdout):
                if pipe is not None:
                    with suppress(OSError):  # of what it was never sent
                        pipe.close()
