"""Webhooks and their secrets, as SQL.

A webhook is written in the very transaction that ends its task, so that no kill can come between the two. As with
tasks, every write may be given twice.
"""

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Any, Final

import sqlalchemy as sa

from controlplane import store_tasks
from controlplane.errors import NotFound
from controlplane.model import TO_TELL, Told, Webhook, WebhookSecret, WebhookSecretTable, WebhookTable
from controlplane.store_database import table_of
from controlplane.store_statement import Row, add_or_not

_webhook: Final = table_of(WebhookTable)
_secret: Final = table_of(WebhookSecretTable)
_c: Final = _webhook.c


_ADD: Final = add_or_not(_webhook)
_ADD_SECRET: Final = add_or_not(_secret)
_TRIED: Final = sa.update(_webhook).where(_c.task_id == sa.bindparam("of_task"), _c.tries < sa.bindparam("of_tries"))
#: What is set after a try, ...
_KEEP: Final = _TRIED.where(_c.create_time == sa.bindparam("of_time", type_=_c.create_time.type))
_KEPT: Final = ("state", "next_time", "tries", "tries_json")
#: ... and where once more was asked for meanwhile: it is posted again.
_KEEP_TRY: Final = _TRIED.where(_c.create_time != sa.bindparam("of_time", type_=_c.create_time.type))
_KEPT_TRY: Final = ("tries", "tries_json")


# Kinds of writes (store_writer.Kind).


def finish(connection: sa.Connection, items: Sequence[tuple[tuple[Row, Row], Row]]) -> Sequence[None]:
    """RUNNING -> ended, and a webhook. Items: what `store_tasks.finish` takes, the webhook's row."""
    results = store_tasks.finish(connection, [item for item, _ in items])
    connection.execute(_ADD[connection.dialect.name], [row for _, row in items])
    return results


def end_queued(connection: sa.Connection, items: Sequence[tuple[Row, Row]]) -> Sequence[None]:
    """QUEUED -> ended, and a webhook. Items: what `store_tasks.end_queued` takes, the webhook's row."""
    results = store_tasks.end_queued(connection, [item for item, _ in items])
    connection.execute(_ADD[connection.dialect.name], [row for _, row in items])
    return results


def keep(connection: sa.Connection, items: Sequence[Row]) -> Sequence[None]:
    """What came of a try. Items: a webhook's row. What is known of a later try stays."""
    of = [{"of_task": row["task_id"], "of_time": row["create_time"], "of_tries": row["tries"]} for row in items]
    for statement, columns in ((_KEEP, _KEPT), (_KEEP_TRY, _KEPT_TRY)):
        rows = zip(of, items, strict=True)
        connection.execute(statement, [which | {name: row[name] for name in columns} for which, row in rows])
    return [None] * len(items)


def redeliver(connection: sa.Connection, task_id: str, now: datetime) -> None:
    """Post it now, and as long as any that is new, whatever came of it. Raises NotFound."""
    anew = sa.update(_webhook).where(_c.task_id == task_id)
    if not connection.execute(anew.values(state=Told.WAITING, create_time=now, next_time=now)).rowcount:
        raise NotFound


def add_secret(connection: sa.Connection, row: WebhookSecret) -> WebhookSecret:
    """The workspace's secret: this one, if it had none."""
    connection.execute(_ADD_SECRET[connection.dialect.name], row.__dict__)
    known = secret(connection, row.workspace_uid)
    assert known is not None
    return known


def put_secret(connection: sa.Connection, row: WebhookSecret) -> None:
    """The workspace's secret from now on."""
    connection.execute(sa.update(_secret).where(_secret.c.workspace_uid == row.workspace_uid), row.__dict__)


# Reads.


def webhook(connection: sa.Connection, task_id: str) -> Webhook | None:
    """The webhook of that task."""
    row = connection.execute(sa.select(_webhook).where(_c.task_id == task_id)).mappings().first()
    return None if row is None else _value(row)


def due(
    connection: sa.Connection,
    before: datetime,
    limit: int,
    *,
    tasks: Collection[str],
    hosts: Collection[str],
    workspaces: Collection[str],
) -> list[Webhook]:
    """Webhooks to be posted before then, the longest due first; not of these tasks, hosts and workspaces."""
    statement = (
        sa.select(_webhook)
        .where(sa.text(TO_TELL), _c.next_time <= before)
        .where(_c.host.not_in(hosts), _c.workspace_uid.not_in(workspaces), _c.task_id.not_in(tasks))
        .order_by(_c.next_time)
        .limit(limit)
    )
    return [_value(row) for row in connection.execute(statement).mappings()]


def next_time(connection: sa.Connection, after: datetime) -> datetime | None:
    """When the first is due of those due after then."""
    return connection.scalar(
        sa.select(_c.next_time).where(sa.text(TO_TELL), _c.next_time > after).order_by(_c.next_time).limit(1)
    )


def waiting(connection: sa.Connection, limit: int) -> int:
    """How many are to be posted; counted up to a limit."""
    those = sa.select(_c.task_id).where(sa.text(TO_TELL)).limit(limit).subquery()
    return connection.scalar(sa.select(sa.func.count()).select_from(those)) or 0


def secret(connection: sa.Connection, workspace_uid: str) -> WebhookSecret | None:
    """The workspace's."""
    statement = sa.select(_secret).where(_secret.c.workspace_uid == workspace_uid)
    row = connection.execute(statement).mappings().first()
    return None if row is None else WebhookSecret(**row)


def _value(row: Mapping[Any, Any]) -> Webhook:
    return Webhook(**{**row, "state": Told(row["state"])})
