"""Previews: from merged models alone, the accuracy of every task over a grid of task weights, and its record."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from byom.data.suite import Suite
from byom.errors import OptionError, suggest
from byom.functional.pareto import agreement, hypervolume, unbeaten
from byom.functional.precision import later
from byom.functional.simplex import Point, simplex, spread, trained
from byom.merge.base import MergeMethod, Problem
from byom.pipeline import measure
from byom.pipeline.cell import Cell
from byom.pipeline.checks import require_possible
from byom.pipeline.lab import Lab
from byom.pipeline.labs import laboratory
from byom.pipeline.provenance import Stages, provenance, results_root
from byom.pipeline.scorer import Job, Scorer
from byom.pipeline.settings import Settings
from byom.storage.place import Place, now
from byom.storage.preview import Summary, Weighting, accuracies
from byom.storage.record import FORMAT
from byom.storage.signature import describe, recorded, signature
from byom.weights import Weights

STEPS = {2: 20, 3: 8}
# the time to find a volume grows as the points to the power of the tasks less one
MEASURED_TASKS = 4
PLACES = ("results", "cache")
GROUPS = ("suite", "backbone", "finetune", "statistics", "evaluate", "merge", "seed", "device", "precision", *PLACES)


@dataclass(frozen=True)
class Preview:
    """The options of a preview.

    Args:
        tasks: Two or more of the suite's tasks; empty takes all.
        methods: Merge methods that take weights.
        steps: Weights are multiples of ``1 / steps``; None takes 20 for two tasks, 8 for three, and a sample for more.
        points: Weightings drawn for four tasks or more.
        joint: Weightings at which a model is fine-tuned on all tasks together, for comparison.
        components: Fine-tuned models per task (K) for mixtures.
        examples: At most so many examples of each split; None takes all.

    Raises:
        OptionError: If a value is out of range.
    """

    tasks: tuple[str, ...] = ()
    methods: tuple[str, ...] = ("average", "hessian_weighted", "mixture")
    steps: int | None = None
    points: int = 64
    joint: int = 3
    components: int = 3
    examples: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", _names(self.tasks))
        object.__setattr__(self, "methods", _names(self.methods))
        if not self.methods:
            raise OptionError("methods=[] previews nothing; use methods=[average,hessian_weighted,mixture]")
        least = {"steps": 1, "points": 0, "joint": 0, "components": 1, "examples": 1}
        for name, low in least.items():
            if (value := getattr(self, name)) is not None and not (isinstance(value, int) and value >= low):
                raise OptionError(f"{name}={value} is out of range; use a whole number, {low} or more")

    @classmethod
    def of(cls, resolved: Mapping[str, Any]) -> Preview:
        """Take the options out of a plain configuration."""
        return cls(**{option.name: resolved[option.name] for option in fields(cls)})

    def narrowed(self, suite: Suite) -> Suite:
        """Return the suite with the tasks asked for, in its own order.

        Raises:
            OptionError: If a task is unknown, or fewer than two are left.
        """
        known = [task.name for task in suite.tasks]
        for name in self.tasks:
            if name not in known:
                raise OptionError(f"suite {suite.name} has no task '{name}'; {suggest(name, known)}")
        chosen = tuple(task for task in suite.tasks if not self.tasks or task.name in self.tasks)
        if len(chosen) < 2:
            raise OptionError(f"a preview weighs two tasks or more, not {[task.name for task in chosen]}")
        return replace(suite, tasks=chosen)

    def grid(self, tasks: int) -> list[Point]:
        """Return the weightings that are previewed."""
        steps = self.steps or STEPS.get(tasks)
        return simplex(tasks, steps) if steps else spread(tasks, self.points)


def _names(given: str | Iterable[str]) -> tuple[str, ...]:
    """Return distinct names; one name alone needs no brackets."""
    return tuple(dict.fromkeys([given] if isinstance(given, str) else given))


def require_known(arguments: Sequence[str]) -> None:
    """Refuse overrides that a preview would ignore.

    Raises:
        OptionError: Naming the nearest option that it has.
    """
    known = [*(option.name for option in fields(Preview)), *GROUPS]
    for argument in arguments:
        key = argument.lstrip("+~").partition("=")[0]
        if key.partition(".")[0] not in known:
            raise OptionError(f"byom preview knows no '{key}'; {suggest(key, known)}")
        if key == "merge":
            raise OptionError(f"byom preview takes several methods at once: write methods=[{argument[6:]}]")
        if key == "merge.weights":
            raise OptionError("byom preview goes through all weights; byom run merge.weights=[...] takes one weighting")


def require_weighable(name: str, method: MergeMethod) -> None:
    """Refuse a method whose task weights are not those of joint fine-tuning, or that has none.

    Raises:
        OptionError: Naming the option.
    """
    if not method.previews:
        raise OptionError(
            f"methods: {name} cannot be previewed, it has no weights of the tasks' losses; use some of average, "
            "hessian_weighted, mixture, fisher"
        )


@dataclass(frozen=True)
class PreviewPlace(Place):
    """The place of a preview's record."""

    @property
    def _folder(self) -> Path:
        return self.root / "previews" / self.suite / self.backbone


