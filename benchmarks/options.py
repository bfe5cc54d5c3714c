"""Options that every benchmark's command line shares."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def parser(text: str, repeats: int) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks have."""
    made = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--repeats", type=int, default=repeats)
    made.add_argument("--json", type=Path, help="where to write the figures")
    made.add_argument("--check", action="store_true", help="fail when a target is missed")
    return made


def conclude(result: dict, table: str, missed: str, options: argparse.Namespace) -> None:
    """Print the table, write the figures, and fail on request with the sentence about a missed target."""
    print(table)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    if options.check and missed:
        sys.exit(missed)


def fill(page: Path, name: str, text: str) -> None:
    """Replace what stands on a page between ``<!-- name -->`` and ``<!-- /name -->``."""
    start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, _, rest = page.read_text(encoding="utf-8").partition(start)
    page.write_text(f"{before}{start}{text}\n{end}{rest.partition(end)[2]}", encoding="utf-8")
