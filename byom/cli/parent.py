"""The end of a launcher's processes with the command that started them."""

from __future__ import annotations

import os
import time
from functools import cache
from threading import Thread

COMMAND = "BYOM_COMMAND"
"""Variable through which the jobs of a launcher hear which process started the sweep."""
LOOK = 1.0  # seconds after which a job looks whether that process is still there


@cache
def end_with(command: str) -> None:
    """End this process when the command that started it is gone: joblib's go on after it was killed, and hold locks.

    Args:
        command: The number of its process; where this one was started by another, such as a cluster's, nothing is done.
    """
    if command == str(parent := os.getppid()):
        Thread(target=_watch, args=(parent,), name="byom-parent", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK)
    os._exit(1)