def run(preview: Preview, settings: Mapping[str, Settings]) -> tuple[dict[str, Any], Path]:
    """Preview, or return the record if that has been done before.

    Args:
        preview: What.
        settings: A run for each of its methods; they differ in the merge method alone.

    Returns:
        The record and its file.

    Raises:
        Exception: Whatever was raised, after a ``.failed.json`` has been written; what was scored is kept.
    """
    suite = preview.narrowed(next(iter(settings.values())).suite)
    settings = {name: replace(settings[name], suite=suite) for name in preview.methods}
    for name, one in settings.items():
        require_weighable(name, one.merge)
        require_possible(one)
    place = _place(preview, settings)
    if (finished := place.finished()) is not None:
        return finished, place.done
    place.require_writable()
    record = _header(preview, settings, place)
    try:
        record |= execute(preview, settings) | {"status": "done"}
    except BaseException as error:
        place.write(record | {"status": "failed", "error": f"{type(error).__name__}: {error}"})
        raise
    return record, place.write(record)


def execute(preview: Preview, settings: Mapping[str, Settings]) -> dict[str, Any]:
    """Do the work of a preview and return the measured part of its record."""
    first, stages = next(iter(settings.values())), Stages()
    lab, splits = laboratory(first), first.evaluate.splits
    scorer = Scorer(lab, splits, preview.examples)
    with stages.stage("data"):
        lab.read_all(first.evaluate.splits)
    with stages.stage("experts"):
        experts = {task: lab.expert(task) for task in lab.tasks}
    with stages.stage("statistics"):
        problems = {name: Cell(one, lab).merging for name, one in settings.items()}
    chosen = trained(len(experts), preview.joint)
    grid = list(dict.fromkeys([*preview.grid(len(experts)), *chosen]))
    with stages.stage("preview"):
        own = scorer.run(_references(lab, experts))
        jobs = [job for name, one in settings.items() for job in _previewed(one, problems[name], grid)]
        results = scorer.run(jobs)
    with stages.stage("joint"):
        joint = scorer.run(_joint(lab, chosen))
    points = {name: results[n * len(grid) : (n + 1) * len(grid)] for n, name in enumerate(settings)}
    return {
        "tasks": list(lab.tasks),
        "points": {name: _json(rows) for name, rows in points.items()},
        "joint": _json(joint),
        "pretrained": own[0].to_json(),
        "experts": _json(own[1:]),
        "summary": {split: _said(summary(points, joint, split)) for split in splits},
        "examples": {split: {task: len(scorer.split(task, split)) for task in lab.tasks} for split in splits},
        "stages": stages.taken,
        "fingerprints": measure.fingerprints(lab, experts),
    }


