"""Records to a report: read the runs of a suite and backbone, write their tables and figures."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from byom.errors import ByomError, NothingFinished, OptionError, suggest
from byom.functional.metrics import METRICS
from byom.report import render
from byom.report.comparable import check_comparable
from byom.report.comparison import against_post_pruning, display_comparison
from byom.report.frame import Record, best, display, kind, name_method, numbers, percent, table, task_names
from byom.report.methods import NOTES as METHOD_NOTES
from byom.report.methods import costed, display_methods, methods
from byom.storage.lock import owner

__all__ = ["Report", "Runs", "generate", "read_runs", "table"]

FORMAT = 1
NEEDED = ("choices", "hyperparameters", "scores", "summary", "storage", "signature")
NOTES = (
    "Accuracies are in per cent on the test split, mean ± sample standard deviation over seeds.",
    "m %: the part of one model's parameters put back for each task, the largest differences first.",
    "Normalised mean: the mean over tasks of the accuracy divided by that of the task's own model.",
    "Parameters: values only, one shared model and what every task adds (d + T·m·d; T·d for Single-task). "
    "Bytes: what is stored, values and encoded positions. Task heads count in neither.",
    "λ / searched: the setting with the best validation accuracy / among how many tried; the test split had "
    "no part in the choice. Several values are those of different seeds.",
    "Bold: the best of each column among the merged models alone, and among the rows of each m %.",
)
VALIDATED = {
    "unseen": "They were not trained on the validation examples that hyperparameters were selected on.",
    "seen": "They were trained on the validation examples that hyperparameters were selected on.",
    "unknown": "Whether they were trained on the validation examples of that selection is not known.",
}
COMPARISON_NOTES = (
    "Distance ratio: mean over tasks of ‖θₜ − θ*‖ / ‖θₜ − θ₀‖ (θₜ: the task's own model, θ*: merged, θ₀: "
    "pre-trained); below 1, merging has moved towards the tasks and less is left to put back.",
    "Dropped ratio: the norm of what BYOM-FFT leaves out over that of what Post-Pruning leaves out.",
    "Difference: BYOM-FFT less Post-Pruning at the same m %, mean ± sample standard deviation over the seeds "
    "both have. Interval: paired bootstrap over the test examples of each task (2000 resamples, differences "
    "averaged over seeds); it does not cover the spread over seeds.",
)


@dataclass(frozen=True)
class Runs:
    """The records of one suite and backbone, finished and failed."""

    suite: str
    backbone: str
    done: tuple[Record, ...]
    failed: tuple[Record, ...]


@dataclass(frozen=True)
class Report:
    """What `generate` made: a text to print and the files written."""

    text: str
    files: list[Path]


def generate(
    results: Path,
    suite: str,
    backbone: str | None = None,
    seeds: Sequence[int] | None = None,
    finetune: str | None = None,
) -> Report:
    """Write the tables and figures of a suite from its records alone.

    Args:
        results: The folder that holds ``runs``; ``tables`` and ``figures`` are written beside it.
        suite: The suite's name.
        backbone: One backbone, or every backbone with records.
        seeds: Only these seeds, or all.
        finetune: Only models fine-tuned with this option; it then ends the names of the files.

    Returns:
        The tables as text, and the paths of all files.

    Raises:
        ByomError: If there is no record, one cannot be read, or they cannot stand in one table.
    """
    found = [backbone] if backbone else _backbones(results, suite)
    suffix = f"--{finetune}" if finetune else ""
    made = [_report(results, read_runs(results, suite, name, seeds, finetune), suffix) for name in found]
    return Report("\n".join(one.text for one in made), [path for one in made for path in one.files])


def _backbones(results: Path, suite: str) -> list[str]:
    folder = results / "runs" / suite
    names = sorted(path.parent.name for path in folder.glob("*/*.json"))
    if not names:
        suites = {path.parents[1].name for path in (results / "runs").glob("*/*/*.json")}
        raise OptionError(f"{folder} holds no record: run `byom suite={suite}` first; {suggest(suite, suites)}")
    return list(dict.fromkeys(names))


def read_runs(
    results: Path,
    suite: str,
    backbone: str,
    seeds: Sequence[int] | None = None,
    finetune: str | None = None,
) -> Runs:
    """Read the records of one suite and backbone, and make sure that they can be compared.

    Args:
        results: The folder that holds ``runs``.
        suite: The suite's name.
        backbone: The backbone's name.
        seeds: Only these seeds, or all.
        finetune: Only models fine-tuned with this option, or all.

    Returns:
        The finished runs and the failed ones; a failed run that was finished later is left out.

    Raises:
        NothingFinished: If there is no finished record.
        ByomError: If one cannot be read, or they cannot stand in one table.
    """
    folder = results / "runs" / suite / backbone
    records = [_read(path) for path in sorted(folder.glob("*.json"))]
    kept = [r for r in records if _wanted(r["choices"], seeds, finetune)]
    done = [r for r in kept if r["status"] != "failed" and "test" in r["scores"]]  # a search scores validation alone
    if not done:
        raise NothingFinished(
            f"{folder} holds no finished record of the seeds and fine-tuning asked for; run "
            f"`byom suite={suite} backbone={backbone}` first"
        )
    check_comparable(done)
    finished = {r["signature"] for r in done}
    failed = [r for r in kept if r["status"] == "failed" and r["signature"] not in finished]
    return Runs(suite, backbone, tuple(done), tuple(failed))


def _wanted(choices: Mapping[str, Any], seeds: Sequence[int] | None, finetune: str | None) -> bool:
    return (seeds is None or choices["seed"] in seeds) and (finetune in (None, choices.get("finetune")))


def _read(path: Path) -> Record:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ByomError(f"{path} is not JSON ({error}); delete it and run that cell again") from None
    given = record.get("format") if isinstance(record, dict) else None
    if given != FORMAT:
        raise ByomError(f"{path} has format {given!r}, this byom reads {FORMAT}: use the byom that wrote it")
    needed = ("choices", "signature", "status") if record.get("status") == "failed" else ("status", *NEEDED)
    missing = [name for name in needed if name not in record]
    if missing:
        raise ByomError(f"{path} lacks {', '.join(missing)}; delete it and run that cell again")
    return record


def _report(results: Path, runs: Runs, suffix: str) -> Report:
    frame, comparison = numbers(runs.done), against_post_pruning(runs.done)
    stem = f"{runs.suite}--{runs.backbone}{suffix}"
    files = _write_tables(results / "tables", stem, runs, frame, comparison)
    # matplotlib takes most of a second to import, and a table alone does not need it
    from byom.report.figures import suite as figures

    files += figures.save_all(frame, results / "figures", stem)
    if costed(runs.done):
        from byom.report.figures.methods import accuracy_by_method
        from byom.report.figures.style import save

        files += save(accuracy_by_method(methods(runs.done)), results / "figures" / f"{stem}--accuracy-by-method")
    return Report(as_text(runs, frame, comparison), files)


def _write_tables(folder: Path, stem: str, runs: Runs, frame: pd.DataFrame, comparison: pd.DataFrame) -> list[Path]:
    texts = {
        f"{stem}.md": as_markdown(runs, frame, comparison),
        f"{stem}.csv": frame.to_csv(index=False, lineterminator="\n"),
        f"{stem}.tex": render.latex(display(frame), best(frame), _breaks(frame)),
    }
    if len(comparison):
        texts[f"{stem}--comparison.csv"] = comparison.to_csv(index=False, lineterminator="\n")
    if costed(runs.done):
        costs = methods(runs.done)
        texts[f"{stem}--methods.md"] = methods_markdown(runs, costs)
        texts[f"{stem}--methods.csv"] = costs.to_csv(index=False, lineterminator="\n")
    return [write(folder / name, text) for name, text in texts.items()]


def write(path: Path, text: str) -> Path:
    """Write a text file so that a reader sees the old one or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{owner()}")
    fresh.write_text(text, encoding="utf-8", newline="\n")
    fresh.replace(path)
    return path


