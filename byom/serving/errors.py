"""Refusals of requests: a status and a sentence for whoever asked."""

from __future__ import annotations

from collections.abc import Mapping

from byom.errors import ByomError


class Refusal(ByomError):
    """A request that is not answered.

    Args:
        status: The HTTP status.
        sentence: What was given and what to do about it.
        headers: Of the answer.
    """

    def __init__(self, status: int, sentence: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(sentence)
        self.status = status
        self.headers = dict(headers or {})
