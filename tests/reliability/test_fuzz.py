"""A fixed budget of damaged checkpoints; ``make fuzz`` tries more of them."""

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.fuzz.doors import doors
from tests.fuzz.mutations import mutated
from tests.fuzz.trial import trial

DOORS = doors()


@pytest.mark.parametrize("name", DOORS)
def test_valid_files_are_read(tmp_path, name):
    for files in DOORS[name].valid:
        assert trial(DOORS[name], files, tmp_path / "x") is None
        assert DOORS[name].enter(tmp_path / "x")


@pytest.mark.parametrize("name", DOORS)
def test_damaged_files_are_read_rightly_or_refused_by_a_sentence(tmp_path, name):
    door = DOORS[name]

    @settings(
        max_examples=150, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.randoms(use_true_random=False), st.sampled_from(range(len(door.valid))))
    def tried(draw, which):
        assert trial(door, mutated(door.valid[which], draw), tmp_path / "x") is None

    tried()