def summary(points: Mapping[str, Sequence[Weighting]], joint: Sequence[Weighting], split: str) -> dict[str, Summary]:
    """Return what a preview says on one split.

    Args:
        points: Method to scored weightings.
        joint: Scored jointly fine-tuned models, at weightings that were previewed too.
        split: The split.

    Returns:
        For each method the place of the best mean accuracy, those of the Pareto set, the volume below it (up to four
        tasks), and the agreement with joint fine-tuning.
    """
    truth = accuracies(joint, split)
    return {name: _summary(rows, joint, truth, split) for name, rows in points.items()}


def _summary(rows: Sequence[Weighting], joint: Sequence[Weighting], truth: np.ndarray, split: str) -> Summary:
    scores, place = accuracies(rows, split), {row.weights: n for n, row in enumerate(rows)}
    same = [place[row.weights] for row in joint]
    return Summary(
        best=int(scores.mean(1).argmax()),
        pareto=tuple(np.flatnonzero(unbeaten(scores)).tolist()),
        hypervolume=hypervolume(scores) if scores.shape[1] <= MEASURED_TASKS else None,
        agreement=agreement(scores[same], truth) if same else None,
    )


def _json(rows: Iterable[Weighting]) -> list[dict[str, Any]]:
    return [row.to_json() for row in rows]


def _said(found: Mapping[str, Summary]) -> dict[str, Any]:
    return {name: one.to_json() for name, one in found.items()}


def _previewed(settings: Settings, problem: Problem, grid: Sequence[Point]) -> Iterable[Job]:
    for alpha in grid:
        method = replace(settings.merge, **{"weights": alpha})
        key = signature(method, settings.wanted())
        yield Job(settings.names["merge"], alpha, key, partial(method, problem))


def _joint(lab: Lab, chosen: Sequence[Point]) -> Iterable[Job]:
    for alpha in chosen:
        shares = dict(zip(lab.tasks, alpha, strict=True))
        key = signature("joint by frequency", alpha, *lab.joining)
        yield Job("joint fine-tuning", alpha, key, partial(lab.joint, shares))


def _references(lab: Lab, experts: Mapping[str, Weights]) -> Iterable[Job]:
    """The pre-trained model, and every expert on every task: what joint fine-tuning on one task alone gives."""
    yield Job("pretrained", (), "pretrained", lambda: lab.pretrained)
    for task, expert in experts.items():
        alpha = tuple(float(task == other) for other in experts)
        yield Job(f"expert {task}", alpha, signature("expert", task), lambda expert=expert: expert)


def _place(preview: Preview, settings: Mapping[str, Settings]) -> Place:
    s = next(iter(settings.values()))
    tasks = [task.name for task in s.suite.tasks]
    methods = {name: [one.merge, one.wanted()] for name, one in settings.items()}
    asked = [preview.grid(len(tasks)), trained(len(tasks), preview.joint), preview.examples]
    asked += [*([s.contents] if s.contents else []), *later(s.precision)]
    name = signature("preview", s.suite, s.backbone, s.finetune, s.seed, s.evaluate, methods, *asked)
    label = "+".join(tasks) if len(tasks) <= MEASURED_TASKS else f"{len(tasks)}-tasks"
    return PreviewPlace(results_root(s.results), s.suite.name, s.names["backbone"], label, name)


def _header(preview: Preview, settings: Mapping[str, Settings], place: Place) -> dict[str, Any]:
    s = next(iter(settings.values()))
    names = {key: s.names[key] for key in ("suite", "backbone", "finetune")} | {"seed": s.seed}
    return {
        "format": FORMAT,
        "signature": place.signature,
        "created": now(),
        "choices": names,
        "preview": describe({f.name: getattr(preview, f.name) for f in fields(preview)}),
        "titles": {name: one.merge.title for name, one in settings.items()},
        "hyperparameters": {
            name: {k: v for k, v in recorded(one.merge).items() if k != "weights"} for name, one in settings.items()
        },
        "statistics": {n: recorded(w) for one in settings.values() for n, w in one.wanted().items()},
        "needs": {name: one.merge.needs.words for name, one in settings.items()},
        "config": {key: value for key, value in s.resolved.items() if key not in ("results", "cache", "merge")},
        "skipped_tasks": list(s.suite.missing),
        "provenance": provenance(),
    }
