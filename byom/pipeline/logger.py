"""Loggers: where a finished record is shown or mirrored. Records stay the truth."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from byom.errors import OptionError
from byom.storage.atomic import write_text
from byom.storage.place import at_home
from byom.storage.record import Record
from byom.storage.signature import signature


class Logger(ABC):
    """Told about every record, finished now or found finished."""

    @abstractmethod
    def finished(self, record: Record, path: Path) -> None:
        """Take a record that this run has written."""

    def skipped(self, record: Record, path: Path) -> None:
        """Take a record that an earlier run has written."""
        tqdm.write(f"{headline(record)}  finished before: {path}", file=sys.stdout)

    def mirror(self, record: Record, path: Path) -> None:  # noqa: B027 - most loggers only show
        """Take a record that an earlier run has written, where it is not shown."""

    def failed(self, record: Record, path: Path) -> None:  # noqa: B027 - whoever runs the cell says why it failed
        """Take the record of a run that failed."""


@dataclass(frozen=True)
class Console(Logger):
    """Print one line per run."""

    def finished(self, record: Record, path: Path) -> None:
        """Print the scores and the record's path."""
        seconds = sum(stage.seconds for stage in record.stages.values())
        tqdm.write(f"{headline(record)}  {seconds:.1f} s  {path}", file=sys.stdout)


@dataclass(frozen=True)
class Wandb(Logger):
    """Mirror each record to Weights & Biases: one run per record, whenever it was written, and one per failed cell.

    Args:
        project: W&B project.
        entity: W&B team or user; None takes the account's default.
        group: Runs of one sweep share it.
        mode: ``online`` or ``offline``.
        folder: Where W&B keeps its files.
    """

    project: str = "byom"
    entity: str | None = None
    group: str = "single"
    mode: Literal["online", "offline"] = "online"
    folder: str = "results/scratch"

    def __post_init__(self) -> None:
        if self.mode not in ("online", "offline"):
            raise OptionError(f"logger.mode={self.mode} is not known; use online or offline")

    def finished(self, record: Record, path: Path) -> None:
        """Print a line, and send configuration, metrics per task, and the table as an artifact."""
        Console().finished(record, path)
        self.mirror(record, path)

    def skipped(self, record: Record, path: Path) -> None:
        """Print a line, and send the record if it has not been sent from here."""
        super().skipped(record, path)
        self.mirror(record, path)

    def failed(self, record: Record, path: Path) -> None:
        """Send the configuration and the reason, as a failed run that a later attempt takes the place of."""
        self.mirror(record, path)

    def mirror(self, record: Record, path: Path) -> None:
        """Send a record once; what keeps it from being sent is said, and the record stays to be sent later."""
        sent = (
            at_home(self.folder) / "mirrored" / f"{signature(self.project, self.entity, self.mode)}-{name_of(record)}"
        )
        if sent.is_file():
            return
        try:
            self._send(record, path)
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            sys.stderr.write(f"byom: {path} is not mirrored to W&B ({reason}); the same command sends it again\n")
            return
        if record.status == "done":
            write_text(sent, f"{path.name}\n")

    def _send(self, record: Record, path: Path) -> None:
        import wandb

        folder = at_home(self.folder)
        folder.mkdir(parents=True, exist_ok=True)
        live = wandb.init(
            project=self.project, entity=self.entity, group=self.group, name=path.stem, mode=self.mode,
            dir=str(folder), config={"choices": record.choices.named, **record.config}, reinit="finish_previous",
            id=name_of(record), resume="allow",
        )  # fmt: skip
        if record.status == "failed":
            live.summary["error"] = record.error
            live.finish(exit_code=1)
            return
        with live:
            live.log(metrics(record))
            live.log_artifact(_table_artifact(wandb, record))


def name_of(record: Record) -> str:
    """Return a record's id at W&B, the same whenever it is sent; failed attempts at one cell share theirs."""
    return f"{record.signature}-{signature(record.created) if record.status == 'done' else 'failed'}"


def metrics(record: Record) -> dict[str, float]:
    """Return a record's numbers under flat names such as ``test/mnist/accuracy``."""
    flat = {
        f"{split}/{task}/{score.metric}": score.value
        for split, scores in record.scores.items()
        for task, score in scores.items()
    }
    flat |= {f"{split}/mean/{kind}": v for split, means in record.summary.items() for kind, v in vars(means).items()}
    flat |= {"storage/parameters": record.storage.parameters, "storage/bytes": record.storage.bytes}
    return flat | {f"seconds/{name}": stage.seconds for name, stage in record.stages.items()}


def headline(record: Record) -> str:
    """Return one line that names a run and its score."""
    choices, split = record.choices, "test" if "test" in record.summary else "validation"
    density = record.variant_settings.get("density")
    variant = choices.byom + (f" {density:g}" if density is not None else "")
    means = record.summary[split]
    return (
        f"{choices.merge:>15} + {variant:<17} seed {choices.seed}  {split} {100 * means.absolute:5.1f} %"
        f"  normalised {100 * means.normalised:5.1f} %"
    )


def _table_artifact(wandb: Any, record: Record) -> Any:
    splits = list(record.scores)
    rows = [[task, *(record.scores[split][task].value for split in splits)] for task in record.scores[splits[0]]]
    artifact = wandb.Artifact(f"scores-{record.signature}", type="table")
    artifact.add(wandb.Table(columns=["task", *splits], data=rows), "scores")
    return artifact
