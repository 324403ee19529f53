"""What tasks see of routing: who waits for which slot, in which order, for how long; and that it survives a restart."""

import asyncio
import itertools
import json
from typing import Any

import pytest

from controlplane.errors import QueueFull
from controlplane.model import State, Task
from controlplane.queues import HEAD_BYTES
from tests.controlplane.fakes_dispatch import WS, FakeNode, World


async def run_for(world: World, node: FakeNode, seconds: float, **fields: Any) -> None:
    """A task that takes so long there; all others are busy or not there."""
    future = world.submit(world.new(**fields))
    await world.settle()
    (attempt_id,) = node.running
    await world.advance(seconds)
    node.answer(attempt_id)
    await future
    await world.settle()


async def uneven(world: World) -> tuple[FakeNode, FakeNode]:
    """A node whose tasks take 2 s, and one on which they take 40 s; both are known as that."""
    slow = world.node("slow", r2=1)
    for _ in range(5):
        await run_for(world, slow, 40.0)
    fast = world.node("fast", r1=1)
    slow.serve("r2", 0)
    for _ in range(20):
        await run_for(world, fast, 2.0)
    slow.serve("r2", 1)
    return fast, slow


async def test_task_waits_for_the_fast_replica_although_a_slow_one_is_free(world: World) -> None:
    fast, slow = await uneven(world)
    first, second = world.submit(), world.submit()
    await world.settle()
    assert (len(fast.running), len(slow.running)) == (1, 0)
    view = await world.dispatcher.query(f"t{world.numbers}")
    assert view.state is State.QUEUED
    assert 0 < view.expected_wait_s < 4
    assert view.waiting_for == "a busy replica will have done it sooner: the free one is so much slower"
    await world.advance(2.0)
    fast.answer(f"t{world.numbers - 1}.1")
    await first
    await world.settle()
    assert list(fast.running) == [f"t{world.numbers}.1"]
    fast.answer(f"t{world.numbers}.1")
    await second


async def test_task_that_waits_for_a_fast_replica_which_hangs_goes_to_the_slow_one(world: World) -> None:
    fast, slow = await uneven(world)
    world.submit()
    world.submit()
    await world.settle()
    for _ in range(60):
        # Nothing comes but time.
        await world.advance(1.0)
    assert list(slow.running) == [f"t{world.numbers}.1"]
    assert list(fast.running) == [f"t{world.numbers - 1}.1"]


async def test_task_goes_to_the_slow_replica_when_the_fast_one_is_gone(world: World) -> None:
    fast, slow = await uneven(world)
    world.submit()
    world.submit()
    await world.settle()
    fast.disconnect()
    await world.advance(5.0)
    assert list(slow.running) == [f"t{world.numbers}.1"]


async def test_one_caller_does_not_wait_behind_all_of_another(world: World) -> None:
    node = world.node("n1", r1=1)
    world.submit()
    for _ in range(5):
        world.submit(world.new(user_ip="192.0.2.1"))
    world.submit(world.new(user_ip="192.0.2.2"))
    world.submit(world.new(user_ip="192.0.2.1", btc_address="1BoatSLRHtKNngkdXEeobR76b53LETtpyT"))
    await world.settle()
    places = {task: (await world.dispatcher.query(task)).queue_position for task in ("t2", "t3", "t7", "t8")}
    assert places == {"t2": 0, "t7": 1, "t8": 2, "t3": 3}
    for _ in range(4):
        node.answer(next(iter(node.running)))
        await world.settle()
    assert node.given == ["t1.1", "t2.1", "t7.1", "t8.1", "t3.1"]


async def test_full_queue_of_one_caller_has_room_for_another(world: World) -> None:
    world.fleet.add_workspace(WS, queue_length=20)
    for _ in range(20):
        world.submit(world.new(user_ip="192.0.2.1"))
    with pytest.raises(QueueFull):
        world.submit(world.new(user_ip="192.0.2.1"))
    world.submit(world.new(user_ip="192.0.2.2"))
    with pytest.raises(QueueFull):
        world.submit(world.new(user_ip="192.0.2.2"))
    world.submit(world.new(user_ip="192.0.2.3"))
    with pytest.raises(QueueFull):
        world.submit(world.new(user_ip="192.0.2.4"))


async def test_priority_and_callers_survive_a_restart(world: World) -> None:
    node = world.node("n1", r1=1)
    world.submit()
    for user_ip, priority in (("192.0.2.1", -5), ("192.0.2.1", 0), ("192.0.2.1", 5), ("192.0.2.2", 0)):
        world.submit(world.new(user_ip=user_ip, priority=priority), wait_s=0)
    await world.settle()
    await world.restart()
    node.connect()
    await world.settle()
    for ended, begun in itertools.pairwise(["t1.1", "t4.1", "t5.1", "t3.1", "t2.1"]):
        node.answer(ended)
        await node.has(begun)
        assert list(node.running) == [begun]


