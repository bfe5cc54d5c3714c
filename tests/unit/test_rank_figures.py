from __future__ import annotations

from functools import cache
from itertools import combinations

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from byom.report.figures.style import save
from experiments.lora import figures
from experiments.lora.tables import ranked, recipes
from tests.unit import synthetic_ranks as synthetic

EVERY, SEEDS = synthetic.lifted(), synthetic.lifted((0, 1))
BOTH = {"LoRA experts": ranked(EVERY["adapters"]), "Full fine-tunes": ranked(EVERY["full"])}
SPREAD = {"LoRA experts": ranked(SEEDS["adapters"]), "Full fine-tunes": ranked(SEEDS["full"])}
SPECTRA = {"LoRA experts": {"all": synthetic.spectrum(False)}, "Full fine-tunes": {"all": synthetic.spectrum(True)}}
ALONE = dict([next(iter(BOTH.items()))])
DRAWN = {
    "rank": lambda: figures.accuracy_by_rank(BOTH["LoRA experts"]),
    "rank of full fine-tunes": lambda: figures.accuracy_by_rank(BOTH["Full fine-tunes"]),
    "rank, seeds": lambda: figures.accuracy_by_rank(SPREAD["LoRA experts"]),
    "error": lambda: figures.error_by_rank(BOTH),
    "error, one recipe": lambda: figures.error_by_rank(ALONE),
    "bytes": lambda: figures.accuracy_by_bytes(BOTH),
    "bytes, seeds": lambda: figures.accuracy_by_bytes(SPREAD),
    "bytes, one recipe": lambda: figures.accuracy_by_bytes(ALONE),
    "spectra": lambda: figures.singular_values(SPECTRA),
    "recipes": lambda: figures.recipes(recipes(EVERY)),
    "two recipes": lambda: figures.recipes(recipes({name: EVERY[name] for name in ("adapters", "full")})),
}


@cache
def drawn(name: str) -> Figure:
    """Return a figure that has been drawn, for tests that only look at it."""
    figure = DRAWN[name]()
    figure.draw_without_rendering()
    return figure


def on_page(figure: Figure) -> list[Text]:
    """Return the texts that are drawn; ticks beyond the limits keep theirs."""
    found = [text for text in figure.findobj(Text) if isinstance(text, Text)]
    ticks = [tick for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for tick in _beyond(axis)]
    unseen = {id(label) for tick in ticks for label in (tick.label1, tick.label2)}
    return [text for text in found if text.get_visible() and text.get_text().strip() and id(text) not in unseen]


def _beyond(axis):
    low, high = sorted(axis.get_view_interval())
    return [t for t in [*axis.get_major_ticks(), *axis.get_minor_ticks()] if not low <= t.get_loc() <= high]


def words(figure: Figure) -> list[str]:
    figure.draw_without_rendering()
    return [text.get_text() for text in on_page(figure)]


def curves(axes) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    handles, names = axes.get_legend_handles_labels()
    lines = [handle[0] if isinstance(handle, tuple) else handle for handle in handles]
    pairs = [(name, line) for name, line in zip(names, lines, strict=True) if hasattr(line, "get_xdata")]
    return {name: (np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)) for name, line in pairs}


@pytest.mark.slow
@pytest.mark.parametrize("name", DRAWN)
def test_no_text_overlaps_or_leaves_the_page(name):
    figure = drawn(name)
    boxes = [(text.get_text(), text.get_window_extent()) for text in on_page(figure)]
    page = figure.bbox
    assert len(boxes) > 5
    assert not [
        n for n, box in boxes if box.x0 < -0.5 or box.y0 < -0.5 or box.x1 > page.x1 + 0.5 or box.y1 > page.y1 + 2
    ]
    assert not [(a, b) for (a, one), (b, two) in combinations(boxes, 2) if one.padded(-0.5).overlaps(two)]


@pytest.mark.parametrize("name", DRAWN)
def test_every_panel_says_what_its_axes_are(name):
    figure = drawn(name)
    assert all(axes.get_xlabel() for axes in figure.axes) and figure.axes[0].get_ylabel()
    limits = {axes.get_ylim() for axes in figure.axes}
    assert len(limits) == 1


