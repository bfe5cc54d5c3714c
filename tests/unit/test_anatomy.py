from __future__ import annotations

from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.text import Text

from byom.errors import CheckpointError, OptionError
from byom.report import anatomy
from byom.report.figures import anatomy as anatomy_figures
from byom.variants.fft import ByomFft
from byom.weights import Weights

PLACES = {
    "visual.blocks.11.attn.qkv.weight": ("11", "attention"),
    "visual.blocks.0.ls1.gamma": ("0", "normalisation"),
    "visual.blocks.0.norm2.bias": ("0", "normalisation"),
    "visual.blocks.3.mlp.fc1.weight": ("3", "MLP"),
    "visual.patch_embed.proj.weight": ("embeddings", "embedding"),
    "visual.cls_token": ("embeddings", "embedding"),
    "visual.norm.weight": ("end", "normalisation"),
    "visual.transformer.resblocks.4.attn.in_proj_weight": ("4", "attention"),
    "visual.transformer.resblocks.4.ln_1.weight": ("4", "normalisation"),
    "visual.transformer.resblocks.4.mlp.c_fc.weight": ("4", "MLP"),
    "visual.conv1.weight": ("embeddings", "embedding"),
    "visual.ln_post.weight": ("end", "normalisation"),
    "visual.proj": ("end", "other"),
    "encoder.layer.5.attention.self.query.weight": ("5", "attention"),
    "encoder.layer.5.attention.output.LayerNorm.weight": ("5", "normalisation"),
    "encoder.layer.5.output.dense.weight": ("5", "MLP"),
    "embeddings.word_embeddings.weight": ("embeddings", "embedding"),
    "pooler.dense.weight": ("end", "other"),
    "shared.weight": ("embeddings", "embedding"),
    "encoder.block.2.layer.0.SelfAttention.q.weight": ("2", "attention"),
    "encoder.block.2.layer.1.layer_norm.weight": ("2", "normalisation"),
    "decoder.block.2.layer.2.DenseReluDense.wi_0.weight": ("decoder 2", "MLP"),
    "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": ("decoder 0", "embedding"),
}
UP, NORM, EMBED = "blocks.0.mlp.fc1.weight", "norm.weight", "patch_embed.weight"
BASE = Weights.of({UP: torch.full((2, 2), 0.5), NORM: torch.zeros(1), EMBED: torch.ones(2), "steps": torch.tensor(7)})
MOVES = {
    "one": {UP: [3.0, 0.0, -1.0, 1.0], NORM: [0.5], EMBED: [0.0, 2.0]},
    "two": {UP: [-1.0, 2.0, -1.0, 0.0], NORM: [0.25], EMBED: [0.0, 0.0]},
    "three": {UP: [1.0, 1.0, -4.0, 0.0], NORM: [0.0], EMBED: [1.0, 0.0]},
}  # every value is exact in fp32
STILL = {"one": BASE}
MASS = {"one": 15.25, "two": 6.0625, "three": 19.0}


def moved(base: Weights, moves: dict[str, list[float]]) -> Weights:
    values = {n: base[n] + torch.tensor(moves[n]).reshape(base.shape(n)) for n in moves}
    return Weights.of({**values, "steps": base["steps"] + 1})


EXPERTS = {task: moved(BASE, moves) for task, moves in MOVES.items()}


def transformer(tasks: int = 3, blocks: int = 4) -> tuple[dict[str, Weights], Weights]:
    generator = torch.Generator().manual_seed(0)
    inside = {f"blocks.{b}.{part}.weight": (12, 8) for b in range(blocks) for part in ("attn.qkv", "mlp.fc1")}
    shapes = {"patch_embed.weight": (8, 6), **inside, "norm.weight": (8,)}
    draw = lambda: Weights.of({n: torch.randn(shape, generator=generator) for n, shape in shapes.items()})  # noqa: E731
    base = draw()
    return {f"task_{t}": (base + 0.1 * draw()).materialise() for t in range(tasks)}, base


MODELS = transformer()


def at(density: float, found: pd.DataFrame) -> pd.DataFrame:
    return found[found["density"] == density].set_index("tensor")


