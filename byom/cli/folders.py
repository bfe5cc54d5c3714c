"""``byom merge``, ``pack`` and ``unpack``: from a base and fine-tuned models, each a folder, a file or a repository."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from byom.checkpoint.bundle import own_files
from byom.checkpoint.convert import DTYPES
from byom.cli import config, given
from byom.errors import OptionError, listed, one_of
from byom.folders.beside import MANIFEST
from byom.folders.models import models
from byom.folders.output import files_of, require_apart, require_space, write, written_bytes
from byom.folders.request import Request
from byom.folders.result import Result, Watch, nbytes
from byom.storage import manifest
from byom.storage.atomic import require_own
from byom.storage.place import at_home
from byom.variants.base.delta import Delta

NAMES = ("base", "experts", "keep", "only", "exclude", "scale", "heads", "dtype", "vocabulary", "files", "to")
GROUPS = ("merge", "byom")
DRY = "--dry-run"
PACK = "BUNDLE base=PATH 'experts=[a=PATH,b=PATH]' merge=METHOD byom=VARIANT [--dry-run], or BUNDLE suite=SUITE ..."
USAGE = "OUT base=PATH 'experts=[a=PATH,b=PATH]' merge=METHOD [merge.OPTION=VALUE ...] [--dry-run]"


def merge(arguments: Sequence[str]) -> int:
    """Merge folders into one, then print what was done."""
    dry, arguments = DRY in arguments, [argument for argument in arguments if argument != DRY]
    out = place("merge", arguments, USAGE)
    request = requested(given.options(arguments[1:]), packs=False)
    result = Result(request, models(request))
    every = [result.models.source, *(expert.source for expert in result.models.experts.values())]
    require_apart(out, every)
    require_own(out, manifest.own(out, MANIFEST))
    _describe(result, {out if folder == "." else out / folder: n for folder, n in written_bytes(result).items()})
    if dry:
        require_space(out, sum(written_bytes(result).values()))
        sys.stdout.write("nothing was written (--dry-run)\n")
        return 0
    with _shown("merge", result.reads + sum(written_bytes(result).values()), result) as bar:
        write(result, out, bar)
    sys.stdout.write(f"{out}\n")
    return 0


def pack(arguments: Sequence[str]) -> int:
    """Pack folders into a bundle, then print what each task takes."""
    from byom.folders.pack import pack as packed
    from byom.folders.pack import reads

    dry, arguments = DRY in arguments, [argument for argument in arguments if argument != DRY]
    out = place("pack", arguments, PACK)
    request = requested(given.options(arguments[1:]), packs=True)
    result = Result(request, models(request))
    require_apart(out, [result.models.source, *(expert.source for expert in result.models.experts.values())])
    require_own(out, own_files(out))
    _describe(result, {out / "reference": nbytes(result.models.base)})
    if dry:
        require_space(out, nbytes(result.models.base))
        sys.stdout.write("nothing was written (--dry-run)\n")
        return 0
    with _shown("pack", reads(result), result) as bar:
        packed(result, out, bar)
    for task in result.models.experts:
        delta = Delta.open(out / f"{task}.safetensors")
        size = f"{delta.stored_parameters:>13,} parameters {delta.nbytes:>14,} bytes"
        sys.stdout.write(f"{task:<18} {size}  {out / task}.safetensors\n")
    sys.stdout.write(f"{out}\n")
    return 0


def unpack(arguments: Sequence[str]) -> int:
    """Write one task's model of a bundle as a plain folder."""
    from byom.folders.pack import unpack as unpacked

    places = [argument for argument in arguments if "=" not in argument]
    options = given.options([argument for argument in arguments if "=" in argument])
    given.require_known(options, ("task", "dtype", "to", "server"))
    if len(places) != 2 or "task" not in options:
        raise OptionError("byom unpack BUNDLE task=NAME OUT [to=folder|peft|patch] [server=vllm] [dtype=...]")
    values = {name: given.text(name, value) for name, value in options.items()}
    if dtype := values.get("dtype", ""):
        one_of("dtype", dtype, DTYPES)
    out = unpacked(at_home(places[0]), out=at_home(places[1]), **values)
    sys.stdout.write(f"{out}\n")
    return 0


