"""Other systems, by simulation: no module of POSIX alone, units of memory, handles, alphabets, names of files."""

from __future__ import annotations

import ast
import importlib.util
import io
import os
import sys
from functools import cache
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace

import pytest

import byom
from byom import __main__ as command
from byom.cli import config
from byom.data.source.images import ImageFolder
from byom.data.source.table import Table
from byom.data.suite import Suite, Task
from byom.errors import CheckpointError, OptionError
from byom.pipeline import provenance
from byom.pipeline.checks import require_exportable
from byom.storage import atomic
from byom.storage.lock import owner
from byom.storage.names import require_file_names

ROOT = Path(byom.__file__).parent
POSIX = {"resource", "fcntl", "pwd", "grp", "termios", "pty", "tty", "crypt", "syslog", "posix"}


def fresh(name):
    """Run a module's file again, as a process that has not imported it does."""
    spec = importlib.util.find_spec(name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def trees():
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in ROOT.rglob("*.py")}


def test_no_module_needs_a_posix_library_to_be_imported():
    for path, tree in trees().items():
        for node in tree.body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not POSIX & {name.partition(".")[0] for name in names}, path


def test_text_is_utf8_whatever_the_system_says():
    """Ruff sees it where it knows the type; here it is any call of that name but a distribution's, which is UTF-8."""
    for path, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("read_text", "write_text"):
                if ast.unparse(node) == "package.read_text('METADATA')":
                    continue
                assert "encoding" in {word.arg for word in node.keywords}, f"{path}:{node.lineno}"


@pytest.fixture
def elsewhere(monkeypatch):
    """Provenance on a system without ``/proc``."""
    monkeypatch.setattr(Path, "is_file", lambda path: False)
    module = fresh("byom.pipeline.provenance")
    module._reset_peak = lambda: None
    return module


def test_memory_is_measured_without_the_resource_module(elsewhere, monkeypatch):
    import psutil

    monkeypatch.setitem(sys.modules, "resource", None)
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=5 * 2**20))
    monkeypatch.setattr(psutil, "Process", lambda: process)
    stages = elsewhere.Stages()
    with stages.stage("merge"):
        pass
    assert stages.taken["merge"]["peak_mib"] == 5


@pytest.mark.parametrize(("system", "unit"), [("darwin", 1), ("linux", 1024), ("freebsd14", 1024)])
def test_memory_is_in_mib_whatever_unit_the_system_counts_in(elsewhere, monkeypatch, system, unit):
    usage = SimpleNamespace(ru_maxrss=7 * 2**20 // unit)
    monkeypatch.setitem(sys.modules, "resource", SimpleNamespace(getrusage=lambda _: usage, RUSAGE_SELF=0))
    monkeypatch.setattr(elsewhere.sys, "platform", system)
    assert elsewhere._peak_mib() == 7


def test_a_kernel_that_says_nothing_of_memory_and_a_machine_without_git_stop_nothing(monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "Name: x\n")
    assert provenance._status("VmHWM") is None
    monkeypatch.setenv("PATH", "")
    assert provenance._git(Path(), "status") == ""


def test_a_file_is_flushed_through_a_handle_that_writes(tmp_path, monkeypatch):
    modes = []
    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda path, mode="r", *rest: modes.append(mode) or opened(path, mode, *rest))
    monkeypatch.setattr(os, "fsync", lambda handle: os.write(handle, b""))  # fails where the handle only reads
    with atomic.drafted(tmp_path / "a", settled=True) as draft:
        draft.write_bytes(b"x")
    assert (tmp_path / "a").read_bytes() == b"x"
    assert "r+b" in modes


def test_a_file_that_another_process_reads_is_replaced_when_it_lets_go(tmp_path, monkeypatch):
    replaced, tries = Path.replace, []

    def busy(path, to):
        tries.append(to)
        if len(tries) < 3:
            raise PermissionError(13, "in use")
        return replaced(path, to)

    monkeypatch.setattr(atomic, "PAUSE", 0)
    monkeypatch.setattr(atomic, "os", SimpleNamespace(name="nt"))
    monkeypatch.setattr(Path, "replace", busy)
    atomic.write_bytes(tmp_path / "a", b"x")
    assert (tmp_path / "a").read_bytes() == b"x" and len(tries) == 3
    monkeypatch.setattr(Path, "replace", lambda path, to: (_ for _ in ()).throw(PermissionError(13, "in use")))
    with pytest.raises(CheckpointError, match="in use"):
        atomic.write_bytes(tmp_path / "a", b"y")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_drafts_have_names_that_every_system_takes(monkeypatch):
    monkeypatch.setattr("platform.node", lambda: "Änne's:PC/2")
    require_file_names([owner()], "draft")


def test_output_that_a_terminal_cannot_show_ends_no_command(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", stream)
    command._legible()
    stream.write("λ = 0.3 ± 0.1")
    stream.flush()
    assert stream.buffer.getvalue() == "? = 0.3 ± 0.1".encode("cp1252")


def test_images_are_in_one_order_on_every_system(tmp_path):
    for name in ("B/a.png", "a/b.png", "a/B.png", "a-b/x.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    files = ImageFolder(str(tmp_path), {"train": "*/*.png"}).files()
    assert files == ["B/a.png", "a/B.png", "a/b.png", "a-b/x.png"]
    assert files == [p.as_posix() for p in sorted(map(PureWindowsPath, files), key=lambda path: path.parts)]


def suite(*names, name="s"):
    return Suite(name, tuple(Task(n, Table("x", {"train": "x.csv"}), "text", ("n", "y")) for n in names))


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("Cars", "cars"), "'Cars' and 'cars' would be one file"),
        (("caf\u00e9", "cafe\u0301"), "would be one file"),
        (("a:b", "c"), "':' in it"),
        (("a/b", "c"), "'/' in it"),
        (("a\\b", "c"), "in it"),
        (("a?", "c"), r"'\?' in it"),
        (("a\n", "c"), "in it"),
        (("con", "c"), "keeps it for a device"),
        (("COM1.x", "c"), "keeps it for a device"),
        (("a.", "c"), "drops a dot or blank"),
        (("a ", "c"), "drops a dot or blank"),
        (("..", "c"), "folder's own name"),
        (("", "c"), "empty"),
    ],
)
def test_tasks_that_cannot_all_be_files_are_refused_before_any_work(names, said):
    with pytest.raises(OptionError, match=f"task name.*{said}.*rename"):
        suite(*names)
    with pytest.raises(OptionError, match="suite name"):
        suite("a", name="a:b")


def test_ordinary_names_of_tasks_are_taken():
    names = ["mnist", "stanford_cars", "SUN397", "sst-2", "glue.cola", "Straße", "模型", "a b", "console", "com", ".x"]
    assert [task.name for task in suite(*names).tasks] == names


def test_a_task_called_as_the_merged_models_folder_is_refused_before_an_export(monkeypatch):
    monkeypatch.setattr(Suite, "available", lambda suite: suite)
    settings = config.settings(["byom=lora"])
    object.__setattr__(settings, "suite", suite("reference", "b"))
    with pytest.raises(OptionError, match="'reference' cannot name a folder of the export"):
        require_exportable(settings)
