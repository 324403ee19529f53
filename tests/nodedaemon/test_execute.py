"""Attempts over real gRPC: starts in, results out, over as many streams as it takes."""

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from ngpu import wire
from ngpu.v1 import http_pb2, node_pb2, task_pb2

from nodedaemon.attempt import GpuClock
from nodedaemon.bulk import Bulk
from nodedaemon.connection import Address
from nodedaemon.dial import bearer, stub_of
from nodedaemon.engine import Exit
from nodedaemon.execute import Executor
from nodedaemon.held import Held
from nodedaemon.journal import Journal
from nodedaemon.relay import Relay
from nodedaemon.spool import Spool
from tests.nodedaemon.fakes import (
    SOON_S,
    ExecuteStream,
    FakeControlPlane,
    FakeReplicas,
    Wire,
    container,
    control_plane,
    echo,
)

MIB = 1024 * 1024
CUSTOMER, PLATFORM = task_pb2.CAUSE_CUSTOMER, task_pb2.CAUSE_PLATFORM


class Node:
    """All of a daemon that has to do with attempts, on one state directory."""

    def __init__(
        self, plane: FakeControlPlane, state_dir: Path, *, spool_bytes: int = 1024 * MIB, held: Held | None = None
    ) -> None:
        self.plane = plane
        self.replicas = FakeReplicas()
        self.spool = Spool(state_dir / "spool", limit_bytes=spool_bytes)
        self.journal = Journal(state_dir / "journal")
        self.relay = Relay(held=held)
        self.channel = grpc.aio.insecure_channel(plane.address, options=wire.BULK_CLIENT_OPTIONS)
        self.bulk = Bulk(self.channel)
        #: Attempts that the flight recorder has heard of.
        self.recorded: list[str] = []
        self.executor = Executor(
            places=self.replicas,
            relay=self.relay,
            bulk=self.bulk,
            spool=self.spool,
            journal=self.journal,
            taken=held.taken if held else (),
            record=lambda attempt: self.recorded.append(attempt.id),
        )
        self.running = asyncio.create_task(self.executor.run())
        self.attending: asyncio.Task[None] | None = None

    async def connect(self) -> ExecuteStream:
        """A session begins."""
        await asyncio.sleep(0)  # until the executor's group is there
        self.plane.session = "s"
        self.bulk.open("s")
        call = stub_of(self.channel).Execute(metadata=bearer("s"))
        self.attending = asyncio.create_task(self.executor.attend(call))
        return await self.plane.stream()

    async def disconnect(self, stream: ExecuteStream) -> None:
        """The stream ends under the daemon."""
        stream.end()
        assert self.attending is not None
        await asyncio.wait([self.attending])
        assert self.attending.exception() is not None
        self.attending = None

    async def kill(self) -> None:
        """Nothing is tidied up; what was not written is gone."""
        for task in (self.attending, self.running):
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, BaseExceptionGroup):
                    await task
        self.relay.close()
        await self.channel.close()
        self.spool.close()


@pytest.fixture
async def plane() -> AsyncIterator[FakeControlPlane]:
    async with control_plane() as fake:
        yield fake


Boot = Callable[..., Node]


@pytest.fixture
async def boot(plane: FakeControlPlane, tmp_path: Path) -> AsyncIterator[Boot]:
    """Starts a daemon; each call is one more on the same state directory."""
    nodes: list[Node] = []

    def start(**options: Any) -> Node:
        nodes.append(Node(plane, tmp_path, **options))
        return nodes[-1]

    yield start
    for node in nodes:
        await node.kill()


def start(
    attempt_id: str = "t.1",
    body: bytes = b"",
    *,
    method: str = "POST",
    path: str = "/",
    size: int | None = None,
    limit_ms: int = 60_000,
    **more: Any,
) -> node_pb2.Start:
    request = http_pb2.HttpRequest(
        method=method, path=path, body=http_pb2.Body(inline=body, size=len(body) if size is None else size)
    )
    return node_pb2.Start(
        attempt_id=attempt_id, replica_id="r-1", port=80, request=request, run_time_limit_ms=limit_ms, **more
    )


@contextlib.asynccontextmanager
async def serving(node: Node, handler: Any, *, gpus: tuple[str, ...] = ()) -> AsyncIterator[Address]:
    """The node's one replica is this container."""
    async with container(handler) as there:
        node.replicas.addresses["r-1"] = there.address
        node.replicas.gpus["r-1"] = gpus
        yield there.address


