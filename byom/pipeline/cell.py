"""One cell: experts -> statistics -> tune -> merge -> variant -> route -> evaluate, and what is measured of it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from byom.checkpoint.bundle import Bundle
from byom.merge.base import Member, MergeMethod, Problem
from byom.pipeline import measure
from byom.pipeline.cached import Keys, free_first, note, once
from byom.pipeline.evaluate import Score
from byom.pipeline.lab import Lab
from byom.pipeline.lab_probe import LabProbe
from byom.pipeline.labs import laboratory
from byom.pipeline.provenance import Stages
from byom.pipeline.route import Routed
from byom.pipeline.router.base import Routing
from byom.pipeline.settings import Settings
from byom.storage.atomic import write_json
from byom.storage.lock import alone, held
from byom.storage.signature import recorded
from byom.variants.base.delta import Served
from byom.weights import Weights
from byom.weights.placed import chosen


class Scores(NamedTuple):
    """The evaluation of a cell."""

    scores: dict[str, dict[str, Any]]
    """Split to task to a score as JSON."""
    norms: dict[str, dict[str, float]]
    """Task to distances; empty where examples are routed, since no model belongs to a task then."""
    routed: dict[str, Any]
    """Split to task to the fraction of examples sent to their own task, and how; empty where tasks are known."""


class Cell:
    """One run, its parts made on first use and kept: the models and scores that its settings describe.

    Args:
        settings: The run.
        lab: The lab that it shares with other runs; None makes one.
    """

    def __init__(self, settings: Settings, lab: Lab | None = None) -> None:
        self.settings = settings
        self.lab = laboratory(settings) if lab is None else lab
        self.training: dict[str, float] = {}  # what it took to fine-tune the experts that were missing
        self.device = chosen(settings.merge_device, self.lab.device)  # where merging computes
        self._merged_on = {} if self.device.type == "cpu" else {"device": str(self.device)}

    @cached_property
    def experts(self) -> dict[str, Weights]:
        """Task to theta_t; those that are missing are fine-tuned, side by side with other processes that want them."""
        lab = self.lab
        trained = {
            t.name: lab.cache / "experts" / lab.signature_of(t.name) for t in lab.experts.trains(lab.suite.tasks)
        }
        missing = {task: folder for task, folder in trained.items() if not (folder / "training.json").is_file()}
        for task in free_first(missing):
            here = not held(missing[task]) and not (missing[task] / "training.json").is_file()
            start = time.perf_counter()
            lab.expert(task)
            if here:  # and no other process has, or is about to
                self._note_training(time.perf_counter() - start)
        return {task: lab.expert(task) for task in lab.tasks}

    def _note_training(self, seconds: float) -> None:
        before = self.training or {"models": 0, "seconds": 0.0}
        self.training = {"models": before["models"] + 1, "seconds": round(before["seconds"] + seconds, 3)}

    @cached_property
    def single(self) -> dict[str, dict[str, float]]:
        """Split to task to the score of the task's own expert."""
        splits = self.settings.evaluate.splits
        return {split: {task: self.lab.single_task(task, split) for task in self.lab.tasks} for split in splits}

    @cached_property
    def problem(self) -> Problem:
        """The models with all that the methods need: statistics, further members, a probe."""
        lab, wanted, count = self.lab, self.settings.wanted(), self.settings.needs.members
        members = {
            task: [Member(lab.expert(task, m), lab.statistics(task, wanted, m)) for m in range(count)]
            for task in (lab.tasks if count > 1 else ())
        }
        by_task = {task: lab.statistics(task, wanted) for task in lab.tasks} if wanted else {}
        statistics = {name: {task: by_task[task][name] for task in by_task} for name in wanted}
        return Problem(lab.pretrained, self.experts, statistics, members, LabProbe(lab))

    @cached_property
    def merging(self) -> Problem:
        """The problem, whose models are computed with on the device that ``merge.device`` says."""
        return self.problem.on(self.device)

    @cached_property
    def prepared(self) -> Problem:
        """The problem that is merged: the variant may change experts first, lazily."""
        before = self.settings.byom.before
        return before(self.merging) if before else self.merging

    @cached_property
    def keys(self) -> Keys:
        """Names in the cache."""
        return Keys.of(self.settings, self.lab.signature)

    @cached_property
    def tuning(self) -> dict[str, Any]:
        """The settings that were searched, and the one chosen; kept on disk."""
        method, tuner = self.settings.effective()
        candidates = tuner.candidates(method)
        if not candidates:
            return {"searched": 0, "chosen": {}, "trail": []}
        file = self.lab.cache / "tuning" / f"{self.keys.tuning(method, tuner)}.json"
        if not file.is_file():
            with alone(file):
                if not file.is_file():
                    write_json(file, tuner.select(method, self._objective(len(candidates)))[1])
        return json.loads(file.read_text(encoding="utf-8"))

    def _objective(self, candidates: int) -> Callable[[MergeMethod], float]:
        """Return the normalised accuracy of a method's merged model on validation data, with a bar over all calls."""
        lab, label = self.lab, f"tune {self.settings.names['merge']}"
        bar = tqdm(total=candidates * len(lab.tasks), desc=label, unit="task", leave=False, mininterval=1)

        def normalised(method: MergeMethod) -> float:
            merged = method(self.prepared).materialise()
            ratios = []
            for task in lab.tasks:
                score = lab.score(task, merged, "validation").value
                ratios.append(measure.ratio(score, lab.single_task(task, "validation")))
                bar.update()
            return sum(ratios) / len(ratios)

        return normalised

    @cached_property
    def method(self) -> MergeMethod:
        """The merge method with the hyperparameters that were chosen."""
        return replace(self.settings.effective()[0], **self.tuning["chosen"])

    @cached_property
    def folders(self) -> dict[str, Path]:
        """Stage to the folder in the cache that keeps what it makes; stages that make nothing costly have none."""
        lab, variant = self.lab, self.settings.byom
        merged = {"merge": lab.cache / "merged" / self.keys.merged(self.method)} if self.method.merges else {}
        trained = {"variant": lab.cache / "served" / self.keys.served(self.method, variant)}
        return merged | (trained if variant.needs.inputs else {})

    @cached_property
    def reference(self) -> Weights:
        """The merged model, on disk; theta_0 where nothing is merged."""
        if (folder := self.folders.get("merge")) is None:
            return self.problem.pretrained
        once(folder, lambda: self.method(self.prepared).save(folder), self._merged_on)
        return self.lab.opened(folder)

    @cached_property
    def served(self) -> Served:
        """Shared models and a packed difference per task.

        What took training is kept on disk, because the cells of a sweep may differ in their routers alone.
        """
        variant = self.settings.byom.merged_by(self.method)
        if (folder := self.folders.get("variant")) is None:
            packed = variant.serve(self.merging, self.reference)
            base = packed.base and packed.base.materialise()  # every task's model reads all of it
            return replace(packed, base=base)

        def make() -> None:
            trained = variant.serve(self.merging, self.reference)
            Bundle(trained.reference, trained.deltas, trained.base).save(folder)

        once(folder, make, self._merged_on)
        return Bundle.open(folder)

    @property
    def streamed(self) -> Served:
        """The same as `served`, each task packed whenever its difference is asked for, as saving does once."""
        if "variant" in self.folders:
            return self.served
        return self.settings.byom.merged_by(self.method).streamed(self.merging, self.reference)

    @cached_property
    def routing(self) -> Routing | None:
        """The fitted router; None where tasks are known."""
        return self.settings.router.fit(self.problem, self.served)

    @cached_property
    def scores(self) -> Scores:
        """Scores, distances and routing of all tasks on the evaluated splits."""
        splits = self.settings.evaluate.splits
        known = _Known(self)
        if self.routing is not None:
            scores, routed = Routed(self.lab, self.served, self.routing).evaluate(splits, known.score)
            return Scores(scores, {}, routed)
        scores, norms = {split: {} for split in splits}, {}
        for task in tqdm(list(self.lab.tasks), desc="evaluate", unit="task", leave=False, mininterval=1):
            norms[task] = measure.norms(self.lab, self.experts[task], self.served.reference, known.model(task))
            for split in splits:
                scores[split][task] = known.score(task, split).to_json()
        return Scores(scores, norms, {})

    def cost(self, stages: Stages) -> dict[str, Any]:
        """Return seconds and peak memory of what was made, also where this run read it from the cache.

        What fine-tuning took is said by the run alone that did it.

        Args:
            stages: The stages of this run.
        """
        notes = {stage: note(folder) for stage, folder in self.folders.items()}
        there = {stage: file for stage, file in notes.items() if file.is_file()}
        earlier = {stage: json.loads(file.read_text(encoding="utf-8")) for stage, file in there.items()}
        taken = {stage: {**stages.taken[stage], **self._merged_on} for stage in ("merge", "variant")}
        cost: dict[str, Any] = {stage: earlier.get(stage, own) for stage, own in taken.items()}
        if self.training:
            cost["training"] = self.training
        if wanted := self.settings.wanted():
            cost["statistics"] = {"seconds": self.lab.statistics_cost(wanted, self.settings.needs.members)}
        return cost