@pytest.mark.parametrize("name", PLACES)
def test_a_parameter_is_placed_by_its_name(name):
    assert anatomy.place(name) == PLACES[name]


def test_masses_are_squared_norms_of_every_floating_tensor():
    found = anatomy.masses(EXPERTS, BASE)
    assert set(found["tensor"]) == {UP, NORM, EMBED}
    assert anatomy.sums(found, ["task"], "mass")["mass"].to_dict() == pytest.approx(MASS)
    row = found[(found["task"] == "one") & (found["tensor"] == UP)].iloc[0]
    assert (row["layer"], row["kind"], row["entries"]) == ("0", "MLP", 4)
    assert row["mass"] == pytest.approx(11)


def test_layers_come_in_the_order_of_depth():
    names = [n for n in PLACES if n.startswith(("shared", "encoder.", "decoder", "pooler"))]
    names += ["encoder.layer.10.output.dense.weight"]
    zeros, ones = (Weights.of({n: torch.full((1,), value) for n in names}) for value in (0.0, 1.0))
    found = anatomy.masses({"t": ones}, zeros)
    order = [*anatomy.sums(found, ["layer"], "mass").index]
    assert order == ["embeddings", "2", "5", "10", "decoder 0", "decoder 2", "end"]


def test_shares_are_means_over_tasks_and_sum_to_one():
    found = anatomy.masses(EXPERTS, BASE)
    by_kind = anatomy.shares(found, "kind")
    assert by_kind["embedding"] == pytest.approx((4 / 15.25 + 0 + 1 / 19) / 3)
    assert by_kind.sum() == pytest.approx(1)
    by_task = anatomy.shares(found, "task", "layer")
    assert by_task["two", "0"] == pytest.approx(6 / 6.0625)
    np.testing.assert_allclose(by_task.groupby("task").sum(), 1)


def test_what_is_put_back_is_what_the_variant_packs():
    experts, base = MODELS
    for density in (0.0, 0.1, 0.35, 1.0):
        found = at(density, anatomy.put_back(experts["task_0"], base, (0.5, density)))
        delta = ByomFft(density=density).delta(experts["task_0"], base)
        packed = {n: len(delta.parts[n]["values"]) if n in delta.parts else 0 for n in base}
        assert found["kept"].to_dict() == packed
        assert found["kept_mass"].sum() == pytest.approx((delta.apply(base) - base).norm() ** 2)


def test_the_largest_of_the_model_and_of_each_tensor():
    whole = at(0.3, anatomy.put_back(EXPERTS["one"], BASE, (0.3, 1.0)))
    assert whole[["kept", "kept_mass"]].T.to_dict("list") == {EMBED: [1, 4], UP: [1, 9], NORM: [0, 0]}
    each = anatomy.put_back(EXPERTS["one"], BASE, (0.5,), "tensor").set_index("tensor")
    np.testing.assert_allclose(each.loc[[EMBED, UP, NORM], ["kept", "kept_mass"]], [[1, 4], [2, 10], [0, 0]])


def test_concentration_is_the_share_of_the_largest():
    found = anatomy.concentration(anatomy.put_back(EXPERTS["one"], BASE, (0.3, 1.0)))
    assert found.to_dict() == pytest.approx({0.3: 13 / 15.25, 1.0: 1.0})


def test_normal_entries_have_the_concentration_of_the_formula():
    drawn = Weights.of({"w": torch.randn(200_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)})
    densities = (0.0, 0.01, 0.1, 0.5, 1.0)
    found = anatomy.concentration(anatomy.put_back(drawn, Weights.of({"w": torch.zeros(200_000)}), densities))
    np.testing.assert_allclose(found, [anatomy.normal_concentration(m) for m in densities], atol=0.004)


def test_conflicts_are_counted_by_hand():
    found = anatomy.conflicts(EXPERTS, BASE).set_index("tensor")
    columns = ["entries", "shared", "conflicting", "by_chance", "movement", "cancelled"]
    # up:    3 -1 1 | 0 2 1 | -1 -1 -4 | 1 0 0   three, two, three and one task; only the first entry has both signs
    assert found.loc[UP, columns].to_list() == [4, 3, 1, 0.75 + 0.5 + 0.75, 15, 2]
    assert found.loc[NORM, columns].to_list() == [1, 1, 0, 0.5, 0.75, 0]
    assert found.loc[EMBED, columns].to_list() == [2, 0, 0, 0, 3, 0]