def _breaks(frame: pd.DataFrame) -> list[int]:
    """Return the rows where another kind of model begins."""
    kinds = [kind(*pair) for pair in zip(frame["merge"], frame["variant"], strict=True)]
    groups = ["own" if what in ("pretrained", "single_task") else what for what in kinds]
    return [i for i in range(1, len(groups)) if groups[i] != groups[i - 1]]


def as_markdown(runs: Runs, frame: pd.DataFrame, comparison: pd.DataFrame) -> str:
    """Return the report as Markdown: what was run, the table, the comparison, and what the columns mean."""
    parts = [f"# {runs.suite}, {runs.backbone}\n\n", *_bullets(header(runs)), "\n"]
    parts += [render.markdown(display(frame), best(frame)), "\n", *_bullets([*NOTES, *_differing(runs)])]
    if len(comparison):
        parts += ["\n## BYOM-FFT against Post-Pruning\n\n", render.markdown(display_comparison(comparison))]
        parts += ["\n", *_bullets(COMPARISON_NOTES)]
    return "".join(parts)


def methods_markdown(runs: Runs, costs: pd.DataFrame) -> str:
    """Return what every method needs, stores and costs as Markdown."""
    flagged = ["†: the method has looked at the test split's inputs."] * bool(costs["sees_test"].any())
    batches = "‡: tasks are told apart by whole batches of one data set, which gives them away."
    flagged += [batches] * bool(costs["by_batch"].any())
    parts = [f"# {runs.suite}, {runs.backbone}: what every method needs, stores and costs\n\n", *_bullets(header(runs))]
    return "".join([*parts, "\n", render.markdown(display_methods(costs)), "\n", *_bullets([*METHOD_NOTES, *flagged])])


