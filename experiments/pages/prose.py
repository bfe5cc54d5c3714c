"""Prose of docstrings as Markdown: formulas become mathematics, long ones on a line of their own."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from experiments.pages.formula import FormulaError, tex
from experiments.pages.notation import GREEK

SPAN = re.compile(r"``(.+?)``|`(.+?)`", re.S)
BARE = re.compile(r"(?<![\w`$/])((?:theta|tau)_[A-Za-z0-9]+|[A-Za-z]_[a-z]{1,2})(?![\w`$])")
STATES = re.compile(r"\b(?:uses|minimises?|minimising)\s*$", re.I)


def is_formula(text: str) -> bool:
    """Say whether the text of a code span is a formula rather than a name, a shape or a command."""
    text = " ".join(text.split())
    if re.search(r"\w=\w|\w\.\w|=$|[a-z]\(\)|^/|\*\w+\*|^\*", text) or re.fullmatch(r"[\[(][\w, +]*[\])]", text):
        return False
    if re.fullmatch(r"[a-z]+(-[a-z]+)?", text) and text not in GREEK and len(text) > 1:
        return False
    names = {re.split(r"[_'~]", name)[0] for name in re.findall(r"[A-Za-z][\w'~]*", text)}
    spaced = re.search(r" (=|~|<-|>=?|<=?|!=|\+|-|\*|/|x|\*\*) ", text)
    single = re.fullmatch(r"[A-Za-z]'?(_[A-Za-z0-9]{1,6})?\*?", text)
    marked = re.search(r"[|ᵀ²^]|\b\d/[A-Z]|\b(floor|sum|diag|mean_|min\()", text)
    return bool(spaced or single or marked or names & GREEK)


def is_equation(text: str, least: int = 19) -> bool:
    """Say whether a formula states a relation, and is long enough to deserve a line of its own."""
    text = " ".join(text.split())
    return bool(re.search(r" (=|~|<-) ", text)) and len(text) >= least


def inline(text: str, symbols: Mapping[str, str] | None = None) -> str:
    """Return a sentence as Markdown, formulas in the line.

    Args:
        text: Text with code spans as docstrings have them.
        symbols: Names of hyperparameters to the paper's symbols.
    """
    return _spans(" ".join(text.split()), lambda span, _: _inline(span, symbols))


def block(text: str, symbols: Mapping[str, str] | None = None, least: int = 19) -> str:
    """Return a paragraph as Markdown, equations on lines of their own with the punctuation after them.

    Args:
        text: Text with code spans as docstrings have them.
        symbols: Names of hyperparameters to the paper's symbols.
        least: Length of the shortest equation that gets a line of its own.
    """

    def shown(span: str, before: str) -> str:
        if not (is_formula(span) and (is_equation(span, least) or STATES.search(before))):
            return _inline(span, symbols)
        try:
            return f"\n\n$$\n{tex(span, symbols)}\n$$\n\n"
        except FormulaError:
            return f"`{span}`"

    made = _spans(" ".join(text.split()), shown)
    made = re.sub(r"\n\$\$\n\n([,;.:])", lambda mark: rf"\,{mark[1]}" + "\n$$\n\n", made)
    return re.sub(r"\n{3,}", "\n\n", re.sub(r" *\n *", "\n", made)).strip()


def equations(text: str) -> list[str]:
    """Return the displayed equations of a block of Markdown, as TeX."""
    return re.findall(r"\$\$\n(.+?)\n\$\$", text, re.S)


def _spans(text: str, make: Callable[[str, str], str]) -> str:
    """Change code spans; `make` is given a span and the text before it."""
    parts, at = [], 0
    for match in SPAN.finditer(text):
        before = text[at : match.start()]
        parts.append(_bare(before))
        parts.append(make(match[1], before) if match[1] else f"`{match[2]}`")
        at = match.end()
    return "".join([*parts, _bare(text[at:])])


def _bare(text: str) -> str:
    return BARE.sub(lambda name: f"${tex(name[1])}$", text).replace("<", "&lt;")


def _inline(span: str, symbols: Mapping[str, str] | None) -> str:
    if not is_formula(span):
        return f"`{span}`"
    try:
        return f"${tex(span, symbols)}$"
    except FormulaError:
        return f"`{span}`"
