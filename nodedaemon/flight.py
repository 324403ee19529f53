"""The flight recorder of the node: of an attempt that failed or was slow it keeps what will soon be gone, and tells it.

At the attempt's end it takes what is in memory (the GPUs' last samples, what happened to the replica), a moment later
the container's log of that time, before another container takes its place. Then it tells the control plane, which is
tried for some minutes: nothing depends on it. All of it is bounded, and ordinary attempts never come here.
"""

import asyncio
import re
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Protocol

import grpc
import structlog
from google.protobuf.timestamp_pb2 import Timestamp
from ngpu.v1 import flight_pb2, node_pb2

from nodedaemon.attempt import Attempt
from nodedaemon.dial import Backoff, LinkLost, words_of
from nodedaemon.engine import EngineError
from nodedaemon.gpus import GpuReading
from nodedaemon.replica import Replica

#: How often the GPUs are sampled, and how many samples are kept: two minutes of them.
SAMPLE_S: Final = 5.0
SAMPLES: Final = 24
#: The log of an attempt begins so long before it, and ends so long after it.
BEFORE_S: Final = 2.0
AFTER_S: Final = 0.3
#: Flights that may wait to be completed, and to be told. What comes when there are so many is not kept.
WAITING: Final = 16
#: How long one is tried to be told, and the waits between the tries.
TELL_S: Final = 300.0
FIRST_RETRY_S: Final = 0.5
RETRY_CAP_S: Final = 10.0
#: Variables whose values are taken out of logs, if they are at least so long.
_SECRET: Final = re.compile(r"KEY|TOKEN|SECRET|PASS|CREDENTIAL|AUTH", re.IGNORECASE)
SECRET_CHARS: Final = 6
#: Of a message about a replica.
MESSAGE_CHARS: Final = 1000

log = structlog.get_logger()


class Gpus(Protocol):
    """What is asked of the GPUs."""

    def readings(self) -> tuple[GpuReading, ...]:
        """How each is."""


class Logs(Protocol):
    """What is asked of the engine."""

    async def log_of(self, replica_id: str, *, since: float, until: float) -> tuple[str, str]:
        """See Engine."""


class Replicas(Protocol):
    """What is asked of the replicas."""

    def kept(self, replica_id: str) -> Replica | None:
        """The replica, if it is looked after here."""


@dataclass(frozen=True, slots=True)
class _Pending:
    """A flight without its log. `since`, `until`: the attempt's begin and end, Unix seconds."""

    attempt_id: str
    replica_id: str
    since: float
    until: float
    flight: flight_pb2.NodeFlight
    secrets: tuple[tuple[str, str], ...]


class Recorder:
    """Keeps and tells. `tell` raises AioRpcError or LinkLost."""

    def __init__(
        self,
        *,
        logs: Logs,
        replicas: Replicas,
        gpus: Gpus,
        tell: Callable[[node_pb2.RecordRequest], Awaitable[None]],
        monotonic: Callable[[], float] = time.monotonic,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._logs = logs
        self._replicas = replicas
        self._gpus = gpus
        self._tell = tell
        self._monotonic = monotonic
        self._clock = clock
        self._sleep = sleep
        #: When, by `clock`, and the readings of then.
        self._samples: deque[tuple[float, Sequence[GpuReading]]] = deque(maxlen=SAMPLES)
        self._pending: asyncio.Queue[_Pending] = asyncio.Queue(WAITING)
        self._complete: asyncio.Queue[node_pb2.RecordRequest] = asyncio.Queue(WAITING)

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._sample(), name="flights: sample")
            group.create_task(self._complete_all(), name="flights: complete")
            group.create_task(self._tell_all(), name="flights: tell")

    def keep(self, attempt: Attempt) -> None:
        """The attempt has just ended. Does not wait."""
        if self._pending.full():
            log.warning("flight_not_kept", attempt=attempt.id, waiting=WAITING)
            return
        now, ago_s = self._clock(), self._monotonic() - attempt.accepted_at
        flight = flight_pb2.NodeFlight(start_time=_stamp(now - ago_s), end_time=_stamp(now))
        secrets: tuple[tuple[str, str], ...] = ()
        if replica := self._replicas.kept(attempt.replica_id):
            flight.image_digest = replica.report().image_digest
            offset = now - self._monotonic()
            for event in replica.events:
                message = event.message[:MESSAGE_CHARS]
                flight.events.add(time=_stamp(event.at + offset), state=event.state.name.lower(), message=message)
            gpu_ids = replica.assignment.gpu_ids
            if gpu_ids:
                for at, readings in (*self._samples, (now, self._gpus.readings())):
                    flight.gpu_samples.extend(_sample(at, one) for one in readings if one.gpu_id in gpu_ids)
            secrets = tuple(
                (name, value)
                for name, value in replica.assignment.env.items()
                if _SECRET.search(name) and len(value) >= SECRET_CHARS
            )
        self._pending.put_nowait(_Pending(attempt.id, attempt.replica_id, now - ago_s, now, flight, secrets))

    async def _sample(self) -> None:
        while True:
            if readings := self._gpus.readings():
                self._samples.append((self._clock(), readings))
            await self._sleep(SAMPLE_S)

    async def _complete_all(self) -> None:
        while True:
            pending = await self._pending.get()
            # A container that has ended gets a successor after a second at the earliest, and its log goes with it.
            await self._sleep(AFTER_S)
            flight = pending.flight
            try:
                text, flight.log_message = await self._logs.log_of(
                    pending.replica_id, since=max(pending.since - BEFORE_S, 0), until=pending.until + AFTER_S
                )
            except EngineError as error:
                text, flight.log_message = "", str(error)
            for name, value in pending.secrets:
                text = text.replace(value, f"[{name}]")
            flight.log = text
            if self._complete.full():
                log.warning("flight_not_kept", attempt=pending.attempt_id, waiting=WAITING)
                continue
            self._complete.put_nowait(node_pb2.RecordRequest(attempt_id=pending.attempt_id, flight=flight))

    async def _tell_all(self) -> None:
        while True:
            message = await self._complete.get()
            until = self._monotonic() + TELL_S
            backoff = Backoff(FIRST_RETRY_S, RETRY_CAP_S)
            while True:
                try:
                    await self._tell(message)
                    break
                except (grpc.aio.AioRpcError, LinkLost) as fault:
                    if not _may_pass(fault) or self._monotonic() >= until:
                        log.info("flight_not_told", attempt=message.attempt_id, reason=words_of(fault))
                        break
                await self._sleep(backoff.next())


def _may_pass(fault: grpc.aio.AioRpcError | LinkLost) -> bool:
    passing = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAUTHENTICATED)
    return isinstance(fault, LinkLost) or fault.code() in passing


def _sample(at: float, reading: GpuReading) -> flight_pb2.GpuSample:
    return flight_pb2.GpuSample(
        time=_stamp(at),
        gpu_id=reading.gpu_id,
        memory_used_bytes=reading.memory_used_bytes,
        utilization=reading.utilization,
        temperature_c=reading.temperature_c,
        power_w=reading.power_w,
        xids=reading.xids,
        error=reading.error,
    )


def _stamp(at: float) -> Timestamp:
    stamp = Timestamp()
    stamp.FromDatetime(datetime.fromtimestamp(at, UTC))
    return stamp
