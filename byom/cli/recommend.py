"""``byom recommend``: what to use when, from records."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence

from byom.cli import given
from byom.errors import OptionError, one_of
from byom.report import advice
from byom.report.evidence import Evidence
from byom.report.recommend import Question, answer
from byom.storage.place import at_home

HELP = """byom recommend: what to use when, with reasons, from records.

Usage: byom recommend [option=value ...]

  tasks=8             number of tasks
  finetune=full       what their models are: full or lora
  kilobytes=any       what may be stored for each task beside one shared model, in units of 1000 bytes;
                      0 is one merged model alone, and any lists what more bytes buy
  inputs=none         inputs that there are: none, unlabelled, labelled (which are unlabelled ones, too), or test
                      (those that will be predicted, without labels); two of them as inputs=[labelled,test]
  task_known=true     whether the task of an input is known when it is predicted
  merged_alone=true   false leaves out merged models with nothing stored for a task
  suite=all           vision8_offline or text8_offline counts the records of one suite alone
  show=3              how many are listed where kilobytes= is given
  results=            folders of records to go by, as in results=[results,results/methods]; without it, what was
                      measured by byom itself and is installed with it

byom recommend tasks=8 finetune=full kilobytes=300 inputs=none task_known=true suite=vision8_offline
"""
INPUTS = ("none", "unlabelled", "labelled", "test")
OPTIONS = ("tasks", "finetune", "kilobytes", "inputs", "task_known", "merged_alone", "suite", "show", "results")


def recommend(arguments: Sequence[str]) -> int:
    """Print what fits best, with commands and reasons.

    Raises:
        OptionError: If an option is wrong, or nothing that was measured fits.
    """
    if {"-h", "--help"} & {*arguments}:
        sys.stdout.write(HELP)
        return 0
    given.require_known({argument.partition("=")[0]: "" for argument in arguments}, OPTIONS)
    options = given.options(arguments)
    asked, show = question(options), _whole("show", options.get("show", "3"), 1)
    folders = given.items("results", options["results"]) if "results" in options else []
    evidence = _evidence(folders)
    found = answer(evidence, asked, show)
    sys.stdout.write(advice.text(found, evidence, advice.source_of(evidence, folders)))
    return 0


def question(options: Mapping[str, str]) -> Question:
    """Return the question that options ask.

    Args:
        options: Option to its text.

    Raises:
        OptionError: If a value is of no use.
    """
    inputs = given.items("inputs", options.get("inputs", "none"))
    for one in inputs or [""]:
        one_of("inputs", one, INPUTS)
    if "none" in inputs and len(inputs) > 1:
        raise OptionError("inputs lists none among others; leave it out, or give inputs=none")
    kilobytes, suite = options.get("kilobytes", "any"), options.get("suite", "all")
    return Question(
        tasks=_whole("tasks", options.get("tasks", "8"), 2),
        finetune=one_of("finetune", options.get("finetune", "full"), ("full", "lora")),
        kilobytes=None if kilobytes == "any" else _size(kilobytes),
        inputs=frozenset(inputs) - {"none"},  # pyright: ignore[reportArgumentType]
        task_known=_switch("task_known", options),
        merged_alone=_switch("merged_alone", options),
        suites=() if suite == "all" else tuple(given.items("suite", suite)),
    )


def _evidence(folders: Sequence[str]) -> Evidence:
    if not folders:
        return Evidence.read()
    from byom.cli.evidence import gather  # which needs Hydra, and what comes with byom does not

    return gather([at_home(folder) for folder in folders])


def _whole(option: str, text: str, least: int) -> int:
    if not text.strip().isdecimal() or int(text) < least:
        raise OptionError(f"{option}={text} is no whole number from {least} on; give for example {option}={least + 1}")
    return int(text)


def _size(text: str) -> float:
    try:
        size = float(text)
    except ValueError:
        size = math.nan
    if not 0 <= size < math.inf:
        raise OptionError(f"kilobytes={text} is no size; give a number such as kilobytes=300, or kilobytes=any")
    return size


def _switch(option: str, options: Mapping[str, str]) -> bool:
    return one_of(option, options.get(option, "true").lower(), ("true", "false")) == "true"