def test_conflicts_of_trimmed_vectors():
    found = anatomy.conflicts(EXPERTS, BASE, 0.3).set_index("tensor")  # two of seven entries each
    # of equals the first by name and position stays: one 3 and 2 (embedding), two 2 and -1, three -4 and 1
    assert found.loc[UP, ["shared", "conflicting", "by_chance"]].to_list() == [1, 1, 0.75]
    assert found["shared"].sum() == 1
    assert found["movement"].sum() == 3 + 2 + 2 + 1 + 4 + 1


def test_coins_conflict_by_chance():
    generator = torch.Generator().manual_seed(0)
    zero = Weights.of({"w": torch.zeros(20_000)})
    coins = {t: Weights.of({"w": torch.randn(20_000, generator=generator)}) for t in range(4)}
    row = anatomy.conflicts(coins, zero, 0.5).iloc[0]
    assert row["conflicting"] == pytest.approx(row["by_chance"], rel=0.02)


def test_cosines_and_distances():
    base = Weights.of({"a": torch.zeros(1), "b": torch.zeros(1)})
    pair = {"x": Weights.of({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}),
            "y": Weights.of({"a": torch.tensor([4.0]), "b": torch.tensor([3.0])})}  # fmt: skip
    found = anatomy.cosines(pair, base)
    np.testing.assert_allclose(found, [[1, 0.96], [0.96, 1]])
    assert list(found) == list(found.index) == ["x", "y"]
    far = anatomy.distances(pair, {"start": base, "x": pair["x"]})
    np.testing.assert_allclose(far, [[5, 0], [5, 2**0.5]])


def test_files_give_the_same_numbers(tmp_path):
    experts, base = MODELS
    opened = {task: Weights.open(weights.save(tmp_path / task)) for task, weights in experts.items()}
    stored = Weights.open(base.save(tmp_path / "base"))
    for measure in (anatomy.masses, anatomy.conflicts, anatomy.cosines):
        pd.testing.assert_frame_equal(measure(opened, stored), measure(experts, base))


@pytest.mark.parametrize(
    ("error", "words", "measure"),
    [
        (CheckpointError, "one: fine-tuning changed", lambda: anatomy.shares(anatomy.masses(STILL, BASE), "kind")),
        (CheckpointError, "one: fine-tuning changed", lambda: anatomy.cosines({**EXPERTS, **STILL}, BASE)),
        (CheckpointError, "the same", lambda: anatomy.concentration(anatomy.put_back(BASE, BASE, (0.1,)))),
        (CheckpointError, "different tensors", lambda: anatomy.masses(EXPERTS, MODELS[1])),
        (CheckpointError, "different tensors", lambda: anatomy.conflicts(EXPERTS, MODELS[1])),
        (CheckpointError, "NaN", lambda: anatomy.masses({"one": BASE * float("nan")}, BASE)),
        (OptionError, "two or more", lambda: anatomy.conflicts(STILL, BASE)),
        (OptionError, "fraction", lambda: anatomy.put_back(EXPERTS["one"], BASE, (10,))),
        (OptionError, "fraction", lambda: anatomy.conflicts(EXPERTS, BASE, 20)),
        (OptionError, "fraction", lambda: anatomy.normal_concentration(5)),
        (OptionError, "scope=layer", lambda: anatomy.put_back(EXPERTS["one"], BASE, (0.1,), "layer")),
    ],
)
def test_what_cannot_be_measured_is_refused(error, words, measure):
    with pytest.raises(error, match=words):
        measure()


