"""Workspaces, routes, nodes, replicas and tokens in the store."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from controlplane.errors import Conflict, NotFound, Unauthenticated
from controlplane.model import Availability, Node, Replica, Role, Route, Token, Workspace
from controlplane.store import Store

NOW = datetime(2025, 1, 2, 3, 4, 5, 678_901, tzinfo=UTC)
SECOND = timedelta(seconds=1)


def workspace(uid: str = "w-1", name: str = "demo", **columns: Any) -> Workspace:
    values: dict[str, Any] = {
        "uid": uid,
        "id": f"{uid}-credential",
        "name": name,
        "spec_json": b"{}",
        "create_time": NOW,
    }
    return Workspace(**values | columns)


def node(addr: str = "0x1", name: str = "one") -> Node:
    return Node(addr=addr, name=name, enroll_time=NOW, inventory_json=b'{"cpus":2}')


def replica(replica_id: str, **columns: Any) -> Replica:
    values: dict[str, Any] = {
        "id": replica_id,
        "workspace_uid": "w-1",
        "node_addr": "0x1",
        "generation": 1,
        "create_time": NOW,
    }
    return Replica(**values | columns)


async def test_workspaces(store: Store) -> None:
    for _ in range(2):  # given twice
        await store.add_workspace(workspace())
    assert await store.workspaces() == [workspace()]
    changed = workspace(generation=2, spec_json=b'{"replicas":3}')
    await store.update_workspace(changed)
    assert await store.workspaces() == [changed]
    with pytest.raises(NotFound):
        await store.update_workspace(workspace("w-9", "none"))


async def test_a_name_is_one_living_workspaces_own(store: Store) -> None:
    await store.add_workspace(workspace("w-1", "demo"))
    await store.add_workspace(workspace("w-2", "other"))
    with pytest.raises(Conflict):
        await store.add_workspace(workspace("w-3", "demo"))
    with pytest.raises(Conflict):
        await store.update_workspace(workspace("w-2", "demo"))
    await store.delete_workspace("w-1", NOW + SECOND)
    await store.add_workspace(workspace("w-3", "demo", create_time=NOW + SECOND))
    assert [row.uid for row in await store.workspaces()] == ["w-1", "w-2", "w-3"]


async def test_a_deleted_workspace_keeps_its_row_and_loses_its_routes(store: Store) -> None:
    await store.add_workspace(workspace())
    await store.put_route(Route(name="a", workspace_uid="w-1", path="/a", create_time=NOW))
    await store.put_route(Route(name="b", workspace_uid="w-2", path="/b", create_time=NOW))
    for later in (SECOND, 2 * SECOND):
        await store.delete_workspace("w-1", NOW + later)
    (row,) = await store.workspaces()
    assert row.delete_time == NOW + SECOND
    assert [route.name for route in await store.routes()] == ["b"]
    with pytest.raises(NotFound):
        await store.delete_workspace("w-9", NOW)


async def test_routes_are_put_and_moved(store: Store) -> None:
    await store.put_route(Route(name="a", workspace_uid="w-1", path="/a", create_time=NOW))
    moved = Route(name="a", workspace_uid="w-2", port=8080, path="/b", create_time=NOW)
    for _ in range(2):
        await store.put_route(moved)
    assert await store.routes() == [moved]
    for _ in range(2):
        await store.delete_route("a")
    assert await store.routes() == []


async def test_nodes(store: Store) -> None:
    for token_id in ("t-1", "t-2", "t-3"):
        await store.add_token(join_token(token_id))
    for _ in range(2):
        await store.enroll_node(node(), "t-1")
    with pytest.raises(Conflict):
        await store.enroll_node(node("0x2", "one"), "t-2")
    with pytest.raises(Conflict):
        await store.enroll_node(node("0x1", "two"), "t-3")
    changed = node().model_copy(update={"availability": Availability.DRAINING, "last_seen_time": NOW})
    await store.update_node(changed)
    assert await store.nodes() == [changed]
    with pytest.raises(NotFound):
        await store.update_node(node("0x9", "nine"))
    # A token is spent only together with the node that it let in.
    assert [token.used_by for token in await store.tokens()] == ["0x1", "", ""]


async def test_replicas_are_placed_all_or_none(store: Store) -> None:
    await store.add_replicas([replica("r-1"), replica("r-2")])
    with pytest.raises(Conflict):
        await store.add_replicas([replica("r-3"), replica("r-2", generation=9)])
    assert [row.id for row in await store.replicas()] == ["r-1", "r-2"]
    with pytest.raises(NotFound):
        await store.update_replicas([replica("r-1", drain_time=NOW), replica("r-9")])
    assert await store.replicas() == [replica("r-1"), replica("r-2")]


async def test_replicas_are_there_until_they_are_gone(store: Store) -> None:
    await store.add_replicas([replica("r-2", create_time=NOW + SECOND), replica("r-1")])
    stopping, gone = replica("r-1", stop_time=NOW), replica("r-2", stop_time=NOW, gone_time=NOW)
    await store.update_replicas([stopping, gone])
    assert await store.replicas() == [stopping]


# Tokens.


def join_token(token_id: str = "t-1", **columns: Any) -> Token:
    values: dict[str, Any] = {"id": token_id, "secret_hash": token_id.encode(), "role": Role.NODE, "create_time": NOW}
    return Token(**values | columns)


async def test_tokens(store: Store) -> None:
    first, second = join_token(role=Role.OPERATOR, name="first"), join_token("t-0", create_time=NOW + SECOND)
    await store.add_token(second)
    await store.add_token(first)
    assert await store.tokens() == [first, second]
    with pytest.raises(Conflict):
        await store.add_token(join_token("t-2", secret_hash=b"t-1"))
    for later in (SECOND, 2 * SECOND):
        await store.revoke_token("t-1", NOW + later)
    assert [token.revoke_time for token in await store.tokens()] == [NOW + SECOND, None]
    with pytest.raises(NotFound):
        await store.revoke_token("t-9", NOW)


async def test_a_nodes_token_enrols_one_node_once(store: Store) -> None:
    await store.add_token(join_token())
    for _ in range(2):
        await store.enroll_node(node(), "t-1")
    with pytest.raises(Unauthenticated, match="another node"):
        await store.enroll_node(node("0x2", "two"), "t-1")
    assert await store.nodes() == [node()]
    (used,) = await store.tokens()
    assert (used.used_by, used.use_time) == ("0x1", NOW)


async def test_of_many_nodes_at_once_a_token_lets_in_one(store: Store) -> None:
    await store.add_token(join_token())
    enrolled = [store.enroll_node(node(f"0x{n}", f"n{n}"), "t-1") for n in range(10)]
    outcomes = await asyncio.gather(*enrolled, return_exceptions=True)
    assert outcomes.count(None) == 1
    assert len(await store.nodes()) == 1


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"role": Role.SERVICE}, "not known"),
        ({"revoke_time": NOW}, "revoked"),
        ({"expire_time": NOW}, "expired"),
        ({"used_by": "0x2"}, "another node"),
    ],
)
async def test_a_token_that_is_not_good_says_why(store: Store, columns: dict[str, Any], words: str) -> None:
    await store.add_token(join_token(**columns))
    with pytest.raises(Unauthenticated, match=words):
        await store.enroll_node(node(), "t-1")
    with pytest.raises(Unauthenticated, match="not known"):
        await store.enroll_node(node(), "t-9")
    assert await store.nodes() == []
