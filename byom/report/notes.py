"""The sentences around a table: what a reader must know before its numbers, and what its columns mean."""

from __future__ import annotations

from collections.abc import Sequence

from byom.functional.metrics import metric
from byom.report.frame import percent
from byom.report.rows import name_of
from byom.storage.record import Record

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
COMPARISON_NOTES = (
    "Distance ratio: mean over tasks of ‖θₜ − θ*‖ / ‖θₜ − θ₀‖ (θₜ: the task's own model, θ*: merged, θ₀: "
    "pre-trained); below 1, merging has moved towards the tasks and less is left to put back.",
    "Dropped ratio: the norm of what BYOM-FFT leaves out over that of what Post-Pruning leaves out.",
    "Difference: BYOM-FFT less Post-Pruning at the same m %, mean ± sample standard deviation over the seeds "
    "both have. Interval: paired bootstrap over the test examples of each task (2000 resamples, differences "
    "averaged over seeds); it does not cover the spread over seeds.",
)
VALIDATED = {
    "unseen": "They were not trained on the validation examples that hyperparameters were selected on.",
    "seen": "They were trained on the validation examples that hyperparameters were selected on.",
    "unknown": "Whether they were trained on the validation examples of that selection is not known.",
}


def header(done: Sequence[Record], failed: Sequence[Record] = ()) -> list[str]:
    """Return what a reader must know before the numbers: seeds, failures, skipped tasks, unrecorded code.

    Args:
        done: Finished runs of one suite and backbone.
        failed: The failed ones.
    """
    seeds = sorted({record.choices.seed for record in done})
    skipped = sorted({task for record in done for task in record.skipped_tasks})
    dirty = sum(record.dirty for record in done)
    lines = [f"**{note}**" for note in sorted({record.note for record in done if record.note})]
    lines += [f"Seeds: {', '.join(map(str, seeds))}. Runs: {len(done)} done, {len(failed)} failed."]
    lines += [f"Failed: {_failure(record)}" for record in failed]
    lines += [f"Skipped tasks ({len(skipped)}): {', '.join(skipped) or 'none'}."]
    lines += [f"{dirty} runs came from code with uncommitted changes."] * bool(dirty)
    return [*lines, *_metrics(done), *_experts(done)]


def _metrics(done: Sequence[Record]) -> list[str]:
    """Say which columns are not accuracies."""
    names = {task: score.metric for task, score in done[0].test.items() if score.metric != "accuracy"}
    titles = [f"{task}: {metric(name).title}" for task, name in names.items()]
    return [f"Scores that are not accuracies, times 100: {'; '.join(titles)}."] * bool(titles)


def _experts(done: Sequence[Record]) -> list[str]:
    """Say whose checkpoints these are, and whether hyperparameters were selected on what they were trained on."""
    if done[0].family == "trained":
        return []
    cautions = [f"**{caution}.**" for caution in sorted({record.caution for record in done if record.caution})]
    tuned = any(record.tuning.searched for record in done)
    validated = VALIDATED[done[0].validation_examples]
    return [f"Experts: {done[0].family}. {validated}" if tuned else f"Experts: {done[0].family}.", *cautions]


def _failure(record: Record) -> str:
    reason = (record.error or "no reason recorded").partition("\n")[0]
    density = record.variant_settings.get("density")
    part = f", {percent(density)} %" if density is not None else ""
    return f"{name_of(record)}{part}, seed {record.choices.seed}: {reason}"


def differing(done: Sequence[Record]) -> list[str]:
    """Say how much larger m % is of the parameters that fine-tuning changed, where it is at all."""
    parts = [record.storage.density for record in done]
    ratios = [part.of_differing / part.of_all for part in parts if part.of_all]
    if not ratios or max(ratios) < 1.005:
        return []
    return [
        "Some parameters are the same in the fine-tuned and the reference model: of those that differ, m % "
        f"is up to {max(ratios):.2f} times as large a part."
    ]
