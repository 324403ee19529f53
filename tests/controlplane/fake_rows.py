"""The store's part that the fleet uses, in memory: obeys its promises, and fails when told to."""

import asyncio
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

from controlplane import model
from controlplane.errors import Conflict, NotFound, Unavailable


class FakeRows:
    """Writes happen at the next turn of the loop, in the order of the calls.

    `fail_in`: the write after so many more raises Unavailable; `fail_after_write`: having been made.
    """

    def __init__(self) -> None:
        self.workspace: dict[str, model.Workspace] = {}
        self.route: dict[str, model.Route] = {}
        self.node: dict[str, model.Node] = {}
        self.replica: dict[str, model.Replica] = {}
        self.tokens: dict[str, str] = {}
        self.writes: list[str] = []
        self.fail_in: int | None = None
        self.fail_after_write = False

    async def workspaces(self) -> list[model.Workspace]:
        return [row.model_copy() for row in self.workspace.values()]

    async def routes(self) -> list[model.Route]:
        return [row.model_copy() for row in self.route.values()]

    async def nodes(self) -> list[model.Node]:
        return [row.model_copy() for row in self.node.values()]

    async def replicas(self) -> list[model.Replica]:
        return [row.model_copy() for row in self.replica.values() if row.gone_time is None]

    def add_workspace(self, row: model.Workspace) -> asyncio.Future[None]:
        def write() -> None:
            if any(other.name == row.name and other.delete_time is None for other in self.workspace.values()):
                raise Conflict
            self.workspace[row.uid] = row.model_copy()

        return self._write("add_workspace", write)

    def update_workspace(self, row: model.Workspace) -> asyncio.Future[None]:
        return self._write("update_workspace", lambda: _replace(self.workspace, row.uid, row))

    def delete_workspace(self, uid: str, now: datetime) -> asyncio.Future[None]:
        def write() -> None:
            self.workspace[uid].delete_time = self.workspace[uid].delete_time or now
            self.route = {name: row for name, row in self.route.items() if row.workspace_uid != uid}

        return self._write("delete_workspace", write)

    def put_route(self, row: model.Route) -> asyncio.Future[None]:
        return self._write("put_route", lambda: self.route.__setitem__(row.name, row.model_copy()))

    def delete_route(self, name: str) -> asyncio.Future[None]:
        return self._write("delete_route", lambda: self.route.pop(name, None))

    def enroll_node(self, row: model.Node, token_id: str) -> asyncio.Future[None]:
        def write() -> None:
            if self.tokens.setdefault(token_id, row.addr) != row.addr:
                raise Conflict("The token was used by another node.")
            self.node[row.addr] = row.model_copy()

        return self._write("enroll_node", write)

    def update_node(self, row: model.Node) -> asyncio.Future[None]:
        return self._write("update_node", lambda: _replace(self.node, row.addr, row))

    def add_replicas(self, rows: Sequence[model.Replica]) -> asyncio.Future[None]:
        def write() -> None:
            if any(row.id in self.replica for row in rows):
                raise Conflict
            self.replica.update({row.id: row.model_copy() for row in rows})

        return self._write("add_replicas", write)

    def update_replicas(self, rows: Sequence[model.Replica]) -> asyncio.Future[None]:
        def write() -> None:
            for row in rows:
                _replace(self.replica, row.id, row)

        return self._write("update_replicas", write)

    def _write(self, name: str, write: Callable[[], Any]) -> asyncio.Future[None]:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        failing = self.fail_in == 0
        if self.fail_in is not None:
            self.fail_in -= 1

        def now() -> None:
            assert not done.cancelled(), "a write must not be cancelled: it may be half way to the disk"
            if not failing or self.fail_after_write:
                try:
                    write()
                except (Conflict, NotFound) as error:
                    done.set_exception(error)
                    return
                self.writes.append(name)
            if failing:
                done.set_exception(Unavailable())
            else:
                done.set_result(None)

        asyncio.get_running_loop().call_soon(now)
        return done


def _replace(rows: dict[str, Any], key: str, row: Any) -> None:
    if key not in rows:
        raise NotFound
    rows[key] = row.model_copy()
