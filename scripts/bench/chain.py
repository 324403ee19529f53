"""The pass-through from caller to container, beside others that do the same work.

Load by wrk; the container is nginx with its echo module, run by the node as a local process.

  W1: 300 B in and out, no work.  W2: 20 ms of work.  W3: 4 MiB in and out.
  direct: the container without us.  nginx, aiohttp: a reverse proxy before it.  Ray Serve, LitServe, BentoML: each in
  its asynchronous form and else as it comes, before the same container, with kept connections; "alone": it does the
  work itself, in its worker, with no container. Each is up only while it is measured.

CPU is user and system of all processes of a contestant; of ours, of the three.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from scripts.bench import hotspots, loads, peers, product, sheet
from scripts.bench.loads import HERE, Memory, cpu_s, family, free_port, wrk
from scripts.bench.sheet import Goal
from scripts.bench.tools import INSTRUMENTS, Tool
from scripts.programs import Failed

CONCURRENCIES = (1, 4, 16, 64, 256)
#: Work, path and connections.
WORKS = (("w1_c64", "w1", 64), ("w1_c1", "w1", 1), ("w2_c200", "w2", 200), ("w3_c8", "w3", 8), ("w3_c1", "w3", 1))
CURVES = tuple((f"w1_c{connections}", "w1", connections) for connections in CONCURRENCIES)
W2_LIMIT_RPS = 200 / 0.02

GOALS = (
    Goal("W1 c=64 to nginx", "w1_c64_rps", 0.06, 0.10, to="nginx_w1_c64_rps"),
    Goal("W1 c=64 to the aiohttp proxy", "w1_c64_rps", 0.6, 0.9, to="aiohttp_w1_c64_rps"),
    Goal("W1 c=64 to Ray Serve", "w1_c64_rps", 8, 15, to="ray_w1_c64_rps"),
    Goal("W1 c=64 to LitServe", "w1_c64_rps", 3, 6, to="litserve_w1_c64_rps"),
    Goal("W1 c=64 to BentoML", "w1_c64_rps", 4, 7, to="bentoml_w1_c64_rps"),
    Goal("W1 c=64 CPU a request, three processes", "w1_c64_cpu_us", 600, 350, most=True, unit="us"),
    Goal("W1 c=1 p50 to Ray Serve's", "w1_c1_p50_ms", 0.3, 0.2, to="ray_w1_c1_p50_ms", most=True),
    Goal("W1 c=1 p50 to BentoML's", "w1_c1_p50_ms", None, 0.85, to="bentoml_w1_c1_p50_ms", most=True),
    Goal("W2 c=200 to the limit of 10,000/s", "w2_of_limit", 0.25, 0.40, unit="x"),
    Goal("W2 c=200 requests that failed", "w2_c200_errors", 0, most=True),
    Goal("W3 c=8 to nginx", "w3_c8_rps", 0.14, 0.25, to="nginx_w3_c8_rps"),
    Goal("small requests (c=4) beside two of 4 MiB, p50", "small_beside_large_p50_ms", 25, 6, most=True, unit="ms"),
    Goal("memory of the three, idle", "idle_mib", 250, 200, most=True, unit="MiB"),
)


@dataclass
class Contestant:
    """Who does the work. `key` begins its figures' names; ours have none."""

    key: str
    name: str
    url: str
    #: All its processes, asked anew each time.
    pids: Callable[[], list[int]]
    headers: tuple[str, ...] = ()

    def figure(self, name: str) -> str:
        """The name of a figure of its."""
        return f"{self.key}_{name}" if self.key else name


class Peer(NamedTuple):
    """`key` begins its figures' names; `script` is in peers/; `alone`: without the container."""

    key: str
    name: str
    tool: Tool
    script: str
    alone: bool = False


