"""Receivers of webhooks as `receivers` reaches them, loaded at the first post.

aiohttp takes 8 MiB, and where no task has a callback it is for nothing.
"""

import asyncio
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Protocol

from controlplane.destinations import Rules
from controlplane.webhooks import Answer

if TYPE_CHECKING:
    from controlplane.receivers import HttpReceivers


class Receivers(Protocol):
    """Whoever posts."""

    async def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> Answer:
        """POST `body`. Whatever goes wrong is in the answer."""

    async def close(self) -> None:
        """No more."""


class LateReceivers:
    """HttpReceivers, made when first needed; its arguments."""

    def __init__(self, rules: Rules, *, time_limit_s: float, concurrency: int, clock: Callable[[], datetime]) -> None:
        self._rules = rules
        self._time_limit_s = time_limit_s
        self._concurrency = concurrency
        self._clock = clock
        self._made: HttpReceivers | None = None

    async def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> Answer:
        """POST `body`; see Receivers."""
        if self._made is None:
            # It takes 0.2 s, in which calls go on.
            made = await asyncio.to_thread(_load)
            self._made = self._made or made(
                self._rules, time_limit_s=self._time_limit_s, concurrency=self._concurrency, clock=self._clock
            )
        return await self._made.post(url, body, headers)

    async def close(self) -> None:
        """Break off what is under way."""
        if self._made is not None:
            await self._made.close()


def _load() -> "type[HttpReceivers]":
    from controlplane.receivers import HttpReceivers

    return HttpReceivers
