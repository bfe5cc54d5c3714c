"""The cache says how large it is; `byom clean` removes what nothing needs, nothing else, and nothing that is locked."""

import os
import re
import time

import pytest
import torch

from byom.__main__ import main
from byom.cli import caches as command
from byom.data.split import Split, save_split
from byom.storage import caches
from byom.storage.lock import alone, owner

SIXTEEN, TWELVE = "0123456789abcdef", "0123456789ab"
GONE = re.sub(r"\d+$", str(2**22 + 7), owner())  # beyond Linux's largest number of a process
NEEDED = (
    f"data/{SIXTEEN}-test.safetensors", f"experts/{TWELVE}/training.json", f"experts/{TWELVE}/model.safetensors",
    f"merged/{TWELVE}/model.safetensors", f"merged/{TWELVE}.cost.json", f"statistics/{TWELVE}/cost.json",
    f"scores/{TWELVE}-test.json", f"data/.{SIXTEEN}-test.safetensors.{owner()}",
    "data/photos/cat.jpg", "data/notes.txt", "experts/mine/model.safetensors", "runs/suite/a.json",
    f"data/digests/{SIXTEEN * 4}", f"scores/{TWELVE}-test-bf16.json", f"cuts/{SIXTEEN}.json",
)  # fmt: skip
LEFT = (
    f"data/.{SIXTEEN}-train.safetensors.encoding/rows.safetensors", f"data/.{SIXTEEN}-train.safetensors.{GONE}",
    f"data/{SIXTEEN}-shots.safetensors", f"experts/{TWELVE}.training/state.safetensors",
    "experts/ba9876543210/model.safetensors", "merged/ba9876543210/model.safetensors", "merged/ca9876543210.cost.json",
    f"merged/.{TWELVE}.cost.json.{GONE}", f"merged/.{TWELVE}.partial-{GONE}/model.safetensors",
    "statistics/ba9876543210/values.safetensors", f"tuning/{TWELVE}.json",
)  # fmt: skip


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    split = Split({"pixels": torch.zeros(2, 3, 4, 4, dtype=torch.uint8)}, torch.zeros(2, dtype=torch.int64))
    save_split(folder / NEEDED[0], split)
    for name in (*NEEDED[1:], *LEFT):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{" if "tuning" in name or "shots" in name else "{}", encoding="utf-8")
    monkeypatch.setattr(command, "_cache", lambda arguments: folder)  # Hydra takes its time
    return folder


def there(cache):
    return {path.relative_to(cache).as_posix() for path in cache.rglob("*") if path.is_file()} - LOCKS


LOCKS = {
    f"running/.{TWELVE}.lock",
    f"experts/.{TWELVE}.lock",
    f"data/.{SIXTEEN}-train.safetensors.lock",
    f"statistics/.{SIXTEEN}.lock",
}


def test_clean_removes_what_is_left_over_and_nothing_else(cache, capsys):
    assert main(["clean", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert there(cache) == {*NEEDED, *LEFT} and "would be removed" in said
    assert main(["clean"]) == 0
    assert there(cache) == set(NEEDED)
    assert capsys.readouterr().out.splitlines()[:-1] == said.splitlines()[:-1]
    for why in ("a damaged file", "encoding was stopped", "training that was stopped", "not finished", "is gone"):
        assert why in said
    assert main(["clean"]) == 0 and capsys.readouterr().out.startswith("0 B were removed")


def test_clean_keeps_what_a_process_makes(cache, capsys):
    making = (cache / f"experts/{TWELVE}", cache / f"data/{SIXTEEN}-train.safetensors", cache / f"statistics/{SIXTEEN}")
    with alone(making[0]), alone(making[1]), alone(making[2]):
        assert main(["clean"]) == 0
        kept = {LEFT[0], LEFT[1], LEFT[3], LEFT[9]}
        assert there(cache) == {*NEEDED, *kept}
        assert main(["clean", "experts", "statistics"]) == 0
        said = capsys.readouterr().out
        assert there(cache) >= {*NEEDED, *kept} and said.count("a running process needs it") == 4
    assert main(["clean"]) == 0 and there(cache) == set(NEEDED)


def test_clean_removes_kinds_and_only_what_byom_named(cache, capsys):
    assert main(["clean", "data", "experts"]) == 0
    left = {name for name in NEEDED if not re.match(rf"(data/{SIXTEEN}|experts/{TWELVE}|data/digests)", name)}
    assert {name for name in there(cache) if name.startswith(("data", "experts", "runs"))} == {
        name for name in left if name.startswith(("data", "experts", "runs"))
    }
    assert f"merged/{TWELVE}/model.safetensors" in there(cache)


def test_clean_by_age(cache, capsys):
    old = time.time() - 40 * 86400
    for name in (f"experts/{TWELVE}/training.json", f"experts/{TWELVE}/model.safetensors"):
        os.utime(cache / name, (old, old))
    assert main(["clean", "experts", "merged", "older=30d"]) == 0
    assert there(cache) == {*NEEDED, *LEFT} - {f"experts/{TWELVE}/{n}" for n in ("training.json", "model.safetensors")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dta"], "byom clean knows no 'dta'; did you mean 'data'"),
        (["data", "older=month"], "older=month; give hours, days or weeks"),
    ],
)
def test_clean_refuses_what_it_does_not_know(cache, capsys, arguments, message):
    assert main(["clean", *arguments]) == 1
    assert message in capsys.readouterr().err and there(cache) == {*NEEDED, *LEFT}


def test_nothing_outside_of_the_cache_is_removed(cache, tmp_path, capsys):
    (cache / "experts").rename(tmp_path / "elsewhere")
    (cache / "experts").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (cache / "merged" / TWELVE).rename(tmp_path / "model")
    (cache / "merged" / TWELVE).symlink_to(tmp_path / "model", target_is_directory=True)
    assert main(["clean", "experts", "merged"]) == 1
    assert "leads out of the cache" in capsys.readouterr().err
    assert (tmp_path / "elsewhere" / TWELVE / "training.json").is_file()
    assert (tmp_path / "model" / "model.safetensors").is_file() and not (cache / "merged" / TWELVE).exists()


def test_the_cache_says_how_large_it_is(cache, capsys):
    assert main(["list", "caches"]) == 0
    said = capsys.readouterr().out
    data = sum(entry.bytes for entry in caches.entries(cache, "data"))
    assert re.search(rf"data +encoded splits +5 +5 +{command.amount(data)} +20\d\d-\d\d-\d\d", said), said
    assert "left over; `byom clean` removes it" in said


def test_folders_that_hold_other_files_are_nobodys(cache):
    mine = [f"{kind}/aa9876543210/pytorch_model.bin" for kind in ("experts", "joint", "merged", "served", "statistics")]
    mine += ["hits/aa9876543210/photo.jpg", "data/digests/mine.txt", "merged/bb9876543210/deep/model.safetensors"]
    for name in mine:
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).write_text("mine", encoding="utf-8")
    assert main(["clean", *caches.KINDS]) == 0 and main(["clean"]) == 0
    assert there(cache) >= {*mine, f"data/digests/{SIXTEEN * 4}"}
    assert not there(cache) & {f"scores/{TWELVE}-test-bf16.json", f"cuts/{SIXTEEN}.json", f"merged/{TWELVE}.cost.json"}


def test_while_a_cell_runs_nothing_goes_that_it_may_read(cache, capsys):
    with alone(cache / "running" / TWELVE):
        assert main(["clean", "merged"]) == 0
    assert f"merged/{TWELVE}/model.safetensors" in there(cache)
    assert f"kept  merged/{TWELVE}  (a running process needs it, or may)" in capsys.readouterr().out
    assert not [name for name in there(cache) if name.startswith("merged/ba")]


def test_what_is_half_removed_counts_for_nothing(cache, monkeypatch, capsys):
    def stop(folder):
        raise PermissionError(f"{folder} is write-protected")

    with monkeypatch.context() as patch:
        patch.setattr(caches.shutil, "rmtree", stop)
        assert main(["clean", "merged", "experts"]) == 1
    assert "is write-protected" in capsys.readouterr().err
    assert not (cache / "merged" / TWELVE).exists() and not (cache / f"merged/{TWELVE}.cost.json").exists()
    left = cache / f"experts/.{TWELVE}.old-{owner()}"
    left.rename(cache / f"experts/.{TWELVE}.old-{GONE}")
    assert main(["clean"]) == 0 and not [name for name in there(cache) if ".old-" in name and GONE in name]


def test_a_trial_refuses_what_the_command_refuses(cache, tmp_path, capsys):
    (cache / "merged").rename(tmp_path / "elsewhere")
    (cache / "merged").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert main(["clean", "merged", "--dry-run"]) == 1
    assert "leads out of the cache" in capsys.readouterr().err


def test_a_cache_that_is_not_there_is_said(cache, monkeypatch, capsys):
    monkeypatch.setattr(command, "_cache", lambda arguments: cache / "typo")
    assert main(["clean"]) == 0
    assert capsys.readouterr().out == f"0 B were removed from {cache / 'typo'}, which is no folder\n"
