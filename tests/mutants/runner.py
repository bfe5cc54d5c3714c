"""Runs pytest on a tree in a child that finds the large libraries already imported."""

from __future__ import annotations

import importlib
import json
import os
import select
import shlex
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import pytest

PRELOADED = (
    "torch", "torch.nn.functional", "numpy", "pandas", "scipy.stats", "scipy.optimize", "sklearn.metrics",
    "matplotlib.pyplot", "PIL.Image", "safetensors.torch", "transformers", "open_clip", "timm", "peft", "datasets",
    "hydra", "omegaconf", "tqdm", "filelock", "huggingface_hub",
)  # fmt: skip
OWN = ("byom", "tests", "experiments", "benchmarks")
REWRITTEN = "ignore:Module already imported so cannot be rewritten:pytest.PytestAssertRewriteWarning"
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Outcome:
    """What became of one run of pytest.

    Args:
        passed: Whether no test failed; true as well where there was none.
        ran: How many tests ran.
        tests: The tests that failed; the one that was running, if the child had to be ended or died.
        why: The first line of the first failure.
        seconds: Wall clock.
        ended: Whether it did not get through all tests.
    """

    passed: bool
    ran: int
    tests: tuple[str, ...]
    why: str
    seconds: float
    ended: bool = False


@dataclass(eq=False)
class Watch:
    """Tells the parent through a pipe which test has begun and which has failed."""

    pipe: int
    told: dict[str, Any] = field(default_factory=lambda: {"ran": 0, "failed": [], "why": ""})

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Say which test has begun."""
        self._say(running=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count, and say which test has failed."""
        if report.when == "call":
            self._say(ran=self.told["ran"] + 1)
        self._failed(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Say which file could not be imported."""
        self._failed(report)

    def _failed(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.failed and report.nodeid not in self.told["failed"]:
            lines = [line for line in report.longreprtext.splitlines() if line.startswith("E ")]
            why = lines[0].removeprefix("E").strip()[:200] if lines else ""
            self._say(failed=[*self.told["failed"], report.nodeid], why=self.told["why"] or why)

    def _say(self, **news: Any) -> None:
        self.told |= news
        os.write(self.pipe, (json.dumps(news) + "\n").encode())


def preload() -> None:
    """Import the large libraries once, but nothing of this repository: that differs from tree to tree."""
    os.environ |= dict.fromkeys(THREADS, "1")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for name in PRELOADED:
        try:
            importlib.import_module(name)
        except ImportError:
            continue
    if loaded := sorted(name for name in sys.modules if name.partition(".")[0] == "byom"):
        raise RuntimeError(f"{loaded[0]} is imported already: children would test it instead of their own tree")
    if threading.active_count() > 1:
        raise RuntimeError("a thread is running, which a child would be without")


def run(tree: Path, targets: Sequence[str], limit: float, options: Sequence[str], log: Path) -> Outcome:
    """Run pytest.

    Args:
        tree: The tree.
        targets: Paths in it, and one ``-k`` expression at most.
        limit: Seconds until the child is ended, which counts as a failure.
        options: Further options of pytest.
        log: Where its output goes.

    Returns:
        The outcome. Targets that do not exist are left out.
    """
    words = [word for target in targets for word in shlex.split(target)]
    paths = {word for word in words if word.startswith("tests")}
    there = [word for word in words if word not in paths or (tree / word.partition("::")[0]).exists()]
    started = time.monotonic()
    if not paths & set(there):
        return Outcome(True, 0, (), "", 0.0)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _inside(tree, [*there, *options], writing, log)
    os.close(writing)
    told, code = _listen(reading, child, started + limit)
    seconds = round(time.monotonic() - started, 1)
    if code in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        return Outcome(True, told["ran"], (), "", seconds)
    ended = code is None or code < 0
    last = [told["running"]] if told["running"] and ended else []
    why = told["why"] or (f"not done after {limit:.0f} s" if code is None else f"exit code {code}")
    return Outcome(False, told["ran"], (*told["failed"], *last), why, seconds, ended)


def _listen(pipe: int, child: int, deadline: float) -> tuple[dict[str, Any], int | None]:
    """Return the latest news of a child, and its exit code; None if it had to be ended."""
    told: dict[str, Any] = {"ran": 0, "running": "", "failed": [], "why": ""}
    rest, late = b"", False
    while True:
        ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
        if late := not ready:
            os.killpg(child, signal.SIGKILL)
            break
        piece = os.read(pipe, 1 << 16)
        if not piece:
            break
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            told |= json.loads(line)
    os.close(pipe)
    status = os.waitpid(child, 0)[1]
    return told, None if late else os.waitstatus_to_exitcode(status)


def _inside(tree: Path, arguments: list[str], pipe: int, log: Path) -> NoReturn:
    """Be the child: forget the repository that this file is of, and run pytest on the tree."""
    code = int(pytest.ExitCode.INTERNAL_ERROR)
    try:
        os.setsid()
        own = Path(__file__).parents[2]
        sys.path[:] = [str(tree), *(path for path in sys.path if path and Path(path).resolve() != own)]
        for name in [name for name in sys.modules if name.partition(".")[0] in OWN]:
            del sys.modules[name]
        os.chdir(tree)
        os.environ["PYTHONPATH"] = str(tree)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        fixed = [
            "-p",
            "no:cacheprovider",
            "--hypothesis-seed=0",
            f"--rootdir={tree}",
            "-W",
            REWRITTEN,
            "--continue-on-collection-errors",
        ]
        code = int(pytest.main([*fixed, *arguments], plugins=[Watch(pipe)]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
