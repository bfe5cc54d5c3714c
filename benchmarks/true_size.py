"""Eight experts of the true ViT-B/32, RoBERTa-base and Flan-T5-base, through every weights-only method and variant.

    python -m benchmarks.true_size --check --json benchmarks/true_size.json
    python -m benchmarks.true_size vit_b_32 --only task_arithmetic,fft

Weights are random and experts synthetic: nothing here says how good a method is. Everything is streamed from disk to
disk: experts are read from safetensors, the merged model is saved in shards, a bundle is packed one task at a time
and saved, one task's model is opened from it, and a few inputs are encoded. Every stage runs in a process of its own;
`benchmarks.peak` says what its memory is. Variants that take a merged model take that of TIES. A stage that needs more
than `--limit` seconds is stopped, and the table says how far it came. The disk holds one backbone's models at a time,
about 22 times its size, which is 22 GB for Flan-T5-base.

`--check` fails unless task arithmetic stays below (T + 3) times the largest tensor plus one shard, TIES and the packing
of BYOM-FFT below that plus 10 %, and a task restored at density 1 has its expert's features bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import true_models, true_stages
from benchmarks.options import conclude, parser
from benchmarks.peak import measured
from benchmarks.true_models import MODELS, SHARD, written
from byom.errors import suggest
from byom.merge.base import MergeMethod
from byom.merge.base.needs import Needs
from byom.pipeline.provenance import provenance
from byom.storage.atomic import write_json
from byom.variants.base import Variant

REFERENCE = "ties"
BOUNDED = {"merge task_arithmetic": 1.0, "merge ties": 1.1, "pack fft": 1.1}  # stage -> share of the bound
Row = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """The stages of one backbone.

    Args:
        name: Which of `MODELS`.
        folder: Its models.
        options: The command line.
    """

    name: str
    folder: Path
    options: argparse.Namespace

    def rows(self) -> Iterator[tuple[str, Row]]:
        """Measure every stage, one after the other."""
        with scratch(self.folder / "scratch") as place:
            yield from self._reference(place / REFERENCE)
            for label in self._chosen("merge"):
                yield from self._merge(label, place / "merged")
            for label in self._chosen("byom"):
                yield from self._variant(label, place / REFERENCE, place / "packed")

    def _reference(self, out: Path) -> Iterator[tuple[str, Row]]:
        stage, row = self._take(f"merge {REFERENCE}", true_stages.merge, method(REFERENCE), None, out, SHARD)
        yield stage, row
        if row["done"] < 1:
            sys.exit(f"{REFERENCE} took more than {self.options.limit:g} s, and variants stand on it; raise --limit")

    def _merge(self, label: str, place: Path) -> Iterator[tuple[str, Row]]:
        with scratch(place) as out:
            yield self._take(f"merge {label}", true_stages.merge, method(label), None, out / label, SHARD)

    def _variant(self, label: str, reference: Path, place: Path) -> Iterator[tuple[str, Row]]:
        option = variant(label).merged_by(method(REFERENCE))
        with scratch(place) as out:
            if option.before:
                reference, stage = out / "prepared", f"merge {REFERENCE} for {label}"
                yield self._take(stage, true_stages.merge, method(REFERENCE), option.before, reference, SHARD)
            if option.on == "pretrained":
                reference = self.folder / "pretrained"
            stage, row = self._take(f"pack {label}", true_stages.pack, option, reference, out / label)
            yield stage, row
            if row["done"] == 1:
                yield self._take(f"open {label}", true_stages.restore, out / label)
                inputs = (self.name, out / label, self.options.device)
                yield self._take(f"encode {label}", true_stages.encode, *inputs)
                if label == "fft":
                    yield self._take("encode fft at density 1", true_stages.exact, *inputs)

    def _take(self, stage: str, work: Callable[..., Mapping[str, Any]], *given: Any) -> tuple[str, Row]:
        given, options = (self.folder, self.options.tasks, *given), self.options
        runs = [measured(work, *given, threads=options.threads, limit=options.limit) for _ in range(options.repeats)]
        figures = {"seconds": round(median(run.seconds for run in runs), 3), "peak_bytes": max(r.peak for r in runs)}
        row = {**figures, "done": round(min(run.done for run in runs), 3), **runs[-1].said}
        sys.stderr.write(f"{self.name}: {stage}: {cell(row)}\n")
        return stage, row

    def _chosen(self, group: str) -> list[str]:
        """The options that were asked for, without the reference, which has been measured."""
        return [n for n in weights_only(group) if n != REFERENCE and (not self.options.only or n in self.options.only)]


@cache
def every(group: str) -> Mapping[str, Any]:
    """Return all options of a group with their defaults."""
    from byom.cli import config

    return {name: config.option(group, name) for name in config.options(group)}


def weights_only(group: str) -> list[str]:
    """Return the options of a group that need nothing but weights."""
    return [name for name, option in every(group).items() if option.needs == Needs()]


def method(name: str) -> MergeMethod:
    """Return a merge method with its defaults."""
    return every("merge")[name]


def variant(name: str) -> Variant:
    """Return a variant with its defaults."""
    return every("byom")[name]


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """Give a folder that is empty before and gone after."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def bench(name: str, options: argparse.Namespace, by: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Measure one backbone, giving what is known of it after every stage."""
    with written(name, options.tasks, options.folder.expanduser(), options.keep) as folder:
        size, rows = true_models.size(true_models.problem(folder, options.tasks).pretrained), {}
        facts = {**size, "bound_bytes": bound(size, options.tasks), "stages": rows, "provenance": by}
        facts |= {key: getattr(options, key) for key in ("tasks", "limit", "device", "only")}
        for stage, row in Bench(name, folder, options).rows():
            rows[stage] = row
            yield facts


