"""The public names, and names of earlier versions in users' code, configurations and records."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.utils import get_object

import byom
from byom.cli import config

ROOT = Path(byom.__file__).parents[1]
NAMED = (  # in README, docs, notebooks and docstrings of earlier versions
    "byom.adapter.Adapter", "byom.anatomy.conflicts", "byom.anatomy_figures", "byom.bundle.Bundle",
    "byom.checkpoint.read", "byom.combine.cat", "byom.config", "byom.data", "byom.figure_style",
    "byom.finetune.Full", "byom.finetune.base.Recipe", "byom.finetune.bottleneck.Bottleneck",
    "byom.finetune.full.Full", "byom.finetune.ia3.Ia3", "byom.finetune.lora.Lora", "byom.finetune.loop",
    "byom.fused.split", "byom.heads.Answers", "byom.logger.Console", "byom.logger.Wandb", "byom.lowrank.Adapted",
    "byom.merge.base.Problem", "byom.metric.METRICS", "byom.needs.Needs", "byom.packed.Delta", "byom.probe.Probe",
    "byom.router.knn.NearestNeighbours", "byom.router.mlp.Perceptron", "byom.router.oracle.Oracle",
    "byom.run.Evaluation", "byom.run.Settings", "byom.seeding.keyed", "byom.source.archive.Archive",
    "byom.source.base", "byom.source.idx.Idx", "byom.source.images.ImageFolder", "byom.source.package.Package",
    "byom.source.pixels.Pixels", "byom.source.table.ImageTable", "byom.source.table.Table", "byom.suite.Suite",
    "byom.suite.Task", "byom.targets.WORDS", "byom.tune.AsGiven", "byom.tune.Validation",
)  # fmt: skip


def python(*lines):
    return subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=ROOT, check=False).returncode


def targets(node):
    if isinstance(node, dict):
        yield from ([node["_target_"]] if "_target_" in node else ())
        node = list(node.values())
    for each in node if isinstance(node, list) else ():
        yield from targets(each)


@pytest.mark.parametrize("name", NAMED)
def test_a_documented_name_of_an_earlier_version_is_found(name):
    assert get_object(byom.moved(name)) is not None


def test_every_target_of_the_committed_records_is_found():
    files = sorted((ROOT / "results").rglob("runs/**/*.json"))
    names = {name for file in files for name in targets(json.loads(file.read_text()))}
    assert len(names) > 50 and "byom.finetune.Full" in names
    for name in sorted(names):
        assert isinstance(get_object(byom.moved(name)), type), name


def test_configurations_of_earlier_versions_build():
    from byom.pipeline.settings import Evaluation

    node = {"_target_": "byom.run.Evaluation", "splits": ["test"]}
    assert config.made(node) == config.made(node | {"_convert_": "all"}) == Evaluation(("test",))


def test_importing_the_package_is_quick_and_imports_no_torch():
    assert (
        python(
            "import time; start = time.perf_counter()",
            "import byom, sys; byom.__all__",
            "sys.exit(time.perf_counter() - start > 0.2 or 'torch' in sys.modules or 'hydra' in sys.modules)",
        )
        == 0
    )


def test_run_is_a_function_and_its_earlier_module_is_still_importable():
    function = "from byom import run; assert callable(run) and run is byom.run"
    module = "from byom.run import Evaluation, Settings; import byom.run; assert callable(byom.run)"
    lines = [module, function]  # the other order is that of the tests here
    check = "assert sys.modules['byom.run'].metric and Evaluation.__module__ == 'byom.pipeline.settings'"
    assert python("import byom, sys", *lines, *reversed(lines), check, "assert byom.run.__name__ == 'run'") == 0


def test_errors_can_be_caught_by_their_public_name():
    with pytest.raises(byom.ByomError, match="did you mean 'ties'"):
        byom.run(["merge=tie"])
