"""``byom preview``: the accuracy over task weights from merged models alone."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from byom.cli import config, sweeps
from byom.cli.run import print_config
from byom.experts.finetune.processes import led

if TYPE_CHECKING:
    from byom.pipeline.preview import Preview
    from byom.pipeline.settings import Settings


@led
def preview(arguments: Sequence[str]) -> int:
    """Preview multi-task fine-tuning over task weights, then print its tables and draw its figures."""
    from byom.pipeline import preview as previews

    overrides = [a for a in arguments if a != "--cfg"]
    previews.require_known(overrides)
    fields = [a for a in overrides if a.startswith("merge.") and not a.startswith("merge.device=")]
    common = [a for a in overrides if a not in fields]  # of single methods, which others lack
    resolved = config.resolve(common, primary="preview").values
    if "--cfg" in arguments:
        return print_config(resolved)
    options = previews.Preview.of(resolved)
    _, path = previews.run(options, _by_method(options, overrides))
    _show(path)
    return 0


def _by_method(options: Preview, overrides: Sequence[str]) -> dict[str, Settings]:
    """Return the settings of each previewed method; a field of ``merge`` reaches the methods that have it."""
    sweep = [*overrides, f"merge={','.join(options.methods)}"]
    sweep += [f"merge.members={options.components}"] if "mixture" in options.methods else []
    cells = [cell for part in sweeps.fitting(sweep) for cell in sweeps.cells([""], part)]
    built = [config.settings(cell, primary="preview") for cell in cells]
    return {one.names["merge"]: one for one in built}


def _show(path: Path) -> None:
    from byom.report import preview as tables
    from byom.report.figures import preview as figures
    from byom.storage.preview import PreviewRecord

    record = PreviewRecord.read(path)
    files = [path, *figures.save_all(record, path)]
    sys.stdout.write(f"\n{tables.text(record)}\n" + "".join(f"{file}\n" for file in files))
