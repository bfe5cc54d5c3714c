"""Cuts of the difference between two sets of weights, in every scope."""

import gc
import json
from weakref import ref

import pytest
import torch

from byom.errors import OptionError
from byom.functional.selection import top_mask
from byom.variants.base import sparse
from byom.weights import Weights
from byom.weights import cuts as module
from byom.weights.cuts import _HELD as held
from byom.weights.cuts import _each as each
from byom.weights.cuts import cuts, cuts_at, require_scope, sweep
from byom.weights.kept import keeping
from tests.problems import counted

SHAPES = {"a": (3, 4), "b": (5,), "c": (), "d": (2, 3, 4), "e": (0, 2)}


def weights(seed):
    generator = torch.Generator().manual_seed(seed)
    return Weights.of({name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}, str(seed))


def masks(target, reference, density, scope):
    """Return each parameter's mask from its cut."""
    where = cuts(target, reference, density, scope)
    return {n: cut.mask(target[n] - reference[n], offset) for n, (cut, offset) in where.items()}


@pytest.mark.parametrize("density", [0.0, 0.3, 0.5, 1.0])
def test_every_scope_keeps_the_largest_of_what_it_ranks_together(density):
    target, reference = weights(1), weights(2)
    deltas = {name: target[name] - reference[name] for name in SHAPES}
    whole = torch.cat([delta.reshape(-1) for delta in deltas.values()])
    together = masks(target, reference, density, "global")
    assert torch.equal(torch.cat([mask.reshape(-1) for mask in together.values()]), top_mask(whole, density))
    for scope, dim in {"tensor": None, "row": -1}.items():
        for name, mask in masks(target, reference, density, scope).items():
            assert torch.equal(mask, top_mask(deltas[name], density, dim)), (scope, name)


def test_densities_that_are_said_come_from_one_pass_and_are_the_same():
    (target, reads), reference = counted(weights(1), checksums=True), weights(2)
    both = cuts_at(weights(1), reference, [0.1, 0.5], "global")
    assert cuts(target, reference, 0.1, densities=[0.5]) == both[0.1]
    first = len(reads)
    assert cuts(target, reference, 0.5) == both[0.5] and len(reads) == first
    with sweep([0.2]), sweep([0.3]):
        cuts(target, reference, 0.4)
    second = len(reads)
    for density in (0.2, 0.3):
        assert cuts(target, reference, density) == cuts_at(weights(1), reference, [density], "global")[density]
    assert len(reads) == second > first
    cuts(target, reference, 0.6)
    assert len(reads) > second


@pytest.mark.parametrize("scope", ["global", "tensor", "row"])
def test_survivors_do_not_depend_on_the_pieces_a_difference_is_formed_in(scope, monkeypatch):
    reference = weights(1)
    target = Weights.of({name: reference[name] + 1 for name in SHAPES})  # ties alone: positions decide
    where = cuts(target, reference, 0.5, scope)

    def kept():
        return [sparse.survivors(where[n][0], target[n], reference[n], where[n][1]).tolist() for n in SHAPES]

    whole = kept()
    monkeypatch.setattr(sparse, "PIECE", 3)
    assert kept() == whole


def test_each_reference_has_cuts_of_its_own():
    target, first, second = weights(1), weights(2), weights(3)
    assert cuts(target, first, 0.3) != cuts(target, second, 0.3) == cuts(weights(1), second, 0.3)


def test_cuts_end_with_their_target():
    target = weights(1)
    cuts(target, weights(2), 0.1)
    alive = ref(target)
    assert alive() in held
    del target
    cuts(last := weights(4), last, 0.1)  # what was read last is still held
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("scope", ["rows", "layer", "", "Global"])
def test_an_unknown_scope_is_refused(scope):
    for find in (
        lambda: cuts(weights(1), weights(2), 0.1, scope),
        lambda: cuts_at(weights(1), weights(2), [0.1], scope),
        lambda: require_scope("scope", scope),
    ):
        with pytest.raises(OptionError, match=f"scope={scope} is not known; use global, tensor or row"):
            find()


def on_disk(seed, folder):
    weights(seed).save(folder)
    return Weights.open(folder)


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_cuts_on_disk_are_found_by_another_process_and_are_the_same(scope, tmp_path, monkeypatch):
    folder, target, reference = tmp_path / "cuts", on_disk(1, tmp_path / "a"), on_disk(2, tmp_path / "b")
    expected = cuts_at(target, reference, [0.1, 0.3, 1.0], scope)
    with keeping(folder), sweep([0.3, 1.0]):
        assert cuts(target, reference, 0.1, scope) == expected[0.1]
    [file] = folder.glob("*.json")
    again, passes = Weights.open(tmp_path / "a"), []  # as another process sees it: nothing is held in memory
    monkeypatch.setattr(module, "_each", lambda *args: passes.append(args[2]) or each(*args))
    with keeping(folder):
        assert all(cuts(again, reference, density, scope) == expected[density] for density in (0.3, 1.0, 0.1))
        assert not passes
        assert cuts(again, reference, 0.2, scope) == cuts_at(target, reference, [0.2], scope)[0.2]
    assert passes[0] == [0.2] and len(json.loads(file.read_text())["values"]) == 4
    whole = file.read_text()
    for damage in ("", "[]", "{", whole[:-40], whole.replace('"0x', '"-0x', 1), whole.replace("1", "2", 1)):
        file.write_text(damage)
        with keeping(folder):
            assert cuts(Weights.open(tmp_path / "a"), reference, 0.1, scope) == expected[0.1], damage[:20]
        assert json.loads(file.read_text())["values"]["0.1"]
    with keeping(folder):
        assert cuts(reference, target, 0.1, scope) == cuts_at(reference, target, [0.1], scope)[0.1]
    assert len(list(folder.glob("*.json"))) == 2


def test_cuts_are_found_though_their_files_vanish(tmp_path, monkeypatch):
    target, reference = on_disk(1, tmp_path / "a"), on_disk(2, tmp_path / "b")
    monkeypatch.setattr("byom.weights.kept._write", lambda file, cuts: None)  # as if `byom clean` were faster
    with keeping(tmp_path / "cuts"):
        assert cuts(target, reference, 0.1) == cuts_at(target, reference, [0.1], "global")[0.1]


def test_cuts_of_rows_and_of_models_that_are_computed_are_not_kept(tmp_path):
    target, reference = on_disk(1, tmp_path / "a"), on_disk(2, tmp_path / "b")
    with keeping(tmp_path / "cuts"):
        cuts(target, reference, 0.1, "row")
        cuts(0.5 * target, reference, 0.1)
    assert not (tmp_path / "cuts").exists()
