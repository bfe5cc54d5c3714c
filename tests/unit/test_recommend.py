"""What to use when: which rows fit a question, what is said of them, and that the evidence is that of the records."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import byom
from byom.__main__ import HELP, main
from byom.cli import config, folders, given, recommend
from byom.cli.evidence import _command, digest, options_of
from byom.errors import ByomError, OptionError
from byom.report import advice
from byom.report.bootstrap import relative_interval
from byom.report.entries import entry
from byom.report.evidence import FILE, Course, Entry, Evidence
from byom.report.recommend import Candidate, Question, answer, candidates, number, unfit
from byom.report.report import Tables, read_runs
from byom.report.rows import rows
from byom.report.stored import record_bytes
from byom.storage.parts import TaskScore
from byom.storage.record import Record
from experiments import evidence as experiment
from tests.unit import synthetic_runs as synthetic

ROOT = Path(__file__).parents[2]
COMMITTED = Evidence.read()
BOTH = ("images", "texts")


def row(name: str, relative: float = 0.9, **changes) -> Entry:
    """Make what records say of one row: weights alone, 1,000 kB per task."""
    values = {
        "suite": "images", "backbone": "vit", "results": "results/methods", "row": name, "records": (f"of{name}",),
        "seeds": (0,), "finetune": "full", "options": ("merge=ties", f"byom={name}"), "kind": "fft", "merges": True,
        "apart": False, "inputs": (), "labels": False, "members": 1, "joint": False, "searched": 0, "chosen": (),
        "router": "", "mix": "", "stores": "a little", "tasks": 8, "model": 86_000_000, "shared": 0, "routing": 0,
        "each": 1_000_000, "accuracy": 0.8 * relative, "relative": relative, "lower": relative - 0.01,
        "upper": relative + 0.01,
    }  # fmt: skip
    return Entry(**{**values, **changes})


def merged(name: str, relative: float, **changes) -> Entry:
    return row(name, relative, **{"kind": "merged", "options": (f"merge={name}", "byom=none"), "each": 0} | changes)


def of(*entries: Entry, courses: tuple[Course, ...] = ()) -> Evidence:
    own = [row("Single-task", 1.0, kind="single_task", merges=False, each=86_000_000, options=("byom=single_task",))]
    return Evidence((*entries, *own), courses, len(entries))


def names(evidence: Evidence, **question) -> list[str]:
    return [one.name for one in answer(evidence, Question(**{"kilobytes": 5000, **question})).fitting]


@pytest.mark.parametrize(
    ("changes", "question", "why"),
    [
        ({}, {}, ""),
        ({}, {"kilobytes": 999}, "stores 1,000 kB per task"),
        ({}, {"kilobytes": 1000}, ""),
        ({}, {"kilobytes": None}, ""),
        ({"shared": 8_000_000}, {"kilobytes": 1999}, "stores 2,000 kB per task"),
        ({"shared": 8_000_000}, {"kilobytes": 1999, "tasks": 80}, ""),
        ({"inputs": ("train",)}, {}, "reads unlabelled train inputs"),
        ({"inputs": ("train",)}, {"inputs": {"unlabelled"}}, ""),
        ({"inputs": ("train",)}, {"inputs": {"labelled"}}, ""),
        ({"inputs": ("train",), "labels": True}, {"inputs": {"unlabelled"}}, "reads labelled train inputs"),
        ({"inputs": ("train",), "labels": True}, {"inputs": {"labelled"}}, ""),
        ({"inputs": ("test",)}, {"inputs": {"labelled"}}, "reads test inputs"),
        ({"inputs": ("test",)}, {"inputs": {"test"}}, ""),
        ({"inputs": ("test", "train")}, {"inputs": {"unlabelled"}}, "reads test inputs"),
        ({"searched": 9}, {"inputs": {"unlabelled"}}, "was tuned on labelled validation inputs (9 settings)"),
        ({"searched": 9}, {"inputs": {"labelled"}}, ""),
        ({"members": 2}, {}, "needs 2 fine-tuned models of each task"),
        ({"joint": True, "labels": True, "inputs": ("train",)}, {"inputs": {"labelled"}}, "is no merge"),
        ({}, {"task_known": False}, "must know the task"),
        ({"each": 0}, {"task_known": False}, ""),
        ({"each": 0, "shared": 1000}, {"task_known": False}, "must know the task"),
        ({"each": 0}, {"merged_alone": False}, "is one merged model with nothing stored for a task"),
        ({"router": "kNN-routed", "mix": "sample"}, {"task_known": False}, ""),
        ({"router": "kNN-routed", "mix": "batch"}, {"task_known": False}, "is routed by whole batches"),
    ],
)
def test_what_does_not_fit_says_why(changes, question, why):
    given = {"kilobytes": 5000} | question
    given["inputs"] = frozenset(given.get("inputs", ()))
    found = unfit(Candidate({"images": row("x", **changes)}), Question(**given))
    assert len(found) == bool(why) and all(reason.startswith(why) for reason in found), found


def test_the_best_that_fits_comes_first_and_the_smaller_of_two_alike():
    evidence = of(row("a", 0.9), row("b", 0.95), row("c", 0.99, inputs=("test",)), row("d", 0.9, each=500_000))
    assert names(evidence) == ["b", "d", "a"]
    assert names(evidence, inputs=frozenset({"test"}))[0] == "c"
    found = answer(evidence, Question(kilobytes=5000), show=2)
    assert [one.name for one in found.listed] == ["b", "d"]
    assert [(one.name, why) for one, why in found.barred] == [("c", ("reads test inputs",))]


def test_models_as_they_are_fit_where_there_are_bytes_for_them():
    assert names(of(row("a")), kilobytes=86_000) == ["Single-task", "a"]
    assert names(of(row("a")), kilobytes=None) == ["a"]


def test_a_router_is_for_tasks_that_are_not_known():
    routed = row(
        "a, routed", 0.93, router="kNN-routed", mix="sample", inputs=("train",), options=("byom=a", "router=knn")
    )
    evidence, inputs = of(row("a", 0.92), routed, merged("m", 0.8)), frozenset({"unlabelled"})
    assert names(evidence, inputs=inputs) == ["a", "m"]
    assert names(evidence, inputs=inputs, task_known=False) == ["a, routed", "m"]
    assert names(evidence, task_known=False) == ["m"]


def test_without_a_limit_more_bytes_are_listed_with_what_they_reach():
    sizes = {0.92: 100, 0.955: 300, 0.96: 500, 0.985: 900, 0.995: 4000, 0.97: 8000}
    rows = [row(f"q{size}", level, each=1000 * size) for level, size in sizes.items()]
    found = answer(of(merged("m", 0.85), *rows), Question())
    assert [one.name for one in found.listed] == ["m", "q100", "q300", "q900", "q4000"]


def test_a_method_is_compared_where_every_suite_has_it():
    pair = [row("a", 0.9), row("a", 0.8, suite="texts"), row("b", 0.99), row("k", 0.7, options=("merge=k",))]
    pair += [row("k", 0.7, suite="texts", options=("merge=k", "merge.exclude=['*embed*']"))]
    evidence = Evidence(tuple(pair), (), 5)
    assert [one.name for one in candidates(evidence, Question())] == ["a", "k"]
    assert candidates(evidence, Question())[0].relative == pytest.approx(0.85)
    assert [one.name for one in candidates(evidence, Question(suites=("images",)))] == ["b", "a", "k"]


@pytest.mark.parametrize(
    ("question", "remedy"),
    [
        ({"kilobytes": 300, "task_known": False, "merged_alone": False}, "with kilobytes=any merged_alone"),
        ({"kilobytes": 300}, "with kilobytes=1000 something does"),
        ({"kilobytes": 5000, "task_known": False}, "with task_known=true something does"),
        ({"finetune": "lora"}, "finetune=lora has no record here; there are records of finetune=full"),
        ({"suites": ("sounds",)}, "suite=sounds has no record here; there are records of images"),
    ],
)
def test_where_nothing_fits_a_sentence_says_what_would(question, remedy):
    with pytest.raises(OptionError) as raised:
        answer(of(row("a")), Question(**question))
    text = str(raised.value)
    if "merged_alone" in remedy:
        assert "task_known=true" in text and "kilobytes=any" in text
    else:
        assert remedy in text


def test_commands_on_folders_hold_what_a_search_chose():
    tuned = row("a", options=("merge=ties", "byom=fft", "byom.density=0.1", "tune=validation"), searched=9,
                chosen=("merge.scale=1.0",))  # fmt: skip
    other = replace(tuned, suite="texts", chosen=("merge.scale=0.8",))
    (one,) = advice.folders(Candidate({"images": tuned}))
    assert one.startswith("byom pack BUNDLE base=BASE")
    assert one.endswith("merge=ties merge.scale=1.0 byom=fft byom.density=0.1")
    assert [line.rpartition("(")[2] for line in advice.folders(Candidate({"images": tuned, "texts": other}))] == [
        "chosen on images)", "chosen on texts)",
    ]  # fmt: skip
    (alone,) = advice.folders(Candidate({"images": merged("average", 0.6)}))
    assert alone == "byom merge OUT base=BASE 'experts=[a=PATH,b=PATH]' merge=average"
    (routed,) = advice.folders(Candidate({"images": row("a", inputs=("train",), options=("byom=a", "router=mlp"))}))
    assert routed.startswith("byom pack BUNDLE suite=images byom=a router=mlp")


COURSE = Course("images", "full", "results/scaling", "TIES", "merged", True, (2, 4, 8), (0.87, 0.8, 0.69), (3, 3, 1))


@pytest.mark.parametrize(
    ("entries", "tasks", "said", "unsaid"),
    [
        ([merged("TIES", 0.7)], 4, "TIES keeps 87.0 % at 2, 80.0 % at 4, 69.0 % at 8 tasks of images", "of its kind"),
        ([merged("CART", 0.7)], 12, "CART has no record at another number of tasks; of its kind, TIES", "packs every"),
        ([merged("CART", 0.7)], 12, "None has more than 8.", "packs every"),
        ([row("q", apart=True, merges=False)], 12, "It packs every task for itself", "TIES"),
        ([row("q", merges=False)], 12, "No record of such a method has another number of tasks than 8", "TIES"),
        ([merged("TIES", 0.7)], 8, "The records are of 8 tasks (images: vit), models of 86 MB", "keeps 87.0"),
    ],
)
def test_the_text_says_how_far_records_carry(entries, tasks, said, unsaid):
    evidence = of(*entries, courses=(COURSE,))
    found = answer(evidence, Question(tasks=tasks, kilobytes=5000))
    text = advice.text(found, evidence, "here")
    assert said in text and unsaid not in text.partition("How far")[2]


def test_the_text_names_needs_records_rivals_and_other_fine_tunes():
    entries = [
        row("a", 0.95, finetune="lora", options=("byom=a", "finetune=lora", "finetune.rank=64"), seeds=(0, 1)),
        row("b", 0.945, finetune="lora", options=("byom=b", "finetune=lora")),
        merged("m", 0.7, finetune="lora", lower=None, upper=None),
        row("c", 0.99),
    ]
    evidence = of(*entries)
    found = answer(evidence, Question(finetune="lora", kilobytes=1000, inputs=frozenset({"labelled"})))
    text = advice.text(found, evidence, "here")
    for said in (
        "8 LoRA fine-tunes, at most 1,000 kB per task, labelled inputs, the task known at inference",
        "95.0 [94.0, 96.0]",
        "70.0 [—]",
        "byom run suite=images byom=a finetune=lora finetune.rank=64",
        "byom why images a relative results=results/methods   (ofa)",
        "a scores highest of what fits: 95.0 % on images",
        "It stores 1,000 kB for each task beside one shared model: a little.",
        "b (94.5 % on images; 1,000 kB per task), is not told apart from it on images",
        "The fine-tunes are of finetune=lora finetune.rank=64",
        "2 methods and variants were measured on full fine-tunes alone",
        "Some rows are means over several seeds and others are of one",
    ):
        assert said in text, said


def test_a_size_reads_as_a_size():
    assert [number(size) for size in (0, 5.26, 10.78, 99.6, 2694.56)] == ["0", "5.3", "11", "100", "2,695"]
    assert number(2695, plain=True) == "2695"


def score(hits: list[int]) -> TaskScore:
    return TaskScore("accuracy", float(np.mean(hits)), len(hits), np.packbits(hits).tobytes().hex())


def test_the_interval_of_a_ratio_is_paired_and_is_that_of_plain_resampling():
    rng = np.random.default_rng(0)
    own = [(rng.random(300) < 0.9).astype(int) for _ in range(2)]
    ours = [a * (rng.random(300) < 0.8) for a in own]
    pairs = [({"t": score(list(a))}, {"t": score(list(b))}) for a, b in zip(ours, own, strict=True)]
    places = rng.integers(300, size=(4000, 300))
    plain = np.mean([a[places].mean(1) / b[places].mean(1) for a, b in zip(ours, own, strict=True)], axis=0)
    assert relative_interval(pairs) == pytest.approx(np.percentile(plain, [2.5, 97.5]), abs=0.004)
    assert relative_interval([(pair[1], pair[1]) for pair in pairs]) == (1.0, 1.0)
    nothing = {"t": score([0] * 300)}
    assert np.isnan(relative_interval([(pairs[0][0], nothing)])).all()


def test_the_interval_of_correlations_is_of_their_ratio(monkeypatch):
    monkeypatch.setattr("byom.report.bootstrap.RESAMPLES", 40)
    labels = tuple(float(i % 2) for i in range(60))
    ours = TaskScore(
        "matthews", 0.8, 60, predictions=tuple(float((i + (i % 10 == 0)) % 2) for i in range(60)), labels=labels
    )
    own = TaskScore("matthews", 1.0, 60, predictions=labels, labels=labels)
    lower, upper = relative_interval([({"t": ours}, {"t": own})])
    assert 0.6 < lower < 0.8 < upper < 1


CELLS = [synthetic.record("pretrained", kind, 0) for kind in ("none", "single_task")]
CELLS += [synthetic.record("ties", "none", 0), synthetic.record("ties", "fft", 0, 0.05)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Records of four cells in the oldest shape, of one seed."""
    results = tmp_path_factory.mktemp("results")
    synthetic.write(results, CELLS)
    return results


