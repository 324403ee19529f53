"""How fast tasks may come and how many of an account may wait, as the dispatcher enforces it."""

import pytest
from msgspec.structs import replace

from controlplane.errors import QueueFull
from controlplane.quotas import COUNT_S, AccountQueueFull, RateLimited
from tests.controlplane.fakes_dispatch import World


def of_account(world: World, uid: str, account: str, **limits: int) -> None:
    world.fleet.add_workspace(uid, **limits)
    known = world.fleet.workspaces[uid]
    world.fleet.workspaces[uid] = replace(known, spec=replace(known.spec, account=account))


def submitted(world: World, uid: str, times: int) -> None:
    for _ in range(times):
        world.submit(world.new(uid=uid))


async def test_a_seconds_worth_may_come_at_once_and_then_as_many_as_the_rate(world: World) -> None:
    world.fleet.add_workspace("w-slow", rate=5)
    submitted(world, "w-slow", 5)
    with pytest.raises(RateLimited, match="`rate`") as caught:
        world.submit(world.new(uid="w-slow"))
    assert caught.value.retry_after_s == pytest.approx(0.2)
    world.clock.advance(caught.value.retry_after_s)
    submitted(world, "w-slow", 1)
    with pytest.raises(RateLimited):
        world.submit(world.new(uid="w-slow"))
    # Another's rate is its own.
    submitted(world, "w-1", 20)
    world.clock.advance(3600)
    submitted(world, "w-slow", 5)
    with pytest.raises(RateLimited):
        world.submit(world.new(uid="w-slow"))


async def test_what_was_refused_does_not_count(world: World) -> None:
    world.fleet.add_workspace("w-full", rate=2, queue_length=1)
    submitted(world, "w-full", 1)
    for _ in range(100):
        with pytest.raises(QueueFull):
            world.submit(world.new(uid="w-full"))


async def test_an_accounts_queues_are_bounded_together(world: World) -> None:
    for uid in ("w-a", "w-b", "w-c"):
        of_account(world, uid, "acme")
    of_account(world, "w-other", "other")
    of_account(world, "w-none", "")
    submitted(world, "w-a", 4)
    submitted(world, "w-b", 4)
    world.clock.advance(COUNT_S)
    for uid in ("w-a", "w-b"):
        submitted(world, uid, 1)
        world.clock.advance(COUNT_S)
    with pytest.raises(AccountQueueFull, match="account") as caught:
        world.submit(world.new(uid="w-a"))
    assert caught.value.retry_after_s > 0
    # What has nothing waiting may begin to wait, and others are not concerned.
    submitted(world, "w-c", 1)
    with pytest.raises(AccountQueueFull):
        world.submit(world.new(uid="w-c"))
    submitted(world, "w-other", 9)
    submitted(world, "w-none", 15)


async def test_what_has_left_the_queue_makes_room(world: World) -> None:
    of_account(world, "w-a", "acme")
    submitted(world, "w-a", 10)
    with pytest.raises(AccountQueueFull):
        world.submit(world.new(uid="w-a"))
    await world.settle()
    world.node("n1").serve("r1", 3, "w-a")
    await world.settle()
    world.clock.advance(COUNT_S)
    submitted(world, "w-a", 3)
    with pytest.raises(AccountQueueFull):
        world.submit(world.new(uid="w-a"))
