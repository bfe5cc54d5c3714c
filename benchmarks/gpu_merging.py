"""Merging and packing of models that lie on a device, beside what the device can copy.

    python -m benchmarks.gpu_merging --json merging.json
    python -m benchmarks.gpu_merging --device cpu --small

Eight ViT-B/32 in fp32 and four Llama-shaped models of 1.24 billion parameters in bf16, random, are made on the device;
byom merges and packs them there, and every result is complete before the clock stops. `moved` are the bytes that no
method can avoid: every model read once and one written (for a packed task its expert and the reference read, its values
written), so `GB/s` is a lower bound of what a method really moves; `copy` is a copy within the device measured in the
same run, reading and writing counted, and `of copy` the share of it that a method reaches. `plain` rows are the same
work as a line of torch on one flat tensor. A row is the best of `--repeats` after one that warms up, fewer where a
method takes longer than `LONG` seconds. Rows are written as they come; a method that fails is a row that says so.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import large
from benchmarks.options import parser
from byom.backbone.clip import Clip
from byom.cli import config
from byom.merge.base import Problem
from byom.storage.atomic import write_json
from byom.variants.base import Variant
from byom.weights import Weights

Work = Callable[[], dict[str, Any] | None]
"""What is measured; it may return further figures of its row."""
LONG = 5.0  # seconds
SCALE = 0.3
MERGES = {
    "vit": ("average", "task_arithmetic", "ties", "magmax", "dare", "breadcrumbs", "consensus", "model_stock"),
    "llama": ("average", "task_arithmetic", "ties", "dare", "model_stock"),
    "matrices": ("iso_c", "tsv", "iso_cts", "wudi", "knots"),
}
"""Methods by what they are measured on; `matrices` are those of ViT-B/32, and come last, as they take longest."""
PACKS = {
    "vit": ("fft", "post_pruning", "emr", "tall_mask"),
    "llama": ("fft",),
    "matrices": ("lora", "tsv_compress"),
}


@dataclass(frozen=True)
class Case:
    """Some models on a device.

    Args:
        kind: Which of `MERGES` and `PACKS` are measured.
        label: What rows are called.
        base: Name to value.
        experts: One a task.
    """

    kind: str
    label: str
    base: dict[str, Tensor]
    experts: list[dict[str, Tensor]]

    @property
    def problem(self) -> Problem:
        """The models as byom takes them."""
        tuned = {f"task{number}": Weights.of(each) for number, each in enumerate(self.experts)}
        return Problem(Weights.of(self.base), tuned)

    @property
    def nbytes(self) -> int:
        """Bytes of one model."""
        return sum(value.nbytes for value in self.base.values())


class Clock:
    """Seconds and memory of work on a device.

    Args:
        device: ``cuda`` or ``cpu``.
        repeats: How often a row is measured.
    """

    def __init__(self, device: str, repeats: int) -> None:
        self.cuda, self.repeats = device == "cuda", repeats

    def __call__(self, work: Work) -> dict[str, Any]:
        """Return the best seconds of some runs, after one that warms up, and the device's peak memory beyond before."""
        first = self._once(work)
        taken = [self._once(work) for _ in range(self.repeats if first["seconds"] < LONG else 1)]
        best = min(taken, key=lambda run: run["seconds"])
        return {**best, "first_seconds": first["seconds"], "runs": len(taken)}

    def _once(self, work: Work) -> dict[str, Any]:
        before = 0
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        start = time.perf_counter()
        said = work()
        if self.cuda:
            torch.cuda.synchronize()
        row: dict[str, Any] = {"seconds": round(time.perf_counter() - start, 6)}
        if self.cuda:
            row["peak_bytes"] = torch.cuda.max_memory_allocated() - before
        return row | (said or {})


