"""The pipeline: experts -> tune -> merge -> variant -> evaluate -> record."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from tqdm import tqdm

from byom import measure
from byom.backbone.base import Backbone
from byom.errors import OptionError
from byom.finetune import Full
from byom.lab import Lab
from byom.logger import Logger
from byom.merge.base import MergeMethod, Problem
from byom.merge.pretrained import Pretrained
from byom.record import FORMAT, Place, Stages, now, provenance, results_root, write_json
from byom.signature import describe, signature
from byom.suite import Suite
from byom.tune import AsGiven, Tuner
from byom.variants.base import Delta, Variant
from byom.weights import Weights

SPLITS = ("validation", "test")


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated.

    Args:
        splits: Any of ``validation`` and ``test``.
        batch_size: Examples a forward pass.

    Raises:
        OptionError: If a split is unknown.
    """

    splits: tuple[str, ...] = SPLITS
    batch_size: int = field(default=50, metadata={"signature": False})

    def __post_init__(self) -> None:
        object.__setattr__(self, "splits", tuple(self.splits))
        if not self.splits or not set(self.splits) <= set(SPLITS) or self.batch_size < 1:
            raise OptionError(f"evaluate.splits={list(self.splits)} must name some of {list(SPLITS)}, batch_size >= 1")


@dataclass(frozen=True)
class Settings:
    """One run, as plain objects.

    Args:
        suite: The tasks.
        backbone: The encoder.
        finetune: How experts are trained.
        merge: The merge method.
        byom: The variant.
        tune: How hyperparameters of the merge method are chosen.
        evaluate: What is evaluated.
        logger: Where the record is mirrored.
        seed: Draws data and orders training.
        device: ``cpu``, ``cuda`` or ``auto``.
        results: Where records go.
        cache: Where everything goes that can be made again.
        names: Group to the name of the option chosen.
        resolved: The configuration as plain containers.
    """

    suite: Suite
    backbone: Backbone
    finetune: Full
    merge: MergeMethod
    byom: Variant
    tune: Tuner
    evaluate: Evaluation
    logger: Logger
    seed: int
    device: str
    results: Path
    cache: Path
    names: Mapping[str, str]
    resolved: Mapping[str, Any]

    @property
    def merges(self) -> bool:
        """Whether the merge method matters: variants on the pre-trained model ignore it."""
        return self.byom.reference == "merged"

    def effective(self) -> tuple[MergeMethod, Tuner]:
        """Return the merge method and tuner that determine the result."""
        return (self.merge, self.tune) if self.merges else (Pretrained(), AsGiven())

    def signature(self) -> str:
        """Return the hash of everything that determines the scores."""
        merge, tune = self.effective()
        searched = tune if tune.candidates(merge) else AsGiven()
        return signature(self.suite, self.backbone, self.finetune, merge, searched, self.byom, self.evaluate, self.seed)

    def choices(self) -> dict[str, Any]:
        """Return the names of the options, as they appear in tables."""
        names = dict(self.names) | {"seed": self.seed}
        return names if self.merges else names | {"merge": "pretrained", "tune": "none"}

    def place(self) -> Place:
        """Return where the record goes."""
        names = self.choices()
        label = f"{names['merge']}+{names['byom']}"
        return Place(results_root(self.results), self.suite.name, names["backbone"], label, self.signature())


def run(settings: Settings) -> dict[str, Any]:
    """Run one cell, or return its record if it has finished before.

    Args:
        settings: What to run.

    Returns:
        The record.

    Raises:
        Exception: Whatever the run raised, after a ``.failed.json`` has been written beside where its record would be.
    """
    place = settings.place()
    finished = place.finished()
    if finished is not None:
        settings.logger.skipped(finished, place.done)
        return finished
    place.require_writable()
    record = _header(settings, place)
    try:
        record |= execute(settings) | {"status": "done"}
    except BaseException as error:
        place.write(record | {"status": "failed", "error": f"{type(error).__name__}: {error}"})
        raise
    path = place.write(record)
    settings.logger.finished(record, path)
    return record


def metric(record: Mapping[str, Any]) -> float:
    """Return what a sweep maximises: mean validation accuracy, or test where validation was not evaluated."""
    summary = record["summary"]
    return summary.get("validation", summary.get("test"))["absolute"]


