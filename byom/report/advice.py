"""Recommendations as text: a table, the commands, the reasons, what was left out, and how far the records carry."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence

import pandas as pd

from byom.errors import listed
from byom.report import render
from byom.report.evidence import Course, Entry, Evidence
from byom.report.frame import MISSING
from byom.report.recommend import LEVELS, Answer, Candidate, Question, number

FOLDERS = "base=BASE 'experts=[a=PATH,b=PATH]'"
OF_FOLDERS = ("merge", "byom")
"""Groups of options that commands on folders take."""


def text(answer: Answer, evidence: Evidence, source: str) -> str:
    """Return an answer for the terminal.

    Args:
        answer: What fits the question.
        evidence: What it was answered from.
        source: Where that comes from, one line.
    """
    parts = [f"{asked(answer.question)}\n{source}\n", *(f"{note}\n" for note in evidence.notes)]
    parts += ["\n", render.text(table(answer)), *(f"\n{lines}" for lines in map(commands, answer.listed))]
    for head, lines in (
        ("Why", why(answer)),
        ("What scores higher, and is not in the table", left_out(answer)),
        ("How far this carries", limits(answer, evidence)),
    ):
        bullets = [f"- {line}\n" for line in lines]
        parts += [f"\n{head}\n", *bullets] if bullets else []
    return "".join(parts)


def asked(question: Question) -> str:
    """Return the question in words."""
    kind = {"full": "full fine-tunes", "lora": "LoRA fine-tunes"}.get(question.finetune, question.finetune)
    size = "any bytes per task" if question.kilobytes is None else f"at most {number(question.kilobytes)} kB per task"
    inputs = " and ".join(sorted(question.inputs)) + " inputs" if question.inputs else "no inputs"
    known = "known" if question.task_known else "not known"
    return f"{question.tasks} {kind}, {size}, {inputs}, the task {known} at inference"


def table(answer: Answer) -> pd.DataFrame:
    """Return the listed candidates as text cells, and the tasks' own models below them."""
    tasks = answer.question.tasks
    own = [one for one in answer.every if one.first.kind == "single_task" and one not in answer.listed]
    names = [f"{place}  {one.name}" for place, one in enumerate(answer.listed, 1)] + [f"   {one.name}" for one in own]
    rows = [*answer.listed, *own]
    out = pd.DataFrame({"Method": names, "Needs": [one.needs for one in rows]})
    out["kB per task"] = [number(one.kilobytes(tasks)) for one in rows]
    for suite in answer.best.entries:
        out[f"{suite}: % of single-task"] = [_accuracy(one.entries[suite]) for one in rows]
    out["Seeds"] = [" / ".join(dict.fromkeys(map(_seeds, one.entries.values()))) for one in rows]
    return out


def _accuracy(one: Entry) -> str:
    if one.kind == "single_task":
        return f"{100 * one.relative:.1f}"
    if one.lower is None or one.upper is None:
        return f"{100 * one.relative:.1f} [{MISSING}]"
    return f"{100 * one.relative:.1f} [{100 * one.lower:.1f}, {100 * one.upper:.1f}]"


def _seeds(one: Entry) -> str:
    return ",".join(map(str, one.seeds))


def commands(one: Candidate) -> str:
    """Return how a candidate is run, on suites and on folders, and what names its records."""
    lines = [one.name]
    for suite, entry in one.entries.items():
        same = entry.options == one.first.options and suite != one.first.suite
        lines += [] if same else [f"  laboratory  {laboratory(entry)}"]
    lines += [f"  folders     {line}" for line in folders(one)]
    lines += [f"  numbers     {numbers(entry)}" for entry in one.entries.values()]
    return "\n".join(lines) + "\n"


def laboratory(one: Entry) -> str:
    """Return the command that runs an entry on its suite."""
    return shlex.join(["byom", "run", f"suite={one.suite}", *one.options])


def numbers(one: Entry) -> str:
    """Return the command that names an entry's records."""
    words = ["byom", "why", one.suite, one.row, "relative"]
    words += [] if one.results == "results" else [f"results={one.results}"]
    return f"{shlex.join(words)}   ({', '.join(one.records)})"