def test_own_records_are_read_and_old_ones_say_what_a_task_takes(made, capsys, monkeypatch):
    monkeypatch.setattr("byom.cli.evidence.options_of", lambda row: (f"merge={row.merge}", f"byom={row.variant}"))
    assert main(["recommend", f"results={made}", "kilobytes=10000", "inputs=labelled"]) == 0
    text = capsys.readouterr().out
    (best,) = (one for one in synthetic.tables(CELLS).rows if one.kind == "fft")
    assert f"Evidence: 4 records of {made.as_posix()}." in text
    assert f"1  {best.named}" in text and f"results={made.as_posix()}" in text
    record = best.records[0]
    each = (record.storage.bytes - 4 * synthetic.SIZE) / 8
    assert f"It stores {each / 1000:,.0f} kB for each task beside one shared model" in text
    assert "validation inputs chose merge.scale=0.3 among 10 settings" in text


def test_bytes_that_no_record_tells_apart_are_refused():
    one = Record.lift(synthetic.record("ties", "fft", 0, 0.1))
    assert record_bytes(one, [4 * synthetic.SIZE])[0] == 4 * synthetic.SIZE
    with pytest.raises(ByomError, match="does not say what it stores for each task"):
        record_bytes(one, [])


def test_the_evidence_is_that_of_the_committed_records(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert COMMITTED.digest == digest(experiment.folders()), "run python -m experiments.evidence"
    assert FILE.is_relative_to(Path(byom.__file__).parent)  # so that wheels have it
    assert Evidence(**vars(COMMITTED)).text() == FILE.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("results", "suite", "backbone"),
    [("results", "vision8_offline", "vit_small_dinov2"), ("results/methods", "text8_offline", "minilm")],
)
def test_entries_are_what_today_is_made_of_their_rows(results, suite, backbone, monkeypatch):
    monkeypatch.chdir(ROOT)
    tables = Tables(read_runs(Path(results), suite, backbone))
    held = {one.row: one for one in COMMITTED.entries if (one.results, one.suite) == (results, suite)}
    assert held and {one.named for one in tables.rows} >= set(held)
    some = sorted(held, key=lambda name: -held[name].relative)[:: len(held) // 2 + 1]
    for one in (one for one in tables.rows if one.named in some):
        assert entry(one, tables, results, _command(one)) == held[one.named]


def test_options_run_the_very_cell(monkeypatch):
    monkeypatch.chdir(ROOT)
    for results, name in (("results/methods", "svc+none*"), ("results", "ties+fft*"), ("results/lora/full", "*lora*")):
        file = sorted((ROOT / results / "runs" / "vision8_offline" / "vit_small_dinov2").glob(f"{name}.json"))[0]
        record = Record.read(file)
        (one,) = rows([record])
        evaluate = f"evaluate={'both' if len(record.scores) == 2 else 'test'}"
        again = ["suite=vision8_offline", *options_of(one), evaluate, f"seed={record.choices.seed}"]
        assert config.settings(again).signature() == record.signature


def test_a_row_of_an_option_that_is_not_here_is_run_as_it_was_typed():
    one = synthetic.record("ties", "novel", 0)
    one["overrides"] = ["suite=vision8_offline", "merge=ties", "byom=novel", "byom.kilobytes=90", "seed=0", "results=x"]
    (novel,) = rows([Record.lift(one)])
    assert options_of(novel) == ("merge=ties", "byom=novel", "byom.kilobytes=90")
    assert _command(novel).stores == "" and not _command(novel).apart


QUESTIONS = (
    "tasks=8 finetune=full kilobytes=300 inputs=none task_known=true suite=vision8_offline",
    "finetune=lora kilobytes=300 tasks=4",
    "kilobytes=5000 inputs=unlabelled task_known=false tasks=12",
    "inputs=[labelled,test] show=1",
)


@pytest.mark.parametrize("question", QUESTIONS)
def test_every_command_that_is_printed_is_one(question, capsys):
    assert main(["recommend", *question.split()]) == 0
    text = capsys.readouterr().out
    lines = [line.split("   (")[0].split() for line in text.splitlines() if re.match(r"  (laboratory|folders) ", line)]
    assert lines
    for command in (shlex.split(" ".join(line[1:])) for line in lines):
        assert command[0] == "byom"
        if command[1] == "run" or command[3].startswith("suite="):
            config.settings([each for each in command[2:] if "=" in each])
        else:
            folders.requested(given.options(command[3:]), packs=command[1] == "pack")
    for suite, name in re.findall(r"byom why (\S+) ('[^']+'|\S+) relative", text):
        assert any(one.suite == suite and one.row == name.strip("'") for one in COMMITTED.entries)


def test_every_figure_is_in_the_evidence(capsys):
    assert main(["recommend", "kilobytes=3000"]) == 0
    shown = {
        round(100 * value, 1) for one in COMMITTED.entries for value in (one.relative, one.lower, one.upper) if value
    }
    table = capsys.readouterr().out.partition("-----\n")[2].partition("\n\n")[0]
    found = [float(text) for text in re.findall(r"\d+\.\d", table)]
    assert found and set(found) <= shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tasks=1"], "tasks=1 is no whole number from 2 on"),
        (["tasks=many"], "tasks=many is no whole number"),
        (["kilobytes=-1"], "kilobytes=-1 is no size"),
        (["kilobytes=nan"], "kilobytes=nan is no size"),
        (["inputs=foo"], "inputs=foo is not known; use none, unlabelled, labelled or test"),
        (["inputs=[none,test]"], "inputs lists none among others"),
        (["inputs="], "inputs= is not known"),
        (["finetune=ia3"], "finetune=ia3 is not known; use full or lora"),
        (["task_known=maybe"], "task_known=maybe is not known"),
        (["kilobyte=3"], "there is no option 'kilobyte' here; did you mean 'kilobytes'"),
        (["recipe=x.yaml"], "there is no option 'recipe' here"),
        (["show=0"], "show=0 is no whole number from 1 on"),
        (["results=nowhere"], "nowhere holds no finished record of a run"),
        (["kilobytes=300", "task_known=false", "merged_alone=false"], "merged_alone=true"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, said, capsys):
    assert main(["recommend", *arguments]) == 1
    text = capsys.readouterr().err
    assert said in text and text.count("\n") == 1


def test_help_lists_the_command_and_each_of_its_options(capsys):
    assert "\n  recommend  what to use when" in HELP
    assert main(["recommend", "--help"]) == 0
    text = capsys.readouterr().out
    for option in recommend.OPTIONS:
        assert re.search(rf"^  {option}=", text, re.M), option
    stated = dict(re.findall(r"^  (\w+)=(\S+)", text, re.M))
    asked = {name: value for name, value in stated.items() if name not in ("results", "show")}
    assert recommend.question(asked) == recommend.question({}) == Question()


def test_a_damaged_file_of_evidence_is_named(tmp_path):
    for text in ("{", "{}", '{"format": 99}', json.dumps({"format": 1, "entries": [{"suite": "x"}]})):
        (tmp_path / "evidence.json").write_text(text, encoding="utf-8")
        with pytest.raises(ByomError, match="install byom again"):
            Evidence.read(tmp_path / "evidence.json")


def test_the_readme_names_what_scores_highest():
    """The names in the README's two sentences, found in the evidence by other means than the command's."""
    part = (ROOT / "README.md").read_text(encoding="utf-8").split("<!-- what-to-use -->")[1].split("<!--")[0]
    scores: dict[tuple, dict[str, float]] = {}
    for one in COMMITTED.entries:
        stored = one.each or one.shared or one.kind == "pretrained"
        if one.finetune == "full" and not (stored or one.inputs or one.searched or one.members > 1):
            scores.setdefault(one.options, {})[one.suite] = one.relative
    both = {options: sum(values.values()) for options, values in scores.items() if len(values) == 2}
    best = max(both, key=lambda options: both[options])
    assert f"one model from weights alone, `{' '.join(o for o in best if o != 'byom=none')}`" in " ".join(part.split())
    for quoted in re.findall(r"`((?:merge|byom)=[^`]+)`", part):
        assert any({*quoted.split()} == {*one.options} - {"byom=none"} for one in COMMITTED.entries), quoted


def test_the_evidence_needs_no_file_of_the_repository(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["recommend", "kilobytes=300"]) == 0
    assert "which is installed with byom" in capsys.readouterr().out
    assert not any(tmp_path.iterdir())
