"""Pickled modules, read without running anything: no class is imported, nothing in the file is called."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import torch
from torch import Tensor

from byom.checkpoint.plain import require_stored
from byom.errors import CheckpointError

MODULES = (
    "src.", "modeling.", "heads.", "open_clip.", "clip.", "torch.nn.", "torchvision.", "timm.", "transformers.",
    "__main__.",
)  # fmt: skip
"""Modules whose classes become inert stand-ins. Any other has no place in a checkpoint of a vision encoder."""
STORAGES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}  # fmt: skip
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in STORAGES.values()}
MAGIC = 0x1950A86A20F9469CFC6C  # of torch's format before zip files
HOLDERS = ("state_dict", "model_state_dict", "model")


class Inert:
    """Stand-in for an object of a class that is not imported: it takes any state and does nothing."""

    kind: ClassVar[str] = ""

    state: Any

    def __new__(cls, *_: Any, **__: Any) -> Inert:  # noqa: D102 - pickles make objects without __init__
        inert = object.__new__(cls)
        inert.state = {}
        return inert

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


@dataclass
class Storage:
    """Flat values that tensors are views of; old files hold them after everything else."""

    dtype: torch.dtype
    numel: int
    values: Tensor | None = None


@dataclass(frozen=True)
class View:
    """A tensor that is made once its storage is there."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def tensor(self) -> Tensor:
        """Return the view.

        Raises:
            CheckpointError: If it reaches beyond its storage.
        """
        sizes = [self.offset, *self.shape, *self.stride]
        if any(not isinstance(n, int) or n < 0 for n in sizes) or len(self.shape) != len(self.stride):
            raise CheckpointError(f"a tensor has the shape {self.shape}, strides {self.stride} at {self.offset}")
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))
        if self.storage.values is None or (0 not in self.shape and last >= len(self.storage.values)):
            raise CheckpointError(f"a tensor of shape {self.shape} reaches beyond its storage; the file is damaged")
        return torch.as_strided(self.storage.values, self.shape, self.stride, self.offset)


def read_pickled(path: Path) -> dict[str, Tensor]:
    """Read the state dict of a pickled module, or a pickled state dict.

    Files of `torch.save` in its present and its former format are read, and those of `pickle.dump`. Strides, offsets
    and shared storage are kept.

    Args:
        path: The file.

    Returns:
        Name to tensor, as the module's ``state_dict()`` would be.

    Raises:
        CheckpointError: If the file names anything but tensors, containers and modules (it is refused before that
            could run), is damaged, or holds no module.
    """
    try:
        with path.open("rb") as file:
            return _state(_read(file))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from error
    except Exception as error:
        raise CheckpointError(
            f"{path} is not a pickled module that can be read ({type(error).__name__}: {error})"
        ) from error


def _read(file: BinaryIO) -> Any:
    if zipfile.is_zipfile(file):
        return _from_zip(file)
    file.seek(0)
    start = Restricted(file, {}).load()
    if start != MAGIC:
        file.seek(0)
        return Restricted(file, {}).load()
    return _from_legacy(file)


def _from_zip(file: BinaryIO) -> Any:
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        inner = next((name for name in names if name.endswith("data.pkl")), None)
        if inner is None or any(name.endswith("constants.pkl") for name in names):
            raise CheckpointError("it is a zip file, but none of torch.save")
        require_stored(archive)
        prefix = inner.removesuffix("data.pkl")
        order = f"{prefix}byteorder"
        if order in names and archive.read(order) != b"little":
            raise CheckpointError("it was written on a big-endian machine")
        storages: dict[str, Storage] = {}
        root = Restricted(io.BytesIO(archive.read(inner)), storages).load()
        for key, storage in storages.items():
            _fill(storage, archive.read(f"{prefix}data/{key}"))
    return root


def _from_legacy(file: BinaryIO) -> Any:
    for _ in ("protocol", "system"):
        Restricted(file, {}).load()
    storages: dict[str, Storage] = {}
    root = Restricted(file, storages).load()
    for key in Restricted(file, {}).load():
        count = int.from_bytes(file.read(8), "little", signed=True)
        storage = storages[key]
        if count != storage.numel:
            raise CheckpointError(f"a storage of {storage.numel} values is stored as {count}; the file is damaged")
        _fill(storage, file.read(count * storage.dtype.itemsize))
    return root


def _fill(storage: Storage, content: bytes) -> None:
    count = len(content) // storage.dtype.itemsize
    if count < storage.numel:
        raise CheckpointError(f"a storage of {storage.numel} values holds {count}; the file is cut short")
    whole = content[: count * storage.dtype.itemsize]
    storage.values = (
        torch.frombuffer(bytearray(whole), dtype=storage.dtype) if whole else torch.empty(0).to(storage.dtype)
    )


