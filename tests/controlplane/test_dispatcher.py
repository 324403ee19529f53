"""What the dispatcher promises where nothing breaks: tasks start, are answered, wait, are limited and cancelled."""

import asyncio

import pytest

from controlplane.errors import Conflict, NotFound, QueueFull, Unavailable
from controlplane.model import Cause, Delivery, State, Task
from controlplane.queues import HEAD_BYTES
from controlplane.recent import RECENT_S
from controlplane.report import ReplicaReport, ReplicaState
from controlplane.slots import Request
from controlplane.tasks import TaskView
from controlplane.writes import REWRITE_S
from tests.controlplane.fakes_dispatch import WS, World


async def test_task_that_finds_a_free_slot_starts_in_the_same_turn(world: World) -> None:
    node = world.node("n1", r1=1)
    future = world.submit()
    assert node.given == ["t1.1"]  # nothing was awaited
    start = node.running["t1.1"]
    assert start.request == Request("POST", "/run", "", (("x", b"\xff"),), b"body", 4)
    assert (start.replica_id, start.port, start.run_time_limit_s) == ("r1", 80, 600.0)
    node.answer("t1.1", b"hello", status=404)
    view = await future
    assert view.state is State.COMPLETED
    assert view.response is not None
    assert (view.response.status, view.response.body) == (404, b"hello")
    row = await world.store.task("t1")
    assert row is not None
    assert (row.state, row.response_body, row.replica_id) == (State.COMPLETED, b"hello", "r1")
    (attempt,) = await world.store.attempts("t1")
    assert (attempt.number, attempt.delivery, attempt.http_status) == (1, Delivery.ANSWERED, 404)
    assert attempt.node_ip == "192.0.2.1"


