"""The control plane as a process: it starts alone, says where it is, shows how it fares, and stops in good order."""

import asyncio
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from ngpu.v1 import task_pb2 as pb

from tests.controlplane.databases import fresh_database
from tests.wire.house import Client, request, seconds, until
from tests.wire.node import Node, answered, hold

DEADLINE_S: Final = 30.0


class Process:
    """`ngpu-controlplane run` on a state directory."""

    def __init__(self, process: asyncio.subprocess.Process, state_dir: Path) -> None:
        self.process = process
        self.state_dir = state_dir

    @property
    def address(self) -> str:
        return (self.state_dir / "address").read_text().strip()

    @property
    def operator(self) -> Client:
        return self.client((self.state_dir / "operator.token").read_text().strip())

    @property
    def bridge(self) -> Client:
        return self.client((self.state_dir / "bridge.token").read_text().strip())

    def client(self, credential: str | None) -> Client:
        return Client(self.address, credential)

    async def get(self, path: str) -> tuple[int, str]:
        """Status and body of GET on the address for metrics."""
        host, _, port = (self.state_dir / "metrics_address").read_text().strip().rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        return int(head.split()[1]), body.decode()

    async def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        async with asyncio.timeout(DEADLINE_S):
            return await self.process.wait()


async def spawn(*arguments: str) -> asyncio.subprocess.Process:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NGPU_CONTROLPLANE_")}
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "controlplane", *arguments, stderr=asyncio.subprocess.PIPE, env=environment
    )


def options(state_dir: Path, *more: str) -> list[str]:
    listen = ["--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0"]
    return ["run", "--state-dir", str(state_dir), *listen, *more]


@asynccontextmanager
async def running(state_dir: Path, *more: str) -> AsyncIterator[Process]:
    process = await spawn(*options(state_dir, *more))
    drain = asyncio.create_task(process.stderr.read() if process.stderr else asyncio.sleep(0))
    try:
        await until(lambda: process.returncode is not None or (state_dir / "metrics_address").exists())
        assert process.returncode is None, await drain
        yield Process(process, state_dir)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        await drain


async def ended(*arguments: str) -> tuple[int, str]:
    """Exit status and what it said."""
    process = await spawn(*arguments)
    async with asyncio.timeout(DEADLINE_S):
        _, said = await process.communicate()
    assert process.returncode is not None
    return process.returncode, said.decode()


async def test_it_says_where_it_is_and_how_it_fares(tmp_path: Path) -> None:
    async with running(tmp_path) as there:
        assert await there.get("/healthz") == (200, "ok\n")
        assert await there.get("/readyz") == (200, "ready\n")
        status, text = await there.get("/metrics?x=1")
        assert status == 200
        for name in ("ngpu_nodes", "ngpu_task_seconds_bucket", "ngpu_store_writes_waiting", "process_resident_memory"):
            assert name in text
        assert (await there.get("/"))[0] == 404
        assert await there.end() == 0
    assert not (tmp_path / "address").exists()
    assert not (tmp_path / "metrics_address").exists()


async def test_what_happens_to_tasks_is_counted(tmp_path: Path) -> None:
    async with running(tmp_path) as there:
        operator, bridge = there.operator, there.bridge
        node = Node(there)  # type: ignore[arg-type]
        await node.join(await operator.join_token())
        workspace = await operator.workspace(concurrency=4)
        async with node.up():
            await operator.ready("echo")
            for _ in range(3):
                await bridge.schedule(request(workspace, wait_s=10))
            text = (await there.get("/metrics"))[1]
        for line in (
            'ngpu_tasks_accepted_total{workspace="echo"} 3.0',
            'ngpu_tasks_ended_total{reason="",state="completed",workspace="echo"} 3.0',
            'ngpu_calls_total{code="OK",method="Schedule"} 3.0',
            'ngpu_slots{state="free",workspace="echo"} 4.0',
            'ngpu_replicas{state="ready",workspace="echo"} 1.0',
            'ngpu_nodes{state="connected"} 1.0',
            "ngpu_task_seconds_count 3.0",
        ):
            assert line in text
        for client in (operator, bridge, node.client):
            await client.channel.close()
        assert await there.end(signal.SIGINT) == 0


async def test_two_never_share_a_state_directory_or_a_database(tmp_path: Path) -> None:
    async with running(tmp_path):
        code, said = await ended(*options(tmp_path))
        assert (code, "another control plane is running" in said) == (1, True)
        other = tmp_path / "other"
        code, said = await ended(*options(other, "--database-url", f"sqlite:///{tmp_path / 'ngpu.db'}"))
        assert (code, "another control plane is running" in said) == (1, True)
        assert "Traceback" not in said


async def test_address_that_is_taken_is_said_to_be(tmp_path: Path) -> None:
    async with running(tmp_path / "one") as there:
        code, said = await ended(
            "run", "--state-dir", str(tmp_path / "two"), "--listen", there.address, "--metrics-listen", ""
        )
        assert (code, there.address in said) == (1, True)
        taken = (tmp_path / "one" / "metrics_address").read_text().strip()
        code, said = await ended(
            "run", "--state-dir", str(tmp_path / "two"), "--listen", "127.0.0.1:0", "--metrics-listen", taken
        )
        assert (code, "Traceback" in said) == (1, False)


