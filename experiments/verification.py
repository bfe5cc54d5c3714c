"""Run the tests that prove methods and write docs/verification.md: python -m experiments.verification [REPORT]."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from byom.storage.atomic import write_text

ROOT = Path(__file__).parents[1]
TESTS = ("tests/contract", "tests/identities", "tests/unit/test_identities.py", "tests/peers")
GROUPS = {"merge": "Merge methods", "byom": "BYOM variants", "router": "Routers"}
CONTRACTS = {"merge": "test_merge", "byom": "test_variants", "router": "test_router"}
INTRO = """# What is proved of every method

Made by `python -m experiments.verification`, which runs these tests and writes their outcome
({failed} failed).

- **Laws** are those of the group's contract (`tests/contract`), listed above each table: how many of them the option
  obeys. Those that it is exempt from stand below the table with their reason.
- **Identities** are theorems of the method itself (`tests/identities`); **golden** tests compare with vectors worked
  out by hand or by an independent numpy oracle. A test counts once, however many dtypes and sizes it runs with.
- **Peer** is equality with an independent implementation (`tests/peers`) and how far it goes; differences are stated
  in the docstring of the class and tested.
"""


@dataclass(frozen=True)
class Case:
    """One test and its outcome: passed, failed or skipped (with the reason)."""

    file: str
    name: str
    outcome: str
    reason: str = ""


def read(report: Path) -> list[Case]:
    """Return the cases of a JUnit report that prove methods.

    Args:
        report: What ``pytest --junitxml`` wrote, of these tests alone or of the whole suite.
    """
    modules = tuple(test.removesuffix(".py").replace("/", ".") for test in TESTS)
    nodes = ElementTree.parse(report).iter("testcase")
    return [_case(node) for node in nodes if node.get("classname", "").startswith(modules)]


def run() -> list[Case]:
    """Run the tests and return every case."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = ["pytest", "-q", "-n", "auto", "--dist", "loadfile", f"--junitxml={report}", *TESTS]
        subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=False)
        return read(report)


def _case(node: ElementTree.Element) -> Case:
    kinds = {child.tag: child.get("message", "") for child in node}
    outcome = "failed" if kinds.keys() & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
    return Case(node.get("classname", "").rpartition(".")[2], node.get("name", ""), outcome, kinds.get("skipped", ""))


def page(cases: list[Case]) -> str:
    """Return the page as Markdown."""
    parts = [INTRO.format(failed=sum(case.outcome == "failed" for case in cases))]
    for group, title in GROUPS.items():
        names = sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml"))
        laws = _functions(case for name in names for case in _laws(group, name, cases))
        parts += [f"\n## {title}\n\nLaws: {'; '.join(law.replace('_', ' ') for law in laws)}.\n\n"]
        parts += [
            f"| `{group}=` | laws of {len(laws)} | identities | golden | peer | result |\n|---|--:|--:|--:|---|---|\n"
        ]
        parts += [_line(group, name, names, cases) for name in names]
        parts += _exempt(group, names, cases)
    return "".join(parts)


def _functions(cases: Iterable[Case]) -> list[str]:
    """Return the test functions behind some cases, once each."""
    return sorted({case.name.partition("[")[0].removeprefix("test_") for case in cases})


def _line(group: str, name: str, names: list[str], cases: list[Case]) -> str:
    laws = _laws(group, name, cases)
    exempt = set(_functions(case for case in laws if case.outcome == "skipped"))
    own = [case for case in cases if _belongs(case, name, names)]
    golden = [case for case in own if "golden" in case.name]
    rest = [case for case in own if "golden" not in case.name]
    peers, files = _peers(name)
    compared = [case for case in cases if case.file in files]
    failed = [case for case in (*laws, *own, *compared) if case.outcome == "failed"]
    obeyed = len(set(_functions(laws)) - exempt)
    counts = f"{obeyed} | {len(_functions(rest)) or ''} | {len(_functions(golden)) or ''}"
    return f"| `{name}` | {counts} | {peers or 'none installs'} | {'**failed**' if failed else 'passed'} |\n"


def _laws(group: str, name: str, cases: Iterable[Case]) -> list[Case]:
    options = re.compile(rf"\[(?:.*-)?{re.escape(name)}(?:-.*)?\]$")
    return [case for case in cases if case.file == CONTRACTS[group] and options.search(case.name)]


def _belongs(case: Case, name: str, names: list[str]) -> bool:
    if case.file == f"test_{name}":
        return True
    longer = [other for other in names if name in other and other != name and other in case.name]
    known = (name, _ALIASES.get(name, name))
    return case.file == "test_identities" and not longer and any(each in case.name for each in known)


_ALIASES = {"fft": "byom", "post_pruning": "byom_golden"}


def _peers(name: str) -> tuple[str, set[str]]:
    found = {path.stem: compares(path).get(name) for path in sorted((ROOT / "tests" / "peers").glob("test_*.py"))}
    said = {stem: text for stem, text in found.items() if text}
    return "; ".join(f"{stem.removeprefix('test_')}: {text}" for stem, text in said.items()), set(said)


def compares(path: Path) -> dict[str, str]:
    """Return the option names that a peer test compares, and how."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "COMPARES":
            return ast.literal_eval(node.value)
    return {}


def _exempt(group: str, names: list[str], cases: list[Case]) -> list[str]:
    reasons = {
        (name, case.name.partition("[")[0], case.reason)
        for name in names
        for case in _laws(group, name, cases)
        if case.outcome == "skipped"
    }
    said = [(name, law.removeprefix("test_").replace("_", " "), why) for name, law, why in sorted(reasons)]
    lines = [f"- `{name}`: {law}: {why}\n" for name, law, why in said]
    return ["\nExempt laws:\n\n", *lines] if lines else []


if __name__ == "__main__":
    found = read(Path(sys.argv[1])) if len(sys.argv) > 1 else run()
    write_text(ROOT / "docs" / "verification.md", page(found))
    sys.exit(any(case.outcome == "failed" for case in found))
