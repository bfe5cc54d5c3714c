"""Locks: whoever waited holds the lock too."""

import threading

import pytest
from filelock import FileLock, Timeout

from byom.pipeline.cached import free_first
from byom.storage import lock


def test_whoever_has_waited_holds_the_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 0.01)
    folder, begun, waited = tmp_path / "made", threading.Event(), threading.Event()

    def make():
        with lock.alone(folder):
            begun.set()
            waited.wait(5)

    class Told:
        def write(self, _):
            waited.set()

    other = threading.Thread(target=make)
    other.start()
    assert begun.wait(5)
    monkeypatch.setattr("sys.stderr", Told())
    with lock.alone(folder):
        other.join()
        with pytest.raises(Timeout):
            FileLock(tmp_path / ".made.lock").acquire(timeout=0)


def test_processes_that_lack_the_same_folders_make_different_ones(tmp_path):
    folders = {name: tmp_path / name for name in "abc"}
    assert not lock.held(folders["a"])
    with lock.alone(folders["a"]):
        assert lock.held(folders["a"]) and list(free_first(folders)) == ["b", "c", "a"]
    assert not lock.held(folders["a"]) and list(free_first(folders)) == ["a", "b", "c"]
