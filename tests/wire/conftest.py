"""A fresh control plane for each test that asks for one."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.wire.house import House, house
from tests.wire.node import Node


@pytest.fixture
async def there(tmp_path: Path) -> AsyncIterator[House]:
    """A control plane without nodes."""
    async with house(tmp_path) as running:
        yield running


@pytest.fixture
async def node(there: House) -> AsyncIterator[Node]:
    """A node of it that answers with what it is sent."""
    node = Node(there)
    await node.join()
    async with node.up():
        yield node
