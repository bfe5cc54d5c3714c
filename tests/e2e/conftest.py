"""Figures are drawn coarsely: that they are drawn is tested here, not how finely."""

import pytest

from byom.report.figures.style import STYLE


@pytest.fixture(autouse=True, scope="session")
def coarse_figures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(STYLE, "savefig.dpi", 50)
        yield
