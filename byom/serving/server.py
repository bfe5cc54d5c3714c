"""The process: its address, its signals, its end."""

from __future__ import annotations

import asyncio
import socket
from types import FrameType
from typing import Any

import uvicorn

from byom.errors import OptionError
from byom.serving.options import Options


def listening(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to an address.

    Raises:
        OptionError: If there is no such address here, or the port is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
        bound.listen(2048)
    except OSError as error:
        bound.close()
        raise OptionError(
            f"{host}:{port} cannot be listened on ({error.strerror or error}); end what listens there, or choose "
            "another port=, or host=127.0.0.1 or host=0.0.0.0"
        ) from error
    return bound


def address(bound: socket.socket) -> str:
    """Return a bound socket's URL."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """A server whose signals end it well: what runs is answered, what waits is refused, and the status is 0."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start listening."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end; a second signal ends at once."""
        if self.should_exit:
            self.force_exit = True
            return
        self.should_exit = True
        app: Any = self.config.app
        if hasattr(self, "_loop"):  # not here: the handler may have stopped a thread that holds the worker's lock
            self._loop.call_soon_threadsafe(app.state.worker.close)


def run(app: Any, bound: socket.socket, options: Options) -> None:
    """Serve an application until SIGTERM or SIGINT.

    Args:
        app: What `create_app` returned.
        bound: Where it listens.
        options: How long running requests are waited for.
    """
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=max(1, round(options.timeout)),
        lifespan="on",
    )
    Server(config).run(sockets=[bound])
