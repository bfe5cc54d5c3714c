"""``byom convert-recipe``: recipes of mergekit as recipes of ``byom merge``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from byom.cli.folders import requested
from byom.errors import CheckpointError, OptionError
from byom.folders.mergekit import converted
from byom.storage.atomic import write_text
from byom.storage.place import at_home


def convert_recipe(arguments: Sequence[str]) -> int:
    """Convert a recipe of mergekit, and write it to a file or print it."""
    if not 1 <= len(arguments) <= 2 or any(argument.startswith("-") for argument in arguments):
        raise OptionError("byom convert-recipe MERGEKIT.yaml [OUT.yaml]; without OUT.yaml it is printed")
    source, *out = (at_home(argument) for argument in arguments)
    for file in out:
        if file.exists():
            raise OptionError(f"{file} is there already; give another name, or remove it")
    text = _text(source)
    if out:
        sys.stdout.write(f"{write_text(out[0], text)}\n")
    else:
        sys.stdout.write(text)
    return 0


def _text(source: Path) -> str:
    try:
        content = yaml.safe_load(source.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        why = str(error).partition("\n")[0]
        raise CheckpointError(f"{source} cannot be read ({why}); give a yaml file of mergekit's") from error
    try:
        conversion = converted(content)
        requested(conversion.options, packs=False)
    except OptionError as error:
        raise OptionError(f"{source}: {error}") from error
    return conversion.text(source.name)
