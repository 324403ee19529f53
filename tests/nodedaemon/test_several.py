"""Several control planes of which one is active: the node finds it, and finds the next when that one is gone."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest

from nodedaemon.config import load
from nodedaemon.errors import ConfigFault
from tests.nodedaemon.fakes import SOON_S, FakeControlPlane
from tests.nodedaemon.test_session import Node

BODY = b"x" * 100_000


@pytest.fixture
async def planes() -> AsyncIterator[list[FakeControlPlane]]:
    """The second does not listen yet."""
    planes = [FakeControlPlane(), FakeControlPlane()]
    async with AsyncExitStack() as stack:
        for plane in planes:
            plane.address = f"127.0.0.1:{plane.server.add_insecure_port('127.0.0.1:0')}"
            stack.push_async_callback(plane.stop)
        await planes[0].server.start()
        yield planes


async def test_node_moves_with_its_bodies_to_the_one_that_answers(
    planes: list[FakeControlPlane], tmp_path: Path
) -> None:
    first, second = planes
    node = Node(SimpleNamespace(address=f"{second.address},{first.address}"), tmp_path)  # type: ignore[arg-type]
    for plane in planes:
        plane.nodes.add(node.identity.address)
        plane.requests["t.1"] = BODY
    assert await fetched(node) == BODY
    assert first.fetches == [0]
    await first.report()
    await second.server.start()
    await first.stop()
    await second.report()
    assert await fetched(node) == BODY
    assert second.fetches == [0]
    await node.stop()
    await node.bulk.shut()


async def fetched(node: Node) -> bytes:
    async with asyncio.timeout(SOON_S):
        return b"".join([piece async for piece in node.bulk.fetch("t.1", 0, len(BODY))])


def test_each_address_of_several_must_be_one_and_be_safe() -> None:
    assert load(None, {"controlplane": "cp-1:1,cp-2:2", "tls": True}).controlplane == "cp-1:1,cp-2:2"
    with pytest.raises(ConfigFault, match="no HOST:PORT"):
        load(None, {"controlplane": "127.0.0.1:1,nothing"})
    with pytest.raises(ConfigFault, match="without TLS"):
        load(None, {"controlplane": "127.0.0.1:1,192.0.2.1:1"})
