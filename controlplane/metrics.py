"""What is counted, and the small HTTP server that shows it: /metrics for Prometheus, /healthz and /readyz.

Counting is on the hot path and costs an addition; everything that can be seen by looking is looked at when Prometheus
asks, in the event loop, so that nothing needs a lock.
"""

import asyncio
import bisect
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, Final, Protocol

import structlog
from ngpu.settings import split_address
from prometheus_client import (
    CONTENT_TYPE_PLAIN_0_0_4,
    CollectorRegistry,
    GCCollector,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from controlplane.fleet import Fleet
from controlplane.health import Grade
from controlplane.model import State

#: Workspaces that are shown by name; the others are shown together as "other".
WORKSPACES: Final = 1000
#: Of one HTTP request; past it the connection is closed.
REQUEST_BYTES: Final = 8192
REQUEST_S: Final = 5.0

#: Upper bounds in seconds.
_BUCKETS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)

_log = structlog.get_logger(__name__)


class Histogram:
    """How many durations fell into which bucket, and their sum; in seconds."""

    def __init__(self) -> None:
        self.counts = [0] * (len(_BUCKETS) + 1)
        self.sum = 0.0

    def observe(self, seconds: float) -> None:
        """Count one."""
        self.counts[bisect.bisect_left(_BUCKETS, seconds)] += 1
        self.sum += seconds

    def family(self, name: str, words: str) -> Metric:
        """As Prometheus wants it."""
        total, buckets = 0, []
        for bound, count in zip((*map(str, _BUCKETS), "+Inf"), self.counts, strict=True):
            total += count
            buckets.append((bound, total))
        return HistogramMetricFamily(name, words, buckets=buckets, sum_value=self.sum)


class Metrics:
    """Counts what happens to tasks. `workspace` is a name."""

    def __init__(self) -> None:
        self.accepted: Counter[str] = Counter()
        self.ended: Counter[tuple[str, State, str]] = Counter()
        self.attempts_failed: Counter[str] = Counter()
        self.retries_held: Counter[str] = Counter()
        self.ahead: Counter[str] = Counter()
        self.hedges: Counter[tuple[str, str]] = Counter()
        self.waited = Histogram()
        self.took = Histogram()

    def task_accepted(self, workspace: str) -> None:
        """A task is on its way to the disk."""
        self.accepted[self._shown(workspace)] += 1

    def task_started(self, workspace: str, waited_s: float) -> None:  # noqa: ARG002
        """An attempt was given to a node, so long after the task's acceptance."""
        self.waited.observe(waited_s)

    def attempt_failed(self, workspace: str, reason: str) -> None:  # noqa: ARG002
        """An attempt ended without an answer of the container."""
        self.attempts_failed[reason] += 1

    def retry_held(self, workspace: str) -> None:
        """An attempt that is to run again is held back: its workspace has run too much again lately."""
        self.retries_held[self._shown(workspace)] += 1

    def sent_ahead(self, workspace: str) -> None:
        """A task was sent to its node ahead of its slot."""
        self.ahead[self._shown(workspace)] += 1

    def hedged(self, workspace: str, outcome: str) -> None:
        """Of a task's second attempt: `begun`, or `won`, if its answer was taken."""
        self.hedges[self._shown(workspace), outcome] += 1

    def task_ended(self, workspace: str, state: State, reason: str, seconds: float) -> None:
        """A task's end is on disk, so long after its acceptance. `reason`: of the failure, or empty."""
        self.ended[self._shown(workspace), state, reason] += 1
        self.took.observe(seconds)

    def _shown(self, workspace: str) -> str:
        return workspace if workspace in self.accepted or len(self.accepted) < WORKSPACES else "other"


class Tasks(Protocol):
    """What is asked of the dispatcher."""

    def queued(self, workspace_uid: str) -> int:
        """Tasks that wait."""

    def running(self, workspace_uid: str) -> int:
        """Tasks that run."""

    def running_on(self, replica_id: str) -> int:
        """Attempts in flight there."""

    def ejected(self, workspace_uid: str) -> tuple[int, int]:
        """Replicas that are ejected now, and how often one was."""


