"""Adapters from training to export through the whole pipeline, on two small tasks of real data."""

from __future__ import annotations

import json
import weakref

import pytest
import torch

from byom.__main__ import main
from byom.checkpoint.adapters.adapter import Adapter
from byom.cli import config
from byom.data.source.base import DataError
from byom.pipeline.cell import Cell
from byom.pipeline.labs import laboratory
from byom.pipeline.run import run
from byom.variants.base.delta import Served
from byom.weights.lowrank import Adapted
from tests.e2e.tiny import KEPT, overrides

pytestmark = pytest.mark.data
LORA = ["finetune=lora", "finetune.rank=4", "evaluate=test"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("lora")


@pytest.fixture(scope="module")
def settings(folder):
    def make(*options):
        return config.settings([*overrides(folder, "scratch"), *options])

    try:
        run(make(*LORA, "merge=pretrained", "byom=none"))
    except DataError as error:
        pytest.skip(str(error))
    return make


def adapter_values(settings):
    lab = laboratory(settings)
    experts = {task: lab.expert(task) for task in KEPT}
    assert all(isinstance(expert, Adapted) for expert in experts.values())
    pieces = [p for e in experts.values() for found in e.factored.values() for p in found]
    return sum(p.left.numel() + p.right.numel() for p in pieces) // len(KEPT)


def test_single_task_stores_the_adapters_beside_one_model(settings):
    made = settings(*LORA, "byom=single_task")
    record, held = run(made), adapter_values(made)
    assert set(record["storage"]["task_parameters"].values()) == {held}
    assert record["storage"]["parameters"] == record["storage"]["model_parameters"] + len(KEPT) * held
    assert record["summary"]["test"]["normalised"] == pytest.approx(1.0)


def test_every_direction_kept_scores_as_the_adapters_do(settings):
    own = run(settings(*LORA, "byom=single_task"))
    kept = run(settings(*LORA, "byom=lora", "byom.rank=4"))
    assert kept["summary"] == own["summary"]
    assert all(row["dropped"] <= 1e-4 * row["to_pretrained"] for row in kept["norms"].values())


def test_a_lower_rank_keeps_less_and_counts_as_the_paper_does(settings):
    rows = {q: run(settings(*LORA, "byom=lora", f"byom.rank={q}")) for q in (1, 2, 4)}
    dropped = [row["norms"]["mnist"]["dropped"] for row in rows.values()]
    assert dropped == sorted(dropped, reverse=True) and dropped[0] > 10 * dropped[2]
    held = {q: row["storage"]["task_parameters"]["mnist"] for q, row in rows.items()}
    full = adapter_values(settings(*LORA))
    matrices = 6 * 4  # blocks of test_vit, and query, key, value, out
    assert held == {q: q * full // 4 + q * matrices for q in held}


@pytest.mark.parametrize("merge", ["average", "ties", "knots"])
def test_merge_methods_take_adapters(settings, merge):
    assert run(settings(*LORA, f"merge={merge}", "byom=none"))["status"] == "done"


def test_a_merged_reference_is_another_cell(settings):
    near = run(settings(*LORA, "merge=average", "byom=lora", "byom.reference=merged", "byom.rank=2"))
    far = run(settings(*LORA, "byom=lora", "byom.rank=2"))
    assert (near["choices"]["merge"], far["choices"]["merge"]) == ("average", "pretrained")
    assert near["signature"] != far["signature"]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["ia3", "bottleneck"])
def test_other_recipes_run_and_store_what_they_add(settings, recipe):
    record = run(settings(f"finetune={recipe}", "evaluate=test", "byom=single_task"))
    blocks, d, hidden = 6, 64, 192
    counts = {"ia3": blocks * (2 * d + hidden), "bottleneck": blocks * 2 * 16 * (2 * d + 1)}
    assert set(record["storage"]["task_parameters"].values()) == {counts[recipe]}
    assert run(settings(f"finetune={recipe}", "evaluate=test", "merge=average", "byom=none"))["status"] == "done"


def test_the_other_scores_do_not_change_when_a_process_switches_recipes(settings):
    first = run(settings(*LORA, "byom=lora", "byom.rank=1"))
    run(settings("finetune=ia3", "evaluate=test", "byom=single_task"))
    again = Cell(settings(*LORA, "byom=lora", "byom.rank=1")).served
    assert isinstance(again, Served)
    assert again.deltas["mnist"].stored_parameters == first["storage"]["task_parameters"]["mnist"]


def test_export_writes_adapters_that_read_back(settings, folder, capsys):
    options = [*overrides(folder, "scratch"), *LORA, "byom=lora", "byom.rank=2"]
    assert main(["export", str(folder / "out"), *options]) == 0
    assert capsys.readouterr().out.count("rank 2") == len(KEPT)
    cell = Cell(settings(*LORA, "byom=lora", "byom.rank=2"))
    lab, served = cell.lab, cell.served
    for task in KEPT:
        read, wanted = Adapter.open(folder / "out" / task).on(lab.pretrained), served.weights(task)
        assert all(torch.allclose(read[name], wanted[name], atol=1e-6) for name in wanted)
    assert json.loads((folder / "out" / "export.json").read_text())["tasks"].keys() == set(KEPT)
    assert main(["export", str(folder / "out"), *options]) == 0  # an earlier export is replaced


def test_pack_writes_a_bundle(folder, settings):
    from byom.checkpoint.bundle import Bundle

    assert main(["pack", str(folder / "bundle"), *overrides(folder, "scratch"), *LORA, "byom=lora", "byom.rank=2"]) == 0
    served = Cell(settings(*LORA, "byom=lora", "byom.rank=2")).served
    packed = Bundle.open(folder / "bundle")
    assert all(torch.equal(packed.weights("mnist")[n], served.weights("mnist")[n]) for n in packed.reference)
    _require_servable(folder / "bundle", settings)


def _require_servable(bundle, settings):
    """Hold that what is served predicts as the lab does."""
    from byom.serving.open import open_bundle
    from byom.serving.options import Options

    cell, model = Cell(settings(*LORA, "byom=lora", "byom.rank=2")), open_bundle(bundle, Options(device="cpu"))
    for task in KEPT:
        split = cell.lab.splits(task)["test"]
        model.switch(task)
        found = model.predict([{"pixels": split.inputs["pixels"][place : place + 1]} for place in range(len(split))])
        hits = [
            cell.lab.tasks[task].classes.index(one["label"]) == int(n)
            for one, n in zip(found, split.labels, strict=True)
        ]
        assert sum(hits) / len(hits) == cell.lab.score(task, cell.served.weights(task), "test").value


@pytest.mark.parametrize("option", ["fft", "tall_mask", "emr"])
def test_pack_packs_every_task_once_and_holds_what_is_written_besides(folder, settings, monkeypatch, capsys, option):
    from byom.checkpoint.bundle import Bundle
    from byom.variants.base import PackingVariant

    chosen, packed, alive, most = [*LORA, "merge=ties", f"byom={option}"], [], [], []
    expected = Cell(settings(*chosen)).served
    pack = PackingVariant.delta

    def watched(self, *given):
        made = pack(self, *given)
        alive.append(weakref.ref(made))
        packed.append(made.nbytes)
        most.append(sum(each() is not None for each in alive))
        return made

    monkeypatch.setattr(PackingVariant, "delta", watched)
    assert main(["pack", str(folder / option), *overrides(folder, "scratch"), *chosen]) == 0
    opened, said = Bundle.open(folder / option), capsys.readouterr().out
    assert len(packed) == (0 if option == "emr" else len(KEPT)) and max(most, default=1) <= 2
    for task in KEPT:
        assert opened.weights(task).fingerprint() == expected.weights(task).fingerprint()
        assert f"{expected.deltas[task].nbytes:,} bytes" in said