def folders(one: Candidate) -> list[str]:
    """Return the commands on folders, one for each outcome of a search; or a sentence on why there is none."""
    first = one.first
    if first.kind == "single_task":
        return ["keep the folders as they are"]
    if first.inputs or first.members > 1 or first.joint:
        pack = "byom pack BUNDLE" if first.mix != "batch" else "byom run"
        return [f"{shlex.join([*pack.split(), f'suite={first.suite}', *first.options])}   (it needs inputs: a suite's)"]
    made: dict[str, list[str]] = {}
    for entry in one.entries.values():
        for chosen in entry.chosen or ("",):
            made.setdefault(_on_folders(entry, chosen), []).append(entry.suite)
    if len(made) == 1:
        return list(made)
    return [f"{command}   (chosen on {suites[0]})" for command, suites in made.items()]


def _on_folders(one: Entry, chosen: str) -> str:
    """Return the command on folders with what a search chose; folders have no validation data to search on."""
    options = [each for each in one.options if re.split(r"[.@=]", each)[0] in OF_FOLDERS and each != "byom=none"]
    found = chosen.split()
    names = {each.partition("=")[0] for each in found}
    options = [each for each in options if each.partition("=")[0] not in names]
    cut = next((place for place, each in enumerate(options) if each.startswith("byom")), len(options))
    of_merge = [each for each in found if each.startswith("merge")]
    options = [*options[:cut], *of_merge, *options[cut:], *(each for each in found if each not in of_merge)]
    packs = any(each.startswith("byom=") for each in options)
    return f"byom {'pack BUNDLE' if packs else 'merge OUT'} {FOLDERS} {shlex.join(options)}"


def why(answer: Answer) -> Iterator[str]:
    """Yield the reasons for the best, in sentences."""
    question, best = answer.question, answer.best
    if question.kilobytes is None:
        yield (
            "Bytes are not limited: listed are the best merged model alone, the fewest bytes that reach "
            f"{listed(f'{100 * level:g}' for level in LEVELS)} % of single-task accuracy (the mean over suites), and "
            f"the best of all; kilobytes=N names a limit. {_stands(best)}"
        )
    else:
        yield f"{_stands(best)}"
    yield _stored(best, question.tasks)
    yield _needed(best)
    runner = next((one for one in answer.fitting if one is not best), None)
    if runner and (near := [s for s in best.entries if _overlap(best.entries[s], runner.entries[s])]):
        sizes = f"{number(runner.kilobytes(question.tasks))} kB per task"
        yield (
            f"The next, {runner.name} ({_percents(runner)}; {sizes}), is not told apart from it on {listed(near)}: the "
            "intervals overlap."
        )


def _stands(one: Candidate) -> str:
    return f"{one.name} scores highest of what fits: {_percents(one)}, of single-task accuracy."


def _percents(one: Candidate) -> str:
    return ", ".join(f"{100 * entry.relative:.1f} % on {suite}" for suite, entry in one.entries.items())


def _stored(one: Candidate, tasks: int) -> str:
    first = one.first
    if one.alone:
        return "It is one model for all tasks, and stores nothing for any of them."
    shared = max(entry.shared for entry in one.entries.values()) / tasks / 1000
    also = f", of which {number(shared)} kB are its share of what all {tasks} tasks hold besides" if shared else ""
    stores = f": {first.stores}" if first.stores else ""
    besides = "" if first.kind == "single_task" else " beside one shared model"
    return f"It stores {number(one.kilobytes(tasks))} kB for each task{besides}{also}{stores}."


def _needed(one: Candidate) -> str:
    if one.needs == "weights alone":
        return "It needs the models' weights alone, and nothing of it was chosen on data."
    chosen = list(dict.fromkeys(text for entry in one.entries.values() for text in entry.chosen))
    said = f"; validation inputs chose {listed(chosen)} among {one.searched} settings" if chosen else ""
    return f"It needs {one.needs}{said}."


def _overlap(one: Entry, other: Entry) -> bool:
    ends = (one.lower, one.upper, other.lower, other.upper)
    if any(end is None for end in ends):
        return False
    low, high, its_low, its_high = (float(end) for end in ends if end is not None)
    return low <= its_high and its_low <= high


def left_out(answer: Answer) -> Iterator[str]:
    """Yield what scores higher than the best that fits, and why it does not fit."""
    for one, reasons in answer.barred:
        yield f"{one.name} ({_percents(one)}) {' and '.join(reasons)}."


