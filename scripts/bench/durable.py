"""W4: durable asynchronous tasks, beside job queues that do the same work.

Ours: submitted to the REST API, then asked after with wait=; every answer after fsync. The container answers 300 B to
300 B. Celery, Dramatiq and arq have a worker that passes 300 B on to the same container over a kept connection, with
Redis for queue and results as it comes, which is without fsync; `Celery, fsync` has Redis write and sync each change
(appendfsync always); "alone": the worker gives back what came, with no container. Each is up only while it is measured.

  c=64: tasks a second, submitted, done, stored and read, with 64 under way.
    HTTP: by wrk, the same for all. The queues are behind an aiohttp server that has their client (peers/front.py).
    client: by a program in Python. Theirs has their client, and is on their machine; ours has the Batch stream (gRPC).
  paced: 50 tasks a second, ours over REST, theirs by their client; from before the submit to its answer, and to the
    result in the caller's hands.
  query: queryTask of an ended task.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

from scripts.bench import hotspots, loads, peers, product, sheet
from scripts.bench.loads import HERE, free_port, wrk
from scripts.bench.sheet import Goal
from scripts.bench.tools import INSTRUMENTS, Tool
from scripts.programs import Failed, Platform

CALLERS = 64
QUERY_PATH = "/user/queryTask?taskID="
REDIS_START_LIMIT_S = 10.0
WORKER_START_LIMIT_S = 30.0

GOALS = (
    Goal("W4 c=64 over HTTP, to Celery", "w4_c64_tps", 4, 8, to="celery_http_w4_c64_tps"),
    Goal("W4 c=64 over HTTP, to Dramatiq", "w4_c64_tps", 2, 3.5, to="dramatiq_http_w4_c64_tps"),
    Goal("W4 c=64 over HTTP, to arq", "w4_c64_tps", 2, 3.5, to="arq_http_w4_c64_tps"),
    # Theirs on the queue's own machine, ours over the gRPC API: not asked for, and good to know.
    Goal("W4 c=64 by clients, to Celery", "grpc_w4_c64_tps", None, 4, to="celery_w4_c64_tps"),
    Goal("W4 c=64 by clients, to Dramatiq", "grpc_w4_c64_tps", None, 2, to="dramatiq_w4_c64_tps"),
    Goal("W4 c=64 by clients, to arq", "grpc_w4_c64_tps", None, 2, to="arq_w4_c64_tps"),
    Goal("paced, submit to result p50, to Celery's", "w4_paced_result_p50_ms", 1.4, 0.95,
         to="celery_w4_paced_result_p50_ms", most=True),
    Goal("paced, submit to result p50, to arq's", "w4_paced_result_p50_ms", None, 0.6,
         to="arq_w4_paced_result_p50_ms", most=True),
    Goal("query c=1 p50", "query_p50_ms", 2, 1, most=True, unit="ms"),
    Goal("query c=64", "query_c64_rps", 2500, 5000, unit="/s"),
)  # fmt: skip


class Peer(NamedTuple):
    """`key` begins its figures' names; `worker`: program and arguments in its virtualenv."""

    key: str
    name: str
    tool: Tool
    script: str
    worker: tuple[str, ...]
    redis: tuple[str, ...] = ()
    #: Without the container.
    alone: bool = False


CELERY = Tool("celery", ("celery[redis]", "aiohttp"))
CELERY_WORKER = ("celery", "-A", "celery_tasks", "worker", "--loglevel", "WARNING", "--without-gossip")
DRAMATIQ = Tool("dramatiq", ("dramatiq[redis]", "aiohttp"))
DRAMATIQ_WORKER = ("dramatiq", "dramatiq_tasks")
ARQ = Tool("arq", ("arq", "aiohttp"))
ARQ_WORKER = ("arq", "arq_tasks.WorkerSettings")
PEERS = (
    Peer("celery", "Celery", CELERY, "celery_tasks.py", CELERY_WORKER),
    Peer("celery_fsync", "Celery, fsync", CELERY, "celery_tasks.py", CELERY_WORKER,
         ("--appendonly", "yes", "--appendfsync", "always")),
    Peer("dramatiq", "Dramatiq", DRAMATIQ, "dramatiq_tasks.py", DRAMATIQ_WORKER),
    Peer("arq", "arq", ARQ, "arq_tasks.py", ARQ_WORKER),
    Peer("celery_alone", "Celery, alone", CELERY, "celery_tasks.py", CELERY_WORKER, alone=True),
    Peer("dramatiq_alone", "Dramatiq, alone", DRAMATIQ, "dramatiq_tasks.py", DRAMATIQ_WORKER, alone=True),
    Peer("arq_alone", "arq, alone", ARQ, "arq_tasks.py", ARQ_WORKER, alone=True),
)  # fmt: skip