def vit(device: str, small: bool, kind: str = "vit") -> Case:
    """Make a random ViT-B/32 and eight fine-tunes of it; in miniature, three of a narrow one."""
    torch.manual_seed(0)
    name = _narrow() if small else "ViT-B-32"
    state = Clip(name, "random").load().state_dict()
    base = {n: v.to(device) for n, v in state.items() if v.is_floating_point()}
    return Case(kind, "3 narrow ViTs" if small else "8 x ViT-B/32", base, _tuned(base, 3 if small else 8, device))


def llama(device: str, small: bool) -> Case:
    """Make a random Llama of 1.24 billion parameters and four fine-tunes, in bf16; in miniature, three of 46 M."""
    billions = 0.02 if small else 1.0
    generator = torch.Generator(device).manual_seed(0)
    base = {
        name: torch.randn(shape, generator=generator, device=device, dtype=dtype).mul_(0.02)
        for name, (shape, dtype) in large.specs(billions).items()
    }
    count = 3 if small else 4
    return Case(
        "llama", f"{count} x {sum(v.numel() for v in base.values()) / 1e9:.2f} B", base, _tuned(base, count, device)
    )


def matrices(device: str, small: bool) -> Case:
    """Make the same models as `vit`, for the methods that decompose matrices."""
    return vit(device, small, "matrices")


def _tuned(base: Mapping[str, Tensor], count: int, device: str) -> list[dict[str, Tensor]]:
    found = []
    for number in range(count):
        generator = torch.Generator(device).manual_seed(number + 1)
        draw = {"generator": generator, "device": device}
        found.append({n: v + 2e-3 * torch.randn(v.shape, dtype=v.dtype, **draw) for n, v in base.items()})
    return found


def _narrow() -> str:
    """Make open_clip know a narrow CLIP, and return its name."""
    import tempfile

    import open_clip

    tower = {"image_size": 224, "layers": 2, "width": 64, "head_width": 16, "patch_size": 32}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "byom-narrow.json"
        file.write_text(
            json.dumps({"embed_dim": 64, "quick_gelu": True, "vision_cfg": tower, "text_cfg": text}), encoding="utf-8"
        )
        open_clip.add_model_config(file)
    return "byom-narrow"


def copy_bandwidth(device: str, small: bool, clock: Clock) -> dict[str, Any]:
    """Measure a copy within the device; reading and writing count."""
    source = torch.ones((1 << 22) if small else (1 << 30), dtype=torch.float32, device=device)
    target = torch.empty_like(source)

    def work() -> None:
        target.copy_(source)

    row = clock(work)
    return row | {"moved_bytes": 2 * source.nbytes, "GB_per_s": round(2 * source.nbytes / row["seconds"] / 1e9, 1)}


