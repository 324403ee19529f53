"""Second attempts: when one begins, which answer wins, what the ledger says, and what a crash leaves of it."""

import asyncio
from typing import Any

import pytest
from msgspec.structs import replace

from controlplane.hedging import HEDGE, LOOK_S
from controlplane.model import Attempt, Cause, Delivery, State
from controlplane.receipts import Terms
from controlplane.slots import AttemptResult, Response
from tests.controlplane.fakes_dispatch import WS, FakeNode, World

SECOND = f"t2.{HEDGE + 1}"


async def a_slow_one(world: World, *, down: bool = False, **task: Any) -> tuple[FakeNode, FakeNode]:
    """Two nodes; a task of one second is usual; t2 runs on the first, and has done so for three.

    `down`: since then nothing can be written.
    """
    known = world.fleet.workspaces[WS]
    world.fleet.workspaces[WS] = replace(known, spec=replace(known.spec, hedge=3.0))
    world.terms = lambda *_: Terms("acme", "RTX 4090", 1000)
    first, other = world.node("n1", r1=1), world.node("n2", r2=0)
    world.submit()
    await world.settle()
    await world.advance(1.0)
    first.answer("t1.1")
    await world.settle()
    world.submit(world.new(**task))
    await world.settle()
    other.serve("r2")
    await world.advance(2.9)
    assert other.given == []
    world.flaky.down = down
    await world.advance(0.2)
    return first, other


async def test_second_attempt_begins_elsewhere_and_its_answer_wins(world: World) -> None:
    first, other = await a_slow_one(world)
    await other.has(SECOND)
    assert first.cancelled == []
    world.clock.advance(0.5)
    other.answer(SECOND, b"second")
    await world.settle()
    view = await world.dispatcher.query("t2")
    assert view.state is State.COMPLETED
    assert view.response is not None
    assert view.response.body == b"second"
    assert (first.cancelled, other.acked) == (["t2.1"], [SECOND])
    slow, quick = await world.store.attempts("t2")
    assert (slow.number, slow.cause, slow.failure_reason, slow.cost_nanos) == (1, Cause.PLATFORM, "HEDGED", 0)
    assert (quick.number, quick.failure_reason, quick.replica_id) == (HEDGE + 1, "", "r2")
    assert "a second attempt, since the first has run for 3" in quick.reason
    row = await world.store.task("t2")
    assert row is not None
    assert row.gpu_us == quick.gpu_us > 0
    assert world.metrics.hedges == {(f"name-of-{WS}", "begun"): 1, (f"name-of-{WS}", "won"): 1}
    first.heed_cancels()
    await world.settle()
    assert world.dispatcher.running_on("r1") == 0
    assert not first.ended


async def test_first_answer_wins_and_the_second_is_called_off(world: World) -> None:
    first, other = await a_slow_one(world)
    await other.has(SECOND)
    first.answer("t2.1", b"first")
    await world.settle()
    view = await world.dispatcher.query("t2")
    assert view.response is not None
    assert view.response.body == b"first"
    assert other.cancelled == [SECOND]
    quick, unused = await world.store.attempts("t2")
    assert quick.failure_reason == ""
    assert (unused.cause, unused.failure_reason, unused.cost_nanos) == (Cause.PLATFORM, "HEDGED", 0)
    other.heed_cancels()
    await world.settle()
    assert world.dispatcher.running_on("r2") == 0
    assert not other.ended


@pytest.mark.parametrize("task", [{"repeatable": False}, {"streamed": True}])
async def test_what_may_not_run_twice_does_not(world: World, task: dict[str, Any]) -> None:
    _, other = await a_slow_one(world, **task)
    await world.advance(30.0)
    assert other.given == []


async def test_while_others_wait_nothing_is_hedged(world: World) -> None:
    first, other = await a_slow_one(world)
    await other.has(SECOND)
    world.submit()
    world.submit()
    await world.settle()
    other.heed_cancels()
    other.answer(SECOND)
    await world.settle()
    assert other.running.keys() == {"t3.1"}
    world.dispatcher.set_capacity("r1", WS, "n1", 0)
    first.heed_cancels()
    await world.advance(30.0)
    assert other.running.keys() == {"t3.1"}


