"""Sources of a number: the records behind a cell of a table, and the commands that run them again."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from byom.cli import config
from byom.cli.rebuilt import rebuilt
from byom.errors import ByomError, OptionError, suggest
from byom.report.comparison import against_post_pruning, display_comparison, partner
from byom.report.frame import HEADS, chosen_text, percent
from byom.report.methods import display_methods, methods, with_known_task
from byom.report.report import Tables, backbones, read_runs
from byom.report.rows import Row
from byom.storage.record import Record

USAGE = 'byom why RECORD.json, or byom why SUITE ROW COLUMN, as in byom why vision8_offline "TIES" mean'


AGAIN = "A finished cell is not run again: add results=FOLDER to a command to see its number come out anew."


def why(arguments: Sequence[str]) -> int:
    """Print where the number of a table or a record comes from."""
    options = dict(a.split("=", 1) for a in arguments if a.startswith(("results=", "backbone=")))
    names = [a for a in arguments if not a.startswith(("results=", "backbone="))]
    if len(names) == 1 and names[0].endswith(".json"):
        sys.stdout.write(of_record(Path(names[0])))
    elif len(names) == 3:
        results = Path(options.get("results", "results"))
        sys.stdout.write(of_cell(results, names[0], options.get("backbone"), *names[1:]))
    else:
        raise OptionError(f"which number? {USAGE}")
    return 0


def of_record(path: Path) -> str:
    """Return where a record's number comes from, and which row of its table it belongs to.

    Args:
        path: The record's file.

    Raises:
        ByomError: If it is missing, is damaged, or is not of a run.
    """
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*.json"))
        raise OptionError(f"there is no record {path}; {suggest(path.name, near)}")
    if len(path.resolve().parents) < 4 or path.resolve().parents[2].name != "runs":
        raise OptionError(f"{path} is not the record of a run: those lie in RESULTS/runs/SUITE/BACKBONE")
    record, results = Record.read(path), path.parents[3]
    if record.status == "failed":
        return f"{path}: failed, {record.error or 'no reason recorded'}\n{_again(record, results)}"
    tables = Tables(read_runs(results, path.parents[1].name, path.parents[0].name))
    row = next((row for row in tables.rows for one in row.records if one.signature == record.signature), None)
    if row is None:
        return f"{path}: in no table, the test split was not evaluated\n{_run(record, results, '')}"
    return _explained(tables, row, "mean", results, [record])


def of_cell(results: Path, suite: str, backbone: str | None, row: str, column: str) -> str:
    """Return where a cell of a table comes from.

    Args:
        results: The folder that holds ``runs``.
        suite: The suite's name.
        backbone: The backbone's name; None where the suite has records of one alone.
        row: The row as the table names it, with its density where there are several: ``BYOM-FFT on TIES, 10 %``.
        column: The column as the table or its CSV names it.

    Raises:
        ByomError: If the suite, row or column does not exist, with the nearest names.
    """
    known = backbones(results, suite)
    if backbone is None and len(known) > 1:
        raise OptionError(f"{suite} has records of {', '.join(known)}; name one, as in backbone={known[0]}")
    if backbone is not None and backbone not in known:
        raise OptionError(f"{suite} has no record of backbone={backbone}; {suggest(backbone, known)}")
    tables = Tables(read_runs(results, suite, backbone or known[0]))
    match = _row(tables, row)
    return _explained(tables, match, _column(tables, column), results, match.records)


def _row(tables: Tables, name: str) -> Row:
    full = {row.named: row for row in tables.rows}
    text = _plain(name)
    exact = [row for label, row in full.items() if _plain(label) == text]
    rows = exact or [row for row in tables.rows if _plain(row.label) == text]
    if len(rows) > 1:
        densities = ", ".join(f"{percent(row.density)} %" for row in rows)
        raise OptionError(f"there are {len(rows)} rows '{name}', of {densities}; name one, as in '{rows[0].named}'")
    if not rows:
        here = any("methods" in path.parts for path in (record.path for record in tables.runs.done) if path)
        elsewhere = "" if here else "; results=results/methods has the sweep over all methods"
        raise OptionError(f"{tables.runs.suite} has no row '{name}'; {suggest(name, full)}{elsewhere}")
    return rows[0]


def _plain(name: str) -> str:
    return re.sub(r"\s*%", " %", name.strip()).lower()


def _column(tables: Tables, name: str) -> str:
    """Return a column's name: a task, a key of `HEADS`, or a key of `FURTHER`."""
    heads = {**{task: task for task in tables.runs.tasks}, **{name: name for name in (*HEADS, *FURTHER)}}
    heads |= {head: name for name, head in HEADS.items()} | {
        "accuracy": "mean",
        "relative": "normalised",
        "stored": "bytes",
    }
    heads |= {column.head: name for name, column in reversed(FURTHER.items())}
    by_text = {text.lower(): column for text, column in heads.items()}
    text = name.removeprefix("accuracy_").strip()
    if text.lower() not in by_text:
        raise OptionError(f"{tables.runs.suite} has no column '{name}'; {suggest(text, heads)}")
    return by_text[text.lower()]


