"""Names that become files: which of them every file system can hold, and hold apart."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

from byom.errors import OptionError

FORBIDDEN = re.compile(r'[<>:"/\\|?*\x00-\x1f]')
DEVICES = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])", re.IGNORECASE)
"""Names that Windows keeps for devices, whatever they end in."""

LONGEST = 150  # file systems take 255 bytes, of which endings and the marks of drafts need some


def require_file_names(names: Iterable[str], what: str) -> None:
    """Refuse names that cannot all be files or folders next to one another on Linux, macOS and Windows.

    Args:
        names: What files are going to be called, before their endings.
        what: What they are names of, for the message.

    Raises:
        OptionError: Naming the first that cannot be one, or the two that would be one.
    """
    held: dict[str, str] = {}
    for name in names:
        if why := _unfit(name):
            raise OptionError(f"the {what} {name!r} cannot name a file everywhere: {why}; rename it")
        twin = held.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if twin != name:
            raise OptionError(
                f"the {what}s {twin!r} and {name!r} would be one file where case and accents are not told apart "
                "(macOS, Windows); rename one of them"
            )


def _unfit(name: str) -> str:
    if name in ("", ".", ".."):
        return "it is empty or a folder's own name"
    if len(name.encode(errors="surrogatepass")) > LONGEST:
        return f"it is longer than {LONGEST} bytes"
    if match := FORBIDDEN.search(name):
        return f"it has {match[0]!r} in it"
    if name[-1] in ". ":
        return "Windows drops a dot or blank at its end"
    if DEVICES.fullmatch(name.partition(".")[0].rstrip()):
        return "Windows keeps it for a device"
    return ""