class Waiting(Protocol):
    """What is asked of the store."""

    @property
    def waiting(self) -> int:
        """Writes in the queue."""


class Posts(Protocol):
    """What is asked of the postings: counts since the start, and what is to be posted."""

    tries: Counter[str]
    ended: Counter[str]

    @property
    def waiting(self) -> int:
        """Webhooks to be posted."""

    @property
    def under_way(self) -> int:
        """Webhooks being posted."""


class Scrape(Collector):
    """Everything, as Prometheus wants it. `calls`: how calls ended, by method and status."""

    def __init__(  # noqa: PLR0917, wiring
        self,
        metrics: Metrics,
        fleet: Fleet,
        tasks: Tasks,
        store: Waiting,
        calls: Mapping[tuple[str, str], int],
        posts: Posts,
    ) -> None:
        self._metrics = metrics
        self._fleet = fleet
        self._tasks = tasks
        self._store = store
        self._calls = calls
        self._posts = posts

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client."""
        counted, by_reason = self._metrics, ("workspace", "state", "reason")
        yield _active(1)
        yield _counter("ngpu_calls", "Calls answered.", ("method", "code"), self._calls)
        accepted = {(name,): count for name, count in counted.accepted.items()}
        yield _counter("ngpu_tasks_accepted", "Tasks accepted.", ("workspace",), accepted)
        ended = {(name, state.name.lower(), reason): count for (name, state, reason), count in counted.ended.items()}
        yield _counter("ngpu_tasks_ended", "Tasks ended.", by_reason, ended)
        failed = {(reason,): count for reason, count in counted.attempts_failed.items()}
        yield _counter("ngpu_attempts_failed", "Attempts without an answer of the container.", ("reason",), failed)
        held = {(name,): count for name, count in counted.retries_held.items()}
        yield _counter("ngpu_retries_held", "Attempts held back by the retry budget.", ("workspace",), held)
        ahead = {(name,): count for name, count in counted.ahead.items()}
        yield _counter("ngpu_tasks_sent_ahead", "Tasks sent to a node ahead of their slot.", ("workspace",), ahead)
        hedges = dict(counted.hedges)
        yield _counter("ngpu_hedges", "Second attempts of slow tasks.", ("workspace", "outcome"), hedges)
        yield counted.waited.family("ngpu_task_wait_seconds", "From a task's acceptance to an attempt's start.")
        yield counted.took.family("ngpu_task_seconds", "From a task's acceptance to its end.")
        yield GaugeMetricFamily("ngpu_store_writes_waiting", "Writes not on disk yet.", value=self._store.waiting)
        yield from self._webhooks()
        yield from self._workspaces()
        yield from self._nodes()

    def _webhooks(self) -> Iterator[Metric]:
        posts = self._posts
        tries = {(outcome,): count for outcome, count in posts.tries.items()}
        yield _counter("ngpu_webhook_tries", "Posts to receivers of webhooks.", ("outcome",), tries)
        ended = {(state,): posts.ended[state] for state in ("delivered", "given_up")}
        yield _counter("ngpu_webhooks_ended", "Webhooks delivered or given up.", ("state",), ended)
        waiting = {("under_way",): posts.under_way, ("waiting",): posts.waiting}
        yield _gauge("ngpu_webhooks", "Webhooks that have not ended.", ("state",), waiting)

    def _workspaces(self) -> Iterator[Metric]:
        tasks: Counter[tuple[str, ...]] = Counter()
        replicas: Counter[tuple[str, ...]] = Counter()
        slots: Counter[tuple[str, ...]] = Counter()
        ejected: Counter[tuple[str, ...]] = Counter()
        ejections: Counter[tuple[str, ...]] = Counter()
        for number, workspace in enumerate(self._fleet.workspaces()):
            name = workspace.name if number < WORKSPACES else "other"
            tasks[name, "queued"] += self._tasks.queued(workspace.uid)
            tasks[name, "running"] += self._tasks.running(workspace.uid)
            out, ever = self._tasks.ejected(workspace.uid)
            ejected[name,] += out
            ejections[name,] += ever
            for replica in self._fleet.replicas_of(workspace.uid):
                state = self._fleet.state_of(replica)
                busy = self._tasks.running_on(replica.id)
                replicas[name, state.state.name.lower()] += 1
                slots[name, "busy"] += busy
                slots[name, "free"] += max(0, state.capacity - busy) if replica.active else 0
        yield _gauge("ngpu_tasks", "Tasks that have not ended.", ("workspace", "state"), tasks)
        yield _gauge("ngpu_replicas", "Replicas as their nodes say.", ("workspace", "state"), replicas)
        yield _gauge("ngpu_replicas_ejected", "Replicas that get nothing for a while.", ("workspace",), ejected)
        yield _counter("ngpu_ejections", "How often a replica was ejected.", ("workspace",), ejections)
        yield _gauge("ngpu_slots", "Tasks that replicas may run at once.", ("workspace", "state"), slots)

    def _nodes(self) -> Iterator[Metric]:
        nodes = Counter({("connected",): 0, ("disconnected",): 0})
        gpus = Counter({(grade.name.lower(),): 0 for grade in Grade})
        for node in self._fleet.nodes():
            nodes["connected" if node.connected else "disconnected",] += 1
            gpus.update((health.grade.name.lower(),) for health in node.health.values())
        yield _gauge("ngpu_nodes", "Nodes enrolled and not revoked.", ("state",), nodes)
        yield _gauge("ngpu_gpus", "GPUs by grade.", ("grade",), gpus)


class Standby(Collector):
    """What there is of a control plane that stands by."""

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client."""
        yield _active(0)


