"""Figures for Prometheus, for the operator of the node; off unless a listener is configured.

Nothing is counted on the way of a request: everything is read off its owner when somebody asks.
"""

import asyncio
from collections.abc import Iterator
from typing import Final

import structlog
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from nodedaemon.execute import Executor
from nodedaemon.gpus import Gpus
from nodedaemon.replicas import Replicas, State
from nodedaemon.session import Session
from nodedaemon.spool import Spool

log = structlog.get_logger()

#: Of a scrape's head, and for the whole of it.
REQUEST_BYTES: Final = 8 * 1024
REQUEST_S: Final = 5.0


class NodeCollector(Collector):
    """Reads the daemon's parts."""

    def __init__(self, executor: Executor, spool: Spool, session: Session, replicas: Replicas, gpus: Gpus) -> None:
        self._executor = executor
        self._spool = spool
        self._session = session
        self._replicas = replicas
        self._gpus = gpus

    def collect(self) -> Iterator[Metric]:
        """One scrape."""
        attempts = CounterMetricFamily(
            "ngpu_node_attempts", "Attempts that ended, by reason of failure; `answered`: none", labels=["reason"]
        )
        for reason, count in self._executor.ended.items():
            attempts.add_metric([reason or "answered"], count)
        yield attempts
        yield GaugeMetricFamily("ngpu_node_attempts_running", "Attempts that run", self._executor.running)
        yield GaugeMetricFamily("ngpu_node_spool_results", "Results not yet acknowledged", len(self._spool))
        yield GaugeMetricFamily("ngpu_node_spool_memory_bytes", "Results in memory", self._spool.memory_bytes)
        yield GaugeMetricFamily("ngpu_node_spool_disk_bytes", "Bodies and results on disk", self._spool.used_bytes)
        yield GaugeMetricFamily("ngpu_node_session_up", "1 while a session is up", int(self._session.up))
        yield CounterMetricFamily("ngpu_node_sessions", "Sessions begun", self._session.sessions)
        replicas = GaugeMetricFamily("ngpu_node_replicas", "Replicas, by state", labels=["state"])
        states = [report.state for report in self._replicas.reports()]
        for state in State:
            replicas.add_metric([state.name.lower()], states.count(state))
        yield replicas
        utilization = GaugeMetricFamily("ngpu_node_gpu_utilization", "GPU busy, 0 to 100", labels=["gpu"])
        memory = GaugeMetricFamily("ngpu_node_gpu_memory_used_bytes", "GPU memory in use", labels=["gpu"])
        temperature = GaugeMetricFamily("ngpu_node_gpu_temperature_celsius", "GPU temperature", labels=["gpu"])
        for reading in self._gpus.readings():
            for family, value in (
                (utilization, reading.utilization),
                (memory, reading.memory_used_bytes),
                (temperature, reading.temperature_c),
            ):
                if value is not None:
                    family.add_metric([reading.gpu_id], value)
        yield from (utilization, memory, temperature)


class MetricsServer:
    """Answers `GET /metrics`, one request a connection, in the event loop: where what it reads stands still."""

    def __init__(self, collector: Collector) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(collector)
        ProcessCollector(registry=self._registry)
        self._server: asyncio.Server | None = None

    async def start(self, host: str, port: int) -> str:
        """Listen; the address with the port taken. Raises OSError."""
        self._server = await asyncio.start_server(self._serve, host, port, limit=REQUEST_BYTES)
        port = self._server.sockets[0].getsockname()[1]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    async def stop(self) -> None:
        """Listen no more."""
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(REQUEST_S):
                line = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n", 1)[0]
                found = line.split(b" ")[:2] == [b"GET", b"/metrics"]
                body = generate_latest(self._registry) if found else b"there is only GET /metrics\n"
                status = "200 OK" if found else "404 Not Found"
                head = f"HTTP/1.1 {status}\r\nContent-Type: {CONTENT_TYPE_PLAIN_0_0_4}\r\nContent-Length: {len(body)}"
                writer.write(f"{head}\r\nConnection: close\r\n\r\n".encode() + body)
                await writer.drain()
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as fault:
            log.debug("metrics_request_failed", reason=repr(fault))
        finally:
            writer.close()