class Durable:
    """What is measured."""

    def __init__(self, ours: product.Product, options: argparse.Namespace) -> None:
        self.ours = ours
        self.seconds: float = options.seconds
        self.figures = sheet.Figures()
        self.seen: dict[str, str] = {}
        self.ended = ours.ended_task()
        self.container = f"http://127.0.0.1:{ours.start_backend()}"

    # Ours.

    def closed_command(self, seconds: float) -> list[str]:
        """wrk: submit, ask, with CALLERS tasks under way."""
        return self._closed_command(
            self.ours.platform.url,
            seconds,
            "/user/schedulingTask?paramUrl=w1&paramPort=8080",
            "/user/queryTask?wait=30&taskID=",
            self.ours.bearer,
        )

    def closed(self) -> None:
        """W4 c=64 over REST, and its CPU."""
        self.seen.setdefault("", "ngpu")
        before = self.ours.cpu_by_program()
        ended = self._keep_closed("", self.closed_command(self.seconds))
        product.keep_cpu(self.figures, "w4_c64", before, self.ours.cpu_by_program(), ended)

    def closed_grpc(self) -> None:
        """The same through the Batch stream."""
        self.figures.keep("grpc_w4_c64_tps", self._called("batch", self.ours.platform.server)["tps"])

    def paced(self) -> None:
        """50 a second over REST."""
        self._keep_paced("", self._called("rest", self.ours.platform.url))

    def query(self) -> None:
        """queryTask of an ended task."""
        url = self.ours.platform.url + QUERY_PATH + self.ended
        for connections in (1, CALLERS):
            load = wrk(url, connections, self.seconds, self.ours.bearer)
            if load.errors:
                raise Failed(f"{load.errors} of {load.requests} queries failed")
            if connections == 1:
                self.figures.keep("query_p50_ms", load.p50_ms)
            else:
                self.figures.keep("query_c64_rps", load.rps)

    def _closed_command(self, url: str, seconds: float, submit: str, ask: str, *headers: str) -> list[str]:
        arguments = [str(self.ours.small), submit, ask, *headers]
        return loads.wrk_command(url, CALLERS, seconds, arguments, "durable.lua")

    def _keep_closed(self, prefix: str, command: list[str]) -> int:
        measured = loads.run_wrk(command)
        if measured["errors"] or not measured["ended"]:
            raise Failed(f"durable tasks over HTTP: {measured}")
        self.figures.keep(f"{prefix}w4_c64_tps", measured["ended"] / measured["seconds"])
        return int(measured["ended"])

    def _called(self, form: str, target: str) -> dict[str, float]:
        settings = {
            "target": target,
            "bearer": self.ours.bearer_id,
            "body_file": str(self.ours.small),
            "seconds": self.seconds,
        }
        return _said([sys.executable, "-m", "scripts.bench.callers", form, json.dumps(settings)])

    def _keep_paced(self, prefix: str, measured: dict[str, float]) -> None:
        for name, value in measured.items():
            self.figures.keep(f"{prefix}w4_paced_{name}", value)

    # Theirs.

    def peer(self, peer: Peer) -> None:
        """Both loads of a peer."""
        self.seen.setdefault(peer.key, peer.name)
        platform = self.ours.platform
        container = "" if peer.alone else self.container
        with _redis(platform, peer.redis) as url, _worker(platform, peer, url, container) as environment:
            script = [peer.tool.python, str(HERE / "peers" / peer.script)]
            # The first is answered once the worker is up; it also warms both sides.
            _said([*script, "paced", "1"], environment, WORKER_START_LIMIT_S)
            self.figures.keep(
                f"{peer.key}_w4_c64_tps", _said([*script, "closed", f"{self.seconds}"], environment)["tps"]
            )
            self._keep_paced(f"{peer.key}_", _said([*script, "paced", f"{self.seconds}"], environment))
            if not peer.alone:
                with _front(platform, peer, environment, self.ours.small) as front:
                    ways = ("/submit", "/result?taskID=")
                    # What the first calls set up is not measured.
                    loads.run_wrk(self._closed_command(front, 1, *ways))
                    self._keep_closed(f"{peer.key}_http_", self._closed_command(front, self.seconds, *ways))


def _said(command: list[str], environment: dict[str, str] | None = None, more_s: float = 120.0) -> dict[str, float]:
    """The JSON that a caller prints last."""
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=more_s + 60
        )
        measured: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    except subprocess.TimeoutExpired:
        raise Failed(f"{' '.join(command)}: no end in sight") from None
    except (ValueError, IndexError):
        raise Failed(f"{' '.join(command)}: {done.stdout}{done.stderr[-2000:]}") from None
    return measured


