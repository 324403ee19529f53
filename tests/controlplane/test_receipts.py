"""What a receipt promises: whose, where, how long and at what price, whatever a node says of it."""

from collections.abc import Sequence
from datetime import datetime, timedelta

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from controlplane.census import Deployment, Node, Version
from controlplane.fragmentation import WHOLE
from controlplane.model import Attempt, Cause, Delivery, Price, State
from controlplane.prices import Prices, cost_of
from controlplane.receipts import Tariff, Terms
from controlplane.recovery import Graces
from controlplane.report import Gpu, Inventory
from controlplane.slots import AttemptResult, Response
from controlplane.spec import GpuNeed, Limits
from controlplane.tasks import OpenAttempt, OpenTask, Phase, ledger_row
from nodedaemon.attempt import GpuClock
from tests.controlplane.fakes_dispatch import START, WS, FakeFleet, World

#: Longer than any first backoff.
BACKOFF_S = 1.0
SECOND = timedelta(seconds=1)
#: A millionth of the unit for each second.
PRICE_NANOS = 1000


@pytest.fixture
def world(world: World) -> World:
    world.terms = lambda *_: Terms("acme", "RTX 4090", PRICE_NANOS, concurrency=1)
    return world


async def receipts(world: World, task_id: str = "t1") -> list[Attempt]:
    await world.settle()
    return await world.store.attempts(task_id)


async def test_a_receipt_says_whose_it_is_and_what_it_cost(world: World) -> None:
    node = world.node("n1", r1=1)
    future = world.submit()
    await world.settle()
    await world.advance(7)
    node.answer("t1.1")
    await future
    (receipt,) = await receipts(world)
    assert (receipt.workspace_uid, receipt.account, receipt.node_addr) == (WS, "acme", "n1")
    assert (receipt.gpu_model, receipt.gpu_count, receipt.gpu_us) == ("RTX 4090", 1, 7_000_000)
    assert (receipt.price_nanos, receipt.cost_nanos) == (PRICE_NANOS, 7 * PRICE_NANOS)
    assert (receipt.queue_time, receipt.assign_time, receipt.end_time) == (START, START, START + 7 * SECOND)


@pytest.mark.parametrize("jump_us", [2**64 - 1, 10**15])
async def test_no_clock_of_a_node_makes_anything_longer_than_it_took_here(world: World, jump_us: int) -> None:
    node = world.node("n1", r1=1)
    future = world.submit()
    await world.settle()
    await world.advance(3)
    del node.running["t1.1"]
    times = ("sent_after_us", "first_byte_after_us", "last_byte_after_us", "gpu_us")
    answer = AttemptResult("t1.1", Delivery.ANSWERED, Response(200))
    answer = msgspec.structs.replace(answer, **dict.fromkeys(times, jump_us))
    world.dispatcher.result("n1", answer)
    await future
    (receipt,) = await receipts(world)
    for name in times:
        assert getattr(receipt, name) == 3_000_000
    assert receipt.cost_nanos == 3 * PRICE_NANOS


async def test_what_the_platform_caused_is_shown_and_costs_nothing(world: World) -> None:
    broken, other = world.node("n1", r1=1), world.node("n2", r2=0)
    future = world.submit()
    await world.settle()
    await world.advance(5)
    other.serve("r2")
    broken.fail("t1.1", cause=Cause.PLATFORM)
    await world.settle()
    await world.advance(BACKOFF_S)
    await other.has("t1.2")
    await world.advance(2)
    other.answer("t1.2")
    await future
    first, second = await receipts(world)
    assert (first.gpu_us, first.cost_nanos) == (5_000_000, 0)
    assert (second.gpu_us, second.cost_nanos) == (2_000_000, 2 * PRICE_NANOS)
    # It waited for its second attempt from the end of the first, and not from its acceptance.
    assert (second.queue_time, second.assign_time) == (first.end_time, first.end_time + BACKOFF_S * SECOND)
    row = await world.store.task("t1")
    assert row is not None
    assert row.gpu_us == second.gpu_us


async def test_what_the_customer_caused_costs(world: World) -> None:
    node = world.node("n1", r1=1)
    world.submit()
    await world.settle()
    await world.advance(4)
    node.fail("t1.1", "RUN_TIME_LIMIT", cause=Cause.CUSTOMER)
    (receipt,) = await receipts(world)
    assert (receipt.gpu_us, receipt.cost_nanos) == (4_000_000, 4 * PRICE_NANOS)


async def test_a_cancelled_attempt_costs_its_least_share_of_gpus_that_others_used_too(world: World) -> None:
    world.terms = lambda *_: Terms("acme", "RTX 4090", PRICE_NANOS, concurrency=4)
    world.node("n1", r1=4)
    world.submit()
    await world.settle()
    await world.advance(8)
    await world.dispatcher.cancel("t1")
    (receipt,) = await receipts(world)
    assert (receipt.gpu_us, receipt.cost_nanos) == (2_000_000, 2 * PRICE_NANOS)


