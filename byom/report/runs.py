"""Runs: the records of one suite and backbone, and what a reader must know before their numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from byom.errors import NothingFinished, OptionError, suggest
from byom.functional.metrics import metric
from byom.report.comparable import check_comparable
from byom.report.frame import percent
from byom.report.rows import name_of
from byom.storage.record import Record

VALIDATED = {
    "unseen": "They were not trained on the validation examples that hyperparameters were selected on.",
    "seen": "They were trained on the validation examples that hyperparameters were selected on.",
    "unknown": "Whether they were trained on the validation examples of that selection is not known.",
}


@dataclass(frozen=True)
class Runs:
    """The records of one suite and backbone, finished and failed."""

    suite: str
    backbone: str
    done: tuple[Record, ...]
    failed: tuple[Record, ...]

    @property
    def tasks(self) -> list[str]:
        """The tasks, in the order of the columns."""
        return list(self.done[0].test)

    @property
    def family(self) -> str:
        """Whose checkpoints the tasks' own models are; all records agree in it."""
        return self.done[0].family

    @property
    def notes(self) -> list[str]:
        """The notes that must stand above every table."""
        return sorted({record.note for record in self.done if record.note})


def backbones(results: Path, suite: str) -> list[str]:
    """Return the backbones that a suite has records of.

    Raises:
        OptionError: If there are none.
    """
    folder = results / "runs" / suite
    names = sorted(path.parent.name for path in folder.glob("*/*.json"))
    if not names:
        suites = {path.parents[1].name for path in (results / "runs").glob("*/*/*.json")}
        raise OptionError(f"{folder} does not hold a record: run `byom suite={suite}` first; {suggest(suite, suites)}")
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
    every = [Record.read(path) for path in sorted(folder.glob("*.json"))]
    records = [
        record
        for record in every
        if (seeds is None or record.choices.seed in seeds) and finetune in (None, record.choices.finetune)
    ]
    done = [r for r in records if r.status != "failed" and "test" in r.scores]  # a search scores validation alone
    if not done:
        raise NothingFinished(
            f"{folder} holds no finished record of these seeds and this fine-tuning; run "
            f"`byom suite={suite} backbone={backbone}` first"
        )
    check_comparable(done)
    finished = {record.signature for record in done}
    failed = [record for record in records if record.status == "failed" and record.signature not in finished]
    return Runs(suite, backbone, tuple(done), tuple(failed))


def header(runs: Runs) -> list[str]:
    """Return what a reader must know before the numbers: seeds, failures, skipped tasks, unrecorded code."""
    seeds = sorted({record.choices.seed for record in runs.done})
    skipped = sorted({task for record in runs.done for task in record.skipped_tasks})
    dirty = sum(record.dirty for record in runs.done)
    lines = [f"**{note}**" for note in runs.notes]
    lines += [f"Seeds: {', '.join(map(str, seeds))}. Runs: {len(runs.done)} done, {len(runs.failed)} failed."]
    lines += [f"Failed: {_failure(record)}" for record in runs.failed]
    lines += [f"Skipped tasks ({len(skipped)}): {', '.join(skipped) or 'none'}."]
    lines += [f"{dirty} runs came from code with uncommitted changes."] * bool(dirty)
    return [*lines, *_metrics(runs), *_experts(runs)]


def _metrics(runs: Runs) -> list[str]:
    """Say which columns are not accuracies."""
    names = {task: score.metric for task, score in runs.done[0].test.items() if score.metric != "accuracy"}
    titles = [f"{task}: {metric(name).title}" for task, name in names.items()]
    return [f"Scores that are not accuracies, times 100: {'; '.join(titles)}."] * bool(titles)


def _experts(runs: Runs) -> list[str]:
    """Say whose checkpoints these are, and whether hyperparameters were selected on what they were trained on."""
    if runs.family == "trained":
        return []
    tuned = any(record.tuning.searched for record in runs.done)
    validated = VALIDATED[runs.done[0].validation_examples]
    return [f"Experts: {runs.family}. {validated}" if tuned else f"Experts: {runs.family}."]


def _failure(record: Record) -> str:
    reason = (record.error or "no reason recorded").partition("\n")[0]
    density = record.variant_settings.get("density")
    part = f", {percent(density)} %" if density is not None else ""
    return f"{name_of(record)}{part}, seed {record.choices.seed}: {reason}"
