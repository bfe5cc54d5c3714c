"""Options of the commands on folders: lists and pairs as they are typed, or as a recipe's yaml has them."""

from __future__ import annotations

import math
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


class _Once(yaml.SafeLoader):
    """A reader of yaml that refuses a mapping with two entries of one name, of which the first would be lost."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := next((name for place, name in enumerate(names) if name in names[:place]), None):
            raise yaml.constructor.ConstructorError(None, None, f"{twice} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _loaded(text: str) -> Any:
    return yaml.load(text, _Once)  # a SafeLoader


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
    if file is None:
        return typed
    if not file.strip():
        raise OptionError(f"{RECIPE}= is empty; give a yaml file of options")
    read = recipe(at_home(file))
    for group in ("merge", "byom"):
        its = [name for name in read if name.startswith(f"{group}.") and name not in typed]
        if its and typed.get(group, read.get(group)) != read.get(group):
            raise OptionError(
                f"{file} gives {its[0]} for its own {group}={read.get(group)}; take it out there, or give no {group}= "
                "beside the recipe"
            )
    return read | typed


def recipe(file: Path) -> dict[str, Any]:
    """Read a recipe.

    Raises:
        CheckpointError: If there is no such file, or it is no yaml of options.
    """
    try:
        content = _loaded(file.read_text(encoding="utf-8"))
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


def name(option: str, value: Any) -> str:
    """Return the one name that an option takes, such as a method's.

    Raises:
        OptionError: If it is none, several, or a mapping with more in it.
    """
    if isinstance(value, Mapping):
        raise OptionError(
            f"{option} takes a name, and {dict(value)} is given; a recipe has {option}: NAME on one line, and "
            f"{option}.OPTION: VALUE on another"
        )
    if not isinstance(value, str) or not re.fullmatch(r"\w[\w-]*", value.strip()) or value.strip() == "null":
        raise OptionError(f"{option} takes one name, and {value!r} is given; byom list {option} lists them")
    return value.strip()


def items(option: str, value: Any) -> list[str]:
    """Return the entries of a list, typed as ``[a,b]`` or ``a``.

    Raises:
        OptionError: If brackets do not match, or an entry is no text.
    """
    return [_unquoted(part) for part in _parts(option, value)]


def _parts(option: str, value: Any) -> list[str]:
    """Return the entries of a list as they are typed, in quotes where they were."""
    if isinstance(value, Mapping):
        raise OptionError(f"{option} takes a list, and {value} is a mapping")
    if isinstance(value, list):
        if odd := [entry for entry in value if not isinstance(entry, str)]:
            raise OptionError(f"{option} takes a list of texts, and {odd[0]!r} is in it")
        return value
    stripped = text(option, value).strip()
    if stripped[:1] != "[":
        return [stripped] if stripped else []
    if stripped[-1:] != "]":
        raise OptionError(f"{option}={value} has a bracket that is not closed; write {option}=[a,b]")
    return [part.strip() for part in _split(stripped[1:-1]) if part.strip()]


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
    for name, entry in _entries(option, value):
        if entry is None and not bare:
            raise OptionError(f"{option}: {name!r} has no value; write {option}=[NAME=VALUE]")
        if name in found:
            raise OptionError(f"{option} gives {name} twice; give it once")
        found[name] = "" if entry is None else entry
    return found


def experts(value: Any) -> dict[str, str]:
    """Return name to path, typed as ``[a=PATH,b=PATH]`` or ``[PATH,PATH]``, of which each is called by its last part.

    Raises:
        OptionError: If two have one name.
    """
    listed = isinstance(value, list) and value and all(isinstance(entry, Mapping) for entry in value)
    if listed or isinstance(value, Mapping) or (isinstance(value, str) and value.strip()[:1] == "{"):
        named = pairs("experts", value)
        if odd := [name for name, path in named.items() if path == "" and ":" in name]:
            raise OptionError(f"experts: {odd[0]} has no path; write a blank after the colon, experts={{a: PATH}}")
        return {name: text(f"experts.{name}", path) for name, path in named.items()}
    found: dict[str, str] = {}
    for entry in _parts("experts", value):
        match = NAME.fullmatch(entry)
        name, path = (match[1], _unquoted(match[2])) if match else (_called(_unquoted(entry)), _unquoted(entry))
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
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise OptionError(f"{option}: {value!r} is no finite number; write one such as 0.5")
    return found


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


def _entries(option: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the names and values of a list of texts and mappings; one without a value has None."""
    mappings = [entry for entry in value if isinstance(entry, Mapping)] if isinstance(value, list) else []
    for mapping in mappings:
        yield from ((str(name), entry) for name, entry in mapping.items())
    for entry in items(option, [each for each in value if each not in mappings] if mappings else value):
        name, equals, rest = entry.partition("=")
        yield name.strip(), _unquoted(rest) if equals else None


def _flow(option: str, value: str) -> Mapping[str, Any]:
    try:
        found = _loaded(value)
    except yaml.YAMLError as error:
        why = str(error).partition("\n")[0]
        raise OptionError(f"{option}={value} is no mapping ({why}); write {option}={{a: VALUE, b: VALUE}}") from error
    if not isinstance(found, dict):
        raise OptionError(f"{option}={value} is no mapping; write {option}={{a: VALUE, b: VALUE}}")
    return found


def _split(inner: str) -> Iterator[str]:
    """Yield what commas separate outside of brackets and quotes."""
    depth, quote, start = 0, "", 0
    for place, letter in enumerate(inner):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"" and inner[start:place].rstrip()[-1:] in ("", "="):  # others are part of a path
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
    called = Path(path.removeprefix("hf://").partition("@")[0].rstrip("/")).name
    return called if called not in ("", "..") else at_home(path).resolve().name
