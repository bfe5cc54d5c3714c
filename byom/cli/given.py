"""Options of the commands on folders: lists and pairs as they are typed, or as a recipe's yaml has them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from byom.errors import CheckpointError, OptionError, suggest
from byom.storage.place import at_home

RECIPE = "recipe"
NAME = re.compile(r"\s*([\w.+-]+)\s*=\s*(.*)", re.DOTALL)
OPEN, CLOSE = "[{(", "]})"


def options(arguments: Sequence[str]) -> dict[str, Any]:
    """Return option to value; those of a recipe come first, and what is typed replaces them.

    Raises:
        OptionError: If an argument is no option, or one is given twice.
        CheckpointError: If the recipe cannot be read.
    """
    typed: dict[str, Any] = {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals or not name.strip():
            raise OptionError(f"{argument!r} is no option; write NAME=VALUE")
        if name in typed:
            raise OptionError(f"{name} is given twice; give it once")
        typed[name] = value
    file = typed.pop(RECIPE, None)
    return typed if file is None else recipe(at_home(file)) | typed


def recipe(file: Path) -> dict[str, Any]:
    """Read a recipe.

    Raises:
        CheckpointError: If there is no such file, or it is no yaml of options.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        why = str(error).partition("\n")[0]
        raise CheckpointError(f"recipe={file} cannot be read ({why}); give a yaml file of options") from error
    if isinstance(content, dict) and {"merge_method", "models"} & set(content):
        raise CheckpointError(
            f"{file} is a recipe of mergekit's; byom convert-recipe {file} OUT.yaml turns it into one"
        )
    if not isinstance(content, dict) or not content or not all(isinstance(name, str) for name in content):
        raise CheckpointError(f"recipe={file} holds no options; write one NAME: VALUE on a line, such as base: PATH")
    return content


def text(option: str, value: Any) -> str:
    """Return an option's text.

    Raises:
        OptionError: If it is a list or mapping.
    """
    if isinstance(value, list | dict) or value is None:
        raise OptionError(f"{option} takes one value, and {value} is given")
    return str(value)


def items(option: str, value: Any) -> list[str]:
    """Return the entries of a list, typed as ``[a,b]`` or ``a``.

    Raises:
        OptionError: If brackets do not match, or an entry is no text.
    """
    if isinstance(value, Mapping):
        raise OptionError(f"{option} takes a list, and {value} is a mapping")
    if isinstance(value, list):
        if odd := [entry for entry in value if not isinstance(entry, str)]:
            raise OptionError(f"{option} takes a list of texts, and {odd[0]!r} is in it")
        return value
    stripped = text(option, value).strip()
    if stripped[:1] != "[":
        return [_unquoted(stripped)] if stripped else []
    if stripped[-1:] != "]":
        raise OptionError(f"{option}={value} has a bracket that is not closed; write {option}=[a,b]")
    return [_unquoted(part) for part in _split(stripped[1:-1]) if part.strip()]


def pairs(option: str, value: Any, *, bare: bool = False) -> dict[str, Any]:
    """Return the entries of a mapping, typed as ``[a=1,b=2]`` or ``{a: 1, b: 2}``.

    Args:
        option: The option.
        value: What was typed, or a mapping of a recipe's.
        bare: Whether an entry without a value is allowed; its value is empty.

    Raises:
        OptionError: If an entry has no value, or two have one name.
    """
    if isinstance(value, Mapping):
        return {str(name): "" if entry is None else entry for name, entry in value.items()}
    if isinstance(value, str) and value.strip()[:1] == "{":
        return pairs(option, _flow(option, value))
    found: dict[str, Any] = {}
    for entry in _entries(option, value):
        name, equals, rest = entry.partition("=")
        if not equals and not bare:
            raise OptionError(f"{option}: {entry!r} has no value; write {option}=[NAME=VALUE]")
        if name.strip() in found:
            raise OptionError(f"{option} gives {name.strip()} twice; give it once")
        found[name.strip()] = _unquoted(rest)
    return found


def experts(value: Any) -> dict[str, str]:
    """Return name to path, typed as ``[a=PATH,b=PATH]`` or ``[PATH,PATH]``, of which each is called by its last part.

    Raises:
        OptionError: If two have one name.
    """
    if isinstance(value, Mapping) or (isinstance(value, str) and value.strip()[:1] == "{"):
        return {name: text(f"experts.{name}", path) for name, path in pairs("experts", value).items()}
    found: dict[str, str] = {}
    for entry in items("experts", value):
        match = NAME.fullmatch(entry)
        name, path = (match[1], _unquoted(match[2])) if match else (_called(entry), entry)
        if name in found:
            raise OptionError(f"experts: two are called '{name}'; name them, experts=[a={found[name]},b={path}]")
        found[name] = path
    return found


def number(option: str, value: Any) -> float:
    """Return an option's number.

    Raises:
        OptionError: If it is none.
    """
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise OptionError(f"{option}: {value!r} is no number") from error


def override(value: Any) -> str:
    """Return a value as the text of a Hydra override."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{name}:{override(entry)}" for name, entry in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(override(entry) for entry in value) + "]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def plain(value: Any) -> Any:
    """Return what was typed as yaml reads it, for a recipe: numbers are numbers."""
    if not isinstance(value, str):
        return value
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return value


def require_known(given: Mapping[str, Any], known: Sequence[str]) -> None:
    """Refuse an option that a command does not have.

    Raises:
        OptionError: With the nearest.
    """
    for name in given:
        if name not in known:
            raise OptionError(f"there is no option '{name}' here; {suggest(name, known)}")


def _entries(option: str, value: Any) -> list[str]:
    if isinstance(value, list) and all(isinstance(entry, Mapping) for entry in value):
        return [f"{name}={entry}" for one in value for name, entry in one.items()]
    return items(option, value)


def _flow(option: str, value: str) -> Mapping[str, Any]:
    try:
        found = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise OptionError(f"{option}={value} is no mapping; write {option}={{a: VALUE, b: VALUE}}") from error
    if not isinstance(found, dict):
        raise OptionError(f"{option}={value} is no mapping; write {option}={{a: VALUE, b: VALUE}}")
    return found


def _split(inner: str) -> Iterator[str]:
    """Yield what commas separate outside of brackets and quotes."""
    depth, quote, start = 0, "", 0
    for place, letter in enumerate(inner):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in OPEN:
            depth += 1
        elif letter in CLOSE:
            depth -= 1
        elif letter == "," and not depth:
            yield inner[start:place]
            start = place + 1
    yield inner[start:]


def _unquoted(entry: str) -> str:
    entry = entry.strip()
    return entry[1:-1] if len(entry) > 1 and entry[0] == entry[-1] and entry[0] in "'\"" else entry


def _called(path: str) -> str:
    return Path(path.removeprefix("hf://").partition("@")[0].rstrip("/")).name
