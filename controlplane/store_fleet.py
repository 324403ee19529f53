"""Workspaces, routes, nodes, replicas and tokens, as SQL. Rare beside tasks: written for clearness, not for speed.

As with tasks, every write may be given twice.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final, TypeVar

import sqlalchemy as sa
from sqlalchemy import exc
from sqlmodel import SQLModel

from controlplane.errors import Conflict, NotFound, Unauthenticated
from controlplane.model import (
    Node,
    NodeTable,
    Replica,
    ReplicaTable,
    Role,
    Route,
    RouteTable,
    Token,
    TokenTable,
    Workspace,
    WorkspaceTable,
)
from controlplane.store_database import table_of

_workspace: Final = table_of(WorkspaceTable)
_route: Final = table_of(RouteTable)
_node: Final = table_of(NodeTable)
_replica: Final = table_of(ReplicaTable)
_token: Final = table_of(TokenTable)

_TABLE_OF: Final[Mapping[type[SQLModel], sa.Table]] = {
    Workspace: _workspace,
    Route: _route,
    Node: _node,
    Replica: _replica,
    Token: _token,
}

Value = TypeVar("Value", bound=SQLModel)


def _key(row: SQLModel) -> sa.ColumnElement[bool]:
    (column,) = _TABLE_OF[type(row)].primary_key
    return sa.literal(getattr(row, column.name)) == column


def add(connection: sa.Connection, rows: Sequence[SQLModel]) -> None:
    """Insert rows of one kind. One that is there just so is no error. Raises Conflict."""
    for row in rows:
        table = _TABLE_OF[type(row)]
        try:
            with connection.begin_nested():
                connection.execute(sa.insert(table), row.__dict__)
        except exc.IntegrityError as error:
            known = connection.execute(sa.select(table).where(_key(row))).mappings().first()
            if known is None or type(row)(**known) != row:
                raise Conflict from error


def update(connection: sa.Connection, rows: Sequence[SQLModel]) -> None:
    """Write all columns of known rows. Raises NotFound, Conflict."""
    for row in rows:
        try:
            done = connection.execute(sa.update(_TABLE_OF[type(row)]).where(_key(row)), row.__dict__).rowcount
        except exc.IntegrityError as error:
            raise Conflict from error
        if not done:
            raise NotFound


def read(
    connection: sa.Connection, kind: type[Value], *order: str, where: sa.ColumnElement[bool] | None = None
) -> list[Value]:
    """All rows of a kind, or those where that holds, in order of these columns."""
    table = _TABLE_OF[kind]
    statement = sa.select(table).order_by(*(table.c[name] for name in order))
    if where is not None:
        statement = statement.where(where)
    return [kind(**row) for row in connection.execute(statement).mappings()]


def replicas_there(connection: sa.Connection) -> list[Replica]:
    """Replicas not known to be gone, oldest first."""
    return read(connection, Replica, "create_time", "id", where=_replica.c.gone_time.is_(None))


def replica(connection: sa.Connection, replica_id: str) -> Replica | None:
    """The one with that id, also if it is gone."""
    return next(iter(read(connection, Replica, where=_replica.c.id == replica_id)), None)


def delete_workspace(connection: sa.Connection, uid: str, now: datetime) -> None:
    """Mark it deleted and delete its routes. Raises NotFound."""
    _stamp(connection, _workspace.c.uid == uid, _workspace.c.delete_time, now)
    connection.execute(sa.delete(_route).where(_route.c.workspace_uid == uid))


def put_route(connection: sa.Connection, row: Route) -> None:
    """Add the route, or replace the one of that name."""
    delete_route(connection, row.name)
    connection.execute(sa.insert(_route), row.__dict__)


def delete_route(connection: sa.Connection, name: str) -> None:
    """No error if there is none."""
    connection.execute(sa.delete(_route).where(_route.c.name == name))


def enroll_node(connection: sa.Connection, row: Node, token_id: str) -> None:
    """Add the node and spend the token on it. Raises Conflict, Unauthenticated."""
    usable = (
        (_token.c.role == Role.NODE)
        & (_token.c.used_by == "")
        & _token.c.revoke_time.is_(None)
        & (_token.c.expire_time.is_(None) | (_token.c.expire_time > row.enroll_time))
    )
    use = sa.update(_token).where(_token.c.id == token_id, usable)
    # Decided by the UPDATE itself, so that of two nodes only one can win; reading is for the words.
    if not connection.execute(use.values(used_by=row.addr, use_time=row.enroll_time)).rowcount:
        _refuse_token(read(connection, Token, where=_token.c.id == token_id), row.addr)
    add(connection, [row])


def _refuse_token(found: Sequence[Token], node_addr: str) -> None:
    """Raise Unauthenticated, unless the token was spent on this very node."""
    if not found or found[0].role != Role.NODE:
        raise Unauthenticated("The token is not known here: make one with `ngpu token create --role node`.")
    if found[0].used_by == node_addr:
        return
    if found[0].used_by:
        raise Unauthenticated("The token was used by another node: make one for each.")
    if found[0].revoke_time is not None:
        raise Unauthenticated("The token was revoked.")
    raise Unauthenticated("The token has expired: make a new one with `ngpu token create --role node`.")


def revoke_token(connection: sa.Connection, token_id: str, now: datetime) -> None:
    """Set its `revoke_time`, once. Raises NotFound."""
    _stamp(connection, _token.c.id == token_id, _token.c.revoke_time, now)


def _stamp(connection: sa.Connection, which: sa.ColumnElement[bool], column: sa.Column[Any], now: datetime) -> None:
    """Set a time; one that is set stays. Raises NotFound if there is no such row."""
    stamped = (
        sa.update(column.table).where(which).values({column: sa.func.coalesce(column, sa.literal(now, column.type))})
    )
    if not connection.execute(stamped).rowcount:
        raise NotFound
