"""Values as colour over the triangle of three weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.tri import TriAnalyzer, Triangulation

HEIGHT = 3**0.5 / 2  # of a triangle with sides of length 1
CORNERS = ((-0.1, -0.05, "left", "top"), (1.1, -0.05, "right", "top"), (0.5, HEIGHT + 0.03, "center", "bottom"))


def places(weights: np.ndarray) -> np.ndarray:
    """Return where weightings lie.

    Args:
        weights: ``[N, 3]``, each row of sum 1.

    Returns:
        ``[N, 2]``: all weight on the first is the left corner, on the second the right, on the third the top.
    """
    return np.stack([weights[:, 1] + weights[:, 2] / 2, HEIGHT * weights[:, 2]], 1)


def draw_triangle(
    axes: Axes, weights: np.ndarray, values: np.ndarray, scale: ScalarMappable, corners: Sequence[str]
) -> None:
    """Draw values between weightings by interpolation, with a dot at each weighting.

    Args:
        axes: Empty axes.
        weights: ``[N, 3]``, the corners among them.
        values: ``[N]``.
        scale: Of the colours.
        corners: What the left, right and top corners are called.
    """
    here, (low, high) = places(weights), scale.get_clim()
    mesh = Triangulation(*here.T)
    mesh.set_mask(TriAnalyzer(mesh).get_flat_tri_mask(0.01))  # slivers along the edges, from rounding
    axes.tripcolor(mesh, values, shading="gouraud", cmap=scale.get_cmap(), vmin=low, vmax=high)
    axes.plot(*here.T, linestyle="none", marker=".", markersize=1.2, color="black", alpha=0.5)
    axes.plot([0, 1, 0.5, 0], [0, 0, HEIGHT, 0], color="black", linewidth=0.6)
    for (x, y, across, up), name in zip(CORNERS, corners, strict=True):
        axes.text(x, y, name, ha=across, va=up, fontsize=6)
    axes.set(xlim=(-0.12, 1.12), ylim=(-0.17, HEIGHT + 0.14), aspect="equal")
    axes.set_axis_off()
