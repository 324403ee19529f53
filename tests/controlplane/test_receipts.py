"""What a receipt promises: whose, where, how long and at what price, whatever a node says of it."""

from collections.abc import Sequence
from datetime import datetime, timedelta

import msgspec
import pytest

from controlplane.census import Node
from controlplane.model import Attempt, Cause, Delivery, Price
from controlplane.prices import Prices
from controlplane.receipts import Tariff, Terms
from controlplane.recovery import Graces
from controlplane.report import Gpu, Inventory
from controlplane.slots import AttemptResult, Response
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
    found = tariff.terms(WS, "n1", gpu_ids, START)
    assert (found.gpu_model, found.price_nanos) == terms


def test_the_price_is_that_of_the_assignment(fleet: FakePicture) -> None:
    prices = Prices([price("4090", 5), price("4090", 9, START + SECOND)])
    tariff = Tariff(fleet, prices)
    assert [tariff.terms(WS, "n1", ("GPU-1",), at).price_nanos for at in (START, START + SECOND)] == [5, 9]


def test_of_what_is_not_known_any_more_nothing_is_charged(fleet: FakePicture) -> None:
    assert Tariff(fleet, Prices([price("", 5)])).terms("w-gone", "n1", ("GPU-1",), START) == Terms()
