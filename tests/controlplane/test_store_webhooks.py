"""What the store promises of webhooks: written with the end of their task or not at all, once, and chosen fairly."""

import asyncio
from datetime import timedelta
from typing import Any

import pytest

from controlplane.errors import NotFound, StaleAttempt
from controlplane.model import Told, Webhook, WebhookSecret
from controlplane.store import Store
from tests.controlplane.test_store import NOW, SECOND, completed, failed, ledger, queued, running


def webhook(task_id: str = "t", **fields: Any) -> Webhook:
    values: dict[str, Any] = {
        "task_id": task_id,
        "workspace_uid": "w-1",
        "host": "example.com",
        "state": Told.WAITING,
        "create_time": NOW,
        "next_time": NOW,
    }
    return Webhook(**values | fields)


async def due(store: Store, limit: int = 100, **but: Any) -> list[str]:
    return [row.task_id for row in await store.webhooks_due(NOW + SECOND, limit, **but)]


async def ended(store: Store, *rows: Webhook) -> None:
    """Tasks that have ended, each with its webhook."""
    for row in rows:
        store.add_task(queued(row.task_id))
    await asyncio.gather(*(store.end_queued(row.task_id, failed(), row) for row in rows))


async def test_end_and_webhook_are_one(store: Store) -> None:
    store.add_task(running("t", callback_url="https://example.com/"))
    store.add_task(queued("q"))
    assert await due(store) == []
    await asyncio.gather(
        store.finish(ledger("t"), completed(), webhook()), store.end_queued("q", failed(), webhook("q"))
    )
    assert sorted(await due(store)) == ["q", "t"]
    assert await store.webhook("t") == webhook()
    task = await store.task("t")
    assert task is not None
    assert task.callback_url == "https://example.com/"
    assert store.webhook_news.is_set()


async def test_end_given_again_has_no_second_webhook(store: Store) -> None:
    store.add_task(running("t"))
    await store.finish(ledger("t"), completed(), webhook())
    await store.keep_webhook(webhook(state=Told.DELIVERED, next_time=None, tries=1))
    await store.finish(ledger("t"), completed(), webhook())
    # And does not begin it anew.
    assert await due(store) == []
    assert (await store.webhook("t") or webhook()).state is Told.DELIVERED


async def test_end_that_is_refused_has_no_webhook(store: Store) -> None:
    store.add_task(running("t"))
    store.add_task(running("u"))
    # In one batch with one that is in order.
    stale = store.finish(ledger("t", 2), completed(), webhook())
    unqueued = store.end_queued("t", failed(), webhook())
    good = store.finish(ledger("u"), completed(), webhook("u"))
    with pytest.raises(StaleAttempt):
        await stale
    with pytest.raises(StaleAttempt):
        await unqueued
    await good
    assert await due(store) == ["u"]


async def test_task_without_a_callback_has_none(store: Store) -> None:
    store.add_task(running("t"))
    await store.finish(ledger("t"), completed())
    assert await store.webhook("t") is None
    assert not store.webhook_news.is_set()


async def test_webhooks_survive(url: str) -> None:
    store = await Store.open(url)
    await ended(store, webhook())
    await store.close()
    store = await Store.open(url)
    assert await due(store) == ["t"]
    await store.close()


async def test_try_is_kept_and_an_earlier_one_does_not_undo_it(store: Store) -> None:
    await ended(store, webhook())
    second = webhook(tries=2, next_time=NOW + 3 * SECOND, tries_json=b"[2]")
    await store.keep_webhook(second)
    await store.keep_webhook(webhook(tries=1, tries_json=b"[1]"))
    assert await store.webhook("t") == second
    assert await store.next_webhook_time(NOW) == NOW + 3 * SECOND
    assert await store.waiting_webhooks(10) == 1
    await store.keep_webhook(webhook(tries=3, state=Told.GIVEN_UP, next_time=None))
    assert await store.next_webhook_time(NOW) is None
    assert await store.waiting_webhooks(10) == 0


async def test_once_more_is_from_the_beginning_and_a_try_that_is_under_way_does_not_undo_it(store: Store) -> None:
    await ended(store, webhook())
    await store.keep_webhook(webhook(tries=1, state=Told.GIVEN_UP, next_time=None))
    assert await due(store) == []
    await store.redeliver_webhook("t", NOW + SECOND)
    again = await store.webhook("t")
    assert again == webhook(tries=1, create_time=NOW + SECOND, next_time=NOW + SECOND)
    await store.redeliver_webhook("t", NOW)
    # It had begun before, and ends after that was asked for.
    await store.keep_webhook(webhook(create_time=NOW + SECOND, tries=2, state=Told.DELIVERED, tries_json=b"[2]"))
    assert await store.webhook("t") == webhook(tries=2, tries_json=b"[2]")
    assert await due(store) == ["t"]
    with pytest.raises(NotFound):
        await store.redeliver_webhook("none", NOW)


async def test_longest_due_come_first_and_others_not(store: Store) -> None:
    await ended(
        store,
        webhook("a", next_time=NOW),
        webhook("b", next_time=NOW - SECOND),
        webhook("c", next_time=NOW + 2 * SECOND),
        webhook("d", next_time=NOW - 2 * SECOND, host="other.example"),
        webhook("e", next_time=NOW - 3 * SECOND, workspace_uid="w-2"),
    )
    assert await due(store) == ["e", "d", "b", "a"]
    assert await due(store, 2) == ["e", "d"]
    assert await due(store, hosts=["other.example"], workspaces=["w-2"], tasks=["b"]) == ["a"]
    assert await store.next_webhook_time(NOW + SECOND) == NOW + 2 * SECOND
    assert await store.waiting_webhooks(3) == 3


async def test_workspace_has_one_secret_whoever_comes_first(store: Store) -> None:
    assert await store.webhook_secret("w") is None
    made = [WebhookSecret(workspace_uid="w", secret=bytes([n]) * 32, create_time=NOW) for n in range(2)]
    assert await asyncio.gather(*map(store.add_webhook_secret, made)) == [made[0], made[0]]
    later = WebhookSecret(
        workspace_uid="w", secret=b"2" * 32, create_time=NOW + timedelta(days=1), previous_secret=made[0].secret
    )
    await store.put_webhook_secret(later)
    assert await store.webhook_secret("w") == later
