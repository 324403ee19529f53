"""Desired against running containers: a pure plan(), and the loop that makes it so."""

import asyncio
import enum
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from nodedaemon.engine import Address, Assignment, Engine, Exit


class State(enum.IntEnum):
    """Where a replica stands; the numbers are the wire's."""

    ASSIGNED = 1
    PULLING = 2
    STARTING = 3
    READY = 4
    BACKOFF = 5
    STOPPING = 6


@dataclass(frozen=True, slots=True)
class ReplicaReport:
    """One replica as it is. `capacity` is 0 unless it is READY and not draining."""

    replica_id: str
    state: State
    progress: int = 0
    message: str = ""
    capacity: int = 0
    restarts: int = 0
    spec_hash: str = ""
    image_digest: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to start (or adopt) and what to stop."""

    start: tuple[Assignment, ...]
    stop: tuple[str, ...]


def plan(desired: Mapping[str, Assignment], kept: Mapping[str, str], found: Mapping[str, str]) -> Plan:
    """What brings `kept` (replicas we look after) and `found` (containers that are there) to `desired`; both map replica id to spec hash."""
    raise NotImplementedError


class Replicas:
    """Looks after the replicas of this node. Wire it, run `run()` in the daemon's TaskGroup, call `apply` with each list that comes."""

    def __init__(
        self,
        engine: Engine,
        *,
        may_start: Callable[[Assignment], str] = lambda _: "",
        stop_grace_s: float = 10.0,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """`may_start` says in words why an assignment must not start now ("" : it may); wire `Gpus.refusal` of its gpu_ids there."""
        raise NotImplementedError

    async def run(self) -> None:
        """Until cancelled. Containers keep running after it; see stop_all."""
        raise NotImplementedError

    async def listed(self) -> None:
        """Returns once the engine was asked for the first time what is there: send no report before."""
        raise NotImplementedError

    def apply(self, assignments: Iterable[Assignment]) -> None:
        """This is all that should be. Returns at once; until it was called once, nothing is started or stopped."""
        raise NotImplementedError

    def reports(self) -> tuple[ReplicaReport, ...]:
        """All that is, by replica id: desired ones, ones being stopped, and ones found after a restart of the daemon."""
        raise NotImplementedError

    @property
    def version(self) -> int:
        """Counts changes of what `reports` says."""
        raise NotImplementedError

    async def changed(self, seen: int) -> int:
        """Wait until `version` is past `seen`; returns it. No change is missed, several may be one."""
        raise NotImplementedError

    def address(self, replica_id: str, port: int) -> Address | None:
        """Where to reach that port of a READY (also a draining) replica; None if it is not there or has no such port."""
        raise NotImplementedError

    def gpu_ids(self, replica_id: str) -> tuple[str, ...]:
        """GPUs of a replica; () if it has none or is unknown."""
        raise NotImplementedError

    def on_exit(self, callback: Callable[[Exit], None]) -> None:
        """Have `callback` called, in the event loop, for every container that ended by itself (not: because we stopped it)."""
        raise NotImplementedError

    async def exited(self, replica_id: str, *, since: float, within_s: float) -> Exit | None:
        """Did the replica's container end at or after `since` (monotonic)? Waits up to `within_s` for the engine to say so; None: no.

        For the relay, when a connection breaks in mid-exchange: the break is seen some milliseconds before the engine tells of it.
        """
        raise NotImplementedError

    async def stop_all(self, *, within_s: float) -> None:
        """Stop every container of this node; after `run` has ended, when the daemon is told to leave nothing behind."""
        raise NotImplementedError
