"""Commands in forks of one process that has everything imported, killed at the n-th change of a folder, or two at once.

``python -m tests.e2e.killed`` reads orders from its input, a line of JSON each, and answers each with lines of JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from importlib import import_module
from pathlib import Path

from pytest import MonkeyPatch

from tests.e2e.tiny import COARSE, fewer

LOADED = ("timm", "byom.pipeline.run", "byom.report.report", "byom.report.figures.suite")
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "shutil.rmtree"}


class Fatal:
    """An audit hook that counts changes below a folder and kills its process in the middle of the n-th."""

    def __init__(self, folder, number):
        self.folder, self.left, self.seen, self.dying = str(folder), number, 0, False

    def __call__(self, event, arguments):
        if self.dying or not self.changes(event, arguments):
            return
        self.seen += 1
        if self.seen == self.left:
            self.dying = True
            if event == "open":  # the worst moment: what was there is gone, and nothing is written yet
                Path(arguments[0]).write_bytes(b"")
            os.kill(os.getpid(), signal.SIGKILL)

    def changes(self, event, arguments):
        if event == "open":
            return isinstance(arguments[0], str) and self.below(arguments[0]) and writes(arguments[2])
        return event in CHANGES and self.below(os.fspath(arguments[0]))

    def below(self, path):
        return path.startswith(self.folder) and not path.endswith(".lock")


def writes(flags):
    return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))


def attempt(folder, number, command):
    """Run a command in a fork; return its status, negative if it was killed, and how many changes it made."""
    from byom.__main__ import main

    out, into = os.pipe()
    if child := os.fork():
        os.close(into)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return status, int(os.read(out, 20) or 0)
    fatal = Fatal(folder, number)
    sys.addaudithook(fatal)
    status = main(command)
    os.write(into, str(fatal.seen).encode())
    os._exit(status)


def finished(folder):
    """Return when each finished record below a folder was written; one that cannot be read is an error."""
    records = [p for p in Path(folder).rglob("runs/**/*.json") if not p.name.endswith(".failed.json")]
    assert all(json.loads(p.read_text())["status"] == "done" for p in records)
    return {p.name: p.stat().st_mtime_ns for p in sorted(records)}


def killed(folder, numbers, command):
    """Run a command once for each number, killed at that change, and yield what is finished after each."""
    for number in numbers:
        status, seen = attempt(folder, number, command)
        yield {"status": status, "seen": seen, "finished": finished(folder)}


def together(folder, count, command):
    """Run a command several times at once; yield the statuses and what each wrote to its standard error."""
    from byom.__main__ import main

    files, children = [Path(folder) / f"stderr{number}" for number in range(count)], []
    for file in files:
        if not (child := os.fork()):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), 2)
            os._exit(main(command))
        children.append(child)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    yield {"statuses": statuses, "said": [file.read_text(encoding="utf-8") for file in files]}


def main():
    """Carry out orders until there are no more; tables have five cells."""
    for module in LOADED:  # once, and not in every fork
        import_module(module)
    from byom.report.figures.style import STYLE

    fewer(MonkeyPatch())
    STYLE |= COARSE
    for line in sys.stdin:
        work, *given = json.loads(line)
        for answer in {"killed": killed, "together": together}[work](*given):
            sys.stdout.write(f"\n{json.dumps(answer)}\n")  # what was killed may have left an unfinished line
            sys.stdout.flush()


if __name__ == "__main__":
    main()