def drawn() -> dict:
    experts, base = MODELS
    kept = {scope: pd.DataFrame({t: anatomy.concentration(anatomy.put_back(w, base, (0.1, 0.5), scope))
                                 for t, w in experts.items()}) for scope in ("global", "tensor")}  # fmt: skip
    merged = {"pretrained": base, "average": sum(experts.values()) / len(experts)}
    parts = pd.concat([anatomy.put_back(expert, base, (0.05, 0.1)) for expert in experts.values()])
    names = {"pretrained": "Pre-trained", "average": "Averaging"}
    conflicts = {"All entries": anatomy.conflicts(experts, base), "Top 20 %": anatomy.conflicts(experts, base, 0.2)}
    return {
        "mass": (anatomy_figures.mass_by_layer, (anatomy.masses(experts, base),)),
        "concentration": (anatomy_figures.concentration, (kept["global"], kept["tensor"])),
        "conflicts": (anatomy_figures.conflicts, (conflicts,)),
        "distances": (anatomy_figures.distances, (anatomy.distances(experts, merged), names)),
        "cosines": (anatomy_figures.cosines, (anatomy.cosines(experts, base),)),
        "put back": (anatomy_figures.put_back, (parts,)),
    }  # fmt: skip


DRAWN = drawn()


def lines(axes) -> dict[str, np.ndarray]:
    handles, names = axes.get_legend_handles_labels()
    pairs = zip(names, handles, strict=True)
    return {name: np.asarray(line.get_ydata(), float) for name, line in pairs if hasattr(line, "get_ydata")}


def beyond(figure) -> list[Text]:
    """Return the labels of ticks outside the limits, which are not drawn."""
    axes = [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]
    ticks = [(tick, *sorted(axis.get_view_interval())) for axis in axes for tick in axis.get_major_ticks()]
    return [label for t, low, high in ticks if not low <= t.get_loc() <= high for label in (t.label1, t.label2)]


@pytest.mark.parametrize("name", DRAWN)
def test_no_text_overlaps_or_leaves_the_page_and_axes_are_named(name):
    draw, given = DRAWN[name]
    figure = draw(*given)
    figure.draw_without_rendering()
    texts = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()]  # pyright: ignore
    level = [t for t in texts if not t.get_rotation() % 90 and t not in beyond(figure)]  # others' boxes are too large
    boxes, page = [(t.get_text(), t.get_window_extent()) for t in level], figure.bbox
    assert len(boxes) > 6
    off = [n for n, b in boxes if b.x0 < -0.5 or b.y0 < -0.5 or b.x1 > page.x1 + 0.5 or b.y1 > page.y1 + 2]
    assert not off
    assert not [(a, b) for (a, one), (b, two) in combinations(boxes, 2) if one.padded(-0.5).overlaps(two)]
    assert name == "cosines" or all(axes.get_xlabel() for axes in figure.axes)


def test_curves_plot_their_frames():
    given = {name: arguments[0] for name, (_, arguments) in DRAWN.items()}
    figures = {name: draw(*arguments) for name, (draw, arguments) in DRAWN.items()}
    curves = lines(figures["concentration"].axes[0])
    normal = [100 * anatomy.normal_concentration(m) for m in given["concentration"].index]
    np.testing.assert_allclose(curves["Largest of the whole model"], 100 * given["concentration"].mean(axis=1))
    np.testing.assert_allclose(curves["Normal distribution"], normal)
    rows = anatomy.sums(given["conflicts"]["Top 20 %"], ["layer"], "conflicting", "shared")
    shown = lines(figures["conflicts"].axes[0])["Top 20 %"]
    np.testing.assert_allclose(shown, 100 * rows["conflicting"] / rows["shared"])
    rows = anatomy.sums(at(0.1, given["put back"]), ["layer"], "kept", "entries", "kept_mass", "mass")
    left, right = map(lines, figures["put back"].axes)
    np.testing.assert_allclose(left["m = 10 %"], 100 * rows["kept"] / rows["entries"])
    np.testing.assert_allclose(right["m = 10 %"], 100 * rows["kept_mass"] / rows["mass"])


def test_bars_and_cells_show_their_frames():
    (masses, (found,)), (cosines, (values,)) = DRAWN["mass"], DRAWN["cosines"]
    axes = masses(found).axes[0]
    tops = [max(p.get_y() + p.get_height() for p in axes.patches if p.get_x() == x) for x in (-0.4, 0.6, 1.6)]
    np.testing.assert_allclose(tops, 100 * anatomy.shares(found, "layer").to_numpy()[:3], rtol=1e-6)
    off = ~np.eye(len(values), dtype=bool)
    np.testing.assert_allclose(cosines(values).axes[0].images[0].get_array()[off], values.to_numpy()[off])
