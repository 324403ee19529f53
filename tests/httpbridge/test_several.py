"""Several control planes of which one is active: the bridge finds it, and finds the next when that one is gone."""

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from ngpu.v1 import task_pb2 as pb

from httpbridge.calls import ControlPlane
from httpbridge.config import load
from httpbridge.errors import ConfigFault
from tests.httpbridge.fake_controlplane import TOKEN, WORKSPACE, FakeControlPlane

LIMIT_S = 10.0


async def is_up(control_plane: ControlPlane, *, up: bool) -> None:
    async with asyncio.timeout(LIMIT_S):
        while control_plane.batch.is_up is not up:
            await asyncio.sleep(0.01)


async def test_bridge_moves_with_calls_and_bodies_to_the_one_that_answers() -> None:
    first, second = FakeControlPlane(), FakeControlPlane()
    async with AsyncExitStack() as stack:
        await second.start()
        await second.stop()  # its port is known now: it stands by
        await stack.enter_async_context(first)
        stack.push_async_callback(second.stop)
        control_plane = await stack.enter_async_context(
            ControlPlane(f"{second.address},{first.address}", lambda: TOKEN)
        )
        run = asyncio.create_task(control_plane.run())
        for here, other in ((first, second), (second, first)):
            await is_up(control_plane, up=True)
            upload = await control_plane.upload(b"x" * 100_000, workspace_id=WORKSPACE)
            request = pb.ScheduleRequest(workspace_id=WORKSPACE)
            request.request.method = "POST"
            request.request.body.upload_id = upload
            request.request.body.size = 100_000
            await control_plane.schedule(request)
            assert (len(here.scheduled), here.upload_requests != []) == (1, True)
            await control_plane.workspace(WORKSPACE, "")
            if here is first:
                await first.stop()
                await is_up(control_plane, up=False)
                await other.start()
        run.cancel()
        await asyncio.gather(run, return_exceptions=True)


def test_each_address_of_several_must_be_one_and_be_safe(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(TOKEN)
    given = {"token_file": token}
    assert load(None, {**given, "controlplane": "cp-1:1,cp-2:2", "tls": True}).controlplane == "cp-1:1,cp-2:2"
    with pytest.raises(ConfigFault, match="no HOST:PORT"):
        load(None, {**given, "controlplane": "127.0.0.1:1,nothing"})
    with pytest.raises(ConfigFault, match="without TLS"):
        load(None, {**given, "controlplane": "127.0.0.1:1,192.0.2.1:1"})
