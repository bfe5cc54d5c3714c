"""Ways of torch's threads to wait, and their cost beside other work: one short piece of `make demo`, several ways.

    python -m benchmarks.threads --check --json benchmarks/threads.json

Fine-tunes and evaluates the ViT-S of the offline suite on a few hundred digits, in a process of its own for each way
and each neighbour: none, one process of pure Python that never rests, or one for each processor. Times are medians
over repeats and leave out imports. torch for CPUs ships GNU OpenMP (libgomp), whose threads spin before they sleep;
KMP_BLOCKTIME is for Intel's and LLVM's, in case another is found. byom's commands set `passive` where the user set
nothing; `--check` fails where that is not within 10 % of the best way, idle or beside neighbours.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from benchmarks.options import conclude, parser

ROOT = Path(__file__).parents[1]
WAYS = {
    "default": {},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "no spinning": {"GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
CHOSEN, WITHIN = "passive", 1.1


def piece(examples: int) -> dict[str, object]:
    """Fine-tune on digits and score the model, as a cell of the demo does; return seconds, threads and libraries.

    Args:
        examples: Training examples; half as many are scored.
    """
    import torch

    from byom.cli import config
    from byom.pipeline.run import run

    sizes = {"train": examples, "validation": examples // 4, "test": examples // 4}
    with tempfile.TemporaryDirectory() as folder:
        options = ["suite.only=[digits]", *(f"suite.tasks.digits.{name}={size}" for name, size in sizes.items())]
        places = [f"results={folder}/results/scratch", f"cache={folder}/cache", "device=cpu"]
        settings = config.settings([*options, *places, "finetune.epochs=2", "merge=pretrained", "byom=single_task"])
        torch.ones(512, 512) @ torch.ones(512, 512)  # the threads are there before the clock starts
        start = time.perf_counter()
        run(settings)
        seconds = time.perf_counter() - start
    mapped = Path("/proc/self/maps")
    lines = mapped.read_text(encoding="utf-8").splitlines() if mapped.exists() else []
    names = {Path(line.split()[-1]).name for line in lines if line}
    runtimes = sorted(name for name in names if name.startswith(("libgomp", "libomp", "libiomp")))
    return {"seconds": seconds, "threads": torch.get_num_threads(), "openmp": runtimes}


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """Keep processes busy that do nothing but count."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for each in busy:
            each.kill()
            each.wait()


def taken(way: str, count: int, examples: int) -> dict[str, object]:
    """Return what the piece says of itself, done in one way beside some neighbours."""
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES} | WAYS[way]
    command = [sys.executable, "-m", "benchmarks.threads", "--piece", str(examples)]
    with neighbours(count):
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"the piece failed with {way}, {count} neighbours:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def table(result: dict) -> str:
    """Return seconds of each way and neighbours, and their ratio to the default without neighbours."""
    beside = result["neighbours"]
    once = result["ways"]["default"]["0"]["seconds"]
    lines = ["| way | " + " | ".join(f"beside {n} busy" for n in beside) + " |", "|---|" + "--:|" * len(beside)]
    for way, rows in result["ways"].items():
        cells = (f"{rows[str(n)]['seconds']:.1f} s ({rows[str(n)]['seconds'] / once:.2f} x)" for n in beside)
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def missed(result: dict) -> str:
    """Return a sentence for each number of neighbours beside which the way that byom sets is slow."""
    said = []
    for count in map(str, result["neighbours"]):
        seconds = {way: rows[count]["seconds"] for way, rows in result["ways"].items()}
        best = min(seconds, key=seconds.__getitem__)
        if seconds[CHOSEN] > WITHIN * seconds[best]:
            said.append(f"beside {count} busy: {CHOSEN} {seconds[CHOSEN]:.1f} s, {best} {seconds[best]:.1f} s")
    return "\n".join(said)


def main() -> None:
    """Measure every way beside every number of neighbours."""
    made = parser(__doc__ or "", repeats=3)
    made.add_argument("--examples", type=int, default=512)
    made.add_argument("--piece", type=int, help="do the piece of work in this process and print what it took")
    options = made.parse_args()
    if options.piece:
        print(json.dumps(piece(options.piece)))
        return
    processors = os.cpu_count() or 1
    result: dict = {
        "machine": platform.machine(), "processors": processors, "examples": options.examples,
        "neighbours": sorted({0, 1, processors}), "ways": {way: {} for way in WAYS},
    }  # fmt: skip
    for count in result["neighbours"]:
        runs: dict[str, list[dict]] = {way: [] for way in WAYS}
        for _ in range(options.repeats):  # in turns, so that a change of the machine is in all of them
            for way, found in runs.items():
                found.append(taken(way, count, options.examples))
                sys.stderr.write(f"{way}, beside {count} busy: {found[-1]['seconds']:.1f} s\n")
        for way, found in runs.items():
            result["ways"][way][str(count)] = found[0] | {"seconds": round(median(r["seconds"] for r in found), 2)}
    conclude(result, table(result), missed(result), options)


if __name__ == "__main__":
    main()
