"""The pipeline: experts -> statistics -> tune -> merge -> variant -> route -> evaluate, and what is measured of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from tqdm import tqdm

from byom.checkpoint.bundle import Bundle
from byom.errors import OptionError
from byom.functional.metrics import metric
from byom.merge.base import Member, MergeMethod, Problem
from byom.merge.pretrained import Pretrained
from byom.pipeline import measure
from byom.pipeline.evaluate import Score
from byom.pipeline.lab import Lab
from byom.pipeline.lab_probe import LabProbe
from byom.pipeline.provenance import Stages
from byom.pipeline.route import evaluate_routed
from byom.pipeline.router.base import LearnedRouter
from byom.pipeline.settings import Settings
from byom.storage.lock import alone
from byom.storage.place import write_json
from byom.storage.signature import describe, signature
from byom.variants.base.delta import Served
from byom.weights import Weights


def execute(settings: Settings) -> dict[str, Any]:
    """Do the work of one run and return the measured part of its record."""
    stages, lab = Stages(), laboratory(settings)
    made: dict[str, Path] = {}  # stage -> the cached folder it made or found
    with stages.stage("data"):
        lab.read_all(settings.evaluate.splits)
    with stages.stage("experts"):
        experts = {task: lab.expert(task) for task in lab.tasks}
        single = {s: {task: lab.single_task(task, s) for task in lab.tasks} for s in settings.evaluate.splits}
    with stages.stage("statistics"):
        problem = assemble(settings, lab, experts)
    prepared = settings.byom.before(problem) if settings.byom.before else problem
    with stages.stage("tune"):
        method, tuning = _tuned(settings, lab, prepared)
    with stages.stage("merge"):
        reference = _merged(settings, lab, method, prepared, made)
    with stages.stage("variant"):
        served = _served(settings, lab, method, problem, reference, made)
    _require_routable(settings, lab)
    with stages.stage("route"):
        routing = settings.router.fit(problem, served)
    with stages.stage("evaluate"):
        name = signature(_lab_signature(lab), method, *_extras(settings), settings.byom)
        scores, norms, routed = _evaluated(settings, lab, problem, served, routing, lab.cache / "hits" / name)
    return {
        "hyperparameters": {"merge": _described(method), "byom": _described(settings.byom)}
        | ({"router": _described(settings.router)} if settings.routed else {})
        | ({"statistics": {n: _described(s) for n, s in settings.wanted().items()}} if settings.wanted() else {}),
        "scores": scores,
        "single_task": single,
        "summary": {s: measure.summary(scores[s], single[s]) for s in scores},
        "tuning": tuning,
        "storage": measure.stored(served, problem, lab.backbone.frozen_parameters) | measure.routing(routing),
        "routed": routed,
        "norms": norms,
        "fallbacks": method.fallbacks(prepared),
        "cost": _cost(settings, lab, stages, made),
        "stages": stages.taken,
        "fingerprints": measure.fingerprints(lab, experts),
        "experts": {"validation": lab.experts.validation} | lab.experts.notes(lab),
    }


def serve(settings: Settings, streamed: bool = False) -> tuple[Lab, Served]:
    """Make what serves the tasks, from cached experts and merged models as far as there are any.

    Args:
        settings: A run; nothing is evaluated unless a scale has to be searched.
        streamed: Leave models on disk and pack a task each time its difference is asked for, as saving does once.

    Returns:
        The lab, and shared models with one packed difference a task.
    """
    lab = laboratory(settings)
    problem = assemble(settings, lab, {task: lab.expert(task) for task in lab.tasks})
    prepared = settings.byom.before(problem) if settings.byom.before else problem
    method, _ = _tuned(settings, lab, prepared)
    reference = _merged(settings, lab, method, prepared, {})
    if streamed and not settings.byom.needs.inputs:
        return lab, settings.byom.streamed(problem, reference)
    return lab, _served(settings, lab, method, problem, reference, {})


def laboratory(settings: Settings) -> Lab:
    """Return the lab of a run; runs of one process that agree in what makes it share it."""
    s = settings
    key = signature(s.suite, s.backbone, s.finetune, s.experts, s.seed, s.cache, s.device)
    places: tuple[Any, ...] = (s.seed, s.cache, s.device, s.evaluate.batch_size)
    return _labs(key, lambda: Lab(s.suite, s.backbone, s.finetune, s.experts, *places))


_KEPT: dict[str, Lab] = {}


def _labs(key: str, make: Callable[[], Lab]) -> Lab:
    """Return the lab of the previous run if it is the same one: jobs of a sweep in one process share it."""
    if key not in _KEPT:
        _KEPT.clear()
        _KEPT[key] = make()
    return _KEPT[key]


def assemble(settings: Settings, lab: Lab, experts: Mapping[str, Weights]) -> Problem:
    """Return the problem with all that its methods need: statistics, further members, a probe.

    Args:
        settings: The run, whose needs say what is fitted.
        lab: Its lab.
        experts: Task name to theta_t.
    """
    wanted, count = settings.wanted(), settings.needs.members
    members = {t: [_member(lab, t, m, wanted) for m in range(count)] for t in lab.tasks} if count > 1 else {}
    by_task = {task: lab.statistics(task, wanted) for task in lab.tasks} if wanted else {}
    statistics = {name: {task: by_task[task][name] for task in by_task} for name in wanted}
    return Problem(lab.pretrained, experts, statistics, members, LabProbe(lab))


def _member(lab: Lab, task: str, member: int, wanted: Mapping[str, Any]) -> Member:
    return Member(lab.expert(task, member), lab.statistics(task, wanted, member))


def _lab_signature(lab: Lab) -> str:
    return signature([lab.signature_of(task) for task in lab.tasks])


def _tuned(settings: Settings, lab: Lab, problem: Problem) -> tuple[MergeMethod, dict[str, Any]]:
    method, tuner = settings.effective()
    candidates = tuner.candidates(method)
    if not candidates:
        return method, {"searched": 0, "chosen": {}, "trail": []}
    name = signature(_lab_signature(lab), method, tuner, *_extras(settings))
    file = lab.cache / "tuning" / f"{name}.json"
    if not file.is_file():
        objective = _objective(lab, problem, settings.names["merge"], len(candidates))
        write_json(file, tuner.select(method, objective)[1])
    trail = json.loads(file.read_text())
    return replace(method, **trail["chosen"]), trail


def _extras(settings: Settings) -> list[Any]:
    """Return what else determines a merged model; nothing for methods that merge the experts' weights alone."""
    wanted = {n: s for n, s in settings.wanted().items() if n in settings.effective()[0].needs.statistics}
    return [*([wanted] if wanted else []), *([settings.byom.before] if settings.byom.before else [])]


