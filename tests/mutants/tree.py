"""A copy of the repository in which one fault at a time is planted."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.mutants.mutant import Mutant

IDENTITY = ("-c", "user.name=mutants", "-c", "user.email=mutants@localhost", "-c", "commit.gpgsign=false")


class Tree:
    """A copy of all that git tracks, with a history of its own.

    Tests ask git what code a result came from, and find configurations and committed results from where they lie
    themselves: links would lead them back to the tree without the fault.
    """

    def __init__(self, root: Path, folder: Path) -> None:
        self.root, self.folder = root, folder
        for name in _listed(root):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, folder / name)
        self._git("init", "-q")
        self._commit()

    @contextmanager
    def planted(self, mutants: Mapping[Mutant, Path]) -> Iterator[None]:
        """Plant faults in their files, and take them out again, along with all that was written since."""
        sources = {file: (self.folder / file).read_text(encoding="utf-8") for file in mutants.values()}
        changed = dict(sources)
        for mutant, file in mutants.items():
            changed[file] = mutant.planted(changed[file])
        self._write(changed)  # and commit: a tree with changes would put its results elsewhere
        try:
            yield
        finally:
            self.clean()
            self._write(sources)

    def clean(self) -> None:
        """Remove what tests left behind."""
        self._git("reset", "-q", "--hard")
        self._git("clean", "-fdq")
        shutil.rmtree(self.folder / ".hypothesis", ignore_errors=True)  # its examples are those of another fault

    def _write(self, sources: Mapping[Path, str]) -> None:
        for file, source in sources.items():
            (self.folder / file).write_text(source, encoding="utf-8")
            _forget(self.folder / file)
        self._commit()

    def _commit(self) -> None:
        self._git("add", "-A")
        self._git(*IDENTITY, "commit", "-q", "--allow-empty", "-m", "tree")

    def _git(self, *arguments: str) -> None:
        subprocess.run(["git", *arguments], cwd=self.folder, check=True)


def _listed(root: Path) -> list[str]:
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [name for name in done.stdout.split("\0") if name and (root / name).is_file()]


def _forget(path: Path) -> None:
    """Remove compiled code: it is told from newer source by size and whole seconds, and a fault may change neither."""
    for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
        compiled.unlink()
