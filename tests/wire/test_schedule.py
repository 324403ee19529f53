"""Schedule and Query: what a caller gives and gets."""

from tests.wire.house import House, request
from tests.wire.node import Node


async def test_answer_of_the_container_comes_back(there: House, node: Node) -> None:
    workspace = await there.operator.workspace()
    await there.operator.ready("echo")
    answer = await there.bridge.schedule(request(workspace, "/a/b", b"hello", wait_s=10))
    assert answer.response.status == 200
    assert answer.response.body.inline == b"hello"