async def test_second_attempt_does_not_run_beside_a_task_that_was_sent_ahead(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, put = asyncio.Event(), world.store.put_attempt

    async def late(row: Attempt) -> None:
        await written.wait()
        await put(row)

    # Its slot is kept while that is written; what another is told meanwhile is there before it.
    monkeypatch.setattr(world.store, "put_attempt", lambda row: asyncio.ensure_future(late(row)))
    _, other = await a_slow_one(world)
    slot = world.dispatcher._slots.replica("r2")
    assert slot is not None
    async with asyncio.timeout(30):
        while not slot.in_flight:
            await asyncio.sleep(0.001)
    slot.trip_s, slot.pace_s = 0.5, 1.0
    world.submit()
    await world.settle()
    assert list(other.running) == ["t3.1"]
    written.set()
    async with asyncio.timeout(30):
        while len(await world.store.attempts("t2")) < 1:
            await asyncio.sleep(0.001)
    assert (other.given, world.dispatcher.running_on("r2")) == (["t3.1"], 1)


async def test_second_that_fails_costs_the_first_nothing(world: World) -> None:
    first, other = await a_slow_one(world)
    await other.has(SECOND)
    other.fail(SECOND, "CONTAINER_EXITED", cause=Cause.CUSTOMER)
    await world.settle()
    assert await world.state("t2") is State.RUNNING
    await world.advance(10 * LOOK_S)
    assert other.given == [SECOND]
    first.answer("t2.1")
    await world.settle()
    _, second = await world.store.attempts("t2")
    assert (second.cause, second.failure_reason, second.cost_nanos) == (Cause.PLATFORM, "CONTAINER_EXITED", 0)
    assert await world.state("t2") is State.COMPLETED


async def test_error_or_a_long_answer_of_the_second_does_not_win(world: World) -> None:
    first, other = await a_slow_one(world)
    await other.has(SECOND)
    long = Response(200, (), b"", 1 << 20)
    del other.running[SECOND]
    world.dispatcher.result("n2", AttemptResult(SECOND, Delivery.ANSWERED, response=long))
    await world.settle()
    assert await world.state("t2") is State.RUNNING
    first.answer("t2.1", b"first")
    await world.settle()
    assert await world.state("t2") is State.COMPLETED


async def test_first_that_fails_takes_the_second_with_it_and_runs_again(world: World) -> None:
    first, other = await a_slow_one(world)
    await other.has(SECOND)
    first.fail("t2.1")
    await world.settle()
    assert other.cancelled == [SECOND]
    other.heed_cancels()
    await world.advance(1.0)
    await other.has("t2.2")
    other.answer("t2.2")
    await world.settle()
    assert [one.number for one in await world.store.attempts("t2")] == [1, 2, HEDGE + 1]
    assert await world.state("t2") is State.COMPLETED


async def test_cancel_ends_both(world: World) -> None:
    first, other = await a_slow_one(world)
    await other.has(SECOND)
    await world.dispatcher.cancel("t2")
    assert (first.cancelled, other.cancelled) == (["t2.1"], [SECOND])


async def test_crash_leaves_the_first_and_the_knowledge_of_the_second(world: World) -> None:
    first, other = await a_slow_one(world)
    await other.has(SECOND)
    await world.restart()
    (known,) = await world.store.attempts("t2")
    assert (known.number, known.failure_reason) == (HEDGE + 1, "HEDGED")
    assert "started anew" in known.failure_message
    first.connect()
    other.connect()
    assert other.cancelled == [SECOND]
    other.heed_cancels()
    first.fail("t2.1")
    await world.settle()
    await world.advance(1.0)
    await other.has("t2.2")
    other.answer("t2.2", b"again")
    await world.settle()
    assert await world.state("t2") is State.COMPLETED


async def test_answer_that_the_disk_does_not_take_is_written_until_it_does(world: World) -> None:
    _, other = await a_slow_one(world)
    await other.has(SECOND)
    world.flaky.unsure = True
    other.answer(SECOND, b"second")
    await world.settle()
    assert other.acked == []
    await world.advance(2.0)
    assert other.acked == [SECOND]
    assert len(await world.store.attempts("t2")) == 2


async def test_without_its_row_in_the_ledger_none_begins_and_its_slot_is_free(world: World) -> None:
    first, other = await a_slow_one(world, down=True)
    await world.settle()
    assert other.given == []
    world.flaky.down = False
    world.submit()
    await world.settle()
    assert list(other.running) == ["t3.1"]
    first.answer("t2.1")
    await world.settle()
    assert await world.state("t2") is State.COMPLETED