def _objective(lab: Lab, problem: Problem, label: str, total: int) -> Callable[[MergeMethod], float]:
    bar = tqdm(total=total * len(lab.tasks), desc=f"tune {label}", unit="task", leave=False, mininterval=1)

    def normalised(method: MergeMethod) -> float:
        merged = method(problem).materialise()
        ratios = []
        for task in lab.tasks:
            ratios.append(
                measure.ratio(lab.score(task, merged, "validation").value, lab.single_task(task, "validation"))
            )
            bar.update()
        return sum(ratios) / len(ratios)

    return normalised


def _merged(settings: Settings, lab: Lab, method: MergeMethod, problem: Problem, made: dict[str, Path]) -> Weights:
    if isinstance(method, Pretrained):
        return problem.pretrained
    folder = lab.cache / "merged" / signature(_lab_signature(lab), method, *_extras(settings))
    _once(folder, lambda: method(problem).save(folder))
    made["merge"] = folder
    return _opened(folder)


def _served(
    settings: Settings,
    lab: Lab,
    method: MergeMethod,
    problem: Problem,
    reference: Weights,
    made: dict[str, Path],
) -> Served:
    """Make what serves the tasks; what took training is kept, because the cells of a sweep differ in routers alone."""
    if not settings.byom.needs.inputs:
        made_here = settings.byom.serve(problem, reference)
        base = made_here.base and made_here.base.materialise()  # every task's model reads all of it
        return replace(made_here, base=base)
    folder = lab.cache / "served" / signature(_lab_signature(lab), method, *_extras(settings), settings.byom)

    def make() -> None:
        served = settings.byom.serve(problem, reference)
        Bundle(served.reference, served.deltas, served.base).save(folder)

    _once(folder, make)
    made["variant"] = folder
    return Bundle.open(folder)


