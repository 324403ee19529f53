"""What Prometheus reads off a node."""

import asyncio
from collections import Counter
from types import SimpleNamespace
from typing import Any

from nodedaemon.gpus import GpuReading
from nodedaemon.metrics import MetricsServer, NodeCollector
from nodedaemon.replicas import ReplicaReport, State
from tests.nodedaemon.fakes import FakeGpus


def collector() -> NodeCollector:
    executor: Any = SimpleNamespace(ended=Counter({"": 3, "CANCELLED": 1}), running=2)
    session: Any = SimpleNamespace(up=True, sessions=4)
    replicas: Any = SimpleNamespace(reports=lambda: (ReplicaReport("r-1", State.READY),))
    spool: Any = type("Spool", (), {"memory_bytes": 10, "used_bytes": 20, "__len__": lambda _: 5})()
    gpus: Any = FakeGpus(now=(GpuReading("GPU-1", utilization=7),))
    return NodeCollector(executor, spool, session, replicas, gpus)


async def get(address: str, target: str) -> str:
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    answer = (await reader.read()).decode()
    writer.close()
    await writer.wait_closed()
    return answer


async def test_figures_are_those_of_the_parts() -> None:
    server = MetricsServer(collector())
    address = await server.start("127.0.0.1", 0)
    try:
        answer = await get(address, "/metrics")
        assert answer.startswith("HTTP/1.1 200 OK")
        for line in (
            'ngpu_node_attempts_total{reason="answered"} 3.0',
            'ngpu_node_attempts_total{reason="CANCELLED"} 1.0',
            "ngpu_node_attempts_running 2.0",
            "ngpu_node_spool_results 5.0",
            "ngpu_node_session_up 1.0",
            'ngpu_node_replicas{state="ready"} 1.0',
            'ngpu_node_gpu_utilization{gpu="GPU-1"} 7.0',
        ):
            assert line in answer
        assert (await get(address, "/")).startswith("HTTP/1.1 404")
    finally:
        await server.stop()
