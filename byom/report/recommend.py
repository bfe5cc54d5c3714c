"""Recommendations: which of the methods that records speak of fit what there is, the best first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np

from byom.errors import OptionError
from byom.report.evidence import Entry, Evidence

Given = Literal["unlabelled", "labelled", "test"]
LEVELS = (0.9, 0.95, 0.98, 0.99)
"""Relative accuracies whose cheapest candidates are listed where the bytes are not limited."""
TOLD = 5
"""Candidates that score higher and do not fit, of which an answer says why."""


@dataclass(frozen=True)
class Question:
    """What there is, and what is wanted.

    Args:
        tasks: Number of tasks.
        finetune: The recipe of fine-tuning, ``full`` or ``lora``.
        kilobytes: What may be stored for each task beside one shared model, in units of 1000 bytes; None is no limit.
        inputs: The inputs that may be looked at.
        task_known: Whether the task of an input is known at inference.
        merged_alone: Whether one merged model that stores nothing for its tasks would do.
        suites: Only evidence of these; empty for all there are.
    """

    tasks: int = 8
    finetune: str = "full"
    kilobytes: float | None = None
    inputs: frozenset[Given] = frozenset()
    task_known: bool = True
    merged_alone: bool = True
    suites: tuple[str, ...] = ()


@dataclass(frozen=True)
class Candidate:
    """One method with its options on every suite.

    Args:
        entries: Suite to what its records say.
    """

    entries: Mapping[str, Entry]

    @property
    def first(self) -> Entry:
        """The entry of the first suite, which has in common with the others all but names and numbers."""
        return next(iter(self.entries.values()))

    @property
    def name(self) -> str:
        """The row's name."""
        return self.first.row

    @cached_property
    def relative(self) -> float:
        """The accuracy relative to the tasks' own models, the mean over suites."""
        return float(np.mean([one.relative for one in self.entries.values()]))

    @property
    def alone(self) -> bool:
        """True where one model serves all tasks and nothing is stored for them, nor beside it but a router."""
        return not any(one.each or one.shared > one.routing for one in self.entries.values())

    def kilobytes(self, tasks: int) -> float:
        """Return what a task takes beside one model, on the suite where it takes most; see `Entry.kilobytes`."""
        return max(one.kilobytes(tasks) for one in self.entries.values())

    @property
    def needs(self) -> str:
        """The needs besides the models, in words."""
        first = self.first
        kind = "labelled" if first.labels else "unlabelled"
        words = [f"{first.members} models per task"] * (first.members > 1)
        words += ["test inputs" if split == "test" else f"{kind} {split} inputs" for split in sorted(first.inputs)]
        words += ["labelled validation inputs"] * bool(self.searched)
        return " and ".join(dict.fromkeys(words)) or "weights alone"

    @property
    def searched(self) -> int:
        """Number of settings that were compared on labelled validation examples."""
        return max(one.searched for one in self.entries.values())

    @property
    def reference(self) -> bool:
        """True of the models that others are compared with, which no method made."""
        return self.first.kind == "pretrained" or self.first.joint


def candidates(evidence: Evidence, question: Question) -> list[Candidate]:
    """Return what was measured on every suite that is asked about, best first.

    Raises:
        OptionError: If there are no records of that fine-tuning, or of a suite.
    """
    rows = [one for one in evidence.entries if one.finetune == question.finetune]
    known = list(dict.fromkeys(one.suite for one in evidence.entries))
    for suite in question.suites:
        if suite not in known:
            raise OptionError(f"suite={suite} has no record here; there are records of {', '.join(known)}")
    suites = [suite for suite in question.suites or known if any(one.suite == suite for one in rows)]
    if not suites:
        there = sorted({one.finetune for one in evidence.entries if one.suite in (question.suites or known)})
        raise OptionError(
            f"finetune={question.finetune} has no record here; there are records of finetune={' and '.join(there)}"
        )
    groups: dict[tuple, dict[str, Entry]] = {}
    for one in rows:
        groups.setdefault(_common(one, rows), {}).setdefault(one.suite, one)
    made = [
        Candidate({s: group[s] for s in suites}) for group in groups.values() if all(suite in group for suite in suites)
    ]
    return sorted(made, key=lambda one: (-one.relative, one.kilobytes(question.tasks)))


def _common(one: Entry, rows: Sequence[Entry]) -> tuple:
    """Return what is the same for a row on all suites: its options, or its name where options differ by suite."""
    others = {other.suite for other in rows if other.options == one.options}
    return one.options if others == {other.suite for other in rows} else (one.results, one.row)


def unfit(one: Candidate, question: Question) -> list[str]:
    """Return why a candidate does not fit, in words that follow its name; empty if it does."""
    first, why = one.first, []
    size = one.kilobytes(question.tasks)
    if first.joint:
        return ["is no merge: it was trained on the labelled examples of all tasks together"]
    if first.members > 1:
        why.append(f"needs {first.members} fine-tuned models of each task")
    why += _unseen(one, question)
    if question.kilobytes is not None and size > question.kilobytes:
        why.append(f"stores {number(size)} kB per task")
    if not question.task_known and not one.alone and not first.router:
        why.append("must know the task")
    if first.mix == "batch":
        why.append("is routed by whole batches of one task, which gives the task away")
    if one.alone and not question.merged_alone:
        why.append("is one merged model with nothing stored for a task")
    return why


