"""What the commands do; imported only once a command is known."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from byom.cli import config, sweeps, tables
from byom.cli.sweeps import for_hydra
from byom.errors import ByomError, OptionError, suggest
from byom.experts.finetune.processes import led

GROUPS_LISTED = (
    "merge", "byom", "router", "statistic", "suite", "backbone", "finetune", "experts", "tune", "logger", "experiment",
)  # fmt: skip
REPORTED = ("suite", "backbone", "results", "suite.size", "suite.draw", "suite.only")


@led
def run(arguments: Sequence[str]) -> int:
    """Run one cell, or print the configuration that would run (``--cfg``)."""
    overrides = [a for a in arguments if a != "--cfg"]
    if "--cfg" in arguments:
        return _print_config(config.resolve(overrides).values)
    _job(config.settings(overrides))
    return 0


@led
def sweep(arguments: Sequence[str]) -> int:
    """Run a Hydra multirun; every job returns its metric to the sweeper."""
    _name_sweep()
    for file in sweeps.multirun(arguments, _job):
        _print_best(file)
    return 0


def _print_best(file: Path) -> None:
    import yaml

    found = yaml.safe_load(file.read_text())
    chosen = " ".join(f"{name}={value}" for name, value in found["best_params"].items())
    sys.stdout.write(f"\nbest on validation: {chosen}  {100 * found['best_value']:.1f} %\n{file}\n")


@led
def table(arguments: Sequence[str]) -> int:
    """Run the missing cells of an experiment, then write its table and figures."""
    if not arguments or "=" in arguments[0]:
        raise OptionError(f"which table? byom table NAME, one of: {', '.join(config.options('experiment'))}")
    name, extra = arguments[0], list(arguments[1:])
    plan = config.resolve([f"experiment={name}"], "table").values["experiment"]
    launcher = [o for o in extra if for_hydra(o)]
    every = sweeps.cells(plan["rows"], [*plan["common"], *(o for o in extra if o not in launcher)])
    _name_sweep()
    failures = _launched(every, launcher) if launcher else _cells(every)
    try:
        tables.write_all(every, plan.get("published") or ())
    finally:  # a table that cannot be written must not hide why
        sys.stderr.write(tables.failures(every, failures))
    return 1 if failures else 0


def report(arguments: Sequence[str]) -> int:
    """Write tables and figures from records alone; only suite, backbone and results say which."""
    for argument in arguments:
        if argument.split("=")[0] not in REPORTED:
            raise OptionError(f"byom report knows no '{argument}'; {suggest(argument.split('=')[0], REPORTED)}")
    values, names = config.resolve(arguments)
    suite = config.made(values["suite"]).name
    tables.write(tables.Place(Path(values["results"]), suite, names["backbone"], suite))
    return 0


@led
def preview(arguments: Sequence[str]) -> int:
    """Preview multi-task fine-tuning over task weights, then print its tables and draw its figures."""
    from byom.pipeline import preview as previews

    overrides = [a for a in arguments if a != "--cfg"]
    previews.require_known(overrides)
    common = [a for a in overrides if not a.startswith("merge.")]  # the methods' own, which not all of them have
    resolved = config.resolve(common, primary="preview").values
    if "--cfg" in arguments:
        return _print_config(resolved)
    asked = previews.Preview.of(resolved)
    record, path = previews.run(asked, _weighed(asked, overrides))
    _show_preview(record, path)
    return 0


def _weighed(asked: Any, overrides: Sequence[str]) -> dict[str, Any]:
    """Return the settings of each previewed method; a field of ``merge`` reaches the methods that have it."""
    sweep = [*overrides, f"merge={','.join(asked.methods)}"]
    sweep += [f"merge.members={asked.components}"] if "mixture" in asked.methods else []
    cells = [cell for part in sweeps.fitting(sweep) for cell in sweeps.cells([""], part)]
    built = [config.settings(cell, primary="preview") for cell in cells]
    return {one.names["merge"]: one for one in built}


def _show_preview(record: dict[str, Any], path: Path) -> None:
    from byom.report import preview as preview_table
    from byom.report.figures import preview as preview_figures

    files = [path, *preview_figures.save_all(record, path)]
    sys.stdout.write(f"\n{preview_table.text(record)}\n" + "".join(f"{file}\n" for file in files))


@led
def statistics(arguments: Sequence[str]) -> int:
    """Fit statistics of every task's expert ahead of time, and say where they are."""
    names = [a for a in arguments if "=" not in a]
    settings = config.settings([a for a in arguments if "=" in a])
    for name in names:
        if name not in settings.statistics:
            raise OptionError(f"there is no statistic '{name}'; {suggest(name, settings.statistics)}")
    if not names:
        raise OptionError(f"which statistics? byom statistics NAME ..., of: {', '.join(settings.statistics)}")
    return _fit_statistics(settings, {name: settings.statistics[name] for name in names})


def _fit_statistics(settings: Any, wanted: dict[str, Any]) -> int:
    from byom.pipeline.labs import laboratory

    lab = laboratory(settings)
    for task in lab.tasks:
        for name, found in lab.statistics(task, wanted).items():
            sys.stdout.write(f"{task:<18} {name:<8} {len(found)} tensors  {found.origin}\n")
    sys.stdout.write(f"{lab.statistics_cost(wanted):.1f} s in all\n")
    return 0


