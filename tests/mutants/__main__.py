"""Plants every mutant and says which of them no test finds: ``python -m tests.mutants``."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.mutants.mutant import AREAS, Misplaced, Mutant, locate
from tests.mutants.mutants import MUTANTS
from tests.mutants.runner import Outcome, preload, run
from tests.mutants.tree import Tree

STAGES = {
    "near": (),
    "inner": ("unit", "identities", "contract", "peers", "golden", "config"),
    "all": ("e2e", "docs"),
}
NEAR_SECONDS = 60.0  # a target takes a few seconds; a fault without end should not take an hour
STAGE_SECONDS = 3600.0


@dataclass
class Result:
    """What became of one mutant; `stage` and `test` say what found it, `survived` which stages did not."""

    name: str
    area: str
    killed: bool = False
    stage: str = ""
    test: str = ""
    why: str = ""
    survived: list[str] = field(default_factory=list)
    seconds: float = 0.0


class Hunt:
    """The runs of pytest on one tree, and the tests that fail in it without any fault."""

    def __init__(self, tree: Tree, ignored: Sequence[str], log: Path) -> None:
        self.tree, self.log, self.red = tree, log, set[str]()
        self._ignored = tuple(f"--ignore={path}" for path in ignored)
        self._sound: set[str] = set()
        self._limits: dict[str, float] = {}

    def check(self, targets: Sequence[str]) -> None:
        """Run the nearest tests of the tree without a fault; those that fail are left out from then on."""
        for target in targets:
            outcome = self._run([target], STAGE_SECONDS)
            while not outcome.passed:
                self._leave_out(outcome)
                outcome = self._run([target], STAGE_SECONDS)
            self._limits[target] = max(NEAR_SECONDS, 10 * outcome.seconds)

    def find(self, mutant: Mutant, file: Path, stages: Sequence[str], result: Result) -> None:
        """Run the stages until a test finds the mutant."""
        for stage in stages:
            batches = [[target] for target in mutant.tests] if stage == "near" else [_folders(stage)]
            for batch in batches:
                outcome = self._found(mutant, file, batch, result)
                if not outcome.passed:
                    result.killed, result.stage = True, stage
                    result.test, result.why = outcome.test, outcome.why
                    return
            result.survived.append(stage)

    def _found(self, mutant: Mutant, file: Path, targets: list[str], result: Result) -> Outcome:
        while True:
            with self.tree.planted(mutant, file):
                outcome = self._run(targets, self._limits.get(targets[0], STAGE_SECONDS))
            result.seconds = round(result.seconds + outcome.seconds, 1)
            if outcome.passed or self._is_sound(outcome.test):
                return outcome
            self._leave_out(outcome)

    def _is_sound(self, test: str) -> bool:
        if test and test not in self._sound and self._run([test], STAGE_SECONDS).passed:
            self._sound.add(test)
        return not test or test in self._sound

    def _run(self, targets: list[str], limit: float) -> Outcome:
        left_out = tuple(f"--deselect={test}" for test in sorted(self.red))
        return run(self.tree.folder, targets, limit, self._ignored + left_out, self.log)

    def _leave_out(self, outcome: Outcome) -> None:
        if not outcome.test or outcome.test in self.red:
            said = self.log.read_text(encoding="utf-8")[-3000:]
            sys.exit(f"the tree without a fault cannot be tested: {outcome.why}\n{said}")
        self.red.add(outcome.test)
        print(f"fails without any fault, and is left out: {outcome.test} ({outcome.why})", flush=True)


def main() -> None:
    """Read the arguments, run, and print."""
    given = _arguments()
    chosen = [m for m in MUTANTS if (not given.only or m.name in given.only) and given.area in (None, m.area)]
    try:
        files = locate(chosen, given.root / "byom")
    except Misplaced as error:
        sys.exit(f"these mutants cannot be planted; move their text along with the code:\n{error}")
    known = _read(given.json) if given.resume else {}
    todo = [m for m in chosen if _left(known.get(m.name), given.stages)]
    preload()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        hunt = Hunt(Tree(given.root, Path(folder) / "tree"), given.ignore, Path(folder) / "log")
        if "near" in given.stages:
            hunt.check(sorted({target for mutant in todo for target in mutant.tests}))
        for place, mutant in enumerate(todo, 1):
            result = known.get(mutant.name) or Result(mutant.name, mutant.area)
            hunt.find(mutant, files[mutant.name], _left(result, given.stages), result)
            known[mutant.name] = result
            _line(place, len(todo), result)
            _write(given.json, [known[m.name] for m in MUTANTS if m.name in known], hunt.red)
    _summary([known[mutant.name] for mutant in chosen])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="mutants to plant (default: all)")
    parser.add_argument("--area", choices=AREAS, help="plant those of one area alone")
    parser.add_argument("--stages", type=_stages, default=list(STAGES), help="some of near,inner,all (default: all)")
    parser.add_argument("--ignore", nargs="+", default=[], metavar="PATH", help="tests that no stage runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where results go after every mutant")
    parser.add_argument("--resume", action="store_true", help="keep what the file of --json holds and do the rest")
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[2], help="the tree (default: this one)")
    given = parser.parse_args()
    if unknown := sorted(set(given.only or ()) - {mutant.name for mutant in MUTANTS}):
        parser.error(f"there is no mutant {unknown[0]}")
    if given.resume and not given.json:
        parser.error("--resume needs --json")
    given.root = given.root.resolve()
    return given


def _stages(text: str) -> list[str]:
    names = text.split(",")
    if unknown := sorted(set(names) - set(STAGES)):
        raise argparse.ArgumentTypeError(f"there is no stage {unknown[0]}; use {', '.join(STAGES)}")
    return [stage for stage in STAGES if stage in names]


def _folders(stage: str) -> list[str]:
    return [f"tests/{folder}" for folder in STAGES[stage]]


def _left(result: Result | None, stages: Sequence[str]) -> list[str]:
    """Return the stages that a mutant has still to go through."""
    if result is None:
        return list(stages)
    return [] if result.killed else [stage for stage in stages if stage not in result.survived]


def _read(file: Path) -> dict[str, Result]:
    if not file.is_file():
        return {}
    names = {mutant.name for mutant in MUTANTS}
    rows = json.loads(file.read_text(encoding="utf-8"))["mutants"]
    return {row["name"]: Result(**row) for row in rows if row["name"] in names}


def _write(file: Path | None, results: Sequence[Result], red: set[str]) -> None:
    if file:
        value = {"left_out": sorted(red), "mutants": [asdict(result) for result in results]}
        file.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _line(place: int, count: int, result: Result) -> None:
    word = f"killed   {result.stage:5}" if result.killed else "survived      "
    print(f"{place:4}/{count} {word} {result.seconds:7.1f} s  {result.name}  {result.test}", flush=True)


def _summary(results: Sequence[Result]) -> None:
    print(f"\n{'area':12} killed  near inner   all total")
    for area in (*AREAS, "together"):
        those = [result for result in results if area in (result.area, "together")]
        counts = [sum(result.stage == stage for result in those) for stage in STAGES]
        print(f"{area:12} {sum(counts):6}{counts[0]:6}{counts[1]:6}{counts[2]:6}{len(those):6}")
    alive = [result for result in results if not result.killed]
    print("".join(f"\nsurvived {','.join(result.survived)}: {result.name} ({result.area})" for result in alive))


if __name__ == "__main__":
    main()
