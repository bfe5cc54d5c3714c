"""The command line: ``byom COMMAND [options]``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import import_module

HELP = """byom: build your own multi-task model.

Usage: byom COMMAND [option=value ...]

Folders: a base and fine-tuned models of any architecture
  merge    one folder that from_pretrained opens (--dry-run says what would be done):
                       byom merge OUT base=BASE 'experts=[a=PATH,b=PATH]' merge=ties merge.density=0.2
  pack     one model and a little of each task, as one folder that byom.Bundle opens; also from a suite:
                       byom pack BUNDLE base=BASE 'experts=[a=PATH,b=PATH]' merge=ties byom=fft byom.density=0.05
                       byom pack BUNDLE suite=vision8_offline merge=ties byom=fft byom.density=0.1
  unpack   one task of a bundle as a plain folder, a PEFT adapter or a sparse patch:
                       byom unpack BUNDLE task=a OUT to=folder
  serve    all tasks of a bundle over HTTP:
                       byom serve BUNDLE port=8000
  convert-recipe  a recipe of mergekit's as one for byom merge:
                       byom convert-recipe mergekit.yaml recipe.yaml
  convert  a checkpoint of another format (pickles run nothing) as safetensors:
                       byom convert finetuned.pt FOLDER like=clip_vit_b32

  recommend  what to use when, with reasons, from records; byom recommend --help lists its options:
                       byom recommend kilobytes=300 inputs=none task_known=true

Laboratory: experiments on suites of tasks
  run      one cell:   byom run merge=ties byom=fft byom.density=0.1 suite=vision8_offline
           a sweep:    byom -m merge=average,ties byom=none,fft byom.density=0.01,0.1
  table    every missing cell of an experiment, then its table and figures:
                       byom table vision8_offline
  plan     which cells of an experiment are missing, and what they cost in downloads, disk, memory and time:
                       byom plan vision8_vitb32_fft
  fetch    everything an experiment needs from hubs, ahead of time:
                       byom fetch vision8_vitb32_fft
  report   tables and figures from the records alone:
                       byom report suite=vision8_offline
  why      the records behind a number of a table, and the commands that run them again:
                       byom why vision8_offline "BYOM-FFT on TIES, 10 %" mean
  preview  accuracy over task weights from merged models alone, next to a few jointly fine-tuned ones:
                       byom preview suite=vision8_offline tasks=[cifar10,chess] joint=3
  statistics  what some merge methods need of each expert, ahead of time:
                       byom statistics fisher gram suite=vision8_offline
  export   one PEFT adapter per task, next to the merged model where tasks were packed against one:
                       byom export FOLDER suite=text8_offline finetune=lora byom=lora byom.rank=8
  list     methods, variants, suites, backbones, and the experts in the cache; list merge: methods for folders, too;
           list caches: how large each part of the cache is
  clean    remove what killed runs left in the cache, or whole parts of it (--dry-run says what would go):
                       byom clean data older=30d --dry-run

Options of the laboratory, merge.* and byom.* everywhere, are Hydra overrides. `byom run --cfg` prints the configuration
that would run, and `byom list` the options of each group. Records go to results/runs (results=FOLDER; to
results/scratch while a source tree has uncommitted changes), everything that can be made again to ~/.cache/byom
(cache=FOLDER or BYOM_CACHE).
"""


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Arguments without the program name; None takes the process's.

    Returns:
        The exit status: 0, or 1 after an error that a sentence explained.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        sys.stdout.write(HELP)
        return 0
    from byom.errors import ByomError

    _legible()
    try:
        return _dispatch(arguments)
    except ByomError as error:
        sys.stderr.write(f"byom: {error}\n")
        return 1
    except BrokenPipeError:  # of `byom list | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        left = "nothing was written" if arguments[0] in FOLDERS else "finished cells are kept"
        sys.stderr.write(f"byom: interrupted; {left}, run the same command to go on\n")
        return 130


def _legible() -> None:
    """Let output that a terminal's alphabet lacks (Windows) be question marks, not the end of a command."""
    for stream in (sys.stdout, sys.stderr):
        if (getattr(stream, "encoding", None) or "utf-8").lower().replace("-", "") != "utf8":
            stream.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]


def _dispatch(arguments: list[str]) -> int:
    from byom.errors import OptionError, suggest

    name, rest = arguments[0], arguments[1:]
    if name in ("-m", "--multirun") or "=" in name:
        name, rest = "run", arguments
    if ("-h" in rest or "--help" in rest) and name != "recommend":
        sys.stdout.write(HELP)
        return 0
    if name not in COMMANDS:
        raise OptionError(f"there is no command '{name}'; {suggest(name, COMMANDS)}")
    return COMMANDS[name](rest)


def _run(arguments: list[str]) -> int:
    sweep = [a for a in arguments if a not in ("-m", "--multirun")]
    return _command("sweep", "run")(sweep) if len(sweep) < len(arguments) else _command("command", "run")(arguments)


def _pack(arguments: list[str]) -> int:
    """Pack folders where a base or a recipe is given, and a suite's experts otherwise."""
    folders = any(argument.startswith(("base=", "recipe=", "experts=[", "experts={")) for argument in arguments)
    return _command("pack", "folders" if folders else "serve")(arguments)


def _command(name: str, module: str = "") -> Callable[[list[str]], int]:
    """Return a function of a module of `byom.cli`, by default of its own name, which is imported when it is called."""

    def call(arguments: list[str]) -> int:
        _quiet()
        _rest()
        return getattr(import_module(f"byom.cli.{module or name}"), name)(arguments)

    return call


def _quiet() -> None:
    """Keep the hubs' libraries from reporting at every load; they read these when they are imported."""
    for name, value in (("TRANSFORMERS_VERBOSITY", "error"), ("HF_HUB_DISABLE_PROGRESS_BARS", "1")):
        os.environ.setdefault(name, value)


def _rest() -> None:
    """Let threads sleep while they wait: those that spin slow torch down beside other work (`benchmarks.threads`)."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


FOLDERS = ("merge", "pack", "unpack", "convert")
"""Commands that write one folder, all or nothing."""
COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "run": _run,
    **{name: _command(name) for name in ("table", "preview", "statistics")},
    "report": _command("report", "table"),
    "export": _command("export", "serve"),
    "pack": _pack,
    "serve": _command("serve", "server"),
    "list": _command("list_options", "listing"),
    "clean": _command("clean", "caches"),
    "why": _command("why", "why"),
    "recommend": _command("recommend"),
    **{name: _command(name, "provision") for name in ("plan", "fetch", "convert")},
    **{name: _command(name, "folders") for name in ("merge", "unpack")},
    "convert-recipe": _command("convert_recipe", "recipes"),
}

if __name__ == "__main__":
    sys.exit(main())