@contextmanager
def _shown(what: str, total: int, result: Result) -> Iterator[Watch]:
    """Show a bar by bytes while a block runs, and say in the end what it took."""
    from byom.pipeline.provenance import Stages

    stages = Stages()
    with (
        stages.stage(what),
        tqdm(total=total, unit="B", unit_scale=True, desc=what, mininterval=0.5) as bar,
    ):

        def watch(nbytes: int) -> None:
            if bar.total and bar.n + nbytes > bar.total:  # a method that reads again what does not fit into memory
                bar.total = None
            bar.update(nbytes)

        yield watch
        bar.total = bar.n
    taken = stages.taken[what]
    if simpler := result.fallbacks:
        sys.stdout.write(f"merged by a simpler rule than the method's: {listed(simpler)}\n")
    sys.stdout.write(
        f"{len(result.models.base)} tensors, {bar.n:,} bytes read and written in {taken['seconds']:.1f} s, "
        f"peak {taken['peak_mib']:,.0f} MiB\n"
    )


def _describe(result: Result, writes: Mapping[Path, int]) -> None:
    """Print what is read, what becomes of it, and what is written."""
    rows = {"base": (result.models.source, "")} | {
        name: (expert.source, expert.container) for name, expert in result.models.experts.items()
    }
    for name, (source, container) in rows.items():
        sys.stdout.write(f"reads  {name:<12} {source.nbytes:>15,} bytes  {source.given}  {container}\n")
    for note in result.models.notes:
        sys.stdout.write(f"note   {note}\n")
    problem = result.problem
    sys.stdout.write(f"merges {len(problem.pretrained.mergeable())} tensors, {problem.pretrained.numel:,} parameters")
    sys.stdout.write(f", {result.request.merge.title}\n")
    if result.kept:
        sys.stdout.write(f"keeps  {len(result.kept)} tensors: {listed(sorted(result.kept))}\n")
    for folder, size in writes.items():
        sys.stdout.write(f"writes {size:>28,} bytes  {folder}\n")
    place = files_of(result)
    sys.stdout.write(f"copies configuration and tokenizer of {place or 'nobody: the base is a file'}\n")


def requested(options: Mapping[str, Any], *, packs: bool) -> Request:
    """Build a request from options.

    Args:
        options: Option to its value, text as it was typed or what a recipe holds.
        packs: Whether a variant is chosen.

    Raises:
        OptionError: If an option is unknown or misses.
    """
    groups = {name: value for name, value in options.items() if re.split(r"[.@]", name)[0] in GROUPS}
    given.require_known({name: value for name, value in options.items() if name not in groups}, [*NAMES, *GROUPS])
    groups |= {name: given.name(name, groups[name]) for name in GROUPS if name in groups}
    if not packs and (odd := [name for name in groups if name.startswith("byom")]):
        raise OptionError(f"{odd[0]} says what is packed for each task: byom pack BUNDLE ...; byom merge merges alone")
    for name in ("base", "experts"):
        if name not in options:
            raise OptionError(f"{name}= is not given: base=PATH 'experts=[a=PATH,b=PATH]', or recipe=FILE")
    fields = [name for name in groups if name.startswith(("merge.", "merge@")) and name != "merge.device"]
    if "merge" not in groups and (odd := fields):
        raise OptionError(f"{odd[0]} is given and merge= is not; name the method that it is an option of")
    groups = groups if "merge" in groups else {"merge": "average"} | groups
    built = config.resolve([f"{name}={given.override(value)}" for name, value in groups.items()]).values
    own = {name: _read(name, options[name]) for name in NAMES if name in options}
    made: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in own.items()}
    recipe = own | {name: given.plain(value) for name, value in groups.items() if name != "merge.device"}
    variant = config.made(built["byom"]) if packs else None
    return Request(
        **made, merge=config.made(built["merge"]), variant=variant, recipe=recipe, device=built[config.MERGING]
    )


def _read(name: str, value: Any) -> Any:
    """Return an option that is no method's, in the form that a recipe has it in."""
    match name:
        case "experts":
            return given.experts(value)
        case "keep":
            return {pattern: str(task) for pattern, task in given.pairs(name, value, bare=True).items()}
        case "scale":
            return {pattern: given.number(name, factor) for pattern, factor in given.pairs(name, value).items()}
        case "only" | "exclude" | "heads":
            return given.items(name, value)
        case _:
            return given.text(name, value)


def place(command: str, arguments: Sequence[str], usage: str) -> Path:
    """Return the folder that a command writes, its first argument.

    Raises:
        OptionError: If it is missing.
    """
    if not arguments or "=" in arguments[0] or not arguments[0].strip():
        raise OptionError(f"where to? byom {command} {usage}")
    return at_home(arguments[0])
