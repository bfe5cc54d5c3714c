"""Tries damaged checkpoints and keeps those that show a fault: ``python -m tests.fuzz --minutes 30``."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random

from tests.fuzz.doors import doors
from tests.fuzz.mutations import mutated
from tests.fuzz.trial import trial


def main() -> None:
    """Read the arguments and run; each door has a process of its own, which a crash ends without ending the rest."""
    given = _arguments()
    if given.door:
        _door(given.door, given.minutes, given.seed, given.keep)
        return
    keep = given.keep or Path(tempfile.mkdtemp(prefix="byom-fuzz-"))
    faults = sum(_watched(door, given.minutes / 2, given.seed, keep) for door in doors())
    print(f"{faults} faults; inputs that show them are in {keep}" if faults else "no fault")
    if not faults and not given.keep:
        shutil.rmtree(keep)
    sys.exit(1 if faults else 0)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30, help="time for both doors together (default: 30)")
    parser.add_argument("--seed", type=int, default=0, help="of all choices (default: 0)")
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="where inputs with faults go (default: a new folder)"
    )
    parser.add_argument("--door", choices=sorted(doors()), help=argparse.SUPPRESS)
    return parser.parse_args()


def _watched(door: str, minutes: float, seed: int, keep: Path) -> int:
    """Run a door's process until the time is over, again with the next inputs after a crash; return its faults."""
    end, crashes = time.monotonic() + 60 * minutes, 0
    while (left := (end - time.monotonic()) / 60) > 0:
        command = [
            sys.executable,
            "-m",
            "tests.fuzz",
            "--door",
            door,
            "--minutes",
            str(left),
            "--seed",
            str(seed),
            "--keep",
            str(keep),
        ]
        if (code := subprocess.call(command)) == 0:
            break
        crashes += 1
        seed += 1_000_003
        print(f"{door}: the process ended with {code}", flush=True)
        shutil.copytree(keep / f"{door}-now", keep / f"{door}-crash-{crashes}")
    shutil.rmtree(keep / f"{door}-now", ignore_errors=True)
    return crashes + len(list(keep.glob(f"{door}-*/fault.json")))


def _door(name: str, minutes: float, seed: int, keep: Path) -> None:
    door, end, tried = doors()[name], time.monotonic() + 60 * minutes, 0
    known: dict[tuple[str, str], int] = {}
    folder = keep / f"{name}-now"
    while time.monotonic() < end:
        draw = Random(f"{name} {seed} {tried}")
        files = mutated(draw.choice(door.valid), draw)
        fault = trial(door, files, folder)
        tried += 1
        if fault:
            key = (fault[0], fault[1].split(" ")[0])
            known[key] = known.get(key, 0) + 1
            if known[key] == 1:
                _keep(keep / f"{name}-{seed}-{tried - 1}", folder, fault)
                print(f"{name} {seed} {tried - 1}: {fault[0]}: {fault[1][:300]}", flush=True)
    print(
        f"{name}: {tried} inputs, {sum(known.values())} with a fault, of {len(known)} kinds (seed {seed})", flush=True
    )


def _keep(place: Path, folder: Path, fault: tuple[str, str]) -> None:
    shutil.copytree(folder, place / "input", dirs_exist_ok=True)
    (place / "fault.json").write_text(json.dumps({"kind": fault[0], "where": fault[1]}, indent=1))


if __name__ == "__main__":
    main()
