"""`Weights`: a lazy, immutable mapping from parameter names to tensors, with the algebra of a vector space."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from byom.errors import CheckpointError
from byom.functional.tensors import finite, shared, wide, widened
from byom.storage import tensor_files as storage
from byom.storage.quantised import require_plain
from byom.weights.match import fits, may_be_mask, not_finite, require_alike, require_match

Reader = Callable[[str], Tensor]


class Spec(NamedTuple):
    """Shape and dtype of one tensor, known without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Weights:
    """Named tensors that are read when asked for.

    ``theta_0 + 0.3 * sum(taus)`` reads nothing; indexing evaluates one tensor, saving streams them all.
    Arithmetic happens in fp32 (fp64 where an operand is fp64) and is rounded once, when a tensor is read:
    a difference is fp32, as is what comes of fp8; other sums and multiples keep the dtype of their left operand.
    Tensors that are not floating point (position ids, counters) are carried over from the left operand.

    Tied tensors (one storage, several names) count once: `canonical` lists one name of each group.

    This is deliberately no `Mapping`: ``==`` compares identity, because comparing would read every tensor.
    """

    def __init__(
        self,
        specs: Mapping[str, Spec],
        read: Reader,
        *,
        ties: Mapping[str, str] | None = None,
        origin: str = "memory",
        checksum: Callable[[str], str] | None = None,
        carried: Iterable[str] = (),
    ) -> None:
        self._specs = dict(specs)
        self._read = read
        self._ties = dict(ties or {})
        self._checksum = checksum
        self._carried = frozenset(carried)
        self.origin = origin

    # constructors

    @classmethod
    def of(cls, state: Mapping[str, Tensor], origin: str = "memory") -> Weights:
        """Wrap tensors that are already in memory; names that share one storage are recognised as tied.

        Args:
            state: Name to tensor, for example ``module.state_dict()``. The tensors are not copied.
            origin: What error messages call these weights.

        Returns:
            The weights.
        """
        tensors = {name: tensor.detach() for name, tensor in state.items()}
        specs = {name: Spec(tuple(t.shape), t.dtype) for name, t in tensors.items()}
        return cls(specs, tensors.__getitem__, ties=shared(tensors), origin=origin)

    @classmethod
    def open(cls, path: str | Path) -> Weights:
        """Open a ``.safetensors`` file, or a folder with one or with shards and their index; nothing is read yet.

        Tensors of files that byom wrote are checked against their checksum when they are first read.

        Args:
            path: The file or folder.

        Returns:
            The weights, reading from disk on demand.

        Raises:
            CheckpointError: If it is missing, truncated, quantised, or its index and shards disagree.
        """
        file = storage.TensorFiles(Path(path))
        require_plain(Path(path), file.specs)
        specs = {name: Spec(shape, dtype) for name, (shape, dtype) in file.specs.items()}
        specs |= {alias: specs[name] for alias, name in file.ties.items()}
        return cls(specs, file.read, ties=file.ties, origin=str(path), checksum=file.checksum)

    # reading

    def __getitem__(self, name: str) -> Tensor:
        """Return one tensor in its declared dtype. Do not modify it: it may be the stored one."""
        return self._value(name).to(self._spec(name).dtype)

    def keys(self) -> list[str]:
        """Return every name, tied ones included, sorted."""
        return sorted(self._specs)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __contains__(self, name: object) -> bool:
        return name in self._specs

    def __len__(self) -> int:
        return len(self._specs)

    def __repr__(self) -> str:
        return f"Weights({len(self)} tensors, {self.numel:,} parameters, {self.origin})"

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        return self._spec(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype without reading it."""
        return self._spec(name).dtype

    def canonical(self) -> list[str]:
        """Return one name for each distinct tensor, sorted."""
        return [name for name in self.keys() if name not in self._ties]

    def mergeable(self) -> list[str]:
        """Return the canonical names of floating-point tensors: what merge methods merge, in selection order."""
        return [name for name in self.canonical() if self.merges(name)]

    def merges(self, name: str) -> bool:
        """Say whether a tensor is merged: it holds floating-point numbers, and is no constant such as a mask."""
        return self.dtype(name).is_floating_point and name not in self._carried

    @property
    def ties(self) -> dict[str, str]:
        """Alias name to canonical name of tied tensors."""
        return dict(self._ties)

    @property
    def numel(self) -> int:
        """Number of distinct floating-point scalars (d)."""
        return sum(torch.Size(self.shape(name)).numel() for name in self.mergeable())

    def norm(self) -> float:
        """Return the Euclidean norm over all mergeable parameters."""
        return sum(float(torch.linalg.vector_norm(self._wide(name))) ** 2 for name in self.mergeable()) ** 0.5

    def state(self) -> dict[str, Tensor]:
        """Read everything into a plain state dict; tied names share one tensor."""
        read = {name: self[name] for name in self.canonical()}
        return {name: read[self._ties.get(name, name)] for name in self.keys()}

    def materialise(self) -> Weights:
        """Read everything once, so that later reads cost nothing."""
        return Weights.of(self.state(), origin=self.origin).carrying(self._carried)

    def carrying(self, names: Iterable[str]) -> Weights:
        """Return the same weights with some floating-point tensors carried over, as whole numbers are."""
        if not (more := self._carried.union(names)) - self._carried:
            return self
        kept = {"ties": self._ties, "origin": self.origin, "checksum": self._checksum}
        return Weights(self._specs, self._value, carried=more, **kept)

    def checksum(self, name: str) -> str:
        """Return the CRC-32 of a tensor's bytes, from the file where it is recorded there."""
        name = self._ties.get(name, name)
        return self._checksum(name) if self._checksum else storage.crc32(self[name])

    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits that identify names, shapes, dtypes and values."""
        rows = ([name, list(self.shape(name)), str(self.dtype(name)), self.checksum(name)] for name in self.canonical())
        return storage.digest([*rows, self._ties])

    def read_finite(self, name: str) -> Tensor:
        """Return one tensor, refusing NaN and infinity.

        Raises:
            CheckpointError: If it holds a value that is not finite.
        """
        tensor = self[name]
        if self.merges(name) and tensor.numel() and not finite(tensor):
            raise CheckpointError(not_finite(self.origin, name, tensor))
        return tensor

    # algebra

    def __add__(self, other: Weights) -> Weights:
        return self._combine(other, torch.add, "+", difference=False)

    def __radd__(self, other: object) -> Weights:
        return self if other == 0 else NotImplemented  # sum() starts from 0

    def __sub__(self, other: Weights) -> Weights:
        return self._combine(other, torch.sub, "-", difference=True)

    def __mul__(self, factor: float) -> Weights:
        if not isinstance(factor, int | float):
            return NotImplemented
        return self._derive(lambda name: self._wide(name) * factor, f"{factor} * {self.origin}")

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Weights:
        if not isinstance(divisor, int | float):
            return NotImplemented
        return self._derive(lambda name: self._wide(name) / divisor, f"{self.origin} / {divisor}")

    def __neg__(self) -> Weights:
        return self * -1.0

    def derived(self, read: Reader, origin: str) -> Weights:
        """Return weights with these names, shapes, dtypes and ties, and other values.

        Args:
            read: Gives a tensor by canonical name; the result is cast to the declared dtype when it is read.
            origin: What error messages call the result.

        Returns:
            The new weights, as lazy as `read`.
        """
        return Weights(self._specs, read, ties=self._ties, origin=origin, carried=self._carried)

    def select(self, keep: Callable[[str], bool]) -> Weights:
        """Return the tensors whose name satisfies `keep`; a kept alias of a dropped tensor becomes independent."""
        names = [name for name in self.keys() if keep(name)]
        ties = {alias: name for alias, name in self._ties.items() if alias in names and name in names}
        return Weights(
            {n: self._specs[n] for n in names}, self._value, ties=ties, origin=self.origin, carried=self._carried
        )

    def save(self, folder: str | Path, shard_bytes: int = 5_000_000_000) -> Path:
        """Write the tensors as safetensors with checksums, one shard in memory at a time, all or nothing.

        Args:
            folder: Created, or replaced as a whole if it holds an earlier result of this method.
            shard_bytes: Largest size of one file in bytes; a single larger tensor gets its own file.

        Returns:
            The folder.

        Raises:
            CheckpointError: If the folder holds other files or cannot be written; then nothing changes.
        """
        sizes = {name: storage.size(*self._specs[name]) for name in self.canonical()}
        return storage.save(Path(folder), sizes, self.__getitem__, self._ties, shard_bytes)

    # internals

    def _spec(self, name: str) -> Spec:
        if name not in self._specs:
            raise CheckpointError(f"{self.origin} has no tensor '{name}'")
        return self._specs[name]

    def _value(self, name: str) -> Tensor:
        self._spec(name)
        return self._read(self._ties.get(name, name))

    def _wide(self, name: str) -> Tensor:
        return wide(self._value(name))

    def _derive(self, compute: Reader, origin: str) -> Weights:
        """Lift a computation on wide tensors; whatever is not floating point passes through."""

        def read(name: str) -> Tensor:
            return compute(name) if self.merges(name) else self._value(name)

        specs = {name: _result(spec) for name, spec in self._specs.items()}
        return Weights(specs, read, ties=self._ties, origin=origin, carried=self._carried)

    def _combine(self, other: Weights, op: Callable[..., Tensor], sign: str, *, difference: bool) -> Weights:
        if not isinstance(other, Weights):
            return NotImplemented
        require_match(self, other)

        def read(name: str) -> Tensor:
            if not fits(name, self, other):
                return self._value(name)
            if not self.merges(name):
                return require_alike(name, (self.origin, self._value(name)), (other.origin, lambda: other._value(name)))
            value, theirs = self._wide(name), other._wide(name)
            combined = op(value, theirs)
            masked = difference and may_be_mask(name, self.shape(name))  # of infinities that are equal, it is 0
            return combined.masked_fill(value == theirs, 0) if masked else combined

        carried, origin = self._carried | other._carried, f"({self.origin} {sign} {other.origin})"
        specs = {name: _result(spec, difference) for name, spec in self._specs.items()}
        return Weights(specs, read, ties=self._ties, origin=origin, carried=carried)


def _result(spec: Spec, difference: bool = False) -> Spec:
    """Return the type of a result: that of the operand, but wide for differences and where 8 bits would overflow."""
    wide = spec.dtype.is_floating_point and (spec.dtype.itemsize == 1 or difference)
    return Spec(spec.shape, widened(spec.dtype)) if wide else spec
