"""Whatever happens in whatever order: each task ends once, no slot is used twice, every caller gets an answer."""

import asyncio
import tempfile
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from controlplane.dispatcher import TaskView
from controlplane.errors import NgpuError
from controlplane.model import ENDED, Cause, Delivery, State
from tests.controlplane.fakes_dispatch import World, a_world, migrated

NODES = ("n1", "n2", "n3")
KEYS = st.sampled_from([None, None, None, "k1", "k2"])
ENDS = [
    ("answer", Delivery.ANSWERED, Cause.CUSTOMER),
    ("CONNECTION_CLOSED", Delivery.SENT, Cause.PLATFORM),
    ("CONTAINER_EXITED", Delivery.SENT_PARTLY, Cause.CUSTOMER),
    ("CONNECT_FAILED", Delivery.NOT_SENT, Cause.PLATFORM),
    ("RUN_TIME_LIMIT", Delivery.ANSWERED, Cause.CUSTOMER),
]
TEMPLATE = tempfile.TemporaryDirectory(prefix="ngpu-test-")


class Control(RuleBasedStateMachine):
    """Callers, nodes and a control plane that are hit by everything. FakeNode asserts that no replica gets too much."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.directory = tempfile.TemporaryDirectory(prefix="ngpu-test-")
        self.futures: list[asyncio.Future[TaskView]] = []
        self.cancels: list[asyncio.Task[TaskView]] = []
        self.ends: dict[str, State] = {}
        self.once: set[str] = set()

    def run(self, step: Any) -> Any:
        async def taken() -> Any:
            return await step if asyncio.iscoroutine(step) else step()

        return self.runner.run(taken())

    @initialize()
    def begin(self) -> None:
        template = Path(TEMPLATE.name) / "ngpu.db"
        if not template.exists():
            migrated(Path(TEMPLATE.name))
        self.context = a_world(template, Path(self.directory.name))
        self.world: World = self.run(self.context.__aenter__())
        self.world.fleet.add_workspace("w-1", queue_length=8)
        for number, addr in enumerate(NODES, 1):
            self.run(lambda addr=addr, number=number: self.world.node(addr, **{f"r{number}": number}))

    # Few rules, each with many ways: hypothesis picks rules evenly, and most steps should be work.

    @rule(tasks=st.lists(st.tuples(st.booleans(), st.booleans(), KEYS, st.booleans()), min_size=1, max_size=4))
    def submit(self, tasks: list[tuple[bool, bool, str | None, bool]]) -> None:
        self.run(lambda: [self._submit(*task) for task in tasks])

    def _submit(self, repeatable: bool, waits: bool, key: str | None, hangs_up: bool) -> None:
        new = self.world.new(repeatable=repeatable, idempotency_key=key, request_hash=b"h" if key else None)
        if not repeatable:
            self.once.add(new.task_id)
        with suppress(NgpuError):
            wait_s = 20.0 if waits else 0.0
            self.futures.append(self.world.submit(new, wait_s=wait_s, cancel_on_hangup=hangs_up))

    @rule(ends=st.lists(st.tuples(st.integers(0, 99), st.sampled_from(ENDS)), min_size=1, max_size=3))
    def attempts_end(self, ends: list[tuple[int, tuple[str, Delivery, Cause]]]) -> None:
        for which, (reason, delivery, cause) in ends:
            running = [(node, attempt_id) for node in self.world.nodes.values() for attempt_id in sorted(node.running)]
            if not running:
                return
            node, attempt_id = running[which % len(running)]
            if reason == "answer":
                self.run(partial(node.answer, attempt_id))
                continue
            if delivery is Delivery.NOT_SENT:
                node.unsent.add(attempt_id)
            self.run(partial(node.fail, attempt_id, reason, delivery=delivery, cause=cause))

    @rule(seconds=st.sampled_from([0.0, 0.1, 1.0, 11.0, 130.0]))
    def time_passes(self, seconds: float) -> None:
        async def step() -> None:
            await self.world.advance(seconds)
            # Late reads: nothing else here waits for them.
            await self.world.store.task("none")
            await asyncio.sleep(0)

        self.run(step())
        self.world.flaky.down = False

    @rule(index=st.integers(0, 2), what=st.sampled_from(["break", "disconnect", "connect", "connect", "heed", "report", "lose"]))
    def node_does(self, index: int, what: str) -> None:
        node = self.world.nodes[NODES[index]]
        if what == "connect":
            self.run(node.connect)
        elif what == "heed":
            self.run(node.heed_cancels)
        elif what == "report":
            self.run(lambda: self.world.dispatcher.held(node.addr, [*node.running, *node.ended]))
        elif what == "lose":
            self.run(lambda: self.world.dispatcher.node_lost(node.addr))
        elif node.link is not None:
            self.run(node.break_link if what == "break" else node.disconnect)

    @rule(which=st.integers(0, 99), hangs_up=st.booleans())
    def caller_gives_up(self, which: int, hangs_up: bool) -> None:
        async def step() -> None:
            if hangs_up and self.futures:
                self.futures.pop(which % len(self.futures)).cancel()
            elif self.world.numbers:
                task_id = f"t{1 + which % self.world.numbers}"
                self.cancels.append(asyncio.create_task(self.world.dispatcher.cancel(task_id)))
            await asyncio.sleep(0)

        self.run(step())

    @rule(what=st.sampled_from(["down", "unsure", "kill"]))
    def control_plane_suffers(self, what: str) -> None:
        flaky = self.world.flaky
        if what == "kill":
            self.run(self._kill())
        elif what == "unsure":
            flaky.unsure = True
        else:
            flaky.down = True  # until time passes

    async def _kill(self) -> None:
        # Those who waited have seen their connections break.
        for future in [*self.futures, *self.cancels]:
            future.cancel()
        self.futures.clear()
        self.cancels.clear()
        await self.world.restart()

    @precondition(lambda self: hasattr(self, "world"))
    @invariant()
    def an_end_is_for_ever(self) -> None:
        for number in range(1, self.world.numbers + 1):
            row = self.run(self.world.store.task(f"t{number}"))
            if row is None:
                assert f"t{number}" not in self.ends
            elif row.state in ENDED:
                assert self.ends.setdefault(row.id, row.state) is row.state

    @precondition(lambda self: hasattr(self, "world"))
    @invariant()
    def what_may_not_be_repeated_reaches_a_container_once(self) -> None:
        for task_id in self.once:
            sent = [
                attempt_id
                for node in self.world.nodes.values()
                for attempt_id in node.given
                if attempt_id.startswith(f"{task_id}.") and attempt_id not in node.unsent
            ]
            assert len(sent) <= 1

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        try:
            self.run(self._everything_ends())
        finally:
            self.run(self.context.__aexit__(None, None, None))
            self.runner.close()
            self.directory.cleanup()

    async def _everything_ends(self) -> None:
        """All is well again: then everything comes to an end."""
        world = self.world
        world.flaky.down = world.flaky.unsure = False
        for node in world.nodes.values():
            node.connect()
        for _ in range(200):
            await world.advance(31.0)
            for node in world.nodes.values():
                node.heed_cancels()
                for attempt_id in list(node.running):
                    node.answer(attempt_id)
            await world.settle()
            if not world.dispatcher.open_tasks:
                break
        assert world.dispatcher.open_tasks == 0
        for answered in await asyncio.gather(*self.futures, *self.cancels, return_exceptions=True):
            assert isinstance(answered, TaskView | NgpuError)
        for node in world.nodes.values():
            assert not node.running
            assert not node.ended
            for replica_id in node.capacity:
                assert world.dispatcher.running_on(replica_id) == 0
        async for page in world.store.open_tasks():
            assert page == []


Control.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.timeout(300)
class TestControl(Control.TestCase):  # type: ignore[misc, valid-type, name-defined]
    """Run it."""