async def test_stop_answers_who_waits_and_loses_nothing(tmp_path: Path) -> None:
    async with running(tmp_path) as there:
        operator, bridge = there.operator, there.bridge
        node = Node(there, answer=hold)  # type: ignore[arg-type]
        await node.join(await operator.join_token())
        workspace = await operator.workspace()
        async with node.up():
            await operator.ready("echo")
            accepted = [(await bridge.schedule(request(workspace))).task.task_id for _ in range(20)]
            batch = bridge.tasks.Batch(metadata=bridge.auth)
            waits = pb.Call(id=1, schedule=request(workspace, wait_s=60))
            at_once = pb.Call(id=2, query=pb.QueryRequest(task_id=accepted[0]))
            await batch.write(pb.BatchRequest(calls=[waits, at_once]))
            # Answered, so the frame has been read and the other one waits.
            assert [answer.id for answer in (await batch.read()).answers] == [2]
            await node.started()
            stopping = asyncio.create_task(there.end())
            error = (await batch.read()).answers[0].error
            assert error.reason == "UNAVAILABLE"
            assert await stopping == 0
        for client in (operator, bridge, node.client):
            await client.channel.close()
    async with running(tmp_path) as again:
        bridge = again.bridge
        for task_id in accepted:
            answer = await bridge.tasks.Query(pb.QueryRequest(task_id=task_id), metadata=bridge.auth)
            assert answer.task.state in {pb.TASK_STATE_QUEUED, pb.TASK_STATE_RUNNING}
        await bridge.channel.close()


async def test_echo_of_a_signal_is_not_a_second_one(tmp_path: Path) -> None:
    async with running(tmp_path) as there:
        # Both are pending when it goes on: as when a whole group is signalled and its leader passes it on.
        there.process.send_signal(signal.SIGSTOP)
        there.process.send_signal(signal.SIGINT)
        there.process.send_signal(signal.SIGTERM)
        assert await there.end(signal.SIGCONT) == 0


async def test_it_speaks_tls(tmp_path: Path) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not there to make a certificate")
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    made = await asyncio.create_subprocess_exec(
        openssl,
        *("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"),
        *("-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(cert)),
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert await made.wait() == 0
    async with running(tmp_path / "state", "--tls-cert", str(cert), "--tls-key", str(key)) as there:
        port = there.address.rpartition(":")[2]
        credentials = grpc.ssl_channel_credentials(cert.read_bytes())
        async with grpc.aio.secure_channel(f"localhost:{port}", credentials) as channel:
            health: Any = health_pb2_grpc.HealthStub(channel)
            answer = await health.Check(health_pb2.HealthCheckRequest(), timeout=DEADLINE_S)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        async with grpc.aio.insecure_channel(f"localhost:{port}") as channel:
            plain: Any = health_pb2_grpc.HealthStub(channel)
            with pytest.raises(grpc.aio.AioRpcError):
                await plain.Check(health_pb2.HealthCheckRequest(), timeout=5)


async def test_stop_is_not_held_up_by_who_watches_our_health(tmp_path: Path) -> None:
    async with running(tmp_path) as there, grpc.aio.insecure_channel(there.address) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest())
        await watch.read()
        async with asyncio.timeout(5):
            assert await there.end() == 0


async def test_kill_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    async with running(tmp_path) as there:
        operator, bridge = there.operator, there.bridge
        node = Node(there, answer=hold)  # type: ignore[arg-type]
        await node.join(await operator.join_token())
        workspace = await operator.workspace(concurrency=3)
        async with node.up():
            await operator.ready("echo")
            accepted = [(await bridge.schedule(request(workspace))).task.task_id for _ in range(10)]
            await node.started(3)
            there.process.kill()
            await there.process.wait()
        for client in (operator, bridge, node.client):
            await client.channel.close()
    (tmp_path / "address").unlink()
    (tmp_path / "metrics_address").unlink()
    async with running(tmp_path) as again:
        bridge = again.bridge
        back = Node(again, answer=lambda start: answered(start.attempt_id, b"done"))  # type: ignore[arg-type]
        back.running = node.running
        async with back.up():
            for attempt_id in list(back.running):
                back.end(answered(attempt_id, b"resumed"))
            for number, task_id in enumerate(accepted):
                answer = await bridge.tasks.Query(
                    pb.QueryRequest(task_id=task_id, wait=seconds(20)), metadata=bridge.auth
                )
                assert (answer.task.state, answer.task.attempt) == (pb.TASK_STATE_COMPLETED, 1)
                assert answer.response.body.inline == (b"resumed" if number < 3 else b"done")
        for client in (bridge, back.client):
            await client.channel.close()


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
async def test_migrate_makes_the_database_ready(tmp_path: Path, kind: str) -> None:
    with fresh_database(kind, tmp_path) as url:
        state = tmp_path / "state"
        if kind == "postgresql":
            code, said = await ended(*options(state, "--database-url", url))
            assert (code, "run `ngpu-controlplane migrate`" in said) == (1, True)
        for _ in range(2):
            assert (await ended("migrate", "--state-dir", str(state), "--database-url", url))[0] == 0
        async with running(state, "--database-url", url) as there:
            assert (await there.get("/readyz"))[0] == 200
            assert await there.end() == 0


async def test_database_that_is_not_there_is_said_to_be(tmp_path: Path) -> None:
    code, said = await ended(*options(tmp_path, "--database-url", "postgresql+psycopg://nobody@127.0.0.1:1/none"))
    assert code == 1
    assert "ngpu-controlplane: " in said
    assert "Traceback" not in said