def _unseen(one: Candidate, question: Question) -> list[str]:
    """Return which inputs a candidate looks at that there are none of."""
    first, given, why = one.first, question.inputs, []
    if "test" in first.inputs and "test" not in given:
        why.append("reads test inputs")
    other = [split for split in first.inputs if split != "test"]
    if other and first.labels and "labelled" not in given:
        why.append(f"reads labelled {' and '.join(other)} inputs")
    elif other and not given:
        why.append(f"reads unlabelled {' and '.join(other)} inputs")
    if one.searched and "labelled" not in given:
        why.append(f"was tuned on labelled validation inputs ({one.searched} settings)")
    return why


@dataclass(frozen=True)
class Answer:
    """What fits a question, and what does not.

    Args:
        question: The question.
        fitting: What fits, best first.
        listed: What is shown of it.
        barred: What scores higher than the best that fits, with the reasons why it does not, best first.
        every: All candidates.
    """

    question: Question
    fitting: tuple[Candidate, ...]
    listed: tuple[Candidate, ...]
    barred: tuple[tuple[Candidate, tuple[str, ...]], ...]
    every: tuple[Candidate, ...]

    @property
    def best(self) -> Candidate:
        """The best that fits."""
        return self.fitting[0]


def answer(evidence: Evidence, question: Question, show: int = 3) -> Answer:
    """Return what fits a question.

    Args:
        evidence: What records say.
        question: What there is.
        show: Number of candidates to list.

    Returns:
        With a limit on bytes the best few; without one the best merged model, and the cheapest that reach `LEVELS`.

    Raises:
        OptionError: If nothing fits, with what would.
    """
    every = candidates(evidence, question)
    reasons = [(one, tuple(unfit(one, question))) for one in every if not one.reference or one.first.joint]
    fitting = [one for one, why in reasons if not why and not _needless(one, question)]
    if not fitting:
        raise OptionError(_nothing(evidence, question))
    listed = fitting[:show] if question.kilobytes is not None else _steps(fitting, question.tasks)
    barred = [(one, why) for one, why in reasons if why and one.relative > fitting[0].relative]
    return Answer(question, tuple(fitting), tuple(listed), tuple(_telling(barred, question)), tuple(every))


def _needless(one: Candidate, question: Question) -> bool:
    """Say whether a candidate guesses a task that is known, or keeps whole models where bytes are not limited."""
    return bool(question.task_known and one.first.router) or (
        one.first.kind == "single_task" and question.kilobytes is None
    )


def _steps(fitting: Sequence[Candidate], tasks: int) -> list[Candidate]:
    """Return the best merged model, the cheapest candidate for each of `LEVELS`, and the best of all, by bytes."""
    by_size = sorted(fitting, key=lambda one: (one.kilobytes(tasks), -one.relative))
    picked = [next((one for one in fitting if one.alone), by_size[0])]
    picked += [next((one for one in by_size if one.relative >= level), fitting[0]) for level in LEVELS]
    distinct = {id(one): one for one in [*picked, fitting[0]]}
    return sorted(distinct.values(), key=lambda one: (one.kilobytes(tasks), one.relative))


def _telling(
    barred: Sequence[tuple[Candidate, tuple[str, ...]]], question: Question
) -> list[tuple[Candidate, tuple[str, ...]]]:
    """Return the best of each sort of reason, of those that miss by size alone the smallest; at most `TOLD`."""
    told: dict[tuple, tuple[Candidate, tuple[str, ...]]] = {}
    for one, why in barred:
        sort = tuple(reason.partition(" ")[0] for reason in why)
        if len(why) > 2 or (question.task_known and one.first.router) or one.first.kind == "single_task":
            continue  # far from fitting, a guess at a task that is known, or what the table ends with
        smaller = sort == ("stores",) and sort in told
        if sort not in told or (smaller and one.kilobytes(question.tasks) < told[sort][0].kilobytes(question.tasks)):
            told[sort] = one, why
    return list(told.values())[:TOLD]


RELAXED: tuple[tuple[str, Mapping], ...] = (
    ("merged_alone=true", {"merged_alone": True}),
    ("inputs=unlabelled", {"inputs": frozenset({"unlabelled"})}),
    ("inputs=labelled", {"inputs": frozenset({"labelled"})}),
    ("task_known=true", {"task_known": True}),
)
"""Options that let more candidates fit, the least first."""


def _nothing(evidence: Evidence, question: Question) -> str:
    """Return a sentence on a question that nothing fits, with what would let something fit."""
    remedies = [text for text, change in RELAXED if _fits(evidence, replace(question, **change))]
    more = _fits(evidence, replace(question, kilobytes=None))
    if more and question.kilobytes is not None:
        least = min(one.kilobytes(question.tasks) for one in more)
        remedies.append(f"kilobytes={number(np.ceil(least), plain=True)}")
    if not remedies:
        remedies = [f"{' '.join(text for text, _ in RELAXED if text != 'inputs=unlabelled')} kilobytes=any"]
    limit = "" if question.kilobytes is None else f" in {number(question.kilobytes)} kB per task"
    return f"nothing that was measured fits{limit}: {_stated(question)}; with {' or '.join(remedies)} something does"


def _fits(evidence: Evidence, question: Question) -> list[Candidate]:
    every = candidates(evidence, question)
    return [one for one in every if not (one.reference or unfit(one, question) or _needless(one, question))]


def _stated(question: Question) -> str:
    given = f"inputs={'+'.join(sorted(question.inputs)) or 'none'}"
    return f"{given} task_known={_word(question.task_known)} merged_alone={_word(question.merged_alone)}"


def _word(value: bool) -> str:
    return str(value).lower()


def number(value: float, *, plain: bool = False) -> str:
    """Return a size in kB as it is written: whole from 10 on, with two digits below.

    Args:
        value: The size.
        plain: Without commas, as an option takes it.
    """
    digits = f"{value:,.0f}" if value >= 10 else f"{value:.2g}"
    return digits.replace(",", "") if plain else digits
