"""`ngpu-bridge` as a process: its address file, TLS on both sides, its end, and what it says when it cannot start."""

import asyncio
import signal
import ssl
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from tests.httpbridge.conftest import BEARER
from tests.httpbridge.fake_controlplane import TOKEN, Answer, Exchange, FakeControlPlane


@asynccontextmanager
async def program(state_dir: Path, *arguments: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """The process and its address."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "httpbridge", "--listen", "127.0.0.1:0", "--state-dir", str(state_dir), *arguments,
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        while not (state_dir / "address").exists():
            assert process.returncode is None, await process.stderr.read() if process.stderr else b""
            await asyncio.sleep(0.02)
        yield process, (state_dir / "address").read_text()
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def until_ready(client: aiohttp.ClientSession, url: str) -> None:
    while True:
        async with client.get(f"{url}/readyz") as response:
            if response.status == 200:
                return
        await asyncio.sleep(0.02)


async def test_it_serves_and_ends_what_it_has_begun(fake: FakeControlPlane, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(TOKEN)
    reached, go_on = asyncio.Event(), asyncio.Event()

    async def container(exchange: Exchange) -> Answer:
        reached.set()
        await go_on.wait()
        return Answer(b"done")

    fake.container = container
    options = ("--controlplane", fake.address, "--token-file", str(token))
    async with program(tmp_path / "state", *options) as (process, address), aiohttp.ClientSession() as client:
        url = f"http://{address}"
        await until_ready(client, url)
        call = asyncio.create_task(client.post(f"{url}/user/x", headers=BEARER, json={"data": ""}))
        await reached.wait()
        process.send_signal(signal.SIGTERM)
        while (tmp_path / "state/address").exists() and not go_on.is_set():
            # New connections are refused at once.
            try:
                await client.get(f"{url}/healthz")
            except aiohttp.ClientError:
                go_on.set()
        async with await call as response:
            assert (response.status, (await response.json())["data"]) == (200, "done")
        assert await process.wait() == 0
        assert not (tmp_path / "state/address").exists()


async def test_tls_on_both_sides(fake: FakeControlPlane, tmp_path: Path) -> None:
    certificate, key = await self_signed(tmp_path)
    fake.tls = (key.read_bytes(), certificate.read_bytes())
    await fake.stop()
    await fake.start()
    token = tmp_path / "token"
    token.write_text(TOKEN)
    settings = tmp_path / "bridge.toml"
    settings.write_text(f'tls_cert = "{certificate}"\ntls_key = "{key}"\ntoken_file = "{token}"\n')
    options = ("--config", str(settings), "--controlplane", fake.address.replace("127.0.0.1", "localhost"))
    trust = ssl.create_default_context(cafile=str(certificate))
    async with (
        program(tmp_path / "state", *options, "--tls-ca", str(certificate)) as (_, address),
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=trust)) as client,
    ):
        url = f"https://localhost:{address.rpartition(':')[2]}"
        await until_ready(client, url)
        async with client.post(f"{url}/user/img2img", json={"data": "x"}) as response:
            assert (await response.json())["data"] == "x"


async def self_signed(directory: Path) -> tuple[Path, Path]:
    certificate, key = directory / "cert.pem", directory / "key.pem"
    process = await asyncio.create_subprocess_exec(
        "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1",
        "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
        "-keyout", str(key), "-out", str(certificate), stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    assert await process.wait() == 0
    return certificate, key


async def run(*arguments: str, **environment: str) -> tuple[int | None, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "httpbridge", *arguments,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, env={"COLUMNS": "160", **environment},
    )  # fmt: skip
    output, _ = await process.communicate()
    return process.returncode, output.decode()


async def test_faults_are_told_all_at_once_and_without_a_traceback(tmp_path: Path) -> None:
    status, said = await run("--listen", "nowhere", NGPU_BRIDGE_SYNC_WAIT="soon", NGPU_BRIDGE_NONSENSE="1")
    assert status == 2
    for word in ("listen", "sync_wait", "NGPU_BRIDGE_NONSENSE", "token_file"):
        assert word in said
    assert "Traceback" not in said


@pytest.mark.parametrize("option", ["--help", "--settings"])
async def test_it_teaches(option: str) -> None:
    status, said = await run(option)
    assert status == 0
    for word in ("controlplane", "token", "listen"):
        assert word in said


async def test_an_address_in_use(tmp_path: Path, fake: FakeControlPlane) -> None:
    token = tmp_path / "token"
    token.write_text(TOKEN)
    status, said = await run("--listen", fake.address, "--token-file", str(token), "--state-dir", str(tmp_path))
    assert status == 1
    assert "address already in use" in said
    assert "Traceback" not in said
