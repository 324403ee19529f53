"""Whatever happens in whatever order: each task ends once, no slot is used twice, every caller gets an answer.

And usage adds up.
"""

import asyncio
import tempfile
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from controlplane.dispatcher import TaskView
from controlplane.errors import NgpuError
from controlplane.hedging import HEDGE
from controlplane.model import ENDED, Cause, Delivery, State
from controlplane.receipts import Terms
from controlplane.store_usage import UsageQuery
from tests.controlplane.fakes_dispatch import START, WS, World, a_world

#: Node -> its replicas of the workspace and their capacity.
NODES = {"n1": {"r1": 1}, "n2": {"r2": 2}, "n3": {"r3": 1, "r4": 1}}
ENDS = [
    None,
    None,
    ("CONNECTION_CLOSED", Delivery.SENT, Cause.PLATFORM),
    ("CONTAINER_EXITED", Delivery.SENT_PARTLY, Cause.CUSTOMER),
    ("CONNECT_FAILED", Delivery.NOT_SENT, Cause.PLATFORM),
    ("RUN_TIME_LIMIT", Delivery.ANSWERED, Cause.CUSTOMER),
]
WHICH = st.integers(0, 99)

Step = tuple[Any, ...]


def step(name: str, *arguments: "st.SearchStrategy[Any]") -> "st.SearchStrategy[Step]":
    return st.tuples(st.just(name), *arguments)


submits = step(
    "submit",
    st.booleans(),
    st.sampled_from([0.0, 20.0]),
    st.sampled_from([None, None, "k"]),
    st.booleans(),
    st.sampled_from(["", "192.0.2.8", "192.0.2.9"]),
    st.sampled_from([-5, 0, 0, 5]),
)
ends = step("attempt_ends", WHICH, st.sampled_from(ENDS))
passes = step("time_passes", st.sampled_from([0.0, 0.1, 1.0, 11.0, 130.0]))
nodes = step(
    "node_does", st.sampled_from(list(NODES)), st.sampled_from(["break", "disconnect", "heed", "report", "lost"])
)
comes = step("node_does", st.sampled_from(list(NODES)), st.just("connect"))
cancels = step("cancel", WHICH)
hangs_up = step("hang_up", WHICH)
waits_long = step("waits_long", WHICH)
suffers = step("suffer", st.sampled_from(["down", "unsure", "kill"]))
STEPS = st.lists(
    st.one_of(submits, submits, ends, ends, passes, passes, nodes, comes, cancels, hangs_up, suffers, waits_long),
    min_size=40,
    max_size=80,
)


