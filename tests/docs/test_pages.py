"""The pages of the site: complete, with links that lead somewhere, and commands and Python that exist and run."""

from __future__ import annotations

import json
import re
import shlex
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from byom import Weights
from byom.__main__ import COMMANDS
from experiments.pages import links, method, prose, site
from experiments.pages.formula import FormulaError, tex
from experiments.pages.options import GROUPS, ROOT, options, sections

DOCS = ROOT / "docs"
OPTIONS = [option for group in GROUPS for option in options(group)]
WRITTEN = {path.relative_to(DOCS).as_posix(): path.read_text() for path in sorted(DOCS.rglob("*.md"))}
GROUP = re.compile(r"^(?:\w+[@/])?(merge|byom|router|suite|backbone|finetune|experts|tune|logger|evaluate)=([\w,]+)$")


@pytest.fixture(scope="module")
def made():
    return site.generate()


def blocks(kind, text):
    return re.findall(rf"```{kind}\n(.*?)```", text, re.S)


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: f"{option.group}-{option.name}")
def test_an_option_has_a_page_that_is_complete(option, tmp_path):
    page = method.page(option)
    (tmp_path / f"{option.name}.md").write_text(page)
    if option.group in ("merge", "byom"):
        assert prose.equations(page), "no equation: state one in the docstring, in double backticks"
        assert f"{option.group}={option.name}" in "".join(blocks("bash", page))
    for each in option.fields:
        assert each.text, f"{each.name} is not in Args"
        assert re.search(rf"^\| `\S+\.{each.name}` \| ", page, re.M), each.name
    assert page.startswith(f"# {option.title}\n")
    assert all(f"arxiv.org/abs/{paper}" in page for paper in option.papers)


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: f"{option.group}-{option.name}")
def test_every_formula_of_a_docstring_can_be_read(option):
    for span in re.findall(r"``(.+?)``", option.cls.__doc__ or "", re.S):
        if prose.is_formula(span):
            tex(span, option.symbols)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("theta_0 + scale * sum_t tau_t", r"\theta_{0} + \lambda \cdot \sum_{t} \tau_{t}"),
        ("(1/T) sum_t theta_t", r"\frac{1}{T} \sum_{t} \theta_{t}"),
        ("sum_t F_t a_t / sum_t F_t", r"\frac{\sum_{t} F_{t} a_{t}}{\sum_{t} F_{t}}"),
        ("sum_t a_t / b_t", r"\sum_{t} \frac{a_{t}}{b_{t}}"),
        ("U_k diag(s_k) Vt_k", r"U_{k} \operatorname{diag} \left( s_{k} \right) V_{k}^{\top}"),
        ("floor(m * n)", r"\left\lfloor m \cdot n \right\rfloor"),
        ("round((r - s) / T)", r"\operatorname{round} \left( \frac{r - s}{T} \right)"),
        ("tau_t* + t*", r"\tau_{t^{\ast}} + t^{\ast}"),
        ("||x||^2", r"{\left\lVert x \right\rVert}^{2}"),
        ("tau_uni != 0", r"\tau_{\mathrm{uni}} \ne 0"),
    ],
)
def test_a_formula_becomes_tex(text, expected):
    assert tex(text, {"scale": "lambda"}) == expected


@pytest.mark.parametrize("text", ["a + (b", "|a", "a ? b", "sum_{t", "a / / b", "* a"])
def test_what_is_no_formula_is_refused(text):
    with pytest.raises(FormulaError):
        tex(text)


@pytest.mark.parametrize("text", ["byom=fft", "[T, n]", "float", "*bias*", "merge.scale=1", "visual.norm."])
def test_code_stays_code(text):
    assert not prose.is_formula(text)


def test_no_link_is_broken(made):
    assert made.broken == []


def test_every_entry_of_the_navigation_exists(made):
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("tag:yaml.org,2002:python", lambda *_: None)
    config = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)
    entries = [*_leaves(config["nav"])]
    assert entries and config["strict"]
    for entry in entries:
        assert any(fnmatch(page, entry) for page in made.pages), entry
    ignored = tuple(line.strip("/") for line in config["not_in_nav"].split())
    left = [p for p in made.pages if not p.startswith(ignored) and not any(fnmatch(p, e) for e in entries)]
    assert left == []


def _leaves(entry):
    if isinstance(entry, str):
        yield entry
    for each in entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else ():
        yield from _leaves(each)


def test_the_repository_has_what_its_pages_link():
    for page, text in WRITTEN.items():
        for target in re.findall(links.LINK, re.sub(links.FENCE, "", text)):
            place = target[1].partition("#")[0]
            if place and not re.match(r"[a-z]+:", place):
                where = (DOCS / page).parent / place
                assert where.exists(), f"{page}: {target[1]}"


@pytest.mark.parametrize("page", WRITTEN)
def test_documented_commands_name_what_exists(page):
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    for line in "".join(blocks("bash", WRITTEN[page])).splitlines():
        command, *words = shlex.split(line, comments=True) or [""]
        if command == "make":
            assert words[0] in targets, line
        if command != "byom":
            continue
        assert words[0] in {*COMMANDS, "-m"}, line
        if words[0] in ("table", "plan", "fetch") and words[1] != "NAME":
            assert (ROOT / "conf" / "experiment" / f"{words[1]}.yaml").is_file(), line
        for group, names in filter(None, (GROUP.match(word) and GROUP.match(word).groups() for word in words)):
            for name in names.split(","):
                assert _known(group, name), f"{line}: {group}={name}"


def _known(group, name):
    taught = {("suite", "mine"), ("merge", "median"), ("experts", "files")}
    return (group, name) in taught or (ROOT / "conf" / group / f"{name}.yaml").is_file()


@pytest.mark.parametrize("page", ["start/checkpoints.md", "lora.md"])
def test_documented_python_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    for name in ("pretrained", "cars", "svhn"):
        Weights.of({"layer.weight": torch.randn(8, 6, generator=generator)}).save(name)
    for task in ("cars", "svhn"):
        factors = {"A": torch.randn(5, 6, generator=generator), "B": torch.randn(8, 5, generator=generator)}
        Path(f"{task}-lora").mkdir()
        named = {f"base_model.model.layer.lora_{k}.weight": tensor for k, tensor in factors.items()}
        save_file(named, f"{task}-lora/adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 5, "lora_alpha": 10, "target_modules": ["layer"]}
        Path(f"{task}-lora/adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    found = blocks("python", WRITTEN[page])
    assert found
    for block in found:
        exec(compile(block, page, "exec"), {})


def test_the_page_on_records_has_every_field():
    page = WRITTEN["records.md"]
    known = set()
    for folder in sorted((ROOT / "results").rglob("runs")):
        for path in folder.rglob("*.json"):
            known |= set(re.findall(r'^ "(\w+)":', path.read_text(), re.M))  # indented by one: the record's own
    assert known and all(f"| `{field}` |" in page for field in known)


def test_the_page_on_architecture_has_every_entry_of_the_package():
    listed = re.findall(r"^\| `(\w+(?:/|\.py))` \|", WRITTEN["architecture.md"], re.M)
    there = {f"{path.name}{'/' * path.is_dir()}" for path in (ROOT / "byom").iterdir() if path.name[0] != "_"}
    assert sorted(listed) == sorted(there)


def test_sections_of_a_docstring():
    found = sections("Do it.\n\nMore.\n\nArgs:\n    a: One\n        two.\n\nReferences:\n    Paper.")
    assert found == {"": "Do it.\n\nMore.", "Args": "a: One\n    two.", "References": "Paper."}