@pytest.mark.parametrize("name", [name for name in DRAWN if "recipes" not in name])
def test_the_legend_stands_outside_the_data(name):
    figure = drawn(name)
    (legend,) = figure.legends
    assert not any(legend.get_window_extent().overlaps(axes.get_window_extent()) for axes in figure.axes)


def test_accuracy_by_rank_plots_the_frame():
    frame = BOTH["LoRA experts"]
    figure = figures.accuracy_by_rank(frame)
    found = curves(figure.axes[0])
    assert set(found) == {"BYOM-LoRA", "BYOM-LoRA, global ranks", "BYOM-LoRA on TIES"}
    for name, (x, y) in found.items():
        rows = frame[frame["method"] == name]
        np.testing.assert_array_equal(x, rows["rank"])
        np.testing.assert_allclose(y, 100 * rows["mean"])
    assert {"Single-task", "TIES (best merge)", "Pre-trained"} <= set(words(figure))
    levels = sorted(line.get_ydata()[0] for line in figure.axes[0].lines if list(line.get_xdata()) == [0, 1])
    expected = [100 * frame.set_index("method")["mean"][name] for name in ("Pre-trained", "TIES", "Single-task")]
    np.testing.assert_allclose(levels, expected)


def test_error_by_rank_plots_every_task_and_no_rounding():
    axes, other = figures.error_by_rank(BOTH).axes
    x, y = curves(axes)["Mean over tasks"]
    rows = BOTH["LoRA experts"][BOTH["LoRA experts"]["family"] == "lora"]
    np.testing.assert_array_equal(x, synthetic.RANKS[:-1])
    np.testing.assert_allclose(y, rows["error"][:-1])
    thin = [line for line in axes.lines if line.get_color() == "#a0a0a0" and len(line.get_xdata())]
    assert len(thin) == len(synthetic.TASKS)
    assert len(curves(other)["Mean over tasks"][0]) == len(synthetic.FULL_RANKS)
    assert "exact at q = 64" in [text.get_text() for text in axes.texts]
    assert not other.texts


def test_accuracy_by_bytes_plots_both_recipes_on_one_scale():
    figure = figures.accuracy_by_bytes(BOTH)
    for axes, frame in zip(figure.axes, BOTH.values(), strict=True):
        for name, (x, y) in curves(axes).items():
            rows = frame[frame["method"] == name]
            np.testing.assert_allclose(x, rows["task_bytes"] / 1e3)
            np.testing.assert_allclose(y, 100 * rows["mean"])
            assert axes.get_ylim()[0] < y.min() and y.max() < axes.get_ylim()[1]
    assert {"BYOM-LoRA", "Post-Pruning", "BYOM-FFT on TIES"} <= set(curves(figure.axes[1]))


def test_singular_values_show_the_fits():
    figure = figures.singular_values(SPECTRA)
    for axes, spectrum, law in zip(figure.axes, SPECTRA.values(), ("Exponential", "Power law"), strict=True):
        drawn = curves(axes)
        np.testing.assert_allclose(drawn["Median over matrices"][1], spectrum["all"]["median"])
        np.testing.assert_allclose(drawn[f"{law} fit"][1], spectrum["all"]["median"], rtol=1e-9)
        assert f"{law}: R² = 1.000" in axes.texts[0].get_text()


def test_recipes_are_labelled_dots():
    frame = recipes(EVERY)
    figure = figures.recipes(frame)
    assert set(frame["method"]) <= set(words(figure))
    dots = [c.lines[0] for c in figure.axes[0].containers]
    np.testing.assert_allclose([dot.get_xdata()[0] for dot in dots], frame["task_parameters"])
    np.testing.assert_allclose([dot.get_ydata()[0] for dot in dots], 100 * frame["mean"])


def test_files_are_the_same_each_time(tmp_path):
    one, two = (save(DRAWN["bytes"](), tmp_path / name) for name in "ab")
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]
