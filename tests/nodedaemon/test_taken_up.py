"""A daemon that is killed while a container works costs no second execution: the next one goes on waiting."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from ngpu import wire
from ngpu.v1 import task_pb2

from nodedaemon.engine import Exit
from nodedaemon.held import Held
from tests.nodedaemon.fakes import SOON_S, ExecuteStream, FakeControlPlane, Wire, container
from tests.nodedaemon.test_execute import Node, Stuck, plane, start, within
from tests.nodedaemon.test_jobs import DONE, RUNNING, Classic, starts

__all__ = ["plane"]

CUSTOMER, PLATFORM = task_pb2.CAUSE_CUSTOMER, task_pb2.CAUSE_PLATFORM


class Daemon(Node):
    """One whose connections outlive it."""

    def __init__(self, plane: FakeControlPlane, state_dir: Path) -> None:
        self.held = Held(state_dir)
        super().__init__(plane, state_dir, held=self.held)

    async def shot(self) -> None:
        """As SIGKILL does it: the kernel closes what the process had open, and nothing else happens."""
        async with asyncio.timeout(SOON_S):
            while self.held._unsent:
                await asyncio.sleep(0.01)
        for hold in self.held._holds.values():
            hold.left = True
        await self.kill()
        self.held.close()


Boot = Callable[[], Daemon]


@pytest.fixture
async def boot(plane: FakeControlPlane, tmp_path: Path) -> AsyncIterator[Boot]:
    """Starts a daemon; each call is one more on the same state directory."""
    daemons: list[Daemon] = []

    def begin() -> Daemon:
        daemons.append(Daemon(plane, tmp_path))
        return daemons[-1]

    yield begin
    await daemons[-1].kill()
    daemons[-1].held.close()


class House:
    """The one replica, whichever daemon there is."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.address = address

    def adopted_by(self, daemon: Daemon, *, container_id: str = "c-1", gpus: tuple[str, ...] = ()) -> None:
        daemon.replicas.addresses["r-1"] = self.address
        daemon.replicas.containers["r-1"] = container_id
        daemon.replicas.gpus["r-1"] = gpus


async def succeed(daemon: Daemon, boot: Boot, *, running: tuple[str, ...] = ("t.1",)) -> tuple[Daemon, ExecuteStream]:
    """The next daemon, and its stream; it says that these run."""
    await daemon.shot()
    second = boot()
    stream = await second.connect()
    assert tuple(stream.resume.running) == running
    return second, stream


async def test_the_answer_to_a_killed_daemons_request_is_the_tasks(boot: Boot) -> None:
    first, stuck = boot(), Stuck()
    async with container(stuck) as there:
        House(there.address).adopted_by(first, gpus=("GPU-1",))
        stream = await first.connect()
        stream.send(starts=[start(body=b"hello")])
        await within(stuck.asked)
        await asyncio.sleep(0.1)
        second, stream = await succeed(first, boot)
        House(there.address).adopted_by(second, gpus=("GPU-1",))
        frame = await stream.frame()
        assert list(frame.sent) == ["t.1"]
        stuck.go_on.set()
        result = await stream.result()
        assert (result.response.body.inline, result.delivery) == (b"hello", task_pb2.DELIVERY_ANSWERED)
        # From the beginning, not from when this daemon came.
        assert 0 < result.sent_after_us < 90_000 < result.first_byte_after_us
        assert 90_000 < result.gpu_us <= result.last_byte_after_us + 1000
        # The connection is as good as any.
        stream.send(starts=[start("t.2", body=b"again")])
        assert (await stream.result()).response.body.inline == b"again"
    assert (stuck.requests, there.connections) == (2, 1)


async def test_a_request_whose_body_came_by_itself_is_waited_for_too(boot: Boot, plane: FakeControlPlane) -> None:
    first, stuck = boot(), Stuck()
    body = b"x" * (wire.INLINE_BYTES + 3)
    plane.requests["t.1"] = body
    async with container(stuck) as there:
        House(there.address).adopted_by(first)
        stream = await first.connect()
        stream.send(starts=[start(body=body[:10], size=len(body))])
        await within(stuck.asked)
        await asyncio.sleep(0.05)
        _, stream = await succeed(first, boot)
        stuck.go_on.set()
        assert (await stream.result()).response.body.size == len(body)
    assert stuck.requests == 1


