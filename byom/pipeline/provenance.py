"""The origin of a number: commit, packages, hardware, and the time and memory of each stage."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import byom

PACKAGES = (
    "byom",
    "torch",
    "torchvision",
    "timm",
    "transformers",
    "open_clip_torch",
    "hydra-core",
    "safetensors",
    "numpy",
)


MIB = 2**20


@dataclass
class Stages:
    """Seconds and peak memory of the stages of one run."""

    taken: dict[str, dict[str, float]] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a block and note the process's peak resident memory in it, and that above its start, in MiB."""
        _reset_peak()
        before = _resident_mib()
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            peak = _peak_mib()
            taken = {"seconds": seconds, "peak_mib": peak, "extra_mib": max(0.0, peak - before)}
            self.taken[name] = {what: round(value, 3) for what, value in taken.items()}


def results_root(results: Path) -> Path:
    """Return where records may go: a source tree with uncommitted changes writes to ``scratch`` only.

    Args:
        results: The results folder of the options.

    Returns:
        The same folder, or its ``scratch`` when the code cannot be named by a commit.
    """
    official = not revision()["dirty"] or "scratch" in results.parts
    return results if official else results / "scratch"


@cache
def revision() -> dict[str, Any]:
    """Return the commit of the running code and whether it differs from it; an installed wheel has no commit."""
    here = Path(byom.__file__).resolve().parent.parent
    if not (here / ".git").exists():
        return {"commit": None, "dirty": False}
    commit = _git(here, "rev-parse", "HEAD")
    changes = _git(here, "status", "--porcelain", "--", ".", ":!results")
    return {"commit": commit or None, "dirty": not commit or bool(changes)}


def provenance() -> dict[str, Any]:
    """Return commit, package versions, hardware, threads: what else a number may depend on."""
    import torch

    return {
        **revision(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
    }


def hardware() -> dict[str, Any]:
    """Return what this machine computes with."""
    return {"machine": platform.machine(), "cpu": _cpu(), "cores": os.cpu_count(), "gpu": _gpu()}


def same_machine(record: Mapping[str, Any]) -> bool:
    """Return whether a record's seconds are those of a machine like this one."""
    return (record.get("provenance") or {}).get("hardware") == hardware()


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, check=False)
    except OSError:
        return ""  # no git: the code cannot be named, as in a tree without a commit
    return done.stdout.decode(errors="replace").strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )


def _gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _reset_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return  # elsewhere the peak is that of the whole process so far


def _peak_mib() -> float:
    if (peak := _status("VmHWM")) is not None:
        return peak
    try:
        import resource
    except ImportError:  # Windows
        return _process().memory_info().peak_wset / MIB
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / MIB if sys.platform == "darwin" else most * 1024 / MIB  # bytes there, KiB elsewhere


def _process() -> Any:
    import psutil

    return psutil.Process()


def _resident_mib() -> float:
    resident = _status("VmRSS")
    return _peak_mib() if resident is None else resident


def _status(what: str) -> float | None:
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    lines = status.read_text(encoding="utf-8", errors="replace").splitlines()
    line = next((line for line in lines if line.startswith(what)), "")
    return int(line.split()[1]) / 1024 if line else None
