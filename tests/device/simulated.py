"""A simulated accelerator: tensors that say they are on a device, hold their values on the CPU, and mix as CUDA's do.

With it, a law over devices runs on a machine that has none: what would stop on a card because tensors, indices or
generators are on different devices stops here, with the same kind of error. Values are computed by the CPU's kernels,
so that results have the CPU's bits wherever the code is the same. It says nothing of speed, memory, rounding,
determinism, or kernels that only one side has.

The rules:

- Tensors of an operation are on one device, but for tensors of the CPU without axes, which count as numbers; not where
  they are written to, and not in `STRICT` operations (products of matrices, joins, gathers), which take none.
- An index of the CPU may index a tensor of the device, and not the other way round.
- ``copy_``, ``to``, ``item`` and ``tolist`` cross, ``numpy`` does not.
- A generator is on the device of the tensor that is drawn.
- What is made without a device is on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import backend_registration

from byom.functional import tensors as kinds

NAME = "simulated"
CROSSING = {"_local_scalar_dense", "_to_copy", "copy", "copy_"}
INDEXED = {"_index_put_impl_", "_unsafe_index", "_unsafe_index_put", "index", "index_put", "index_put_"}
STRICT = {
    "addbmm", "addmm", "addmv", "baddbmm", "bmm", "bucketize", "cat", "convolution", "dot", "embedding", "equal",
    "gather", "index_add", "index_add_", "index_copy", "index_copy_", "index_fill_", "index_select", "isin",
    "linalg_eigh", "linalg_solve_ex", "masked_scatter", "masked_scatter_", "masked_select", "mm", "mv",
    "native_batch_norm", "native_layer_norm", "put_", "scatter", "scatter_", "scatter_add", "scatter_add_",
    "searchsorted", "stack", "take", "vdot",
}  # fmt: skip


MADE = torch.library.Library("aten", "IMPL")  # what makes tensors on the device, from which all other ways are made


class Simulated(Tensor):
    """A tensor of the simulated device, around one of the CPU that holds its values."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> Simulated:
        """Wrap a tensor of the CPU, without copying it."""
        made = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=device(),
            requires_grad=held.requires_grad,
        )
        made.held = held.detach()
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    @property
    def data(self) -> Simulated:
        """The values without their history; what is put in their place is what the tensor holds from then on."""
        return Simulated(self.held)

    @data.setter
    def data(self, values: Simulated) -> None:
        self.held = values.held

    def data_ptr(self) -> int:
        """Return the address of the first value."""
        return self.held.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        """Return the storage that holds the values."""
        return self.held.untyped_storage()

    def tolist(self) -> Any:
        """Return the values as nested lists."""
        return self.held.tolist()

    def numpy(self, *args: Any, **named: Any) -> Any:
        """Refuse, as tensors of any accelerator do."""
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first")

    def __array__(self, *args: Any, **named: Any) -> Any:
        return self.numpy()

    def __deepcopy__(self, memo: dict[int, Any]) -> Simulated:
        if id(self) not in memo:
            memo[id(self)] = Simulated(self.held.clone()).requires_grad_(self.requires_grad)
        return memo[id(self)]

    def __repr__(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"Simulated({self.held!r})"


@cache
def device() -> torch.device:
    """Register the device with PyTorch, which can be done once a process, and return it."""
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip(f"PyTorch {torch.__version__} cannot register a device from Python")

    class Hooks(torch._C._acc.PrivateUse1Hooks):
        def is_available(self) -> bool:
            return False  # for libraries that look for an accelerator of their own accord

        def has_primary_context(self, dev_id: int) -> bool:
            return True

        def is_built(self) -> bool:
            return True

    class Module(backend_registration._DummyBackendModule):
        def is_available(self) -> bool:
            return False  # see above

    backend_registration._setup_privateuseone_for_python_backend(NAME, Module(), Hooks())
    MADE.impl("empty.memory_format", _empty, "PrivateUse1")
    MADE.impl("empty_strided", _empty_strided, "PrivateUse1")
    for made in ("arange", "arange.start", "arange.start_step"):  # PyTorch makes them empty, and resizes them
        MADE.impl(made, _arange, "PrivateUse1")
    return torch.device(NAME, 0)


def _empty(size, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    return Simulated(torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format))


def _empty_strided(size, stride, *, dtype=None, layout=None, device=None, pin_memory=None):
    return Simulated(torch.empty_strided(size, stride, dtype=dtype))


def _arange(*ends, dtype=None, layout=None, device=None, pin_memory=None):
    return Simulated(torch.arange(*ends, dtype=dtype))


@contextmanager
def simulation() -> Iterator[torch.device]:
    """Give the simulated device to what runs inside."""
    place, special = device(), kinds.special
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kinds, "special", lambda t: None if isinstance(t, Simulated) else special(t))
        torch._C._set_only_lift_cpu_tensors(
            True
        )  # torch.tensor(..., device=) makes its tensor on the CPU, and sends it
        try:
            with torch.autograd.set_multithreading_enabled(False):  # no thread of this device was started
                yield place
        finally:
            torch._C._set_only_lift_cpu_tensors(False)


