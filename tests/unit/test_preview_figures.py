from __future__ import annotations

from functools import cache
from itertools import combinations

import numpy as np
import pytest
from matplotlib.collections import PathCollection, TriMesh
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

from byom.report.figures import preview as figures
from byom.report.figures.triangle import HEIGHT, places
from byom.storage.preview import accuracies
from tests.unit.synthetic_previews import record

RECORDS = {
    "two": record(2),
    "two on test": record(2, splits=("test",)),
    "three": record(3, joint=4),
    "three, one method": record(3, methods=("mixture",), joint=0),
    "five": record(5),
    "eight": record(8, joint=5),
    "eight, no joint": record(8, joint=0),
}


PAIRS = [(draw, name) for draw in (figures.preview, figures.agreement) for name in RECORDS]
DRAWN = [(draw, name) for draw, name in PAIRS if draw is figures.preview or RECORDS[name].joint]


@cache
def drawn(draw, name: str) -> Figure:
    """Return a figure that has been drawn, for tests that only look at it."""
    figure = draw(RECORDS[name])
    figure.draw_without_rendering()
    return figure


@pytest.fixture(params=DRAWN, ids=lambda pair: f"{pair[0].__name__}: {pair[1]}")
def figure(request):
    return drawn(*request.param)


def percent(rows, split="validation"):
    return 100 * accuracies(rows, split)


def words(figure: Figure) -> list[Text]:
    found = [text for text in figure.findobj(Text) if isinstance(text, Text)]
    axes = [(one, axis) for one in figure.axes for axis in (one.xaxis, one.yaxis)]
    ticks = [tick for one, axis in axes for tick in (_beyond(axis) if one.axison else axis.get_major_ticks())]
    unseen = [label for tick in ticks for label in (tick.label1, tick.label2)]
    return [text for text in found if text.get_visible() and text.get_text().strip() and text not in unseen]


def _beyond(axis):
    low, high = sorted(axis.get_view_interval())
    return [tick for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high]


@pytest.mark.slow
def test_no_text_overlaps_or_leaves_the_page(figure):
    boxes = [(text.get_text(), text.get_window_extent()) for text in words(figure)]
    page = figure.bbox
    assert len(boxes) > 5
    assert not [name for name, box in boxes if box.x0 < -0.5 or box.y0 < -0.5]
    assert not [name for name, box in boxes if box.x1 > page.x1 + 0.5 or box.y1 > page.y1 + 0.5]
    assert not [(a, b) for (a, one), (b, two) in combinations(boxes, 2) if one.padded(-0.5).overlaps(two)]


@pytest.mark.slow
def test_the_legend_stands_outside_the_data_and_names_nothing_twice(figure):
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert len(names) == len(set(names))
    assert not any(legend.get_window_extent().overlaps(axes.get_window_extent()) for axes in figure.axes)


def test_curves_plot_both_accuracies_and_the_trade_off():
    made = RECORDS["two"]
    one, two, plane = figures.curves(made).axes
    rows = sorted(made.points["average"], key=lambda row: row.weights)
    weight, scores = [row.weights[0] for row in rows], percent(rows)
    for axes, x, y in ((one, weight, scores[:, 0]), (two, weight, scores[:, 1]), (plane, scores[:, 0], scores[:, 1])):
        (line,) = [line for line in axes.lines if line.get_label() == "Average"]
        np.testing.assert_allclose(line.get_xdata(), x)
        np.testing.assert_allclose(line.get_ydata(), y)
        (joint,) = [line for line in axes.lines if line.get_label() == "Jointly fine-tuned"]
        assert len(joint.get_xdata()) == len(made.joint)
    np.testing.assert_allclose(joint.get_ydata(), percent(made.joint)[:, 1])
    assert one.get_xlabel() == "Weight of mnist" and plane.get_ylabel() == "traffic lights: validation accuracy (%)"


def test_rings_stand_at_the_best_mean():
    made = RECORDS["two"]
    plane = figures.curves(made).axes[2]
    rings = {to_hex(r.get_color()): r for r in plane.lines if r.get_markersize() == 9 and len(r.get_xdata()) == 1}
    for name, look in figures._looks(made).items():
        best = percent(made.points[name])[made.summary["validation"][name].best]
        ring = rings[look.color]
        np.testing.assert_allclose([ring.get_xdata()[0], ring.get_ydata()[0]], best)


def test_curves_survive_greyscale():
    found = figures._looks(RECORDS["two"]).values()
    assert len({(look.marker, str(look.dash)) for look in found}) == len(found) == len({look.marker for look in found})


def test_places_of_the_triangle():
    np.testing.assert_allclose(places(np.eye(3)), [[0, 0], [1, 0], [0.5, HEIGHT]])
    np.testing.assert_allclose(places(np.full((1, 3), 1 / 3)), [[0.5, HEIGHT / 3]])