def _once(folder: Path, make: Callable[[], Any]) -> None:
    """Make a cached folder if it is not there, and note beside it what that took; without a note it is made again."""
    if folder.is_dir() and _note(folder).is_file():
        return
    with alone(folder):
        if folder.is_dir() and _note(folder).is_file():
            return
        stages = Stages()
        with stages.stage("made"):
            make()
        write_json(_note(folder), stages.taken["made"])


def _note(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.cost.json")


def _cost(settings: Settings, lab: Lab, stages: Stages, made: Mapping[str, Path]) -> dict[str, Any]:
    """Return seconds and peak memory of what was made, also where this run found it in the cache."""
    notes = {stage: _note(folder) for stage, folder in made.items()}
    found = {stage: json.loads(file.read_text()) for stage, file in notes.items() if file.is_file()}
    cost: dict[str, Any] = {stage: found.get(stage, stages.taken[stage]) for stage in ("merge", "variant")}
    if wanted := settings.wanted():
        cost["statistics"] = {"seconds": lab.statistics_cost(wanted, settings.needs.members)}
    return cost


@lru_cache(maxsize=4)
def _opened(folder: Path) -> Weights:
    return Weights.open(folder)


def _evaluated(
    settings: Settings, lab: Lab, problem: Problem, served: Served, routing: Any, folder: Path
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    models: dict[str, Weights] = {}

    def known(task: str, split: str) -> Score:
        """Score a task whose identity is known; kept, because every routed cell of a sweep starts from it."""
        file = folder / f"{task}-{split}.json"
        if not file.is_file():
            if task not in models:
                models.clear()
                models[task] = served.weights(task).materialise()
            head = served.deltas[task].readout(lab.head(task))
            write_json(file, lab.score(task, models[task], split, head).to_json())
        return Score.from_json(json.loads(file.read_text()))

    if routing is not None and isinstance(settings.router, LearnedRouter):
        splits = settings.evaluate.splits
        scores, routed = evaluate_routed(lab, served, routing, settings.router, splits, known)
        return scores, {}, routed
    scores, norms = {split: {} for split in settings.evaluate.splits}, {}
    for task in tqdm(list(lab.tasks), desc="evaluate", unit="task", leave=False, mininterval=1):
        models = {task: served.weights(task).materialise()}
        norms[task] = measure.norms(problem, task, served.reference, models[task])
        for split, by_task in scores.items():
            by_task[task] = known(task, split).to_json()
    return scores, norms, {}


def _require_routable(settings: Settings, lab: Lab) -> None:
    """Refuse routers where they would see the task, or where a misrouted example cannot count as wrong."""
    if settings.routed and lab.backbone.answers:
        raise OptionError(
            f"{type(lab.backbone).__name__} scores the answers of each task, which give it away; use router=oracle"
        )
    if settings.routed and (odd := [task.name for task in lab.suite.tasks if not metric(task.metric).decomposes]):
        raise OptionError(
            f"a router sends some examples to no head of theirs, and task {odd[0]} has a score that is "
            f"no mean over examples ({lab.tasks[odd[0]].metric}); use router=oracle, or metric=accuracy"
        )


def _described(option: Any) -> Any:
    return describe({f.name: getattr(option, f.name) for f in fields(option)})
