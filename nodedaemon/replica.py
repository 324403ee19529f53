"""The life of one replica: bring it up, wait for its end, wait a while, begin again.

What goes wrong in one is that one's message and nobody else's trouble.
"""

import asyncio
import dataclasses
import enum
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog

from nodedaemon.engine import (
    Address,
    Assignment,
    Container,
    DiskFull,
    Engine,
    EngineDown,
    EngineError,
    Exit,
    NeverReady,
    NotNow,
    Readiness,
)
from nodedaemon.pulls import Pulls

log = structlog.get_logger()

#: The wait before the second start; it doubles with every failure ...
BACKOFF_S = 1.0
#: ... up to this ...
BACKOFF_LIMIT_S = 300.0
#: ... and begins anew after a container has run that long.
HEALTHY_S = 600.0
#: A new container's port is looked at again after this share of the time that it has taken so far ...
PROBE_SHARE = 0.05
#: ... but not more and not less often than this.
PROBE_S, PROBE_LIMIT_S = 0.005, 1.0
#: How often a lost engine is tried, and the ports of its containers meanwhile.
RETRY_S = 1.0
#: How much of a container's last words goes into the message.
LAST_LINES, LAST_CHARS = 10, 2000
#: Events of one replica that are remembered.
EVENTS_KEPT = 64
#: While its engine is away.
UNCONFIRMED = "waiting to hear from the engine that the container is still there"
#: Progress when the image is here, and when the container runs.
PULLED, STARTED = 90, 95


class State(enum.IntEnum):
    """Where a replica stands; the numbers are the wire's."""

    ASSIGNED = 1
    PULLING = 2
    STARTING = 3
    READY = 4
    BACKOFF = 5
    STOPPING = 6


@dataclass(frozen=True, slots=True)
class ReplicaReport:
    """One replica as it is. `capacity` is 0 unless it is READY and not draining."""

    replica_id: str
    state: State
    progress: int = 0
    message: str = ""
    capacity: int = 0
    restarts: int = 0
    spec_hash: str = ""
    image_digest: str = ""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a replica. `at`: the daemon's monotonic clock."""

    at: float
    state: State
    message: str


class Contact:
    """Does the engine answer? `down` says why not; "": it does, as far as anybody knows.

    `stream` is the stream of its events: any object, another one after each break; None: there is none. As long as one
    stands the engine is the same and tells of every container's end. After a break it may have begun anew, and given
    the addresses of its containers to others.
    """

    def __init__(self) -> None:
        self.down = ""
        self.up = asyncio.Event()
        self.stream: object | None = None

    def lost(self, error: EngineError) -> bool:
        """It does not. Returns whether that is news."""
        self.up.clear()
        news, self.down = self.down != str(error), str(error)
        return news

    def found(self) -> bool:
        """It does. Returns whether that is news."""
        self.down, news = "", not self.up.is_set()
        self.up.set()
        return news


@dataclass(frozen=True)
class Means:
    """What a replica lives by.

    The last five are for telling Replicas: that there is news, to ask the engine anew, that it is lost, that a
    container has ended, that the disk is full.
    """

    engine: Engine
    pulls: Pulls
    contact: Contact
    may_start: Callable[[Assignment], str]
    probe: Callable[[Readiness, Address], Awaitable[str]]
    stop_grace_s: float
    monotonic: Callable[[], float]
    sleep: Callable[[float], Awaitable[None]]
    changed: Callable[[], None]
    look: Callable[[], None]
    lost: Callable[[EngineError], None]
    ended: Callable[[Exit], None]
    full: Callable[[], None]


async def either(event: asyncio.Event, other: Awaitable[object]) -> bool:
    """Wait for the event or the end of the other, which is cancelled else; True if the event came."""
    waits = {asyncio.ensure_future(event.wait()), asyncio.ensure_future(other)}
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
    return event.is_set()