class Stuck:
    """A container that answers when it is let."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.go_on = asyncio.Event()
        self.closed = asyncio.Event()
        self.requests = 0

    async def __call__(self, wire_: Wire) -> None:
        while True:
            request = await wire_.request()
            self.requests += 1
            self.asked.set()
            going, closing = asyncio.create_task(self.go_on.wait()), asyncio.create_task(wire_.reader.read(1))
            try:
                await asyncio.wait([going, closing], return_when=asyncio.FIRST_COMPLETED)
                if closing.done():
                    self.closed.set()
                    return
            finally:
                going.cancel()
                closing.cancel()
                await asyncio.wait([going, closing])
            await wire_.answer(request.body)


async def within(event: asyncio.Event, limit_s: float = SOON_S) -> None:
    async with asyncio.timeout(limit_s):
        await event.wait()


# The common course.


async def test_start_is_answered_with_a_result_and_forgotten_when_acknowledged(boot: Boot) -> None:
    node = boot()
    async with serving(node, echo, gpus=("GPU-1",)):
        stream = await node.connect()
        stream.send(starts=[start(body=b"hello")])
        result = await stream.result()
        assert (result.attempt_id, result.delivery) == ("t.1", task_pb2.DELIVERY_ANSWERED)
        assert (result.response.status, result.response.body.inline, result.response.body.size) == (200, b"hello", 5)
        assert 0 < result.sent_after_us <= result.first_byte_after_us <= result.last_byte_after_us
        assert 0 < result.gpu_us <= result.last_byte_after_us + 1000
        assert result.end_time.seconds > 1_700_000_000
        assert node.executor.held() == ["t.1"]
        node.executor.close()
        stream.send(acks=["t.1"])
        assert await node.executor.quiet(SOON_S)
        assert node.executor.held() == []


async def test_the_flight_recorder_hears_of_what_failed_or_was_slow_and_of_nothing_else(boot: Boot) -> None:
    node, stuck = boot(), Stuck()

    async def by_path(wire_: Wire) -> None:
        request = await wire_.request()
        if "slow" in request.target:
            await asyncio.sleep(0.01)
        elif "stuck" in request.target:
            stuck.asked.set()
            await stuck.go_on.wait()
        elif "closes" in request.target:
            return
        await wire_.answer()

    async with serving(node, by_path):
        stream = await node.connect()
        for each in (
            start("usual.1", record_after_ms=60_000),
            start("never.1", path="/slow"),
            start("slow.1", path="/slow", record_after_ms=1),
            start("failed.1", path="/closes"),
        ):
            stream.send(starts=[each])
            await stream.result()
        stream.send(starts=[start("cancelled.1", path="/stuck", record_after_ms=1)])
        await stuck.asked.wait()
        stream.send(cancels=["cancelled.1"])
        await stream.result()
        assert node.recorded == ["slow.1", "failed.1"]
        stuck.go_on.set()


async def test_replica_without_gpus_holds_none(boot: Boot) -> None:
    node = boot()
    async with serving(node, echo):
        stream = await node.connect()
        stream.send(starts=[start()])
        assert (await stream.result()).gpu_us == 0


async def test_many_starts_come_back_in_few_frames(boot: Boot) -> None:
    node = boot()
    async with serving(node, echo):
        stream = await node.connect()
        stream.send(starts=[start(f"t.{number}", b"%d" % number) for number in range(1000)])
        seen: dict[str, bytes] = {}
        frames = 0
        while len(seen) < 1000:
            frame = await stream.frame()
            frames += 1
            assert len(frame.results) + len(frame.sent) <= wire.BATCH_ITEMS
            seen.update({result.attempt_id: result.response.body.inline for result in frame.results})
        assert seen == {f"t.{number}": b"%d" % number for number in range(1000)}
        assert frames < 500


async def test_sent_is_told_of_what_takes_long(boot: Boot) -> None:
    node, stuck = boot(), Stuck()
    async with serving(node, stuck):
        stream = await node.connect()
        stream.send(starts=[start()])
        frame = await stream.frame()
        assert (list(frame.sent), len(frame.results)) == (["t.1"], 0)
        stuck.go_on.set()
        assert (await stream.result()).delivery == task_pb2.DELIVERY_ANSWERED


async def test_start_given_twice_runs_once(boot: Boot) -> None:
    node, stuck = boot(), Stuck()
    async with serving(node, stuck):
        stream = await node.connect()
        stream.send(starts=[start(), start()])
        await within(stuck.asked)
        stream.send(starts=[start()])
        stuck.go_on.set()
        await stream.result()
        stream.send(starts=[start()])
        # In order: the second, which is new, comes back after nothing of the first.
        stream.send(starts=[start("t.2")])
        assert (await stream.result()).attempt_id == "t.2"
        assert stuck.requests == 2


async def test_request_reaches_the_container_as_http(boot: Boot) -> None:
    node = boot()
    asked: list[Any] = []

    async def handler(wire_: Wire) -> None:
        asked.append(await wire_.request())
        await wire_.answer()

    async with serving(node, handler) as (host, port):
        stream = await node.connect()
        given = start(body=b"{}", path="/a/b", method="PUT")
        given.request.query = "x=1"
        given.request.headers.add(name="Content-Type", value=b"application/json")
        given.request.headers.add(name="Authorization", value=b"Bearer workspace-id")
        stream.send(starts=[given])
        await stream.result()
    (request,) = asked
    assert (request.method, request.target, request.body) == ("PUT", "/a/b?x=1", b"{}")
    assert sorted(request.headers) == [
        ("Content-Length", "2"),
        ("Content-Type", "application/json"),
        ("Host", f"{host}:{port}"),
    ]


# What cannot be sent.


async def test_unknown_replica_is_lost_and_nothing_was_sent(boot: Boot) -> None:
    node = boot()
    stream = await node.connect()
    stream.send(starts=[start()])
    result = await stream.result()
    assert (result.failure.reason, result.failure.cause) == ("REPLICA_LOST", PLATFORM)
    assert result.delivery == task_pb2.DELIVERY_NOT_SENT
    assert not result.HasField("response")


async def test_undeclared_port_is_not_reached(boot: Boot) -> None:
    node = boot()
    async with serving(node, echo):
        stream = await node.connect()
        given = start()
        given.port = 22
        stream.send(starts=[given])
        assert (await stream.result()).delivery == task_pb2.DELIVERY_NOT_SENT


async def test_request_that_would_smuggle_is_not_sent(boot: Boot) -> None:
    node, stuck = boot(), Stuck()
    async with serving(node, stuck):
        stream = await node.connect()
        stream.send(starts=[start(path="/x HTTP/1.1\r\nHost: evil")])
        result = await stream.result()
    assert (result.failure.reason, result.delivery) == ("INTERNAL", task_pb2.DELIVERY_NOT_SENT)
    assert stuck.requests == 0


async def test_full_spool_takes_no_more_attempts(boot: Boot) -> None:
    node = boot(spool_bytes=64 * 1024)
    body = node.spool.begin_body("old.1")
    await body.write(b"x" * 64 * 1024)
    async with serving(node, echo):
        stream = await node.connect()
        assert not node.executor.taking
        stream.send(starts=[start()])
        result = await stream.result()
    assert (result.failure.reason, result.failure.cause) == ("REPLICA_LOST", PLATFORM)
    assert result.delivery == task_pb2.DELIVERY_NOT_SENT


# What ends an attempt before its answer.


async def test_cancel_closes_the_containers_connection(boot: Boot) -> None:
    node, stuck = boot(), Stuck()
    async with serving(node, stuck):
        stream = await node.connect()
        stream.send(starts=[start()])
        await within(stuck.asked)
        stream.send(cancels=["t.1", "unknown.1"])
        await within(stuck.closed, 2)
        result = await stream.result()
        assert (result.failure.reason, result.delivery) == ("CANCELLED", task_pb2.DELIVERY_SENT)
        stream.send(cancels=["t.1"])


async def test_cancel_in_the_frame_of_its_start(boot: Boot) -> None:
    node, stuck = boot(), Stuck()
    async with serving(node, stuck):
        stream = await node.connect()
        stream.send(starts=[start()], cancels=["t.1"])
        result = await stream.result()
    assert (result.failure.reason, result.delivery) == ("CANCELLED", task_pb2.DELIVERY_NOT_SENT)


async def test_run_time_limit(boot: Boot) -> None:
    node, stuck = boot(), Stuck()
    async with serving(node, stuck):
        stream = await node.connect()
        stream.send(starts=[start(limit_ms=50)])
        result = await stream.result()
        await within(stuck.closed, 2)
    assert (result.failure.reason, result.failure.cause) == ("RUN_TIME_LIMIT", CUSTOMER)
    assert "0.05 s" in result.failure.message
    assert result.delivery == task_pb2.DELIVERY_SENT


async def test_run_time_limit_before_anything_was_sent_is_the_platforms(boot: Boot, plane: FakeControlPlane) -> None:
    node = boot()
    async with serving(node, echo):
        stream = await node.connect()
        # The rest of its body cannot be had.
        plane.session = "another"
        stream.send(starts=[start(size=1, limit_ms=50)])
        result = await stream.result()
    assert result.failure.reason == "RUN_TIME_LIMIT"


async def test_given_up_attempt_ends_without_a_word(boot: Boot) -> None:
    node, stuck = boot(), Stuck()
    async with serving(node, stuck):
        stream = await node.connect()
        stream.send(starts=[start()])
        await within(stuck.asked)
        stream.send(acks=["t.1"])
        await within(stuck.closed, 2)
        node.executor.close()
        assert await node.executor.quiet(SOON_S)
        assert node.executor.held() == []
        assert not any(frame.results for frame in _drain(stream))


def _drain(stream: ExecuteStream) -> list[node_pb2.ExecuteRequest]:
    frames = []
    while not stream.frames.empty():
        frames.append(stream.frames.get_nowait())
    return frames


@pytest.mark.parametrize(
    ("code", "out_of_memory", "cause", "words"),
    [
        (1, False, CUSTOMER, "exited with code 1"),
        (137, True, CUSTOMER, "ran out of memory"),
        (139, False, CUSTOMER, "SIGSEGV"),
        (137, False, PLATFORM, "SIGKILL"),
    ],
)
async def test_container_that_exits_is_told_from_one_that_closes(
    boot: Boot, code: int, out_of_memory: bool, cause: int, words: str
) -> None:
    node = boot()

    async def dies(wire_: Wire) -> None:
        await wire_.request()
        node.replicas.exits["r-1"] = Exit("r-1", code, out_of_memory=out_of_memory)

    async with serving(node, dies):
        stream = await node.connect()
        stream.send(starts=[start()])
        result = await stream.result()
    assert (result.failure.reason, result.failure.cause) == ("CONTAINER_EXITED", cause)
    assert words in result.failure.message
    assert result.delivery == task_pb2.DELIVERY_SENT


async def test_container_that_only_closes(boot: Boot) -> None:
    node = boot()

    async def closes(wire_: Wire) -> None:
        await wire_.request()

    async with serving(node, closes):
        stream = await node.connect()
        stream.send(starts=[start()])
        failure = (await stream.result()).failure
    assert (failure.reason, failure.cause) == ("CONNECTION_CLOSED", CUSTOMER)


async def test_replica_that_was_stopped_under_an_attempt_is_lost(boot: Boot) -> None:
    node = boot()

    async def stopped(wire_: Wire) -> None:
        await wire_.request()
        del node.replicas.addresses["r-1"]

    async with serving(node, stopped):
        stream = await node.connect()
        stream.send(starts=[start()])
        result = await stream.result()
    assert (result.failure.reason, result.failure.cause) == ("REPLICA_LOST", PLATFORM)
    assert result.delivery == task_pb2.DELIVERY_SENT


async def test_address_that_may_have_become_anothers_is_sent_nothing(boot: Boot) -> None:
    node, stuck = boot(), Stuck()
    async with serving(node, stuck):
        stream = await node.connect()
        # The engine is lost after the attempt was accepted, and before its connection is made.
        node.executor.start(start())
        del node.replicas.addresses["r-1"]
        result = await stream.result()
    assert (result.failure.reason, result.failure.cause) == ("REPLICA_LOST", PLATFORM)
    assert result.delivery == task_pb2.DELIVERY_NOT_SENT
    assert stuck.requests == 0


async def test_exit_that_no_connection_tells_of_ends_the_attempt_all_the_same(boot: Boot) -> None:
    node, stuck = boot(), Stuck()
    async with serving(node, stuck):
        stream = await node.connect()
        stream.send(starts=[start()])
        await within(stuck.asked)
        node.executor.container_exited(Exit("r-1", 3, at=float("inf")))
        node.executor.container_exited(Exit("r-2", 4, at=float("inf")))
        failure = (await stream.result()).failure
    assert failure.reason == "CONTAINER_EXITED"
    assert "code 3" in failure.message


# Streams come and go.


async def test_broken_stream_is_not_a_cancel(boot: Boot) -> None:
    node, stuck = boot(), Stuck()
    async with serving(node, stuck):
        first = await node.connect()
        first.send(starts=[start("t.1", b"one"), start("t.2", b"two")])
        await within(stuck.asked)
        await node.disconnect(first)
        second = await node.connect()
        assert sorted(second.resume.running) == ["t.1", "t.2"]
        assert list(second.resume.ended) == []
        # Told again: a control plane that was started anew does not know.
        assert sorted((await second.frame()).sent) == ["t.1", "t.2"]
        stuck.go_on.set()
        results: dict[str, bytes] = {}
        while len(results) < 2:
            results.update({r.attempt_id: r.response.body.inline for r in (await second.frame()).results})
        assert results == {"t.1": b"one", "t.2": b"two"}
        assert stuck.requests == 2


async def test_results_are_sent_again_until_acknowledged(boot: Boot) -> None:
    node = boot()
    async with serving(node, echo):
        for _ in range(3):
            stream = await node.connect()
            if not stream.resume.ended:
                stream.send(starts=[start(body=b"x")])
            assert (await stream.result()).response.body.inline == b"x"
            await node.disconnect(stream)
        stream = await node.connect()
        assert list(stream.resume.ended) == ["t.1"]
        await stream.result()
        stream.send(acks=["t.1"], starts=[start("t.2")])
        await stream.result()
        await node.disconnect(stream)
        assert list((await node.connect()).resume.ended) == ["t.2"]


async def test_attempts_that_end_while_nobody_listens_are_told_later(boot: Boot) -> None:
    node, stuck = boot(), Stuck()
    async with serving(node, stuck):
        stream = await node.connect()
        stream.send(starts=[start(body=b"x")])
        await within(stuck.asked)
        await node.disconnect(stream)
        stuck.go_on.set()
        async with asyncio.timeout(SOON_S):
            while node.executor.running:
                await asyncio.sleep(0)
        stream = await node.connect()
        assert (list(stream.resume.running), list(stream.resume.ended)) == ([], ["t.1"])
        assert (await stream.result()).response.body.inline == b"x"


# Restarts of the daemon.


async def test_settled_result_is_told_by_the_next_daemon(boot: Boot) -> None:
    node = boot()
    async with serving(node, echo):
        stream = await node.connect()
        stream.send(starts=[start(body=b"x")])
        await stream.result()
        await node.spool.settle()
        await node.kill()
        node = boot()
        stream = await node.connect()
        assert list(stream.resume.ended) == ["t.1"]
        assert (await stream.result()).response.body.inline == b"x"


async def test_killed_daemon_says_what_a_container_had_seen(boot: Boot) -> None:
    node, stuck = boot(), Stuck()
    async with serving(node, stuck):
        stream = await node.connect()
        stream.send(starts=[start()])
        await within(stuck.asked)
        await node.kill()
        stream = await boot().connect()
        assert list(stream.resume.ended) == ["t.1"]
        result = await stream.result()
    assert (result.failure.reason, result.failure.cause) == ("NODE_LOST", PLATFORM)
    assert result.delivery == task_pb2.DELIVERY_SENT


@pytest.mark.parametrize("kept", [0, 1], ids=["new connection", "kept connection"])
async def test_error_that_nobody_foresaw_ends_its_attempt_and_no_other(boot: Boot, kept: int) -> None:
    def fault(*_: Any) -> Any:
        raise ValueError("odd")

    node = boot()
    relay: Any = node.relay
    async with serving(node, echo):
        stream = await node.connect()
        for number in range(kept):
            stream.send(starts=[start(f"before.{number}")])
            await stream.result()
        relay.end_now = relay.run = fault
        stream.send(starts=[start("t.1")])
        result = await stream.result()
        assert (result.attempt_id, result.failure.reason) == ("t.1", "INTERNAL")
        del relay.end_now, relay.run
        stream.send(starts=[start("t.2", b"x")])
        assert (await stream.result()).response.body.inline == b"x"


async def test_stopping_daemon_finishes_what_it_can(boot: Boot) -> None:
    node, stuck = boot(), Stuck()
    async with serving(node, stuck):
        stream = await node.connect()
        stream.send(starts=[start(body=b"x")])
        await within(stuck.asked)
        node.executor.close()
        stream.send(starts=[start("t.2")])
        refused = await stream.result()
        assert (refused.attempt_id, refused.delivery) == ("t.2", task_pb2.DELIVERY_NOT_SENT)
        finishing = asyncio.create_task(node.executor.finish(SOON_S))
        stuck.go_on.set()
        await finishing
        assert (await stream.result()).response.body.inline == b"x"


async def test_stopping_daemon_gives_back_what_it_cannot_finish(boot: Boot) -> None:
    node, stuck = boot(), Stuck()
    async with serving(node, stuck):
        stream = await node.connect()
        stream.send(starts=[start()])
        await within(stuck.asked)
        node.executor.close()
        await node.executor.finish(0)
        result = await stream.result()
    assert (result.failure.reason, result.delivery) == ("NODE_LOST", task_pb2.DELIVERY_SENT)


# Ahead of their slot.


def ahead(attempt_id: str, body: bytes = b"", **more: Any) -> node_pb2.Start:
    """One that waits while another runs."""
    return start(attempt_id, body, **{"concurrency": 1, "wait_limit_ms": 60_000, **more})


async def test_what_came_ahead_of_its_slot_begins_when_another_ends_though_nobody_says_so(boot: Boot) -> None:
    node, stuck = boot(), Stuck()
    async with serving(node, stuck):
        stream = await node.connect()
        stream.send(starts=[start("t.1", b"1"), ahead("t.2", b"2"), ahead("t.3", b"3")])
        await within(stuck.asked)
        assert node.executor.held() == ["t.1", "t.2", "t.3"]
        await node.disconnect(stream)
        assert stuck.requests == 1
        stuck.go_on.set()
        stream = await node.connect()
        results = await stream.results(3)
    assert [result.response.body.inline for result in results] == [b"1", b"2", b"3"]
    assert results[0].waited_us == 0
    assert 0 < results[1].waited_us < results[2].waited_us


async def test_run_time_is_counted_from_the_slot(boot: Boot) -> None:
    node, stuck = boot(), Stuck()
    async with serving(node, stuck):
        stream = await node.connect()
        stream.send(starts=[start("t.1", limit_ms=300), ahead("t.2", limit_ms=300)])
        first, second = await stream.results(2)
    assert {first.failure.reason, second.failure.reason} == {"RUN_TIME_LIMIT"}
    assert second.delivery == task_pb2.DELIVERY_SENT
    assert second.waited_us > 200_000


async def test_what_waits_is_restated_and_comes_back_unsent_when_it_has_waited_for_too_long(boot: Boot) -> None:
    node, stuck = boot(), Stuck()
    async with serving(node, stuck):
        stream = await node.connect()
        stream.send(starts=[start("t.1"), ahead("t.2"), ahead("t.3", wait_limit_ms=50)])
        result = await stream.result()
        assert (result.attempt_id, result.failure.reason, result.delivery) == (
            "t.3",
            "BUSY",
            task_pb2.DELIVERY_NOT_SENT,
        )
        await node.disconnect(stream)
        stream = await node.connect()
        assert (list(stream.resume.running), list(stream.resume.ended)) == (["t.1", "t.2"], ["t.3"])


async def test_what_waits_can_be_cancelled_and_given_up(boot: Boot) -> None:
    node, stuck = boot(), Stuck()
    async with serving(node, stuck):
        stream = await node.connect()
        stream.send(starts=[start("t.1"), ahead("t.2"), ahead("t.3")], cancels=["t.2"], acks=["t.3"])
        result = await stream.result()
        assert (result.failure.reason, result.delivery) == ("CANCELLED", task_pb2.DELIVERY_NOT_SENT)
        assert node.executor.held() == ["t.1", "t.2"]


async def test_what_waits_for_a_replica_that_is_gone_is_lost_with_it(boot: Boot) -> None:
    node, stuck = boot(), Stuck()
    async with serving(node, stuck):
        stream = await node.connect()
        stream.send(starts=[start("t.1"), ahead("t.2"), ahead("t.3")])
        await within(stuck.asked)
        del node.replicas.addresses["r-1"]
        stuck.go_on.set()
        ends = {result.attempt_id: result.failure.reason for result in await stream.results(3)}
    assert ends == {"t.1": "", "t.2": "REPLICA_LOST", "t.3": "REPLICA_LOST"}


async def test_stopping_daemon_gives_back_at_once_what_waits(boot: Boot) -> None:
    node, stuck = boot(), Stuck()
    async with serving(node, stuck):
        stream = await node.connect()
        stream.send(starts=[start("t.1"), ahead("t.2")])
        await within(stuck.asked)
        node.executor.close()
        result = await stream.result()
        assert (result.attempt_id, result.delivery) == ("t.2", task_pb2.DELIVERY_NOT_SENT)
        stuck.go_on.set()
        assert (await stream.result()).attempt_id == "t.1"


# Large bodies.


def noise(size: int) -> bytes:
    block = hashlib.sha512(b"seed").digest() * 1024
    return (block * (size // len(block) + 1))[:size]


async def test_large_request_is_fetched(boot: Boot, plane: FakeControlPlane) -> None:
    node = boot()
    plane.requests["t.1"] = noise(3 * MIB)
    received: list[bytes] = []

    async def handler(wire_: Wire) -> None:
        received.append((await wire_.request()).body)
        await wire_.answer()

    async with serving(node, handler):
        stream = await node.connect()
        stream.send(starts=[start(size=3 * MIB)])
        assert (await stream.result()).delivery == task_pb2.DELIVERY_ANSWERED
    assert received == [noise(3 * MIB)]


async def test_broken_fetch_goes_on_where_it_was(boot: Boot, plane: FakeControlPlane) -> None:
    node = boot()
    plane.requests["t.1"] = noise(3 * MIB)
    plane.cut_fetch_at = 2 * MIB + 5
    received: list[bytes] = []

    async def handler(wire_: Wire) -> None:
        received.append((await wire_.request()).body)
        await wire_.answer()

    async with serving(node, handler):
        stream = await node.connect()
        stream.send(starts=[start(size=3 * MIB)])
        await stream.result()
    assert received == [noise(3 * MIB)]
    assert plane.fetches == [0, 2 * MIB + 5]


async def test_body_that_the_control_plane_gave_up_ends_the_attempt(boot: Boot) -> None:
    node = boot()
    async with serving(node, echo):
        stream = await node.connect()
        stream.send(starts=[start(size=MIB)])
        result = await stream.result()
    assert result.failure.reason == "CANCELLED"
    assert result.delivery == task_pb2.DELIVERY_SENT_PARTLY


async def test_large_answer_is_delivered_before_its_result(boot: Boot, plane: FakeControlPlane) -> None:
    node = boot()

    async def handler(wire_: Wire) -> None:
        await wire_.request()
        await wire_.answer(noise(3 * MIB), headers="X-A: b\r\n")

    async with serving(node, handler):
        stream = await node.connect()
        stream.send(starts=[start()])
        result = await stream.result()
        assert plane.complete == {"t.1"}
        assert plane.stored["t.1"] == noise(3 * MIB)
        assert (plane.heads["t.1"].status, plane.heads["t.1"].headers[0].name) == (200, "X-A")
        assert (result.response.body.inline, result.response.body.size) == (b"", 3 * MIB)
        assert node.spool.used_bytes == 3 * MIB
        stream.send(acks=["t.1"], starts=[start("t.2", size=0)])
        await stream.result()
        assert node.spool.body("t.1") is None


async def test_broken_delivery_goes_on_where_it_was(boot: Boot, plane: FakeControlPlane) -> None:
    node = boot()
    plane.cut_deliver_at = MIB

    async def handler(wire_: Wire) -> None:
        await wire_.request()
        await wire_.answer(noise(3 * MIB))

    async with serving(node, handler):
        stream = await node.connect()
        stream.send(starts=[start()])
        await stream.result()
    assert plane.stored["t.1"] == noise(3 * MIB)


async def test_container_does_not_wait_for_a_control_plane_that_does_not_take(
    boot: Boot, plane: FakeControlPlane
) -> None:
    node = boot()
    plane.taking.clear()
    given = asyncio.Event()

    async def handler(wire_: Wire) -> None:
        await wire_.request()
        await wire_.answer(noise(8 * MIB))
        given.set()
        await wire_.closed()

    async with serving(node, handler):
        stream = await node.connect()
        stream.send(starts=[start()])
        await within(given)
        assert not plane.complete
        plane.taking.set()
        assert (await stream.result()).response.body.size == 8 * MIB


async def test_streamed_answer_comes_while_it_is_made(boot: Boot, plane: FakeControlPlane) -> None:
    node = boot()
    go_on = asyncio.Event()

    async def handler(wire_: Wire) -> None:
        await wire_.request()
        await wire_.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n6\r\ndata 1\r\n")
        await go_on.wait()
        await wire_.send(b"6\r\ndata 2\r\n0\r\n\r\n")

    async with serving(node, handler):
        stream = await node.connect()
        stream.send(starts=[start(streamed=True)])
        await within(plane.delivered)
        assert bytes(plane.stored["t.1"]) == b"data 1"
        go_on.set()
        result = await stream.result()
    assert bytes(plane.stored["t.1"]) == b"data 1data 2"
    assert (result.response.body.size, result.response.body.is_utf8) == (12, True)


async def test_answer_too_large_for_the_control_plane(boot: Boot, plane: FakeControlPlane) -> None:
    node = boot()
    plane.deliver_limit = MIB
    closed = asyncio.Event()

    async def endless(wire_: Wire) -> None:
        try:
            await wire_.request()
            await wire_.send(b"HTTP/1.1 200 OK\r\n\r\n")
            while True:
                await wire_.send(noise(MIB))
        finally:
            closed.set()

    async with serving(node, endless):
        stream = await node.connect()
        stream.send(starts=[start(response_body_limit_bytes=1024 * MIB)])
        result = await stream.result()
        await within(closed)
    assert (result.failure.reason, result.failure.message) == ("RESPONSE_TOO_LARGE", "It is too large.")
    assert node.spool.used_bytes == 0


async def test_half_a_large_answer_is_a_failure_and_leaves_nothing(boot: Boot, tmp_path: Path) -> None:
    node = boot()

    async def handler(wire_: Wire) -> None:
        await wire_.request()
        await wire_.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n" + b"x" * 500_000)

    async with serving(node, handler):
        stream = await node.connect()
        stream.send(starts=[start()])
        result = await stream.result()
    assert (result.failure.reason, result.delivery) == ("CONNECTION_CLOSED", task_pb2.DELIVERY_ANSWERED)
    assert not result.HasField("response")
    # The result does not wait for the deletion.
    async with asyncio.timeout(SOON_S):
        while list((tmp_path / "spool").glob("*.body")):
            await asyncio.sleep(0.002)


async def test_large_answer_is_delivered_by_the_next_daemon(boot: Boot, plane: FakeControlPlane) -> None:
    node = boot()
    plane.taking.clear()

    async def handler(wire_: Wire) -> None:
        await wire_.request()
        await wire_.answer(noise(3 * MIB), headers="X-A: b\r\n")

    async with serving(node, handler):
        stream = await node.connect()
        stream.send(starts=[start()])
        async with asyncio.timeout(SOON_S):
            while "t.1" not in node.spool:
                await asyncio.sleep(0)
        await node.spool.settle()
        await node.kill()
        plane.taking.set()
        stream = await boot().connect()
        assert list(stream.resume.ended) == ["t.1"]
        assert (await stream.result()).response.body.size == 3 * MIB
    assert plane.stored["t.1"] == noise(3 * MIB)


async def test_small_requests_pass_large_ones(boot: Boot, plane: FakeControlPlane) -> None:
    """A delivery that stands still holds back nobody else."""
    node = boot()
    plane.taking.clear()

    async def handler(wire_: Wire) -> None:
        while True:
            request = await wire_.request()
            await wire_.answer(noise(3 * MIB) if request.body == b"large" else b"small")

    async with serving(node, handler):
        stream = await node.connect()
        stream.send(starts=[start("t.1", b"large")])
        stream.send(starts=[start("t.2", b"small")])
        assert (await stream.result()).attempt_id == "t.2"
        plane.taking.set()
        assert (await stream.result()).attempt_id == "t.1"


# GPU time.


def test_gpu_time_is_shared_and_adds_up() -> None:
    now = 10.0
    clock = GpuClock(lambda: now)
    first = clock.enter()
    now = 14.0
    second = clock.enter()
    now = 20.0
    assert clock.leave(first) == pytest.approx(4 + 3)
    now = 21.0
    assert clock.leave(second) == pytest.approx(3 + 1)
    now = 50.0
    assert clock.leave(clock.enter()) == 0.0
