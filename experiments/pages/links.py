"""Links of pages: to other pages as they are, to files of the repository through copies of these in the site."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from experiments.pages.options import ROOT

LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\]]*\])*\]\()([^)\s]+)((?:\s+\"[^\"]*\")?\))")
FENCE = re.compile(r"^( *)(```|~~~).*?^\1\2\s*$", re.M | re.S)
IMAGES = {".png", ".svg", ".jpg", ".jpeg", ".pdf"}
LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json", ".toml": "toml", ".tex": "latex", ".cff": "yaml"}
MOUNTED = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "experiments/README.md": "experiments/experiments.md",
    "experiments/published.md": "experiments/published.md",
    "experiments/LOG.md": "experiments/log.md",
}
"""Pages of the repository outside ``docs`` that are pages of the site."""
INSTEAD = {"README.md": "index.md", "docs": "index.md"}
"""Pages of the repository that have another page in the site."""


@dataclass
class Links:
    """Targets of the links of pages.

    Args:
        pages: The pages of the site, by their place below ``docs``.
        elsewhere: Files of the repository that pages other than their own show, to these pages.
    """

    pages: set[str]
    elsewhere: dict[str, str] = field(default_factory=dict)
    sources: set[str] = field(default_factory=set)
    assets: dict[str, Path] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)

    def rewrite(self, uri: str, text: str) -> str:
        """Return a page with its links to files of the repository led to pages and copies in the site.

        Args:
            uri: The page's place below ``docs``.
            text: Its Markdown.
        """
        return outside_fences(text, lambda part: LINK.sub(lambda link: self._link(uri, link), part))

    def _link(self, uri: str, link: re.Match[str]) -> str:
        target, _, anchor = link[2].partition("#")
        if not target or re.match(r"[a-z]+:", target):
            return link[0]
        found = self._found(uri, target)
        if found is None:
            self.broken.append(f"{uri}: {link[2]}")
            return link[0]
        if found in INSTEAD.values() and anchor and posix(repository(uri), target) in INSTEAD:
            anchor = ""
        relative = os.path.relpath(found, PurePosixPath(uri).parent)
        return f"{link[1]}{relative}{'#' * bool(anchor)}{anchor}{link[3]}"

    def _found(self, uri: str, target: str) -> str | None:
        place = posix(repository(uri), target)
        below = place.removeprefix("docs/")
        if place.startswith("docs/") and below in self.pages:
            return below
        if place in MOUNTED or place in INSTEAD:
            return (MOUNTED | INSTEAD)[place]
        if place in self.elsewhere and not uri.startswith("methods/"):
            return self.elsewhere[place]
        file = ROOT / place
        if not file.exists():
            return None
        if file.suffix in IMAGES:
            copied = below if place.startswith("docs/") else f"assets/{place}"
            if not place.startswith("docs/"):
                self.assets[copied] = file
            return copied
        self.sources.add(place)
        return source_uri(place)


def repository(uri: str) -> str:
    """Return where a page of the site lies, or would lie, in the repository."""
    return {page: place for place, page in MOUNTED.items()}.get(uri, f"docs/{uri}")


def posix(place: str, target: str) -> str:
    """Return what a relative link of a file of the repository points to, from the repository's root."""
    return os.path.normpath(os.path.join(os.path.dirname(place), target))  # noqa: PTH118, PTH120


def outside_fences(text: str, change: Callable[[str], str]) -> str:
    """Return Markdown whose parts outside fenced code were changed."""
    parts, at = [], 0
    for fence in FENCE.finditer(text):
        parts += [change(text[at : fence.start()]), fence[0]]
        at = fence.end()
    return "".join([*parts, change(text[at:])])


def source_uri(place: str) -> str:
    """Return the page that shows a file or folder of the repository."""
    return f"source/{place}{'/index' if (ROOT / place).is_dir() else ''}.md"


def source(place: str) -> str:
    """Return the page of a file or folder of the repository as Markdown; not in the search index.

    Args:
        place: Its path from the repository's root.
    """
    file = ROOT / place
    head = f"---\nsearch:\n  exclude: true\nhide:\n  - toc\n---\n\n# {place}\n\n"
    if file.is_dir():
        names = sorted(f"{each.name}/" if each.is_dir() else each.name for each in file.iterdir())
        shown = [name for name in names if not name.startswith((".", "__"))]
        return f"{head}{len(shown)} entries in the repository:\n\n" + "".join(f"- `{name}`\n" for name in shown)
    text = file.read_text(encoding="utf-8").rstrip("\n")
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{head}{ticks}{LANGUAGES.get(file.suffix, 'text')}\n{text}\n{ticks}\n"
