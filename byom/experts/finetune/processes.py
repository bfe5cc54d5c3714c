"""Several processes for one command (``accelerate launch``): the first runs it, the others take part in training."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from datetime import timedelta
from functools import cache, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from byom.errors import OptionError
from byom.storage.atomic import drafted

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor, nn

Command = Callable[[Sequence[str]], int]


class Alone:
    """The part of Accelerate that training uses, for one process: plain PyTorch."""

    is_main_process = True
    process_index = 0
    num_processes = 1

    def prepare(self, *things: Any) -> tuple[Any, ...]:
        """Return things as they are."""
        return things

    def backward(self, loss: Tensor) -> None:
        """Compute gradients."""
        loss.backward()

    def no_sync(self, module: nn.Module) -> AbstractContextManager[None]:
        """Return a context in which gradients are only added up: they always are."""
        return nullcontext()

    def clip_grad_norm_(self, parameters: Any, largest: float) -> None:
        """Scale gradients down to a largest Euclidean norm."""
        from torch.nn.utils import clip_grad_norm_

        clip_grad_norm_(parameters, largest)


_leads: ContextVar[bool] = ContextVar("leads", default=False)
_team: ContextVar[Alone | Accelerator] = ContextVar("team", default=Alone())  # noqa: B039 - it holds no state


def count() -> int:
    """Return how many processes were launched for this command."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def team() -> Alone | Accelerator:
    """Return the accelerator for the current work: all processes inside `together`, otherwise this one."""
    return _team.get()


def led(command: Command) -> Command:
    """Let the first process run a command, cache and records included, while the others wait for work.

    Args:
        command: A command that may train.

    Returns:
        The command; in the other processes it does the work of `together`, and returns 0 when the first is done.
    """

    @wraps(command)
    def run(arguments: Sequence[str]) -> int:
        if count() == 1:
            return command(arguments)
        if not _accelerator().is_main_process:
            return _follow()
        _control()
        leads = _leads.set(True)
        try:
            return command(arguments)
        finally:
            _leads.reset(leads)
            if isinstance(team(), Alone):  # otherwise the others are stuck in work that failed here
                _tell(None)

    return run


def together(work: Callable[..., None], through: Path, *arguments: Any) -> None:
    """Call a function in every process of a command with equal arguments; `team` returns the processes that take part.

    Args:
        work: A function of a module, so that all processes can import it.
        through: A folder that all processes can read.
        arguments: Those of the function; the other processes get copies, on their own device.

    Raises:
        SystemExit: If it fails while others take part: they cannot be called back, so the command ends.
    """
    import torch

    if not _leads.get():
        return work(*arguments)
    through.mkdir(parents=True, exist_ok=True)
    file = through / "together.pt"
    with drafted(file) as draft, draft.open("wb") as handle:  # a handle says why it could not be written
        torch.save((work, arguments), handle)
    _tell(str(file))
    try:
        _take_part(work, arguments)
    except Exception as error:
        raise SystemExit(f"byom: work shared by {count()} processes failed: {error}") from error
    return file.unlink()


def _take_part(work: Callable[..., None], arguments: Sequence[Any]) -> None:
    alone = _team.set(_accelerator())
    work(*arguments)
    _team.reset(alone)  # not where work fails: `led` sees from it that the others cannot be called back
    _accelerator().free_memory()  # it holds on to every model and optimizer that it prepared


def require_device(encoder: nn.Module) -> None:
    """Refuse an encoder that is not on the kind of device that the processes were launched for.

    Raises:
        OptionError: Saying how to launch them.
    """
    here = next(encoder.parameters()).device.type
    if _leads.get() and here != _accelerator().device.type:
        raise OptionError(
            f"the model is on {here}, and the processes were launched for {_accelerator().device.type}: use "
            "device=auto, or set ACCELERATE_USE_CPU=true to train on CPUs"
        )


def require_alike(precision: str, micro_batch: int | str | None) -> None:
    """Refuse what each of several processes would decide for itself, although all of them must do the same.

    Raises:
        OptionError: Saying what to use instead.
    """
    if count() > 1 and precision == "fp16":
        raise OptionError("precision=fp16 scales losses by what one process sees; use precision=bf16 with several")
    if count() > 1 and micro_batch == "auto":
        raise OptionError("finetune.micro_batch=auto is found by one process; give a number where there are several")


def _follow() -> int:
    import torch

    device = _accelerator().device
    while (file := _tell()) is not None:
        place = None if device.type == "cpu" else {"cuda:0": str(device)}
        _take_part(*torch.load(file, map_location=place, mmap=True, weights_only=False))
    return 0


def _tell(file: str | None = None) -> str | None:
    """Broadcast a file's name, or None for the end, from the first process to the others; all return it."""
    from torch.distributed import broadcast_object_list

    word = [file]
    broadcast_object_list(word, src=0, group=_control())
    return word[0]


@cache
def _accelerator() -> Accelerator:
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, DistributedType

    # some encoders have parameters that no output depends on
    accelerator = Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
    plain = accelerator.mixed_precision == "no" and accelerator.gradient_accumulation_steps == 1
    if not plain or accelerator.distributed_type not in (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        raise OptionError(
            "byom divides batches among processes and changes nothing else: launch with --multi_gpu "
            "--mixed_precision no --gradient_accumulation_steps 1, without FSDP or DeepSpeed; byom's own "
            "options for these are precision= and finetune.micro_batch="
        )
    return accelerator


@cache
def _control() -> Any:
    """Return the channel for words, which waits as long as merging and evaluation take, without using a GPU."""
    from torch.distributed import new_group

    _accelerator()
    return new_group(backend="gloo", timeout=timedelta(days=30))