def _explained(tables: Tables, row: Row, column: str, results: Path, records: Sequence[Record]) -> str:
    if further := FURTHER.get(column):
        head, shown = further.head, further.shown(row, tables.rows)
    else:
        place = next(n for n, one in enumerate(tables.rows) if one is row)
        head = HEADS.get(column, column)
        shown = tables.shown[head].iloc[place]
    runs, count = tables.runs, len(row.records)
    top = f"{runs.suite}, {runs.backbone}: {row.named}, {head}: {shown}"
    over = f" (over {count} seed{'s' * (count > 1)})" if column not in ("chosen", "seeds") else ""
    parts = [f"{top}{over}\n", *(_run(record, results, _value(tables, row, record, column)) for record in records)]
    if further and (other := further.against(row, tables.rows)):
        parts += [f"\nagainst {other.named}\n", *(_run(record, results, "") for record in other.records)]
    return "".join([*parts, f"\n{AGAIN}\n"])


def _value(tables: Tables, row: Row, record: Record, column: str) -> str:
    if further := FURTHER.get(column):
        seed = record.choices.seed
        return further.shown(_of_seed(row, seed), [_of_seed(other, seed) for other in tables.rows])
    stored = {"parameters": record.storage.parameters, "bytes": record.storage.bytes}
    if column in stored:
        return f"{stored[column] / 1e6:.1f}"
    if column in ("chosen", "seeds"):
        return chosen_text(record.tuning.chosen) if column == "chosen" else ""
    means = {"mean": record.mean, "normalised": record.summary["test"].normalised}
    return f"{100 * (means[column] if column in means else record.test[column].value):.2f}"


def _of_seed(row: Row, seed: int) -> Row:
    return replace(row, records=tuple(record for record in row.records if record.choices.seed == seed))


@dataclass(frozen=True)
class Further:
    """A column of the table of methods, or of BYOM-FFT against Post-Pruning.

    Args:
        head: Its name as these tables print it.
        table: Prints some rows, computed among all rows.
        against: Gives the row that a row is compared with; None where it stands alone.
        absent: Says why a row may lack it.
    """

    head: str
    table: Callable[[Row, Sequence[Row]], pd.DataFrame]
    against: Callable[[Row, Sequence[Row]], Row | None]
    absent: str

    def shown(self, row: Row, rows: Sequence[Row]) -> str:
        """Return the cell of a row as its table prints it.

        Raises:
            OptionError: If the row lacks it.
        """
        table = self.table(row, [other for other in rows if other.records])
        if not len(table) or self.head not in table:
            raise OptionError(f"'{row.named}' has no '{self.head}': {self.absent}")
        return str(table[self.head].iloc[0])


def _alone(row: Row, rows: Sequence[Row]) -> None:
    """Return that a row is compared with no other."""


def _costs(row: Row, rows: Sequence[Row]) -> pd.DataFrame:
    if any(record.cost is None for record in row.records):
        return pd.DataFrame()
    known = with_known_task(row, rows)
    return display_methods(methods([row, *([known] if known else [])]))


def _compared(row: Row, rows: Sequence[Row]) -> pd.DataFrame:
    pruned = partner(row, rows)
    return display_comparison(against_post_pruning([row, *([pruned] if pruned else [])]))


NO_COST = "its records do not say that; results=results/methods holds the sweep over all methods, which do"
NOT_COMPARED = "only BYOM-FFT is compared with Post-Pruning"
COSTS = {
    "task_parameters": "Stored per task (M)", "mb": "MB", "statistics_seconds": "Statistics s",
    "merge_seconds": "Merge s", "variant_seconds": "Variant s", "extra_mib": "Memory MiB", "right": "Right %",
}  # fmt: skip
AGAINST = {
    "distance": "Distance ratio", "residual": "Dropped ratio", "difference": "Difference (points)",
    "lower": "95 % interval", "upper": "95 % interval",
}  # fmt: skip
FURTHER = {
    **{name: Further(head, _costs, _alone, NO_COST) for name, head in COSTS.items()},
    "price": Further("Price", _costs, with_known_task, NO_COST),
    **{name: Further(head, _compared, partner, NOT_COMPARED) for name, head in AGAINST.items()},
}
"""Columns of the tables of methods and of the comparison, by their names in these tables' CSV."""


def _run(record: Record, results: Path, value: str) -> str:
    lines = [f"\nseed {record.choices.seed}: {value}".rstrip(": "), f"  {record.path}"]
    if record.tuning.searched:
        chosen = " ".join(f"{name}={value}" for name, value in sorted(record.tuning.chosen.items()))
        lines += [f"  chosen on validation data: {chosen}, of {record.tuning.searched} settings"]
    else:
        lines += ["  hyperparameters as given, none searched"]
    used = {group: fields for group, fields in record.hyperparameters.items() if fields and group in ("merge", "byom")}
    lines += [
        f"  {group}: {' '.join(f'{key}={value}' for key, value in sorted(fields.items()))}"
        for group, fields in used.items()
    ]
    return "\n".join(lines) + "\n" + _again(record, results)


def _again(record: Record, results: Path) -> str:
    """Return the command that runs a record's cell again, and a doubt where it does not give the same signature."""
    overrides = rebuilt(record, results)
    command = f"  {shlex.join(['byom', 'run', *overrides])}\n"
    try:
        signature = config.settings(overrides).signature()
    except ByomError as error:
        return f"{command}  whether that is the same cell was not checked: {error}\n"
    if signature == record.signature:
        return command
    return f"{command}  that is another cell than the record's today: {signature}, not {record.signature}\n"
