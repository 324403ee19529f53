"""A whole bridge over loopback HTTP, in front of a fake control plane over loopback gRPC."""

import asyncio
import io
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from multidict import CIMultiDictProxy
from yarl import URL

from httpbridge.__main__ import assemble
from httpbridge.about import About
from httpbridge.calls import ControlPlane
from httpbridge.config import Config
from tests.httpbridge.fake_controlplane import TOKEN, WORKSPACE, FakeControlPlane

BEARER = {"Authorization": f"Bearer {WORKSPACE}"}


@dataclass
class Bridge:
    """A running bridge and a client of it."""

    url: str
    port: int
    client: aiohttp.ClientSession
    control_plane: ControlPlane
    about: About

    async def call(
        self, method: str, path: str, *, headers: dict[str, str] | None = None, **options: Any
    ) -> tuple[int, dict[str, Any], CIMultiDictProxy[str]]:
        """Status, JSON, headers. The path goes out as it stands."""
        url = URL(self.url + path, encoded=True)
        if "json" in options:
            # A file, as aiohttp's client warns of large bodies that are not.
            options["data"] = io.BytesIO(msgspec.json.encode(options.pop("json")))
            headers = {"Content-Type": "application/json"} | (headers or {})
        async with self.client.request(method, url, headers=headers, **options) as response:
            assert response.headers["X-Request-Id"]
            assert response.content_type == "application/json"
            return response.status, await response.json(), response.headers

    async def get(self, path: str, **options: Any) -> tuple[int, dict[str, Any], CIMultiDictProxy[str]]:
        return await self.call("GET", path, **options)

    async def post(self, path: str, **options: Any) -> tuple[int, dict[str, Any], CIMultiDictProxy[str]]:
        return await self.call("POST", path, **options)

    async def raw(self, request: bytes) -> bytes:
        """Bytes out, bytes back until the bridge closes."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(request)
        await writer.drain()
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
        return answer


StartBridge = Callable[..., Any]


@pytest.fixture
async def fake() -> AsyncIterator[FakeControlPlane]:
    async with FakeControlPlane() as control_plane:
        yield control_plane


@pytest.fixture
async def start_bridge(fake: FakeControlPlane, tmp_path: Path) -> AsyncIterator[StartBridge]:
    """`await start_bridge(setting=value, ...)`: a Bridge, up and connected."""
    async with AsyncExitStack() as stack:

        async def start(*, connected: bool = True, **settings: Any) -> Bridge:
            token_file = tmp_path / "token"
            token_file.write_text(TOKEN)
            config = Config(controlplane=fake.address, token_file=token_file, state_dir=tmp_path, **settings)
            control_plane = await stack.enter_async_context(ControlPlane(config.controlplane, token_file.read_text))
            app, about = assemble(config, control_plane)
            run = asyncio.create_task(control_plane.run(), name="batch")

            async def stop() -> None:
                run.cancel()
                await asyncio.gather(run, return_exceptions=True)

            stack.push_async_callback(stop)
            connections = app.server()
            server = await asyncio.get_running_loop().create_server(connections, "127.0.0.1", 0)
            stack.push_async_callback(connections.shutdown, 1.0)
            stack.callback(server.close)
            port = server.sockets[0].getsockname()[1]
            client = await stack.enter_async_context(
                aiohttp.ClientSession(skip_auto_headers=["User-Agent", "Accept-Encoding"])
            )
            while connected and not control_plane.batch.is_up:
                await asyncio.sleep(0)
            return Bridge(f"http://127.0.0.1:{port}", port, client, control_plane, about)

        yield start


@pytest.fixture
async def bridge(start_bridge: StartBridge) -> Bridge:
    started: Bridge = await start_bridge()
    return started
