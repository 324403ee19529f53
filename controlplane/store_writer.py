"""The one thread that commits: group commit.

All writes that wait are run in one transaction, which is committed, and then every caller is answered: the price of a
commit (a disk's flush) is shared by all who came while the last one ran. There is no timer: a write that finds the
thread idle is committed at once.

Of a database in this process, statements that are quick are run where they were put, in the event loop's thread, and
the other only commits: for each row that it wrote it had to wait for the interpreter's lock, and the loop for it.

Some writes may be held for a moment, because another of the same key is likely to follow that can be made one with it.

A batch is first run as if nothing could go wrong, writes of one kind together. If one goes wrong, the batch is rolled
back and run again write by write, each in a savepoint, so that it fails alone.
"""

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import sqlalchemy as sa
import structlog

from controlplane.errors import Unavailable
from controlplane.futures import DirectFuture
from controlplane.store_database import LOCK_WAIT_S, is_down, is_lost, reason, unavailable, wait_for_lock

#: Writes that may wait. A disk that hangs must not fill the memory.
QUEUE_WRITES: Final = 10_000
#: Bytes of bodies that may wait.
QUEUE_BYTES: Final = 256 * 1024 * 1024
#: Writes in one transaction, so that the first does not wait for ever for the last.
BATCH_WRITES: Final = 1000
#: Of these kinds together so many writes and bytes of bodies are quick: a millisecond and a half.
QUICK_WRITES: Final = 64
QUICK_BYTES: Final = 512 * 1024
#: How long a write is held at most. A hundred calls at once of 20 ms each take 70 ms, and written twice they take more.
HOLD_S: Final = 0.1
#: The pause after a failure of the database: the first and the longest. What comes meanwhile waits.
BACKOFF_S: Final = (0.05, 1.0)

log = structlog.get_logger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

#: A kind of write: does to all items what would be done to each in turn, and gives a result for each. It may be run
#: again after a rollback, and even after a commit that nobody heard of. If it cannot do as promised for every one of
#: several items it raises anything; for a single item it raises what the caller is to get.
Kind = Callable[[sa.Connection, Sequence[Item]], Sequence[Result]]


@dataclass(slots=True, eq=False)
class Write:
    """A write that is not done yet, and its caller's future."""

    kind: Kind[Any, Any]
    item: Any
    key: str | None
    size_bytes: int
    future: asyncio.Future[Any]
    #: One that this write does as well. It is answered after it: whoever waits for both has the end first.
    first: "Write | None" = None
    outcome: Any = None


@dataclass(slots=True)
class Batch:
    """What is committed together. `begun`: its statements have been run, and only that is left."""

    writes: list[Write]
    begun: sa.Transaction | None = None


