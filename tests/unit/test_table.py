"""What a table command says where some or all of its cells failed."""

from __future__ import annotations

import pytest

from byom.cli import config, table
from byom.errors import DataError
from tests.unit import synthetic_runs as synthetic

SUITE, BACKBONE = "vision8_offline", "vit_small_dinov2"


def cell(results, *options):
    return [f"suite={SUITE}", f"backbone={BACKBONE}", f"results={results}", *options]


@pytest.mark.data
def test_a_suite_without_a_finished_cell_costs_no_other_suite_its_table(tmp_path, capsys):
    results = tmp_path / "scratch"  # a tree with changes writes nowhere else
    synthetic.write(results, synthetic.records())
    cells = [cell(results, "suite.only=[chess,mnist]"), cell(results)]
    table.write_all(table.places(cells, lambda *one: config.settings(one)), ())
    said = capsys.readouterr()
    assert f"no table of {SUITE}-chess-mnist with {BACKBONE}: none of its cells has finished" in said.err
    assert said.err.count("\n") == 1 and f"{SUITE}--{BACKBONE}.md" in said.out


def test_every_reason_of_a_failure_is_said_once_with_the_cells_it_ended():
    every = [["suite=s", f"merge=m{number}"] for number in range(9)]
    failed = [(each, DataError("no such file")) for each in every[:7]] + [(every[8], KeyError("x"))]
    assert table.failures(every, failed).splitlines() == [
        "byom: 7 of 9 cells failed: no such file",
        *(f"    merge=m{number}" for number in range(5)),
        "    and 2 more",
        "byom: 1 of 9 cells failed: KeyError: 'x'",
        "    merge=m8",
    ]


def test_a_single_cell_is_named_whole_and_no_failure_says_nothing():
    assert table.failures([["a=1", "b=2"]], [(["a=1", "b=2"], DataError("gone"))]).endswith("    a=1 b=2\n")
    assert table.failures([["a=1"]], []) == ""
