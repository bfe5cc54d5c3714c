"""Proofs of an option: laws, identities, golden vectors and peers, read from the tests themselves."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

from experiments.pages.options import ROOT, Option
from experiments.verification import CONTRACTS, compares

UP = "../../.."
SHARED = ROOT / "tests" / "unit" / "test_identities.py"
ALIASES = {"fft": "byom", "post_pruning": "byom_golden"}


def section(option: Option) -> str:
    """Return what is proved of an option, as Markdown.

    Args:
        option: Any option; empty for those without a contract.
    """
    if option.group not in CONTRACTS:
        return ""
    contract = ROOT / "tests" / "contract" / f"{CONTRACTS[option.group]}.py"
    lines = [
        "## How it is verified\n",
        *_result(option),
        f"- **Laws**: the {len(_tests(contract))} tests of the contract of its group, {_link(contract)}.",
        *_exempt(contract, option),
        f"- **Peers**: {_peers(option.name) or 'no independent implementation installs'}.\n",
    ]
    for heading, golden in (("Identities", False), ("Golden vectors", True)):
        lines += _listed(heading, [(file, name) for file, name in own(option) if ("golden" in name) == golden], option)
    return "\n".join(lines) + "\n"


def _link(file: Path) -> str:
    name = file.relative_to(ROOT).as_posix()
    return f"[{name}]({UP}/{name})"


def _result(option: Option) -> list[str]:
    page = (ROOT / "docs" / "verification.md").read_text(encoding="utf-8")
    row = re.search(rf"^\| `{re.escape(option.name)}` \|.*\| ([^|]+) \|$", page, re.M)
    return [f"Last recorded run: {row[1].strip()} ([all methods](../../verification.md)).\n"] if row else []


def _exempt(contract: Path, option: Option) -> list[str]:
    return [
        f"    - Exempt from *{_sentence(law, '')}*: {why}."
        for law, reasons in _literal(contract, "EXEMPT").items()
        for name, why in reasons.items()
        if name.split("-")[0] == option.name
    ]


def _listed(heading: str, found: list[tuple[Path, str]], option: Option) -> list[str]:
    if not found:
        return []
    files = sorted({file for file, _ in found})
    count = f"{len(found)} test{'s' * (len(found) != 1)}"
    lines = [f'??? note "{heading}: {count}"', f"    {', '.join(map(_link, files))}\n"]
    return [*lines, *(f"    - {_sentence(name, option.name)}" for _, name in found), ""]


def own(option: Option) -> list[tuple[Path, str]]:
    """Return the tests of an option alone: those of its own file, and those of the shared file that name it."""
    names = [path.stem for path in (ROOT / "conf" / option.group).glob("*.yaml")]
    longer = [other for other in names if option.name in other and other != option.name]
    known = (option.name, ALIASES.get(option.name, option.name))
    file = ROOT / "tests" / "identities" / f"test_{option.name}.py"
    shared = [
        (SHARED, test)
        for test in _tests(SHARED)
        if any(name in test for name in known) and not any(name in test for name in longer)
    ]
    return [*((file, test) for test in _tests(file)), *shared]


def _peers(name: str) -> str:
    found = {path.stem: compares(path).get(name) for path in sorted((ROOT / "tests" / "peers").glob("test_*.py"))}
    return "; ".join(f"{stem.removeprefix('test_')} ({text})" for stem, text in found.items() if text)


@cache
def _tests(file: Path) -> list[str]:
    if not file.is_file():
        return []
    return [
        node.name
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]


@cache
def _literal(file: Path, name: str) -> dict[str, dict[str, str]]:
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == name:
            return ast.literal_eval(node.value)
    return {}


def _sentence(test: str, option: str) -> str:
    words = test.removeprefix("test_").removeprefix(f"{option}_" if option else "").replace("_", " ")
    return re.sub(r"\b0(\d)\b", r"0.\1", re.sub(r"\bnan\b", "NaN", words))
