"""A launcher's processes end with the command that started them, and with no other."""

import os
import threading

import pytest

from byom.cli import parent
from byom.cli.sweeps import shared


@pytest.fixture
def exits(monkeypatch):
    """Note with what this process would have ended, and let it look all the time."""
    found, ended = [], threading.Event()
    monkeypatch.setattr(parent, "LOOK", 0.001)
    monkeypatch.setattr(parent.os, "_exit", lambda status: (found.append(status), ended.set()))
    parent.end_with.cache_clear()
    yield found, ended
    parent.end_with.cache_clear()


def test_a_job_ends_when_the_command_is_gone(exits, monkeypatch):
    found, ended = exits
    numbers = iter([7, 7, 7])
    monkeypatch.setattr(parent.os, "getppid", lambda: next(numbers, 1))
    parent.end_with("7")
    assert ended.wait(5) and found == [1]


def test_a_process_that_the_command_did_not_start_does_not_end_with_it(exits, monkeypatch):
    found, _ = exits
    monkeypatch.setattr(parent.os, "getppid", lambda: 7)
    for command in ("", "8"):
        parent.end_with(command)
    assert not [thread for thread in threading.enumerate() if thread.name == "byom-parent"] and not found


def test_jobs_hear_of_the_command():
    assert f"++hydra.job.env_set.{parent.COMMAND}='{os.getpid()}'" in shared()
