"""`Weights`: a lazy, immutable mapping from parameter names to tensors, with the algebra of a vector space."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from byom.errors import CheckpointError
from byom.functional.tensors import finite, narrowed, require_result, require_values, shared, wide
from byom.storage import shards
from byom.storage import tensor_files as storage
from byom.storage.quantised import require_plain
from byom.weights.algebra import combined, results, scaled
from byom.weights.match import matched, not_finite
from byom.weights.spec import CPU, Place, Reader, Spec, Specs, retyped, rounded
from byom.weights.ties import file_ties, groups, joined, unwritten


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
        doubled: Iterable[str] = (),
        carried: Iterable[str] = (),
        place: Place | None = None,
    ) -> None:
        self._specs, self._read, self._ties = dict(specs), read, dict(ties or {})
        self._doubled, self._carried = frozenset(doubled), frozenset(carried)
        self._checksum, self._place, self.origin = checksum, place, origin

    @classmethod
    def of(cls, state: Mapping[str, Tensor], origin: str = "memory") -> Weights:
        """Wrap tensors that are already in memory; names that share one storage are recognised as tied.

        Args:
            state: Name to tensor, for example ``module.state_dict()``. The tensors are not copied.
            origin: What error messages call these weights.

        Raises:
            CheckpointError: If tensors have no values, on the meta device.
        """
        tensors = {name: tensor.detach() for name, tensor in state.items()}
        require_values(tensors, origin)
        specs = {name: Spec(tuple(t.shape), t.dtype) for name, t in tensors.items()}
        places = {name: tensor.device for name, tensor in tensors.items()}
        return cls(specs, tensors.__getitem__, ties=shared(tensors), origin=origin, place=places.get)

    @classmethod
    def open(cls, path: str | Path) -> Weights:
        """Open a ``.safetensors`` file, or a folder with one or with shards and their index; tensors are read later.

        Tensors of files that byom wrote are checked against their checksum when first read. Names that a neighbouring
        ``config.json`` ties to one in it are there too; tied tensors that it holds twice are tied if they are equal.

        Args:
            path: The file or folder.

        Raises:
            CheckpointError: If it is missing, truncated, quantised, or its index and shards disagree.
        """
        file = storage.TensorFiles(Path(path))
        require_plain(Path(path), file.specs)
        specs = {name: Spec(shape, dtype) for name, (shape, dtype) in file.specs.items()}
        tied = file_ties(file)
        specs |= {name: specs[stored] for name, stored in tied.stored.items()}
        read, checksum, here = tied.renamed(file.read), tied.renamed(file.checksum), dict.fromkeys(specs, CPU).get
        return cls(specs, read, ties=tied.ties, origin=str(path), checksum=checksum, doubled=tied.doubled, place=here)

    def __getitem__(self, name: str) -> Tensor:
        """Return one tensor in its declared dtype. Do not modify it: it may be the stored one.

        Raises:
            CheckpointError: If a value is beyond what the dtype can hold, as fp16 beyond 65504.
        """
        if name in self._specs and (value := rounded(self._read, self._ties.get(name, name))) is not None:
            return value
        return narrowed(self.raw(name), self._spec(name).dtype, f"{self.origin}: tensor '{name}'")

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

    def place(self, name: str) -> torch.device | None:
        """Return the device on which a tensor is when it is read, without reading it; None if that is not known."""
        return self._place(self._ties.get(name, name)) if self._place else None

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
        return sum(float(torch.linalg.vector_norm(wide(self.raw(name)))) ** 2 for name in self.mergeable()) ** 0.5

    def state(self) -> dict[str, Tensor]:
        """Read everything into a plain state dict; tied names share one tensor."""
        read = {name: self[name] for name in self.canonical()}
        return {name: read[self._ties.get(name, name)] for name in self.keys()}

    def materialise(self) -> Weights:
        """Read everything once, so that later reads cost nothing."""
        return self._like(self.state().__getitem__)

    def carrying(self, names: Iterable[str]) -> Weights:
        """Return the same weights with some floating-point tensors carried over, as whole numbers are."""
        more = self._carried.union(names)
        return self if more == self._carried else self.tied(self._ties, carried=more)

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

    def __add__(self, other: Weights) -> Weights:
        return self._combine(other, torch.add, "+", difference=False)

    def __radd__(self, other: object) -> Weights:
        return self if other == 0 else NotImplemented  # sum() starts from 0

    def __sub__(self, other: Weights) -> Weights:
        return self._combine(other, torch.sub, "-", difference=True)

    def __mul__(self, factor: float) -> Weights:
        if not isinstance(factor, int | float):
            return NotImplemented
        return self._like(scaled(self, torch.mul, factor), results(self), origin=f"{factor} * {self.origin}")

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Weights:
        if not isinstance(divisor, int | float):
            return NotImplemented
        return self._like(scaled(self, torch.div, divisor), results(self), origin=f"{self.origin} / {divisor}")

    def __neg__(self) -> Weights:
        return self * -1.0

    def derived(self, read: Reader, origin: str) -> Weights:
        """Return weights with these names, shapes, dtypes and ties, and other values, lazily.

        Args:
            read: Gives a tensor by canonical name; the result is cast to the declared dtype when it is read.
            origin: What error messages call the result.
        """
        return self._like(read, origin=origin)

    def tied(self, ties: Mapping[str, str], doubled: Iterable[str] = (), carried: Iterable[str] = ()) -> Weights:
        """Return these weights with other ties, of tensors that are equal; `doubled` of them files hold each."""
        tied = self._like(self.raw, ties=ties)
        tied._doubled, tied._carried = self._doubled.union(doubled), self._carried.union(carried)
        tied._checksum = self.checksum if self._checksum else None
        return tied

    def untied(self) -> Weights:
        """Return these weights with every name a tensor of its own: for models whose tied tensors are to differ."""
        return self.tied({})

    def to(self, dtype: torch.dtype) -> Weights:
        """Return these weights with floating-point tensors in another dtype, rounded when they are read.

        Raises:
            OptionError: If it is not a floating-point dtype.
        """
        return self._like(self.raw, retyped(self._specs, dtype))

    def select(self, keep: Callable[[str], bool]) -> Weights:
        """Return the tensors whose name satisfies `keep`; names of one tensor that are kept stay tied."""
        specs = {name: self._specs[name] for name in self.keys() if keep(name)}
        ties = joined([name for name in every if name in specs] for every in groups(self._ties).values())
        return self._like(self.raw, specs, ties)

    def save(
        self,
        folder: str | Path,
        shard_bytes: int = 5_000_000_000,
        dtype: torch.dtype | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Path:
        """Write the tensors as safetensors with checksums, one after the other, all or nothing.

        Of tied names the file holds that of the input embedding, as transformers keeps it.

        Args:
            folder: Created, or replaced as a whole if it holds an earlier result of this method.
            shard_bytes: Largest size of one file in bytes; a single larger tensor gets its own file.
            dtype: What floating-point tensors are written in; None keeps theirs.
            progress: Called with the bytes of each tensor that has been written.

        Returns:
            The folder.

        Raises:
            CheckpointError: If the folder cannot be written or a value does not fit its dtype; then nothing changes.
        """
        if dtype is not None:
            return self.to(dtype).save(folder, shard_bytes, progress=progress)
        aliases = unwritten(self._ties, self._doubled)
        specs = {name: self._specs[name] for name in self.keys() if name not in aliases}
        return shards.save(Path(folder), specs, self._result, aliases, shard_bytes, progress)

    def _result(self, name: str) -> Tensor:
        return require_result(self[name], f"{self.origin}: tensor '{name}'")

    def _like(
        self, read: Reader, specs: Specs | None = None, ties: Mapping[str, str] | None = None, origin: str = ""
    ) -> Weights:
        specs, ties = self._specs if specs is None else specs, self._ties if ties is None else ties
        origin, doubled, carried, place = origin or self.origin, self._doubled, self._carried, self._place
        return Weights(specs, read, ties=ties, origin=origin, doubled=doubled, carried=carried, place=place)

    def _spec(self, name: str) -> Spec:
        if name not in self._specs:
            raise CheckpointError(f"{self.origin} has no tensor '{name}'")
        return self._specs[name]

    def raw(self, name: str) -> Tensor:
        """Return one tensor as it was computed, before it is rounded to its dtype."""
        self._spec(name)
        return self._read(self._ties.get(name, name))

    def _combine(self, other: Weights, op: Callable[..., Tensor], sign: str, *, difference: bool) -> Weights:
        if not isinstance(other, Weights):
            return NotImplemented
        left, right = matched(self, other)
        read, both = combined(left, right, op, difference=difference), left.carrying(other._carried)
        return both._like(read, results(left, difference=difference), origin=f"({self.origin} {sign} {other.origin})")
