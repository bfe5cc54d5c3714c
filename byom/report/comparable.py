"""Records that may stand in one table: same suite, backbone, tasks, data and fine-tuning recipe."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from byom.errors import ByomError
from byom.storage.record import Record

NO_RECIPE = ("seed", "_target_", "micro_batch")
EARLIER = (("augment", "none"),)
"""Defaults of options that older records do not have."""
SPLITS = ("train", "validation", "test", "shots")
AGAIN = "run the older ones again on today's data"


def check_comparable(records: Sequence[Record]) -> None:
    """Refuse records that must not stand in one table.

    Args:
        records: Finished runs.

    Raises:
        ByomError: If suites, backbones, data, tasks or fine-tuning recipes differ.
    """
    for what, of, remedy in COMPARED:
        _refuse_different(records, what, of, remedy)
    telling = [record for record in records if record.contents]  # older ones do not say
    _refuse_different(telling, "checkpoints, which were replaced", _models, "run the older ones again on today's files")
    for seed in {record.choices.seed for record in records}:
        same = [record for record in records if record.choices.seed == seed]
        for task in sorted({task for record in same for task in record.data}):
            for split in SPLITS:  # a run reads the splits that it needs
                holding = [record for record in same if split in record.data.get(task, ())]
                _refuse_different(holding, f"data ({task}, {split})", partial(_print, task, split), AGAIN)


def _refuse_different(records: Sequence[Record], what: str, of: Callable[[Record], Any], remedy: str) -> None:
    if not records:
        return
    values = [json.dumps(of(record), sort_keys=True) for record in records]
    usual = Counter(values).most_common(1)[0][0]
    odd = [r.signature for r, value in zip(records, values, strict=True) if value != usual]
    if odd:
        raise ByomError(
            f"these {len(records)} records differ in their {what} and cannot share a table; {remedy}. "
            f"Unlike most: {', '.join(odd[:5])}{' …' if len(odd) > 5 else ''}"
        )


def _models(record: Record) -> Any:
    """Return the contents of pre-trained model and experts; those of data are compared by split."""
    return {name: value for name, value in record.contents.items() if not name.startswith("data ")}


def _print(task: str, split: str, record: Record) -> str:
    return record.data[task][split]


def _test_data(record: Record) -> Any:
    """Return the part no seed changes: training and validation examples are drawn by seed."""
    return {task: prints.get("test") for task, prints in record.data.items()}


def _recipe(record: Record) -> list:
    config = record.config.get("finetune")
    recipe = (
        {k: v for k, v in config.items() if k not in NO_RECIPE and (k, v) not in EARLIER}
        if isinstance(config, dict)
        else config
    )
    return [record.choices.finetune, recipe]


COMPARED: tuple[tuple[str, Callable[[Record], Any], str], ...] = (
    ("suite", lambda r: r.choices.suite, "report one suite at a time"),
    ("backbone", lambda r: r.choices.backbone, "report one backbone at a time"),
    ("tasks", lambda r: sorted(r.test), "run the skipped tasks, or move the odd records away"),
    ("test data", _test_data, AGAIN),
    ("checkpoint family", lambda r: r.family, "give every family a results= folder of its own"),
    ("precision", lambda r: r.config.get("precision", "fp32"), "give every precision a results= folder of its own"),
    ("fine-tuning recipe", _recipe, "name one, as in finetune=full, or move the odd records away"),
)
