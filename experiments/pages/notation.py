"""Symbols, fractions and products of formulas, as TeX."""

from __future__ import annotations

import re
from dataclasses import dataclass

GREEK = {
    "alpha", "beta", "gamma", "delta", "epsilon", "theta", "lambda", "mu", "rho", "sigma", "tau", "phi", "psi", "omega",
}  # fmt: skip


@dataclass
class Factor:
    """A factor of a product.

    Args:
        tex: TeX.
        bare: TeX without the parentheses around it, for numerators and denominators.
        index: What a sum runs over, empty for anything else.
        word: Whether it is text rather than a symbol.
    """

    tex: str
    bare: str = ""
    index: str = ""
    word: bool = False


def fraction(top: list[Factor], bottom: list[Factor]) -> list[Factor]:
    """Put a product over another; a leading sum stays outside where its index is free below."""
    outside: list[Factor] = []
    below = " ".join(factor.tex for factor in bottom)
    if top and top[0].index and not any(factor.index for factor in bottom):
        index = re.escape(top[0].index)
        if re.search(rf"_\{{{index}[a-z]?\}}", below) and r"\sum" not in below:
            outside, top = top[:1], top[1:]
    return [*outside, Factor(rf"\frac{{{_stripped(top)}}}{{{_stripped(bottom)}}}")]


def _stripped(factors: list[Factor]) -> str:
    return factors[0].bare if len(factors) == 1 and factors[0].bare else joined(factors)


def joined(factors: list[Factor]) -> str:
    """Return a product, with space around its words."""
    parts: list[str] = []
    for before, factor in zip([None, *factors], factors, strict=False):
        if before is not None and factor.word and before.word:
            parts[-1] = parts[-1][:-1] + f" {factor.tex.removeprefix(chr(92) + 'text{')}"
            continue
        space = before is not None and (factor.word or before.word)
        parts.append((r"\;" if space else "") + factor.tex)
    return " ".join(parts)


def symbol(name: str) -> Factor:
    """Return a name such as ``theta_0``, ``G~_t`` or ``Vt_k`` (a transpose) as a factor."""
    base, _, low = name.partition("_")
    prime = base.endswith("'")
    tilde = base.rstrip("'").endswith("~")
    letter = base.rstrip("'").rstrip("~")
    transposed = bool(re.fullmatch(r"[A-Z]t", letter))
    letter = letter[0] if transposed else letter
    if letter in GREEK:
        made = f"\\{letter}"
    elif len(letter) == 1:
        made = letter
    elif low:
        made = rf"\mathrm{{{letter}}}"
    else:
        return word_of(name)
    made = rf"\tilde{{{made}}}" if tilde else made
    made += rf"_{{{subscript(low)}}}" if low else ""
    up = (r"\prime" if prime else "") + (r"\top" if transposed else "")
    return Factor(made + (f"^{{{up}}}" if up else ""))


def word_of(name: str) -> Factor:
    """Return a name that is not a symbol as text."""
    return Factor(rf"\text{{{name.replace('_', ' ')}}}", word=True)


def subscript(low: str) -> str:
    """Return an index: upright if it is a word."""
    if low in GREEK:
        return f"\\{low}"
    plain = low.isdigit() or len(low) == 1 or (len(low) == 2 and not low.isupper())
    return low if plain else rf"\mathrm{{{low}}}"
