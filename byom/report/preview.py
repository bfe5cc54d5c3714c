"""A preview's record as text for the terminal: the best weights of every method, and how good the preview is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from byom.functional.metrics import ratio
from byom.functional.pareto import Agreement
from byom.report import render
from byom.storage.preview import PreviewRecord, Weighting, accuracies

MISSING = "—"
JOINT, OWN, PRETRAINED = "Jointly fine-tuned", "Single-task", "Pre-trained"


def text(record: PreviewRecord) -> str:
    """Return the tables of a preview.

    Args:
        record: The preview's record.

    Returns:
        Text for the terminal, ending in a newline.
    """
    choosing, shown = record.choosing, record.shown
    note = f"accuracy in % on {shown} data" + ("" if shown == choosing else f", weights chosen on {choosing} data")
    parts = [f"{_title(record)}\nBest weights of {_weightings(record)}; {note}\n\n"]
    parts.append(render.text(best_table(record, choosing, shown), record.tasks))
    if record.joint:
        parts.append(f"\n{_agreement_note(record, shown)}\n\n")
        parts.append(render.text(agreement_table(record, shown), record.tasks))
    return "".join(parts)


def best_table(record: PreviewRecord, choosing: str, shown: str) -> pd.DataFrame:
    """Return the weights with the best mean accuracy of every method, and what they reach.

    Args:
        record: The preview's record.
        choosing: The split that weights are chosen on.
        shown: The split whose accuracies are shown.
    """
    rows = [_best_row(record, name, choosing, shown) for name in record.points]
    if record.joint:
        best = int(accuracies(record.joint, choosing).mean(1).argmax())
        rows.append(_row(record, JOINT, record.joint[best], shown))
    own = {"Model": OWN} | _scores(record, record.single_task(shown), shown)
    rows += [own, _row(record, PRETRAINED, record.pretrained, shown)]
    return pd.DataFrame(rows).fillna(MISSING)


def _best_row(record: PreviewRecord, name: str, choosing: str, shown: str) -> dict[str, str]:
    rows, front = record.points[name], record.summary[choosing][name].pareto
    counts = {"Pareto": f"{len(front)} of {len(rows)}"}
    return _row(record, record.titles[name], record.best(name, choosing), shown) | counts | _seconds(rows)


def _row(record: PreviewRecord, name: str, point: Weighting, shown: str) -> dict[str, str]:
    weights = " ".join(f"{100 * weight:.0f}" for weight in point.weights) or MISSING
    return {"Model": name, "Weights (%)": weights} | _scores(record, np.array(point.accuracy[shown]), shown)


def _scores(record: PreviewRecord, accuracy: np.ndarray, shown: str) -> dict[str, str]:
    own = record.single_task(shown)
    relative = np.mean([ratio(a, b) for a, b in zip(accuracy, own, strict=True)])
    by_task = {task: f"{100 * a:.1f}" for task, a in zip(record.tasks, accuracy, strict=True)}
    return by_task | {"Mean": f"{100 * accuracy.mean():.1f}", "Relative": f"{100 * relative:.1f}"}


def _seconds(rows: Sequence[Weighting]) -> dict[str, str]:
    make, evaluate = np.median([(row.seconds.make, row.seconds.evaluate) for row in rows], axis=0)
    return {"Merge (s)": f"{make:.2f}", "Evaluate (s)": f"{evaluate:.2f}"}


def agreement_table(record: PreviewRecord, split: str) -> pd.DataFrame:
    """Return how well each method predicts joint fine-tuning.

    Args:
        record: The preview's record, with joint points.
        split: The split.
    """
    rows = record.summary[split].items()
    return pd.DataFrame([_agreement_row(record, name, row.agreement) for name, row in rows if row.agreement])


def _agreement_row(record: PreviewRecord, name: str, agreement: Agreement) -> dict[str, str]:
    pairs = zip(record.tasks, agreement.difference, agreement.rank, strict=True)
    by_task = {task: _cell(difference, rank) for task, difference, rank in pairs}
    mean = _cell(agreement.mean_difference, agreement.mean_rank)
    return {"Preview": record.titles[name]} | by_task | {"Mean": mean, "Regret": f"{100 * agreement.regret:.1f}"}


def _cell(difference: float, rank: float | None) -> str:
    return f"{100 * difference:.1f} ({MISSING if rank is None else f'{rank:+.2f}'})"


def _agreement_note(record: PreviewRecord, split: str) -> str:
    return (
        f"Against {len(record.joint)} jointly fine-tuned models on {split} data: mean |difference| in points "
        "(rank correlation).\nRegret: points of mean accuracy lost by training at the weights whose preview is best"
    )


def _title(record: PreviewRecord) -> str:
    return f"{record.suite}, {record.backbone}, seed {record.seed}: {', '.join(record.tasks)}"


def _weightings(record: PreviewRecord) -> str:
    return f"{len(next(iter(record.points.values())))} weightings"
