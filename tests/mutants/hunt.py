"""Which test finds which mutant: the nearest tests one mutant at a time, the rest of the suite many at once."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from tests.mutants.mutant import Mutant
from tests.mutants.runner import Outcome, run
from tests.mutants.tree import Tree

STAGES = {
    "near": (),
    "inner": ("unit", "identities", "contract", "peers", "golden", "config"),
    "all": ("e2e", "docs"),
}
FIRST = ("-x",)
NEAR_SECONDS = 300.0  # most targets take seconds; a fault without end should not take an hour
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
    """The runs of pytest on one tree.

    Args:
        tree: The tree.
        files: Name of a mutant -> its file.
        results: Name of a mutant -> what has become of it so far; brought up to date.
        ignored: Tests that no stage runs.
        told: Called with the result of a mutant after each change.
        log: Where pytest's output goes.
    """

    def __init__(
        self,
        tree: Tree,
        files: Mapping[str, Path],
        results: Mapping[str, Result],
        ignored: Sequence[str],
        told: Callable[[Result], None],
        log: Path,
    ) -> None:
        self.red: set[str] = set()
        self._tree, self._files, self._results, self._told, self._log = tree, files, results, told, log
        self._ignored = tuple(f"--ignore={path}" for path in ignored)
        self._sound: set[str] = set()

    def check(self, targets: Iterable[str]) -> None:
        """Run the nearest tests of the tree without a fault; those that fail are left out from then on."""
        for session in _sessions(targets):
            self._require_sound(self._run(session))

    def near(self, mutants: Iterable[Mutant]) -> None:
        """Run the nearest tests of each mutant."""
        for mutant in mutants:
            if not any(self._found(mutant, target) for target in mutant.tests):
                self._survived([mutant], "near")

    def stage(self, stage: str, mutants: Sequence[Mutant]) -> None:
        """Run a stage on many mutants at once, and what failed on halves of them until each stands alone.

        A stage takes minutes, and most of these mutants are found by none of its tests or by few. A test that passes
        with all of them finds none.
        """
        left = list(mutants)
        while left:
            group = _apart(left)
            self._halve(stage, group, [f"tests/{folder}" for folder in STAGES[stage]])
            left = [mutant for mutant in left if mutant not in group]

    def _halve(self, stage: str, group: Sequence[Mutant], targets: Sequence[str]) -> None:
        outcome = self._planted(group, targets, STAGE_SECONDS, ())
        if not outcome.passed and not outcome.tests:
            self._stop(outcome)
        if outcome.passed:
            self._survived(group, stage)
        elif len(group) > 1:
            print(f"{len(outcome.tests)} tests fail with {len(group)} mutants at once", flush=True)
            failed = targets if outcome.ended else [shlex.quote(test) for test in outcome.tests]
            self._halve(stage, group[: len(group) // 2], failed)
            self._halve(stage, group[len(group) // 2 :], failed)
        elif self._is_sound(outcome.tests):
            self._note(group[0], stage, outcome)
        else:
            self._halve(stage, group, targets)

    def _found(self, mutant: Mutant, target: str) -> bool:
        """Run one of the nearest tests, which have been run without a fault."""
        outcome = self._planted([mutant], [target], NEAR_SECONDS, FIRST)
        result = self._results[mutant.name]
        result.seconds = round(result.seconds + outcome.seconds, 1)
        if not outcome.passed:
            self._note(mutant, "near", outcome)
        return not outcome.passed

    def _note(self, mutant: Mutant, stage: str, outcome: Outcome) -> None:
        result = self._results[mutant.name]
        result.killed, result.stage, result.test, result.why = True, stage, "".join(outcome.tests[:1]), outcome.why
        self._told(result)

    def _is_sound(self, tests: Sequence[str]) -> bool:
        """Say whether the tests that failed pass without a fault; leave them out from then on if not."""
        if not set(tests) <= self._sound:
            outcome = self._run([shlex.quote(test) for test in tests])
            self._require_sound(outcome)
            self._sound |= set(tests) if outcome.passed else set()
        return set(tests) <= self._sound

    def _require_sound(self, outcome: Outcome) -> None:
        if outcome.passed:
            return
        if not outcome.tests or set(outcome.tests) & self.red:
            self._stop(outcome)
        self.red |= set(outcome.tests)
        for test in outcome.tests:
            print(f"fails without any fault, and is left out: {test}", flush=True)

    def _stop(self, outcome: Outcome) -> NoReturn:
        said = self._log.read_text(encoding="utf-8")[-3000:]
        sys.exit(f"pytest cannot run these tests: {outcome.why}\n{said}")

    def _survived(self, mutants: Iterable[Mutant], stage: str) -> None:
        for mutant in mutants:
            result = self._results[mutant.name]
            if not result.killed:
                result.survived.append(stage)
                self._told(result)

    def _planted(self, group: Sequence[Mutant], targets: Sequence[str], limit: float, how: Sequence[str]) -> Outcome:
        with self._tree.planted({mutant: self._files[mutant.name] for mutant in group}):
            return self._run(targets, limit, how)

    def _run(self, targets: Sequence[str], limit: float = STAGE_SECONDS, how: Sequence[str] = ()) -> Outcome:
        left_out = [f"--deselect={test}" for test in sorted(self.red)]
        return run(self._tree.folder, targets, limit, [*how, *self._ignored, *left_out], self._log)


def _sessions(targets: Iterable[str]) -> list[list[str]]:
    """Put targets together in few runs: whole files in one, and the expressions on a file in one."""
    whole = sorted({target for target in targets if " -k " not in target})
    by_path: dict[str, list[str]] = {}
    for path, _, words in sorted(target.partition(" -k ") for target in targets):
        if path not in whole:
            by_path.setdefault(path, []).append(words.strip("'"))
    return [whole, *([f"{path} -k '{' or '.join(words)}'"] for path, words in by_path.items())]


def _apart(mutants: Sequence[Mutant]) -> list[Mutant]:
    """Leave out mutants of a text that another one changes already."""
    group: list[Mutant] = []
    for mutant in mutants:
        if not any(mutant.old in other.old or other.old in mutant.old for other in group):
            group.append(mutant)
    return group
