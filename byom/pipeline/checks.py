"""Refusals that need no work: what the options of a run alone show to be impossible."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from byom.checkpoint.adapters.export import REFERENCE
from byom.errors import OptionError
from byom.experts.finetune.added import Added
from byom.experts.finetune.full import Full
from byom.functional.metrics import metric
from byom.functional.precision import require_precision
from byom.pipeline.device import resolve
from byom.storage.place import require_writable
from byom.variants.single_task import SingleTask

if TYPE_CHECKING:
    from byom.pipeline.settings import Settings

LOW_RANK = "byom=lora byom.rest=drop, or byom=lora or byom=single_task with finetune=lora or adapters as experts"


def require_possible(settings: Settings, *, evaluates: bool = True) -> None:
    """Refuse a run that could not end, before anything is read or trained.

    Args:
        settings: The run.
        evaluates: Whether its heads are used even where no expert is trained here.

    Raises:
        OptionError: If a method's weights are not one per task, it asks for experts that there are not, heads cannot be
            made, the device lacks the precision, texts would be cropped, or the cache cannot be written.
        DataError: If a task lacks what its head is made of.
    """
    _require_weights(settings)
    settings.wanted()
    require_precision(settings.precision, resolve(settings.device))
    if settings.finetune.augment != "none" and settings.backbone.modality != "image":
        raise OptionError(
            f"finetune.augment={settings.finetune.augment} crops images, and {type(settings.backbone).__name__} reads "
            "texts; use finetune.augment=none"
        )
    if settings.needs.members > 1 and not settings.experts.default:
        raise OptionError(
            f"merge={settings.names['merge']} asks for {settings.needs.members} experts per task, and "
            f"{settings.experts.family} has one; use experts=trained for it"
        )
    if settings.experts.default or (evaluates and getattr(settings.experts, "heads", "backbone") == "backbone"):
        for task in settings.suite.tasks:
            settings.backbone.require_head(task)
    require_writable(settings.cache, "the cache", "set cache= to a writable folder")


def require_routable(settings: Settings) -> None:
    """Refuse routers where they would see the task, or where a misrouted example cannot count as wrong.

    Raises:
        OptionError: Naming the backbone or the task, and what to choose instead.
    """
    if not settings.routed:
        return
    backbone, suite = settings.backbone, settings.suite
    if backbone.answers:
        raise OptionError(
            f"{type(backbone).__name__} scores the answers of each task, which give it away; use router=oracle"
        )
    if odd := [task for task in suite.tasks if not metric(task.metric).decomposes]:
        raise OptionError(
            f"a router sends some examples to another task's head, where they count as wrong, and task "
            f"{odd[0].name} has a score that is not a mean over examples ({odd[0].metric}); use router=oracle, or "
            "metric=accuracy"
        )


def require_exportable(settings: Settings) -> None:
    """Refuse to export what adapters cannot hold, before any expert is trained for it.

    Raises:
        OptionError: Saying which variants can be exported.
    """
    if odd := [task.name for task in settings.suite.tasks if task.name == REFERENCE]:
        raise OptionError(f"the task '{odd[0]}' cannot name a folder of the export; rename it")
    variant, whole = settings.byom, settings.experts.default and isinstance(settings.finetune, Full | Added)
    own = type(variant).__module__.startswith("byom.")  # of other people's variants it is known when they have packed
    if own and (not variant.low_rank or (isinstance(variant, SingleTask) and whole)):
        raise OptionError(
            f"{variant.title} (byom={settings.names['byom']}, finetune={settings.names['finetune']}) has no low-rank "
            f"difference, which is what adapters hold; export {LOW_RANK}, or save a bundle with byom pack"
        )


def _require_weights(settings: Settings) -> None:
    """Refuse weights of tasks that are not one per task, also in methods that hold another method."""
    names = [task.name for task in settings.suite.tasks]
    for method in _nested(settings.effective()[0]):
        weights = getattr(method, "weights", ())
        if isinstance(weights, tuple | list) and weights and len(weights) != len(names):
            tasks = f"{len(names)} tasks ({', '.join(names)})"
            raise OptionError(f"merge.weights has {len(weights)} values for {tasks}; give one per task")


def _nested(method: Any) -> list[Any]:
    inner = [getattr(method, field.name) for field in fields(method)]
    return [method, *(one for each in inner if hasattr(each, "merges") for one in _nested(each))]


def require_folder(folder: Path) -> None:
    """Refuse a folder that cannot be written, without making it.

    Raises:
        OptionError: Naming it.
    """
    above = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    require_writable(above, "models", "give a writable folder", make=False)
