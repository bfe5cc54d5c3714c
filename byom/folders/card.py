"""The model card of a merged model, and its recipe: what another person needs to make it again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

import byom
from byom.errors import listed
from byom.folders.result import Result
from byom.folders.source import HUB, Source

LICENCE = ("license", "license_name", "license_link")


def sources(result: Result, digests: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return where the base and the experts lie, and what they are.

    Args:
        result: What is merged.
        digests: Name, ``base`` or an expert's, to the SHA-256 of its weights.
    """
    every = {"base": result.models.source} | {n: e.source for n, e in result.models.experts.items()}
    return {name: _described(source, digests.get(name, "")) for name, source in every.items()}


def _described(source: Source, digest: str) -> dict[str, Any]:
    known = {"commit": source.commit, "sha256": digest}
    return {"path": source.given, "bytes": source.nbytes} | {name: value for name, value in known.items() if value}


def method(result: Result) -> dict[str, Any]:
    """Return the method's name and hyperparameters."""
    return {"name": type(result.request.merge).__name__} | asdict(result.request.merge)


def card(result: Result, recipe: str, digests: Mapping[str, str]) -> str:
    """Return the model card, as the hub reads it.

    Args:
        result: What was merged.
        recipe: The recipe as yaml.
        digests: As in `sources`.
    """
    request = result.request
    title = request.merge.title
    every = sources(result, digests)
    rows = [
        f"| {name} | {_code(row['path'])}{_at(row)} | {row['bytes']:,} | `{row.get('sha256', '')}` |"
        for name, row in every.items()
    ]
    options = [f"| `{name}` | {_code(value)} |" for name, value in asdict(request.merge).items()]
    notes = [f"- {note}" for note in result.models.notes]
    if simpler := result.fallbacks:
        notes.append(f"- merged by a simpler rule than the method's: {listed(simpler)}")
    lines = [
        *_header(result),
        f"# Merged by {title}",
        "",
        f"Fine-tuned models of one architecture ({len(request.experts)}), merged with byom {byom.__version__}.",
        "",
        "| model | path | bytes of weights | SHA-256 |",
        "|---|---|--:|---|",
        *rows,
        "",
        f"## Method: {title}",
        "",
        *(["| hyperparameter | value |", "|---|---|", *options] if options else ["It has no hyperparameters."]),
        "",
        *(["## Notes", "", *notes, ""] if notes else []),
        "## Recipe",
        "",
        "```yaml",
        recipe.rstrip(),
        "```",
        "",
        "Saved as `recipe.yaml`, `byom merge OUT recipe=recipe.yaml` makes the model again.",
        "",
    ]
    return "\n".join(lines)


def _code(value: Any) -> str:
    """Return a value as code in a cell of a table, whatever marks are in it."""
    text = str(value).replace("|", r"\|")
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def _at(row: Mapping[str, Any]) -> str:
    return f" at `{row['commit']}`" if row.get("commit") else ""


def _header(result: Result) -> list[str]:
    request = result.request
    hub = [
        p.removeprefix(HUB).partition("@")[0] for p in (request.base, *request.experts.values()) if p.startswith(HUB)
    ]
    models = [f"- {name}" for name in dict.fromkeys("/".join(p.split("/")[:2]) for p in hub)]
    return [
        "---",
        "library_name: transformers",
        *(["base_model:", *models] if models else []),
        *_licence(result.models.source.folder),
        "tags:",
        "- merge",
        "- byom",
        "---",
        "",
    ]


def _licence(folder: Path | None) -> list[str]:
    """Return the lines on the licence in the header of the base's card."""
    file = None if folder is None else folder / "README.md"
    if file is None or not file.is_file():
        return []
    text = file.read_text(encoding="utf-8", errors="replace")
    header = text.removeprefix("---\n").split("\n---", 1)[0] if text.startswith("---\n") else ""
    try:
        known = yaml.safe_load(header)
    except yaml.YAMLError:  # the base's card is nobody's concern here but for what can be read of it
        return []
    found = {name: known[name] for name in LICENCE if name in known} if isinstance(known, dict) else {}
    return yaml.safe_dump(found, sort_keys=False, allow_unicode=True).splitlines() if found else []