async def test_killed_again_and_again_it_is_one_execution(boot: Boot) -> None:
    daemon, stuck = boot(), Stuck()
    async with container(stuck) as there:
        House(there.address).adopted_by(daemon)
        stream = await daemon.connect()
        stream.send(starts=[start()])
        await within(stuck.asked)
        for _ in range(3):
            daemon, stream = await succeed(daemon, boot)
        House(there.address).adopted_by(daemon)
        stuck.go_on.set()
        assert (await stream.result()).response.status == 200
    assert stuck.requests == 1


async def test_an_answer_that_came_meanwhile_is_found(boot: Boot) -> None:
    first, stuck = boot(), Stuck()
    async with container(stuck) as there:
        House(there.address).adopted_by(first)
        stream = await first.connect()
        stream.send(starts=[start(body=b"hello")])
        await within(stuck.asked)
        await first.shot()
        stuck.go_on.set()
        await asyncio.sleep(0.05)
        second = boot()
        # Its container is not yet adopted, and need not be.
        stream = await second.connect()
        assert (await stream.result()).response.body.inline == b"hello"


async def test_what_had_begun_to_answer_is_reported_lost(boot: Boot) -> None:
    first, begun, closed = boot(), asyncio.Event(), asyncio.Event()

    async def slow(wire_: Wire) -> None:
        await wire_.request()
        await wire_.send(b"HTTP/1.1 200 OK\r\n")
        begun.set()
        await wire_.closed()
        closed.set()

    async with container(slow) as there:
        House(there.address).adopted_by(first)
        stream = await first.connect()
        stream.send(starts=[start()])
        await within(begun)
        await asyncio.sleep(0.05)
        _, stream = await succeed(first, boot, running=())
        result = await stream.result()
        assert (result.failure.reason, result.delivery) == ("NODE_LOST", task_pb2.DELIVERY_SENT)
        await within(closed)


async def test_cancel_of_what_was_taken_up_closes_the_containers_connection(boot: Boot) -> None:
    first, stuck = boot(), Stuck()
    async with container(stuck) as there:
        House(there.address).adopted_by(first)
        stream = await first.connect()
        stream.send(starts=[start()])
        await within(stuck.asked)
        _, stream = await succeed(first, boot)
        stream.send(cancels=["t.1"])
        await within(stuck.closed, 2)
        result = await stream.result()
    assert (result.failure.reason, result.delivery) == ("CANCELLED", task_pb2.DELIVERY_SENT)


async def test_what_was_given_up_meanwhile_ends_without_a_word(boot: Boot) -> None:
    first, stuck = boot(), Stuck()
    async with container(stuck) as there:
        House(there.address).adopted_by(first)
        stream = await first.connect()
        stream.send(starts=[start()])
        await within(stuck.asked)
        second, stream = await succeed(first, boot)
        stream.send(acks=["t.1"])
        await within(stuck.closed, 2)
        second.executor.close()
        assert await second.executor.quiet(SOON_S)


async def test_run_time_counts_from_the_beginning(boot: Boot) -> None:
    first, stuck = boot(), Stuck()
    async with container(stuck) as there:
        House(there.address).adopted_by(first)
        stream = await first.connect()
        stream.send(starts=[start(limit_ms=300)])
        await within(stuck.asked)
        await first.shot()
        await asyncio.sleep(0.3)
        second = boot()
        began = asyncio.get_running_loop().time()
        stream = await second.connect()
        result = await stream.result()
        assert asyncio.get_running_loop().time() - began < 0.25
        await within(stuck.closed, 2)
    assert (result.failure.reason, result.failure.cause) == ("RUN_TIME_LIMIT", CUSTOMER)


async def test_a_container_that_was_replaced_meanwhile_is_not_waited_for(boot: Boot) -> None:
    first, stuck = boot(), Stuck()
    async with container(stuck) as there:
        House(there.address).adopted_by(first)
        stream = await first.connect()
        stream.send(starts=[start()])
        await within(stuck.asked)
        second, stream = await succeed(first, boot)
        House(there.address).adopted_by(second, container_id="c-2")
        result = await stream.result()
    assert (result.failure.reason, result.delivery) == ("REPLICA_LOST", task_pb2.DELIVERY_SENT)