def execute(settings: Settings) -> dict[str, Any]:
    """Do the work of one run and return the measured part of its record."""
    stages, lab = Stages(), _lab(settings)
    with stages.stage("data"):
        lab.read_all()
    with stages.stage("experts"):
        experts = {task: lab.expert(task) for task in lab.tasks}
        single = {s: {task: lab.single_task(task, s) for task in lab.tasks} for s in settings.evaluate.splits}
    problem = Problem(lab.pretrained, experts)
    with stages.stage("tune"):
        method, tuning = _tuned(settings, lab, problem)
    with stages.stage("merge"):
        reference = _merged(lab, method, problem)
    with stages.stage("variant"):
        deltas = {task: settings.byom.delta(expert, reference) for task, expert in experts.items()}
    with stages.stage("evaluate"):
        scores, norms = _evaluated(settings, lab, problem, reference, deltas)
    return {
        "hyperparameters": {
            "merge": describe(_all_fields(method)),
            "byom": describe(_all_fields(settings.byom)),
        },
        "scores": scores,
        "single_task": single,
        "summary": {s: measure.summary(scores[s], single[s]) for s in scores},
        "tuning": tuning,
        "storage": measure.stored(settings.byom, problem, deltas),
        "norms": norms,
        "stages": stages.taken,
        "fingerprints": measure.fingerprints(lab, experts),
    }


def _header(settings: Settings, place: Place) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "signature": place.signature,
        "created": now(),
        "choices": settings.choices(),
        "config": {key: value for key, value in settings.resolved.items() if key not in ("results", "cache")},
        "skipped_tasks": list(settings.suite.missing),
        "provenance": provenance(),
    }


def _lab(settings: Settings) -> Lab:
    s = settings
    key = signature(s.suite, s.backbone, s.finetune, s.seed, s.cache, s.device)
    return _labs(key, lambda: Lab(s.suite, s.backbone, s.finetune, s.seed, s.cache, s.device, s.evaluate.batch_size))


_KEPT: dict[str, Lab] = {}


def _labs(key: str, make: Any) -> Lab:
    """Return the lab of the previous run if it is the same one: jobs of a sweep in one process share it."""
    if key not in _KEPT:
        _KEPT.clear()
        _KEPT[key] = make()
    return _KEPT[key]


def _lab_signature(lab: Lab) -> str:
    return signature([lab.signature_of(task) for task in lab.tasks])


def _tuned(settings: Settings, lab: Lab, problem: Problem) -> tuple[MergeMethod, dict[str, Any]]:
    method, tuner = settings.effective()
    candidates = tuner.candidates(method)
    if not candidates:
        return method, {"searched": 0, "chosen": {}, "trail": []}
    file = lab.cache / "tuning" / f"{signature(_lab_signature(lab), method, tuner)}.json"
    if not file.is_file():
        objective = _objective(lab, problem, settings.names["merge"], len(candidates))
        write_json(file, tuner.select(method, objective)[1])
    trail = json.loads(file.read_text())
    return _with(method, trail["chosen"]), trail


def _objective(lab: Lab, problem: Problem, label: str, total: int) -> Any:
    bar = tqdm(total=total * len(lab.tasks), desc=f"tune {label}", unit="task", leave=False, mininterval=1)

    def normalised(method: MergeMethod) -> float:
        merged = method(problem).materialise()
        ratios = []
        for task in lab.tasks:
            ratios.append(
                measure.ratio(lab.score(task, merged, "validation").accuracy, lab.single_task(task, "validation"))
            )
            bar.update()
        return sum(ratios) / len(ratios)

    return normalised


def _merged(lab: Lab, method: MergeMethod, problem: Problem) -> Weights:
    if isinstance(method, Pretrained):
        return problem.pretrained
    folder = lab.cache / "merged" / signature(_lab_signature(lab), method)
    if not folder.is_dir():
        method(problem).save(folder)
    return _opened(folder)


@lru_cache(maxsize=4)
def _opened(folder: Path) -> Weights:
    return Weights.open(folder)


def _evaluated(
    settings: Settings, lab: Lab, problem: Problem, reference: Weights, deltas: Mapping[str, Delta]
) -> tuple[dict[str, Any], dict[str, Any]]:
    scores: dict[str, Any] = {split: {} for split in settings.evaluate.splits}
    norms = {}
    for task in tqdm(list(lab.tasks), desc="evaluate", unit="task", leave=False, mininterval=1):
        model = deltas[task].apply(reference).materialise()
        norms[task] = measure.norms(problem, task, reference, model)
        for split, by_task in scores.items():
            by_task[task] = lab.score(task, model, split).to_json()
    return scores, norms


def _with(method: MergeMethod, chosen: Mapping[str, Any]) -> MergeMethod:
    return replace(method, **chosen)


def _all_fields(option: Any) -> dict[str, Any]:
    return {f.name: getattr(option, f.name) for f in fields(option)}