def limits(answer: Answer, evidence: Evidence) -> Iterator[str]:
    """Yield under which conditions the records were made, and what that says of the question's."""
    question, best = answer.question, answer.best
    yield _conditions(best, len(answer.fitting))
    yield from _of_tasks(question, best, evidence)
    if question.finetune != "full":
        yield from _of_recipe(question, best, evidence)
    if len({entry.seeds for one in answer.listed for entry in one.entries.values()}) > 1:
        yield "Some rows are means over several seeds and others are of one: a point between them may be seeds."
    if any(one.searched for one, _ in answer.barred):
        yield (
            "What was tuned runs without data at the values that were chosen here (inputs=labelled prints them); on "
            "other models it may then keep less than it did."
        )
    if not question.task_known and any(one.alone for one in answer.listed):
        yield (
            "A merged model's accuracy was measured with each task's own head, which names the task; routed rows were "
            "measured without it, so that the two are not quite comparable."
        )


def _conditions(best: Candidate, fitting: int) -> str:
    models = listed([f"{suite}: {entry.backbone}" for suite, entry in best.entries.items()])
    sizes = listed([f"{entry.model / 1e6:.0f} MB" for entry in best.entries.values()])
    tasks = listed(dict.fromkeys(str(entry.tasks) for entry in best.entries.values()))
    luck = f", and the best of {fitting} that fit owes a little to these test examples" if fitting > 1 else ""
    return (
        f"The records are of {tasks} tasks ({models}), models of {sizes}; in a larger model the same share of "
        "it is more bytes. Intervals (95 %) are over test examples, not over seeds. Other models and tasks may order "
        f"methods otherwise{luck}."
    )


def _of_tasks(question: Question, best: Candidate, evidence: Evidence) -> Iterator[str]:
    """Yield what is known of other numbers of tasks, where another one is asked about."""
    if {entry.tasks for entry in best.entries.values()} == {question.tasks}:
        return
    first = best.first
    if first.apart and all(entry.shared == entry.routing for entry in best.entries.values()):
        yield "It packs every task for itself: with the task known, other tasks change neither accuracy nor bytes."
        if first.router:
            yield f"No record says how often a router errs among {question.tasks} tasks."
        return
    course = _course(best, evidence)
    if course is None:
        yield f"No record of such a method has another number of tasks than {first.tasks}."
        return
    path = listed(f"{100 * value:.1f} % at {size}" for size, value in zip(course.sizes, course.relative, strict=True))
    also = "" if course.row == best.name else f"{best.name} has no record at another number of tasks; of its kind, "
    most = max(course.sizes)
    span = "" if question.tasks <= most else f" None has more than {most}."
    yield (
        f"{also}{course.row} keeps {path} tasks of {course.suite} (finetune={course.finetune}, means of up to "
        f"{max(course.subsets)} random subsets, {course.results}).{span}"
    )


def _course(best: Candidate, evidence: Evidence) -> Course | None:
    """Return the method itself by number of tasks, or the best of its kind at the largest number."""
    of_kind = [
        one for one in evidence.courses if one.merges and best.first.merges and (one.kind == "merged") == best.alone
    ]
    own = [one for one in of_kind if one.row == best.name]
    return max(own or of_kind, key=lambda one: one.relative[-1], default=None)


def _of_recipe(question: Question, best: Candidate, evidence: Evidence) -> Iterator[str]:
    """Yield which fine-tunes the records are of, and what was measured on full ones alone."""
    recipe = [each for each in best.first.options if each.startswith("finetune")]
    yield f"The fine-tunes are of {' '.join(recipe)}; others of {question.finetune} may differ."
    here = {one.method for one in evidence.entries if one.finetune == question.finetune}
    missing = {one.method for one in evidence.entries if one.finetune == "full"} - here
    if missing:
        yield (
            f"{len(missing)} methods and variants were measured on full fine-tunes alone and are not considered; "
            "byom recommend finetune=full shows what they do there."
        )


def source_of(evidence: Evidence, folders: Sequence[str]) -> str:
    """Return where evidence comes from, one line.

    Args:
        evidence: What is known.
        folders: The folders that were asked for; empty for what comes with byom.
    """
    roots = listed(sorted({one.results for one in [*evidence.entries, *evidence.courses]}))
    if folders:
        return f"Evidence: {evidence.records} records of {roots}."
    return (
        f"Evidence: {evidence.records} records of byom's own experiments, summed up in byom/report/evidence.json,\n"
        "which is installed with byom. None of your models was looked at. byom why reads the records themselves,\n"
        f"in a checkout of the repository: {roots}."
    )