def bound(size: Mapping[str, int], tasks: int, shard: int = SHARD) -> int:
    """Return the bytes that streaming may take: every model's largest tensor, three more of them, and one shard."""
    return (tasks + 3) * size["largest_bytes"] + shard


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the backbones asked for, keeping what the figures' file says of others; write it after every stage."""
    known = json.loads(options.json.read_text()) if options.json and options.json.is_file() else {}
    result = {"shard_bytes": SHARD, "experts": true_models.EXPERTS, "not_run": left_out()}
    result["backbones"] = known.get("backbones", {})
    by = provenance() | {"threads": options.threads}  # before the figures' file changes, which git would call dirty
    for name in options.backbones or MODELS:
        for facts in bench(name, options, by):
            result["backbones"][name] = facts
            if options.json:
                write_json(options.json, result)
    return result


def left_out() -> dict[str, str]:
    """Return the options that need more than weights, which this benchmark does not have, and what they need."""
    options = {f"{group} {name}": option for group in ("merge", "byom") for name, option in every(group).items()}
    return {name: option.needs.words for name, option in options.items() if option.needs != Needs()}


def table(result: dict[str, Any], stages: tuple[str, ...] = ()) -> str:
    """A Markdown table of seconds and peak memory.

    Args:
        result: The record.
        stages: Which rows, all if empty.
    """
    backbones = result["backbones"]
    found = stages or sorted({stage for each in backbones.values() for stage in each["stages"]}, key=order)
    lines = [f"| | {' | '.join(map(_heading, backbones, backbones.values()))} |", "|---|" + "--:|" * len(backbones)]
    lines.append(f"| bound | {' | '.join(_mega(each['bound_bytes']) for each in backbones.values())} |")
    for stage in found:
        cells = [cell(each["stages"][stage]) if stage in each["stages"] else "" for each in backbones.values()]
        lines.append(f"| {stage} | {' | '.join(cells)} |")
    missing = "; ".join(f"{name} ({needs})" for name, needs in result["not_run"].items())
    return "\n".join([*lines, "", f"Not run, because random weights have no inputs: {missing}."])


def order(stage: str) -> tuple[int, str]:
    """Return what stages are sorted by: what is done first comes first."""
    return ("merge", "pack", "open", "encode").index(stage.split(maxsplit=1)[0]), stage


def _heading(name: str, each: Mapping[str, Any]) -> str:
    return f"{name}: {each['parameters'] / 1e6:.1f} M, T={each['tasks']}, threads={each['provenance']['threads']}"


def cell(row: Row) -> str:
    """Seconds and peak memory; for a stage that was stopped, how far it came and how long it would take."""
    figures = f"{row['seconds']:.1f} s, {_mega(row['peak_bytes'])}"
    if row["done"] == 1:
        return figures
    whole = f", about {row['seconds'] / row['done'] / 60:.0f} min in all" if row["done"] else ""
    return f"stopped after {figures} at {100 * row['done']:.0f} %{whole}"


def _mega(nbytes: float) -> str:
    return f"{nbytes / 1e6:,.0f} MB"


def missed(result: dict[str, Any]) -> str:
    """The sentences about missed targets, or nothing."""
    return "\n".join(said for name, each in result["backbones"].items() for said in _missed(name, each))


def _missed(name: str, each: Mapping[str, Any]) -> Iterator[str]:
    rows = each["stages"]
    for stage, share in BOUNDED.items():
        allowed = share * each["bound_bytes"]
        if stage not in rows or rows[stage]["done"] < 1:
            yield f"{name}: {stage} was not measured to its end"
        elif rows[stage]["peak_bytes"] > allowed:
            yield f"{name}: {stage} took {_mega(rows[stage]['peak_bytes'])}, and {_mega(allowed)} are allowed"
    for stage, row in rows.items():
        if not row.get("exact", True):
            yield f"{name}: {stage}: features of a task restored at density 1 are not its expert's; please report it"


def cache_folder() -> Path:
    """Return the folder that models are written to unless --folder says otherwise."""
    return Path(os.environ.get("BYOM_CACHE", "~/.cache/byom")) / "true_size"


def options() -> argparse.Namespace:
    """Read the command line."""
    given = parser(__doc__ or "", repeats=1)
    given.add_argument("backbones", nargs="*", metavar="backbone", help=f"{', '.join(MODELS)}; all by default")
    given.add_argument("--only", type=lambda text: text.split(","), default=[], help="options, e.g. tsv,fft")
    given.add_argument("--tasks", type=int, default=8, help="experts (T)")
    given.add_argument("--folder", type=Path, default=cache_folder(), help="where models are written")
    given.add_argument("--keep", action="store_true", help="leave the experts in the folder, for the next time")
    given.add_argument("--limit", type=float, default=600.0, help="seconds a stage may take")
    given.add_argument("--threads", type=int, default=2)
    given.add_argument("--device", default="cpu", help="where inputs are encoded")
    read = given.parse_args()
    for asked, known in ((read.backbones, [*MODELS]), (read.only, [*weights_only("merge"), *weights_only("byom")])):
        if unknown := [name for name in asked if name not in known]:
            given.error(f"'{unknown[0]}' cannot be measured; {suggest(unknown[0], known)}")
    if min(read.tasks, read.repeats, read.threads) < 1:
        given.error("--tasks, --repeats and --threads must be 1 or more")
    return read


def main() -> None:
    """Measure, print, and write or check on request."""
    given = options()
    result = measure(given)
    conclude(result, table(result), missed(result), given)


if __name__ == "__main__":
    main()
