"""Merging on the CPU from disk to disk beside mergekit, fusion-bench and PEFT: eight experts of ViT-B/32's image tower.

    python -m benchmarks.peers --folder FOLDER --json benchmarks/peers.json
    python -m benchmarks.peers --folder FOLDER --small
    python -m benchmarks.peers --folder FOLDER --only ties,tsv --tools byom,fusion-bench --repeats 1

Weights are random and experts differ from the base by heavy-tailed random numbers (`benchmarks.true_models.expert`), so
nothing here says how good a method is. All are fp32 folders of transformers, which lie in the page cache; the adapters
have rank 16 on all linear layers. A merge has a process of its own and as many threads for every tool; those of byom
wait passively (`OMP_WAIT_POLICY`), as its commands set, which matters where a machine is not idle. Seconds run from the
first file that is opened until the disk has what was written, importing left out, for byom also what its checksums
take; the JSON also says when the tool itself returned. Memory is the peak of anonymous memory beyond that of the
interpreter and the tool's libraries (`benchmarks.peak`). Within a row, tools take turns, and figures are medians. What
takes more than `LONG` seconds is run once, and what takes more than `--limit` is stopped.

Results are compared on the disk: the largest difference of a tensor, relative to what byom changed in it. Where a tool
computes another function, the row says so, and how the norms of the changes compare.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.options import conclude, parser
from benchmarks.peak import Taken, measured
from benchmarks.peers_compare import difference, norm_ratio
from benchmarks.peers_methods import PACKAGES, ROWS, Row, Work
from benchmarks.peers_models import facts, make, warm
from benchmarks.peers_tools import WORK
from byom.pipeline.provenance import provenance

LONG = 60.0  # seconds
QUIET = 0.1  # share of the CPUs that others may take before it is said
ABSENT = "no such method"


@dataclass
class Load:
    """What others do with the machine while this runs."""

    start: tuple[float, float, float] = field(default_factory=os.getloadavg)
    busy: float = 0.0
    whole: float = 0.0

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Add up the seconds of all CPUs, and those that they worked for others than this process's children."""
        before, ours = _jiffies(), _children()
        yield
        after = _jiffies()
        whole, idle = ((b - a) / os.sysconf("SC_CLK_TCK") for a, b in zip(before, after, strict=True))
        self.whole += whole
        self.busy += max(0.0, whole - idle - (_children() - ours))

    @property
    def share(self) -> float:
        """Share of the CPUs that others took."""
        return self.busy / self.whole if self.whole else 0.0

    def said(self) -> dict[str, Any]:
        """Return the figures, and a warning where others took more than `QUIET`; empty where not."""
        warning = ""
        if self.share > QUIET or self.start[0] > 0.25 * (os.cpu_count() or 1):
            warning = (
                f"the machine was not idle: other processes took {self.share:.0%} of its {os.cpu_count()} CPUs while "
                f"this ran, and the load before it was {self.start[0]:.1f}; repeat on an idle machine"
            )
        return {"load_before": self.start, "load_after": os.getloadavg(), "others": self.share, "warning": warning}


def _jiffies() -> tuple[int, int]:
    """Return what the CPUs have counted since the machine started: in all, and idle."""
    line = Path("/proc/stat").read_text(encoding="utf-8").partition("\n")[0]
    counts = [int(each) for each in line.split()[1:9]]
    return sum(counts), counts[3] + counts[4]


def _children() -> float:
    """Return the CPU seconds of processes that were started here and have ended, and of this one."""
    every = [resource.getrusage(who) for who in (resource.RUSAGE_CHILDREN, resource.RUSAGE_SELF)]
    return sum(used.ru_utime + used.ru_stime for used in every)


def measure(given: argparse.Namespace, load: Load) -> dict[str, dict[str, Any]]:
    """Measure every row, one after the other, and return its tools' figures."""
    found = {}
    for name in given.only or ROWS:
        found[name] = compete(given, load, ROWS[name], given.folder / "out" / name)
        sys.stderr.write(f"{name}: {found[name]}\n")
        shutil.rmtree(given.folder / "out", ignore_errors=True)
    return found