async def test_queue_time_survives_kill(world: World) -> None:
    broken, other = world.node("n1", r1=1), world.node("n2", r2=0)
    world.submit()
    await world.settle()
    await world.advance(5)
    broken.capacity["r1"] = 0
    broken.fail("t1.1")
    (first,) = await receipts(world)
    await world.restart()
    await world.advance(10)
    other.connect()
    other.serve("r2")
    await other.has("t1.2")
    await world.restart()
    other.connect()
    await world.advance(Graces().reconnect_s)
    other.answer("t1.2")
    _, second = await receipts(world)
    assert second.queue_time == first.end_time


async def test_a_tasks_gpu_time_is_that_of_its_receipts_also_after_a_kill(world: World) -> None:
    crashing, other = world.node("n1", r1=1), world.node("n2", r2=0)
    world.submit()
    await world.settle()
    await world.advance(5)
    crashing.capacity["r1"] = 0
    crashing.fail("t1.1", "CONTAINER_EXITED", cause=Cause.CUSTOMER)
    await world.settle()
    await world.restart()
    other.connect()
    other.serve("r2")
    await other.has("t1.2")
    await world.advance(2)
    other.answer("t1.2")
    first, second = await receipts(world)
    row = await world.store.task("t1")
    assert row is not None
    assert (first.gpu_us, second.gpu_us) == (5_000_000, 2_000_000)
    assert row.gpu_us == first.gpu_us + second.gpu_us


# The flight recorder.


async def test_what_failed_is_recorded_and_what_was_cancelled_is_not(world: World) -> None:
    node = world.node("n1", r1=2)
    world.submit()
    world.submit()
    await world.settle()
    node.fail("t1.1", "RUN_TIME_LIMIT", cause=Cause.CUSTOMER)
    await world.dispatcher.cancel("t2")
    await world.settle()
    assert world.recorder.kept == [("t1.1", "failed")]


async def test_an_attempt_of_a_lost_node_is_recorded(world: World) -> None:
    node = world.node("n1", r1=1)
    world.submit()
    await world.settle()
    node.disconnect()
    await world.advance(Graces().reconnect_s + 1)
    await world.settle()
    assert world.recorder.kept == [("t1.1", "failed")]


async def test_slow_is_what_takes_long_and_longer_than_usual(world: World) -> None:
    world.recorder.slow_s = 10
    node = world.node("n1", r1=1)

    async def run(task: str, seconds: float) -> None:
        future = world.submit()
        await world.settle()
        await world.advance(seconds)
        node.answer(f"{task}.1")
        await future

    await run("t1", 9)
    assert world.recorder.kept == []
    # Four times the usual 9 s.
    await run("t2", 20)
    assert world.recorder.kept == []
    await run("t3", 300)
    assert world.recorder.kept == [("t3.1", "slow")]


# The terms.


class FakePicture(FakeFleet):
    """A fleet of one node with two different GPUs."""

    def node(self, key: str) -> Node:
        gpus = (Gpu("GPU-1", "RTX 4090", 24), Gpu("GPU-2", "NVIDIA\0 A100", 80))
        return Node(key, key, START, inventory=Inventory(gpus=gpus))


@pytest.fixture
def fleet() -> FakePicture:
    fleet = FakePicture()
    fleet.add_workspace(WS)
    return fleet


def price(words: str, nanos: int, at: datetime = START) -> Price:
    return Price(gpu_model=words, effective_time=at, nanos=nanos)


@pytest.mark.parametrize(
    ("gpu_ids", "terms"),
    [
        ((), ("", 0)),
        (("GPU-1",), ("RTX 4090", 5)),
        (("GPU-1", "GPU-2"), ("NVIDIA A100 + RTX 4090", 5 + 7)),
        (("GPU-gone",), ("", 0)),
    ],
)
def test_terms_are_those_of_the_gpus_held(fleet: FakePicture, gpu_ids: Sequence[str], terms: tuple[str, int]) -> None:
    tariff = Tariff(fleet, Prices([price("4090", 5), price("A100", 7)]))
    found = tariff.terms(WS, "r1", "n1", gpu_ids, START)
    assert (found.gpu_model, found.price_nanos) == terms


def test_the_price_is_that_of_the_assignment(fleet: FakePicture) -> None:
    prices = Prices([price("4090", 5), price("4090", 9, START + SECOND)])
    tariff = Tariff(fleet, prices)
    assert [tariff.terms(WS, "r1", "n1", ("GPU-1",), at).price_nanos for at in (START, START + SECOND)] == [5, 9]


def test_of_what_is_not_known_any_more_nothing_is_charged(fleet: FakePicture) -> None:
    assert Tariff(fleet, Prices([price("", 5)])).terms("w-gone", "r1", "n1", ("GPU-1",), START) == Terms()