class Walk:
    """Callers, nodes and a control plane, hit by everything. FakeNode asserts that no replica gets too much."""

    def __init__(self, world: World) -> None:
        self.world = world
        world.fleet.add_workspace(WS, queue_length=12)
        known = world.fleet.workspaces[WS]
        world.fleet.workspaces[WS] = replace(known, spec=replace(known.spec, hedge=1.5))
        for addr, replicas in NODES.items():
            world.node(addr, **replicas)
        self.futures: list[asyncio.Future[TaskView]] = []
        self.cancels: list[asyncio.Task[TaskView]] = []
        self.ends: dict[str, State] = {}
        self.once: set[str] = set()

    async def begin(self) -> None:
        """A first task shows how long they take: from now on, slow ones get a second attempt."""
        self.futures.append(self.world.submit())
        await self.world.advance(1.0)
        await self.attempt_ends(0, None)
        await self.world.settle()

    async def submit(
        self, repeatable: bool, wait_s: float, key: str | None, cancel_on_hangup: bool, user_ip: str, priority: int
    ) -> None:
        new = self.world.new(
            repeatable=repeatable,
            idempotency_key=key,
            request_hash=b"h" if key else None,
            user_ip=user_ip,
            priority=priority,
        )
        if not repeatable:
            self.once.add(new.task_id)
        with suppress(NgpuError):
            self.futures.append(self.world.submit(new, wait_s=wait_s, cancel_on_hangup=cancel_on_hangup))

    async def attempt_ends(self, which: int, failure: tuple[str, Delivery, Cause] | None) -> None:
        running = [(node, attempt_id) for node in self.world.nodes.values() for attempt_id in node.running]
        if not running:
            return
        node, attempt_id = running[which % len(running)]
        if failure is None:
            # Its way there and back took longer than itself: that replica may be sent tasks ahead.
            node.answer(attempt_id, ran_us=1)
            return
        reason, delivery, cause = failure
        if delivery is Delivery.NOT_SENT:
            node.unsent.add(attempt_id)
        node.fail(attempt_id, reason, delivery=delivery, cause=cause)

    async def waits_long(self, which: int) -> None:
        ahead = [(node, attempt_id) for node in self.world.nodes.values() for attempt_id in node.ahead]
        if ahead:
            node, attempt_id = ahead[which % len(ahead)]
            node.give_back(attempt_id)

    async def time_passes(self, seconds: float) -> None:
        await self.world.advance(seconds)
        # Late reads: nothing else here waits for them.
        await self.world.store.task("none")
        await asyncio.sleep(0)
        self.world.flaky.down = False

    async def node_does(self, addr: str, what: str) -> None:
        node = self.world.nodes[addr]
        if what == "connect":
            node.connect()
        elif what == "heed":
            node.heed_cancels()
        elif what == "report":
            self.world.dispatcher.held(addr, [*node.running, *node.ahead, *node.ended])
        elif what == "lost":
            self.world.dispatcher.node_lost(addr)
        elif node.link is not None and what == "break":
            node.break_link()
        elif node.link is not None:
            node.disconnect()

    async def cancel(self, which: int) -> None:
        if self.world.numbers:
            task_id = f"t{1 + which % self.world.numbers}"
            self.cancels.append(asyncio.create_task(self.world.dispatcher.cancel(task_id)))
            await asyncio.sleep(0)

    async def hang_up(self, which: int) -> None:
        if self.futures:
            self.futures.pop(which % len(self.futures)).cancel()

    async def suffer(self, what: str) -> None:
        self.world.flaky.down |= what == "down"  # until time passes
        self.world.flaky.unsure |= what == "unsure"
        if what == "kill":
            # Those who waited see their connections break.
            for future in [*self.futures, *self.cancels]:
                future.cancel()
            self.futures, self.cancels = [], []
            await self.world.restart()

    async def check(self) -> None:
        for number in range(1, self.world.numbers + 1):
            row = await self.world.store.task(f"t{number}")
            if row is None:
                assert f"t{number}" not in self.ends, "a task that had ended is gone"
            elif row.state in ENDED:
                assert self.ends.setdefault(row.id, row.state) is row.state, "an end is for ever"
        given = [attempt for node in self.world.nodes.values() for attempt in node.given if attempt not in node.unsent]
        waiting = [self.world.dispatcher.waiting(f"t{number}") for number in range(1, self.world.numbers + 1)]
        told = {view.queue_position for view in waiting if view is not None}
        assert told >= set(range(self.world.dispatcher.queued(WS))), "each place in the queue is told to somebody"
        for task_id in self.once:
            assert sum(attempt.startswith(f"{task_id}.") for attempt in given) <= 1, "it may not be repeated"

    async def all_is_well_again(self) -> None:
        """Then everything comes to its end, and everybody gets an answer."""
        world = self.world
        world.flaky.down = world.flaky.unsure = False
        for node in world.nodes.values():
            node.connect()
        for _ in range(100):
            await self.time_passes(31.0)
            for node in world.nodes.values():
                node.heed_cancels()
                for attempt_id in list(node.running):
                    node.answer(attempt_id)
            await world.settle()
            # The last to end may have left a second attempt behind, which its node is told to cancel.
            if not world.dispatcher.open_tasks and not any(node.running or node.ahead for node in world.nodes.values()):
                break
        for answered in await asyncio.gather(*self.futures, *self.cancels, return_exceptions=True):
            assert isinstance(answered, TaskView | NgpuError)
        for node in world.nodes.values():
            assert not node.running
            assert not node.ahead
            assert not node.ended
            assert all(world.dispatcher.running_on(replica_id) == 0 for replica_id in node.capacity)
        assert world.dispatcher.open_tasks == world.dispatcher.queued(WS) == 0
        assert [page async for page in world.store.open_tasks()] == []

    async def usage_adds_up(self) -> None:
        """One receipt an attempt, in order; tasks and usage are their sums, and none is longer than it took."""
        receipts = []
        for number in range(1, self.world.numbers + 1):
            ledger = await self.world.store.attempts(f"t{number}")
            row = await self.world.store.task(f"t{number}")
            firsts = [one.number for one in ledger if one.number < HEDGE]
            assert firsts == list(range(1, len(firsts) + 1))
            assert {one.number - HEDGE for one in ledger if one.number > HEDGE} <= set(firsts)
            charged = [one for one in ledger if one.cause != Cause.PLATFORM]
            assert row is None or row.gpu_us == sum(one.gpu_us for one in charged)
            assert all(one.gpu_us <= (one.end_time - one.assign_time) / timedelta(microseconds=1) for one in ledger)
            assert all(one.cost_nanos == 0 for one in ledger if one not in charged)
            receipts += ledger
        query = UsageQuery(start=START, end=START + timedelta(days=10_000), workspace_uid=WS)
        ((usage,),) = [page async for page in self.world.store.usage(query)]
        assert usage.attempts == len(receipts)
        assert usage.gpu_us == sum(one.gpu_us for one in receipts)
        assert usage.cost_nanos == sum(one.cost_nanos for one in receipts)


#: Where second attempts are frequent: tasks that run on while there are free slots.
SECONDS = st.lists(
    st.one_of(
        step("submit", st.just(True), st.just(20.0), st.none(), st.booleans(), st.just(""), st.just(0)),
        step("time_passes", st.just(2.0)),
        step("time_passes", st.just(2.0)),
        step("attempt_ends", WHICH, st.none()),
        ends,
        nodes,
        comes,
        cancels,
        step("suffer", st.sampled_from(["down", "unsure", "unsure"])),
    ),
    min_size=20,
    max_size=40,
)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("sequences", "examples"), [(STEPS, 50), (SECONDS, 40)], ids=["everything", "second attempts"])
def test_every_task_ends_once_and_every_caller_gets_an_answer(
    template: Path, sequences: "st.SearchStrategy[list[Step]]", examples: int
) -> None:
    async def walk(steps: list[Step]) -> None:
        with tempfile.TemporaryDirectory(prefix="ngpu-test-") as directory:
            async with a_world(template, Path(directory)) as world:
                world.terms = lambda *_: Terms("acme", "RTX 4090", 1000)
                control = Walk(world)
                await control.begin()
                for name, *arguments in steps:
                    await getattr(control, name)(*arguments)
                    if name == "time_passes":
                        await control.check()
                await control.all_is_well_again()
                await control.check()
                await control.usage_adds_up()

    @settings(max_examples=examples, deadline=None)
    @given(sequences)
    def control_plane(steps: list[Step]) -> None:
        asyncio.run(walk(steps))

    control_plane()
