"""Posting: so many at once and no more, fairly, again after every failure, over a database that does not answer."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from controlplane import postings
from controlplane.errors import Unavailable
from controlplane.migrations import migrate
from controlplane.model import Told, Webhook
from controlplane.postings import Postings, Room
from controlplane.signatures import PREVIOUS_TIME, Signatures, signature
from controlplane.store import Store
from controlplane.webhooks import Answer, Times
from tests.controlplane.test_store import NOW, SECOND, failed, queued

DELIVERED = Answer(204)
DEAD = Answer(error="No answer came.")


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> datetime:
        return self.now


class FakeReceivers:
    """Receivers that answer when the test says so; those of `at_once` do by themselves."""

    def __init__(self) -> None:
        self.at_once: dict[str, Answer] = {}
        self.waiting: dict[str, asyncio.Future[Answer]] = {}
        self.posts: list[tuple[str, Mapping[str, str]]] = []
        self.most: Counter[str] = Counter()
        self._now: Counter[str] = Counter()

    async def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> Answer:
        self.posts.append((url, headers))
        host = url.split("/")[2]
        for key in ("all", host):
            self._now[key] += 1
            self.most[key] = max(self.most[key], self._now[key])
        try:
            if host in self.at_once:
                await asyncio.sleep(0)
                return self.at_once[host]
            future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
            self.waiting[url] = future
            return await future
        finally:
            self.waiting.pop(url, None)
            for key in ("all", host):
                self._now[key] -= 1

    async def close(self) -> None:
        pass


class House:
    """Postings over a real store."""

    def __init__(self, store: Store, receivers: FakeReceivers, clock: Clock, room: Room) -> None:
        self.store = store
        self.receivers = receivers
        self.clock = clock
        self.signatures = Signatures(store, clock=clock)
        self.postings = Postings(
            store,
            receivers,
            self.signatures,
            clock=clock,
            jitter=lambda: 1.0,
            times=Times(give_up_s=86_400, first_pause_s=5),
            room=room,
        )

    async def end(self, task_id: str, host: str = "a.example", workspace: str = "w") -> None:
        """A task ends that has a callback."""
        self.store.add_task(queued(task_id, workspace_uid=workspace, callback_url=f"https://{host}/{task_id}"))
        row = Webhook(
            task_id=task_id,
            workspace_uid=workspace,
            host=host,
            state=Told.WAITING,
            create_time=self.clock.now,
            next_time=self.clock.now,
        )
        await self.store.end_queued(task_id, failed(), row)

    async def webhook(self, task_id: str) -> Webhook:
        row = await self.store.webhook(task_id)
        assert row is not None
        return row

    async def until(self, true: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not true():
                await asyncio.sleep(0.001)

    async def until_tried(self, task_id: str, tries: int) -> Webhook:
        async with asyncio.timeout(10):
            while (row := await self.webhook(task_id)).tries < tries:
                await asyncio.sleep(0.001)
        return row

    def pass_time(self, time: timedelta) -> None:
        self.clock.now += time
        self.store.webhook_news.set()


@asynccontextmanager
async def posting(directory: Path, room: Room = Room()) -> AsyncIterator[House]:  # noqa: B008 frozen
    url = f"sqlite:///{directory / 'ngpu.db'}"
    await asyncio.to_thread(migrate, url)
    store = await Store.open(url)
    house = House(store, FakeReceivers(), Clock(), room)
    run = asyncio.create_task(house.postings.run())
    try:
        yield house
    finally:
        run.cancel()
        await asyncio.gather(run, return_exceptions=True)
        await store.close()


async def test_delivered_once_and_done(tmp_path: Path) -> None:
    async with posting(tmp_path) as house:
        house.receivers.at_once["a.example"] = DELIVERED
        await house.end("t")
        row = await house.until_tried("t", 1)
        assert (row.state, row.next_time) == (Told.DELIVERED, None)
        house.pass_time(timedelta(days=30))
        await house.end("u")
        await house.until_tried("u", 1)
        assert [url for url, _ in house.receivers.posts] == ["https://a.example/t", "https://a.example/u"]
        assert house.postings.ended == {"delivered": 2}


async def test_tried_again_when_its_time_has_come_and_not_before(tmp_path: Path) -> None:
    async with posting(tmp_path) as house:
        house.receivers.at_once["a.example"] = Answer(500)
        await house.end("t")
        row = await house.until_tried("t", 1)
        assert row.next_time == NOW + 5 * SECOND
        house.pass_time(4 * SECOND)
        await house.end("u", "b.example")
        await house.until(lambda: "https://b.example/u" in house.receivers.waiting)
        assert (await house.webhook("t")).tries == 1
        house.pass_time(SECOND)
        await house.until_tried("t", 2)
        ids = {headers["webhook-id"] for url, headers in house.receivers.posts if url.endswith("/t")}
        stamps = [headers["webhook-timestamp"] for url, headers in house.receivers.posts if url.endswith("/t")]
        assert ids == {"msg_t"}
        assert int(stamps[1]) - int(stamps[0]) == 5


async def test_no_more_at_once_than_there_is_room_for(tmp_path: Path) -> None:
    async with posting(tmp_path, Room(overall=6, per_host=2, per_workspace=4)) as house:
        for number in range(12):
            await house.end(f"a{number}", f"{number % 4}.example", "w-1")
        for number in range(6):
            await house.end(f"b{number}", f"b{number}.example", "w-2")
        seen: set[str] = set()
        while len(seen) < 18:
            await house.until(lambda: bool(house.receivers.waiting.keys() - seen))
            # All that can be has been begun.
            await asyncio.sleep(2 * postings.LOOK_LEAST_S)
            waiting = [url for url in house.receivers.waiting if url not in seen]
            assert sum("/a" in url for url in waiting) <= 4
            for url in waiting:
                seen.add(url)
                house.receivers.waiting[url].set_result(DELIVERED)
        most = house.receivers.most
        assert most.pop("all") == 6
        assert max(most.values()) == 2


async def test_dead_host_with_thousands_waiting_holds_up_nobody(tmp_path: Path) -> None:
    async with posting(tmp_path) as house:
        rows = 5000
        house.receivers.at_once["dead.example"] = DEAD
        await house.end("first", "dead.example", "w-1")
        await house.until_tried("first", 1)
        # It does not answer: from now on one at a time.
        del house.receivers.at_once["dead.example"]
        house.receivers.most.clear()
        await asyncio.gather(*(house.end(f"d{number}", "dead.example", "w-1") for number in range(rows)))
        await house.until(lambda: len(house.receivers.waiting) == 1)
        # Even of the same workspace.
        house.receivers.at_once["live.example"] = DELIVERED
        began = time.monotonic()
        for number in range(20):
            await house.end(f"l{number}", "live.example", "w-1")
        for number in range(20):
            await house.until_tried(f"l{number}", 1)
        assert time.monotonic() - began < 5
        assert house.receivers.most["dead.example"] == 1


async def test_host_that_answers_again_has_its_room_again(tmp_path: Path) -> None:
    async with posting(tmp_path, Room(per_host=3)) as house:
        house.receivers.at_once["a.example"] = DEAD
        await house.end("t")
        await house.until_tried("t", 1)
        del house.receivers.at_once["a.example"]
        for number in range(4):
            await house.end(f"u{number}")
        await house.until(lambda: len(house.receivers.waiting) == 1)
        next(iter(house.receivers.waiting.values())).set_result(Answer(500))
        await house.until(lambda: len(house.receivers.waiting) == 3)


async def test_long_overdue_are_given_up_without_a_try_where_the_host_is_dead(tmp_path: Path) -> None:
    async with posting(tmp_path, Room(per_host=1)) as house:
        await house.end("t")
        await house.until(lambda: bool(house.receivers.waiting))
        await house.end("u")
        house.pass_time(timedelta(days=2))
        house.receivers.waiting["https://a.example/t"].set_result(DEAD)
        row = await house.until_tried("u", 1)
        assert row.state is Told.GIVEN_UP
        assert b"its turn did not come" in row.tries_json
        assert [url for url, _ in house.receivers.posts] == ["https://a.example/t"]


async def test_try_that_was_not_recorded_is_made_again_with_the_same_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postings, "PAUSE_S", 0.01)
    async with posting(tmp_path) as house:
        house.receivers.at_once["a.example"] = DELIVERED
        keep, failures = house.store.keep_webhook, iter([True, True])

        def fails(row: Webhook) -> "asyncio.Future[None]":
            if next(failures, False):
                raise Unavailable
            return keep(row)

        monkeypatch.setattr(house.store, "keep_webhook", fails)
        await house.end("t")
        row = await house.until_tried("t", 1)
        assert row.state is Told.DELIVERED
        assert [headers["webhook-id"] for _, headers in house.receivers.posts] == ["msg_t"] * 3


async def test_fault_of_ours_is_a_failed_try_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with posting(tmp_path) as house:
        house.receivers.at_once["b.example"] = DELIVERED

        async def fails(*_: object) -> Answer:
            raise RuntimeError

        good = house.receivers.post
        monkeypatch.setattr(house.receivers, "post", fails)
        await house.end("t")
        assert (await house.until_tried("t", 1)).state is Told.WAITING
        monkeypatch.setattr(house.receivers, "post", good)
        await house.end("u", "b.example")
        assert (await house.until_tried("u", 1)).state is Told.DELIVERED


async def test_replaced_secret_signs_no_longer_than_it_should(tmp_path: Path) -> None:
    async with posting(tmp_path) as house:
        old = await house.signatures.secret("w")
        new = await house.signatures.rotate("w")

        async def signed() -> list[str]:
            headers = await house.signatures.headers("w", "msg_t", b"{}")
            stamp = int(headers["webhook-timestamp"])
            keys = {signature(row.secret, "msg_t", stamp, b"{}"): name for row, name in ((old, "old"), (new, "new"))}
            return [keys[one] for one in headers["webhook-signature"].split(" ")]

        assert await signed() == ["new", "old"]
        house.clock.now += PREVIOUS_TIME - SECOND
        assert await signed() == ["new", "old"]
        house.clock.now += SECOND
        assert await signed() == ["new"]
