"""``byom list caches`` and ``byom clean``: how large the cache is, and what can go."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from byom.cli import config
from byom.errors import CheckpointError, OptionError, suggest
from byom.storage import caches
from byom.storage.caches import KINDS, Entry
from byom.storage.place import at_home

SECONDS = {"h": 3600, "d": 86400, "w": 604800}
USAGE = "byom clean [KIND ...] [older=30d] [--dry-run] [cache=FOLDER]"


def sizes(arguments: Sequence[str]) -> int:
    """Print how large each part of the cache is, and when it was last used."""
    cache = _cache(arguments)
    rows = [("", "holds", "entries", "files", "size", "last used")]
    left = caches.leftovers(cache)
    total = 0
    for kind, (holds, _) in KINDS.items():
        found = caches.entries(cache, kind)
        if found:
            nbytes = sum(entry.bytes for entry in found)
            files, total = sum(len(entry.files) for entry in found), total + nbytes
            used = datetime.fromtimestamp(max(entry.used for entry in found)).strftime("%Y-%m-%d")
            rows.append((kind, holds, str(len(found)), str(files), amount(nbytes), used))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines = [f"{cache}: {amount(total)}", *(table if len(rows) > 1 else [])]
    if left:
        lines.append(f"{amount(sum(entry.bytes for entry in left))} of it is left over; `byom clean` removes it")
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def clean(arguments: Sequence[str]) -> int:
    """Remove what nothing needs, or everything of some kinds.

    Without kinds: what killed runs left, and damaged files. Everything in the cache can be made again; records are
    elsewhere and never touched.
    """
    dry = "--dry-run" in arguments
    options = [argument for argument in arguments if "=" in argument]
    kinds = [argument for argument in arguments if "=" not in argument and argument != "--dry-run"]
    for kind in kinds:
        if kind not in KINDS:
            raise OptionError(f"byom clean knows no '{kind}'; {suggest(kind, KINDS)}. Usage: {USAGE}")
    older = [option.removeprefix("older=") for option in options if option.startswith("older=")]
    cache = _cache([option for option in options if not option.startswith("older=")])
    before = time.time() - (_age(older[-1]) if older else 0)
    found = [entry for kind in kinds for entry in caches.entries(cache, kind)] if kinds else caches.leftovers(cache)
    chosen = [entry for entry in found if not older or entry.used < before]
    return _clean(cache, chosen, dry)


def _clean(cache: Path, chosen: Sequence[Entry], dry: bool) -> int:
    gone, kept, refused = 0, [], []
    busy = caches.busy(cache)
    for entry in chosen:
        nbytes = entry.bytes
        try:
            caches.require_inside(cache, entry)
            free = bool(entry.why) or not busy
            done = free and (not caches.held(entry) if dry else caches.remove(cache, entry))
        except CheckpointError as error:
            refused.append(str(error))
            continue
        if not done:
            kept.append(entry)
            continue
        gone += nbytes
        why = f"  ({entry.why})" if entry.why else ""
        sys.stdout.write(f"{amount(nbytes):>9}  {entry.path.relative_to(cache)}{why}\n")
    for entry in kept:
        sys.stdout.write(f"     kept  {entry.path.relative_to(cache)}  (a running process needs it, or may)\n")
    where = f"{cache}{'' if cache.is_dir() else ', which is no folder'}"
    sys.stdout.write(f"{amount(gone)} {'would be' if dry else 'were'} removed from {where}\n")
    if refused:
        raise CheckpointError("; ".join(dict.fromkeys(refused)))
    return 0


def _cache(arguments: Sequence[str]) -> Path:
    if unknown := [argument for argument in arguments if not argument.startswith("cache=")]:
        raise OptionError(f"{unknown[0]!r} says nothing here; Usage: {USAGE}")
    return at_home(config.resolve(list(arguments)).values["cache"])


def _age(text: str) -> float:
    if not (found := re.fullmatch(r"(\d+)([hdw])", text)):
        raise OptionError(f"older={text}; give hours, days or weeks, such as older=12h, older=30d or older=8w")
    return int(found[1]) * SECONDS[found[2]]


def amount(count: int) -> str:
    """Return a number of bytes as people read it."""
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
