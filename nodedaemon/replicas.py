"""Desired against running containers: a pure plan(), and the loop that makes it so.

What is there is read from the engine and never remembered: after a restart of the daemon or of the engine the same
loop adopts what runs and takes away what should not.
"""

import asyncio
import dataclasses
import functools
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass

import structlog

from nodedaemon.engine import Address, Assignment, Container, Engine, EngineError, Exit, Readiness
from nodedaemon.pulls import Pulls
from nodedaemon.readiness import probe
from nodedaemon.replica import RETRY_S, Contact, Means, Replica, ReplicaReport, State, backoff_s, either

__all__ = ["Plan", "ReplicaReport", "Replicas", "State", "plan"]

log = structlog.get_logger()

#: How often the engine is asked for all that is, in case an event was lost.
STOCK_S = 30.0
#: How often it is asked whether containers still see their GPUs.
SIGHT_S = 30.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What to start (or adopt) and what to stop."""

    start: tuple[Assignment, ...]
    stop: tuple[str, ...]


def plan(desired: Mapping[str, Assignment], kept: Mapping[str, str], found: Mapping[str, str]) -> Plan:
    """What brings `kept` (replicas looked after) and `found` (containers there are) to `desired`.

    Both map replica id to spec hash. A found container of the right hash is started all the same: its start is its
    adoption. One of another hash is stopped, and its replica is started once it is gone.
    """
    wrong = {
        replica_id
        for replica_id, spec_hash in (*found.items(), *kept.items())
        if replica_id not in desired or desired[replica_id].spec_hash != spec_hash
    }
    return Plan(
        start=tuple(a for r, a in desired.items() if r not in kept and r not in wrong),
        stop=tuple(sorted(wrong)),
    )


class Replicas:
    """Looks after the replicas of this node.

    Run `run()` in the daemon's TaskGroup, call `apply` with each list that comes.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        may_start: Callable[[Assignment], str] = lambda _: "",
        blind: Callable[[], Awaitable[Mapping[str, str]]] | None = None,
        stop_grace_s: float = 10.0,
        probe: Callable[[Readiness, Address], Awaitable[str]] = probe,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """`may_start` says in words why an assignment must not start now ("": it may).

        Wire `Gpus.refusal` of its gpu_ids and `Caches.refusal` there. `blind` asks which replicas' containers have lost
        sight of GPUs that they were given, and how that shows; None: nobody can tell.
        """
        self._engine = engine
        self._blind = blind
        self._stop_grace_s = stop_grace_s
        self._monotonic = monotonic
        self._sleep = sleep
        self._contact = Contact()
        self._means = Means(
            engine=engine,
            pulls=Pulls(engine),
            contact=self._contact,
            may_start=may_start,
            probe=probe,
            stop_grace_s=stop_grace_s,
            monotonic=monotonic,
            sleep=sleep,
            changed=self._bump,
            look=self._look,
            lost=self._lost,
            ended=self._ended,
            full=self._full,
        )
        self._group: asyncio.TaskGroup
        #: None until the control plane has spoken.
        self._desired: dict[str, Assignment] | None = None
        #: None until the engine has spoken.
        self._found: dict[str, Container] | None = None
        self._kept: dict[str, Replica] = {}
        self._stopping: dict[str, ReplicaReport] = {}
        self._exits: dict[str, Exit] = {}
        self._callbacks: list[Callable[[Exit], None]] = []
        self._make_room: Callable[[], None] = lambda: None
        self._listed = asyncio.Event()
        self._stale = True
        self._wake = asyncio.Event()
        self._version = 0
        self._changed = asyncio.Event()

    # What others say and ask.

    def apply(self, assignments: Iterable[Assignment]) -> None:
        """This is all that should be. Returns at once; until it was called once, nothing is started or stopped."""
        self._desired = {a.replica_id: a for a in assignments}
        for replica_id, replica in self._kept.items():
            new = self._desired.get(replica_id)
            # Of what is not in the hash only `draining` changes.
            if new and new.spec_hash == replica.assignment.spec_hash and new != replica.assignment:
                replica.assignment = new
                self._bump()
        self._wake.set()

    def reports(self) -> tuple[ReplicaReport, ...]:
        """All that is, by replica id.

        Desired ones, ones being stopped, and ones found after a restart of the daemon.
        """
        reports = {r: ReplicaReport(r, State.ASSIGNED, message=self._contact.down) for r in self._desired or ()}
        waiting = self._contact.down or "found after a restart of the daemon; waiting to hear whether it should run"
        for replica_id, container in (self._found or {}).items():
            reports[replica_id] = _of_container(replica_id, State.STARTING, container, waiting)
        reports.update({r: replica.report() for r, replica in self._kept.items()})
        reports.update(self._stopping)
        return tuple(reports[r] for r in sorted(reports))

    @property
    def version(self) -> int:
        """Counts changes of what `reports` says."""
        return self._version

    async def changed(self, seen: int) -> int:
        """Wait until `version` is past `seen`; returns it. No change is missed, several may be one."""
        while self._version <= seen:
            await self._changed.wait()
        return self._version

    async def listed(self) -> None:
        """Returns once the engine was asked for the first time what is there: send no report before."""
        await self._listed.wait()

    def address(self, replica_id: str, port: int) -> Address | None:
        """Where to reach that port of a READY (also a draining) replica.

        None if it is not there or has no such port, or if the engine has not confirmed since it was last away that the
        replica's container has this address. Ask again when connected, before a byte is sent.
        """
        replica = self._kept.get(replica_id)
        if replica is None or replica.container is None or not replica.ready:
            return None
        return replica.container.addresses.get(port)

    def container_id(self, replica_id: str) -> str:
        """The container that a replica has now; empty: none."""
        replica = self._kept.get(replica_id)
        return replica.container.container_id if replica and replica.container else ""

    def gpu_ids(self, replica_id: str) -> tuple[str, ...]:
        """GPUs of a replica; () if it has none or is unknown."""
        replica = self._kept.get(replica_id)
        return replica.assignment.gpu_ids if replica else ()

    def holds(self, gpu_id: str) -> bool:
        """Does a replica that is or should be here have that GPU?"""
        return any(gpu_id in one.gpu_ids for one in self.assignments() or ())

    def kept(self, replica_id: str) -> Replica | None:
        """The replica, if it is looked after here."""
        return self._kept.get(replica_id)

    def assignments(self) -> tuple[Assignment, ...] | None:
        """All that should be here or still is; None: the control plane has not spoken yet."""
        if self._desired is None:
            return None
        return (*self._desired.values(), *(replica.assignment for replica in self._kept.values()))

    def end(self, replica_id: str, why: str, *, customers: bool) -> None:
        """End its container, whatever it does, and make another after a while. No error if there is none."""
        replica = self._kept.get(replica_id)
        if replica:
            replica.end(why, customers=customers)

    def on_exit(self, callback: Callable[[Exit], None]) -> None:
        """Have `callback` called, in the event loop, for every container that ended otherwise than by our order."""
        self._callbacks.append(callback)

    def on_full(self, make_room: Callable[[], None]) -> None:
        """Have `make_room` called for every pull or start that failed because the disk is full."""
        self._make_room = make_room

    async def exited(self, replica_id: str, *, since: float, within_s: float) -> Exit | None:
        """Did the replica's container end at or after `since` (monotonic)? Waits up to `within_s` for the engine to
        say so; None: no.

        For the relay, when a connection breaks in mid-exchange: the break is seen some milliseconds before the
        engine tells of it.
        """
        deadline = self._monotonic() + within_s
        self._look()
        while True:
            known = self._exits.get(replica_id)
            if known and known.at >= since:
                return known
            if not await either(self._changed, self._sleep(max(0.0, deadline - self._monotonic()))):
                return None

    # The loop.

    async def run(self) -> None:
        """Until cancelled. Containers keep running after it; see stop_all."""
        async with asyncio.TaskGroup() as self._group:
            self._group.create_task(self._watch(), name="engine events")
            self._group.create_task(self._reconcile(), name="replicas")
            if self._blind:
                self._group.create_task(self._watch_gpus(self._blind), name="replicas' GPUs")

    async def stop_all(self, *, within_s: float) -> None:
        """Stop every container of this node; after `run` has ended, when the daemon is told to leave nothing behind.

        Raises EngineError or TimeoutError when some may be left.
        """
        grace_s = min(self._stop_grace_s, within_s / 2)
        async with asyncio.timeout(within_s):
            there = await self._engine.containers()
            await asyncio.gather(*(self._engine.stop(c.replica_id, grace_s=grace_s) for c in there))

    async def _watch(self) -> None:
        while True:
            try:
                await self._engine.watch(functools.partial(self._heard, object()))
            except EngineError as error:
                self._lost(error)
            if self._contact.stream is not None:
                self._contact.stream = None
                self._tell_all()
            await self._sleep(RETRY_S)

    def _heard(self, stream: object) -> None:
        self._contact.stream = stream
        self._look()

    async def _reconcile(self) -> None:
        while True:
            self._wake.clear()
            if self._stale:
                self._stale = False
                await self._take_stock()
            self._act()
            if not await either(self._wake, self._sleep(RETRY_S if self._contact.down else STOCK_S)):
                self._stale = True

    async def _take_stock(self) -> None:
        stream = self._contact.stream
        # A container that starts while the list is on its way is not on it: judge those only that were there before.
        before = {r: replica.container for r, replica in self._kept.items() if replica.container}
        try:
            found = {c.replica_id: c for c in await self._engine.containers()}
        except EngineError as error:
            self._lost(error)
            return
        finally:
            self._listed.set()
        if self._found is None or self._found.keys() != found.keys():
            self._bump()
        self._found = found
        was_down = self._contact.down != ""
        if self._contact.found():
            log.info("engine_answers")
            self._tell_all()
        for replica_id, container in before.items():
            replica = self._kept.get(replica_id)
            if replica and replica.container is container and not container.exit:
                replica.seen(found.get(replica_id), engine_was_down=was_down)
                if stream is self._contact.stream:
                    replica.confirm(stream)

    def _act(self) -> None:
        if self._desired is None or self._found is None:
            return
        todo = plan(
            {r: a for r, a in self._desired.items() if r not in self._stopping},
            {r: replica.assignment.spec_hash for r, replica in self._kept.items()},
            {r: c.spec_hash for r, c in self._found.items() if r not in self._stopping},
        )
        for replica_id in todo.stop:
            replica = self._kept.pop(replica_id, None)
            container = (replica and replica.container) or self._found.get(replica_id)
            self._stopping[replica_id] = _of_container(replica_id, State.STOPPING, container)
            self._group.create_task(self._stop(replica_id, replica), name=f"stop {replica_id}")
        for assignment in todo.start:
            replica = self._kept[assignment.replica_id] = Replica(assignment, self._means)
            life = replica.live(self._found.get(assignment.replica_id))
            replica.task = self._group.create_task(life, name=f"replica {assignment.replica_id}")
        if todo.start or todo.stop:
            self._bump()

    async def _stop(self, replica_id: str, replica: Replica | None) -> None:
        if replica:
            replica.task.cancel()
            await asyncio.wait({replica.task})
        failures = 0
        while True:
            try:
                await self._engine.stop(replica_id, grace_s=self._stop_grace_s)
                break
            except EngineError as error:
                failures += 1
                log.warning("stop_failed", replica=replica_id, error=str(error))
                self._stopping[replica_id] = dataclasses.replace(self._stopping[replica_id], message=str(error))
                self._bump()
                await self._sleep(backoff_s(failures))
        log.info("replica_stopped", replica=replica_id)
        del self._stopping[replica_id]
        if self._found:
            self._found.pop(replica_id, None)
        self._exits.pop(replica_id, None)
        self._bump()
        self._wake.set()

    async def _watch_gpus(self, blind: Callable[[], Awaitable[Mapping[str, str]]]) -> None:
        while True:
            await self._sleep(SIGHT_S)
            if not any(replica.assignment.gpu_ids for replica in self._kept.values()):
                continue
            try:
                found = await blind()
            except EngineError:
                # The replicas' messages say so too.
                continue
            for replica_id, words in found.items():
                why = f"it has lost sight of its GPUs ({words}), as after a reload of systemd; it is made anew"
                self.end(replica_id, why, customers=False)

    # What replicas and the engine tell.

    def _look(self) -> None:
        self._stale = True
        self._wake.set()

    def _lost(self, error: EngineError) -> None:
        if self._contact.lost(error):
            log.warning("engine_lost", error=str(error))
            self._tell_all()
            # From now on it is asked more often.
            self._wake.set()

    def _tell_all(self) -> None:
        for replica in self._kept.values():
            replica.nudge()
        self._bump()

    def _ended(self, ended: Exit) -> None:
        known = dataclasses.replace(ended, at=self._monotonic())
        self._exits[ended.replica_id] = known
        log.warning("container_ended", replica=ended.replica_id, how=ended.words, ran_s=round(ended.ran_s, 1))
        self._bump()
        for callback in self._callbacks:
            callback(known)

    def _full(self) -> None:
        self._make_room()

    def _bump(self) -> None:
        self._version += 1
        self._changed.set()
        self._changed = asyncio.Event()


def _of_container(replica_id: str, state: State, container: Container | None, message: str = "") -> ReplicaReport:
    if container is None:
        return ReplicaReport(replica_id, state, message=message)
    return ReplicaReport(
        replica_id,
        state,
        message=message,
        restarts=container.restarts,
        spec_hash=container.spec_hash,
        image_digest=container.image_digest,
    )