class Replica:
    """One replica that we look after."""

    def __init__(self, assignment: Assignment, means: Means) -> None:
        self.assignment = assignment
        self.container: Container | None = None
        self.restarts = 0
        self.task: asyncio.Task[None]
        self._means = means
        self._state = State.ASSIGNED
        self._progress = 0
        self._message = ""
        self._digest = ""
        #: The stream of events on whose watch the engine said that the container runs, and where.
        self._confirmed: object | None = None
        #: How many containers it has had.
        self._starts = 0
        self._was_ready = False
        self._nudge = asyncio.Event()
        #: The last ones, for the flight recorder.
        self.events: deque[Event] = deque(maxlen=EVENTS_KEPT)

    @property
    def ready(self) -> bool:
        """May requests be sent to it?"""
        return self._state is State.READY and self._is_confirmed()

    def report(self) -> ReplicaReport:
        """What its task last said of it."""
        draining = self.assignment.draining
        said = ("draining", self._message) if draining and self.ready else (self._message,)
        return ReplicaReport(
            replica_id=self.assignment.replica_id,
            state=self._state,
            progress=self._progress,
            message=self._means.contact.down or "; ".join(filter(None, said)),
            capacity=self.assignment.concurrency if self.ready and not draining else 0,
            restarts=self.restarts,
            spec_hash=self.assignment.spec_hash,
            image_digest=self._digest,
        )

    def seen(self, now: Container | None, *, engine_was_down: bool) -> None:
        """This is how its container is now; None: it is gone."""
        assert self.container is not None
        if now is None or now.container_id != self.container.container_id:
            now = dataclasses.replace(self.container, exit=Exit(self.container.replica_id, None))
        if now.exit and engine_was_down:
            now = dataclasses.replace(now, exit=dataclasses.replace(now.exit, engine_was_down=True))
        if now != self.container:
            self.container = now
            if now.exit:
                self._say(State.BACKOFF, 0, f"the container {now.exit.words}")
                self._means.ended(now.exit)
            self._nudge.set()

    def end(self, why: str, *, customers: bool) -> None:
        """Have its container ended, with all that runs in it, and another made after a while."""
        if self.container and not self.container.exit:
            ended = Exit(self.container.replica_id, None, why=why, customers=customers)
            self.seen(dataclasses.replace(self.container, addresses={}, exit=ended), engine_was_down=False)

    def confirm(self, stream: object | None) -> None:
        """The container as it was last `seen` is what the engine said on that stream's watch."""
        if self._confirmed is not stream:
            self._confirmed = stream
            self._nudge.set()
            self._means.changed()

    def nudge(self) -> None:
        """Something else that its task waits for may have happened."""
        self._nudge.set()

    async def live(self, found: Container | None) -> None:
        """From nothing, or from a container that was found. Ends only by cancellation; the container goes on."""
        # Failures of before this daemon's time count too.
        failures = found.restarts if found else 0
        while True:
            try:
                ended = await self._once(found)
                if ended.ran_s >= HEALTHY_S:
                    failures = 0
                why = await self._obituary(ended)
                if ended.why:
                    await self._means.engine.stop(self.assignment.replica_id, grace_s=0)
            except EngineDown as down:
                self._means.lost(down)
                found = self.container = None
                self._say(State.BACKOFF, 0, str(down))
                await self._means.sleep(RETRY_S)
                await self._means.contact.up.wait()
                continue
            except EngineError as error:
                why = str(error)
                if isinstance(error, DiskFull):
                    self._means.full()
            except Exception:
                log.exception("replica_failed", replica=self.assignment.replica_id)
                why = "the node daemon failed at it; its log says how"
            found = self.container = None
            failures += 1
            pause_s = backoff_s(failures)
            log.warning("replica_backs_off", replica=self.assignment.replica_id, why=why, pause_s=pause_s)
            self._say(State.BACKOFF, 0, f"next start after {pause_s:.0f} s: {why}")
            await self._means.sleep(pause_s)

    async def _once(self, found: Container | None) -> Exit:
        self._confirmed = None
        if found is None or not found.started:
            found = await self._start()
        if not self._is_confirmed():
            self._means.look()
        self.container, self._digest = found, found.image_digest
        self.restarts, self._starts = found.restarts, found.restarts + 1
        self._was_ready = False
        if found.exit:
            self._means.ended(found.exit)
        await self._become_ready()
        while not self.container.exit:
            self._nudge.clear()
            if self._means.contact.stream is None:
                # It may go on without its engine. But then its address may become another's, and nobody tells.
                self._say(State.BACKOFF, 0, UNCONFIRMED)
                await self._nudge.wait()
            elif self._means.contact.down:
                # The engine does not answer, so it cannot tell of a container's end: the port does.
                missing = await self._missing(Readiness(self.assignment.readiness.port))
                if missing is not None:
                    self._say(State.BACKOFF if missing else State.READY, 0 if missing else 100)
                    await either(self._nudge, self._means.sleep(RETRY_S))
            else:
                self._say(State.READY, 100, self._remark())
                await self._nudge.wait()
        return self.container.exit

    async def _start(self) -> Container:
        assignment = self.assignment
        self._refuse()
        what = f"pulling {assignment.image}"
        self._say(State.PULLING, 0, what)
        await self._means.pulls.pull(
            assignment.image,
            assignment.registry,
            lambda percent: self._say(State.PULLING, percent * PULLED // 100, what),
        )
        # The pull may have taken long.
        self._refuse()
        self._say(State.STARTING, PULLED, "starting the container")
        stream = self._means.contact.stream
        container = await self._means.engine.start(assignment, restarts=self._starts)
        self._confirmed = stream
        return container

    def _is_confirmed(self) -> bool:
        """Is the container's address still what the engine said?"""
        stream = self._means.contact.stream
        return stream is not None and self._confirmed is stream

    def _refuse(self) -> None:
        if why := self._means.may_start(self.assignment):
            raise NotNow(why)

    async def _become_ready(self) -> None:
        readiness = self.assignment.readiness
        begin = self._means.monotonic()
        while self.container and not self.container.exit:
            self._nudge.clear()
            missing = await self._missing(readiness)
            if missing is None:
                continue
            if not missing:
                log.info("replica_ready", replica=self.assignment.replica_id)
                self._was_ready = True
                return
            taken_s = self._means.monotonic() - begin
            if taken_s >= readiness.start_limit_s:
                await self._give_up(missing)
            self._say(State.STARTING, STARTED, f"waiting until it is ready: {missing}")
            await either(self._nudge, self._means.sleep(min(max(taken_s * PROBE_SHARE, PROBE_S), PROBE_LIMIT_S)))

    async def _missing(self, readiness: Readiness) -> str | None:
        """What its port lacks; "": nothing; None: something else happened before that was known."""
        assert self.container is not None
        address = self.container.addresses.get(readiness.port)
        if address is None:
            self._means.look()
            return "the container has no address"
        probe = asyncio.ensure_future(self._means.probe(readiness, address))
        await either(self._nudge, probe)
        return probe.result() if probe.done() and not probe.cancelled() else None

    async def _give_up(self, missing: str) -> None:
        readiness = self.assignment.readiness
        limit = f"within {readiness.start_limit_s:.0f} s"
        if readiness.path:
            why = (
                f"GET {readiness.path} on port {readiness.port} was never answered below 500 {limit} (last: {missing})"
            )
        else:
            why = f"port {readiness.port} never opened {limit}"
        why += await self._last_lines()
        # Its end is our doing, not one to tell of.
        self.container = None
        await self._means.engine.stop(self.assignment.replica_id, grace_s=self._means.stop_grace_s)
        raise NeverReady(why)

    async def _obituary(self, ended: Exit) -> str:
        when = "" if self._was_ready else " before it was ready"
        return f"the container {ended.words} after {ended.ran_s:.0f} s{when}" + await self._last_lines()

    async def _last_lines(self) -> str:
        try:
            lines = (await self._means.engine.logs(self.assignment.replica_id, lines=LAST_LINES)).strip()
        except EngineError:
            return ""
        return f"; its last lines:\n{lines[-LAST_CHARS:]}" if lines else "; it wrote nothing"

    def _remark(self) -> str:
        remarks = []
        if self.restarts:
            remarks.append(f"restarted {self.restarts} times")
        if self.container and (kills := self.container.memory_kills):
            remarks.append(f"one of its processes was killed for lack of memory ({kills} times)")
        return "; ".join(remarks)

    def _say(self, state: State, progress: int = 0, message: str = "") -> None:
        if (state, message) != (self._state, self._message):
            self.events.append(Event(self._means.monotonic(), state, message))
        if (state, progress, message) != (self._state, self._progress, self._message):
            self._state, self._progress, self._message = state, progress, message
            self._means.changed()


def backoff_s(failures: int) -> float:
    """How long to wait after that many failures in a row, at least one."""
    return min(BACKOFF_S * 2.0 ** min(failures - 1, 30), BACKOFF_LIMIT_S)
