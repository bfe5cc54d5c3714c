"""Formulas of docstrings, which are written in plain text, as TeX: ``sum_t tau_t`` becomes a sum over t."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from experiments.pages.notation import GREEK, Factor, fraction, joined, subscript, symbol, word_of

BIG = {"sum": r"\sum"}
WRAPPED = {"floor": (r"\left\lfloor ", r" \right\rfloor"), "sqrt": (r"\sqrt{", "}")}
LIMITS = {"max", "min", "argmax", "argmin", "mean", "det"}
RELATIONS = {
    "=": "=", "!=": r"\ne", ">=": r"\ge", "<=": r"\le", ">": ">", "<": "<", "~": r"\sim", "<-": r"\leftarrow",
}  # fmt: skip
TOKEN = re.compile(
    r"(?P<space>\s+)|(?P<number>\d+(?:\.\d+)?(?:e-?\d+)?)"
    r"|(?P<name>[A-Za-z]{2,}-[a-z]{2,}|[A-Za-z][A-Za-z0-9]*~?'?(?:_[A-Za-z0-9]+)*)"
    r"|(?P<op>\.\.\.|\*\*|\|\||!=|>=|<=|<-|[-+*/=<>~,;:()\[\]{}|^_ᵀ²'])"
)
CLOSING = {"(": ")", "[": "]", "{": "}"}


class FormulaError(ValueError):
    """Text that is not a formula this module can read."""


@dataclass(frozen=True)
class Token:
    """A piece of a formula, and whether white space stands before and after it."""

    text: str
    kind: str
    before: bool
    after: bool


def tex(text: str, symbols: Mapping[str, str] | None = None) -> str:
    """Return a formula as TeX.

    Args:
        text: The formula in plain text.
        symbols: Names of hyperparameters to the paper's symbols, in plain text.

    Raises:
        FormulaError: If it cannot be read.
    """
    parser = _Parser(_tokens(" ".join(text.split())), dict(symbols or {}))
    made = parser.sequence(())
    if parser.at < len(parser.tokens):
        raise FormulaError(f"'{parser.tokens[parser.at].text}' is not expected in '{text}'")
    return made


def _tokens(text: str) -> list[Token]:
    found, at = [], 0
    while at < len(text):
        match = TOKEN.match(text, at)
        if match is None:
            raise FormulaError(f"'{text[at:]}' cannot be read")
        if match.lastgroup != "space":
            before, after = text[at - 1 : at] in ("", " "), text[match.end() : match.end() + 1] in ("", " ")
            found.append(Token(match[0], match.lastgroup or "", before, after))
        at = match.end()
    return found


@dataclass
class _Parser:
    tokens: list[Token]
    symbols: dict[str, str]
    at: int = 0

    def peek(self) -> Token | None:
        return self.tokens[self.at] if self.at < len(self.tokens) else None

    def take(self) -> Token:
        self.at += 1
        return self.tokens[self.at - 1]

    def ends(self, stops: tuple[str, ...]) -> bool:
        token = self.peek()
        return token is None or token.text in stops

    def sequence(self, stops: tuple[str, ...]) -> str:
        """Read terms with relations, signs and commas between them, up to a closing bracket."""
        parts = []
        while not self.ends(stops):
            token = self.tokens[self.at]
            if token.text in RELATIONS:
                parts.append(RELATIONS[self.take().text])
            elif token.text in ("+", "-", ",", ";", ":"):
                parts.append(self.take().text + (r"\;" if token.text in ",;" else ""))
            elif token.text == "|" and token.before and token.after:
                self.take()
                parts.append(r"\mid")
            else:
                parts.append(self.term(stops))
        return " ".join(parts)

    def term(self, stops: tuple[str, ...]) -> str:
        """Read a product, and fractions of products."""
        left = self.product(stops)
        while (token := self.peek()) is not None and token.text in ("*", "/") and token.text not in stops:
            operator = self.take().text
            right = self.product(stops)
            if not (left and right):
                raise FormulaError(f"'{operator}' has nothing on one side")
            left = fraction(left, right) if operator == "/" else [*left, Factor(r"\cdot"), *right]
        if not left:
            raise FormulaError(f"'{self.tokens[self.at].text}' is not expected")
        return joined(left)

    def product(self, stops: tuple[str, ...]) -> list[Factor]:
        found: list[Factor] = []
        while not self.ends(stops):
            token = self.tokens[self.at]
            bar = token.text == "|" and token.before and token.after
            if bar or token.text in RELATIONS or token.text in ("+", ",", ";", ":", "*", "/"):
                break
            if token.text == "-" and found:
                break
            factor = self.factor()
            following = self.peek()
            if following and following.text == "/" and not following.before and not following.after:
                self.take()
                factor = Factor(rf"\frac{{{factor.bare or factor.tex}}}{{{self._tight()}}}")
            found.append(factor)
        return found

    def _tight(self) -> str:
        factor = self.factor()
        return factor.bare or factor.tex

    def factor(self) -> Factor:
        """Read one factor with its scripts."""
        start, token = self.at, self.take()
        if token.text == "-":
            inner = self.factor()
            return Factor(f"-{inner.tex}")
        made = self._atom(token)
        scripted = self._scripts(made)
        applied = not token.before and start > 0 and self.tokens[start - 1].kind == "name"
        alone = scripted is made and not applied and re.fullmatch(r"\\frac\{[^{}]*\}\{[^{}]*\}", made.bare)
        return Factor(made.bare) if alone else scripted

    def _atom(self, token: Token) -> Factor:
        if token.kind == "number":
            return Factor(token.text)
        if token.text == "...":
            return Factor(r"\dots")
        if token.text in CLOSING:
            return self._until(CLOSING[token.text], "]" if token.text == "(" else "")
        if token.text in ("|", "||"):
            inner = self.sequence((token.text,))
            self._expect(token.text)
            left, right = (r"\lVert", r"\rVert") if token.text == "||" else (r"\lvert", r"\rvert")
            return Factor(rf"{{\left{left} {inner} \right{right}}}")
        if token.kind == "name":
            return self._name(token)
        raise FormulaError(f"'{token.text}' is not expected")

    def _until(self, closing: str, other: str = "") -> Factor:
        inner = self.sequence((closing, other) if other else (closing,))
        token = self.peek()
        end = token.text if token else closing
        self._expect(end if end in (closing, other) else closing)
        opening = {")": "(", "]": "[", "}": r"\{"}[closing]
        shown = r"\}" if end == "}" else end
        return Factor(rf"\left{opening} {inner} \right{shown}", bare=inner if closing == ")" else "")

    def _expect(self, text: str) -> None:
        token = self.peek()
        if token is None or token.text != text:
            raise FormulaError(f"'{text}' is missing")
        self.at += 1

    def _name(self, token: Token) -> Factor:
        base, _, low = token.text.partition("_")
        if base in BIG:
            index = low or self._braced()
            shown = subscript(low) if low else index
            return Factor(BIG[base] + (rf"_{{{shown}}}" if shown else ""), index=index)
        if token.text in self.symbols:
            said = self.symbols[token.text]
            return word_of(said) if said == token.text else Factor(tex(said))
        if token.text == "x" and token.before and token.after and 1 < self.at < len(self.tokens):
            return Factor(r"\times")
        return self._function(base, low) or symbol(token.text)

    def _function(self, base: str, low: str) -> Factor | None:
        """Read a name that is applied to what follows: floor(x), max_t x, sgn(x)."""
        following = self.peek()
        called = following is not None and following.text == "(" and not following.before
        if base in WRAPPED and called and not low:
            self.take()
            left, right = WRAPPED[base]
            return Factor(f"{left}{self._until(')').bare}{right}")
        bars = following is not None and following.text in ("_", "|", "||")
        if base in LIMITS and (low or called or bars):
            index = subscript(low) if low else self._braced()
            return Factor(rf"\operatorname{{{base}}}" + (rf"_{{{index}}}" if index else ""))
        if called and base == "N":
            return Factor(r"\mathcal{N}")
        if called and len(base) > 1 and base not in GREEK and not re.fullmatch(r"[A-Z]t", base):
            return Factor(rf"\operatorname{{{base}}}" + (rf"_{{{subscript(low)}}}" if low else ""))
        return None

    def _braced(self) -> str:
        """Read the braces of ``sum_{i != j}``, if they follow."""
        token, after = self.peek(), self.tokens[self.at + 1] if self.at + 1 < len(self.tokens) else None
        if not (token and after and token.text == "_" and after.text == "{"):
            return ""
        self.at += 2
        inner = self.sequence(("}",))
        self._expect("}")
        return inner

    def _scripts(self, made: Factor) -> Factor:
        up, down = "", ""
        while (token := self.peek()) is not None and not token.before:
            if token.text in ("ᵀ", "²"):
                self.take()
                up += r"\top" if token.text == "ᵀ" else "2"
            elif token.text == "^":
                self.take()
                up += self._exponent()
            elif token.text == "_":
                self.take()
                down += self._low()
            elif token.text == "*" and token.after and not token.before:
                self.take()
                indexed = re.fullmatch(r"(.+)_\{(\w)\}", made.tex)  # tau_t* is that of task t*
                made, up = (Factor(rf"{indexed[1]}_{{{indexed[2]}^{{\ast}}}}"), up) if indexed else (made, up + r"\ast")
            else:
                break
        if (token := self.peek()) is not None and token.text == "**":
            self.take()
            up += self._tight()
        if not (up or down):
            return made
        tex_, held = made.tex, re.fullmatch(r"(.*)\^\{\\top\}", made.tex)
        if held and up:
            tex_, up = held[1], r"\top " + up
        return Factor(tex_ + (f"_{{{down}}}" if down else "") + (f"^{{{up}}}" if up else ""), index=made.index)

    def _exponent(self) -> str:
        sign = self.take().text if self.peek() and self.tokens[self.at].text == "-" else ""
        token = self.take()
        if token.text == "T" and not sign:
            return r"\top"
        if token.text in CLOSING:
            return sign + self._until(CLOSING[token.text]).bare
        following = self.peek()
        if token.kind == "number" and following and following.text == "/" and not following.before:
            self.take()
            return f"{sign}{token.text}/{self.take().text}"
        name, _, low = token.text.partition("_")
        if low:  # ^2_H_tk is read as a number and a subscript; ^l_t as a name with one
            return rf"{sign}{name}}}_{{{subscript(low)}"
        return sign + token.text

    def _low(self) -> str:
        token = self.take()
        if token.text == "{":
            return self._until("}").bare
        base, _, low = token.text.partition("_")
        return subscript(base) + (rf"_{{{subscript(low)}}}" if low else "")
