"""The flight recorder: keeps what is known of an attempt that failed or was slow, for when container and node are gone.

A flight is two bodies of the body store: what the control plane knew when the attempt ended, and what its node tells
afterwards, if it can. Whatever else there is to say (times, placement, why this slot) is in rows. An ordinary attempt
costs nothing here; a workspace whose every attempt fails costs no more than one with a few.
"""

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Final

import msgspec
import structlog

from controlplane.bodies import Bodies
from controlplane.errors import NgpuError, NotFound, Unavailable
from controlplane.model import Attempt
from controlplane.picture import Picture
from controlplane.report import GpuReading

#: Heartbeats of each node whose readings are kept: two minutes of them, at five seconds each.
HEARTBEATS: Final = 24
#: Attempts recorded of one workspace in a minute.
FLIGHTS_A_MINUTE: Final = 20
#: Flights that may wait for the disk.
QUEUE: Final = 1000
#: Of what a node may tell of one attempt.
NODE_BYTES: Final = 256 * 1024
#: How often those past their retention are looked for.
SWEEP_S: Final = 600.0
#: Of what is kept of a replica's last words.
WORDS: Final = 2000
#: All flights' names begin so: they have a retention of their own.
PREFIX: Final = "flight-"

FAILED: Final = "failed"
SLOW: Final = "slow"

_log = structlog.get_logger(__name__)


class Sample(msgspec.Struct, frozen=True):
    """The readings of one GPU in one heartbeat."""

    time: datetime
    reading: GpuReading


class Flight(msgspec.Struct, frozen=True):
    """What the control plane knew of an attempt when it ended. `kind`: FAILED or SLOW."""

    kind: str
    node_addr: str
    #: As its node had last said, in words; and its image.
    replica_state: str = ""
    image_digest: str = ""
    #: Since when nothing had been heard of the node, if it was not connected.
    silent_since: datetime | None = None
    #: Of the attempt's GPUs, oldest first.
    samples: tuple[Sample, ...] = ()


_encode: Final = msgspec.json.Encoder().encode
_decode: Final = msgspec.json.Decoder(Flight).decode
_gpu_ids_of: Final = msgspec.json.Decoder(frozenset[str]).decode