def test_triangles_colour_the_mean_and_every_task():
    made = RECORDS["three"]
    figure = figures.triangles(made)
    panels = [axes for axes in figure.axes if any(isinstance(c, TriMesh) for c in axes.collections)]
    assert len(panels) == 3 * 4
    scores = percent(made.points["hessian_weighted"])
    for axes, values in zip(panels[4:8], [scores.mean(1), *scores.T], strict=True):
        (mesh,) = [c for c in axes.collections if isinstance(c, TriMesh)]
        np.testing.assert_allclose(np.asarray(mesh.get_array()), values)


def test_discs_have_the_colour_of_what_joint_fine_tuning_reached():
    made = RECORDS["three"]
    figure = figures.triangles(made)
    axes = figure.axes[1]  # the first method, the first task
    (discs,) = [c for c in axes.collections if isinstance(c, PathCollection)]
    (mesh,) = [c for c in axes.collections if isinstance(c, TriMesh)]
    np.testing.assert_allclose(np.asarray(discs.get_array()), percent(made.joint)[:, 0])
    np.testing.assert_allclose(discs.get_offsets(), places(np.array([row.weights for row in made.joint])))
    assert discs.get_clim() == mesh.get_clim()


def test_the_lattice_is_covered_without_slivers():
    figure = figures.triangles(RECORDS["three, one method"])
    (mesh,) = [c for c in figure.axes[0].collections if isinstance(c, TriMesh)]
    corners = np.stack([mesh._triangulation.x, mesh._triangulation.y], 1)[mesh._triangulation.get_masked_triangles()]
    first, second = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    areas = np.abs(first[:, 0] * second[:, 1] - first[:, 1] * second[:, 0]) / 2
    np.testing.assert_allclose(areas, HEIGHT / 2 / 64)
    assert len(areas) == 64


def test_parallel_lines_are_the_weightings_and_colour_is_the_pareto_set():
    made = RECORDS["five"]
    axes = figures.parallel(made).axes[0]
    rows, said = made.points["average"], made.summary["validation"]["average"]
    scores = percent(rows)
    expected = {tuple(np.round([*row, row.mean()], 6)) for row in scores}
    lines = {tuple(np.round(line.get_ydata(), 6)): line for line in axes.lines if line.get_zorder() in (1, 2)}
    assert set(lines) - {()} == expected
    for place, row in enumerate(scores):
        line = lines[tuple(np.round([*row, row.mean()], 6))]
        assert line.get_zorder() == (2 if place in said.pareto else 1)
    best = next(line for line in axes.lines if line.get_label() == "Best mean")
    np.testing.assert_allclose(best.get_ydata()[:-1], scores[said.best])
    dashed = [line for line in axes.lines if line.get_zorder() == 4]
    np.testing.assert_allclose([line.get_ydata()[:-1] for line in dashed], percent(made.joint))


def test_agreement_plots_the_gap_to_joint_fine_tuning():
    made = RECORDS["five"]
    axes = figures.agreement(made).axes[0]
    (line,) = [line for line in axes.lines if line.get_label() == "Hessian-weighted"]
    same = [next(r for r in made.points["hessian_weighted"] if r.weights == j.weights) for j in made.joint]
    gaps = percent(same) - percent(made.joint)
    expected = np.concatenate([gaps, gaps.mean(1, keepdims=True)], 1)
    np.testing.assert_allclose(line.get_xdata(), expected.ravel())


@pytest.mark.parametrize("splits", [("validation", "test"), ("test",)])
def test_the_split_that_weights_are_chosen_on_is_drawn(splits):
    axes = figures.preview(record(2, splits=splits)).axes[0]
    assert axes.get_ylabel() == f"mnist: {splits[0]} accuracy (%)"


@pytest.mark.slow
def test_files_are_named_after_the_record_and_the_same_each_time(tmp_path):
    made = [figures.save_all(RECORDS["two"], tmp_path / f / "previews" / "s" / "b" / "a+b--01.json") for f in "xy"]
    stem = "vision8_offline--vit_small_dinov2--preview--a+b--01"
    names = [f"{stem}.png", f"{stem}.pdf", f"{stem}--agreement.png", f"{stem}--agreement.pdf"]
    assert [path.name for path in made[0]] == names
    assert made[0][0].parent == tmp_path / "x" / "figures"
    assert [path.read_bytes() for path in made[0]] == [path.read_bytes() for path in made[1]]
    alone = figures.save_all(RECORDS["eight, no joint"], tmp_path / "previews" / "s" / "b" / "c.json")
    assert [path.suffix for path in alone] == [".png", ".pdf"]
