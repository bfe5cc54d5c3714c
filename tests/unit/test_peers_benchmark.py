"""The benchmark beside other tools: its command line, its rows, and what it says of figures."""

import time

import pytest
import torch

from benchmarks import peers
from benchmarks.peers_compare import difference, norm_ratio
from benchmarks.peers_methods import ROWS
from benchmarks.peers_tools import WORK
from byom.weights import Weights


def told(seconds, **more):
    run = {"seconds": seconds, "peak_bytes": 2e6, "finished": True, "done": 1.0}
    return {**run, "says": "", "runs": [run], **more}


def result(**tools):
    return {
        "provenance": {"hardware": {"cpu": "a CPU"}},
        "models": {"parameters": 1e6, "bytes": 4e6},
        "versions": {"byom": "1", "mergekit": "2", "PEFT": None},
        "load": {"warning": "the machine was not idle"},
        "tasks": 8,
        "threads": 2,
        "repeats": 1,
        "rows": {"average": tools},
    }


def test_every_row_says_what_its_tools_do():
    for row in ROWS.values():
        assert set(row.tools) <= set(row.columns) and not set(row.absent) & set(row.tools)
        assert set(row.absent) <= set(row.columns) and all(work.how in WORK for work in row.tools.values())


def test_options(tmp_path):
    read = peers.options(["--folder", str(tmp_path), "--only", "ties,tsv", "--tools", "byom", "--small"])
    assert (read.only, read.tools, read.folder.name) == (["ties", "tsv"], ["byom"], "small")


REFUSED = {
    "only tie": "'tie' is none of",
    "tools pet": "'pet' is none of",
    "repeats 0": "at least 1, and",
    "tasks 1": "--tasks at least 2",
}


@pytest.mark.parametrize("given", REFUSED)
def test_options_that_do_nothing_are_refused(given, tmp_path, capsys):
    with pytest.raises(SystemExit):
        peers.options(["--folder", str(tmp_path), *f"--{given}".split()])
    assert REFUSED[given] in capsys.readouterr().err.rpartition("error:")[2]


def test_the_table_and_the_sentences():
    slower = told(3.0, difference=2e-3, norm_ratio=1.0, allowed=1e-4)
    stopped = told(150.0, finished=False, runs=[{"done": 0.25}])
    given = result(byom=told(1.5), mergekit=slower, **{"fusion-bench": stopped})
    lines = peers.table(given).splitlines()
    assert "mergekit 2" in lines[0] and "PEFT" not in lines[0] and lines[-1] == "the machine was not idle"
    assert lines[5] == "| averaging | mergekit | 3.00 | 2.0 | 2 MB | 2e-03 |  |"
    assert lines[6] == "| averaging | fusion-bench | > 150.00 | > 100.0 | 2 MB |  | stopped after 150 s, 25% done |"
    assert peers.missed(given) == "average: mergekit and byom differ by 2.0e-03, 0.0001 is allowed"
    assert peers.missed(result(byom=stopped, mergekit=slower)).startswith("average: byom was stopped after 150 s")
    given = result(byom=told(1.5), mergekit=told(1.0), PEFT={"says": "failed: it"})
    assert peers.missed(given) == "average: byom took 1.50 s, mergekit 1.00\naverage: PEFT failed: it"


def test_differences_are_relative_to_what_changed(tmp_path):
    base, ours = torch.zeros(3), torch.tensor([3.0, 4.0, 0.0])
    folders = []
    for name, value in (("base", base), ("ours", ours), ("theirs", 1.1 * ours)):
        folders.append(Weights.of({"w": value, "same": base}).save(tmp_path / name))
    assert difference(*folders, adapters=False) == pytest.approx(0.1)
    assert norm_ratio(*folders, adapters=False) == pytest.approx(1.1)
    other = Weights.of({"w": ours}).save(tmp_path / "other")
    with pytest.raises(SystemExit, match="differ in 1 tensors, such as same"):
        difference(*folders[:2], other, adapters=False)


def test_the_load_of_others_is_not_this_process():
    load = peers.Load(start=(0.0, 0.0, 0.0))
    with load.watched():
        end = time.process_time() + 0.03
        while time.process_time() < end:
            pass
    assert 0 <= load.share < 1 and load.whole > 0
    assert "not idle" in peers.Load(start=(8.0, 0.0, 0.0)).said()["warning"]
    assert not peers.Load(start=(0.0, 0.0, 0.0)).said()["warning"]
