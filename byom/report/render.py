"""A table of text cells as Markdown, LaTeX and plain text of bounded width."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import pandas as pd

from byom.report.frame import HEADS

WIDTH = 160
NARROW = 7
LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}", "±": r"$\pm$", "λ": r"$\lambda$", "—": "--",
    "‖": r"$\|$", "θ": r"$\theta$", "−": "$-$", "ₜ": "$_t$", "₀": "$_0$", "*": "$*$",
}  # fmt: skip

Grid = list[list[str]]


def _grid(cells: pd.DataFrame, bold: pd.DataFrame | None, plain: Callable, strong: Callable) -> Grid:
    """Return the escaped cells, the header first, with the marked ones emphasised."""
    body = cells.map(plain)
    if bold is not None:
        body = body.where(~bold.to_numpy(dtype=bool), body.map(strong))
    return [[plain(str(head)) for head in cells.columns], *body.to_numpy().tolist()]


def markdown(cells: pd.DataFrame, bold: pd.DataFrame | None = None) -> str:
    """Return a Markdown table; the first column is set left, the others right.

    Args:
        cells: Text cells.
        bold: True where a cell is set bold, in the shape of `cells`.

    Returns:
        The table, ending in a newline.
    """
    head, *body = _grid(cells, bold, lambda text: text.replace("|", r"\|"), lambda text: f"**{text}**")
    rule = [":---", *["---:"] * (len(head) - 1)]
    return "".join(f"| {' | '.join(line)} |\n" for line in [head, rule, *body])


def escape_latex(text: str) -> str:
    """Return `text` with everything LaTeX would interpret escaped."""
    return "".join(LATEX.get(letter, letter) for letter in text)


def latex(cells: pd.DataFrame, bold: pd.DataFrame | None = None, breaks: Sequence[int] = ()) -> str:
    r"""Return a whole ``tabular`` environment; it needs ``\usepackage{booktabs}`` and nothing else.

    Args:
        cells: Text cells.
        bold: True where a cell is set bold, in the shape of `cells`.
        breaks: Rows before which a rule is drawn.

    Returns:
        The environment, ending in a newline.
    """
    head, *body = _grid(cells, bold, escape_latex, lambda text: rf"\textbf{{{text}}}")
    lines = [rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}", r"\toprule", _latex_row(head), r"\midrule"]
    for place, row in enumerate(body):
        lines += [r"\midrule", _latex_row(row)] if place in breaks else [_latex_row(row)]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _latex_row(row: Iterable[str]) -> str:
    return " & ".join(row) + r" \\"


def text(cells: pd.DataFrame, tasks: Sequence[str] = (), width: int = WIDTH) -> str:
    """Return a table for the terminal that is never wider than `width`, if its other columns allow.

    A table too wide first loses the spread of its task columns, then the ends of names, then those columns.

    Args:
        cells: Text cells.
        tasks: The columns that may give way.
        width: In characters.

    Returns:
        The table, ending in a newline.
    """
    lines: list[str] = []
    for narrower in (_as_is, _without_spread, _short_heads, _without_tasks):
        lines = _aligned(narrower(cells, tasks))
        if max(map(len, lines)) <= width:
            break
    return "\n".join(lines) + "\n"


def _as_is(cells: pd.DataFrame, _: Sequence[str]) -> Grid:
    return _grid(cells, None, str, str)


def _without_spread(cells: pd.DataFrame, tasks: Sequence[str]) -> Grid:
    bare = cells.copy()
    for task in tasks:
        bare[task] = [cell.partition(" ±")[0] for cell in cells[task]]
    return _as_is(bare, tasks)


def _short_heads(cells: pd.DataFrame, tasks: Sequence[str]) -> Grid:
    head, *body = _without_spread(cells, tasks)
    short = dict(zip(tasks, shorten(tasks), strict=True))
    brief = {HEADS["normalised"]: "Norm. mean", HEADS["parameters"]: "Par. (M)", HEADS["bytes"]: "MB"}
    return [[{**short, **brief}.get(name, name) for name in head], *body]


def _without_tasks(cells: pd.DataFrame, tasks: Sequence[str]) -> Grid:
    return _as_is(cells.drop(columns=list(tasks)), ())


def shorten(names: Sequence[str]) -> list[str]:
    """Return names of at most seven letters that stay apart where their starts and ends do."""
    starts = [name[:NARROW] for name in names]
    ends = [f"{name[:3]}~{name[-3:]}" for name in names]
    pairs = zip(names, starts, ends, strict=True)
    return [start if len(name) <= NARROW or starts.count(start) == 1 else end for name, start, end in pairs]


def _aligned(grid: Grid) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    lines = [_line(row, widths) for row in grid]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
    return "  ".join([row[0].ljust(widths[0]), *cells])