def compete(given: argparse.Namespace, load: Load, row: Row, out: Path) -> dict[str, Any]:
    """Measure one row: a run of every tool, then another of every tool, and return the figures of each."""
    tools = [tool for tool in row.columns if tool in given.tools]
    racing = [tool for tool in tools if tool in row.tools and given.versions[tool]]
    taken: dict[str, list[dict[str, Any]]] = {tool: [] for tool in racing}
    failed: dict[str, str] = {}
    shutil.rmtree(out, ignore_errors=True)
    for turn in range(given.repeats):
        for tool in list(racing):
            place = out / (tool if turn == 0 else "again")
            shutil.rmtree(place, ignore_errors=True)
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                with load.watched():
                    run = once(given, tool, row.tools[tool], place)
            except RuntimeError as error:
                failed[tool] = f"failed: {error}"
                racing.remove(tool)
                continue
            taken[tool].append(figures(run))
            if not run.finished or run.said["seconds"] > LONG:
                racing.remove(tool)
    return {tool: _told(given, row, tool, taken.get(tool, []), failed, out) for tool in tools}


def once(given: argparse.Namespace, tool: str, work: Work, out: Path) -> Taken:
    """Run a tool once; byom with what its command sets for threads that wait."""
    waits = {"OMP_WAIT_POLICY": "passive"} if tool == "byom" else {}
    os.environ.update(waits)
    try:
        arguments = (given.folder, given.tasks, work.told, out)
        return measured(WORK[work.how], *arguments, threads=given.threads, limit=given.limit)
    finally:
        for name in waits:
            os.environ.pop(name)


def figures(run: Taken) -> dict[str, Any]:
    """Return what one run says: seconds, and anonymous memory beyond the libraries' in bytes."""
    said = dict(run.said) or {"seconds": run.seconds, "returned": None, "libraries_bytes": 0}
    peak = max(0, run.peak - said["libraries_bytes"])
    return {**said, "peak_bytes": peak, "finished": run.finished, "done": run.done}


def _told(
    given: argparse.Namespace, row: Row, tool: str, runs: list[dict[str, Any]], failed: Mapping[str, str], out: Path
) -> dict[str, Any]:
    if tool in failed:
        return {"says": failed[tool]}
    if tool not in row.tools:
        return {"says": row.absent.get(tool, ABSENT)}
    if not runs:
        return {"says": "not installed"}
    work = row.tools[tool]
    middle = {key: median(run[key] for run in runs) for key in ("seconds", "peak_bytes", "libraries_bytes")}
    told: dict[str, Any] = {**middle, "runs": runs, "finished": runs[-1]["finished"], "says": work.why}
    folders = [_result(out / each, row) for each in ("byom", tool)]
    if tool != "byom" and told["finished"] and all(folder.is_dir() for folder in folders):
        base = given.folder / "base"
        told["difference"] = difference(base, *folders, row.adapters)
        told["norm_ratio"] = norm_ratio(base, *folders, row.adapters)
        told["allowed"] = work.equal
    return told


def _result(folder: Path, row: Row) -> Path:
    """Return where a tool's result lies; PEFT writes an adapter into a folder of its name."""
    inner = folder / "merged"
    return inner if row.adapters and inner.is_dir() else folder


def table(result: Mapping[str, Any]) -> str:
    """Return a Markdown table."""
    by, made = result["provenance"], result["models"]
    versions = ", ".join(f"{tool} {version}" for tool, version in result["versions"].items() if version)
    lines = [
        f"{result['tasks']} experts of {made['parameters'] / 1e6:.1f} M parameters in fp32 ({made['bytes'] / 1e6:,.0f} "
        f"MB each), {result['threads']} threads of {by['hardware']['cpu']}, medians of {result['repeats']}: {versions}",
        "",
        "| method | tool | s | times byom | memory | difference | |",
        "|---|---|--:|--:|--:|--:|---|",
    ]
    for name, tools in result["rows"].items():
        ours = tools.get("byom", {})
        for tool, told in tools.items():
            lines.append(f"| {ROWS[name].title} | {tool} | {' | '.join(_cells(told, ours, result['repeats']))} |")
    return "\n".join([*lines, *([f"\n{result['load']['warning']}"] if result["load"]["warning"] else [])])


