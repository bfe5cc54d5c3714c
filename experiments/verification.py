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

ROOT = Path(__file__).parents[1]
TESTS = ("tests/contract", "tests/identities", "tests/unit/test_identities.py", "tests/peers")
GROUPS = {"merge": "Merge methods", "byom": "BYOM variants", "router": "Routers"}
CONTRACTS = {"merge": "test_merge", "byom": "test_variants", "router": "test_router"}
INTRO = """# What is proved of every method

Made by `python -m experiments.verification`, which runs the tests counted here ({passed} passed, {skipped} skipped,
{failed} failed).

- **Laws**: the generic contract of its group (`tests/contract`): reading is pure, disk and memory give the same bits,
  blocks do not matter, degenerate input gives no NaN, what is not finite is refused, and so on. Exempt laws are
  listed with their reason below each table.
- **Identities**: the method's own theorems (`tests/identities`), **golden**: vectors worked out by hand or by an
  independent numpy oracle.
- **Peer**: equality with an independent implementation (`tests/peers`), and how far it goes; the differences are
  stated in the class's docstring and tested.
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
    count = {outcome: sum(case.outcome == outcome for case in cases) for outcome in ("passed", "skipped", "failed")}
    parts = [INTRO.format(**count)]
    for group, title in GROUPS.items():
        names = sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml"))
        head = f"| `{group}=` | laws | identities | golden | peer | result |"
        parts += [f"\n## {title}\n\n{head}\n|---|--:|--:|--:|---|---|\n"]
        parts += [_line(group, name, names, cases) for name in names]
        parts += _exempt(group, names, cases)
    return "".join(parts)


def _line(group: str, name: str, names: list[str], cases: list[Case]) -> str:
    laws = _laws(group, name, cases)
    own = [case for case in cases if _belongs(case, name, names)]
    golden = [case for case in own if "golden" in case.name]
    rest = [case for case in own if "golden" not in case.name]
    peers, files = _peers(name)
    compared = [case for case in cases if case.file in files]
    failed = [case for case in (*laws, *own, *compared) if case.outcome == "failed"]
    counts = " | ".join(str(sum(case.outcome == "passed" for case in part)) for part in (laws, rest, golden))
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
    for node in ast.parse(path.read_text()).body:
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
    (ROOT / "docs" / "verification.md").write_text(page(found))
    sys.exit(any(case.outcome == "failed" for case in found))
