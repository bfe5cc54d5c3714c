"""Options of the configuration as the documentation sees them: a class, its docstring in sections, its fields."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from experiments.pages.notation import GREEK

ROOT = Path(__file__).parents[2]
GROUPS = {"merge": "Merge methods", "byom": "BYOM variants", "router": "Routers", "statistic": "Statistics"}
SECTIONS = ("Args", "Returns", "Raises", "References", "Differences")
SYMBOL = re.compile(rf"\((?:the paper's )?((?:[A-Za-z]|{'|'.join(sorted(GREEK))})(?:_\w+)?)(?: (?:in|of) the paper)?\)")
RANGE = re.compile(
    r"in ([\[(][\d., inf]+[\])])|((?:above|at least|at most) -?\d+(?:\.\d+)?)|(\d+ or more)|(any real number)"
    r"|(none negative)"
)


@dataclass(frozen=True)
class Field:
    """A hyperparameter.

    Args:
        name: Its name in the yaml and on the command line.
        default: The value that the yaml states.
        values: What it may be, in words.
        symbol: The symbol of the paper, in plain text, if the docstring gives one.
        text: What the docstring says of it.
    """

    name: str
    default: Any
    values: str
    symbol: str
    text: str


@dataclass(frozen=True)
class Option:
    """An option of a group of the configuration, such as ``merge=ties``.

    Args:
        group: The group.
        name: The name of its yaml.
    """

    group: str
    name: str

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        """The settings that its yaml states."""
        return yaml.safe_load(self.yaml.read_text(encoding="utf-8"))

    @property
    def yaml(self) -> Path:
        """Its yaml."""
        return ROOT / "conf" / self.group / f"{self.name}.yaml"

    @cached_property
    def cls(self) -> type:
        """The class that the yaml names."""
        module, _, name = self.settings["_target_"].rpartition(".")
        return getattr(import_module(module), name)

    @property
    def source(self) -> Path:
        """The file of the class, relative to the repository."""
        return Path(*self.cls.__module__.split(".")).with_suffix(".py")

    @cached_property
    def instance(self) -> Any:
        """The class with its defaults."""
        return self.cls()

    @cached_property
    def sections(self) -> dict[str, str]:
        """The class's docstring by section; the text before the first is under the empty name."""
        return sections(inspect.getdoc(self.cls) or "")

    @property
    def summary(self) -> str:
        """The first sentence of the docstring."""
        return " ".join(self.sections[""].partition("\n\n")[0].split())

    @property
    def paragraphs(self) -> list[str]:
        """The text of the docstring between summary and first section; a base class's if it is empty."""
        rest = self.sections[""].partition("\n\n")[2]
        for parent in self.cls.__mro__[1:]:
            known = sections(inspect.cleandoc(parent.__doc__ or ""))
            rest = rest or (known[""].partition("\n\n")[2] if "Args" in known else "")
        return [" ".join(part.split()) for part in rest.split("\n\n") if part.strip()]

    @property
    def title(self) -> str:
        """Its name in tables, or that of its yaml."""
        title = getattr(self.cls, "title", "") or self.name.replace("_", " ")
        return title.capitalize() if title.islower() else title

    @cached_property
    def fields(self) -> list[Field]:
        """Its hyperparameters, those of base classes included."""
        said = arguments(self.cls)
        hints = get_type_hints(self.cls)
        return [self._field(each, hints[each.name], said) for each in dataclasses.fields(self.cls)]

    def _field(self, each: dataclasses.Field, hint: Any, said: Mapping[str, str]) -> Field:
        text = said.get(each.name, "")
        symbol = SYMBOL.search(text)
        default = self.settings[each.name] if each.name in self.settings else self._nested(each)
        return Field(each.name, default, _values(hint, text), symbol[1] if symbol else "", text)

    def _nested(self, each: dataclasses.Field) -> Any:
        for entry in self.settings.get("defaults", []):
            for place, choice in entry.items() if isinstance(entry, dict) else ():
                if place.rpartition("@")[2] == each.name:
                    return choice
        return None if each.default is dataclasses.MISSING else each.default

    @property
    def symbols(self) -> dict[str, str]:
        """Hyperparameters to the paper's symbols, or to their own names where the paper's are not known."""
        return {each.name: each.symbol or each.name for each in self.fields}

    @property
    def papers(self) -> list[str]:
        """The arXiv numbers of its references."""
        return list(dict.fromkeys(re.findall(r"arxiv\.org/abs/([0-9.]+\d)", self.sections.get("References", ""))))


def options(group: str) -> list[Option]:
    """Return the options of a group by name."""
    return [Option(group, path.stem) for path in sorted((ROOT / "conf" / group).glob("*.yaml"))]


def sections(text: str) -> dict[str, str]:
    """Split a docstring in the house's style into its sections.

    Args:
        text: The docstring without its indentation.
    """
    parts = re.split(rf"^({'|'.join(SECTIONS)}):\n", text, flags=re.M)
    found = {"": parts[0].strip()}
    return found | {name: inspect.cleandoc("\n" + body) for name, body in zip(parts[1::2], parts[2::2], strict=True)}


def arguments(cls: type) -> dict[str, str]:
    """Return what a class and its bases say of every field.

    The class's own words come first, unless they only list the values.
    """
    found: dict[str, str] = {}
    for each in cls.__mro__:
        if dataclasses.is_dataclass(each):
            for name, text in _entries(sections(inspect.cleandoc(each.__doc__ or "")).get("Args", "")):
                listed = re.fullmatch(r"(``[\w=]+``|,| |or|For|; see `\w+`|\.)*", found.get(name, ""))
                found[name] = text if listed else found[name]
    return found


def _entries(text: str) -> Iterator[tuple[str, str]]:
    for entry in re.split(r"\n(?=\w)", text):
        name, _, said = entry.partition(":")
        if said:
            yield name.strip(), " ".join(said.split())


def _values(hint: Any, text: str) -> str:
    """Say what a field may be, from its type and its docstring."""
    if get_origin(hint) is Literal:
        return " or ".join(f"`{value}`" for value in get_args(hint))
    stated = RANGE.search(text)
    if stated:
        return next(part for part in stated.groups() if part)
    return _kind(hint)


def _kind(hint: Any) -> str:
    names = {bool: "true or false", int: "whole number", float: "number", str: "text"}
    if hint in names:
        return names[hint]
    if get_origin(hint) is tuple:
        inner = get_args(hint)[0]
        return {float: "list of numbers", int: "list of whole numbers"}.get(inner, "list of texts")
    optional = [part for part in get_args(hint) if part is not type(None)]
    if len(optional) < len(get_args(hint)):
        return f"{_kind(optional[0])} or null"
    return "another option" if inspect.isclass(hint) else "text"
