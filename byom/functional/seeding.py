"""Randomness keyed by what it is for, never by the order of calls."""

from __future__ import annotations

import hashlib


def keyed(*key: object) -> int:
    """Return a 63-bit seed that depends on the key alone.

    Args:
        key: What the randomness is for, e.g. (seed, task, parameter name).

    Returns:
        A non-negative integer for ``torch.manual_seed`` or a generator.
    """
    text = "\x1f".join(map(str, key))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
