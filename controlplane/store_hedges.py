"""Second attempts, as SQL: rows of the ledger that are there from before their start, and replaced at their end.

So that whatever ran is in the ledger, even if nobody is left who could say how it ended.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from controlplane import store_tasks, store_webhooks
from controlplane.model import AttemptTable
from controlplane.store_database import table_of

Row = dict[str, Any]

_attempt: Final = table_of(AttemptTable)
_KEY: Final = ("task_id", "number")


def _upsert(insert: Any) -> Any:
    values = {column.name: insert.excluded[column.name] for column in _attempt.c if column.name not in _KEY}
    return insert.on_conflict_do_update(index_elements=list(_KEY), set_=values)


_PUT: Final[Mapping[str, sa.Insert]] = {
    "sqlite": _upsert(sqlite.insert(_attempt)),
    "postgresql": _upsert(postgresql.insert(_attempt)),
}


def put(connection: sa.Connection, row: Row) -> None:
    """Into the ledger, in the place of what was said of it before."""
    connection.execute(_PUT[connection.dialect.name], row)


def finish(connection: sa.Connection, items: Sequence[tuple[tuple[Row, Row], Row | None, Row]]) -> Sequence[None]:
    """RUNNING -> ended, with the answer of the second attempt.

    Items: what `store_tasks.finish` takes, of the first attempt; the webhook's row, if there is one; the second's row.
    """
    for item, webhook, second in items:
        if webhook is None:
            store_tasks.finish(connection, [item])
        else:
            store_webhooks.finish(connection, [(item, webhook)])
        put(connection, second)
    return [None] * len(items)