class Flights:
    """Keeps them for `retention_s`, and reads them. `slow_s`: what runs for less is not slow, whatever is usual."""

    def __init__(
        self,
        picture: Picture,
        bodies: Bodies,
        *,
        slow_s: float,
        retention_s: float,
        clock: Callable[[], datetime],
    ) -> None:
        self.slow_s = slow_s
        self._retention = timedelta(seconds=retention_s)
        self._picture = picture
        self._bodies = bodies
        self._clock = clock
        self._heartbeats: dict[str, deque[tuple[datetime, Sequence[GpuReading]]]] = {}
        self._waiting: asyncio.Queue[tuple[str, Flight]] = asyncio.Queue(QUEUE)
        #: Attempts whose flight is not on disk yet.
        self._pending: set[str] = set()
        self._minute = 0
        self._in_minute: Counter[str] = Counter()

    def hear(self, node_addr: str, readings: Sequence[GpuReading]) -> None:
        """A node's heartbeat."""
        if readings:
            kept = self._heartbeats.get(node_addr)
            if kept is None:
                kept = self._heartbeats[node_addr] = deque(maxlen=HEARTBEATS)
            kept.append((self._clock(), readings))

    def keep(self, row: Attempt, kind: str) -> None:
        """Keep what is known now of an attempt that has ended. Does not wait; over a limit nothing is kept."""
        minute = int(self._clock().timestamp()) // 60
        if minute != self._minute:
            self._minute = minute
            self._in_minute.clear()
        self._in_minute[row.workspace_uid] += 1
        if self._in_minute[row.workspace_uid] > FLIGHTS_A_MINUTE or self._waiting.full():
            return
        attempt_id = f"{row.task_id}.{row.number}"
        self._pending.add(attempt_id)
        self._waiting.put_nowait((attempt_id, self._flight(row, kind)))

    def _flight(self, row: Attempt, kind: str) -> Flight:
        gpu_ids = _gpu_ids_of(row.gpu_ids_json)
        samples = tuple(
            Sample(time, reading)
            for time, readings in self._heartbeats.get(row.node_addr, ())
            for reading in readings
            if reading.gpu_id in gpu_ids
        )
        flight = Flight(kind, row.node_addr, samples=samples)
        try:
            node = self._picture.node(row.node_addr)
        except NotFound:
            return flight
        # What it said itself, and not that it is lost, which is said besides.
        said = node.said.get(row.replica_id)
        return msgspec.structs.replace(
            flight,
            replica_state="" if said is None else f"{said.state.name.lower()}: {said.message}"[:WORDS].rstrip(": "),
            image_digest="" if said is None else said.image_digest,
            silent_since=None if node.connected else node.last_seen_time,
        )

    async def run(self) -> None:
        """Write what is to be kept and delete what is over, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._write_all(), name="flights: write")
            group.create_task(self._sweep_again(), name="flights: sweep")

    async def sweep(self) -> None:
        """Delete what is past its retention. Raises Unavailable."""
        await self._bodies.sweep(self._clock() - self._retention, prefix=PREFIX)

    async def _sweep_again(self) -> None:
        while True:
            try:
                await self.sweep()
            except Unavailable as error:
                _log.warning("flights_sweep_failed", error=str(error))
            await asyncio.sleep(SWEEP_S)

    async def _write_all(self) -> None:
        while True:
            attempt_id, flight = await self._waiting.get()
            try:
                await self._write(_plane(attempt_id), _encode(flight))
            except Unavailable as error:
                # Nothing depends on it, and the disk has more important things to take.
                _log.warning("flight_not_kept", attempt=attempt_id, error=str(error))
            finally:
                self._pending.discard(attempt_id)

    async def add(self, attempt_id: str, node_addr: str, data: bytes) -> None:
        """What the attempt's node tells of it; the first time counts.

        Raises NotFound (nothing is recorded of that attempt, or it was not that node's), Unavailable (not yet).
        """
        if attempt_id in self._pending:
            raise Unavailable("The attempt's record is being written; try again soon.", retry_after_s=1.0)
        flight = await self.plane(attempt_id)
        if flight is None or flight.node_addr != node_addr:
            raise NotFound("Nothing is recorded of that attempt.")
        if not await self._bodies.sealed(_node(attempt_id)):
            await self._write(_node(attempt_id), data)

    async def _write(self, name: str, data: bytes) -> None:
        # What a crash may have left of it is begun anew.
        await self._bodies.delete(name)
        await self._bodies.append(name, 0, data, limit_bytes=max(len(data), 1))
        await self._bodies.seal(name, durable=False)

    async def plane(self, attempt_id: str) -> Flight | None:
        """What the control plane knew; None: nothing is kept of that attempt (any more)."""
        data = await self._read(_plane(attempt_id))
        try:
            return _decode(data) if data else None
        except msgspec.DecodeError as error:
            _log.warning("flight_unreadable", attempt=attempt_id, error=str(error))
            return None

    async def node(self, attempt_id: str) -> bytes:
        """What its node told; empty: nothing."""
        return await self._read(_node(attempt_id))

    async def _read(self, name: str) -> bytes:
        try:
            if not await self._bodies.sealed(name):
                return b""
            return b"".join([chunk async for chunk in self._bodies.follow(name)])
        except (NotFound, ValueError):
            # ValueError: a node's word for an attempt that no attempt can have.
            return b""


class FlightTooLarge(NgpuError):
    """A node's record of an attempt may have 256 KiB."""

    code = "RESOURCE_EXHAUSTED"
    reason = "TOO_LARGE"


def _plane(attempt_id: str) -> str:
    return f"{PREFIX}{attempt_id}.plane"


def _node(attempt_id: str) -> str:
    return f"{PREFIX}{attempt_id}.node"
