"""Write experiments/README.md's catalogue from the experiments' own comments: python -m experiments.catalogue."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from byom.cli import config, table
from byom.report import published
from byom.storage.atomic import write_text

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "experiments" / "README.md"
SOURCES = ROOT / "experiments" / "published.md"


def catalogue() -> str:
    """Return one entry per experiment: its command, what it shows and costs, and what it is compared with."""
    return "\n".join(_entry(name) for name in config.options("experiment"))


def _entry(name: str) -> str:
    text = (config.folder() / "experiment" / f"{name}.yaml").read_text(encoding="utf-8")
    command, *about = [line.removeprefix("# ") for line in text.splitlines() if line.startswith("# ")]
    tables = yaml.safe_load(text).get("published", [])
    beside = f" Beside: {', '.join(f'[{t}](published.md#{t})' for t in tables)}." if tables else ""
    return f"- **`{command}`** {' '.join(about)}{beside}"


def sources() -> str:
    """Return every published table with its source, how sure it is, and what is odd in it."""
    parts = ["# Published numbers\n\nGenerated from `conf/published` by `python -m experiments.catalogue`. "]
    parts.append("Values are per cent unless a table says otherwise. Numbers of different checkpoint families are not ")
    parts.append("interchangeable.\n")
    return "".join([*parts, *(_table(each) for each in table.published_tables(config.options("published")))])


def _table(table: published.Published) -> str:
    lines = [f"\n## {table.name}\n\n{table.title}. Family `{table.family}`. {table.what[0].upper()}{table.what[1:]}.\n"]
    origin = f"Source: {table.source} ({table.url}); {published.CONFIDENCE[table.confidence]}. {table.note}"
    lines.append(f"{origin.rstrip()}\n\n")
    lines.append(f"| | {' | '.join(table.tasks)} | mean | parameters |\n|---|{'--:|' * (len(table.tasks) + 2)}\n")
    for row in table.rows:
        digits, of_mean = row.decimals
        values = [f"{value:.{digits}f}" for value in row.values] or ["—"] * len(table.tasks)
        lines.append(
            f"| {table.name_of(row)} | {' | '.join(values)} | {row.mean:.{of_mean}f} | {row.parameters or '—'} |\n"
        )
    lines += [f"\n† {published.UNCHECKED}.\n"] * table.dagger
    lines += [f"\n{text}\n" for row in table.rows for text in row.remarks]
    return "".join(lines)


def fill(text: str) -> str:
    """Replace what stands between the page's markers."""
    pattern = r"(<!-- catalogue -->\n).*?(<!-- /catalogue -->)"
    return re.sub(pattern, lambda match: f"{match[1]}{catalogue()}\n{match[2]}", text, flags=re.S)


if __name__ == "__main__":
    write_text(PAGE, fill(PAGE.read_text(encoding="utf-8")))
    write_text(SOURCES, sources())
