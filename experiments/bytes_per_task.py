"""The table of accuracy against bytes per task, from the records of ``budget_offline`` or ``budget_choices``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from byom.report.report import Tables, read_runs
from byom.report.rows import Row
from byom.report.stored import stored_of

ROOT = Path(__file__).parents[1] / "results" / "budget"
CHOICES = ROOT.with_name("budget_choices")
SUITES = {"vision8_offline": "vit_small_dinov2", "text8_offline": "minilm"}
TITLES = {"vision8_offline": "images, ViT-S/14", "text8_offline": "texts, MiniLM-L6"}


def table(root: Path = ROOT) -> str:
    """Return one Markdown table per suite: what is stored for each task, and the accuracy, by falling size.

    Args:
        root: The results folder.
    """
    return "\n\n".join(_suite(root, suite) for suite in SUITES)


def _suite(root: Path, suite: str) -> str:
    rows = Tables(read_runs(root, suite, SUITES[suite])).rows
    sized = sorted(((kilobytes(row, rows), row) for row in rows), key=lambda pair: (pair[0], pair[1].named))
    lines = [f"| {TITLES[suite]} | kB per task | accuracy | relative | seeds |", "|---|--:|--:|--:|--:|"]
    for size, row in sized:
        means = [100 * record.mean for record in row.records]
        relative = float(np.mean([100 * record.summary["test"].normalised for record in row.records]))
        spread = f" ± {np.std(means, ddof=1):.1f}" if len(means) > 1 else ""
        lines.append(f"| {row.named} | {size:,.0f} | {np.mean(means):.1f}{spread} | {relative:.1f} % | {len(means)} |")
    return "\n".join(lines)


def kilobytes(row: Row, rows: Sequence[Row]) -> float:
    """Return what a task takes beside one model, its part of what else is shared included, in 1000 bytes.

    Args:
        row: The row.
        rows: All rows of its table.
    """
    return stored_of(row, rows).beside(len(row.records[0].test)) / 1000
