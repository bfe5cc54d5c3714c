"""The time that is left of a sweep: what its cells still need, times what each kind of work took so far."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from byom.data.suite import Task
from byom.errors import ByomError
from byom.pipeline.cached import Keys, note
from byom.pipeline.inputs import Names
from byom.pipeline.provenance import same_machine
from byom.pipeline.settings import Settings
from byom.storage.signature import signature

Kind = tuple[str, str]
"""A stage, and the method, variant or other choice that does its work; two of one stage say nothing of each other."""
OPEN, TRAIN = ("experts", ""), ("experts", "train")
EVALUATE = ("evaluate", "")


class Work(NamedTuple):
    """Work of one stage of a cell.

    Args:
        kind: What does it.
        keys: What is made: of several cells that share it, the first makes it.
        each: Units of work for one key.
    """

    kind: Kind
    keys: frozenset[str]
    each: float


class Left(NamedTuple):
    """The time that is left.

    Args:
        seconds: For all work of a kind that was measured.
        unmeasured: Other kinds of work that are left; what they take is not in `seconds`.
    """

    seconds: float
    unmeasured: frozenset[Kind]


class Forecast:
    """Learns from finished cells what the others will take.

    Args:
        cells: Those that are to run, before any of them does.
        pace: Seconds for evaluating an example, for as long as none was measured; None where nothing is known.
    """

    def __init__(self, cells: Sequence[Settings], pace: float | None = None) -> None:
        self._counted = all(examples(cell) is not None for cell in cells)
        held: dict[str, bool] = {}
        self._works = [(cell, _works(cell, held, counted=self._counted)) for cell in cells]
        self._made: set[str] = set()
        self._measured: dict[Kind, tuple[float, float]] = {}  # seconds and units
        self._earlier: dict[Kind, float] = {EVALUATE: pace} if pace is not None and self._counted else {}
        trained = (_trained(cell) for cell, works in self._works if any(work.kind == TRAIN for work in works))
        if seconds := next(trained, None):
            self._earlier[TRAIN] = seconds

    def finished(self, cell: Settings, stages: Mapping[str, float]) -> None:
        """Take note of a cell that has run.

        Args:
            cell: The same object as in `cells`.
            stages: Stage to its seconds; empty for a cell that failed, which teaches nothing and is not left either.
        """
        works = next(works for one, works in self._works if one is cell)
        self._works = [(one, others) for one, others in self._works if one is not cell]
        for work in works:
            if (taken := stages.get(work.kind[0])) is None:
                continue
            if units := _units(work, self._made):
                before = self._measured.get(work.kind, (0.0, 0.0))
                self._measured[work.kind] = before[0] + taken, before[1] + units
            self._made |= work.keys

    def earlier(self, cell: Settings, record: Mapping[str, Any]) -> None:
        """Take note of the record of an earlier run; what this run measures itself counts more.

        Args:
            cell: The record's run.
            record: The values of its file.
        """
        cost, stages = record.get("cost") or {}, record.get("stages") or {}
        tasks, trained = len(cell.suite.tasks), cost.get("training") or {}
        said = {
            TRAIN: (trained, trained.get("models", 0)),
            ("statistics", _fitted(cell)): (cost.get("statistics"), tasks),
            ("merge", type(cell.effective()[0]).__name__): (cost.get("merge"), tasks),
            ("variant", type(cell.byom).__name__): (cost.get("variant"), tasks),
            _evaluation(cell): (stages.get("evaluate"), _evaluated(cell, cell.evaluate.splits, counted=self._counted)),
        }
        for kind, (taken, units) in said.items():
            if taken and units:
                self._earlier[kind] = taken["seconds"] / units

    def left(self) -> Left:
        """Return the time that is left for the cells that have not run."""
        made, seconds, unmeasured = set(self._made), 0.0, set()
        for work in (work for _, works in self._works for work in works):
            if units := _units(work, made):
                pace = self._pace(work.kind)
                seconds += units * (pace or 0.0)
                unmeasured |= {work.kind} if pace is None else set()
            made |= work.keys
        return Left(seconds, frozenset(unmeasured))

    def _pace(self, kind: Kind) -> float | None:
        """Return the seconds of a unit of work; None where nothing is known of it."""
        if kind in self._measured:
            seconds, units = self._measured[kind]
            return seconds / units
        if kind in self._earlier:
            return self._earlier[kind]
        return self._pace(EVALUATE) if kind[0] in ("tune", "evaluate") and kind != EVALUATE else None


def _trained(cell: Settings) -> float | None:
    """Return the seconds that a model took which was fine-tuned as a cell's experts are, on a machine like this one."""
    for path in sorted(cell.place().done.parent.glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            training, recipe = record["cost"]["training"], record["config"]["finetune"]
        except (ValueError, KeyError, TypeError):  # damaged, failed, or of a run that trained nothing
            continue
        if recipe == cell.resolved["finetune"] and same_machine(record):
            return training["seconds"] / training["models"]
    return None


def _units(work: Work, made: set[str]) -> float:
    return work.each * len(work.keys - made)


def examples(cell: Settings) -> int | None:
    """Return how many examples a cell evaluates; None where a task does not say how many it has."""
    sizes = [getattr(task, split) for task in cell.suite.tasks for split in cell.evaluate.splits]
    return None if None in sizes else sum(sizes)


def _evaluated(cell: Settings, splits: Sequence[str], *, counted: bool) -> float:
    """Return the size of an evaluation: its examples, or its splits where not all of them say how many they have."""
    return float(sum(getattr(task, split) or 0 if counted else 1 for task in cell.suite.tasks for split in splits))


def _evaluation(cell: Settings) -> Kind:
    return ("evaluate", cell.names["router"]) if cell.routed else EVALUATE


def _fitted(cell: Settings) -> str:
    """Return what the stage of statistics makes, in words: the statistics, and further models of each task."""
    members = cell.needs.members
    return ", ".join([*cell.wanted(), *([f"{members} models per task"] if members > 1 else [])])


def _works(cell: Settings, held: dict[str, bool], *, counted: bool) -> list[Work]:
    """Return what a cell needs and the cache does not hold; nothing of one that will be refused.

    Args:
        cell: The cell.
        held: Whether an expert is here, for those that were looked at; grows.
        counted: Whether examples are counted.
    """
    try:
        names = Names(cell.backbone, cell.experts, cell.finetune, cell.seed, cell.cache, cell.precision)
        experts = {task.name: _named(names, cell, task, held) for task in cell.suite.tasks}
        keys = Keys.of(cell, signature(list(experts.values())))
        return [*_given(cell, experts, keys), *_made(cell, keys, counted=counted)]
    except ByomError:  # which its own run says
        return []


def _named(names: Names, cell: Settings, task: Task, held: dict[str, bool]) -> str:
    """Return the name of an expert; of one that is to be fetched, and of which nothing is here, any that is its own."""
    known = f"{cell.experts} {task.name}"
    if known not in held:
        held[known] = cell.experts.held(task)
    return names.expert(task) if held[known] else known


def _given(cell: Settings, experts: Mapping[str, str], keys: Keys) -> Iterator[Work]:
    """Yield what comes before merging: data, experts, statistics."""
    tasks, wanted = cell.suite.tasks, cell.wanted()
    yield Work(("data", ""), frozenset([f"data {keys.experts}"]), len(tasks))
    here = (experts[task.name] for task in cell.experts.trains(tasks))
    untrained = frozenset(key for key in here if not (cell.cache / "experts" / key / "training.json").is_file())
    yield Work(TRAIN, untrained, 1.0) if untrained else Work(OPEN, frozenset([f"experts {keys.experts}"]), len(tasks))
    if fitted := _fitted(cell):
        files = [
            cell.cache / "statistics" / signature(k, s) / "cost.json" for k in experts.values() for s in wanted.values()
        ]
        if cell.needs.members > 1 or not all(file.is_file() for file in files):
            yield Work(("statistics", fitted), frozenset([f"statistics {keys.experts} {fitted} {files}"]), len(tasks))


def _made(cell: Settings, keys: Keys, *, counted: bool) -> Iterator[Work]:
    """Yield what is made of the experts: a search, the merged model, packed tasks, routing, scores."""
    (method, tuner), variant, size, alone = cell.effective(), cell.byom, len(cell.suite.tasks), cell.signature()
    search, candidates = keys.tuning(method, tuner), len(tuner.candidates(method))
    if candidates and not (cell.cache / "tuning" / f"{search}.json").is_file():
        examples = _evaluated(cell, ("validation",), counted=counted)
        yield Work(("tune", cell.names["merge"]), frozenset([f"tune {search}"]), candidates * examples)
    # where something is chosen first, the names of what is made of it are known after that
    merged = not candidates and note(cell.cache / "merged" / keys.merged(method)).is_file()
    if method.merges and not merged:
        yield Work(("merge", type(method).__name__), frozenset([f"merge {search}"]), size)
    served = not candidates and note(cell.cache / "served" / keys.served(method, variant)).is_file()
    if not (served and variant.needs.inputs):
        one = f"{search} {signature(variant)}" if variant.needs.inputs else alone
        yield Work(("variant", type(variant).__name__), frozenset([f"variant {one}"]), size)
    if cell.routed:
        yield Work(("route", cell.names["router"]), frozenset([f"route {alone}"]), size)
    scored = _evaluated(cell, cell.evaluate.splits, counted=counted)
    yield Work(_evaluation(cell), frozenset([f"evaluate {alone}"]), scored)
