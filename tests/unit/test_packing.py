"""Packing to disk: a task is written while the next is packed, and whatever fails leaves nothing half-written."""

import threading
import weakref
from dataclasses import dataclass

import pytest
import torch

from byom.checkpoint.bundle import Bundle
from byom.errors import CheckpointError
from byom.merge.base import Problem
from byom.variants.base.delta import Delta
from byom.variants.fft import ByomFft
from byom.weights import Weights

TASKS = ("a", "b", "c")


def problem(bad=0.0):
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(40, 30, generator=generator), "b": torch.randn(30, generator=generator)}
    experts = {t: {n: v + torch.randn(v.shape, generator=generator) for n, v in base.items()} for t in TASKS}
    experts["c"]["b"][7] += bad
    return Problem(Weights.of(base), {task: Weights.of(each, task) for task, each in experts.items()})


def save(folder, variant=None, given=None):
    given = given or problem()
    served = (variant or ByomFft(0.3)).streamed(given, given.pretrained)
    return Bundle(served.reference, served.deltas).save(folder)


def test_packed_as_it_is_written_or_before_a_bundle_has_the_same_bytes(tmp_path):
    given = problem()
    served = ByomFft(0.3).serve(given, given.pretrained)
    one, other = save(tmp_path / "one"), Bundle(served.reference, served.deltas).save(tmp_path / "other")
    for file in one.rglob("*.safetensors"):
        assert file.read_bytes() == (other / file.relative_to(one)).read_bytes()
    assert [len(delta.parts) for delta in served.deltas.values()] == [2, 2, 2]  # what the caller holds stays whole


def test_a_task_is_written_while_the_next_is_packed(tmp_path, monkeypatch):
    pack, spend, second, waited = ByomFft.delta, Delta.spend, threading.Event(), []

    def packed(variant, target, *shared):
        if target.origin == "b":
            second.set()
        return pack(variant, target, *shared)

    def written(delta, path):
        waited.append(second.wait(10))
        return spend(delta, path)

    monkeypatch.setattr(ByomFft, "delta", packed)
    monkeypatch.setattr(Delta, "spend", written)
    folder = save(tmp_path / "out")
    assert waited == [True] * 3
    assert all(Delta.open(folder / f"{task}.safetensors").parts for task in TASKS)


def test_no_more_than_two_tasks_are_held(tmp_path, monkeypatch):
    pack, made, alive = ByomFft.delta, [], []

    def packed(variant, *shared):
        delta = pack(variant, *shared)
        made.append(weakref.ref(delta))
        alive.append(sum(each() is not None for each in made))
        return delta

    monkeypatch.setattr(ByomFft, "delta", packed)
    given = problem()
    more = dict.fromkeys("abcdef", given.finetuned["a"])
    save(tmp_path / "out", given=Problem(given.pretrained, more))
    assert len(alive) == 6 and max(alive) <= 2


def test_tensors_are_let_go_of_as_they_are_written(tmp_path, monkeypatch):
    from byom.storage.streamed import _Sink

    given, put = problem(), _Sink.put
    delta = ByomFft(0.3).delta(given.finetuned["a"], given.pretrained)
    held = [weakref.ref(tensor) for parts in delta.parts.values() for tensor in parts.values()]
    alive = []

    def counted(sink, name, tensor):
        alive.append(sum(each() is not None for each in held))
        return put(sink, name, tensor)

    monkeypatch.setattr("byom.storage.streamed.WAITING", 0)  # each is written before the next is asked for
    monkeypatch.setattr(_Sink, "put", counted)
    delta.spend(tmp_path / "a.safetensors")
    assert alive == [4, 3, 2, 1] and not delta.parts


@pytest.mark.parametrize("stopped", [KeyboardInterrupt, MemoryError])
def test_what_stops_the_packing_of_a_task_leaves_nothing(stopped, tmp_path, monkeypatch):
    pack = ByomFft.delta

    def packed(variant, target, *shared):
        if target.origin == "c":
            raise stopped
        return pack(variant, target, *shared)

    monkeypatch.setattr(ByomFft, "delta", packed)
    with pytest.raises(stopped):
        save(tmp_path / "out")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("last", [False, True])
def test_a_full_disk_is_said_of_whichever_task(last, tmp_path, monkeypatch):
    spend = Delta.spend

    def full(delta, path):
        if path.stem == ("c" if last else "a"):
            monkeypatch.setattr("byom.storage.streamed.crc32", lambda _: (_ for _ in ()).throw(OSError(28, "no space")))
        return spend(delta, path)

    monkeypatch.setattr(Delta, "spend", full)
    with pytest.raises(CheckpointError, match=r"cannot write .*(a|c)\.safetensors: .*no space"):
        save(tmp_path / "out")
    assert not [*tmp_path.iterdir()]


@dataclass(frozen=True)
class Blind(ByomFft):
    """A variant whose plan looks at nothing."""

    def plan(self, target, reference, base=None):
        return super().plan(reference, reference, base)

    def foresee(self, targets, reference):
        pass


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("variant", [ByomFft(0.3), ByomFft(0.0), ByomFft(1.0, "row"), ByomFft(0.5, "tensor"), Blind()])
def test_what_is_not_finite_is_refused_whether_or_not_the_plan_has_looked(variant, bad, tmp_path):
    with pytest.raises(CheckpointError, match="c: tensor 'b'|c.* 'b'"):
        save(tmp_path / "out", variant, problem(bad))
    assert not [*tmp_path.iterdir()]
