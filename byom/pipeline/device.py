"""Devices by their names."""

from __future__ import annotations

import torch

from byom.errors import OptionError


def resolve(name: str) -> torch.device:
    """Return a device by its name; ``auto`` takes a GPU if there is one.

    Raises:
        OptionError: If there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if name is None or torch.empty(0, device=name).is_meta:  # None is whatever PyTorch takes by itself
            raise RuntimeError("it holds no values")
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).partition(chr(10))[0]
        raise OptionError(f"device={name} cannot be used here ({reason}); use device=auto or device=cpu") from error
    return torch.device(name)
