"""The table of costs: the larger stage is the memory, and what routing loses is positive."""

from __future__ import annotations

import numpy as np
import pytest

from byom.report.methods import display_methods, methods
from byom.report.rows import rows
from tests.unit import synthetic_runs as synthetic


def costed(seed: int, mean: float, memory: tuple[float, float] = (0.0, 0.0), **choices) -> dict:
    """Make a record of BYOM-FFT on TIES that says what it cost."""
    one = synthetic.record("ties", "fft", seed, 0.1, **choices)
    one["tuning"] = {}  # so that the settings of all seeds are the same
    one["hyperparameters"]["merge"]["scale"] = 0.3
    one["summary"]["test"]["absolute"] = mean
    merge, variant = ({"seconds": 1.0, "extra_mib": extra} for extra in memory)
    return one | {"cost": {"merge": merge, "variant": variant, "statistics": {"seconds": 4.0}}}


def table(made: list[dict]):
    return methods(rows(synthetic.lift(made)))


def test_memory_is_that_of_the_larger_stage():
    assert table([costed(0, 0.5, (100.0, 30.0)), costed(1, 0.5, (10.0, 60.0))])["extra_mib"].tolist() == [80]


def test_the_price_of_routing_is_what_the_row_with_known_tasks_has_more():
    known = [costed(seed, mean) for seed, mean in ((0, 0.75), (1, 0.5), (2, 0.1))]
    routed = [costed(seed, mean, router="knn") for seed, mean in ((0, 0.5), (1, 0.375))]
    for one, share in zip(routed, (0.5, 1.0), strict=True):
        one["hyperparameters"]["router"] = {"k": 5}
        one["titles"] = {"router": "kNN"}
        one["routed"] = {"accuracy": {"test": {"mnist": share, "svhn": 1.0}}}
    frame = table([*known, *routed]).set_index("method")
    row = frame.loc["BYOM-FFT on TIES, kNN"]
    assert row["price"] == pytest.approx((0.25 + 0.125) / 2)
    assert row["right"] == pytest.approx((0.75 + 1.0) / 2)
    assert frame.loc["BYOM-FFT on TIES", ["price", "right"]].isna().all()
    shown = display_methods(frame.reset_index()).set_index("Method")
    assert shown["Price"].to_dict() == {"BYOM-FFT on TIES": "—", "BYOM-FFT on TIES, kNN": "18.8"}
    assert np.isnan(table(routed)["price"]).all()
