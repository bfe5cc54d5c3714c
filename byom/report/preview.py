"""A preview's record as text for the terminal: the best weights of every method, and how good the preview is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from byom.functional.metrics import accuracies, ratio
from byom.report import render

Record = Mapping[str, Any]
MISSING = "—"
JOINT, OWN, PRETRAINED = "Jointly fine-tuned", "Single-task", "Pre-trained"


def text(record: Record) -> str:
    """Return the tables of a preview.

    Args:
        record: What `byom.pipeline.preview.run` returned.

    Returns:
        Text for the terminal, ending in a newline.
    """
    choosing, shown = chooser(record), list(record["summary"])[-1]
    note = f"accuracy in % on {shown} data" + ("" if shown == choosing else f", weights chosen on {choosing} data")
    parts = [f"{_title(record)}\nBest weights of {_weightings(record)}; {note}\n\n"]
    parts.append(render.text(best_table(record, choosing, shown), record["tasks"]))
    if record["joint"]:
        parts.append(f"\n{_agreement_note(record, shown)}\n\n")
        parts.append(render.text(agreement_table(record, shown), record["tasks"]))
    return "".join(parts)


def chooser(record: Record) -> str:
    """Return the split that weights are chosen on: validation, or test where nothing else was scored."""
    return "validation" if "validation" in record["summary"] else next(iter(record["summary"]))


def best_table(record: Record, choosing: str, shown: str) -> pd.DataFrame:
    """Return the weights with the best mean accuracy of every method, and what they reach.

    Args:
        record: The preview's record.
        choosing: The split that weights are chosen on.
        shown: The split whose accuracies are shown.
    """
    rows = [_best_row(record, name, choosing, shown) for name in record["points"]]
    if record["joint"]:
        best = int(accuracies(record["joint"], choosing).mean(1).argmax())
        rows.append(_row(record, JOINT, record["joint"][best], shown))
    own = {"Model": OWN} | _scores(record, single_task(record, shown), shown)
    rows += [own, _row(record, PRETRAINED, record["pretrained"], shown)]
    return pd.DataFrame(rows).fillna(MISSING)


def single_task(record: Record, split: str) -> np.ndarray:
    """Return the accuracy ``[T]`` of every expert on its own task."""
    return np.diag(accuracies(record["experts"], split))


def _best_row(record: Record, name: str, choosing: str, shown: str) -> dict[str, str]:
    rows, summary = record["points"][name], record["summary"][choosing][name]
    counts = {"Pareto": f"{len(summary['pareto'])} of {len(rows)}"}
    return _row(record, record["titles"][name], rows[summary["best"]], shown) | counts | _seconds(rows)


def _row(record: Record, name: str, point: Mapping[str, Any], shown: str) -> dict[str, str]:
    weights = " ".join(f"{100 * weight:.0f}" for weight in point["weights"]) or MISSING
    return {"Model": name, "Weights (%)": weights} | _scores(record, np.array(point["accuracy"][shown]), shown)


def _scores(record: Record, accuracy: np.ndarray, shown: str) -> dict[str, str]:
    own = single_task(record, shown)
    relative = np.mean([ratio(a, b) for a, b in zip(accuracy, own, strict=True)])
    by_task = {task: f"{100 * a:.1f}" for task, a in zip(record["tasks"], accuracy, strict=True)}
    return by_task | {"Mean": f"{100 * accuracy.mean():.1f}", "Relative": f"{100 * relative:.1f}"}


def _seconds(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    spent = {what: np.median([row["seconds"][what] for row in rows]) for what in ("make", "evaluate")}
    return {"Merge (s)": f"{spent['make']:.2f}", "Evaluate (s)": f"{spent['evaluate']:.2f}"}


def agreement_table(record: Record, split: str) -> pd.DataFrame:
    """Return how well each method predicts joint fine-tuning.

    Args:
        record: The preview's record, with joint points.
        split: The split.
    """
    rows = record["summary"][split].items()
    return pd.DataFrame([_agreement_row(record, name, row["agreement"]) for name, row in rows])


def _agreement_row(record: Record, name: str, agreement: Mapping[str, Any]) -> dict[str, str]:
    pairs = zip(record["tasks"], agreement["difference"], agreement["rank"], strict=True)
    by_task = {task: _cell(difference, rank) for task, difference, rank in pairs}
    mean = _cell(agreement["mean_difference"], agreement["mean_rank"])
    return {"Preview": record["titles"][name]} | by_task | {"Mean": mean, "Regret": f"{100 * agreement['regret']:.1f}"}


def _cell(difference: float, rank: float | None) -> str:
    return f"{100 * difference:.1f} ({MISSING if rank is None else f'{rank:+.2f}'})"


def _agreement_note(record: Record, split: str) -> str:
    return (
        f"Against {len(record['joint'])} jointly fine-tuned models on {split} data: mean |difference| in points "
        "(rank correlation).\nRegret: points of mean accuracy lost by training at the weights whose preview is best"
    )


def _title(record: Record) -> str:
    choices = record["choices"]
    return f"{choices['suite']}, {choices['backbone']}, seed {choices['seed']}: {', '.join(record['tasks'])}"


def _weightings(record: Record) -> str:
    return f"{len(next(iter(record['points'].values())))} weightings"
