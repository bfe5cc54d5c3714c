"""The table of accuracy against bytes per task, from the records of ``budget_offline`` or ``budget_choices``."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from byom.report.report import Tables, read_runs
from byom.report.rows import Row

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
    sized = sorted(((kilobytes(row), row) for row in rows), key=lambda pair: (pair[0], pair[1].named))
    lines = [f"| {TITLES[suite]} | kB per task | accuracy | relative | seeds |", "|---|--:|--:|--:|--:|"]
    for size, row in sized:
        means = [100 * record.mean for record in row.records]
        relative = float(np.mean([100 * record.summary["test"].normalised for record in row.records]))
        spread = f" ± {np.std(means, ddof=1):.1f}" if len(means) > 1 else ""
        lines.append(f"| {row.named} | {size:,.0f} | {np.mean(means):.1f}{spread} | {relative:.1f} % | {len(means)} |")
    return "\n".join(lines)


def kilobytes(row: Row) -> float:
    """Return what is stored for a task beside the shared models, in 1000 bytes, the mean over tasks and seeds."""
    stored = [record.storage.task_bytes for record in row.records]
    return float(np.mean([sum(one.values()) / len(one) for one in stored])) / 1000