def rows(given: argparse.Namespace, until: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """Measure everything, the cheapest first; what there is no time for is said."""
    clock = Clock(given.device, given.repeats)
    copied = copy_bandwidth(given.device, given.small, clock)
    yield "copy", copied
    for make in (vit, llama, matrices):
        try:
            yield from case_rows(make(given.device, given.small), clock, copied["GB_per_s"], until)
        except Exception as error:  # of a model that cannot be made, or of what several rows stand on
            yield make.__name__, {"failed": f"{type(error).__name__}: {error}"[:500]}
        if given.device == "cuda":
            torch.cuda.empty_cache()


def case_rows(case: Case, clock: Clock, bandwidth: float, until: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """Measure everything of some models; what there is no time for is said.

    Args:
        case: The models.
        clock: Measures.
        bandwidth: Of the device, in GB/s.
        until: When no row is begun any more.
    """
    for name, moved, work in jobs(case):
        label = f"{case.label}: {name}"
        if time.perf_counter() > until:
            yield label, {"not_run": "no time was left"}
            continue
        try:
            row = clock(work)
        except Exception as error:  # a row that says so, and the others still run
            yield label, {"failed": f"{type(error).__name__}: {error}"[:500]}
            continue
        speed = moved / row["seconds"] / 1e9
        share = {"GB_per_s": round(speed, 3), "of_copy": round(speed / bandwidth, 5)}
        yield label, row | {"moved_bytes": moved} | share


def jobs(case: Case) -> Iterator[tuple[str, int, Work]]:
    """Yield what is measured of some models: its name, the bytes that it cannot avoid, and the work."""
    count = len(case.experts)
    whole = (count + 2) * case.nbytes
    if case.kind != "matrices":
        arithmetic = plain(case)
        yield "plain task arithmetic", whole, lambda: where(Weights.of(arithmetic()))
    for name in MERGES[case.kind]:
        yield f"merge {name}", whole, merged(name, case)
    reference = config.option("merge", "average")(case.problem).materialise()
    for name in PACKS[case.kind]:
        variant = config.option("byom", name)
        against = Weights.of(case.base) if variant.on == "pretrained" else reference
        yield f"pack {name}", 2 * count * case.nbytes, packed(variant, case, against)
    if case.kind != "matrices":
        served = config.option("byom", "fft").serve(case.problem, reference)
        yield "unpack fft, one task", 2 * case.nbytes, lambda: where(served.weights("task0").materialise())


def plain(case: Case) -> Callable[[], dict[str, Tensor]]:
    """Return task arithmetic as one line of torch a tensor, written into tensors that are there."""
    out = {name: torch.empty_like(value) for name, value in case.base.items()}

    def work() -> dict[str, Tensor]:
        for name, value in case.base.items():
            torch.mul(value, 1 - SCALE * len(case.experts), out=out[name])
            for expert in case.experts:
                out[name].add_(expert[name], alpha=SCALE)
        return out

    return work


def merged(name: str, case: Case) -> Work:
    """Return the merging of a whole model by a method with its defaults."""
    method = config.option("merge", name)
    return lambda: where(method(case.problem).materialise())


def packed(variant: Variant, case: Case, reference: Weights) -> Work:
    """Return the packing of all tasks."""

    def work() -> dict[str, Any]:
        deltas = variant.serve(case.problem, reference).deltas
        return {"packed_bytes": sum(delta.nbytes for delta in deltas.values())}

    return work


def where(weights: Weights) -> dict[str, Any]:
    """Return on which devices a result lies."""
    return {"on": sorted({weights[name].device.type for name in weights})}


def table(found: Mapping[str, Any]) -> str:
    """Return a Markdown table."""
    lines = ["| work | s | GB/s | of copy | peak |", "|---|--:|--:|--:|--:|"]
    for name, row in found.items():
        if "seconds" not in row:
            lines.append(f"| {name} | {row.get('failed', row.get('not_run'))} | | | |")
            continue
        share = f"{100 * row['of_copy']:.1f} %" if "of_copy" in row else ""
        peak = f"{row['peak_bytes'] / 1e6:,.0f} MB" if "peak_bytes" in row else ""
        lines.append(f"| {name} | {row['seconds']:.4g} | {row['GB_per_s']:.3g} | {share} | {peak} |")
    return "\n".join(lines)


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    given = parser(__doc__ or "", repeats=3)
    given.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    given.add_argument("--small", action="store_true", help="in miniature")
    given.add_argument("--limit", type=float, default=600.0, help="seconds after which no row is begun")
    read = given.parse_args(arguments)
    if read.repeats < 1 or read.limit <= 0:
        given.error("--repeats and --limit must be positive")
    return read


def main() -> None:
    """Measure, writing after every row, and print."""
    given = options()
    if given.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no CUDA card here; --device cpu --small tries the script without one")
    found: dict[str, Any] = {}
    for name, row in rows(given, time.perf_counter() + given.limit):
        found[name] = row
        if given.json:
            write_json(given.json, found)
        sys.stderr.write(f"{name}: {row}\n")
    print(table(found))
    if given.check and (failed := [name for name, row in found.items() if "failed" in row]):
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
