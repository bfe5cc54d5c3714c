"""Hooks of MkDocs: generated pages, mathematics as MathML, and a navigation that lists what was generated."""

from __future__ import annotations

import html
import re
import sys
from fnmatch import fnmatch
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parents[2]))

from experiments.pages.site import Site, generate

FONT = "assets/fonts/STIXTwoMath-Regular.ttf"
MATH = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.S)
FUNCTION = re.compile(r"<mo>([A-Za-z]{2,})</mo>")
LIMITS = re.compile(r"<msub>(<mo>&#x02211;</mo><mrow>(?:(?!</?mrow>).)*</mrow>)</msub>")
"""Sums within parentheses, whose index latex2mathml puts to their side."""
_made: dict[str, Site] = {}


def on_config(config: Any) -> Any:
    """Generate all pages, and put them where the navigation has a pattern."""
    _made["site"] = site = generate()
    config.nav = [_expanded(entry, sorted(site.pages)) for entry in config.nav]
    return config


def _expanded(entry: Any, pages: list[str]) -> Any:
    if isinstance(entry, dict):
        return {title: _expanded(value, pages) for title, value in entry.items()}
    if isinstance(entry, list):
        return [each for value in entry for each in _listed(value, pages, entry)]
    return entry


def _listed(value: Any, pages: list[str], stated: list[Any]) -> list[Any]:
    if isinstance(value, str) and "*" in value:
        return [page for page in pages if fnmatch(page, value) and page not in stated]
    return [_expanded(value, pages)]


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages, the files they show and the font of the mathematics."""
    site = _made["site"]
    for uri, text in site.pages.items():
        if (known := files.get_file_from_path(uri)) is not None:
            files.remove(known)
        files.append(File.generated(config, uri, content=text))
    for uri, path in site.assets.items():
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    font = resources("ziamath") / "fonts" / "STIXTwoMath-Regular.ttf"
    files.append(File.generated(config, FONT, content=font.read_bytes()))
    return files


def on_page_content(html: str, **_: Any) -> str:
    """Render the formulas of a page."""
    return MATH.sub(_rendered, html)


def _rendered(found: re.Match[str]) -> str:
    tex = html.unescape(found[3]).strip()
    if found[2] == "(":
        return _converted(tex, "inline")
    shown = LIMITS.sub(r"<munder>\1</munder>", _converted(tex, "block"))
    return f'<div class="formula">{shown}</div>'


def _converted(tex: str, display: str) -> str:
    """Return MathML; latex2mathml takes a tilde for a letter, and sets space around the names of functions."""
    made = convert(tex, display=display).replace("<mi>&#x0007E;</mi>", "<mo>&#x0223C;</mo>")
    return FUNCTION.sub(r'<mrow><mspace width="0.167em"/><mi>\1</mi></mrow>', made)
