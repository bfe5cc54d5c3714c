"""Plants every mutant and says which of them no test finds: ``python -m tests.mutants``."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tests.mutants.hunt import STAGES, Hunt, Result
from tests.mutants.mutant import AREAS, Misplaced, locate
from tests.mutants.mutants import MUTANTS
from tests.mutants.runner import preload
from tests.mutants.tree import Tree


def main() -> None:
    """Read the arguments, run, and print."""
    given = _arguments()
    chosen = [m for m in MUTANTS if (not given.only or m.name in given.only) and given.area in (None, m.area)]
    try:
        files = locate(chosen, given.root / "byom")
    except Misplaced as error:
        sys.exit(f"these mutants cannot be planted; move their text along with the code:\n{error}")
    results = {m.name: Result(m.name, m.area) for m in chosen} | (_read(given.json) if given.resume else {})

    def told(result: Result) -> None:
        word = f"killed   {result.stage:5}" if result.killed else f"survived {result.survived[-1]:5}"
        print(f"{word} {result.seconds:7.1f} s  {result.name}  {result.test}", flush=True)
        _write(given.json, [results[m.name] for m in MUTANTS if m.name in results], hunt.red)

    preload()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree, log = Tree(given.root, Path(folder) / "tree"), Path(folder) / "log"
        hunt = Hunt(tree, files, results, given.ignore, told, log)
        for stage in given.stages:
            left = [m for m in chosen if not results[m.name].killed and stage not in results[m.name].survived]
            print(f"stage {stage}: {len(left)} mutants", flush=True)
            if stage == "near":
                hunt.check({target for mutant in left for target in mutant.tests})
                hunt.near(left)
            else:
                hunt.stage(stage, left)
    _summary([results[mutant.name] for mutant in chosen])


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
