"""Load on a bundle's server: one task against all of them mixed, with a real server and a real load generator.

    byom pack bundle suite=text8_offline merge=ties byom=fft byom.density=0.05
    python -m benchmarks.serving bundle --check --json benchmarks/serving.json

Starts `byom serve` and locust (pip install 'byom[load]') as processes of their own on one machine, so that they share
its processors. Users send one text at a time and wait for its answer. Rounds alternate between one task and all, and
each row is of the best round, because others may use the machine. `--check` fails if all tasks mixed reach less than
70 % of the requests per second of one task with the most users, in the median of rounds, or if any request fails.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from benchmarks.options import conclude, parser

ROOT = Path(__file__).parents[1]
WITHIN = 0.7


@contextmanager
def served(bundle: str, options: list[str]):
    """Start a server of a bundle; gives its URL."""
    command = [sys.executable, "-m", "byom", "serve", bundle, "port=0", *options]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            if not said:
                sys.exit("the server did not start; its reason is above")
            yield said.split()[0]
        finally:
            process.terminate()


def counts(url: str) -> dict[str, float]:
    """Return switches and batches so far."""
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        lines = [line.split() for line in answer.read().decode().splitlines() if not line.startswith("#")]
    names = {"byom_switches_total": "switches", "byom_batch_items_count": "batches", "byom_batch_items_sum": "items"}
    return {names[line[0]]: float(line[1]) for line in lines if line[0] in names}


def load(url: str, tasks: list[str], users: int, seconds: int) -> dict[str, float]:
    """Return what locust measured, and what the server counted meanwhile."""
    command = [sys.executable, "-m", "locust", "-f", "benchmarks/serving_load.py", "--host", url, "--headless"]
    command += [
        "-u",
        str(users),
        "-r",
        str(users),
        "-t",
        f"{seconds}s",
        "--json",
        "--reset-stats",
        "--loglevel",
        "ERROR",
    ]
    before = counts(url)
    environment = os.environ | {"BYOM_TASKS": ",".join(tasks)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    after = counts(url)
    if not done.stdout.strip():
        sys.exit(f"locust failed:\n{done.stderr[-2000:]}")
    row = json.loads(done.stdout)[0]
    spent = row["last_request_timestamp"] - row["start_time"]
    times = sorted((float(ms), count) for ms, count in row["response_times"].items())
    found = {name: round(after[name] - before[name]) for name in ("switches", "batches")}
    items = (after["items"] - before["items"]) / max(found["batches"], 1)
    return {
        "requests": row["num_requests"], "failures": row["num_failures"],
        "per_second": round(row["num_requests"] / spent, 1), "p50_ms": quantile(times, 0.5),
        "p95_ms": quantile(times, 0.95), **found, "items_per_batch": round(items, 1),
    }  # fmt: skip


def quantile(times: list[tuple[float, int]], share: float) -> float:
    """Return the time within which a share of the requests was answered."""
    left = share * sum(count for _, count in times)
    for ms, count in times:
        left -= count
        if left <= 0:
            return ms
    return times[-1][0]


def table(result: dict) -> str:
    """Return a row for one task and for all of them."""
    lines = ["| traffic | requests/s | p50 | p95 | switches | batches | items per batch |", "|---|" + "--:|" * 6]
    for name, row in result["traffic"].items():
        cells = f"{row['per_second']:.0f} | {row['p50_ms']:.0f} ms | {row['p95_ms']:.0f} ms"
        lines.append(f"| {name} | {cells} | {row['switches']} | {row['batches']} | {row['items_per_batch']} |")
    said = [f"{users} users: {', '.join(f'{s:.0%}' for s in shares)}" for users, shares in result["shares"].items()]
    return "\n".join([*lines, "", f"Mixed traffic relative to one task, round by round: {'; '.join(said)}."])


def missed(result: dict) -> str:
    """Return a sentence where mixed traffic is too slow or requests failed."""
    rows = result["traffic"].items()
    said = [f"{row['failures']} requests of {name} failed" for name, row in rows if row["failures"]]
    users, shares = list(result["shares"].items())[-1]  # of the most users: with few, batches of many tasks are small
    if (share := median(shares)) < WITHIN:
        said.append(
            f"mixed traffic of {users} users has {share:.0%} of one task's requests per second, below {WITHIN:.0%}"
        )
    return "\n".join(said)


def main() -> None:
    """Load the server with one task and with all of them, in turns."""
    made = parser(__doc__ or "", repeats=2)
    made.add_argument("bundle")
    made.add_argument("options", nargs="*", help="of byom serve, such as batch=32")
    made.add_argument("--users", type=lambda text: [int(one) for one in text.split(",")], default=[32, 128])
    made.add_argument("--seconds", type=int, default=15)
    options = made.parse_args()
    rounds: dict[str, list[dict]] = {}
    with served(options.bundle, options.options) as url:
        with urllib.request.urlopen(f"{url}/tasks") as answer:
            tasks = [task["name"] for task in json.load(answer)["tasks"]]
        load(url, tasks, options.users[0], 3)  # every task was on once
        for _ in range(options.repeats):
            for users in options.users:
                for kind, some in (("one task", tasks[:1]), (f"{len(tasks)} tasks mixed", tasks)):
                    name = f"{users} users, {kind}"
                    rounds.setdefault(name, []).append(load(url, some, users, options.seconds))
                    sys.stderr.write(f"{name}: {rounds[name][-1]}\n")
    pairs = {users: [rounds[name] for name in rounds if name.startswith(f"{users} users")] for users in options.users}
    shares = {
        users: [round(mixed["per_second"] / one["per_second"], 2) for one, mixed in zip(*pair, strict=True)]
        for users, pair in pairs.items()
    }
    result = {
        "machine": platform.machine(), "processors": os.cpu_count(),
        "seconds": options.seconds, "options": options.options,
        "shares": {str(users): values for users, values in shares.items()},
        "traffic": {name: max(found, key=lambda row: row["per_second"]) for name, found in rounds.items()},
    }  # fmt: skip
    conclude(result, table(result), missed(result), options)


if __name__ == "__main__":
    main()