BEFORE_A_CONTAINER = (
    Peer("ray", "Ray Serve", Tool("ray", ("ray[serve]", "aiohttp")), "ray_serve.py"),
    Peer("litserve", "LitServe", Tool("litserve", ("litserve", "aiohttp")), "litserve_api.py"),
    Peer("bentoml", "BentoML", Tool("bentoml", ("bentoml", "aiohttp")), "bentoml_service.py"),
)
PEERS = (
    *BEFORE_A_CONTAINER,
    *(one._replace(key=f"{one.key}_alone", name=f"{one.name}, alone", alone=True) for one in BEFORE_A_CONTAINER),
)
PEER_START_LIMIT_S = 90.0


class Chain:
    """Everything that is measured, up and running."""

    def __init__(self, ours: product.Product, options: argparse.Namespace) -> None:
        self.ours = ours
        self.seconds: float = options.seconds
        self.only: str = options.only
        self.works = [work for work in WORKS if work[0].startswith(self.only)]
        self.figures = sheet.Figures()
        time.sleep(2)
        self.figures.keep("idle_mib", loads.rss_mib(ours.pids))
        backend = ours.start_backend()
        backend_program = ours.platform.programs[-1]
        nginx_url, nginx = ours.start_nginx(backend)
        port = free_port()
        command = [sys.executable, str(HERE / "aiohttp_proxy.py"), str(port), f"http://127.0.0.1:{backend}"]
        aiohttp = ours.platform.launch(command, "aiohttp")
        self.direct = Contestant(
            "direct", "direct", f"http://127.0.0.1:{backend}/", lambda: family(backend_program.pid)
        )
        self.nginx = Contestant("nginx", "nginx", nginx_url, lambda: family(nginx.pid))
        self.aiohttp = Contestant("aiohttp", "aiohttp proxy", f"http://127.0.0.1:{port}/", lambda: [aiohttp.pid])
        self.ngpu = Contestant("", "ngpu", ours.url, lambda: ours.pids, (ours.bearer,))
        self.raw = Contestant("raw", "ngpu /run", ours.raw_url, lambda: ours.pids, (ours.bearer,))
        self.steady = [self.direct, self.nginx, self.aiohttp, self.ngpu]
        if ours.has_raw():
            self.steady.append(self.raw)
        for one in self.steady:
            product.await_answer(one.url + "w1", ours.small, *one.headers)
        self.load(self.ngpu, "w1", 64, 1)  # warm
        #: What was seen in order of first appearance, for the tables.
        self.seen: dict[str, str] = {}

    def load(self, one: Contestant, path: str, connections: int, seconds: float | None = None) -> loads.Load:
        """One measurement."""
        body = self.ours.large if path == "w3" else self.ours.small
        return wrk(one.url + path, connections, seconds or self.seconds, *one.headers, body=body)

    def measure(self, one: Contestant, work: str, path: str, connections: int) -> None:
        """One work of one contestant."""
        self.seen[one.key] = one.name
        pids = one.pids()
        before, before_each = cpu_s(pids), self.ours.cpu_by_program()
        load = self.load(one, path, connections)
        keep = self.figures.keep
        keep(one.figure(f"{work}_rps"), load.rps)
        keep(one.figure(f"{work}_p50_ms"), load.p50_ms)
        keep(one.figure(f"{work}_p99_ms"), load.p99_ms)
        keep(one.figure(f"{work}_errors"), load.errors)
        keep(one.figure(f"{work}_cpu_us"), (cpu_s(pids) - before) / max(1, load.requests) * 1e6)
        if one is self.ngpu:
            if load.errors == load.requests:
                raise Failed(f"{one.url}{path}: all {load.errors} requests failed")
            product.keep_cpu(self.figures, work, before_each, self.ours.cpu_by_program(), load.requests)
            if work == "w2_c200":
                keep("w2_of_limit", load.rps / W2_LIMIT_RPS)

    def small_beside_large(self) -> None:
        """Latency of small requests while two bodies of 4 MiB are always in flight."""
        large = [str(self.ours.large), "0", self.ours.bearer]
        with loads.running(loads.wrk_command(self.ngpu.url + "w3", 2, self.seconds + 30, large)):
            time.sleep(1)
            self.figures.keep("small_beside_large_p50_ms", self.load(self.ngpu, "w1", 4).p50_ms)

    def peer(self, peer: Peer, works: Sequence[tuple[str, str, int]]) -> None:
        """All these works of a peer, which is up only for that long."""
        with self.peer_up(peer) as one:
            self.load(one, "w1", 16, 1)  # warm
            for work, path, connections in works:
                self.measure(one, work, path, connections)

    @contextmanager
    def peer_up(self, peer: Peer) -> Iterator[Contestant]:
        """A peer, started and ended."""
        platform = self.ours.platform
        home = platform.state / f"peer-{peer.key}"
        home.mkdir(exist_ok=True)
        port = free_port()
        command = [peer.tool.python, str(HERE / "peers" / peer.script), str(port), str(home)]
        container = "" if peer.alone else self.direct.url.rstrip("/")
        program = platform.launch(command, peer.key, peers.environment(container))
        try:
            one = Contestant(peer.key, peer.name, f"http://127.0.0.1:{port}/", lambda: family(program.pid))
            product.await_answer(one.url + "w1", self.ours.small, program=program, limit_s=PEER_START_LIMIT_S)
            yield one
        finally:
            loads.end_family(program)
            platform.programs.remove(program)

    def steps(self, quick: bool) -> list[tuple[str, Callable[[], None]]]:
        """What a round consists of. In the quick form of others only what ours is compared with."""
        raw = [self.raw] if self.raw in self.steady else []
        short = {"w1_c64": [self.nginx, self.aiohttp, self.ngpu, *raw], "w3_c8": [self.nginx, self.ngpu, *raw]}
        steps: list[tuple[str, Callable[[], None]]] = [
            (f"{work} {one.name}", partial(self.measure, one, work, path, connections))
            for work, path, connections in self.works
            for one in (short.get(work, [self.ngpu]) if quick else self.steady)
        ]
        if self.only in ("", "w3"):
            steps.append(("small beside large", self.small_beside_large))
        return steps

    def curves(self) -> None:
        """W1 over concurrency, but for the peers."""
        for work, path, connections in CURVES:
            for one in self.steady:
                self.measure(one, work, path, connections)