class Restricted(pickle._Unpickler):  # pyright: ignore[reportAttributeAccessIssue]
    """An unpickler that imports no class and knows the few functions that tensors are rebuilt with.

    It is Python's own in Python: the one in C allocates as much as the largest index in a file asks for.

    Args:
        file: What is read.
        storages: Filled with what tensors are views of, by their key in the file.
    """

    def __init__(self, file: BinaryIO, storages: dict[str, Storage]) -> None:
        super().__init__(file)
        self.storages = storages

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a name, or refuse it; nothing is imported."""
        if (module, name) in KNOWN:
            return KNOWN[module, name]
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if module == "torch.storage" and name in ("UntypedStorage", "TypedStorage", "_TypedStorage"):
            return torch.uint8
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if f"{module}.".startswith(MODULES):
            return type("Inert", (Inert,), {"kind": f"{module}.{name}"})
        raise CheckpointError(
            f"it calls {module}.{name}, which no checkpoint needs; it was not run. If you trust the file, load it "
            "where it was made and save its state_dict()"
        )

    def persistent_load(self, pid: Any) -> Any:
        """Return the storage that a key stands for."""
        if isinstance(pid, tuple) and pid and pid[0] == "module":
            return pid[1]  # a class with its source code, which is left alone
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or not isinstance(pid[1], torch.dtype):
            raise CheckpointError(f"it refers to {str(pid)[:60]}, which is not a storage of a tensor")
        _, dtype, key, _, numel = pid[:5]
        if len(pid) > 5 and pid[5] is not None:
            raise CheckpointError("it holds a view of a storage in a form that torch has not written since 2018")
        return self.storages.setdefault(str(key), Storage(dtype, int(numel)))


def _rebuilt(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> View:
    if not isinstance(storage, Storage):
        raise CheckpointError("a tensor has no storage")
    return View(storage, offset, tuple(shape), tuple(stride))


def _from_bytes(content: bytes) -> Storage:
    storage = _read(io.BytesIO(content))  # by the same rules, however deep
    if not isinstance(storage, Storage):
        raise CheckpointError("a storage holds something else")
    return storage


def _first(value: Any, *_: Any) -> Any:
    return value


class Known:
    """A function that a file may name, and not change."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        object.__setattr__(self, "_call", call)

    def __call__(self, *arguments: Any) -> Any:
        """Rebuild something."""
        return self._call(*arguments)

    def __setattr__(self, name: str, value: Any) -> None:
        raise CheckpointError(f"it sets {name} of a function that rebuilds tensors")


KNOWN: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor"): Known(_rebuilt),
    ("torch._utils", "_rebuild_tensor_v2"): Known(_rebuilt),
    ("torch._utils", "_rebuild_parameter"): Known(_first),
    ("torch._utils", "_rebuild_parameter_with_state"): Known(_first),
    ("torch.storage", "_load_from_bytes"): Known(_from_bytes),
    ("torch", "Size"): tuple,
    ("torch", "device"): Known(_first),
    ("torch.serialization", "_get_layout"): Known(_first),
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
    ("_codecs", "encode"): Known(lambda text, _: text.encode("latin1")),
}


def _state(root: Any) -> dict[str, Tensor]:
    if isinstance(root, Inert):
        state = dict(_walk(root, ""))
    elif isinstance(root, Mapping):
        inner = next((root[name] for name in HOLDERS if isinstance(root.get(name), Mapping | Inert)), None)
        if inner is not None:
            return _state(inner)
        state = {str(name): value for name, value in root.items() if isinstance(value, View)}
    else:
        state = {}
    if not state:
        raise CheckpointError("it holds no module and no state dict")
    return {name: view.tensor() for name, view in state.items()}


def _walk(module: Inert, prefix: str) -> Iterator[tuple[str, View]]:
    """Yield what ``state_dict()`` of a module would hold, in its order."""
    state = module.state
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{module.kind} has a state of its own kind, not that of a module")
    unsaved = state.get("_non_persistent_buffers_set") or ()
    for name, value in [*(state.get("_parameters") or {}).items(), *(state.get("_buffers") or {}).items()]:
        if isinstance(value, View) and name not in unsaved:
            yield f"{prefix}{name}", value
    for name, part in (state.get("_modules") or {}).items():
        if isinstance(part, Inert):
            yield from _walk(part, f"{prefix}{name}.")