def run(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Run one operation of PyTorch on the values, after its devices were checked."""
    ours: dict[int, Simulated] = {}
    plain: list[Any] = []
    inner = tuple(_opened(each, ours, plain) for each in args)
    named = {name: _opened(each, ours, plain) for name, each in kwargs.items()}
    name, asked = func.overloadpacket.__name__, named.get("device")
    written = args[0] if name == "copy_" or name in INDEXED else None
    here = isinstance(written, Simulated) if written is not None else asked is None or _simulates(asked)
    tensors = [each for each in plain if isinstance(each, Tensor)]
    if ours and tensors and name not in CROSSING:
        _check(func, name, args, kwargs, tensors)
    if here and len(tensors) < len(plain):
        raise RuntimeError(f"Expected a '{NAME}' device type for generator but found 'cpu'")
    if asked is not None:
        named["device"] = torch.device("cpu")
    if named.get("pin_memory"):
        named["pin_memory"] = False
    result = func(*inner, **named)
    return _wrapped(result, ours) if here else result


def _opened(value: Any, ours: dict[int, Simulated], plain: list[Any]) -> Any:
    """Return an argument with the tensors that hold the values, having noted tensors and generators on the way."""
    if isinstance(value, Simulated):
        ours[id(value.held)] = value
        return value.held
    if isinstance(value, Tensor | torch.Generator):
        plain.append(value)
    elif isinstance(value, list | tuple):
        return [_opened(each, ours, plain) for each in value]
    return value


def _wrapped(result: Any, ours: dict[int, Simulated]) -> Any:
    if isinstance(result, Tensor):
        return ours[id(result)] if id(result) in ours else Simulated(result)
    if isinstance(result, list | tuple):
        return type(result)([_wrapped(each, ours) for each in result])
    return result


def _simulates(asked: Any) -> bool:
    return asked is not None and torch.device(asked).type == NAME


def _check(func: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any], plain: Sequence[Tensor]) -> None:
    if name in INDEXED:
        _check_index(name, args)
    elif name in STRICT or any(each.ndim for each in plain) or _writes(func, plain, args, kwargs):
        _refuse(name, plain)


def _check_index(name: str, args: Sequence[Any]) -> None:
    whole, indices = args[0], [index for index in args[1] if index is not None]
    if not isinstance(whole, Simulated) and any(isinstance(index, Simulated) for index in indices):
        raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
    if len(args) > 2 and isinstance(args[2], Simulated) != isinstance(whole, Simulated) and args[2].ndim:
        _refuse(name, [each for each in (whole, args[2]) if not isinstance(each, Simulated)])


def _writes(func: Any, plain: Sequence[Tensor], args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    given = dict(zip((each.name for each in func._schema.arguments), args, strict=False)) | kwargs
    written = [each.name for each in func._schema.arguments if each.alias_info is not None and each.alias_info.is_write]
    return any(given.get(name) is each for name in written for each in plain)


def _refuse(name: str, plain: Sequence[Tensor]) -> None:
    raise RuntimeError(
        "Expected all tensors to be on the same device, but found at least two devices, "
        f"{device()} and cpu! ({name} with {[tuple(each.shape) for each in plain]} of the CPU)"
    )