@contextmanager
def _redis(platform: Platform, arguments: tuple[str, ...]) -> Iterator[str]:
    """A Redis server with an empty directory of its own. Gives its URL."""
    port = free_port()
    home = platform.state / f"redis-{port}"
    home.mkdir()
    program = platform.launch(
        ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--dir", str(home), *arguments], f"redis-{port}"
    )
    try:
        deadline = time.monotonic() + REDIS_START_LIMIT_S
        while b"Ready to accept" not in program.log.read_bytes():
            if time.monotonic() > deadline:
                raise Failed(f"Redis does not start; see {program.log}")
            time.sleep(0.05)
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        program.stop()
        platform.programs.remove(program)


@contextmanager
def _worker(platform: Platform, peer: Peer, url: str, container: str) -> Iterator[dict[str, str]]:
    """A peer's worker. Gives the environment of its callers."""
    environment = platform.environment | peers.environment(container) | {"REDIS_URL": url}
    name, *arguments = peer.worker
    program = platform.launch([peer.tool.program(name), *arguments], peer.key, environment)
    try:
        yield environment
    finally:
        loads.end_family(program)
        platform.programs.remove(program)


@contextmanager
def _front(platform: Platform, peer: Peer, environment: dict[str, str], small: Path) -> Iterator[str]:
    """An HTTP server before a peer. Gives its URL once it takes work as in `small`."""
    port = free_port()
    module = peer.script.removesuffix(".py")
    command = [peer.tool.python, str(HERE / "peers" / "front.py"), module, str(port)]
    program = platform.launch(command, f"{peer.key}-front", environment)
    try:
        url = f"http://127.0.0.1:{port}"
        product.await_answer(f"{url}/submit", small, program=program, least_bytes=1)
        yield url
    finally:
        program.stop()
        platform.programs.remove(program)


def table(durable: Durable) -> str:
    """Side by side."""
    columns = ("c=64 tasks/s: HTTP", "client", "paced: submit p50 ms", "result p50 ms", "result p99 ms")
    rows = []
    for key, name in durable.seen.items():
        prefix = f"{key}_" if key else ""
        http, client = (f"{key}_http_", f"{key}_") if key else ("", "grpc_")
        figures = [f"{http}w4_c64_tps", f"{client}w4_c64_tps"]
        figures += [f"{prefix}w4_paced_{name}" for name in ("submit_p50_ms", "result_p50_ms", "result_p99_ms")]
        rows.append([name, *(sheet.number(durable.figures.get(figure)) for figure in figures)])
    return sheet.markdown(["W4", *columns], rows)


def measure(state: Path, options: argparse.Namespace, busy: float) -> sheet.Figures:
    """All of it."""
    if options.profile:
        INSTRUMENTS.install()
    wanted = options.peers.split(",") if not (options.quick or options.profile) else []
    rivals = [peer for peer in PEERS if peer.key in wanted]
    tools = dict.fromkeys(peer.tool for peer in rivals)
    for tool in tools:
        tool.install()
    with product.up(state) as ours:
        durable = Durable(ours, options)
        if options.profile:
            print(sheet.where(busy) + "\n")
            with loads.running(durable.closed_command(options.seconds + 60)):
                time.sleep(1)
                print(hotspots.tables(ours.programs, options.seconds, state))
            return durable.figures
        steps: list[tuple[str, Callable[[], None]]] = [
            ("c=64", durable.closed),
            ("c=64 over gRPC", durable.closed_grpc),
            ("paced", durable.paced),
            ("query", durable.query),
            *((peer.name, partial(durable.peer, peer)) for peer in rivals),
        ]
        sheet.rounds(options.rounds, steps)
        figures = durable.figures
    versions = [tool.version() for tool in tools]
    if rivals:
        versions.append("Redis " + sheet.tool_version("redis-server", "--version").partition("v=")[2].split()[0])
    print(sheet.where(busy, *versions), sheet.in_rounds(options.rounds, options.seconds) + "\n")
    print(table(durable))
    print()
    print(sheet.goals_table(GOALS, figures))
    print(f"\nCPU us a task, submit and query: {product.cpu_words(figures, 'w4_c64')}.")
    return figures


def main() -> int:
    """Run the benchmark. Gives the exit status."""
    parser = loads.options("durable", __doc__)
    loads.add_rounds(parser)
    parser.add_argument(
        "--peers",
        default=",".join(peer.key for peer in PEERS),
        metavar="LIST",
        help='of the full form; default all: %(default)s; "" for none',
    )
    parser.add_argument(
        "--profile", action="store_true", help="instead: the hottest functions of each program during c=64 (py-spy)"
    )
    product.add_note(parser)
    return loads.main("durable", parser, measure)


if __name__ == "__main__":
    sys.exit(main())
