"""Overrides as they are typed: values that Hydra's grammar has no room for are quoted, what is no override is named."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from byom.errors import OptionError
from byom.storage.parts import RENAMED

KEY = re.compile(r"([+~]{0,2}[A-Za-z_][\w.@/:-]*)=(.*)", re.DOTALL)
MEANT = (
    (re.compile(r"\[.*\]", re.DOTALL), "a list"),
    (re.compile(r"\{.*[:,].*\}", re.DOTALL), "a mapping"),
    (re.compile(r"\w+\(.*\)", re.DOTALL), "a function of Hydra's"),
    (re.compile(r"(['\"]).*\1", re.DOTALL), "a quoted text"),
)
"""Values that are something else than a text, so that quoting them would hide a slip."""
REMEDIES = {
    "a list": "quote the texts in it, \"{key}=['a {{}}','b, c']\"",
    "a mapping": "quote the values in it and no name, \"{key}={{name: 'value'}}\"",
}

SHARE = re.compile(r"[^=]+=\\\\\w")
"""Start of a path on another Windows machine: of its two backslashes Hydra would leave one."""


@lru_cache(maxsize=4096)
def read(override: str) -> Any:
    """Return Hydra's view of an override; the cells of a sweep have most of them in common."""
    return OverridesParser.create().parse_overrides([override])[0]


@lru_cache(maxsize=4096)
def quoted(override: str) -> str:
    """Return an override that Hydra reads: as given, or with its value in quotes where Hydra reads no value without.

    Former names of options become those of today.

    Paths and sentences may so have braces, blanks, ``=``, ``~``, backslashes and letters of any alphabet. What Hydra
    reads keeps its meaning, commas that sweep included.

    Args:
        override: As it was typed, such as ``experts.path_of=models/{task}``.

    Raises:
        OptionError: If it is no override, or its value is a broken list, mapping, function or quotation.
    """
    override = renamed(override)
    try:
        found = read(override)
    except HydraException as error:
        return _quoted(override, error)
    if not found.key_or_group:
        raise OptionError(f"{override!r} is no option; write NAME=VALUE, or ~NAME to take one out")
    return _quoted(override) if SHARE.match(override) else override


def renamed(override: str) -> str:
    """Return an override that chooses options by their names of today, one or several to sweep over."""
    group, equals, value = override.partition("=")
    names = {former: name for (of, former), name in RENAMED.items() if of == group}
    return group + equals + ",".join(names.get(part.strip(), part) for part in value.split(",")) if names else override


def _quoted(override: str, error: Exception | None = None) -> str:
    match = KEY.fullmatch(override)
    if match is None:
        raise OptionError(f"{override!r} is no option; write NAME=VALUE, or ~NAME to take one out") from error
    key, value = match.groups()
    kind = next((kind for pattern, kind in MEANT if pattern.fullmatch(value.strip())), None)
    escaped = re.sub(r"(\\*)('|$)", lambda end: 2 * end[1] + ("\\'" if end[2] else ""), value)
    text = f"{key}='{escaped}'"
    if kind is None and _reads(text, value):
        return text
    as_what = f" as {kind}" if kind else ""
    remedy = REMEDIES.get(kind or "", "a text needs quotes within those of the shell, \"{key}='...'\"").format(key=key)
    raise OptionError(f"the value of {key} cannot be read{as_what}: {value!r}; {remedy}") from error


def _reads(override: str, value: str) -> bool:
    try:
        found = read(override).value()
    except HydraException:
        return False
    return getattr(found, "text", found) == value
