"""``byom table`` and ``byom report``: the missing cells of an experiment, and the tables of finished ones."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from byom.cli import config, sweeps
from byom.cli.failures import failures
from byom.cli.missing import Composed, run_missing
from byom.errors import ByomError, NothingFinished, OptionError, suggest
from byom.experts.finetune.processes import led

if TYPE_CHECKING:
    from byom.pipeline.settings import Settings
    from byom.report.published import Published

REPORTED = ("suite", "backbone", "results", "suite.size", "suite.draw", "suite.only")
"""Options that say which table a record belongs to."""

MANY = 3
"""From more suites than this on, their common table is printed in place of one each."""


@led
def table(arguments: Sequence[str]) -> int:
    """Run the missing cells of an experiment, then write its table and figures."""
    if not arguments or "=" in arguments[0]:
        raise OptionError(f"which table? byom table NAME, one of: {', '.join(config.options('experiment'))}")
    name, extra = arguments[0], list(arguments[1:])
    experiment = sweeps.experiment(name)
    launcher = [o for o in extra if sweeps.for_hydra(o)]
    if any(o.startswith("hydra/sweeper=") for o in launcher):
        raise OptionError("a table has its own cells and searches nothing; use byom -m hydra/sweeper=... for a search")
    every = experiment.cells([o for o in extra if o not in launcher])
    published_tables(experiment.published)  # what is wrong with them is said before any cell runs
    sweeps.name_sweep()

    @cache
    def composed(*cell: str) -> Settings:
        return config.settings(cell)

    from byom.pipeline.run import keeper

    with keeper(), config.shared():
        failed = run_missing(every, composed, launcher)
    try:
        write_all(places(every, composed), experiment.published)
    finally:  # a table that cannot be written must not hide why
        sys.stderr.write(failures(every, failed))
    return 1 if failed else 0


def report(arguments: Sequence[str]) -> int:
    """Write tables and figures from records alone; only suite, backbone and results say which."""
    for argument in arguments:
        if argument.split("=")[0] not in REPORTED:
            raise OptionError(f"byom report knows no '{argument}'; {suggest(argument.split('=')[0], REPORTED)}")
    values, names = config.resolve(arguments)
    suite = config.made(values["suite"]).name
    write(Place(Path(values["results"]), suite, names["backbone"], suite))
    return 0


class Place(NamedTuple):
    """The subject of a table: a results folder, a suite and a backbone."""

    results: Path
    suite: str
    backbone: str
    whole: str
    """The suite that this one is a subset of; its own name if of none."""

    @classmethod
    def of(cls, settings: Settings) -> Place:
        """Return the subject of the table that a run belongs to."""
        whole = settings.resolved["suite"]["name"]
        return cls(settings.place().root, settings.suite.name, settings.names["backbone"], whole)


def places(every: Iterable[Sequence[str]], composed: Composed) -> list[Place]:
    """Return the subjects of the tables of some cells; cells that do not compose belong to none."""
    seen: dict[Place, None] = {}
    for cell in every:
        try:
            seen[Place.of(composed(*cell))] = None
        except ByomError:  # the failure of the cell says it
            continue
    return list(seen)


def write_all(places: Sequence[Place], published: Sequence[str]) -> None:
    """Write and print tables.

    Args:
        places: Their subjects; one without a finished cell has no table, which is said.
        published: Published tables to stand next to ours.
    """
    begun = [place for place in places if _begun(place)]
    groups: dict[tuple[Path, str, str], list[str]] = {}
    for each in begun:
        groups.setdefault((each.results, each.backbone, each.whole), []).append(each.suite)
    for each in begun:
        if len(groups[each.results, each.backbone, each.whole]) <= MANY:
            write(each, published)
    for (results, backbone, whole), suites in groups.items():
        if len(suites) > 1:
            from byom.report import scaling

            _print(*scaling.generate(results, backbone, suites, whole))


def _begun(of: Place) -> bool:
    """Return whether any cell of a table has finished, and say so if none has."""
    from byom.report.report import read_runs

    try:
        read_runs(of.results, of.suite, of.backbone)
    except NothingFinished:
        sys.stderr.write(f"byom: no table of {of.suite} with {of.backbone}: none of its cells has finished\n")
        return False
    return True


def write(of: Place, published: Sequence[str] = ()) -> None:
    """Write and print the tables of one suite and backbone."""
    from byom.report.report import generate

    ours = generate(of.results, of.suite, of.backbone)
    _print(ours.text, ours.files)
    if published:
        from byom.report import published_table

        _print(*published_table.generate(of.results, of.suite, of.backbone, published_tables(published)))


def published_tables(names: Sequence[str]) -> list[Published]:
    """Return published tables by their names, in order.

    Raises:
        OptionError: If a name is not known, or a table contradicts itself.
    """
    from byom.report.published import read

    known = config.options("published")
    if unknown := [name for name in names if name not in known]:
        raise OptionError(f"there is no published table '{unknown[0]}'; {suggest(unknown[0], known)}")
    return [read(config.folder() / "published" / f"{name}.yaml") for name in names]


def _print(text: str, files: Sequence[Path]) -> None:
    sys.stdout.write(f"\n{text}\n\n" + "".join(f"{file}\n" for file in files))
