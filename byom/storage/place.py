"""Places of records: one immutable JSON file per run, named by the signature of its choices."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from byom.errors import OptionError
from byom.storage.atomic import write_json
from byom.storage.lock import owner, without_owner


@dataclass(frozen=True)
class Place:
    """The place of a run's record: the signature that ends a file's name identifies it, the rest is for people.

    Args:
        root: The results folder.
        suite: Suite name.
        backbone: Backbone option.
        label: ``<merge>+<variant>--m10-seed0``; older records have ``<merge>+<variant>`` alone.
        signature: Hash of the choices.
    """

    root: Path
    suite: str
    backbone: str
    label: str
    signature: str

    @property
    def done(self) -> Path:
        """The record of a finished run, under whatever label it was written."""
        return self._file(".json")

    @property
    def failed(self) -> Path:
        """The record of a run that failed."""
        return self._file(".failed.json")

    def _file(self, ending: str) -> Path:
        written = sorted(self._folder.glob(f"*--{self.signature}{ending}"))
        return written[0] if written else self._folder / f"{self.label}--{self.signature}{ending}"

    @property
    def _folder(self) -> Path:
        return self.root / "runs" / self.suite / self.backbone

    def finished(self) -> dict[str, Any] | None:
        """Return the finished record, or None.

        Raises:
            OptionError: If the file cannot be parsed.
        """
        if not self.done.is_file():
            return None
        try:
            return json.loads(self.done.read_text(encoding="utf-8"))
        except ValueError as error:
            raise OptionError(f"{self.done} is damaged ({error}); delete it to run this cell again") from error

    def require_writable(self) -> None:
        """Refuse a results folder that cannot be written, before any work starts.

        Raises:
            OptionError: Naming the folder.
        """
        require_writable(self._folder, "results", "set results= to a writable folder")

    def write(self, record: Mapping[str, Any]) -> Path:
        """Write a finished record, or a failed one next to where it would be; atomic.

        Args:
            record: The record, with its ``status``.

        Returns:
            The file.
        """
        path = self.done if record["status"] == "done" else self.failed
        write_json(path, record)
        if path == self.done:
            self.failed.unlink(missing_ok=True)
        return path


def require_writable(folder: Path, what: str, remedy: str, *, make: bool = True) -> None:
    """Refuse a folder that cannot be written.

    Args:
        folder: The folder.
        what: What is going to be written, for the message.
        remedy: What to do about it.
        make: Whether it is made if it is missing.

    Raises:
        OptionError: Naming the folder and the remedy.
    """
    probe = folder / f".writable-{owner()}"
    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        for left in without_owner(folder, ".writable-"):
            left.unlink(missing_ok=True)
        probe.write_text("", encoding="utf-8")
        probe.unlink()
    except OSError as error:
        raise OptionError(f"cannot write {what} to {folder} ({error}); {remedy}") from error


def at_home(text: str) -> Path:
    """Return a path, ``~`` and ``~user`` in front of it expanded.

    Raises:
        OptionError: If this machine knows no such user.
    """
    try:
        return Path(text).expanduser() if text.startswith("~") else Path(text)  # it would take ./~ for ~ as well
    except RuntimeError as error:
        raise OptionError(
            f"{text!r} begins with the home folder of a user that this machine does not know; give the whole path, or "
            "begin it with ./ if the folder is called so"
        ) from error


def now() -> str:
    """Return the time in UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
