"""Exact selection of the largest magnitudes beside the routines of torch, one thread, one run.

    python -m benchmarks.selection --elements 100000000 --json selection.json

Every routine finds the same threshold; the others receive the magnitudes in fp32 ready-made and give no tie
rule. Add `--dtype bfloat16` for half precision and `--check` to fail when a target is missed (at most 6 ns per
element for one density, at least 3 times faster than `torch.kthvalue`). Times are medians over repeats;
memory is about 25 bytes per element.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable
from statistics import median

import numpy as np
import torch

from benchmarks.options import conclude, parser
from byom.functional.selection import Part, kept, locate

NANOSECONDS = 6.0
TIMES_FASTER = 3.0
SHOWN = {
    "locate": "byom locate, one density",
    "locate_four": "byom locate, 1 5 10 20 % together",
    "kthvalue": "torch.kthvalue",
    "topk": "torch.topk",
    "argsort": "torch.argsort",
}


def per_element(work: Callable[[], object], n: int, repeats: int) -> float:
    """Median nanoseconds per element."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return median(seconds) / n * 1e9


def values_of(n: int, dtype: torch.dtype) -> torch.Tensor:
    """Normal values, drawn by pieces so that a half-precision stream needs no fp32 copy."""
    generator = torch.Generator().manual_seed(0)
    values = torch.empty(n, dtype=dtype)
    for piece in values.split(1 << 22):
        piece.copy_(torch.randn(len(piece), generator=generator))
    return values


def routines(values: torch.Tensor, density: float, sorted_elements: int) -> dict[str, tuple[Callable, int]]:
    """Each routine with the number of elements it works on."""
    n, parts, sizes = len(values), [Part.of(values)], values.float().abs()
    k, four = kept(density, n), [kept(each, n) for each in (0.01, 0.05, 0.1, 0.2)]
    head = sizes[:sorted_elements]

    def kthvalue() -> float:
        return sizes.kthvalue(n - k + 1).values.item()

    return {
        "locate": (lambda: locate(parts, [k])[0].threshold, n),
        "locate_four": (lambda: locate(parts, four), n),
        "kthvalue": (kthvalue, n),
        "topk": (lambda: sizes.topk(k, sorted=False).values.min().item(), n),
        "argsort": (lambda: head.argsort(descending=True), len(head)),
    }


def measure(options: argparse.Namespace) -> dict:
    """Run everything once; raises SystemExit if thresholds differ."""
    values = values_of(options.elements, getattr(torch, options.dtype))
    every = routines(values, options.density, options.sorted_elements)
    thresholds = {name: every[name][0]() for name in ("locate", "kthvalue", "topk")}
    if len(set(thresholds.values())) > 1:
        sys.exit(f"the thresholds differ: {thresholds}; locate is wrong for this stream, please report it")
    rows = {
        name: {"elements": n, "ns_per_element": per_element(work, n, options.repeats)}
        for name, (work, n) in every.items()
    }
    for row in rows.values():
        row["ratio"] = row["ns_per_element"] / rows["locate"]["ns_per_element"]
    return {
        "elements": options.elements,
        "dtype": options.dtype,
        "density": options.density,
        "threads": torch.get_num_threads(),
        "repeats": options.repeats,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "rows": rows,
    }


def table(result: dict) -> str:
    """A Markdown table."""
    head = "n={elements:,} {dtype}, density {density}, threads={threads}, median of {repeats}".format(**result)
    lines = [head, "", "| routine | n | ns/element | times locate |", "|---|---:|---:|---:|"]
    for name, row in result["rows"].items():
        figures = f"{row['elements']:,} | {row['ns_per_element']:.2f} | {row['ratio']:.1f}"
        lines.append(f"| {SHOWN[name]} | {figures} |")
    return "\n".join(lines)


def missed(result: dict) -> str:
    """The sentence about a missed target, or nothing."""
    rows = result["rows"]
    spent, ratio = rows["locate"]["ns_per_element"], rows["kthvalue"]["ratio"]
    if spent <= NANOSECONDS and ratio >= TIMES_FASTER:
        return ""
    return (
        f"locate took {spent:.2f} ns per element (target: at most {NANOSECONDS:g}) and was {ratio:.1f} times "
        f"faster than torch.kthvalue (target: at least {TIMES_FASTER:g}); repeat on an idle machine"
    )


def main() -> None:
    """Measure, print, and write or check on request."""
    given = parser(__doc__ or "", repeats=3)
    given.add_argument("--elements", type=int, default=100_000_000)
    given.add_argument("--sorted-elements", type=int, default=10_000_000, help="elements for argsort")
    given.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    given.add_argument("--density", type=float, default=0.05)
    options = given.parse_args()
    torch.set_num_threads(1)
    result = measure(options)
    conclude(result, table(result), missed(result), options)


if __name__ == "__main__":
    main()