def _cells(told: Mapping[str, Any], ours: Mapping[str, Any], repeats: int) -> list[str]:
    """Return what is shown of one tool: seconds, ratio, memory, difference, remark."""
    if "seconds" not in told:
        return ["", "", "", "", told["says"]]
    more = "" if told["finished"] else "> "
    compared = ours.get("finished")
    ratio = f"{more}{told['seconds'] / ours['seconds']:.1f}" if compared else ""
    remarks = [told["says"]] if told["says"] else []
    if not told["finished"]:
        done = max(run["done"] for run in told["runs"])
        remarks.append(f"stopped after {told['seconds']:.0f} s" + (f", {done:.0%} done" if done else ""))
    elif len(told["runs"]) < repeats:
        remarks.append(f"{len(told['runs'])} run")
    apart = f"{told['difference']:.0e}" if told.get("allowed") is not None else ""
    if "difference" in told and told["allowed"] is None:
        remarks.append(f"norm {told['norm_ratio']:.2f} times byom's")
    return [
        f"{more}{told['seconds']:.2f}",
        ratio,
        f"{told['peak_bytes'] / 1e6:,.0f} MB",
        apart,
        "; ".join(remarks),
    ]


def missed(result: Mapping[str, Any]) -> str:
    """Return the sentences about rows in which byom is not ahead, or results differ, or nothing."""
    said = []
    for name, tools in result["rows"].items():
        ours = tools.get("byom", {})
        for tool, told in tools.items():
            if told.get("says", "").startswith("failed"):
                said.append(f"{name}: {tool} {told['says']}")
            if told.get("allowed") is not None and not told["difference"] <= told["allowed"]:
                said.append(
                    f"{name}: {tool} and byom differ by {told['difference']:.1e}, {told['allowed']:g} is allowed"
                )
            if tool == "byom" and told.get("finished") is False:
                said.append(f"{name}: byom was stopped after {told['seconds']:.0f} s; raise --limit")
            if tool == "byom" or not told.get("finished") or not ours.get("finished"):
                continue
            said += [
                f"{name}: byom took {ours[key] / unit:,.2f} {sign}, {tool} {told[key] / unit:,.2f}"
                for key, unit, sign in (("seconds", 1.0, "s"), ("peak_bytes", 1e6, "MB"))
                if ours[key] > told[key]
            ]
    return "\n".join(said)


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    given = parser(__doc__ or "", repeats=3)
    given.add_argument("--folder", type=Path, required=True, help="where models are written; they stay there")
    given.add_argument("--only", type=_listed, default=[], help=f"rows, of {', '.join(ROWS)}")
    given.add_argument("--tools", type=_listed, default=list(PACKAGES), help=f"of {', '.join(PACKAGES)}")
    given.add_argument("--tasks", type=int, default=8, help="experts, and adapters")
    given.add_argument("--threads", type=int, default=2)
    given.add_argument("--limit", type=float, default=150.0, help="seconds that one run may take, importing included")
    given.add_argument("--small", action="store_true", help="a small tower of two layers, for a trial")
    read = given.parse_args(arguments)
    for chosen, known in ((read.only, ROWS), (read.tools, PACKAGES)):
        if unknown := [name for name in chosen if name not in known]:
            given.error(f"'{unknown[0]}' is none of {', '.join(known)}")
    if min(read.repeats, read.threads, read.limit) < 1 or read.tasks < 2:
        given.error("--repeats, --threads and --limit must be at least 1, and --tasks at least 2")
    read.folder = read.folder.resolve() / ("small" if read.small else "vit_b_32")
    read.versions = {tool: _version(package) for tool, package in PACKAGES.items() if tool in read.tools}
    return read


def _listed(text: str) -> list[str]:
    return text.split(",")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def main() -> None:
    """Measure, print, and write or check on request."""
    given = options()
    alike = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), str(given.threads))
    os.environ.update(alike, CUDA_VISIBLE_DEVICES="", TQDM_DISABLE="1", HF_HUB_OFFLINE="1")
    os.environ.pop("OMP_WAIT_POLICY", None)
    load = Load()
    adapters = any(ROWS[name].adapters for name in given.only or ROWS)
    make(given.folder, given.small, given.tasks, adapters and _version("peft") is not None)
    warm(given.folder)
    rows = measure(given, load)
    kept = {key: getattr(given, key) for key in ("tasks", "threads", "repeats", "limit", "small", "versions")}
    result = {**kept, "models": facts(given.folder), "provenance": provenance(), "load": load.said(), "rows": rows}
    conclude(result, table(result), missed(result), given)


if __name__ == "__main__":
    main()
