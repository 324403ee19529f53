"""What tasks see of routing: who waits for which slot, in which order, for how long; and that it survives a restart."""

import itertools
import json
from typing import Any

import pytest

from controlplane.errors import QueueFull
from controlplane.model import State
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