STAGES: Mapping[str, Callable[[Cell], object]] = {
    "data": lambda cell: cell.lab.read_all(cell.settings.evaluate.splits),
    "experts": lambda cell: (cell.experts, cell.single),
    "statistics": lambda cell: cell.problem,
    "tune": lambda cell: cell.tuning,
    "merge": lambda cell: cell.reference,
    "variant": lambda cell: cell.served,
    "route": lambda cell: cell.routing,
    "evaluate": lambda cell: cell.scores,
}
"""Stage to the part of a cell that it makes, in order; the record holds the time and memory of each."""


def execute(cell: Cell) -> dict[str, Any]:
    """Do the work of one run, stage by stage, and return the measured part of its record."""
    stages = Stages()
    for stage, make in STAGES.items():
        with stages.stage(stage):
            make(cell)
    settings, lab = cell.settings, cell.lab
    scores, norms, routed = cell.scores
    return {
        "hyperparameters": {"merge": recorded(cell.method), "byom": recorded(settings.byom)}
        | ({"router": recorded(settings.router)} if settings.routed else {})
        | ({"statistics": {n: recorded(s) for n, s in settings.wanted().items()}} if settings.wanted() else {}),
        "scores": scores,
        "single_task": cell.single,
        "summary": {split: measure.summary(scores[split], cell.single[split]) for split in scores},
        "tuning": cell.tuning,
        "storage": measure.stored(cell.served, cell.problem, lab.backbone.frozen_parameters, lab.differing)
        | measure.routing(cell.routing),
        "routed": routed,
        "norms": norms,
        "fallbacks": cell.method.fallbacks(cell.prepared),
        "cost": cell.cost(stages),
        "stages": stages.taken,
        "fingerprints": measure.fingerprints(lab, cell.experts),
        "experts": {"validation": lab.experts.validation} | lab.experts.notes(lab),
    }


class _Known:
    """Scores of tasks whose identity is known; kept on disk, because every routed cell of a sweep starts from them."""

    def __init__(self, cell: Cell) -> None:
        self.lab, self.served = cell.lab, cell.served
        self.folder = cell.lab.cache / "hits" / cell.keys.served(cell.method, cell.settings.byom)
        self._models: dict[str, Weights] = {}

    def model(self, task: str) -> Weights:
        """Return a task's model; one at a time is in memory."""
        if task not in self._models:
            self._models.clear()
            self._models[task] = self.served.weights(task).materialise()
        return self._models[task]

    def score(self, task: str, split: str) -> Score:
        """Score a task's own model and head on a split."""
        file = self.folder / f"{task}-{split}.json"
        if not file.is_file():
            head = self.served.deltas[task].readout(self.lab.head(task))
            write_json(file, self.lab.score(task, self.model(task), split, head).to_json())
        return Score.from_json(json.loads(file.read_text(encoding="utf-8")), self.lab.tasks[task].metric)
