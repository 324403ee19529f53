"""What a node keeps of an attempt that failed or was slow, and how it tells it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import cast

import grpc
import pytest
from ngpu.v1 import flight_pb2, node_pb2

from nodedaemon.attempt import Attempt
from nodedaemon.course import Course
from nodedaemon.dial import LinkLost
from nodedaemon.flight import AFTER_S, BEFORE_S, SAMPLE_S, SAMPLES, TELL_S, WAITING, Recorder
from nodedaemon.gpus import GpuReading
from nodedaemon.replica import Event, Replica, ReplicaReport, State
from tests.nodedaemon.fake_engine import FakeEngine, FakeTime, assignment, settle

#: Of the wall clock, when the monotonic one says 0.
EPOCH_S = 1_700_000_000.0


class FakeGpus:
    def __init__(self) -> None:
        self.utilization = 0

    def readings(self) -> tuple[GpuReading, ...]:
        self.utilization += 1
        return GpuReading("GPU-1", utilization=self.utilization), GpuReading("GPU-other")


class FakeReplicas:
    def __init__(self, *events: Event, env: dict[str, str] | None = None) -> None:
        self.there = SimpleNamespace(
            assignment=assignment("r-1", gpu_ids=("GPU-1",), env=env or {}),
            events=events,
            report=lambda: ReplicaReport("r-1", State.READY, image_digest="sha256:abc"),
        )

    def kept(self, replica_id: str) -> Replica | None:
        return cast(Replica, self.there) if replica_id == "r-1" else None


class Told:
    """The control plane: answers with these errors first."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.messages: list[node_pb2.RecordRequest] = []
        self.tries = 0

    async def __call__(self, message: node_pb2.RecordRequest) -> None:
        self.tries += 1
        if self.errors:
            raise self.errors.pop(0)
        self.messages.append(message)


def refused(code: grpc.StatusCode) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata())


class World:
    def __init__(self, told: Told, replicas: FakeReplicas) -> None:
        self.time = FakeTime()
        self.engine = FakeEngine()
        self.told = told
        self.recorder = Recorder(
            logs=self.engine,
            replicas=replicas,
            gpus=FakeGpus(),
            tell=told,
            monotonic=self.time.monotonic,
            clock=lambda: EPOCH_S + self.time.monotonic(),
            sleep=self.time.sleep,
        )

    def attempt(self, number: int = 1, replica_id: str = "r-1") -> Attempt:
        start = node_pb2.Start(attempt_id=f"t.{number}", replica_id=replica_id)
        return Attempt(start, Course(lambda: None, self.time.monotonic), self.time.monotonic())

    async def flight(self) -> flight_pb2.NodeFlight:
        await settle()
        for _ in range(20):
            if self.told.messages:
                break
            await self.time.advance(1)
        (message,) = self.told.messages
        return message.flight


@asynccontextmanager
async def a_world(told: Told | None = None, replicas: FakeReplicas | None = None) -> AsyncIterator[World]:
    world = World(told or Told(), replicas or FakeReplicas())
    running = asyncio.create_task(world.recorder.run())
    await settle()
    yield world
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_what_will_soon_be_gone_is_kept_and_told() -> None:
    event = Event(0.0, State.READY, "ready")
    async with a_world(replicas=FakeReplicas(event)) as world:
        for _ in range(3):
            await world.time.advance(SAMPLE_S)
        attempt = world.attempt()
        await world.time.advance(4)
        world.engine.last_words["r-1"] = "out of cheese"
        now = EPOCH_S + world.time.monotonic()
        world.recorder.keep(attempt)
        flight = await world.flight()
        assert flight.image_digest == "sha256:abc"
        assert (flight.start_time.ToMilliseconds(), flight.end_time.ToMilliseconds()) == (
            round((now - 4) * 1000),
            round(now * 1000),
        )
        # Of the replica's GPU alone, oldest first, and one of the very end.
        assert {sample.gpu_id for sample in flight.gpu_samples} == {"GPU-1"}
        used = [sample.utilization for sample in flight.gpu_samples]
        assert used == sorted(used)
        assert flight.gpu_samples[-1].time == flight.end_time
        assert [(one.state, one.message) for one in flight.events] == [("ready", "ready")]
        assert flight.events[0].time.ToSeconds() == EPOCH_S
        assert (flight.log, flight.log_message) == ("out of cheese", "")
        ((since, until),) = world.engine.windows
        assert since == pytest.approx(now - 4 - BEFORE_S)
        assert until == pytest.approx(now + AFTER_S)


async def test_secrets_of_the_environment_are_taken_out_of_the_log() -> None:
    env = {"API_KEY": "hunter2hunter2", "DB_PASSWORD": "s3cr3t-s3cr3t", "MODEL": "sdxl-base"}
    async with a_world(replicas=FakeReplicas(env=env)) as world:
        world.engine.last_words["r-1"] = "key=hunter2hunter2 pw=s3cr3t-s3cr3t model=sdxl-base"
        world.recorder.keep(world.attempt())
        assert (await world.flight()).log == "key=[API_KEY] pw=[DB_PASSWORD] model=sdxl-base"


async def test_a_replica_that_is_gone_and_an_engine_that_is_down_leave_a_record_all_the_same() -> None:
    async with a_world() as world:
        world.engine.go_down("the engine does not answer")
        world.recorder.keep(world.attempt(replica_id="r-gone"))
        flight = await world.flight()
        assert (flight.log, flight.log_message) == ("", "the engine does not answer")
        assert flight.HasField("end_time")


@pytest.mark.parametrize("fault", [LinkLost("it ended"), refused(grpc.StatusCode.UNAVAILABLE)])
async def test_a_control_plane_that_is_away_or_not_ready_is_told_later(fault: Exception) -> None:
    async with a_world(Told(fault, fault)) as world:
        world.recorder.keep(world.attempt())
        await world.flight()
        assert world.told.tries == 3


@pytest.mark.parametrize("code", [grpc.StatusCode.NOT_FOUND, grpc.StatusCode.RESOURCE_EXHAUSTED])
async def test_what_the_control_plane_does_not_want_is_forgotten(code: grpc.StatusCode) -> None:
    async with a_world(Told(refused(code))) as world:
        world.recorder.keep(world.attempt(1))
        world.recorder.keep(world.attempt(2))
        await world.flight()
        assert [message.attempt_id for message in world.told.messages] == ["t.2"]
        assert world.told.tries == 2


async def test_a_control_plane_that_stays_away_is_not_told_for_ever() -> None:
    away = refused(grpc.StatusCode.UNAVAILABLE)
    async with a_world(Told(*[away] * 1000)) as world:
        world.recorder.keep(world.attempt())
        for _ in range(int(TELL_S) + 60):
            await world.time.advance(1)
        tries = world.told.tries
        await world.time.advance(60)
        assert world.told.tries == tries < 100


async def test_what_waits_is_bounded() -> None:
    async with a_world(Told(*[refused(grpc.StatusCode.UNAVAILABLE)] * 1000)) as world:
        for number in range(5 * WAITING):
            world.recorder.keep(world.attempt(number))
        for _ in range(20):
            await world.time.advance(1)
        world.told.errors.clear()
        for _ in range(60):
            await world.time.advance(1)
        assert 0 < len(world.told.messages) <= 2 * WAITING + 2


async def test_samples_are_bounded() -> None:
    async with a_world() as world:
        for _ in range(SAMPLES + 20):
            await world.time.advance(SAMPLE_S)
        world.recorder.keep(world.attempt())
        assert len((await world.flight()).gpu_samples) == SAMPLES + 1
