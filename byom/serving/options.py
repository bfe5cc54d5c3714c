"""Options of a server, and their ranges."""

from __future__ import annotations

from dataclasses import dataclass

from byom.errors import OptionError, at_least, positive, whole

MEGABYTE = 1_000_000


@dataclass(frozen=True)
class Options:
    """Limits and sizes of a server.

    Args:
        host: The address that is listened on.
        port: The port; 0 takes any that is free.
        batch: Items (texts or images) of one forward pass at most.
        items: Items of one request at most.
        body: Largest body of a request in MB (10^6 bytes).
        characters: Longest text in characters. Models read their first tokens alone, and all of it is tokenised.
        megapixels: Largest image in 10^6 pixels.
        queue: Items that wait at most; further requests are refused until some are answered.
        timeout: Seconds until a request is given up.
        patience: Seconds after which a waiting request goes first, whatever its task.
        max_new_tokens: Longest generated text in tokens.
        threads: Threads of a forward pass; 0 leaves it to torch.
        device: ``cpu``, ``cuda`` or ``auto``.

    Raises:
        OptionError: If a value is out of range.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    batch: int = 32
    items: int = 64
    body: float = 10.0
    characters: int = 100_000
    megapixels: float = 25.0
    queue: int = 1024
    timeout: float = 30.0
    patience: float = 0.5
    max_new_tokens: int = 64
    threads: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        if not isinstance(self.host, str) or not self.host:
            raise OptionError(f"host={self.host!r} is no address; use for example host=0.0.0.0 for all of this machine")
        if whole("port", self.port, 0) > 65535:
            raise OptionError(f"port={self.port} is no port; the largest is 65535")
        for name in ("batch", "items", "characters", "max_new_tokens"):
            whole(name, getattr(self, name), 1)
        whole("threads", self.threads, 0)
        if whole("queue", self.queue, 1) < self.items:
            raise OptionError(f"queue={self.queue} has no room for one request of items={self.items}; raise queue")
        for name, example in (("body", "10"), ("megapixels", "25"), ("timeout", "30")):
            positive(name, getattr(self, name), example)
        at_least("patience", self.patience, 0, "0.5")
