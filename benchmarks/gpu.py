"""What a card is good for, in one command of at most a quarter of an hour; every part writes what it has at once.

    python -m benchmarks.gpu --out benchmarks/gpu
    python -m benchmarks.gpu --out benchmarks/gpu --only merging --minutes 4
    python -m benchmarks.gpu --out /tmp/gpu --device cpu --small

The parts, each a process of its own with its share of the time, in the order given by ``--only``:

- ``tests``: the tests of devices, the contract, identities and units (`pytest`), on the card where they use one;
- ``throughput``: evaluation and fine-tuning beside a plain loop (`benchmarks.throughput`), in fp32 and in bf16;
- ``merging``: eight ViT-B/32 in fp32 and four models of a billion parameters in bf16, all on the device, merged and
  packed there (`benchmarks.gpu_merging`), beside the device's measured copy bandwidth;
- ``suite``: ``byom table vision8_offline_headline`` at 224 pixels, if the data packages are there.

OUT/PART.json names the card, its driver and the packages. A part that is cut off leaves the rows it had; one that
cannot run says why. ``--small`` tries everything in miniature, for machines without a card: its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from byom.pipeline.provenance import provenance
from byom.storage.atomic import write_json

ROOT = Path(__file__).parents[1]
TESTS = ("tests/device", "tests/contract", "tests/identities", "tests/unit")
SMALL_TESTS = ("tests/identities/test_average.py", "tests/identities/test_task_arithmetic.py")
SMALL_SUITE = (
    "suite.only=[digits,mnist]",
    "finetune.epochs=1",
    *(
        f"suite.tasks.{task}.{size}"
        for task in ("digits", "mnist")
        for size in ("train=60", "validation=10", "test=10")
    ),
)
THROUGHPUT = {
    "cuda": (("ViT-B-32", "bf16", 256, 16384), ("ViT-B-32", "fp32", 256, 4096), ("roberta-base", "bf16", 64, 4096)),
    "cpu": (("ViT-B-32", "fp32", 32, 96),),
}
"""Device to model, precision, batch and examples of each call, by worth."""
SHARES = {"tests": 5.0, "throughput": 3.0, "merging": 3.5, "suite": 3.5}
"""Part to minutes of fifteen; what one leaves goes to those after it."""
TAIL = 1500  # characters of what a command said that are kept


def card(device: str) -> dict[str, Any]:
    """Return what a figure is measured on.

    Args:
        device: ``cuda`` or ``cpu``.
    """
    facts: dict[str, Any] = {"device": device, "torch": torch.__version__, "cuda": torch.version.cuda, "name": None}
    if device == "cuda":
        about = torch.cuda.get_device_properties(0)
        facts |= {"name": torch.cuda.get_device_name(0), "bytes": about.total_memory, "driver": _driver()}
        facts |= {"capability": f"{about.major}.{about.minor}", "multiprocessors": about.multi_processor_count}
    return facts | {"provenance": provenance()}


def _driver() -> str | None:
    """Return the driver's version, if its tool is here to say it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return done.stdout.split("\n")[0].strip() or None


def ran(command: list[str], limit: float, log: Path, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Run a command for some seconds at most, with all that it starts.

    Args:
        command: The command.
        limit: Seconds, after which it is killed with its children.
        log: File that gets what it says.
        environment: Variables beside those of this process.

    Returns:
        Seconds, status (None where it was killed for time), and the end of what it said.
    """
    start = time.perf_counter()
    with log.open("w", encoding="utf-8") as said:
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status: int | None = child.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    text = log.read_text(encoding="utf-8", errors="replace")
    return {"seconds": round(time.perf_counter() - start, 1), "status": status, "end": text[-TAIL:]}


def tests(given: argparse.Namespace, limit: float, keep: Callable[[str, Any], None]) -> None:
    """Run the tests folder by folder; each may take what is left of the time."""
    until = time.perf_counter() + limit
    for place in SMALL_TESTS if given.small else TESTS:
        if not (ROOT / place).exists():
            keep(place, {"not_run": "this source tree has no such tests"})
            continue
        options = ["-p", "no:cacheprovider", "-n", str(given.workers), "-o", "filterwarnings=", "-m", "not slow"]
        command = [sys.executable, "-m", "pytest", place, *options, "--tb=line", "-rf"]
        log = given.out / f"tests-{Path(place).stem}.log"
        row = ran(command, max(1.0, until - time.perf_counter()), log, {"OMP_NUM_THREADS": "1"})
        keep(place, row | {"command": " ".join(command[1:]), **counted(row["end"])})


def counted(text: str) -> dict[str, int]:
    """Return how many tests passed, failed and so on, as pytest's last line says; nothing where it has none."""
    lines = [line for line in text.splitlines() if re.search(r"\d+ (passed|failed|error)", line)]
    return {what: int(number) for number, what in re.findall(r"(\d+) ([a-z]+)", lines[-1])} if lines else {}


def throughput(given: argparse.Namespace, limit: float, keep: Callable[[str, Any], None]) -> None:
    """Call the benchmark of images and texts a second, once for each model and precision."""
    if not (ROOT / "benchmarks" / "throughput.py").is_file():
        keep("throughput", {"not_run": "this source tree has no benchmarks/throughput.py"})
        return
    until = time.perf_counter() + limit
    for model, precision, batch, examples in THROUGHPUT[given.device]:
        name = f"{model} {precision}"
        file = given.out / f"throughput-{model}-{precision}.json"
        sizes = ["batch=2", "examples=4", "rounds=1"] if given.small else [f"batch={batch}", f"examples={examples}"]
        options = [f"device={given.device}", f"model={model}", f"precision={precision}", *sizes, f"out={file}"]
        command = [sys.executable, "-m", "benchmarks.throughput", *options]
        file.unlink(missing_ok=True)
        row = ran(command, max(1.0, until - time.perf_counter()), file.with_suffix(".log"))
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        keep(name, row | {"command": " ".join(command[1:]), "figures": found})


def merging(given: argparse.Namespace, limit: float, keep: Callable[[str, Any], None]) -> None:
    """Call the benchmark of merging on the device, which writes every row when it has it."""
    file = given.out / "merging-rows.json"
    file.unlink(missing_ok=True)
    options = ["--device", given.device, "--json", str(file), "--limit", f"{limit - 5:.0f}"]
    command = [sys.executable, "-m", "benchmarks.gpu_merging", *options, *(["--small"] if given.small else [])]
    row = ran(command, limit, given.out / "merging.log")
    keep("merging", row | {"command": " ".join(command[1:])})
    for name, figures in (json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}).items():
        keep(name, figures)