def works_table(chain: Chain) -> str:
    """Contestants side by side."""
    figures = chain.figures
    columns = (
        ("W1 c=64 req/s", "w1_c64_rps"),
        ("CPU us/req", "w1_c64_cpu_us"),
        ("p99 ms", "w1_c64_p99_ms"),
        ("W1 c=1 p50 ms", "w1_c1_p50_ms"),
        ("W2 c=200 req/s", "w2_c200_rps"),
        ("p99 ms", "w2_c200_p99_ms"),
        ("W3 c=8 req/s", "w3_c8_rps"),
        ("W3 c=1 p50 ms", "w3_c1_p50_ms"),
    )
    rows = []
    for key, name in chain.seen.items():
        prefix = f"{key}_" if key else ""
        failed = sum(int(figures.get(f"{prefix}{work}_errors") or 0) for work, _, _ in WORKS)
        cells = [sheet.number(figures.get(prefix + figure)) for _, figure in columns]
        rows.append([f"{name} ({failed} requests failed)" if failed else name, *cells])
    return sheet.markdown(["", *(title for title, _ in columns)], rows)


def curves_table(chain: Chain) -> str:
    """Throughput and latency over concurrency."""
    rows = []
    for key, name in chain.seen.items():
        figure = f"{key}_w1_c" if key else "w1_c"
        cells = [(chain.figures[f"{figure}{c}_rps"], chain.figures[f"{figure}{c}_p50_ms"]) for c in CONCURRENCIES]
        rows.append([name, *(f"{sheet.number(rps)} ({sheet.number(p50_ms)})" for rps, p50_ms in cells)])
    return sheet.markdown(["W1 req/s (p50 ms)", *(f"c={c}" for c in CONCURRENCIES)], rows)


