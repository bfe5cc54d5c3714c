"""A process that encodes: it reads chunks from its standard input and answers on its standard output.

The first message is a pickled `Filling`, each further one a chunk: first row and examples. Every answer is a pair:
whether it went well, and the checksums or the error. It ends with its parent, whose end closes its input.
"""

from __future__ import annotations

import os
import pickle
import sys
import traceback
from collections.abc import Callable
from typing import Any, BinaryIO

import torch

from byom.data.encode import Encode, Filling, encoding
from byom.data.workers import READY, NoWorkers


def run() -> None:
    """Answer on the standard output, whatever libraries print."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    answers.write(READY)
    torch.set_num_threads(1)
    serve(sys.stdin.buffer, answers)


def serve(source: BinaryIO, sink: BinaryIO) -> None:
    """Answer until the input ends."""
    held: list[tuple[Filling, Encode]] = []

    def prepare(content: bytes) -> None:
        filling = pickle.loads(content)
        held.append((filling, encoding(filling.encoder)))

    def fill(content: bytes) -> dict[str, str]:
        filling, encode = held[0]
        try:
            start, examples = pickle.loads(content)
        except Exception as error:  # of a class of the user's own script
            raise NoWorkers(f"{type(error).__name__}: {error}") from error
        return filling.fill(encode, start, examples)

    while True:
        try:
            content = pickle.load(source)
        except EOFError:
            return
        pickle.dump(answer(fill if held else prepare, content), sink)
        sink.flush()


def answer(work: Callable[[bytes], Any], content: bytes) -> tuple[bool, Any]:
    """Return what `work` returns, or what it raised in a form that every process can read."""
    try:
        return True, work(content)
    except BaseException as error:
        error.add_note(f"In a process of its own:\n{traceback.format_exc()}")
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            return False, RuntimeError(f"{type(error).__name__}: {error}")
        return False, error
