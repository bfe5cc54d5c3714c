"""The cost of an experiment before anything of it starts: cells, downloads, disk, memory, time."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any

from byom.data.suite import Task
from byom.pipeline.inputs import Names
from byom.pipeline.settings import Settings
from byom.storage.record import Record
from byom.storage.repository import Download

BATCH = 8
WORDS = "a sentence of about ten words, as short texts mostly are"
COPIES = 4  # pre-trained, what the encoder holds, merged, and the task's own model
STAGES = ("statistics", "tune", "merge", "variant", "route", "evaluate")


@dataclass(frozen=True)
class Plan:
    """The cost of some runs.

    Args:
        cells: How many cells there are.
        finished: How many of them have a record.
        downloads: What is needed from hubs.
        train: Experts to be fine-tuned here.
        models: Merged models that are not in the cache yet.
        model_bytes: Size of one model, where the backbone's weights are here.
        examples: Examples that the missing cells evaluate, of the tasks whose sizes are known; None if none is.
        seconds: Estimated seconds of the missing cells, and what the estimate rests on.
        pace: Seconds per example in a trial of the backbone on this machine.
    """

    cells: int
    finished: int
    downloads: tuple[Download, ...]
    train: int
    models: int
    model_bytes: int | None
    examples: int | None
    seconds: tuple[float, str] | None
    pace: float | None = None

    @property
    def disk(self) -> int | None:
        """Bytes that the downloads and the cached models of the missing cells will take; None where unknown."""
        sizes = [d.bytes for d in self.downloads if not d.local]
        if self.model_bytes is None or any(size is None for size in sizes):
            return None
        return sum(size or 0 for size in sizes) + (self.models + self.train) * self.model_bytes

    @property
    def memory(self) -> int | None:
        """Bytes of memory that models take at once, without examples and activations; None where unknown."""
        return None if self.model_bytes is None else COPIES * self.model_bytes


def plan(cells: Sequence[Settings]) -> Plan:
    """Find out what some runs need; nothing is fetched, and nothing is written.

    Args:
        cells: The runs.

    Returns:
        The plan.
    """
    missing = [cell for cell in cells if cell.place().finished() is None]
    done = [Record.lift(values) for cell in cells if (values := cell.place().finished())]
    size, pace = _trial(missing)
    examples = [count for cell in missing for count in _examples(cell)]
    known = [count for count in examples if count is not None]
    return Plan(
        cells=len(cells),
        finished=len(cells) - len(missing),
        downloads=tuple(_downloads(missing)),
        train=len(_untrained(missing)),
        models=len({repr((cell.suite.name, cell.effective(), cell.seed)) for cell in missing if cell.merges}),
        model_bytes=size,
        examples=sum(known) if known else None,
        seconds=_seconds(done, len(missing), pace, sum(known) if len(known) == len(examples) else None),
        pace=pace,
    )


def _downloads(cells: Iterable[Settings]) -> Iterator[Download]:
    """Yield every download of some runs once."""
    alike = {repr((cell.backbone, cell.suite, cell.experts)): cell for cell in cells}
    downloads = (each for cell in alike.values() for each in _needed(cell))
    yield from {(each.what, each.place): each for each in downloads}.values()


def _needed(cell: Settings) -> list[Download]:
    """Return what a run needs from hubs."""
    tasks = cell.suite.tasks
    data = [each for task in tasks for each in task.source.downloads(f"data {task.name}")]
    return [*cell.backbone.downloads(), *cell.experts.downloads(tasks), *data]


def _untrained(cells: Sequence[Settings]) -> set[Path]:
    """Return where experts will be kept that are not fine-tuned yet; those of data that is not here are unknown."""
    folders = {
        cell.cache / "experts" / _names(cell).expert(task)
        for cell in cells
        for task in cell.experts.trains(cell.suite.tasks)
    }
    return {folder for folder in folders if not (folder / "training.json").is_file()}


def _names(cell: Settings) -> Names:
    return Names(cell.backbone, cell.experts, cell.finetune, cell.seed, cell.cache, cell.precision)


def _examples(cell: Settings) -> list[int | None]:
    """Return how many examples a cell evaluates, one number per task and split."""
    return [getattr(task, split) for task in cell.suite.tasks for split in cell.evaluate.splits]


def _trial(cells: Sequence[Settings]) -> tuple[int | None, float | None]:
    """Return a model's bytes, and the seconds that this machine takes for an example, as far as can be known here."""
    if not cells:
        return None, None
    import torch

    from byom.pipeline.device import resolve

    backbone, device = cells[0].backbone, resolve(cells[0].device)
    here = all(each.local for each in backbone.downloads())
    encoder = backbone.load() if here else backbone.blank()
    if encoder is None:
        return None, None
    encoder = encoder.to(device).eval()
    size = sum(p.numel() * p.element_size() for p in encoder.parameters())
    task = cells[0].suite.tasks[0]
    inputs = backbone.encode([_sample(task)] * BATCH, task)
    with torch.inference_mode():
        encoder(**{name: value.to(device) for name, value in inputs.items()})
        start = time.perf_counter()
        encoder(**{name: value.to(device) for name, value in inputs.items()})
        if device.type == "cuda":
            torch.cuda.synchronize()
    return size, (time.perf_counter() - start) / BATCH