def _active(value: int) -> Metric:
    return GaugeMetricFamily("ngpu_controlplane_active", "1: it serves; 0: it stands by for another.", value=value)


def _counter(name: str, words: str, labels: Sequence[str], values: Mapping[Any, int]) -> Metric:
    family = CounterMetricFamily(name, words, labels=labels)
    for key, value in list(values.items()):
        family.add_metric(key, value)
    return family


def _gauge(name: str, words: str, labels: Sequence[str], values: Mapping[Any, int]) -> Metric:
    family = GaugeMetricFamily(name, words, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


class MetricsServer:
    """Answers GET for the three paths, one request a connection. `ready` says why we are not; empty: we are."""

    def __init__(self, collector: Collector, ready: Callable[[], Awaitable[str]]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(collector)
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        GCCollector(registry=self._registry)
        self._ready = ready
        self._server: asyncio.Server | None = None

    async def start(self, listen: str) -> str:
        """Listen at HOST:PORT. Gives the address with the port taken. Raises OSError."""
        host, port = split_address(listen)
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
                head = await reader.readuntil(b"\r\n\r\n")
                status, kind, body = await self._answer(head.split(b"\r\n", 1)[0].decode("latin-1").split(" "))
                writer.write(
                    f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
                    "Connection: close\r\n\r\n".encode()
                    + body
                )
                await writer.drain()
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            _log.debug("metrics_request_failed", error=repr(error))
        finally:
            writer.close()

    async def _answer(self, request: Sequence[str]) -> tuple[str, str, bytes]:
        """Status line, content type and body."""
        plain = "text/plain; charset=utf-8"
        if len(request) != 3 or request[0] != "GET":
            return "405 Method Not Allowed", plain, b"only GET\n"
        match request[1].partition("?")[0]:
            case "/metrics":
                return "200 OK", CONTENT_TYPE_PLAIN_0_0_4, generate_latest(self._registry)
            case "/healthz":
                return "200 OK", plain, b"ok\n"
            case "/readyz":
                if why := await self._ready():
                    return "503 Service Unavailable", plain, f"{why}\n".encode()
                return "200 OK", plain, b"ready\n"
        return "404 Not Found", plain, b"there are /metrics, /healthz and /readyz\n"