# Shares of a GPU.


def test_a_replica_keeps_the_share_it_was_placed_with(fleet: FakePicture) -> None:
    before = fleet.workspace(WS)
    now = replace(before.spec, gpu=GpuNeed(count=1, share=250))
    then = replace(before.spec, gpu=GpuNeed(count=1, share=700))
    versions = Deployment(versions=(Version(1, then),))
    fleet.workspaces[WS] = replace(before, spec=now, generation=2, deployment=versions)
    fleet.add_replica("old", WS, "n1")
    fleet.replicas["new"] = replace(fleet.replicas["old"], id="new", generation=2)
    terms = Tariff(fleet, Prices([price("", 5)])).terms
    shares = [terms(WS, replica_id, "n1", ("GPU-1",), START).share for replica_id in ("old", "new", "gone")]
    assert shares == [700, 250, 250]
    # A second of a share is that share of a second, at the price of a whole one.
    assert terms(WS, "new", "n1", ("GPU-1",), START).price_nanos == 5
    assert Tariff(fleet, Prices()).terms(WS, "whole", "n1", (), START).share == 250


async def test_a_share_pays_its_share(world: World) -> None:
    world.terms = lambda *_: Terms("acme", "RTX 4090", PRICE_NANOS, share=250)
    node = world.node("n1", r1=1)
    future = world.submit()
    await world.settle()
    await world.advance(8)
    node.answer("t1.1")
    await future
    (receipt,) = await receipts(world)
    assert (receipt.gpu_count, receipt.gpu_us, receipt.cost_nanos) == (1, 2_000_000, 2 * PRICE_NANOS)


#: What attempts of one replica do: when they begin to hold the GPU, and for how long, in microseconds.
HOLDS = st.lists(st.tuples(st.integers(0, 10**7), st.integers(0, 10**7)), max_size=6)


@given(st.lists(st.tuples(st.integers(1, WHOLE), HOLDS), max_size=8), st.integers(0, 2**64 - 1))
def test_all_on_one_gpu_together_never_pay_for_more_than_the_time_that_passed(
    replicas: list[tuple[int, list[tuple[int, int]]]], lie_us: int
) -> None:
    """However the replicas' shares divide the GPU, and their attempts the share."""
    task = an_open_task()
    left, wall_us, paid_us, cost_nanos, rows = WHOLE, 0, 0, 0, 0
    for wanted, holds in replicas:
        share = min(wanted, left)
        left -= share
        if not share:
            break
        for attempt, held_us in zip(holds, held(holds), strict=True):
            begin, length = attempt
            wall_us = max(wall_us, begin + length)
            # A node that lies is believed up to what passed here, so its attempts must not overlap to be told.
            told = held_us if len(holds) > 1 else max(held_us, lie_us)
            row = ledger_row(
                task,
                task.current,
                Delivery.ANSWERED,
                START,
                passed_us=length,
                terms=Terms("acme", "RTX 4090", PRICE_NANOS, share=share),
                result=AttemptResult("t1.1", Delivery.ANSWERED, Response(200), gpu_us=told),
                failure=None,
            )
            paid_us += row.gpu_us
            cost_nanos += row.cost_nanos
            rows += 1
    assert paid_us <= wall_us
    # Each receipt's cost is rounded.
    assert cost_nanos <= cost_of(wall_us, PRICE_NANOS) + rows


def held(holds: list[tuple[int, int]]) -> list[int]:
    """What a node says that attempts of one replica held: its GPU's time, shared among those that run at once."""
    now = 0.0
    clock = GpuClock(lambda: now)
    entered: dict[int, float] = {}
    left: dict[int, int] = {}
    moves = [(begin, 0, n) for n, (begin, _) in enumerate(holds)]
    moves += [(begin + length, 1, n) for n, (begin, length) in enumerate(holds)]
    for at, leaves, n in sorted(moves):
        now = at / 1e6
        if leaves:
            left[n] = int(clock.leave(entered[n]) * 1e6)
        else:
            entered[n] = clock.enter()
    return [left[n] for n in range(len(holds))]


def an_open_task() -> OpenTask:
    attempt = OpenAttempt(
        id="t1.1",
        number=1,
        replica_id="r1",
        node_addr="n1",
        node_ip="",
        gpu_ids=("GPU-1",),
        queue_time=START,
        assign_time=START,
        reason="",
        given_at=0.0,
    )
    return OpenTask(
        id="t1",
        workspace_uid=WS,
        workspace_name="demo",
        place=1,
        port=80,
        request=None,
        repeatable=True,
        limits=Limits(),
        create_time=START,
        accepted_at=0.0,
        total_at=1.0,
        phase=Phase.RUNNING,
        state=State.RUNNING,
        attempt=attempt,
    )
