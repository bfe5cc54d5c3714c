"""Limits on what is read of a request, whoever reads it."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from typing import Any

from byom.serving.options import MEGABYTE, Options

Scope = Any


class BodyLimit:
    """Middleware that reads bodies of a limited size in limited time, and refuses others before reading all of them.

    Args:
        app: What is called with the body in memory.
        options: The size and the time.
        linger: Seconds for which the rest of a refused body is read and thrown away.
    """

    def __init__(self, app: Any, options: Options, linger: float = 2.0) -> None:
        self.app, self.options, self.linger = app, options, linger
        self.most = int(options.body * MEGABYTE)

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Serve one request, or refuse it with 400, 408 or 413."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if not declared.isdigit():
            await _refuse(send, 400, "the header Content-Length is no number; leave it to your HTTP library")
            return
        large = f"the body is larger than {self.options.body:g} MB; send fewer or smaller items, or serve with body=MB"
        if len(declared) > 18 or int(declared) > self.most:
            await _refuse(send, 413, large, receive, self.linger)
            return
        try:
            async with asyncio.timeout(self.options.timeout):
                body = await self._read(receive)
        except TimeoutError:
            await _refuse(send, 408, f"the body did not arrive within {self.options.timeout:g} s; send it again")
            return
        except _TooLarge:
            await _refuse(send, 413, large, receive, self.linger)
            return
        if body is not None:
            await self.app(scope, _replayed(body, receive), send)

    async def _read(self, receive: Any) -> bytes | None:
        """Return the body, or None if the client left."""
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self.most:
                raise _TooLarge
            if not message.get("more_body"):
                return b"".join(parts)


class _TooLarge(Exception):
    """A body is larger than it may be."""


def _replayed(body: bytes, receive: Any) -> Any:
    read = False

    async def again() -> Any:
        nonlocal read
        if read:
            return await receive()
        read = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def _refuse(send: Any, status: int, sentence: str, receive: Any = None, linger: float = 0) -> None:
    """Answer with a sentence; a client that is still sending gets a moment to read it.

    Closing at once would reset the connection under what it sends, and the sentence would be lost with it.
    """
    body = json.dumps({"error": sentence}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),  # what is left of the body is not read
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": True})
    if receive is not None:
        end = asyncio.get_running_loop().time() + linger
        with suppress(TimeoutError):
            while (left := end - asyncio.get_running_loop().time()) > 0:
                message = await asyncio.wait_for(receive(), left)
                if message["type"] != "http.request" or not message.get("more_body"):
                    break
    await send({"type": "http.response.body", "body": b""})
