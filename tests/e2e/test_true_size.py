"""Models of true size go from disk to disk in bounded memory."""

import json

import pytest
import torch

from benchmarks import true_models, true_size, true_stages
from benchmarks.peak import Taken, measured
from byom.checkpoint.bundle import Bundle
from byom.cli import config
from byom.functional import compiled
from byom.merge.base import Problem
from byom.merge.base.needs import Needs
from byom.merge.ties import Ties
from byom.storage import tensor_files as storage
from byom.variants.base import PackingVariant
from byom.weights import Weights


def small(tasks: int) -> Problem:
    base = Weights.of({"a": torch.randn(40, 30, generator=torch.Generator().manual_seed(0)), "b": torch.zeros(7)})
    return Problem(base, {f"task{task}": true_models.expert(base, task).materialise() for task in range(tasks)})


def compile_kernels(given: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile what a fresh checkout has not compiled yet, which takes time and memory of its own, once."""
    monkeypatch.setattr(compiled, "LEAST", 0)
    some = {name for name in given.pretrained.mergeable() if len(given.pretrained.shape(name)) == 1}
    part, *parts = (each.select(some.__contains__) for each in (given.pretrained, *given.finetuned.values()))
    few = Problem(part, dict(zip(given.tasks, parts, strict=True)))
    dict(true_size.variant("fft").streamed(few, Ties()(few)).deltas)


@pytest.mark.slow
def test_what_is_packed_when_asked_for_is_what_is_packed_at_once(tmp_path):
    given, variants = small(tasks=3), true_size.every("byom").values()
    reference = Ties()(given).materialise()
    streaming = [v for v in variants if isinstance(v, PackingVariant) and v.needs == Needs()]
    assert len(streaming) > 8
    for variant in streaming:
        at_once, lazy = (serve(given, reference) for serve in (variant.serve, variant.streamed))
        folder = Bundle(lazy.reference, lazy.deltas, lazy.base).save(tmp_path / variant.title)
        opened = Bundle.open(folder)
        for task in given.tasks:
            assert opened.deltas[task].nbytes == at_once.deltas[task].nbytes
            assert opened.weights(task).fingerprint() == at_once.weights(task).fingerprint()


@pytest.mark.parametrize(
    ("name", "embeddings", "rest"), [("roberta_base", 50265, 85_451_520), ("flan_t5_base", 2 * 32128, 198_229_248)]
)
def test_text_models_have_the_published_sizes(name, embeddings, rest):
    with torch.device("meta"):
        model = true_models.MODELS[name].build()
    assert sum(each.numel() for each in model.parameters()) == 768 * embeddings + rest


def test_tensors_of_one_storage_are_copied_only_where_they_overlap():
    whole = torch.arange(12.0)
    given = {"inside": whole[2:4], "first": whole[:6], "second": whole[6:], "again": whole[6:]}
    apart = storage._apart(given)
    assert all(torch.equal(apart[name], given[name]) for name in given)
    kept = {name for name in given if apart[name].data_ptr() == given[name].data_ptr()}
    assert kept in ({"first", "second"}, {"first", "again"})


@pytest.mark.slow
def test_memory_is_that_of_the_work_and_a_slow_stage_is_stopped():
    taken = measured(touched, 50_000_000, 0.0, threads=1, limit=60)
    assert taken.finished and taken.said == {"bytes": 50_000_000}
    assert 50_000_000 <= taken.peak < 80_000_000
    stopped = measured(touched, 1_000, 60.0, threads=1, limit=0.5)
    assert not stopped.finished and stopped.done == 0.25 and 0.5 <= stopped.seconds < 10
    with pytest.raises(RuntimeError, match="touched.* status 1"):
        measured(touched, -1, 0.0, threads=1, limit=60)


def touched(nbytes, seconds, report):
    import time

    held = torch.ones(nbytes, dtype=torch.uint8)
    report(0.25)
    time.sleep(0.05 + seconds)
    return {"bytes": held.nbytes}


class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(24, 32), torch.nn.Tanh(), torch.nn.Linear(32, 16))

    def forward(self, values):
        return self.layers(values)


@pytest.fixture
def here(monkeypatch):
    """Measure a tiny model in this process."""
    inputs = {"values": torch.randn(4, 24, generator=torch.Generator().manual_seed(0))}
    monkeypatch.setitem(true_models.MODELS, "vit_b_32", true_models.Model(Tiny, lambda generator: inputs))
    monkeypatch.setattr(true_size, "measured", lambda work, *given, threads, limit: at_once(work, given))


def at_once(work, given):
    done = []
    said = work(*given, done.append)
    assert done in ([], sorted(done)) and (not done or done[-1] == 1)
    return Taken(1.5, 2_000_000, said=said)


@pytest.mark.slow
def test_every_option_that_needs_weights_alone_is_measured(here, monkeypatch, tmp_path):
    file, folder = tmp_path / "figures.json", tmp_path / "models"
    monkeypatch.setattr("sys.argv", ["", "vit_b_32", f"--folder={folder}", f"--json={file}", "--tasks=3", "--check"])
    true_size.main()
    result = json.loads(file.read_text())
    stages = result["backbones"]["vit_b_32"]["stages"]
    for group, kind in (("merge", "merge"), ("byom", "pack")):
        for name in config.options(group):
            assert (f"{kind} {name}" in stages) != (f"{group} {name}" in result["not_run"])
    assert stages["encode fft at density 1"]["exact"] and not stages["encode fft at density 1"]["exact_in_part"]
    assert true_size.missed(result) == "" and not any(folder.iterdir())
    stages["merge ties"]["peak_bytes"] = 1.2 * true_size.bound({"largest_bytes": 24 * 32 * 4}, 3)
    stages["encode fft at density 1"]["exact"] = False
    stages["merge task_arithmetic"]["done"] = 0.5
    assert [said.split(":")[1] for said in true_size.missed(result).splitlines()] == [
        " merge task_arithmetic was not measured to its end",
        f" merge ties took {1.2 * 256.018432:.0f} MB, and {1.1 * 256.018432:.0f} MB are allowed",
        " encode fft at density 1",
    ]
    assert "| merge task_arithmetic | stopped after 1.5 s, 2 MB at 50 %, about 0 min in all |" in true_size.table(
        result
    )


def tower():
    """Build four of the twelve blocks of a vision tower, each of true size."""
    return torch.nn.ModuleList([torch.nn.TransformerEncoderLayer(768, 12, 3072, batch_first=True) for _ in range(4)])


@pytest.mark.slow
def test_vision_towers_stay_within_their_bounds(tmp_path, monkeypatch):
    name, tasks, shard, rows = "blocks", 3, 48_000_000, {}  # three whole models are more than three times the bound
    monkeypatch.setitem(true_models.MODELS, name, true_models.Model(tower, dict))
    with true_models.written(name, tasks, tmp_path, keep=False, shard=shard) as folder:
        size = true_models.size(true_models.problem(folder, tasks).pretrained)
        compile_kernels(true_models.problem(folder, tasks), monkeypatch)
        for label in ("task_arithmetic", "ties"):
            given = (folder, tasks, true_size.method(label), None, folder / f"merged-{label}", shard)
            rows[f"merge {label}"] = measured(true_stages.merge, *given, threads=1, limit=600)
        given = (folder, tasks, true_size.variant("fft"), folder / "merged-ties", folder / "bundle")
        rows["pack fft"] = measured(true_stages.pack, *given, threads=1, limit=600)
        packed = Bundle.open(folder / "bundle")
        assert {delta.stored_parameters for delta in packed.deltas.values()} == {size["parameters"] // 10}
    assert not any(tmp_path.iterdir())
    bound = true_size.bound(size, tasks, shard)
    assert bound == 6 * 4 * 768 * 3072 + shard < tasks * size["bytes"] / 3
    for stage, share in true_size.BOUNDED.items():
        assert rows[stage].finished and rows[stage].peak <= share * bound, stage
    assert all(rows[f"merge {label}"].peak > tasks * size["largest_bytes"] for label in ("task_arithmetic", "ties"))
