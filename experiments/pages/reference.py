"""The pages of the API reference: what mkdocstrings is told to show."""

from __future__ import annotations

import ast
from pathlib import Path

from experiments.pages.options import ROOT
from experiments.pages.prose import inline

PACKAGE = ROOT / "byom"
HEAD = "---\nsearch:\n  boost: 0.3\n---\n\n"
"""Search finds other pages first."""
PUBLIC = """# Public names

These names are imported from `byom` itself, for example `from byom import Weights`. Merge methods and variants that are
not listed are imported from their own module, for example `from byom.merge.tsv import TaskSingularVectors`. The other
pages of this section document the package entry by entry; what is not on this page may change between versions.
"""


def pages() -> dict[str, str]:
    """Return the public names on one page, and a page for every entry of the package."""
    entries = sorted(path for path in PACKAGE.iterdir() if _shown(path))
    made = {f"reference/{path.stem}.md": _page(path) for path in entries}
    return {"reference/index.md": _public(), **made}


def _shown(path: Path) -> bool:
    return (path.suffix == ".py" and not path.stem.startswith("_")) or (path / "__init__.py").is_file()


def _public() -> str:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    where: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "_WHERE":
            where = ast.literal_eval(node.value)
    lines = []
    for name, place in sorted(where.items()):
        module, _, member = place.partition(":")
        lines.append(f"| [`{name}`][{module}.{member or name}] | {_summary(module, member or name)} |")
    return f"{PUBLIC}\n| name | |\n|---|---|\n" + "\n".join(lines) + "\n"


def _summary(module: str, name: str) -> str:
    path = ROOT.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return inline((ast.get_docstring(node) or "").partition("\n\n")[0]).replace("|", r"\|")
        if isinstance(node, ast.ImportFrom) and node.module and any(each.name == name for each in node.names):
            return _summary(node.module, name)
    return ""


def _page(path: Path) -> str:
    files = [path] if path.suffix == ".py" else sorted(path.rglob("*.py"), key=_dotted)
    shown = [file for file in files if _public_members(file)]
    return f"{HEAD}# byom.{path.stem}\n\n" + "\n\n".join(f"::: {_dotted(file)}" for file in shown) + "\n"


def _public_members(file: Path) -> bool:
    body = ast.parse(file.read_text(encoding="utf-8")).body
    return any(isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_") for node in body)


def _dotted(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
