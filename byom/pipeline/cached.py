"""The cache on disk of cells: under which names they keep what they make, and making it once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from byom.functional.precision import later
from byom.merge.base import MergeMethod
from byom.pipeline.provenance import Stages
from byom.pipeline.settings import Settings
from byom.pipeline.tune import Tuner
from byom.storage.atomic import write_json
from byom.storage.lock import alone, held
from byom.storage.signature import signature
from byom.variants.base import Variant

Name = TypeVar("Name")


@dataclass(frozen=True)
class Keys:
    """Names under which the cache keeps what a cell makes: each is the hash of all that determines it.

    Args:
        experts: The signature of the tasks' experts.
        extras: Statistics that the merge method uses, what is done to experts before they are merged, and how joint
            models are trained where the experts' own names do not tell; empty for methods that merge the experts'
            weights alone.
        scored: How models are scored, where it is not as always.
    """

    experts: str
    extras: tuple[Any, ...]
    scored: tuple[Any, ...] = ()

    @classmethod
    def of(cls, settings: Settings, experts: str) -> Keys:
        """Return the names of a cell.

        Args:
            settings: The run.
            experts: The signature of its tasks' experts, as its lab gives it.
        """
        used = settings.effective()[0].needs.statistics
        statistics = {name: what for name, what in settings.wanted().items() if name in used}
        before = settings.byom.before
        extras = (*([statistics] if statistics else []), *([before] if before else []))
        scored = tuple(later(settings.precision))
        if settings.effective()[0].needs.joint and not any(settings.experts.trains(settings.suite.tasks)):
            extras = (*extras, settings.finetune, *scored)
        return cls(experts, extras, scored)

    def tuning(self, method: MergeMethod, tuner: Tuner) -> str:
        """Return the name of a search over a method's hyperparameters."""
        return signature(self.experts, method, tuner, *self.extras, *self.scored)

    def merged(self, method: MergeMethod) -> str:
        """Return the name of a merged model."""
        return signature(self.experts, method, *self.extras)

    def served(self, method: MergeMethod, variant: Variant) -> str:
        """Return the name of what serves the tasks, and of its hits."""
        return signature(self.experts, method, *self.extras, variant, *self.scored)


def once(folder: Path, make: Callable[[], object], notes: Mapping[str, Any] | None = None) -> None:
    """Make a cached folder if it is not there, and note next to it what that took; without a note, make it again.

    Args:
        folder: Where it belongs; of several processes that want it, one makes it and the others wait.
        make: Makes it.
        notes: What else is noted.
    """
    if folder.is_dir() and note(folder).is_file():
        return
    with alone(folder):
        if folder.is_dir() and note(folder).is_file():
            return
        stages = Stages()
        with stages.stage("made"):
            make()
        write_json(note(folder), {**stages.taken["made"], **(notes or {})})


def note(folder: Path) -> Path:
    """Return where it is noted what a cached folder took."""
    return folder.with_name(f"{folder.name}.cost.json")


def free_first(folders: Mapping[Name, Path]) -> Iterator[Name]:
    """Yield names so that processes that lack the same folders make different ones.

    Args:
        folders: Name to a folder that is to be made, or to whatever else has its lock.

    Yields:
        Every name once: as long as there is one, the first whose folder no other process is making.
    """
    left = dict(folders)  # which locks are held is looked up whenever a name is asked for
    while left:
        name = next((name for name, folder in left.items() if not held(folder)), next(iter(left)))
        del left[name]
        yield name
