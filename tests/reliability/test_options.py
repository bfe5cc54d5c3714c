"""Options as people type them, and what they alone show to be impossible, before any work."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from byom.__main__ import main
from byom.backbone.clip import Clip
from byom.cli import config, serve, sweeps
from byom.cli.overrides import quoted, read
from byom.data.source.table import Table
from byom.data.suite import Suite, Task
from byom.errors import CheckpointError, DataError, OptionError
from byom.experts.files import Files
from byom.experts.hub import Hub
from byom.pipeline import cell
from byom.pipeline.checks import require_exportable, require_possible
from byom.pipeline.device import resolve

TEXTS = [
    "x/{task}", "{task}", "{task}/model.pt", "a b/{task}", "a,b/{task}", "x=y/{task}", "~/m/{task}", "C:\\m\\{task}",
    "\\\\server\\share\\{task}", "\\\\server\\share", "süß/模型/{task}", "it's/{task}", 'say "x"/{task}',
    "a\\'b/{task}",
    "[a]/{task}", "(a)/{task}", "x#/{task}", "a&b;c!/{task}", "x/{task}\\", "x/{task}'", "<x>|{task}?*",
    "Is {text} good, or bad? a=b", "{a} and {b}", "'{a}' and '{b}'.", "100 % {x}\n{y}",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_need_not_be_quoted_twice(text):
    assert read(quoted(f"experts.path_of={text}")).value() == text
    assert quoted(quoted(f"+note={text}")) == quoted(f"+note={text}")


READ = [
    "merge=average,ties", "byom.density=0.1,0.2", "x=choice(a,b)", "x=range(1,3)", "x='a, b'", 'x="{task}"', "x=[a,b]",
    "x={a:1}", "x=a b", "~x", "+x=1", "++x.y=null", "x=${seed}", "hydra/launcher=joblib", "x=C:\\m", "x=", "~x.y=1",
]  # fmt: skip


@pytest.mark.parametrize("override", READ)
def test_what_hydra_reads_keeps_its_meaning(override):
    assert quoted(override) == override


def test_commas_in_paths_that_hydra_reads_still_sweep():
    assert [c for [c] in sweeps.cells([""], ["data.root=x/a,x/b"])] == ["data.root=x/a", "data.root=x/b"]
    assert sweeps.cells(["experts.path_of=x/{task}"], []) == [["experts.path_of='x/{task}'"]]
    parts = sweeps.fitting(["byom=none,fft", "byom.density=0.1", "note=~x"])
    assert {"note='~x'"} == {o for part in parts for o in part if o.startswith("note")}


BROKEN = [
    ("templates=[a photo of {}]", "value of templates cannot be read as a list"),
    ("x.names={a: 'b}", "value of x.names cannot be read as a mapping"),
    ("seed=range(1,,3)", "value of seed cannot be read as a function"),
    ("note='it's'", "value of note cannot be read as a quoted text"),
    ("experts.path_of", "'experts.path_of' is no option"),
    ("=x", "'=x' is no option"),
    ("a b=x{", "'a b=x{' is no option"),
]


@pytest.mark.parametrize(("override", "said"), BROKEN)
def test_what_cannot_be_read_is_named(override, said):
    with pytest.raises(OptionError, match=said):
        quoted(override)


@pytest.fixture(autouse=True)
def any_data(monkeypatch):
    monkeypatch.setattr(Suite, "available", lambda suite: suite)


SAID = [
    (["backbone=llama/base"], r"no backbone=llama/base; did you mean 'flan_t5_base'\? Known: clip_vit_b16"),
    (["backbone=clip/"], "no backbone=clip/; Known: clip_vit_b16"),
    (["merge="], "no merge=; Known: adamerging"),
    (["merge=average,ties"], "merge=average,ties gives several values where one is taken"),
    (["seed=range(0,3)"], "seed=range.0,3. gives several values"),
    (["~merge"], "~merge leaves no merge"),
    (["seed=1 2"], "seed='1 2' is not a whole number"),
]


@pytest.mark.parametrize(("overrides", "said"), SAID)
def test_a_mistake_names_the_option_and_what_is_known(overrides, said):
    with pytest.raises(OptionError, match=said):
        config.settings(overrides)


def test_a_path_with_braces_reaches_its_option(tmp_path):
    options = ["experts=files", "experts.family=f", f"experts.path_of=~/x y/{{task}}, süß={tmp_path}"]
    assert config.settings(options).experts.path_of == options[-1].partition("=")[2]


@pytest.mark.parametrize("text", ["{seed}/{task}", "{task", "}{task}", "{}/{task}", "x", None, 5])
def test_braces_that_nothing_is_put_into_are_refused(text):
    with pytest.raises(OptionError, match=r"experts.path_of=.*(brace|only|must have|cannot be read)"):
        Files("f", text)
    if isinstance(text, str) and text != "x":
        with pytest.raises(OptionError, match="experts.repositories"):
            Hub("f", {"*": text})
        with pytest.raises(OptionError, match="experts.file"):
            Hub("f", {"*": "me/x"}, file=text)


def task(**changes):
    return replace(Task("a", Table("x", {"train": "x.csv"}), "image", ("n", "y"), templates=("a {}.",)), **changes)


@pytest.mark.parametrize("template", ["a photo", "a {name}", "a {} or {}", "a {", "a {{}}"])
def test_a_template_that_no_name_fits_is_refused(template):
    with pytest.raises(OptionError, match=r"task a has the template .* one \{\} for"):
        task(templates=("a {}.", template))


@pytest.fixture
def settings(tmp_path):
    base = config.settings([f"cache={tmp_path}/cache", f"results={tmp_path}/results"])
    return lambda *options, **changes: replace(config.settings(options), cache=base.cache, **changes)


@pytest.fixture
def idle(monkeypatch):
    """Fail where any work begins."""
    monkeypatch.setattr(cell.Cell, "__init__", lambda *_: pytest.fail("work began"))


def test_what_options_forbid_is_refused_before_any_work(settings, idle, tmp_path):
    wrong = settings("merge=average", "merge.weights=[1,2]")
    with pytest.raises(OptionError, match=r"merge.weights has 2 values for 8 tasks \(mnist, "):
        require_possible(wrong)
    few = Files("mine", "{task}")
    with pytest.raises(OptionError, match="asks for . experts per task, and mine has one"):
        require_possible(settings("merge=mixture", experts=few))
    clip = settings(backbone=Clip(), suite=Suite("s", (task(templates=()),)))
    with pytest.raises(DataError, match="task 'a' has no templates"):
        require_possible(clip)
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="cannot write the cache to .*file.cache"):
        require_possible(replace(settings(), cache=tmp_path / "file" / "cache"))
    require_possible(settings("merge=average", "merge.weights=[1,2,3,4,5,6,7,8]"))
    with pytest.raises(OptionError, match="device=gpu cannot be used here"):
        resolve("gpu")
    assert str(resolve("cpu")) == "cpu"


@pytest.mark.parametrize("byom", ["fft", "none", "post_pruning", "emr", "twin", "single_task"])
def test_an_export_that_adapters_cannot_hold_trains_nothing(byom, idle, tmp_path, capsys):
    assert main(["export", str(tmp_path / "out"), f"byom={byom}", f"cache={tmp_path}"]) == 1
    assert f"(byom={byom}, finetune=full) has no low-rank difference" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options", [["byom=lora"], ["byom=tsv_compress"], ["byom=single_task", "finetune=lora"], ["byom=single_task", None]]
)
def test_what_adapters_may_hold_is_not_refused(settings, options):
    experts = {} if options[-1] else {"experts": Files("mine", "{task}")}
    require_exportable(settings(*filter(None, options), **experts))


@pytest.mark.parametrize("command", ["pack", "export"])
def test_a_folder_that_cannot_be_written_is_refused_before_any_work(command, idle, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(CheckpointError, match=r"files that byom did not write \(thesis.tex\)"):
        getattr(serve, command)([str(tmp_path / "mine")])
    with pytest.raises(OptionError, match=r"cannot write models to .*thesis.tex.*give a writable folder"):
        getattr(serve, command)([str(tmp_path / "mine" / "thesis.tex" / "deep" / "out")])
    assert not list(tmp_path.glob("*/.*"))


def test_a_table_that_names_no_published_table_runs_no_cell(monkeypatch, idle):
    experiment = SimpleNamespace(published=["nobody"], cells=lambda extra: [["seed=0"]])
    monkeypatch.setattr(sweeps, "experiment", lambda name: experiment)
    with pytest.raises(OptionError, match="no published table 'nobody'"):
        from byom.cli import table

        table.table(["mine"])


def test_a_conversion_of_nothing_loads_no_backbone(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("byom.cli.provision.pretrained", lambda option: pytest.fail("a backbone was loaded"))
    assert main(["convert", str(tmp_path / "none.pt"), str(tmp_path / "out"), "like=clip_vit_b32"]) == 1
    assert "no checkpoint at" in capsys.readouterr().err
    (tmp_path / "some.pt").write_text("")
    assert main(["convert", str(tmp_path / "some.pt"), str(tmp_path / "out"), "like=clip_vit_b32", "to=onnx"]) == 1
    assert "to=onnx; " in capsys.readouterr().err