def _sample(task: Task) -> Any:
    """Return an input of a task's kind."""
    from PIL import Image

    if task.modality == "image":
        return Image.new("RGB", (64, 64))
    columns = [name for _, name, _, _ in Formatter().parse(task.prompt) if name]
    return dict.fromkeys(columns, WORDS) if columns else WORDS


def _seconds(
    done: Sequence[Record], missing: int, pace: float | None, examples: int | None
) -> tuple[float, str] | None:
    if not missing:
        return 0.0, "nothing is missing"
    if done:
        taken = [sum(record.stages[s].seconds for s in STAGES if s in record.stages) for record in done]
        return missing * sum(taken) / len(taken), f"the {len(done)} finished cells, without fine-tuning"
    if pace is None or examples is None:
        return None
    return pace * examples, f"{1000 * pace:.1f} ms per example in a trial on this machine, evaluation only"


def text(name: str, plan: Plan) -> str:
    """Return a plan as it is printed."""
    missing = plan.cells - plan.finished
    lines = [f"{name}: {plan.cells} cells, {plan.finished} finished, {missing} missing", ""]
    rows = [(d.what, d.place, "here" if d.local else "missing", _size(d.bytes)) for d in plan.downloads]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)] if rows else []
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += [""] * bool(rows) + [*_totals(plan)]
    return "\n".join(lines)


def _totals(plan: Plan) -> Iterator[str]:
    absent = [d for d in plan.downloads if not d.local]
    sizes = [d.bytes for d in absent if d.bytes is not None]
    unknown = len(absent) - len(sizes)
    more = f", and {unknown} of a size that no hub could be asked for" if unknown else ""
    yield f"downloads  {_size(sum(sizes))} in {len(sizes)} places{more}"
    if plan.model_bytes and unknown:
        yield f"           a model takes {_size(plan.model_bytes)} in fp32, and so does each expert but adapters"
    models = f"{plan.models} merged models" + (f" and {plan.train} experts" if plan.train else "")
    yield f"disk       {_size(plan.disk)}: downloads, {models} in the cache; encoded examples come on top"
    yield f"memory     {_size(plan.memory)}: {COPIES} models; examples and activations come on top"
    yield f"time       {_time(plan)}"


def _time(plan: Plan) -> str:
    training = f"; {plan.train} experts are fine-tuned first, which is not in this time" if plan.train else ""
    if plan.seconds is None and plan.pace:
        missing = plan.cells - plan.finished
        return (
            f"{1000 * plan.pace:.1f} ms per example in a trial on this machine, times {missing} cells; "
            f"how many examples there are is known once the data is here{training}"
        )
    if plan.seconds is None:
        return f"unknown until the backbone is here{training}"
    seconds, basis = plan.seconds
    return f"about {seconds / 60:.0f} min: {basis}{training}"


def _size(count: int | None) -> str:
    if count is None:
        return "unknown"
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def fetch(cells: Sequence[Settings]) -> Iterator[str]:
    """Bring everything that some runs need from hubs to this machine, one thing at a time.

    Args:
        cells: The runs.

    Yields:
        A line for each thing that is here now.
    """
    seen: set[str] = set()
    for cell in cells:
        steps = [(repr(cell.backbone), "backbone", cell.backbone.fetch)]
        for task in cell.suite.tasks:
            expert = json.dumps([repr(cell.experts), task.name])
            steps.append((expert, f"expert {task.name}", lambda task=task, cell=cell: cell.experts.fetch(task)))
            steps.append((repr(task.source), f"data {task.name}", task.source.fetch))
        for key, what, bring in steps:
            if key not in seen:
                seen.add(key)
                bring()
                yield f"{what}: here"
