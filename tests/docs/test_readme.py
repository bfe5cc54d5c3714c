"""Every command and every Python block of the README runs, and its generated parts are current."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from byom.__main__ import main
from byom.checkpoint.adapters.adapter import Adapter
from byom.checkpoint.bundle import Bundle
from byom.storage.parts import Choices
from byom.weights import Weights
from tests.e2e.tiny import overrides
from tests.folders.architectures import opened, saved

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
LORA = (ROOT / "docs" / "lora.md").read_text()
RECIPES = ("adapters", "full", "rank1", "ia3", "bottleneck")


def blocks(kind, page=README):
    return re.findall(rf"```{kind}\n(.*?)```", page, re.S)


def commands():
    lines = [line.split("  #")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line]


BYOM = [line for line in commands() if line.startswith("byom ")]
FOLDERS = [line for line in BYOM if line.split()[1] in ("merge", "pack", "unpack", "serve")]
MAKE = [line for line in commands() if line.startswith("make ")]


def test_every_command_is_covered():
    assert sorted(BYOM + MAKE) == sorted(commands())
    assert {"make demo", "make test"} <= set(MAKE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("readme")


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize("line", [line for line in BYOM if line not in FOLDERS])
def test_a_byom_command_runs(line, folder, capsys):
    arguments = shlex.split(line)[1:]
    if arguments[0] in ("run", "-m"):
        arguments += overrides(folder)
    if arguments[0] in ("table", "report"):
        scratch = folder / "committed" / "scratch"
        shutil.copytree(
            ROOT / "results" / "runs" / "vision8_offline", scratch / "runs" / "vision8_offline", dirs_exist_ok=True
        )
        arguments += [f"results={scratch}"]
    assert main(arguments) == 0, capsys.readouterr().err


def test_the_commands_on_folders_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    saved("roberta", tmp_path, "ab")
    for expert, name in (("a", "cars"), ("b", "svhn")):
        (tmp_path / expert).rename(tmp_path / name)
    served = []
    monkeypatch.setattr("byom.cli.server.serve", lambda arguments: served.append(arguments) or 0)
    for line in FOLDERS:
        assert main(shlex.split(line)[1:]) == 0, capsys.readouterr().err
    assert opened("roberta", tmp_path / "merged")[1]["missing_keys"] == set()
    assert opened("roberta", tmp_path / "cars_again")[1]["missing_keys"] == set()
    assert served == [["bundle"]]


@pytest.mark.parametrize("line", MAKE)
def test_a_make_target_exists(line):
    done = subprocess.run(["make", "-n", *shlex.split(line)[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_ci_calls_the_test_command_of_the_readme():
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_make_help_lists_the_two_commands():
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "make demo" in shown and "make test" in shown


def test_the_python_block_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    for name in ("pretrained", "cars", "svhn"):
        Weights.of({"w": torch.randn(8, 6, generator=generator), "b": torch.randn(6, generator=generator)}).save(name)
    names: dict = {}
    exec(compile(blocks("python")[0], "README.md", "exec"), names)
    theta_0, cars = Weights.open("pretrained"), Weights.open("cars")
    kept = sum(int((names["cars"][n] == cars[n]).sum()) for n in cars)
    assert kept >= int(0.1 * cars.numel)
    expected = theta_0 + 0.3 * sum(Weights.open(t) - theta_0 for t in ("cars", "svhn"))
    assert all(torch.equal(Weights.open("task_arithmetic")[n], expected[n]) for n in expected)


def test_the_python_block_on_adapters_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    Weights.of({"layer.weight": torch.randn(8, 6, generator=generator)}).save("pretrained")
    for task in ("cars", "svhn"):
        factors = {"A": torch.randn(5, 6, generator=generator), "B": torch.randn(8, 5, generator=generator)}
        named = {f"base_model.model.layer.lora_{k}.weight": tensor for k, tensor in factors.items()}
        Path(f"{task}-lora").mkdir()
        save_file(named, f"{task}-lora/adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 5, "lora_alpha": 10, "target_modules": ["layer"]}
        Path(f"{task}-lora/adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    exec(compile(blocks("python", LORA)[0], "lora.md", "exec"), {})
    base, small = Weights.open("pretrained"), Bundle.open("small")
    for task in ("cars", "svhn"):
        product = (Adapter.open(f"{task}-lora").on(base) - base)["layer.weight"]
        left = (small.weights(task) - Adapter.open(f"{task}-lora").on(base))["layer.weight"]
        values = torch.linalg.svdvals(product)
        assert torch.linalg.matrix_norm(left) == pytest.approx(float(values[4]), rel=1e-3)


ROOTS = ["results"]
ROOTS += [f"results/{name}" for name in ("methods", "budget", "budget_choices", "flex")]
ROOTS += [f"results/lora/{recipe}" for recipe in RECIPES]


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("suite", ["vision8_offline", "text8_offline"])
def test_committed_tables_are_those_of_the_committed_records(suite, root, tmp_path, monkeypatch):
    if root != "results":  # figures are not compared, and take most of the time
        monkeypatch.setattr("byom.report.figures.suite.save_all", lambda *_: [])
        monkeypatch.setattr("byom.report.figures.methods.accuracy_by_method", lambda *_: None)
        monkeypatch.setattr("byom.report.figures.style.save", lambda *_: [])
    shutil.copytree(ROOT / root / "runs" / suite, tmp_path / "runs" / suite)
    assert main(["report", f"suite={suite}", f"results={tmp_path}"]) == 0
    made = sorted((tmp_path / "tables").iterdir())
    assert made
    for file in made:
        assert file.read_bytes() == (ROOT / root / "tables" / file.name).read_bytes(), file.name


def test_committed_records_come_from_committed_code():
    folders = [ROOT / "results" / name for name in ("runs", "methods", "budget", "budget_choices", "previews", "lora")]
    for path in [path for folder in folders for path in folder.rglob("*.json")]:
        provenance = json.loads(path.read_text())["provenance"]
        assert provenance["commit"] and not provenance["dirty"], path


def test_the_tables_list_every_method_and_variant():
    page = (ROOT / "docs" / "methods.md").read_text()
    for group in ("merge", "byom", "router"):
        for option in sorted((ROOT / "conf" / group).glob("*.yaml")):
            assert f"| [`{option.stem}`](../byom/" in page, option.stem


def test_the_readme_is_one_screen_and_its_table_nine_rows():
    assert len(README.encode()) <= 9216
    table = README.split("<!-- headline -->")[1].split("<!-- /headline -->")[0]
    assert table.count("\n| ") == 1 + 9


def test_the_generated_parts_are_current():
    from experiments.readme import PAGES, fill

    for page in PAGES:
        assert fill(page.read_text()) == page.read_text(), page.name


def test_bytes_per_task_have_their_part_of_a_second_model_that_tasks_share():
    """EMR-Merging keeps the pre-trained and the unified model; BYOM-FFT keeps the merged one alone."""
    from byom.report.report import Tables, read_runs
    from experiments.bytes_per_task import ROOT as budget
    from experiments.bytes_per_task import kilobytes

    rows = Tables(read_runs(budget, "vision8_offline", "vit_small_dinov2")).rows
    sizes = {row.named: (kilobytes(row, rows) * 1000, row.records[0].storage) for row in rows}
    model = sizes["ASWUDI (rest mean)"][1].bytes
    for name, second in (("EMR-Merging", model), ("BYOM-FFT on TIES, 1 %", 0)):
        size, storage = sizes[name]
        assert size == pytest.approx((second + sum(storage.task_bytes.values())) / 8, rel=1e-3), name


def test_the_page_of_proofs_lists_every_option_and_no_failure():
    proved = (ROOT / "docs" / "verification.md").read_text()
    for group in ("merge", "byom", "router"):
        for option in sorted((ROOT / "conf" / group).glob("*.yaml")):
            assert f"| `{option.stem}` |" in proved, option.stem
    assert "failed**" not in proved and "(0 failed)" in proved.replace("\n", " ")


FOR_ADAPTERS = {"core_space"}
"""Methods that the sweep leaves out: of fully fine-tuned models they are another method in rotated coordinates."""


@pytest.mark.parametrize("suite", ["vision8_offline", "text8_offline"])
def test_the_sweep_over_all_methods_has_every_method_and_variant(suite):
    records = [json.loads(path.read_text()) for path in (ROOT / "results/methods/runs" / suite).glob("*/*.json")]
    done = [Choices.lift(record["choices"]).named for record in records if record["status"] == "done"]
    every = {path.stem for path in (ROOT / "conf/merge").glob("*.yaml")}
    assert {choice["merge"] for choice in done} == every - FOR_ADAPTERS
    assert {choice["byom"] for choice in done} == {path.stem for path in (ROOT / "conf/byom").glob("*.yaml")}
    assert all(record["cost"] and record["needs"]["words"] for record in records)


def test_nothing_is_left_to_fill_in():
    assert "@@" not in README
