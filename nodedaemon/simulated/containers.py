"""Simulated containers: HTTP servers in this process, each on ports of its own, that answer who they are.

A request takes as long as chance has it, on a node of that speed; `?seconds=0.2` says it instead.
"""

import asyncio
import contextlib
import random
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from aiohttp import web

from nodedaemon.engine import Address, Assignment

#: Most that a request may ask for.
SECONDS_LIMIT: Final = 24 * 3600.0
#: For requests to end when their container does; with 0 aiohttp would wait for all of them.
CUT_S: Final = 0.001


@dataclass
class Pace:
    """How fast a node is. Times in seconds on a node of speed 1; `service_s` and `pull_s` are medians.

    `spread`: sigma of the lognormal that service times are drawn from. `slow`: times the usual, by a fault.
    """

    pull_s: float = 10.0
    start_s: float = 2.0
    service_s: float = 1.0
    spread: float = 0.55
    speed: float = 1.0
    slow: float = 1.0

    def takes(self, seconds: float) -> float:
        """How long work of that many seconds takes here now."""
        return seconds * self.slow / self.speed


class Served:
    """What one container answers. `listen` opens its ports, `close` ends it with all that it works on."""

    def __init__(self, node: str, assignment: Assignment, pace: Pace, chance: random.Random) -> None:
        self._node = node
        self._assignment = assignment
        self._pace = pace
        self._chance = chance
        self._at_once = asyncio.Semaphore(assignment.concurrency)
        self._server = web.Server(self._answer, access_log=None)
        self._listeners: list[asyncio.Server] = []
        #: Bound and not yet listening: who connects is refused, as by a program that is still loading.
        self._sockets = {port: _bound() for port in assignment.ports}
        #: Requests that it works on, and that it has answered.
        self.busy = 0
        self.answered = 0

    @property
    def addresses(self) -> Mapping[int, Address]:
        """Each declared port's."""
        return {port: ("127.0.0.1", int(sock.getsockname()[1])) for port, sock in self._sockets.items()}

    async def listen(self) -> None:
        """It has loaded."""
        loop = asyncio.get_running_loop()
        for sock in self._sockets.values():
            self._listeners.append(await loop.create_server(self._server, sock=sock))

    async def close(self) -> None:
        """End at once; connections are cut."""
        for listener in self._listeners:
            listener.close()
        for sock in self._sockets.values():
            sock.close()
        await self._server.shutdown(CUT_S)

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        await request.read()
        if request.path == self._assignment.readiness.path:
            return web.Response()
        async with self._at_once:
            self.busy += 1
            try:
                seconds = self._seconds(request.query)
                await asyncio.sleep(seconds)
            finally:
                self.busy -= 1
        self.answered += 1
        said: dict[str, Any] = {
            "node": self._node,
            "workspace": self._assignment.workspace,
            "replica": self._assignment.replica_id,
            "gpus": list(self._assignment.gpu_ids),
            "seconds": round(seconds, 6),
        }
        return web.json_response(said)

    def _seconds(self, query: Mapping[str, str]) -> float:
        with contextlib.suppress(KeyError, ValueError):
            return min(max(0.0, float(query["seconds"])), SECONDS_LIMIT) * self._pace.slow
        return self._pace.takes(self._pace.service_s * self._chance.lognormvariate(0.0, self._pace.spread))


def _bound() -> socket.socket:
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    return sock