@led
def export(arguments: Sequence[str]) -> int:
    """Write every task as a PEFT adapter, then print a line a task."""
    import json

    from byom.checkpoint.adapters import export as exporting
    from byom.pipeline.cell import Cell

    folder, settings = _folder("export", arguments)
    cell = Cell(settings)
    lab, served = cell.lab, cell.served
    exporting.adapters(
        served,
        folder,
        base_model=_named(settings.backbone),
        prefix=settings.backbone.inner,
        module=lab.encoder,
        heads={name: (lab.head(name), task.classes) for name, task in lab.tasks.items()},
        notes={"suite": settings.suite.name, **{k: v for k, v in settings.titles().items() if v}},
    )
    for task, held in json.loads((folder / "export.json").read_text())["tasks"].items():
        ranks = "-".join(str(rank) for rank in dict.fromkeys(held["rank"]))
        size = f"{held['parameters']:>11,} parameters {held['bytes']:>12,} bytes"
        sys.stdout.write(f"{task:<18} rank {ranks:<7} {size}  {folder / task}\n")
    return 0


@led
def pack(arguments: Sequence[str]) -> int:
    """Save what serves the tasks as a bundle, then print a line a task."""
    from byom.checkpoint.bundle import Bundle
    from byom.pipeline.cell import Cell
    from byom.variants.base.delta import Delta

    folder, settings = _folder("pack", arguments)
    served = Cell(settings).streamed
    Bundle(served.reference, served.deltas, served.base).save(folder)
    for task in served.deltas:
        delta = Delta.open(folder / f"{task}.safetensors")
        size = f"{delta.stored_parameters:>11,} parameters {delta.nbytes:>12,} bytes"
        sys.stdout.write(f"{task:<18} {size}  {folder / task}.safetensors\n")
    return 0


def _folder(command: str, arguments: Sequence[str]) -> tuple[Path, Any]:
    """Return where a command writes, its first argument, and the settings that the others make."""
    if not arguments or "=" in arguments[0]:
        raise OptionError(f"where to? byom {command} FOLDER [option=value ...]")
    return Path(arguments[0]).expanduser(), config.settings(list(arguments[1:]))


def _named(backbone: Any) -> str:
    """Return how the hubs call a backbone's model; a model inside a data package is called as the package is."""
    place = getattr(backbone, "model", None) or backbone.checkpoint
    return place if isinstance(place, str) else f"{place.name}=={place.version}"


def list_options(arguments: Sequence[str]) -> int:
    """List the options of every group (or of those named) and the experts in the cache."""
    groups = [a for a in arguments if a in GROUPS_LISTED] or list(GROUPS_LISTED)
    for group in groups:
        sys.stdout.write(f"{group + '=':<12}{', '.join(config.options(group)) or '(none)'}\n")
    cache = Path(config.resolve([]).values["cache"]).expanduser()
    for line in _experts(cache):
        sys.stdout.write(f"  {line}\n")
    return 0


def _name_sweep() -> None:
    """Give all jobs of this sweep one group name; the environment reaches the launchers' processes."""
    os.environ.setdefault("BYOM_SWEEP", time.strftime("%Y%m%d-%H%M%S"))


def _experts(cache: Path) -> list[str]:
    import json

    found = sorted((cache / "experts").glob("*/training.json"))
    rows = [(json.loads(file.read_text()), file.parent.name) for file in found]
    lines = [f"{row['task']:<18} seed {row['seed']}  {row.get('backbone', ''):<10} {name}" for row, name in rows]
    return [f"experts in {cache}: {len(lines)}", *sorted(lines)]


def _job(settings: Any) -> float:
    from byom.pipeline.run import metric
    from byom.pipeline.run import run as run_cell

    return metric(run_cell(settings))


def _cells(every: Sequence[list[str]]) -> list[tuple[list[str], Exception]]:
    from byom.weights import cuts

    failures: list[tuple[list[str], Exception]] = []
    start = time.monotonic()
    given = {o.removeprefix("byom.density=") for cell in every for o in cell if o.startswith("byom.density=")}
    densities = [float(value) for value in given if value.replace(".", "", 1).isdigit()]
    for number, cell in enumerate(every, 1):
        sys.stdout.write(f"[{number:>3}/{len(every)}] {_left(start, number - 1, len(every))} ")
        sys.stdout.flush()
        try:
            with cuts.sweep(densities):
                _job(config.settings(cell))
        except Exception as error:  # marked in its own record; the other cells still run
            failures.append((cell, error))
    return failures


def _launched(every: Sequence[list[str]], launcher: Sequence[str]) -> list[tuple[list[str], Exception]]:
    """Hand the cells without a record to one of Hydra's launchers, and return those that still have none."""
    if any(o.startswith("hydra/sweeper=") for o in launcher):
        raise OptionError("a table has its own cells and searches nothing; use byom -m hydra/sweeper=... for a search")
    missing = [cell for cell in every if not _finished(cell)]
    sys.stdout.write(f"{len(every) - len(missing)} of {len(every)} cells finished before, {len(missing)} to run\n")
    sys.stdout.flush()
    try:
        raised = sweeps.launch(missing, _job, launcher) if missing else []
    except ByomError:
        raise
    except Exception as error:  # a job that vanished takes the launcher along; what has a record is kept
        raised = [error] * len(missing)
    return [(cell, error) for cell, error in zip(missing, raised, strict=True) if error and not _finished(cell)]


def _finished(cell: Sequence[str]) -> bool:
    try:
        return config.settings(cell).place().finished() is not None
    except ByomError:  # the cell's own job says it
        return False


def _left(start: float, done: int, total: int) -> str:
    if not done:
        return " " * 13
    seconds = (time.monotonic() - start) / done * (total - done)
    return f"{int(seconds // 60):>3}:{int(seconds % 60):02d} left "


def _print_config(resolved: dict[str, Any]) -> int:
    import yaml

    sys.stdout.write(yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True))
    return 0
