from __future__ import annotations

import numpy as np
import pytest
import torch

from byom.weights import Weights
from byom.weights.lowrank import Adapted, Piece
from experiments import spectra

PLACES = np.arange(1, 65)
KINDS = {
    "blocks.3.attn.qkv.weight": "qkv",
    "blocks.3.attn.proj.weight": "out",
    "blocks.3.mlp.fc1.weight": "up",
    "blocks.3.mlp.fc2.weight": "down",
    "patch_embed.proj.weight": "embeddings",
    "resblocks.0.attn.in_proj_weight": "qkv",
    "resblocks.0.attn.out_proj.weight": "out",
    "encoder.layer.0.attention.self.query.weight": "q",
    "encoder.layer.0.attention.self.key.weight": "k",
    "encoder.layer.0.attention.self.value.weight": "v",
    "encoder.layer.0.attention.output.dense.weight": "out",
    "encoder.layer.0.intermediate.dense.weight": "up",
    "encoder.layer.0.output.dense.weight": "down",
    "embeddings.word_embeddings.weight": "embeddings",
    "pooler.dense.weight": "other",
}


@pytest.mark.parametrize("name", KINDS)
def test_a_matrix_is_told_by_its_name(name):
    assert spectra.kind_of(name, 0, 12, Weights.of({name: torch.zeros(12, 4)})) == KINDS[name]


@pytest.mark.parametrize(("start", "kind"), [(0, "q"), (4, "k"), (8, "v")])
@pytest.mark.parametrize("name", ["blocks.3.attn.qkv.weight", "resblocks.0.attn.in_proj_weight"])
def test_rows_of_fused_attention_are_told_apart(name, start, kind):
    assert spectra.kind_of(name, start, 4, Weights.of({name: torch.zeros(12, 4)})) == kind


def models(rank: int = 5) -> tuple[Weights, Adapted, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(shape, generator=generator) for shape in ((24, rank), (rank, 16)))
    name = "encoder.layer.0.attention.self.query.weight"
    base = Weights.of({name: torch.randn(24, 16, generator=generator), "norm.bias": torch.zeros(4)})
    singular = torch.linalg.svdvals(left.double() @ right.double())[:rank]
    return base, Adapted(base, {name: [Piece(0, left, right)]}), singular / singular[0]


def test_an_adapter_and_its_dense_difference_have_the_same_values():
    base, adapted, expected = models()
    ((kind, thin),) = spectra.values(adapted, base)
    dense = Weights.of({name: adapted[name].double() for name in base})
    ((same, full),) = spectra.values(dense, Weights.of({name: base[name].double() for name in base}))
    assert kind == same == "q"
    np.testing.assert_allclose(thin, expected, rtol=1e-5)
    np.testing.assert_allclose(full[:5], expected, rtol=1e-4)


def test_what_did_not_move_has_no_values():
    base, _, _ = models()
    assert list(spectra.values(base, base)) == []
    still = Adapted(base, {next(iter(base)): [Piece(0, torch.zeros(24, 2), torch.ones(2, 16))]})
    assert list(spectra.values(still, base)) == []


def test_convolutions_are_matrices_of_their_rows():
    base = Weights.of({"patch_embed.proj.weight": torch.zeros(4, 3, 2, 2)})
    moved = Weights.of({"patch_embed.proj.weight": torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))})
    ((kind, found),) = spectra.values(moved, base)
    expected = torch.linalg.svdvals(moved["patch_embed.proj.weight"].double().flatten(1))
    assert kind == "embeddings"
    np.testing.assert_allclose(found, expected / expected[0])


def test_each_law_explains_itself_completely():
    exponential, power = spectra.fits(np.exp(-0.05 * PLACES)), spectra.fits(2 * PLACES**-0.7)
    assert exponential["exponential"] == {"intercept": pytest.approx(0, abs=1e-9), "slope": -0.05, "r2": 1}
    assert power["power"] == {"intercept": pytest.approx(np.log(2), rel=1e-5), "slope": -0.7, "r2": 1}
    assert exponential["power"]["r2"] < 0.95 and power["exponential"]["r2"] < 0.95


def test_no_law_is_fitted_to_too_little():
    assert spectra.fits(np.array([1.0, 0.5])) == spectra.fits(np.ones(9)) == {}
    assert spectra.fits(np.array([1.0, 0.5, 0.0, 0.0])) == {}


def test_a_summary_takes_quantiles_over_matrices_and_zero_for_what_is_missing():
    lines = [np.array([1.0, level, level / 2]) for level in np.linspace(0, 1, 11)]
    found = spectra.summary([*lines[:-1], lines[-1][:2]])
    assert found["matrices"] == 11
    np.testing.assert_allclose([found[name][1] for name in ("low", "median", "high")], (0.1, 0.5, 0.9))
    assert found["median"][2] == pytest.approx(np.median([*np.linspace(0, 0.45, 10), 0]))


def test_tasks_and_kinds_are_summarised():
    base, adapted, expected = models()
    found = spectra.spectra({"one": adapted, "two": adapted}, base)
    assert set(found["tasks"]) == {"one", "two"} and set(found["kinds"]) == {"q"}
    assert found["kinds"]["q"]["matrices"] == found["all"]["matrices"] == 2
    np.testing.assert_allclose(found["all"]["median"], expected, rtol=1e-5)
    assert found["tasks"]["one"]["q"]["fits"].keys() == {"exponential", "power"}
    assert "| q | 2 |" in spectra.table(found["kinds"])