def _differing(runs: Runs) -> list[str]:
    """Say how much larger m % is of the parameters that fine-tuning changed, where it is at all."""
    pairs = [(record["storage"].get("density") or {}) for record in runs.done]
    ratios = [pair["of_differing"] / pair["of_all"] for pair in pairs if pair.get("of_all")]
    if not ratios or max(ratios) < 1.005:
        return []
    return [
        "Some parameters are the same in the fine-tuned and the reference model: of those that differ, m % "
        f"is up to {max(ratios):.2f} times as large a part."
    ]


def _bullets(lines: Iterable[str]) -> list[str]:
    return [f"- {line}\n" for line in lines]


def as_text(runs: Runs, frame: pd.DataFrame, comparison: pd.DataFrame) -> str:
    """Return the report for a terminal of 160 columns."""
    parts = [f"{runs.suite}, {runs.backbone}\n", *(f"{line}\n" for line in header(runs)), "\n"]
    parts += [render.text(display(frame), task_names(frame))]
    if len(comparison):
        parts += ["\nBYOM-FFT against Post-Pruning\n\n", render.text(display_comparison(comparison))]
    return "".join(parts)


def header(runs: Runs) -> list[str]:
    """Return what a reader must know before the numbers: seeds, failures, skipped tasks, unrecorded code."""
    seeds = sorted({record["choices"]["seed"] for record in runs.done})
    skipped = sorted({_skipped(task) for record in runs.done for task in record.get("skipped_tasks") or ()})
    dirty = sum(bool((record.get("provenance") or {}).get("dirty")) for record in runs.done)
    lines = [f"**{note}**" for note in sorted({record["note"] for record in runs.done if record.get("note")})]
    lines += [f"Seeds: {', '.join(map(str, seeds))}. Runs: {len(runs.done)} done, {len(runs.failed)} failed."]
    lines += [f"Failed: {_failure(record)}" for record in runs.failed]
    lines += [f"Skipped tasks ({len(skipped)}): {', '.join(skipped) or 'none'}."]
    lines += [f"{dirty} runs came from code with uncommitted changes."] * bool(dirty)
    return [*lines, *_metrics(runs), *_experts(runs)]


def _metrics(runs: Runs) -> list[str]:
    """Say which columns are no accuracies."""
    rows = {task: row["metric"] for task, row in runs.done[0]["scores"]["test"].items() if "metric" in row}
    told = [f"{task}: {METRICS[name].title}" for task, name in rows.items()]
    return [f"Scores that are no accuracy, times 100: {'; '.join(told)}."] * bool(told)


def _experts(runs: Runs) -> list[str]:
    """Say whose checkpoints these are, and whether hyperparameters were selected on what they were trained on."""
    record = runs.done[0]
    if (family := record.get("family", "trained")) == "trained":
        return []
    tuned = any((record.get("tuning") or {}).get("searched") for record in runs.done)
    known = (record.get("experts") or {}).get("validation", "unknown")
    return [f"Experts: {family}. {VALIDATED[known]}" if tuned else f"Experts: {family}."]


def _skipped(task: str | Mapping[str, Any]) -> str:
    return task if isinstance(task, str) else f"{task.get('task')} ({task.get('reason', 'no reason recorded')})"


def _failure(record: Record) -> str:
    choices, reason = record["choices"], record.get("error") or "no reason recorded"
    first = str(reason.get("message", reason) if isinstance(reason, Mapping) else reason).partition("\n")[0]
    density = ((record.get("hyperparameters") or {}).get("byom") or {}).get("density")
    part = f", {percent(density)} %" if density is not None else ""
    return f"{name_method(choices['merge'], choices['byom'])}{part}, seed {choices['seed']}: {first}"