@pytest.mark.parametrize("how", [Wire.reset, lambda _: None], ids=["reset", "closed"])
async def test_a_container_that_died_meanwhile_is_told_of(boot: Boot, how: Callable[[Wire], None]) -> None:
    first, asked, die = boot(), asyncio.Event(), asyncio.Event()

    async def dies(wire_: Wire) -> None:
        await wire_.request()
        asked.set()
        await die.wait()
        how(wire_)

    async with container(dies) as there:
        House(there.address).adopted_by(first)
        stream = await first.connect()
        stream.send(starts=[start()])
        await within(asked)
        await first.shot()
        die.set()
        await asyncio.sleep(0.05)
        second = boot()
        second.replicas.exits["r-1"] = Exit("r-1", 3)
        stream = await second.connect()
        result = await stream.result()
    assert (result.failure.reason, result.failure.cause) == ("CONTAINER_EXITED", CUSTOMER)


async def test_a_streamed_answer_is_delivered_as_it_comes(boot: Boot, plane: FakeControlPlane) -> None:
    first, asked, go_on = boot(), asyncio.Event(), asyncio.Event()
    body = b"x" * (wire.INLINE_BYTES + 1)

    async def long(wire_: Wire) -> None:
        await wire_.request()
        asked.set()
        await go_on.wait()
        await wire_.answer(body)
        await wire_.closed()

    async with container(long) as there:
        House(there.address).adopted_by(first)
        stream = await first.connect()
        stream.send(starts=[start(streamed=True)])
        await within(asked)
        _, stream = await succeed(first, boot)
        go_on.set()
        result = await stream.result()
    assert result.response.body.size == len(body)
    assert plane.stored["t.1"] == body


async def test_a_job_that_had_not_answered_yet_is_followed(boot: Boot) -> None:
    first, asked, go_on = boot(), asyncio.Event(), asyncio.Event()
    classic = Classic(RUNNING, DONE)

    async def late(wire_: Wire) -> None:
        if not asked.is_set():
            asked.set()
            await go_on.wait()
        await classic(wire_)

    async with container(late) as there:
        House(there.address).adopted_by(first)
        stream = await first.connect()
        stream.send(starts=starts())
        await within(asked)
        await asyncio.sleep(0.05)
        second, stream = await succeed(first, boot)
        House(there.address).adopted_by(second)
        go_on.set()
        result = await stream.result()
    assert (result.job_id, classic.posts) == ("j/1", 1)


async def test_a_stop_leaves_what_still_runs_to_the_next_daemon(boot: Boot) -> None:
    first, stuck = boot(), Stuck()
    async with container(stuck) as there:
        House(there.address).adopted_by(first)
        stream = await first.connect()
        stream.send(starts=[start(body=b"hello")])
        await within(stuck.asked)
        first.executor.close()
        await first.executor.finish(0.01, leave=True)
        assert first.executor.held() == ["t.1"]
        assert await first.executor.quiet(SOON_S)
        await first.kill()
        first.held.close()
        assert not stuck.closed.is_set()
        second = boot()
        House(there.address).adopted_by(second)
        stream = await second.connect()
        stuck.go_on.set()
        assert (await stream.result()).response.body.inline == b"hello"
    assert stuck.requests == 1


async def test_a_daemon_that_fails_costs_no_more_than_one_that_is_killed(boot: Boot) -> None:
    first, stuck = boot(), Stuck()
    async with container(stuck) as there:
        House(there.address).adopted_by(first)
        stream = await first.connect()
        stream.send(starts=[start(body=b"hello")])
        await within(stuck.asked)
        await asyncio.sleep(0.05)
        first.running.cancel()
        await asyncio.wait([first.running])
        first.held.close()
        second = boot()
        stream = await second.connect()
        stuck.go_on.set()
        assert (await stream.result()).response.body.inline == b"hello"
    assert stuck.requests == 1


async def test_a_stop_leaves_jobs_too(boot: Boot) -> None:
    first, classic = boot(), Classic(RUNNING)
    async with container(classic) as there:
        House(there.address).adopted_by(first)
        stream = await first.connect()
        stream.send(starts=starts(cancel="DELETE {path}?taskID={id}"))
        await classic.questions(1)
        first.executor.close()
        await first.executor.finish(0.01, leave=True)
        assert first.executor.held() == ["t.1"]
        await first.kill()
        first.held.close()
        second = boot()
        House(there.address).adopted_by(second)
        stream = await second.connect()
        classic.says = [DONE]
        assert (await stream.result()).job_id == "j/1"
    assert classic.posts == 1
    assert not any(line.startswith("DELETE") for line in classic.asked)
