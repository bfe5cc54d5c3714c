"""What to use when, in two sentences for the README: answers of `byom recommend`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from byom.errors import OptionError
from byom.report.evidence import Evidence
from byom.report.recommend import Candidate, Question, answer, number

SUITES = ("vision8_offline", "text8_offline")
LEVELS = (0.95, 0.98)
ALONE = Question(kilobytes=0, suites=SUITES)
KNOWN = Question(suites=SUITES)
UNKNOWN = Question(
    kilobytes=5000, inputs=frozenset({"unlabelled"}), task_known=False, merged_alone=False, suites=SUITES
)


def sentences(evidence: Evidence | None = None) -> str:
    """Return the two sentences.

    Args:
        evidence: What records say; None is what byom is installed with.
    """
    evidence = evidence or Evidence.read()
    one, known, routed = answer(evidence, ALONE).best, _known(evidence), _routed(evidence)
    sizes = [f"{_code(each)} keeps {_kept(each)} in {number(each.kilobytes(8))} kB per task" for each in known]
    packed = " and\n  ".join(sizes)
    guessed = [f"with a router fitted to unlabelled inputs {_code(each)} keeps {_kept(each)}" for each in routed]
    return (
        f"- **What to use when** (`byom recommend` says why; {_seeds([one, *known, *routed])}): one model from weights "
        f"alone, {_code(one)},\n  keeps {_kept(one)} of single-task accuracy on images and texts, and "
        f"{_with_inputs(evidence, one)}. Where\n  the task is known, {packed}; where it is not,\n  "
        f"{guessed[0] if guessed else 'one merged model is what there is'}."
    )


def _with_inputs(evidence: Evidence, one: Candidate) -> str:
    """Return what inputs add to one merged model."""
    better = []
    for kind in ("unlabelled", "labelled"):
        other = answer(evidence, replace(ALONE, inputs=frozenset({kind}))).best
        if other.first.options != one.first.options:
            better.append(f"with {kind} inputs {_code(other)} {_kept(other)}")
    return " and ".join(better) or "no merge that reads inputs keeps more"


def _known(evidence: Evidence) -> list[Candidate]:
    """Return the fewest bytes that reach each of `LEVELS`."""
    fitting = answer(evidence, KNOWN).fitting
    by_size = sorted(fitting, key=lambda one: one.kilobytes(8))
    picked = [next((one for one in by_size if one.relative >= level), fitting[0]) for level in LEVELS]
    return list({id(one): one for one in picked}.values())


def _routed(evidence: Evidence) -> list[Candidate]:
    """Return the best that guesses the task, if any was measured."""
    try:
        return [answer(evidence, UNKNOWN).best]
    except OptionError:
        return []


def _seeds(named: Sequence[Candidate]) -> str:
    seeds = {entry.seeds for one in named for entry in one.entries.values()}
    if len(seeds) > 1:
        return f"{min(map(len, seeds))} to {max(map(len, seeds))} seeds"
    (same,) = seeds
    return f"seed{'s' * (len(same) > 1)} {', '.join(map(str, same))}"


def _code(one: Candidate) -> str:
    return f"`{' '.join(each for each in one.first.options if each != 'byom=none')}`"


def _kept(one: Candidate) -> str:
    return " and ".join(f"{100 * one.entries[suite].relative:.1f}" for suite in SUITES) + " %"