def plot(chain: Chain, target: Path) -> None:
    """The curves as a PNG."""
    curves = [
        {
            "name": name,
            "concurrency": CONCURRENCIES,
            "rps": [chain.figures[f"{prefix}w1_c{c}_rps"] for c in CONCURRENCIES],
            "p50_ms": [chain.figures[f"{prefix}w1_c{c}_p50_ms"] for c in CONCURRENCIES],
            "p99_ms": [chain.figures[f"{prefix}w1_c{c}_p99_ms"] for c in CONCURRENCIES],
        }
        for key, name in chain.seen.items()
        for prefix in [f"{key}_" if key else ""]
    ]
    command = [INSTRUMENTS.python, str(HERE / "curves.py"), str(target)]
    done = subprocess.run(command, input=json.dumps(curves), capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failed(f"{target} was not made: {done.stderr}")


def measure(state: Path, options: argparse.Namespace, busy: float) -> sheet.Figures:
    """What the options ask for."""
    wanted = options.peers.split(",") if options.peers else []
    rivals = [peer for peer in PEERS if peer.key in wanted and not (options.plot and peer.alone)]
    if options.quick or options.profile:
        rivals = []
    tools = dict.fromkeys(peer.tool for peer in rivals)
    for tool in tools:
        tool.install()
    if options.plot or options.profile:
        INSTRUMENTS.install()
    with product.up(state) as ours:
        chain = Chain(ours, options)
        versions = [
            sheet.tool_version("nginx", "-v").removeprefix("nginx version: "),
            sheet.tool_version("wrk", "-v").partition(" [")[0],
            *(tool.version() for tool in tools),
        ]
        how = sheet.in_rounds(options.rounds, options.seconds)
        if options.profile:
            how = f"During {options.seconds:g} s of {options.profile}."
        print(sheet.where(busy, *versions), how + "\n")
        if options.profile:
            path, connections = {work: (path, connections) for work, path, connections in WORKS}[options.profile]
            body = ours.large if path == "w3" else ours.small
            arguments = [str(body), "0", ours.bearer]
            with loads.running(loads.wrk_command(ours.url + path, connections, options.seconds + 60, arguments)):
                time.sleep(1)
                print(hotspots.tables(ours.programs, options.seconds, state))
        elif options.plot:
            curves = [(peer.name, partial(chain.peer, peer, CURVES)) for peer in rivals]
            sheet.rounds(options.rounds, [("curves", chain.curves), *curves])
            plot(chain, options.plot)
            print(curves_table(chain))
        else:
            steps = chain.steps(options.quick)
            steps += [(peer.name, partial(chain.peer, peer, chain.works)) for peer in rivals]
            with Memory(ours.pids) as memory:
                sheet.rounds(options.rounds, steps)
            chain.figures.keep("peak_mib", memory.peak_mib)
            print(works_table(chain))
            print()
            print(sheet.goals_table(GOALS, chain.figures))
            each = ", ".join(
                f"{name} {sheet.number(peak)}" for name, peak in zip(product.PROGRAMS, memory.peaks_mib, strict=True)
            )
            for work, title in (("w1_c64", "W1 c=64"), ("w3_c8", "W3 c=8")):
                if chain.figures.get(f"{work}_rps") is not None:
                    print(f"\nCPU us a request, {title}: {product.cpu_words(chain.figures, work)}.")
            print(f"\nMemory of the three: idle {sheet.number(chain.figures['idle_mib'])} MiB, peak "
                  f"{sheet.number(memory.peak_mib)} MiB ({each}).")  # fmt: skip
    return chain.figures


def main() -> int:
    """Run the benchmark. Gives the exit status."""
    parser = loads.options("chain", __doc__)
    loads.add_rounds(parser)
    parser.add_argument(
        "--peers",
        default=",".join(peer.key for peer in PEERS),
        metavar="LIST",
        help='of the full form; default all: %(default)s; "" for none',
    )
    parser.add_argument(
        "--only", default="", choices=("w1", "w2", "w3"), help="of the works; W3 with small requests beside large ones"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="instead: W1 over concurrency, as a table and as this PNG"
    )
    parser.add_argument(
        "--profile",
        nargs="?",
        const=WORKS[0][0],
        choices=[work for work, *_ in WORKS],
        help="instead: the hottest functions of each program during that work, default %(const)s (py-spy)",
    )
    product.add_note(parser)
    return loads.main("chain", parser, measure)


if __name__ == "__main__":
    sys.exit(main())