async def test_task_that_ended_a_moment_ago_is_answered_from_memory(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = world.node("n1", r1=1)
    future = world.submit()
    node.answer("t1.1", b"hello")
    ended = await future
    reads: list[str] = []
    read = world.store.task

    async def task(task_id: str) -> Task | None:
        reads.append(task_id)
        return await read(task_id)

    monkeypatch.setattr(world.store, "task", task)
    assert await world.dispatcher.ask("t1") == await world.dispatcher.query("t1") == ended
    assert reads == []
    world.clock.advance(RECENT_S)
    later = await world.dispatcher.ask("t1")
    assert (later.state, later.response) == (ended.state, ended.response)
    assert await world.dispatcher.query("t1") == later
    assert reads == ["t1"]  # and is remembered again


async def test_node_may_forget_only_what_is_on_disk(world: World) -> None:
    node = world.node("n1", r1=1)
    future = world.submit()
    await world.settle()
    node.answer("t1.1")
    assert node.acked == []
    assert not future.done()
    await future
    assert node.acked == ["t1.1"]


async def test_slot_is_free_when_the_result_comes_and_not_only_when_it_is_on_disk(world: World) -> None:
    node = world.node("n1", r1=1)
    world.submit()
    node.answer("t1.1")
    world.submit()
    assert node.given == ["t1.1", "t2.1"]
    await world.settle()


async def test_asynchronous_task_is_acknowledged_when_it_is_on_disk(world: World) -> None:
    view = await world.submit(wait_s=0)
    assert view.state is State.QUEUED
    assert await world.state("t1") is State.QUEUED


async def test_acknowledged_task_is_started_only_after_its_start_is_on_disk(world: World) -> None:
    await world.submit(wait_s=0)
    node = world.node("n1", r1=1)
    assert node.given == []
    await world.settle()
    assert node.given == ["t1.1"]
    assert await world.state("t1") is State.RUNNING


async def test_caller_gets_the_task_as_it_is_when_its_wait_is_over(world: World) -> None:
    world.node("n1", r1=1)
    future = world.submit(wait_s=5)
    await world.settle()
    await world.advance(4.9)
    assert not future.done()
    await world.advance(0.2)
    view = await future
    assert (view.state, view.attempt) == (State.RUNNING, 1)


async def test_queue_is_first_come_first_served_and_shows_positions_and_reasons(world: World) -> None:
    node = world.node("n1", r1=1)
    for _ in range(4):
        world.submit()
    await world.settle()
    waiting = [world.dispatcher.waiting(f"t{n}") for n in range(1, 5)]
    assert [view and view.queue_position for view in waiting] == [None, 0, 1, 2]
    view = await world.dispatcher.query("t3")
    assert (view.state, view.queue_position, view.waiting_for) == (State.QUEUED, 1, "the only replica is busy")
    assert view.expected_wait_s == 0
    await world.advance(4)
    for number in range(1, 5):
        node.answer(f"t{number}.1")
        await world.settle()
        if number == 1:
            # By then it is known how long one takes.
            assert (await world.dispatcher.query("t4")).expected_wait_s == 2 * 4
    assert node.given == ["t1.1", "t2.1", "t3.1", "t4.1"]


async def test_waiting_task_says_what_its_replicas_do(world: World) -> None:
    world.fleet.add_replica("r1", WS, "n1", ReplicaState.PULLING)
    world.fleet.reports["r1"] = ReplicaReport("r1", ReplicaState.PULLING, progress=40)
    view = await world.submit(wait_s=0)
    words = "no replica is ready: 1 pulling (40 %); next is replica r1 on node name-of-n1, which pulls its image, 40 %"
    assert (view.waiting_for, view.expected_wait_s) == (words, 0)


async def test_task_without_a_free_slot_calls_for_one(world: World) -> None:
    world.submit()
    assert world.fleet.called == [WS]
    world.node("n1", r1=1)
    await world.settle()
    assert world.fleet.called == [WS]
    world.submit()
    assert world.fleet.called == [WS, WS]


async def test_full_queue_refuses_and_says_when_to_try_again(world: World) -> None:
    world.fleet.add_workspace(WS, queue_length=2)
    world.node("n1", r1=1)
    for _ in range(3):
        world.submit()
    with pytest.raises(QueueFull) as refused:
        world.submit()
    assert refused.value.retry_after_s >= 1
    await world.settle()
    assert await world.store.task("t4") is None


async def test_unknown_and_deleted_workspaces_take_nothing(world: World) -> None:
    with pytest.raises(NotFound):
        world.submit(world.new(uid="w-none"))
    world.fleet.delete_workspace(WS)
    with pytest.raises(NotFound):
        world.submit()


async def test_cancel_of_queued_never_starts(world: World) -> None:
    await world.submit(wait_s=0)
    view = await world.dispatcher.cancel("t1")
    assert view.state is State.CANCELLED
    assert view.failure is not None
    assert view.failure.reason == "CANCELLED"
    node = world.node("n1", r1=1)
    await world.settle()
    assert node.given == []


async def test_cancel_while_the_start_is_being_written_never_starts(world: World) -> None:
    await world.submit(wait_s=0)
    node = world.node("n1", r1=1)
    assert world.dispatcher.running_on("r1") == 1
    view = await world.dispatcher.cancel("t1")
    assert view.state is State.CANCELLED
    assert node.given == []
    assert world.dispatcher.running_on("r1") == 0
    (attempt,) = await world.store.attempts("t1")
    assert attempt.delivery is Delivery.NOT_SENT


async def test_cancel_of_running_tells_the_node_and_keeps_the_slot_until_it_is_over(world: World) -> None:
    node = world.node("n1", r1=1)
    future = world.submit()
    await world.settle()
    world.clock.advance(7)
    assert (await world.dispatcher.cancel("t1")).state is State.CANCELLED
    assert (await future).state is State.CANCELLED
    assert node.cancelled == ["t1.1"]
    await world.submit(wait_s=0)
    assert node.given == ["t1.1"]
    node.answer("t1.1", b"too late")
    await world.settle()
    assert node.acked == ["t1.1"]
    assert node.given == ["t1.1", "t2.1"]
    assert await world.state("t1") is State.CANCELLED
    (attempt,) = await world.store.attempts("t1")
    # What the customer ended has held its GPU until then.
    assert attempt.gpu_us == 7_000_000


async def test_cancel_twice_and_of_an_ended_task_changes_nothing(world: World) -> None:
    node = world.node("n1", r1=1)
    world.submit()
    node.answer("t1.1")
    await world.settle()
    assert (await world.dispatcher.cancel("t1")).state is State.COMPLETED
    with pytest.raises(NotFound):
        await world.dispatcher.cancel("none")


async def test_cancel_after_the_answer_came_changes_nothing(world: World) -> None:
    node = world.node("n1", r1=1)
    world.submit()
    await world.settle()
    node.answer("t1.1")
    assert (await world.dispatcher.cancel("t1")).state is State.COMPLETED


async def test_caller_who_hangs_up_cancels_if_he_said_so(world: World) -> None:
    node = world.node("n1", r1=2)
    first, second = world.submit(cancel_on_hangup=True), world.submit()
    await world.settle()
    first.cancel()
    second.cancel()
    await world.settle()
    assert node.cancelled == ["t1.1"]
    assert await world.state("t1") is State.CANCELLED
    assert await world.state("t2") is State.RUNNING


async def test_cancelled_awaiting_caller_is_a_hang_up(world: World) -> None:
    world.node("n1", r1=1)
    caller = asyncio.create_task(world.dispatcher.submit(world.new(), wait_s=60, cancel_on_hangup=True))
    await world.settle()
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    await world.settle()
    assert await world.state("t1") is State.CANCELLED


async def test_hang_up_while_others_wait_for_the_task_does_not_cancel(world: World) -> None:
    world.node("n1", r1=1)
    first = world.submit(world.new(idempotency_key="k", request_hash=b"h"), cancel_on_hangup=True)
    second = world.submit(world.new(idempotency_key="k", request_hash=b"h"), cancel_on_hangup=True)
    await world.settle()
    first.cancel()
    await world.settle()
    assert await world.state("t1") is State.RUNNING
    second.cancel()
    await world.settle()
    assert await world.state("t1") is State.CANCELLED


async def test_same_idempotency_key_is_one_execution(world: World) -> None:
    node = world.node("n1", r1=4)
    futures = [world.submit(world.new(idempotency_key="k", request_hash=b"h")) for _ in range(3)]
    assert node.given == []  # not before it is known to be new
    await world.settle()
    assert node.given == ["t1.1"]
    node.answer("t1.1")
    assert {(await future).task_id for future in futures} == {"t1"}
    later = await world.submit(world.new(idempotency_key="k", request_hash=b"h"))
    assert (later.task_id, later.state) == ("t1", State.COMPLETED)
    assert await world.store.task("t2") is None
    assert world.dispatcher.queued(WS) == 0


async def test_same_idempotency_key_with_another_request_is_a_conflict(world: World) -> None:
    await world.submit(world.new(idempotency_key="k", request_hash=b"h"), wait_s=0)
    with pytest.raises(Conflict):
        await world.submit(world.new(idempotency_key="k", request_hash=b"other"))
    assert world.dispatcher.queued(WS) == 1


async def test_queue_time_limit_ends_what_waits_and_says_why(world: World) -> None:
    world.fleet.add_workspace(WS, queue_time_s=30)
    future = world.submit()
    await world.settle()
    await world.advance(29)
    assert not future.done()
    await world.advance(1)
    view = await future
    assert view.state is State.FAILED
    assert view.failure is not None
    assert view.failure.reason == "QUEUE_TIME_LIMIT"
    assert view.failure.message.endswith("no replica is placed yet.")


async def test_queue_time_limit_never_ends_what_runs(world: World) -> None:
    world.fleet.add_workspace(WS, queue_time_s=30)
    world.node("n1", r1=1)
    world.submit()
    await world.settle()
    await world.advance(31)
    assert await world.state("t1") is State.RUNNING


async def test_run_time_is_the_nodes_business_and_then_ours(world: World) -> None:
    world.fleet.add_workspace(WS, run_time_s=10)
    node = world.node("n1", r1=1)
    future = world.submit()
    await world.settle()
    await world.advance(11)
    assert not future.done()
    await world.advance(30)
    view = await future
    assert view.failure is not None
    assert (view.failure.reason, view.failure.cause) == ("RUN_TIME_LIMIT", Cause.CUSTOMER)
    assert node.cancelled == ["t1.1"]


async def test_total_time_limit_ends_whatever_it_does(world: World) -> None:
    world.fleet.add_workspace(WS, total_time_s=60, queue_time_s=100)
    node = world.node("n1", r1=1)
    running, queued = world.submit(), world.submit()
    await world.settle()
    await world.advance(60)
    for future in (running, queued):
        failure = (await future).failure
        assert failure is not None
        assert failure.reason == "TOTAL_TIME_LIMIT"
    assert node.cancelled == ["t1.1"]
    assert node.given == ["t1.1"]


async def test_deleted_workspace_fails_its_queue_and_finishes_what_runs(world: World) -> None:
    node = world.node("n1", r1=1)
    running, queued = world.submit(), world.submit()
    await world.settle()
    world.fleet.delete_workspace(WS)
    world.dispatcher.workspace_deleted(WS)
    failure = (await queued).failure
    assert failure is not None
    assert failure.reason == "WORKSPACE_DELETED"
    node.answer("t1.1")
    assert (await running).state is State.COMPLETED


async def test_draining_replica_takes_nothing_new(world: World) -> None:
    node = world.node("n1", r1=2)
    world.submit()
    world.dispatcher.set_capacity("r1", WS, "n1", 0)
    world.submit()
    await world.settle()
    assert node.given == ["t1.1"]
    assert world.dispatcher.running_on("r1") == 1
    node.answer("t1.1")
    await world.settle()
    assert world.dispatcher.running_on("r1") == 0


async def test_query_of_known_unknown_and_ended_tasks(world: World) -> None:
    node = world.node("n1", r1=1)
    world.submit()
    await world.settle()
    assert (await world.dispatcher.query("t1")).state is State.RUNNING
    waiting = world.dispatcher.ask("t1", wait_s=60)
    node.answer("t1.1")
    assert (await waiting).state is State.COMPLETED
    ended = await world.dispatcher.ask("t1")
    assert ended.response is not None
    assert (ended.response.body, ended.response.headers) == (b"done", (("content-type", b"text/plain"),))
    with pytest.raises(NotFound):
        await world.dispatcher.query("none")


async def test_query_is_told_of_what_it_has_not_seen(world: World) -> None:
    await world.submit(wait_s=0)
    news = world.dispatcher.ask("t1", wait_s=60, seen=(0, State.QUEUED))
    await world.settle()
    assert not news.done()
    world.node("n1", r1=1)
    view = await news
    assert (view.attempt, view.state) == (1, State.RUNNING)


async def test_requests_of_a_long_queue_wait_on_disk(world: World) -> None:
    world.held_bytes = HEAD_BYTES + 10
    await world.restart()
    first, second = world.submit(world.new(body=b"1" * 10)), world.submit(world.new(body=b"2" * 10))
    node = world.node("n1", r1=2)
    await node.has("t1.1", "t2.1")
    assert node.running["t1.1"].request.body == b"1" * 10
    assert node.running["t2.1"].request == Request("POST", "/run", "", (("x", b"\xff"),), b"2" * 10, 10)
    node.answer("t1.1")
    node.answer("t2.1")
    await asyncio.gather(first, second)


async def test_failed_insert_is_the_callers_error_and_calls_the_attempt_off(world: World) -> None:
    node = world.node("n1", r1=1)
    world.flaky.down = True
    with pytest.raises(Unavailable):
        await world.submit()
    await world.settle()
    assert node.cancelled == ["t1.1"]
    world.flaky.down = False
    node.heed_cancels()
    await world.advance(REWRITE_S)
    assert node.acked == ["t1.1"]
    assert world.dispatcher.running_on("r1") == 0
    with pytest.raises(NotFound):
        await world.dispatcher.query("t1")


async def test_insert_that_was_done_though_its_caller_was_told_otherwise_is_ended(world: World) -> None:
    world.flaky.unsure = True
    with pytest.raises(Unavailable):
        await world.submit()
    await world.settle()
    assert await world.state("t1") is State.FAILED
    assert world.dispatcher.queued(WS) == 0


async def test_who_asks_while_it_stops_does_not_keep_it_from_that(world: World) -> None:
    world.node("n1", r1=1)
    await world.submit(wait_s=0)
    await world.dispatcher.stop()
    assert (await world.dispatcher.query("t1", wait_s=1e9)).state is State.RUNNING


async def keyed(world: World) -> TaskView:
    return await world.submit(world.new(idempotency_key="k", request_hash=b"h"))


async def test_keyed_insert_that_may_have_been_done_is_found_under_way_by_its_caller(world: World) -> None:
    node = world.node("n1", r1=1)
    world.flaky.unsure = True
    with pytest.raises(Unavailable):
        await keyed(world)
    again = asyncio.create_task(keyed(world))
    await world.settle()
    await world.advance(REWRITE_S)
    assert node.given == ["t1.1"]
    node.answer("t1.1", b"once")
    view = await again
    assert (view.task_id, view.state) == ("t1", State.COMPLETED)


async def test_keyed_insert_that_was_not_done_is_done_later(world: World) -> None:
    node = world.node("n1", r1=1)
    world.flaky.down = True
    with pytest.raises(Unavailable):
        await keyed(world)
    await world.advance(REWRITE_S)
    assert node.given == []
    world.flaky.down = False
    await world.advance(REWRITE_S)
    assert node.given == ["t1.1"]


async def test_keyed_insert_that_came_too_late_leaves_the_key_to_the_other_task(world: World) -> None:
    node = world.node("n1", r1=1)
    world.flaky.down = True
    with pytest.raises(Unavailable):
        await keyed(world)
    world.flaky.down = False
    second = asyncio.create_task(keyed(world))
    await world.settle()
    await world.advance(REWRITE_S)
    assert node.given == ["t2.1"]
    node.answer("t2.1")
    assert (await second).task_id == "t2"
    with pytest.raises(NotFound):
        await world.dispatcher.query("t1")


async def test_keyed_insert_of_another_request_is_given_up(world: World) -> None:
    world.flaky.down = True
    with pytest.raises(Unavailable):
        await keyed(world)
    world.flaky.down = False
    await world.submit(world.new(idempotency_key="k", request_hash=b"other"), wait_s=0)
    await world.advance(REWRITE_S)
    with pytest.raises(NotFound):
        await world.dispatcher.query("t1")
    assert world.dispatcher.queued(WS) == 1


async def test_task_that_is_cancelled_while_its_insert_is_unsure_never_starts(world: World) -> None:
    node = world.node("n1", r1=1)
    world.flaky.unsure = True
    with pytest.raises(Unavailable):
        await keyed(world)
    cancelling = asyncio.create_task(world.dispatcher.cancel("t1"))
    await world.settle()
    await world.advance(REWRITE_S)
    assert (await cancelling).state is State.CANCELLED
    assert node.given == []


async def test_end_that_cannot_be_written_is_neither_told_nor_forgotten(world: World) -> None:
    node = world.node("n1", r1=1)
    future = world.submit()
    await world.settle()
    world.flaky.down = True
    node.answer("t1.1")
    await world.advance(REWRITE_S * 3)
    assert not future.done()
    assert node.acked == []
    assert (await world.dispatcher.query("t1")).state is State.RUNNING
    world.flaky.down = False
    await world.advance(REWRITE_S)
    assert (await future).state is State.COMPLETED
    assert node.acked == ["t1.1"]


async def test_end_that_was_written_though_the_database_said_otherwise_is_one_end(world: World) -> None:
    node = world.node("n1", r1=1)
    future = world.submit()
    await world.settle()
    world.flaky.unsure = True
    node.answer("t1.1", b"once")
    await world.settle()
    assert not future.done()
    await world.advance(REWRITE_S)
    view = await future
    assert view.response is not None
    assert view.response.body == b"once"
    assert len(await world.store.attempts("t1")) == 1


async def test_start_that_cannot_be_written_waits_for_the_database(world: World) -> None:
    await world.submit(wait_s=0)
    world.flaky.down = True
    node = world.node("n1", r1=1)
    await world.advance(REWRITE_S)
    assert node.given == []
    world.flaky.down = False
    await world.advance(REWRITE_S)
    assert node.given == ["t1.1"]


async def test_caller_whom_we_leave_has_not_hung_up(world: World) -> None:
    node = world.node("n1", r1=1)
    future = world.submit(cancel_on_hangup=True)
    await world.settle()
    await world.dispatcher.stop()
    future.cancel()  # its stream is closed
    await world.settle()
    assert node.cancelled == []
    assert await world.state("t1") is State.RUNNING
    with pytest.raises(Unavailable):
        await future


async def test_stop_refuses_new_tasks_and_answers_who_waits(world: World) -> None:
    node = world.node("n1", r1=2)
    done, running = world.submit(), world.submit()
    await world.settle()
    node.answer("t1.1")
    await world.dispatcher.stop()
    assert (await done).state is State.COMPLETED
    with pytest.raises(Unavailable, match="t2"):
        await running
    with pytest.raises(Unavailable):
        world.submit()
