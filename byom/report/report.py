"""Records to a report: read the runs of a suite and backbone, write their tables and figures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd

from byom.errors import NothingFinished, OptionError, suggest
from byom.report import render
from byom.report.comparable import check_comparable
from byom.report.comparison import against_post_pruning, display_comparison
from byom.report.frame import best, csv, display, numbers, task_names
from byom.report.methods import NOTES as METHOD_NOTES
from byom.report.methods import display_methods, methods
from byom.report.notes import COMPARISON_NOTES, NOTES, differing, header
from byom.report.rows import Row, rows
from byom.storage.atomic import write_text
from byom.storage.record import Record


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
        """Family of the checkpoints that the tasks' own models are; all records agree in it."""
        return self.done[0].family

    @property
    def header(self) -> list[str]:
        """The lines that a reader must know before the numbers."""
        return header(self.done, self.failed)

    @property
    def notes(self) -> list[str]:
        """The notes that must stand above every table."""
        return sorted({record.note for record in self.done if record.note})


def backbones(results: Path, suite: str) -> list[str]:
    """Return the backbones that a suite has records of.

    Raises:
        OptionError: If it has records of none.
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
        NothingFinished: If none of the runs has finished.
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


@dataclass(frozen=True)
class Tables:
    """The rows and numbers of some runs, each computed when it is first read; texts, files and figures are its views.

    Args:
        runs: Records that can be compared.
    """

    runs: Runs

    @cached_property
    def rows(self) -> list[Row]:
        """The rows in order."""
        return rows(self.runs.done)

    @cached_property
    def frame(self) -> pd.DataFrame:
        """The numbers of every row (`byom.report.frame.numbers`)."""
        return numbers(self.rows)

    @cached_property
    def shown(self) -> pd.DataFrame:
        """The table as it is printed: accuracies in per cent, one decimal, with the spread over seeds."""
        return display(self.frame)

    @cached_property
    def best(self) -> pd.DataFrame:
        """True at the cells of `shown` that are printed in bold."""
        return best(self.frame)

    @cached_property
    def comparison(self) -> pd.DataFrame:
        """BYOM-FFT against Post-Pruning (`byom.report.comparison.against_post_pruning`)."""
        return against_post_pruning(self.rows)

    @cached_property
    def methods(self) -> pd.DataFrame:
        """The needs and costs of every method (`byom.report.methods.methods`); empty where no record says them."""
        costed = [record for record in self.runs.done if record.cost]
        return methods(self.rows if len(costed) == len(self.runs.done) else rows(costed))


@dataclass(frozen=True)
class Report:
    """The text to print of a report, and the files written."""

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
        results: The folder that holds ``runs``; ``tables`` and ``figures`` are written next to it.
        suite: The suite's name.
        backbone: One backbone, or every backbone with records.
        seeds: Only these seeds, or all.
        finetune: Only models fine-tuned with this option; it then ends the names of the files.

    Returns:
        The tables as text, and the paths of all files.

    Raises:
        ByomError: If no run has finished, a record cannot be read, or they cannot stand in one table.
    """
    names = [backbone] if backbone else backbones(results, suite)
    suffix = f"--{finetune}" if finetune else ""
    tables = [Tables(read_runs(results, suite, name, seeds, finetune)) for name in names]
    files = [path for each in tables for path in write_all(each, results, suffix)]
    return Report("\n".join(as_text(each) for each in tables), files)


def write_all(tables: Tables, results: Path, suffix: str = "") -> list[Path]:
    """Write tables and figures, and return the paths of their files.

    Args:
        tables: What is written.
        results: The folder that gets ``tables`` and ``figures``.
        suffix: What the stem of the files' names ends with.
    """
    stem = f"{tables.runs.suite}--{tables.runs.backbone}{suffix}"
    texts = {
        f"{stem}.md": as_markdown(tables),
        f"{stem}.csv": csv(tables.frame),
        f"{stem}.tex": render.latex(tables.shown, tables.best, _breaks(tables.rows)),
    }
    if len(tables.comparison):
        texts[f"{stem}--comparison.csv"] = csv(tables.comparison)
    if len(tables.methods):
        texts[f"{stem}--methods.md"] = methods_markdown(tables)
        texts[f"{stem}--methods.csv"] = csv(tables.methods)
    files = [write_text(results / "tables" / name, text) for name, text in texts.items()]
    # matplotlib takes most of a second to import, and a table alone does not need it
    from byom.report.figures import suite as figures

    files += figures.save_all(tables.frame, results / "figures", stem)
    if len(tables.methods):
        from byom.report.figures.methods import accuracy_by_method
        from byom.report.figures.style import save

        files += save(accuracy_by_method(tables.methods), results / "figures" / f"{stem}--accuracy-by-method")
    return files


def _breaks(rows: Sequence[Row]) -> list[int]:
    """Return the places where another kind of model begins."""
    groups = ["own" if row.kind in ("pretrained", "single_task") else row.kind for row in rows]
    return [i for i in range(1, len(groups)) if groups[i] != groups[i - 1]]


def as_markdown(tables: Tables) -> str:
    """Return the report as Markdown: what was run, the table, the comparison, and what the columns mean."""
    runs = tables.runs
    parts = [f"# {runs.suite}, {runs.backbone}\n\n", *_bullets(runs.header), "\n"]
    parts += [render.markdown(tables.shown, tables.best), "\n", *_bullets([*NOTES, *differing(runs.done)])]
    if len(tables.comparison):
        parts += ["\n## BYOM-FFT against Post-Pruning\n\n", render.markdown(display_comparison(tables.comparison))]
        parts += ["\n", *_bullets(COMPARISON_NOTES)]
    return "".join(parts)


def methods_markdown(tables: Tables) -> str:
    """Return what every method needs, stores and costs as Markdown."""
    runs, costs = tables.runs, tables.methods
    flagged = ["†: the method has looked at the test split's inputs."] * bool(costs["sees_test"].any())
    batches = "‡: tasks are told apart by whole batches of one data set, which gives them away."
    flagged += [batches] * bool(costs["by_batch"].any())
    parts = [
        f"# {runs.suite}, {runs.backbone}: what every method needs, stores and costs\n\n",
        *_bullets(runs.header),
    ]
    return "".join([*parts, "\n", render.markdown(display_methods(costs)), "\n", *_bullets([*METHOD_NOTES, *flagged])])


def _bullets(lines: Iterable[str]) -> list[str]:
    return [f"- {line}\n" for line in lines]


def as_text(tables: Tables) -> str:
    """Return the report for a terminal of 160 columns."""
    runs = tables.runs
    parts = [f"{runs.suite}, {runs.backbone}\n", *(f"{line}\n" for line in runs.header), "\n"]
    parts += [render.text(tables.shown, task_names(tables.frame))]
    if len(tables.comparison):
        parts += ["\nBYOM-FFT against Post-Pruning\n\n", render.text(display_comparison(tables.comparison))]
    return "".join(parts)
