"""What the flight recorder promises: what was known stays readable, bounded, and costs nobody else anything."""

import asyncio
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from controlplane.bodies import Bodies
from controlplane.errors import NotFound, Unavailable
from controlplane.flights import FAILED, FLIGHTS_A_MINUTE, HEARTBEATS, QUEUE, Flights
from controlplane.model import Attempt, Delivery
from controlplane.picture import Picture
from controlplane.report import GpuReading
from tests.controlplane.fakes_dispatch import START

DAY = timedelta(days=1)


class Clock:
    def __init__(self) -> None:
        self.time = START

    def __call__(self) -> datetime:
        return self.time


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def bodies(tmp_path: Path) -> AsyncIterator[Bodies]:
    bodies = await Bodies.open(tmp_path)
    yield bodies
    await bodies.close()


@pytest.fixture
async def flights(bodies: Bodies, clock: Clock) -> Flights:
    # Nobody knows the replica any more: a node that is gone.
    return Flights(Picture(), bodies, slow_s=30, retention_s=14 * 86400, clock=clock)


def a_row(number: int = 1, task: str = "t1", workspace: str = "w-1", gpus: bytes = b'["GPU-1"]') -> Attempt:
    return Attempt(
        task_id=task,
        number=number,
        replica_id="r-gone",
        node_addr="0xA",
        gpu_ids_json=gpus,
        delivery=Delivery.SENT,
        assign_time=START,
        end_time=START,
        workspace_uid=workspace,
    )


async def written(flights: Flights, *attempts: str) -> None:
    """Run it until these are on disk."""
    running = asyncio.create_task(flights.run(), name="flights")
    async with asyncio.timeout(10):
        for attempt in attempts:
            while await flights.plane(attempt) is None:
                await asyncio.sleep(0.001)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_the_last_samples_of_its_gpus_are_kept_when_node_and_replica_are_gone(
    flights: Flights, clock: Clock
) -> None:
    for second in range(HEARTBEATS + 5):
        clock.time = START + timedelta(seconds=second)
        flights.hear("0xA", [GpuReading("GPU-1", utilization=second), GpuReading("GPU-2", utilization=0)])
        flights.hear("0xB", [GpuReading("GPU-1", utilization=99)])
    flights.keep(a_row(), FAILED)
    await written(flights, "t1.1")
    flight = await flights.plane("t1.1")
    assert flight is not None
    assert (flight.kind, flight.node_addr) == ("failed", "0xA")
    assert [one.reading.utilization for one in flight.samples] == list(range(5, HEARTBEATS + 5))
    assert flight.samples[-1].time == clock.time


async def test_a_node_tells_its_part_once_and_of_its_own_attempts_only(flights: Flights) -> None:
    flights.keep(a_row(), FAILED)
    with pytest.raises(Unavailable):
        await flights.add("t1.1", "0xA", b"too early")
    await written(flights, "t1.1")
    for attempt, addr in (("t1.1", "0xB"), ("t1.2", "0xA"), ("t2.1", "0xA")):
        with pytest.raises(NotFound):
            await flights.add(attempt, addr, b"not yours")
    await flights.add("t1.1", "0xA", b"the node's")
    await flights.add("t1.1", "0xA", b"something else")
    assert await flights.node("t1.1") == b"the node's"


async def test_of_one_workspace_only_so_many_are_kept_in_a_minute(flights: Flights, clock: Clock) -> None:
    for number in range(1, FLIGHTS_A_MINUTE + 10):
        flights.keep(a_row(number), FAILED)
    flights.keep(a_row(task="other", workspace="w-2"), FAILED)
    await written(flights, "other.1")
    kept = [await flights.plane(f"t1.{number}") is not None for number in range(1, FLIGHTS_A_MINUTE + 10)]
    assert sum(kept) == FLIGHTS_A_MINUTE
    clock.time += timedelta(minutes=1)
    flights.keep(a_row(task="later"), FAILED)
    await written(flights, "later.1")


async def test_what_waits_for_the_disk_is_bounded(flights: Flights) -> None:
    for number in range(QUEUE + 10):
        flights.keep(a_row(task=f"t{number}", workspace=f"w-{number}"), FAILED)
    await written(flights, f"t{QUEUE - 1}.1")
    assert await flights.plane(f"t{QUEUE}.1") is None


async def test_flights_go_after_their_retention_and_other_bodies_stay(
    flights: Flights, bodies: Bodies, clock: Clock
) -> None:
    flights.keep(a_row(), FAILED)
    await written(flights, "t1.1")
    await flights.add("t1.1", "0xA", b"the node's")
    await bodies.append("t1.request", 0, b"x", limit_bytes=1)
    await bodies.seal("t1.request")
    # Their age is the file system's word.
    now = datetime.now(START.tzinfo)
    clock.time = now + 13 * DAY
    await flights.sweep()
    assert await flights.node("t1.1")
    clock.time = now + 15 * DAY
    await flights.sweep()
    assert (await flights.plane("t1.1"), await flights.node("t1.1")) == (None, b"")
    assert await bodies.sealed("t1.request")


async def test_what_a_crash_left_of_a_flight_is_begun_anew(flights: Flights, bodies: Bodies) -> None:
    await bodies.append("flight-t1.1.plane", 0, b'{"kind":', limit_bytes=100)
    flights.keep(a_row(), FAILED)
    await written(flights, "t1.1")
    assert await flights.plane("t1.1") is not None
