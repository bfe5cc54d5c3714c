"""All pages of the documentation site that are not files of ``docs`` as they stand."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from experiments.pages import method, reference
from experiments.pages.links import MOUNTED, ROOT, Links, source, source_uri
from experiments.pages.options import GROUPS, Option, options

DOCS = ROOT / "docs"


@dataclass
class Site:
    """The site before it is rendered.

    Args:
        pages: Markdown by its place below ``docs``, links rewritten.
        assets: Files that pages show, by their place in the site.
        broken: Links that lead nowhere.
    """

    pages: dict[str, str] = field(default_factory=dict)
    assets: dict[str, Path] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)


def generate() -> Site:
    """Return every page of the site: those of ``docs``, those made from the code, and the files that they link."""
    known = [option for group in GROUPS for option in options(group)]
    pages = written() | {uri(option): method.page(option) for option in known} | reference.pages()
    elsewhere = {option.source.as_posix(): uri(option) for option in known}
    links = Links(set(pages), elsewhere | {"byom/__init__.py": "reference/index.md"})
    done = {page: links.rewrite(page, text) for page, text in pages.items()}
    shown = {source_uri(place): source(place) for place in sorted(links.sources)}
    return Site(done | shown, links.assets, links.broken)


def written() -> dict[str, str]:
    """Return the pages that are written by hand: those of ``docs`` and those that stand elsewhere in the repository."""
    found = {path.relative_to(DOCS).as_posix(): path for path in sorted(DOCS.rglob("*.md"))}
    found |= {page: ROOT / place for place, page in MOUNTED.items()}
    return {page: path.read_text(encoding="utf-8") for page, path in found.items()}


def uri(option: Option) -> str:
    """Return the place of an option's page below ``docs``."""
    return f"methods/{option.group}/{option.name}.md"
