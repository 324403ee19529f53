"""Tests of GPUs that the control plane asks for: one after the other, each in a process of its own (gpu_test.py).

As with everything it asks for, what is no longer asked for ends: a test stops, an outcome is forgotten. Until then it
is told with every report, so that none is lost.
"""

import asyncio
import enum
import functools
import json
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Final

import structlog

from nodedaemon.gpus import LINE_BYTES, Gpus, end

#: How long the memory and the arithmetic of a GPU are tested; and a test as a whole, its start included.
MEMORY_S: Final = 70.0
COMPUTE_S: Final = 10.0
LIMIT_S: Final = 120.0
#: After a test, for the GPU to be read once more.
READ_AGAIN_S: Final = 30.0
#: Processes that SIGKILL did not end: with so many of them no test is begun.
STUCK_LIMIT: Final = 2
#: Tests asked for at once that are heeded.
ORDERS: Final = 64

log = structlog.get_logger()


class State(enum.IntEnum):
    """How a test stands. The numbers are the wire's (node.proto)."""

    WAITING = 1
    RUNNING = 2
    PASSED = 3
    FAILED = 4
    #: It cannot be run.
    UNABLE = 5


@dataclass(frozen=True, slots=True)
class GpuTest:
    """A test that is asked for, by its number. `words`: what was tested, what is wrong, or why it cannot be run."""

    gpu_id: str
    number: int
    state: State = State.WAITING
    words: str = ""


Outcome = tuple[State, str]


class GpuTests:
    """`held`: does a container of ours hold that GPU? Run `run()` in the daemon's TaskGroup."""

    def __init__(
        self,
        gpus: Gpus,
        held: Callable[[str], bool] = lambda _: False,
        *,
        memory_s: float = MEMORY_S,
        compute_s: float = COMPUTE_S,
        limit_s: float = LIMIT_S,
    ) -> None:
        self._gpus = gpus
        self._held = held
        self._arguments = (str(memory_s), str(compute_s))
        self._limit_s = limit_s
        #: By GPU id, in the order in which they were asked for.
        self._tests: dict[str, GpuTest] = {}
        self._current: tuple[GpuTest, asyncio.Task[Outcome]] | None = None
        self._asked = asyncio.Event()
        self._tell: Callable[[], None] = lambda: None
        #: By GPU id: the ends awaited of processes that SIGKILL did not end.
        self._stuck: dict[str, asyncio.Future[int]] = {}

    def on_change(self, tell: Callable[[], None]) -> None:
        """`tell` hears of every change of what is reported."""
        self._tell = tell

    def apply(self, orders: Iterable[tuple[str, int]]) -> None:
        """All tests that are asked for: GPU ids and numbers. The same number is the same test."""
        wanted = dict(list(orders)[:ORDERS])
        self._tests = {one.gpu_id: one for one in self._tests.values() if wanted.get(one.gpu_id) == one.number}
        for gpu_id, number in wanted.items():
            if gpu_id not in self._tests:
                self._tests[gpu_id] = GpuTest(gpu_id, number)
                self._asked.set()
        if self._current and not self._is_wanted(self._current[0]):
            self._current[1].cancel()

    def _is_wanted(self, test: GpuTest) -> bool:
        return test.gpu_id in self._tests and self._tests[test.gpu_id].number == test.number

    def reports(self) -> tuple[GpuTest, ...]:
        """All that are asked for, as they stand."""
        return tuple(self._tests.values())

    async def run(self) -> None:
        """Until cancelled; never raises for what a driver does."""
        while True:
            await self._asked.wait()
            self._asked.clear()
            while test := next((one for one in self._tests.values() if one.state is State.WAITING), None):
                await self._run(test)

    async def _run(self, test: GpuTest) -> None:
        self._say(replace(test, state=State.RUNNING))
        log.info("gpu_test_begun", gpu=test.gpu_id)
        task = asyncio.create_task(self._outcome(test.gpu_id), name=f"test of {test.gpu_id}")
        self._current = test, task
        try:
            await asyncio.wait([task])
        finally:
            task.cancel()
            await asyncio.wait([task])
            self._current = None
        if task.cancelled():
            log.info("gpu_test_ended", gpu=test.gpu_id, state="no longer asked for")
            return
        state, words = task.result()
        log.info("gpu_test_ended", gpu=test.gpu_id, state=state.name, words=words)
        self._say(replace(test, state=state, words=words))

    def _say(self, test: GpuTest) -> None:
        if self._is_wanted(test):
            self._tests[test.gpu_id] = test
            self._tell()

    async def _outcome(self, gpu_id: str) -> Outcome:
        self._stuck = {stuck: ending for stuck, ending in self._stuck.items() if not ending.done()}
        if gpu_id in self._stuck or len(self._stuck) >= STUCK_LIMIT:
            return State.UNABLE, f"{len(self._stuck)} earlier tests hang in the driver; restart the machine"
        if self._held(gpu_id):
            return State.UNABLE, "a container of ours still holds it"
        if words := self._gpus.refusal([gpu_id]):
            return State.UNABLE, words
        self._gpus.tested[gpu_id] = 0
        try:
            return await self._examine(gpu_id)
        except (OSError, ValueError, KeyError) as error:
            # It cannot be started, or its library writes where it should not.
            return State.UNABLE, f"its process: {error}"
        finally:
            # A process that hangs holds the GPU's memory for good: from now on that is seen.
            del self._gpus.tested[gpu_id]

    async def _examine(self, gpu_id: str) -> Outcome:
        """Have it tested, and look whether its driver counts new errors since."""
        before = self._uncorrected(gpu_id)
        outcome = await self._ask(gpu_id)
        after = self._uncorrected(gpu_id)
        if outcome[0] is State.PASSED and None not in (before, after) and before != after:
            return State.FAILED, f"uncorrected errors of its memory went from {before} to {after}"
        return outcome

    def _uncorrected(self, gpu_id: str) -> int | None:
        return next((one.ecc_uncorrected for one in self._gpus.readings() if one.gpu_id == gpu_id), None)

    async def _ask(self, gpu_id: str) -> Outcome:
        """What the process says of the GPU; returns once the GPU was read anew after it."""
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": gpu_id, "CUDA_CACHE_DISABLE": "1"}
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "nodedaemon.gpu_test", gpu_id, *self._arguments),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            limit=LINE_BYTES,
            env=environment,
        )
        self._gpus.tested[gpu_id] = child.pid
        try:
            outcome = await self._listen(child)
        finally:
            await end(child, functools.partial(self._stuck.__setitem__, gpu_id))
        try:
            async with asyncio.timeout(READ_AGAIN_S):
                await self._gpus.read_again()
        except TimeoutError:
            return outcome if outcome[0] is State.FAILED else (State.UNABLE, "it could not be read after its test")
        return outcome

    async def _listen(self, child: asyncio.subprocess.Process) -> Outcome:
        assert child.stdout
        at = "its start"
        try:
            async with asyncio.timeout(self._limit_s):
                while line := await child.stdout.readline():
                    said: dict[str, Any] = json.loads(line)
                    if "state" in said:
                        return State[said["state"]], said["words"]
                    at = said["at"]
                code = await child.wait()
        except TimeoutError:
            return State.FAILED, f"the driver does not answer: the test of {at} took longer than {self._limit_s:g} s"
        if code < 0:
            return State.FAILED, f"the driver's library crashed (signal {-code}) in the test of {at}"
        return State.UNABLE, f"the test broke off with status {code} in {at}: see the daemon's log"