class Writer:
    """Takes writes from the event loop's thread and commits them in its own, in order.

    `connect` makes the connection, at the first write and after every failure of the database; it is called in the
    writer's thread only. `quick`: kinds that never take long, of SQLite only.
    """

    def __init__(
        self,
        connect: Callable[[], sa.Connection],
        *,
        quick: Collection[Kind[Any, Any]] = (),
        queue_writes: int = QUEUE_WRITES,
        queue_bytes: int = QUEUE_BYTES,
        backoff_s: tuple[float, float] = BACKOFF_S,
    ) -> None:
        self._connect = connect
        self._quick = frozenset(quick)
        self._queue_writes = queue_writes
        self._queue_bytes = queue_bytes
        self._backoff_s = backoff_s
        self._loop = asyncio.get_running_loop()
        self._queue: deque[Write] = deque()
        # Only touched in the loop's thread: what is in the queue or in the running batch.
        self._waiting = 0
        self._waiting_bytes = 0
        #: By key, in order of age, with when they must go.
        self._held: dict[str | None, tuple[Write, float]] = {}
        self._release_timer: asyncio.TimerHandle | None = None
        #: The thread has a batch, and the connection with it; or it will be given one in the loop's next round.
        self._busy = False
        self._wake = threading.Event()
        #: What it is to do next; None when it is woken: nothing more.
        self._batch: Batch | None = None
        self._closing = threading.Event()
        self._connection: sa.Connection | None = None
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, name="store-writer", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Writes that are not answered yet."""
        return self._waiting

    def put(
        self,
        kind: Kind[Item, Result],
        item: Item,
        *,
        key: str | None = None,
        size_bytes: int = 0,
        first: Write | None = None,
    ) -> asyncio.Future[Result]:
        """Put a write into the queue. The future is done once it is on disk, or refused.

        `first`: a held write that this one does as well; it shares its outcome.

        Writes take effect in the order of the calls, as far as anyone can tell: those with different keys touch
        different rows, so that one may be done before another. One without a key stays in its place.
        Raises Unavailable if the queue is full or closed. A caller that goes away leaves the write where it is.
        """
        self._admit(size_bytes)
        if first is not None:
            del self._held[first.key]
        elif self._held:
            self._release(key)
        future: DirectFuture[Result] = DirectFuture(loop=self._loop)
        self._queue.append(Write(kind, item, key, size_bytes, future, first))
        self._begin_soon()
        return future

    def hold(self, kind: Kind[Item, Result], item: Item, *, key: str, size_bytes: int = 0) -> asyncio.Future[Result]:
        """As `put`, but up to HOLD_S later, or when the next write of this key or of none comes."""
        self._admit(size_bytes)
        future: DirectFuture[Result] = DirectFuture(loop=self._loop)
        self._held[key] = Write(kind, item, key, size_bytes, future), self._loop.time() + HOLD_S
        if self._release_timer is None:
            self._release_timer = self._loop.call_later(HOLD_S, self._release_old)
        return future

    def held(self, key: str) -> Write | None:
        """The held write of this key, for one that does it as well (`put`, `first`)."""
        held = self._held.get(key)
        return None if held is None else held[0]

    def _admit(self, size_bytes: int) -> None:
        if self._closing.is_set():
            raise Unavailable("The control plane is stopping.", retry_after_s=1.0)
        if self._waiting >= self._queue_writes or self._waiting_bytes + size_bytes > self._queue_bytes:
            raise Unavailable("The database is slower than what comes in; try again soon.", retry_after_s=1.0)
        self._waiting += 1
        self._waiting_bytes += size_bytes

    def _release(self, key: str | None) -> None:
        """Let the held write of this key go; without a key all of them."""
        if key is None:
            self._queue.extend(write for write, _ in self._held.values())
            self._held.clear()
        elif (held := self._held.pop(key, None)) is not None:
            self._queue.append(held[0])

    def _release_old(self) -> None:
        self._release_timer = None
        now = self._loop.time()
        while self._held:
            key, (write, until) = next(iter(self._held.items()))
            if until > now:
                self._release_timer = self._loop.call_at(until, self._release_old)
                return
            del self._held[key]
            self._queue.append(write)
            self._begin_soon()

    def _begin_soon(self) -> None:
        # In the next round, with all that is put in this one; if the thread has a batch, after that.
        if not self._busy:
            self._busy = True
            self._loop.call_soon(self._begin)

    def _begin(self) -> None:
        """Give the thread what waits; or, if nothing does and nothing will, its end."""
        self._busy = bool(self._queue)
        if self._busy:
            writes = [self._queue.popleft() for _ in range(min(len(self._queue), BATCH_WRITES))]
            self._batch = Batch(writes, self._run_here(writes))
        if self._busy or self._closing.is_set():
            self._wake.set()

    def _run_here(self, writes: Sequence[Write]) -> sa.Transaction | None:
        """Run the statements, if all are quick; None: that is left to the thread, and so is whatever goes wrong."""
        connection = self._connection
        if connection is None or len(writes) > QUICK_WRITES or not all(write.kind in self._quick for write in writes):
            return None
        if sum(write.size_bytes for write in writes) > QUICK_BYTES:
            return None
        begun = None
        try:
            wait_for_lock(connection, 0)
            begun = connection.begin()
            _run_together(connection, writes)
        except Exception as error:
            log.debug("store_not_quick", error=reason(error))
            if begun is not None:
                with suppress(Exception):
                    begun.rollback()
            return None
        return begun

    async def close(self) -> None:
        """Commit what waits, refuse what comes. Returns when every future is done."""
        self._release(None)
        if self._release_timer is not None:
            self._release_timer.cancel()
        self._closing.set()
        self._begin_soon()
        await asyncio.shield(self._ended)

    # In the writer's thread.

    def _run(self) -> None:
        try:
            self._commit_all()
        finally:
            self._closing.set()
            self._disconnect()
            self._call(self._end)

    def _commit_all(self) -> None:
        pause_s = 0.0
        while True:
            self._wake.wait()
            self._wake.clear()
            batch, self._batch = self._batch, None
            if batch is None:
                return
            if self._commit(batch):
                pause_s = 0.0
                self._call(self._committed, batch.writes)
                continue
            self._call(self._answer, batch.writes)
            if self._closing.is_set():
                return
            pause_s = min(max(2 * pause_s, self._backoff_s[0]), self._backoff_s[1])
            self._closing.wait(pause_s)
            self._call(self._begin)

    def _commit(self, batch: Batch) -> bool:
        """Do the batch. False if the database does not answer."""
        used = self._connection is not None
        up = True
        try:
            try:
                self._write(batch)
            except Exception as error:
                # A connection that was lost while nothing was to do says so only now.
                if not (used and is_lost(error)):
                    raise
                self._disconnect()
                self._write(batch)
        except Exception as error:
            up = not is_down(error)
            log.exception("store_commit_failed", writes=len(batch.writes), exc_info=up, error=reason(error))
            self._disconnect()
            for write in batch.writes:
                write.outcome = error if up else unavailable()
        return up

    def _write(self, batch: Batch) -> None:
        begun, batch.begun = batch.begun, None
        if begun is not None:
            begun.commit()
            return
        if self._connection is None:
            self._connection = self._connect()
        elif self._quick:
            wait_for_lock(self._connection, LOCK_WAIT_S)
        try:
            with self._connection.begin():
                _run_together(self._connection, batch.writes)
        except Exception as error:
            if is_down(error):
                raise
        else:
            return
        with self._connection.begin():
            for write in batch.writes:
                try:
                    with self._connection.begin_nested():
                        (write.outcome,) = write.kind(self._connection, [write.item])
                except Exception as error:
                    if is_down(error):
                        raise
                    write.outcome = error

    def _disconnect(self) -> None:
        if self._connection is None:
            return
        try:
            self._connection.invalidate()
            self._connection.close()
        except Exception as error:  # it is being thrown away
            log.debug("store_disconnect_failed", error=str(error))
        self._connection = None

    def _call(self, function: Callable[..., None], *args: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            # The loop was closed and the writer was not: nobody is left to be answered.
            log.warning("store_loop_closed")

    # In the loop's thread.

    def _committed(self, writes: Iterable[Write]) -> None:
        try:
            self._answer(writes)
        finally:
            self._begin()

    def _answer(self, batch: Iterable[Write]) -> None:
        for write in batch:
            self._answer_one(write)
            if write.first is not None:
                write.first.outcome = write.outcome
                self._answer_one(write.first)

    def _answer_one(self, write: Write) -> None:
        self._waiting -= 1
        self._waiting_bytes -= write.size_bytes
        future, outcome = write.future, write.outcome
        if future.done():  # the caller went away; the write was done all the same
            return
        if isinstance(outcome, BaseException):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)

    def _end(self) -> None:
        self._release(None)
        left = list(self._queue)
        self._queue.clear()
        for write in left:
            write.outcome = Unavailable("The control plane is stopping and its database does not answer.")
        self._answer(left)
        if not self._ended.done():
            self._ended.set_result(None)


def _run_together(connection: sa.Connection, writes: Iterable[Write]) -> None:
    """As if nothing could go wrong."""
    for run in _runs(writes):
        results = run[0].kind(connection, [write.item for write in run])
        for write, result in zip(run, results, strict=True):
            write.outcome = result


def _runs(batch: Iterable[Write]) -> list[list[Write]]:
    """Bring writes of one kind together as far as nobody can tell: none passes one with its own key or without a key.

    A run is executed as one statement with many rows, which costs a third of as many statements.
    """
    runs: list[list[Write]] = []
    last_of_kind: dict[Kind[Any, Any], int] = {}
    last_of_key: dict[str, int] = {}
    for write in batch:
        if write.key is None:
            last_of_kind.clear()
            runs.append([write])
            continue
        at = last_of_kind.get(write.kind, -1)
        if at < 0 or at < last_of_key.get(write.key, -1):
            at = last_of_kind[write.kind] = len(runs)
            runs.append([])
        runs[at].append(write)
        last_of_key[write.key] = at
    return runs