async def test_sizes_are_learnt_from_requests_where_tasks_take_long(world: World) -> None:
    node, other = world.node("n1", r1=1), world.node("n2", r2=1)
    other.disconnect()
    for number in range(90):
        steps = (10, 80)[number % 2]
        body = json.dumps({"steps": steps, "prompt": "a cat"}).encode()
        await run_for(world, node, steps / 10.0, body=body)
    sizes = world.dispatcher._slots.pool("w-1").sizes
    assert sizes.useful
    features = sizes.features("/run", b'{"steps": 80, "prompt": "a cat"}')
    assert features is not None
    assert sizes.work(features) > 1.3


async def far(world: World, *, ran_us: int = 1_000_000, **replicas: int) -> FakeNode:
    """A node whose tasks take 2 s, of which so much is their own; the rest is the way there and back."""
    node = world.node("far", **replicas)
    for _ in range(5):
        future = world.submit()
        await world.settle()
        await world.advance(2.0)
        node.answer(next(iter(node.running)), ran_us=ran_us)
        await future
        await world.settle()
    return node


async def test_where_the_way_is_long_each_slot_holds_one_task_ahead(world: World) -> None:
    node = await far(world, r1=1)
    for _ in range(3):
        world.submit()
    await world.settle()
    assert (list(node.running), list(node.ahead)) == (["t6.1"], ["t7.1"])
    assert (await world.dispatcher.query("t7")).state is State.RUNNING
    assert (await world.dispatcher.query("t8")).queue_position == 0
    await world.advance(2.0)
    node.answer("t6.1", ran_us=1_000_000)
    # Without a word from here the next one begins.
    assert list(node.running) == ["t7.1"]
    await world.settle()
    assert list(node.ahead) == ["t8.1"]
    assert world.metrics.ahead == {f"name-of-{WS}": 2}


async def test_who_is_sent_ahead_and_is_there_first_has_the_slot(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.held_bytes = HEAD_BYTES + 50
    await world.restart()
    node = await far(world, r1=1)
    node.disconnect()
    world.submit(world.new(body=b"x" * 100), wait_s=0)
    await world.settle()
    at_last, task_of = asyncio.Event(), world.store.task

    async def slow(task_id: str) -> Task | None:
        await at_last.wait()
        return await task_of(task_id)

    # What is not held in memory is read while its slot is kept; that takes its time.
    monkeypatch.setattr(world.store, "task", slow)
    node.connect()
    await world.settle()
    world.submit()
    await world.settle()
    at_last.set()
    await node.has("t6.1", "t7.1")
    assert (list(node.running), list(node.ahead)) == (["t7.1"], ["t6.1"])


async def test_where_the_way_is_short_no_slot_holds_a_task_ahead(world: World) -> None:
    node = await far(world, ran_us=1_900_000, r1=1)
    world.submit()
    world.submit()
    await world.settle()
    assert (len(node.running), len(node.ahead)) == (1, 0)


async def test_waiting_for_a_slot_is_not_running(world: World) -> None:
    node = await far(world, r1=1)
    _, second = world.submit(), world.submit()
    await world.settle()
    pace_s = world.dispatcher._slots.pool(WS).mean_s
    await world.advance(2.0)
    node.answer("t6.1", ran_us=1_000_000)
    await world.advance(2.0)
    node.answer("t7.1", ran_us=1_000_000, waited_us=2_000_000)
    view = await second
    assert world.dispatcher._slots.pool(WS).mean_s == pytest.approx(pace_s)
    assert view.state is State.COMPLETED
    (receipt,) = await world.store.attempts("t7")
    # Of what its node says no more is believed than has passed since then.
    assert receipt.gpu_us == 2_000_000


async def test_task_whose_slot_does_not_come_free_goes_elsewhere_and_has_lost_nothing(world: World) -> None:
    node = await far(world, r1=1)
    world.submit()
    world.submit(world.new(repeatable=False))
    await world.settle()
    assert 0 < node.ahead["t7.1"].wait_limit_s < 20
    other = world.node("near", r2=1)
    node.give_back("t7.1")
    await world.settle()
    await world.advance(1.0)
    await other.has("t7.2")


async def test_task_that_waits_for_its_slot_can_be_cancelled(world: World) -> None:
    node = await far(world, r1=1)
    world.submit()
    future = world.submit()
    await world.settle()
    await world.dispatcher.cancel("t7")
    assert (await future).state is State.CANCELLED
    node.heed_cancels()
    assert (list(node.running), list(node.ahead)) == (["t6.1"], [])
    world.submit()
    await world.settle()
    assert list(node.ahead) == ["t8.1"]


async def test_what_is_ahead_of_its_slot_survives_a_restart_of_the_control_plane(world: World) -> None:
    node = await far(world, r1=1)
    world.submit(wait_s=0)
    world.submit(wait_s=0)
    await world.settle()
    await world.restart()
    node.connect()
    node.answer("t6.1", ran_us=1_000_000)
    node.answer("t7.1", ran_us=1_000_000, waited_us=2_000_000)
    await world.settle()
    for task_id in ("t6", "t7"):
        assert (await world.dispatcher.query(task_id)).state is State.COMPLETED
        assert len(await world.store.attempts(task_id)) == 1