def suite(given: argparse.Namespace, limit: float, keep: Callable[[str, Any], None]) -> None:
    """Run the small suite's table at the papers' resolution, if its data packages are installed."""
    from byom.cli import config
    from byom.errors import ByomError

    try:
        for task in config.option("suite", "vision8_offline").tasks:
            task.source.check()
    except ByomError as error:
        keep("vision8_offline", {"not_run": str(error)})
        return
    place = given.out / "suite"
    side = 28 if given.small else given.side
    options = [f"backbone.image_size={side}", "seed=0", f"device={given.device}", f"results={place / 'results'}"]
    options += [f"cache={place / 'cache'}", *(SMALL_SUITE if given.small else ())]
    command = [sys.executable, "-m", "byom", "table", "vision8_offline_headline", *options]
    row = ran(command, limit, given.out / "suite.log", {"TQDM_DISABLE": "1"})
    keep("vision8_offline", row | {"command": " ".join(command[1:]), "pixels": side, "cells": cells(place)})
    shutil.rmtree(place / "cache", ignore_errors=True)


def cells(place: Path) -> list[dict[str, Any]]:
    """Return stages and accuracy of the finished cells below a folder."""
    files = [f for f in sorted(place.glob("results/**/runs/**/*.json")) if not f.name.startswith(".")]
    records = [r for r in (json.loads(f.read_text(encoding="utf-8")) for f in files) if r.get("status") == "done"]
    kept = ("choices", "summary", "stages")
    return [{key: record[key] for key in kept} for record in sorted(records, key=lambda record: record["created"])]


PARTS: Mapping[str, Callable[[argparse.Namespace, float, Callable[[str, Any], None]], None]] = {
    "tests": tests,
    "throughput": throughput,
    "merging": merging,
    "suite": suite,
}


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given.add_argument("--out", type=Path, required=True, help="folder of the records")
    given.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    given.add_argument("--small", action="store_true", help="everything in miniature")
    given.add_argument("--only", type=lambda text: text.split(","), default=[*PARTS], help=", ".join(PARTS))
    given.add_argument("--minutes", type=float, default=15.0, help="for all parts together")
    given.add_argument("--side", type=int, default=224, help="pixels of the images of the part `suite`: 112, 224")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    given.add_argument("--workers", type=int, default=min(8, cores), help="processes of the part `tests`")
    read = given.parse_args(arguments)
    if unknown := [part for part in read.only if part not in PARTS]:
        given.error(f"'{unknown[0]}' is no part; {', '.join(PARTS)}")
    if read.minutes <= 0 or read.workers < 1:
        given.error("--minutes and --workers must be positive")
    if read.side % 14 or read.side <= 0:
        given.error("--side must be a multiple of 14, the backbone's patch")
    return read


def shares(parts: list[str], seconds: float) -> float:
    """Return the seconds that the first of some parts may take, so that those after it get theirs."""
    return seconds * SHARES[parts[0]] / sum(SHARES[part] for part in parts)


def main() -> None:
    """Run the parts, and write the record of each as it grows."""
    given = options()
    if given.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no CUDA card here; --device cpu --small tries the script without one")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no part outlives this process
    given.out = given.out.expanduser().resolve()
    given.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    until, about = time.perf_counter() + 60 * given.minutes, card(given.device) | {"small": given.small}
    for number, part in enumerate(given.only):
        limit = shares(given.only[number:], until - time.perf_counter())
        rows: dict[str, Any] = {}

        def keep(name: str, figures: Any, part: str = part, rows: dict[str, Any] = rows) -> None:
            rows[name] = figures
            write_json(given.out / f"{part}.json", {"card": about, "rows": rows})
            print(f"{part}: {name}: {json.dumps(figures)[:300]}", flush=True)

        try:
            PARTS[part](given, max(1.0, limit), keep)
        except Exception as error:  # the parts after it still run
            keep("failed", f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
