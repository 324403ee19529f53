"""Posts what waits in the table of webhooks, until it is delivered or given up.

The table is the queue: what is under way is known here, nothing else is. A kill between a post and its record means
that it is posted again, with the same `webhook-id`. So many at once, of them so many to a host and for a workspace, and
one at a time to a host that does not answer: whatever receivers do holds up nobody else's.
"""

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from typing import Final

import msgspec
import structlog

from controlplane import webhooks
from controlplane.errors import Unavailable
from controlplane.late_receivers import Receivers
from controlplane.model import Told, Webhook
from controlplane.notice import notice_of
from controlplane.signatures import Signatures
from controlplane.store import Store
from controlplane.webhooks import Answer, Times

#: Hosts that do not answer, as far as they are remembered.
FAILING_HOSTS: Final = 1000
#: A database that does not answer is asked again after this, in seconds.
PAUSE_S: Final = 1.0
#: What waits is counted this often, in seconds, and up to so many: for the metrics.
COUNT_S: Final = 5.0
COUNTED: Final = 100_000
#: It is looked for what is due this often at least, and this often at most.
LOOK_S: Final = 30.0
LOOK_LEAST_S: Final = 0.02

_log = structlog.get_logger(__name__)


class Room(msgspec.Struct, frozen=True):
    """How many are posted at once."""

    overall: int = 64
    per_host: int = 4
    per_workspace: int = 16


class Postings:
    """`run` posts. `jitter`: random numbers from 0 to 1. `bridge_url`: where callers reach the bridge; may be empty."""

    def __init__(
        self,
        store: Store,
        receivers: Receivers,
        signatures: Signatures,
        *,
        clock: Callable[[], datetime],
        jitter: Callable[[], float],
        times: Times = Times(),  # noqa: B008 frozen
        room: Room = Room(),  # noqa: B008 frozen
        bridge_url: str = "",
    ) -> None:
        self._store = store
        self._receivers = receivers
        self._signatures = signatures
        self._clock = clock
        self._jitter = jitter
        self._times = times
        self._room = room
        self._bridge_url = bridge_url
        self._under_way: dict[str, Webhook] = {}
        self._hosts: Counter[str] = Counter()
        self._workspaces: Counter[str] = Counter()
        #: The one that failed first is first.
        self._failing: OrderedDict[str, None] = OrderedDict()
        self._counted = 0
        #: Posts by what came of them, since the start.
        self.tries: Counter[str] = Counter()
        #: Webhooks that are over, by how, since the start.
        self.ended: Counter[str] = Counter()

    @property
    def under_way(self) -> int:
        """Posts that have not ended."""
        return len(self._under_way)

    @property
    def waiting(self) -> int:
        """Webhooks that are to be posted, as counted every COUNT_S."""
        return max(0, self._counted - len(self._under_way))

    async def run(self) -> None:
        """Post, until cancelled."""
        news = self._store.webhook_news
        async with asyncio.TaskGroup() as group:
            group.create_task(self._count_waiting(), name="webhooks: count")
            while True:
                news.clear()
                try:
                    wait_s = await self._begin_due(group)
                except Unavailable as error:
                    _log.warning("webhooks_not_read", error=str(error))
                    wait_s = PAUSE_S
                # A crowd of ends is one look, not one each.
                await asyncio.sleep(LOOK_LEAST_S)
                with suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):
                        await news.wait()

    async def _count_waiting(self) -> None:
        while True:
            with suppress(Unavailable):
                self._counted = await self._store.waiting_webhooks(COUNTED)
            await asyncio.sleep(COUNT_S)

    async def _begin_due(self, group: asyncio.TaskGroup) -> float:
        """Begin what is due and has room. Gives how long nothing else will be due, in seconds."""
        now = self._clock()
        while (free := self._room.overall - len(self._under_way)) > 0:
            hosts = [host for host, count in self._hosts.items() if count >= self._most(host)]
            workspaces = [uid for uid, count in self._workspaces.items() if count >= self._room.per_workspace]
            due = await self._store.webhooks_due(
                now, free, tasks=list(self._under_way), hosts=hosts, workspaces=workspaces
            )
            begun = [row for row in due if self._take(row)]
            for row in begun:
                group.create_task(self._post(row), name=f"webhook-{row.task_id}")
            if len(due) < free and len(begun) == len(due):
                break
        following = await self._store.next_webhook_time(now)
        return LOOK_S if following is None else min(LOOK_S, max(0.0, (following - self._clock()).total_seconds()))

    def _most(self, host: str) -> int:
        return 1 if host in self._failing else self._room.per_host

    def _take(self, row: Webhook) -> bool:
        """Whether it may begin now: of those read together, some may fill the room of the others."""
        if (
            row.task_id in self._under_way
            or self._hosts[row.host] >= self._most(row.host)
            or self._workspaces[row.workspace_uid] >= self._room.per_workspace
        ):
            return False
        self._under_way[row.task_id] = row
        self._hosts[row.host] += 1
        self._workspaces[row.workspace_uid] += 1
        return True

    async def _post(self, row: Webhook) -> None:
        try:
            began = self._clock()
            if webhooks.is_late(row, began, self._times, host_fails=row.host in self._failing):
                answer = Answer(error="Not posted: its turn did not come in time, for the receiver does not answer.")
            else:
                answer = await self._try(row)
                self._judge(row.host, answer)
            after = webhooks.after(row, answer, self._times, began=began, now=self._clock(), jitter=self._jitter())
            await self._store.keep_webhook(after)
            self._count(after, answer)
        except Unavailable as error:
            # It is posted again.
            _log.warning("webhook_not_recorded", task_id=row.task_id, error=str(error))
            await asyncio.sleep(PAUSE_S)
        finally:
            del self._under_way[row.task_id]
            self._leave(self._hosts, row.host)
            self._leave(self._workspaces, row.workspace_uid)
            self._store.webhook_news.set()

    async def _try(self, row: Webhook) -> Answer:
        try:
            task = await self._store.task(row.task_id)
            assert task is not None
            body = notice_of(task, self._bridge_url)
            headers = await self._signatures.headers(row.workspace_uid, webhooks.webhook_id(row.task_id), body)
            return await self._receivers.post(task.callback_url, body, headers)
        except Unavailable:
            raise
        except Exception:
            # A fault of ours must not end the posting to everybody else.
            _log.exception("webhook_failed", task_id=row.task_id)
            return Answer(error="Something went wrong inside the control plane.")

    def _judge(self, host: str, answer: Answer) -> None:
        if answer.status:
            self._failing.pop(host, None)
            return
        self._failing[host] = None
        if len(self._failing) > FAILING_HOSTS:
            self._failing.popitem(last=False)

    def _count(self, row: Webhook, answer: Answer) -> None:
        self.tries["delivered" if row.state is Told.DELIVERED else "refused" if answer.status else "no_answer"] += 1
        if row.state is not Told.WAITING:
            self.ended[row.state.name.lower()] += 1
            _log.info("webhook_ended", task_id=row.task_id, state=row.state.name.lower(), tries=row.tries)

    @staticmethod
    def _leave(counter: Counter[str], key: str) -> None:
        counter[key] -= 1
        if not counter[key]:
            del counter[key]
