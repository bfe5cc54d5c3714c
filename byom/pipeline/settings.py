"""One run, as plain objects: its options, its signature, and where its record goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from byom.backbone.base import Backbone
from byom.data.suite import Suite
from byom.errors import OptionError, suggest
from byom.experts.base import Experts
from byom.experts.finetune.base import Recipe
from byom.functional import precision
from byom.functional.precision import DEFAULT, require_precision
from byom.merge.base import MergeMethod
from byom.merge.base.needs import Needs
from byom.merge.pretrained import Pretrained
from byom.pipeline.batch_size import require_batch_size
from byom.pipeline.inputs import Contents, contents
from byom.pipeline.logger import Logger
from byom.pipeline.provenance import results_root
from byom.pipeline.router.base import Router
from byom.pipeline.tune import AsGiven, Tuner
from byom.statistics.base import Statistic
from byom.storage.parts import RENAMED
from byom.storage.place import Place
from byom.storage.signature import signature
from byom.variants.base import Variant

SPLITS = ("validation", "test")
FILED = {(group, name): former for (group, former), name in RENAMED.items()}


@dataclass(frozen=True)
class Evaluation:
    """The evaluation: splits, and the size of batches.

    Args:
        splits: Any of ``validation`` and ``test``.
        batch_size: Examples per forward pass; ``auto`` finds the size, and None takes 50 on a CPU and ``auto`` on a
            GPU. Where memory runs out, it is halved.

    Raises:
        OptionError: If a split is unknown, or the size is no size.
    """

    splits: tuple[str, ...] = SPLITS
    batch_size: int | str | None = field(default=None, metadata={"signature": False})

    def __post_init__(self) -> None:
        object.__setattr__(self, "splits", tuple(self.splits))
        if not self.splits or not set(self.splits) <= set(SPLITS):
            raise OptionError(f"evaluate.splits={list(self.splits)} must name some of {list(SPLITS)}")
        require_batch_size("evaluate.batch_size", self.batch_size)


@dataclass(frozen=True)
class Settings:
    """One run, as plain objects.

    Args:
        suite: The tasks.
        backbone: The encoder.
        finetune: How models are trained here.
        experts: Where the tasks' own models come from.
        merge: The merge method.
        byom: The variant.
        tune: How hyperparameters of the merge method are chosen.
        evaluate: What is evaluated.
        logger: Where the record is mirrored.
        router: How tasks are told apart in evaluation.
        statistics: Every statistic by name; those that the methods need are fitted.
        seed: Draws data and orders training.
        device: ``cpu``, ``cuda`` or ``auto``.
        results: Where records go.
        cache: Where everything goes that can be made again.
        names: Group to the name of the option chosen.
        resolved: The configuration as plain containers.
        note: Shown above every table made of this run's record.
        overrides: What the configuration was composed of; with them, ``byom run`` runs this cell again.
        precision: That of training, evaluation and features; fp32 on every device, so that a record has one name.
        merge_device: Where merging and packing compute: ``cpu``, ``cuda``, ``cuda:1`` or ``auto``.

    Raises:
        OptionError: If the seed is not a whole number, or the precision unknown.
    """

    suite: Suite
    backbone: Backbone
    finetune: Recipe
    experts: Experts
    merge: MergeMethod
    byom: Variant
    tune: Tuner
    evaluate: Evaluation
    logger: Logger
    router: Router
    statistics: Mapping[str, Statistic]
    seed: int
    device: str
    results: Path
    cache: Path
    names: Mapping[str, str]
    resolved: Mapping[str, Any]
    note: str = ""
    overrides: tuple[str, ...] = ()
    precision: str = DEFAULT
    merge_device: str = "auto"

    def __post_init__(self) -> None:
        require_precision(self.precision)
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise OptionError(f"seed={self.seed!r} is not a whole number; use for example seed=0")

    @property
    def merges(self) -> bool:
        """True where the merge method matters: variants on the pre-trained model ignore it."""
        return self.byom.on == "merged"

    def effective(self) -> tuple[MergeMethod, Tuner]:
        """Return the merge method and tuner that determine the result."""
        return (self.merge, self.tune) if self.merges else (Pretrained(), AsGiven())

    @property
    def needs(self) -> Needs:
        """Inputs that the merge method, the variant and the router must be given."""
        return self.effective()[0].needs | self.byom.needs | self.router.needs

    def wanted(self) -> dict[str, Statistic]:
        """Return the statistics that are needed.

        Raises:
            OptionError: If one is needed that the configuration lacks.
        """
        names = sorted(self.needs.statistics)
        if lost := [name for name in names if name not in self.statistics]:
            raise OptionError(f"there is no statistic '{lost[0]}'; {suggest(lost[0], self.statistics)}")
        return {name: self.statistics[name] for name in names}

    def signature(self) -> str:
        """Return the hash of everything that determines the scores, as that is when first asked for."""
        return self._signature

    @cached_property
    def _signature(self) -> str:
        merge, tune = self.effective()
        searched = tune if tune.candidates(merge) else AsGiven()
        chosen = [self.suite, self.backbone, self.finetune, merge, searched, self.byom, self.evaluate, self.seed]
        later = [self.wanted()] if self.wanted() else []
        later += [self.router] if self.routed else []
        later += [] if self.experts.default else [self.experts]
        later += [self.contents] if self.contents else []
        later += precision.later(self.precision)
        return signature(*chosen, *later)  # what is added later must not rename what was there before

    @cached_property
    def contents(self) -> Contents:
        """The contents of what the options name without saying what is in it, as it is when first asked for."""
        return contents(self.suite, self.backbone, self.experts, self.cache)

    @property
    def routed(self) -> bool:
        """True where a router tells tasks apart."""
        return self.router.routes

    def choices(self) -> dict[str, Any]:
        """Return the names of the options, as they appear in tables."""
        default = {"router": not self.routed, "experts": self.experts.default}
        names = {k: v for k, v in self.names.items() if not default.get(k)} | {"seed": self.seed}
        names |= {"suite": self.suite.name}
        return names if self.merges else names | {"merge": "pretrained", "tune": "none"}

    def titles(self) -> dict[str, str]:
        """Return how tables write the options."""
        merge, _ = self.effective()
        return {"merge": merge.title, "byom": self.byom.title, "router": self.router.title}

    def place(self) -> Place:
        """Return where the record goes."""
        names: dict[str, Any] = {group: FILED.get((group, name), name) for group, name in self.choices().items()}
        label = f"{names['merge']}+{names['byom']}" + (f"+{names['router']}" if self.routed else "")
        return Place(
            results_root(self.results), self.suite.name, names["backbone"], f"{label}--{self._size()}", self.signature()
        )

    def _size(self) -> str:
        """Return what tells the cells of a sweep apart, for people: ``m10-seed0``, ``q16-seed0`` or ``2x-seed0``."""
        density, rank = getattr(self.byom, "density", None), getattr(self.byom, "rank", None)
        size = f"m{100 * density:g}-" if density is not None else f"q{rank}-" if rank is not None else ""
        models = getattr(self.byom, "size", None)
        return f"{size}{models:g}x-seed{self.seed}" if models is not None else f"{size}seed{self.seed}"
