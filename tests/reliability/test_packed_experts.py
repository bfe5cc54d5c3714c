"""Experts of a mixture that lie in one tensor are one matrix each; kernels of convolutions stay what they were."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from byom.checkpoint.adapters.export import adapters
from byom.checkpoint.bundle import Bundle
from byom.errors import CheckpointError, OptionError
from byom.functional.tensors import packs_experts
from byom.merge.base import Problem
from byom.merge.base.matrices import is_matrix, is_stack
from byom.merge.core_space import CoreSpace
from byom.merge.iso_c import IsotropicMergingCommon
from byom.merge.iso_cts import IsotropicMergingCommonTaskSpecific
from byom.merge.knots import KnowledgeOrientationThroughSvd
from byom.merge.ties import Ties
from byom.merge.tsv import TaskSingularVectors
from byom.merge.wudi import Wudi
from byom.variants.lora import ByomLora
from byom.variants.tsv_compress import TaskSingularVectorsCompress
from byom.variants.twin import TwinMerging
from byom.weights import Weights
from byom.weights.lowrank import Adapted, Piece

NAME = "model.layers.0.mlp.experts.gate_up_proj"
KERNEL = "encoder.conv1.weight"
E, ROWS, COLUMNS = 4, 6, 5


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def problem(name=NAME, tasks=2, apart=False):
    """Return a problem with one tensor of all experts, or the same with a tensor for each."""
    base, moved = normal(E, ROWS, COLUMNS), [0.1 * normal(E, ROWS, COLUMNS, seed=1 + t) for t in range(tasks)]

    def weights(value):
        return Weights.of({f"w{e}": value[e].clone() for e in range(E)} if apart else {name: value})

    return Problem(weights(base), {str(t): weights(base + delta) for t, delta in enumerate(moved)})


def joined(weights: Weights) -> torch.Tensor:
    return torch.stack([weights[f"w{e}"] for e in range(E)])


METHODS = [
    TaskSingularVectors(), IsotropicMergingCommon(), IsotropicMergingCommonTaskSpecific(common=0.4),
    Wudi(solver="closed_form"), Wudi(steps=3), KnowledgeOrientationThroughSvd(),
    KnowledgeOrientationThroughSvd(concat="input", then=Ties()), CoreSpace(),
]  # fmt: skip
VARIANTS = [
    ByomLora(2), ByomLora(2, solver="randomised"), ByomLora(2, "global"), TaskSingularVectorsCompress(0.4),
    TwinMerging(0.4, "svd"),
]  # fmt: skip


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_a_merge_of_packed_experts_is_that_of_each(method):
    if isinstance(
        method, KnowledgeOrientationThroughSvd | CoreSpace
    ):  # TIES ranks the entries of a tensor, or of all of them
        method = replace(method, then=Ties(density=1.0))
    packed, apart = method(problem()), method(problem(apart=True))
    assert_close(packed[NAME], joined(apart))
    assert not torch.equal(packed[NAME], problem().pretrained[NAME])
    assert not getattr(method, "fallbacks", lambda _: [])(problem())


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_what_is_put_back_of_packed_experts_is_low_rank_for_each_and_counted(variant):
    served, apart = (variant.serve(p, p.pretrained) for p in (problem(), problem(apart=True)))
    found = served.weights("0")[NAME]
    assert_close(found, joined(apart.weights("0")), atol=2e-5, rtol=1e-4)
    difference = found - problem().pretrained[NAME]
    assert torch.linalg.matrix_rank(difference, rtol=1e-4).tolist() == [2] * E or variant == ByomLora(2, "global")
    one, other = served.deltas["0"], apart.deltas["0"]
    assert one.stored_parameters == other.stored_parameters <= 2 * E * (ROWS + COLUMNS + 1)
    assert one.nbytes == other.nbytes


@pytest.mark.parametrize("variant", VARIANTS[:1] + VARIANTS[3:], ids=str)
def test_all_singular_values_are_the_expert_itself_and_a_bundle_brings_it_back(variant, tmp_path):
    options = {ByomLora: {"rank": 5}, TaskSingularVectorsCompress: {"share": 1.0}, TwinMerging: {"density": 1.0}}
    whole, given = replace(variant, **options[type(variant)]), problem()
    served = whole.serve(given, given.pretrained)
    assert_close(served.weights("1")[NAME], given.finetuned["1"][NAME])
    Bundle(served.reference, served.deltas).save(tmp_path / "bundle")
    assert torch.equal(Bundle.open(tmp_path / "bundle").weights("1")[NAME], served.weights("1")[NAME])


def test_an_expert_that_did_not_move_costs_nothing_and_others_keep_their_rank():
    given = problem(tasks=1)
    value = given.finetuned["0"][NAME].clone()
    value[1] = given.pretrained[NAME][1]
    moved = Problem(given.pretrained, {"0": Weights.of({NAME: value})})
    delta = ByomLora(2).serve(moved, given.pretrained)
    parts = delta.deltas["0"].parts[NAME]
    assert sorted(int(part[5:]) for part in parts if part.startswith("left@")) == [0, 2 * ROWS, 3 * ROWS]
    assert torch.equal(delta.weights("0")[NAME][1], value[1])


def test_packed_experts_of_an_adapter_are_added_to_their_own_rows():
    base = Weights.of({NAME: normal(E, ROWS, COLUMNS)})
    left, right = normal(ROWS, 2, seed=3), normal(2, COLUMNS, seed=4)
    adapted = Adapted(base, {NAME: [Piece(2 * ROWS, left, right)]})
    expected = base[NAME].clone()
    expected[2] += left @ right
    assert_close(adapted[NAME], expected)


def test_kernels_are_matrices_of_all_their_inputs_as_before():
    base = normal(E, ROWS, COLUMNS)
    given = Problem(Weights.of({KERNEL: base}), {"0": Weights.of({KERNEL: base + normal(E, ROWS, COLUMNS, seed=1)})})
    served = ByomLora(2).serve(given, given.pretrained)
    assert {p: tuple(t.shape) for p, t in served.deltas["0"].parts[KERNEL].items()} == {
        "left@0": (E, 2), "singular@0": (2,), "right@0": (2, ROWS * COLUMNS)
    }  # fmt: skip
    assert "values" in TaskSingularVectorsCompress().serve(given, given.pretrained).deltas["0"].parts[KERNEL]


def test_an_export_refuses_packed_experts_by_name(tmp_path):
    given = problem()
    with pytest.raises(OptionError, match=f"'{NAME}' packs the matrices of 4 experts .*byom pack"):
        adapters(ByomLora(2).serve(given, given.pretrained), tmp_path / "out", base_model="me/base")
    assert not (tmp_path / "out").exists()


def test_factors_of_another_shape_are_refused():
    given, other = problem(), Weights.of({NAME: normal(E, COLUMNS, ROWS)})
    for variant in (ByomLora(2), TaskSingularVectorsCompress(0.4)):
        delta = variant.serve(given, given.pretrained).deltas["0"]
        with pytest.raises(CheckpointError):
            _ = delta.apply(other)[NAME]


PACKED = [
    "model.layers.0.mlp.experts.gate_up_proj", "model.layers.3.block_sparse_moe.experts.w2", "experts.down_proj",
    "model.layers.0.feed_forward.experts.down_proj", "layers.0.block_sparse_moe.input_linear.weight",
    "model.language_model.layers.0.mlp.shared_experts.gate_up_proj",
]  # fmt: skip
APART = [
    "model.encoder.conv1.weight", "experts.0.conv.weight", "moe.experts.3.proj", "experts.conv1.weight",
    "model.embeddings.patch.weight", "experts",
]  # fmt: skip


@pytest.mark.parametrize("name", PACKED + APART)
def test_the_name_tells_packed_experts_from_kernels(name):
    assert packs_experts(name, (8, 4, 4)) == is_stack(name, (8, 4, 4)) == (name in PACKED)
    assert not packs_experts(name, (8, 4)) and not packs_experts(name, (8, 4, 4, 4))
    assert not is_stack(name, (8, 1, 4)) and not is_matrix(name, (8, 4, 4))


def test_biases_of_all_experts_are_no_matrix():
    assert not is_matrix(f"{NAME}_bias", (8, 4)) and is_matrix("model.relative_attention_bias", (8, 4))
    assert is_matrix("model.experts.3.w", (8, 4))
