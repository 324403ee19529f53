"""The pass-through measured from caller to container, beside nginx and a bare aiohttp proxy in the same run.

Load by wrk; the container is nginx with its echo module, run by the node as a local process. The full product: bridge,
control plane and node daemon as three processes, with authentication, selection, durable record and envelope.

W1: 300 B in and out, no work.  W2: 20 ms of work.  W3: 4 MiB in and out.  CPU: of our three processes, user and system.
"""

import argparse
import contextlib
import json
import os
import platform as machine
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts.programs import ROOT, Failed, Platform

HERE = ROOT / "scripts" / "bench"
SMALL_BYTES = 300
LARGE_BYTES = 4 * 1024 * 1024
TICK = os.sysconf("SC_CLK_TCK")

NGINX = """
user root;
worker_processes {workers};
pid {home}/nginx.pid;
error_log {home}/error.log;
load_module /usr/lib/nginx/modules/ngx_http_echo_module.so;
events {{ worker_connections 4096; }}
http {{
    access_log off;
    client_body_temp_path {home}/b; proxy_temp_path {home}/p; fastcgi_temp_path {home}/f; uwsgi_temp_path {home}/u;
    scgi_temp_path {home}/s;
    client_max_body_size 0; client_body_buffer_size 64k; keepalive_requests 10000000; sendfile on; tcp_nopush on;
    {http}
}}
"""
BACKEND = """
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        root {home};
        location = /w1 {{ echo_read_request_body; echo -n '{small}'; }}
        location = /w2 {{ echo_read_request_body; echo_sleep 0.02; echo -n '{small}'; }}
        location = /w3 {{ error_page 405 =200 /large; }}
        location = /large {{ }}
    }}
"""
PROXY = """
    upstream backend {{ server 127.0.0.1:{backend}; keepalive 256; }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location / {{ proxy_pass http://backend; proxy_http_version 1.1; proxy_set_header Connection ""; }}
    }}
"""
#: nginx as a workspace's container: its port comes from the environment.
RUN = """#!/bin/sh
set -eu
home=$(mktemp -d)
cp large "$home/w3"; cp large "$home/large"
sed -e "s#@PORT@#$PORT#g" -e "s#@HOME@#$home#g" nginx.conf >"$home/nginx.conf"
exec nginx -p "$home" -c "$home/nginx.conf" -g 'daemon off;'
"""


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def nginx_conf(home: str, workers: int, http: str) -> str:
    """A configuration with everything below `home`."""
    return NGINX.format(home=home, workers=workers, http=http)


def container(images: Path) -> None:
    """The image directory of the workspace."""
    image = images / "bench"
    image.mkdir(parents=True)
    small = json.dumps({"result": "x" * (SMALL_BYTES - 14)})
    backend = BACKEND.format(port="@PORT@", home="@HOME@", small=small)
    (image / "nginx.conf").write_text(nginx_conf("@HOME@", 1, backend))
    (image / "large").write_bytes(b"x" * LARGE_BYTES)
    (image / "run.sh").write_text(RUN)
    (image / "image.toml").write_text(
        'command = ["/bin/sh", "run.sh"]\n[env]\nPATH = "/usr/sbin:/usr/bin:/sbin:/bin"\n'
    )


def cpu_s(pids: list[int]) -> float:
    """User and system seconds of processes."""
    total = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / TICK


def wrk(url: str, body: Path, connections: int, seconds: float, headers: tuple[str, ...] = ()) -> dict[str, Any]:
    """One run of wrk. Gives requests, seconds, p50_ms, p99_ms, max_ms, errors. Raises Failed with what it said."""
    command = [
        "wrk",
        "-t1",
        f"-c{connections}",
        f"-d{seconds:g}s",
        "--timeout",
        "60s",
        "-s",
        str(HERE / "wrk.lua"),
        url,
        "--",
    ]
    done = subprocess.run([*command, str(body), *headers], capture_output=True, text=True, check=False)
    try:
        measured: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        raise Failed(f"wrk: {done.stdout}{done.stderr}") from None
    if measured["errors"]:
        raise Failed(f"{url}: {measured['errors']} of {measured['requests']} requests failed")
    measured["rps"] = measured["requests"] / measured["seconds"]
    return measured


class Bench:
    """Everything that is measured, up and running."""

    def __init__(self, platform: Platform, options: argparse.Namespace) -> None:
        self.platform = platform
        self.rounds: int = options.rounds
        self.seconds: float = options.seconds
        self.results: dict[str, list[float]] = {}
        state = platform.state
        container(state / "images")
        platform.start_node(
            "node", "--engine", "process", "--process-images", str(state / "images"), "--stop-containers"
        )
        platform.start_bridge()
        spec = state / "workspace.toml"
        spec.write_text(
            'name = "bench"\nimage = "bench"\nports = [8080]\nconcurrency = 512\n[limits]\nqueue_length = 10000\n'
        )
        platform.ngpu("workspace", "create", str(spec), "--wait", "--timeout", "60s")
        self.bearer = f"Authorization: Bearer {platform.ngpu('workspace', 'show', 'bench')['workspace']['id']}"
        self.small = self._body("small", SMALL_BYTES)
        self.large = self._body("large", LARGE_BYTES)
        self.direct = self._backend()
        port = free_port()
        home = state / "nginx"
        home.mkdir()
        (home / "nginx.conf").write_text(nginx_conf(str(home), 2, PROXY.format(backend=self.direct, port=port)))
        platform.launch(["nginx", "-p", str(home), "-c", str(home / "nginx.conf"), "-g", "daemon off;"], "nginx")
        aiohttp = free_port()
        platform.launch(
            [sys.executable, str(HERE / "aiohttp_proxy.py"), str(aiohttp), f"http://127.0.0.1:{self.direct}"], "aiohttp"
        )
        self.urls = {
            "direct": f"http://127.0.0.1:{self.direct}/",
            "nginx": f"http://127.0.0.1:{port}/",
            "aiohttp": f"http://127.0.0.1:{aiohttp}/",
            "ngpu": f"{platform.url}/user/",
        }
        for url in self.urls.values():
            self._await(url)
        self.pids = [program.pid for program in platform.programs[:3]]

    def _body(self, name: str, size: int) -> Path:
        path = self.platform.state / f"{name}.json"
        # A string, as the documents have it: with the envelope it is `size` and some.
        path.write_text(json.dumps({"btc_address": "", "data": "x" * size}))
        return path

    def _backend(self) -> int:
        home = self.platform.state / "backend"
        shutil.copytree(self.platform.state / "images" / "bench", home)
        port = free_port()
        environment = {"PORT": str(port), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "TMPDIR": str(home)}
        script = f"cd {home} && exec sh run.sh"
        self.platform.launch(["/bin/sh", "-c", script], "backend", environment)
        return port

    def _await(self, url: str) -> None:
        request = urllib.request.Request(url + "w1", self.small.read_bytes(), dict([self.bearer.split(": ", 1)]))  # noqa: S310
        deadline = time.monotonic() + 20
        while True:
            try:
                with urllib.request.urlopen(request, timeout=5) as response:  # noqa: S310
                    if len(response.read()) >= SMALL_BYTES:
                        return
            except OSError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.1)

    def load(self, who: str, path: str, connections: int, seconds: float | None = None) -> dict[str, Any]:
        """One measurement of one of the four."""
        body = self.large if path == "w3" else self.small
        headers = (self.bearer,) if who == "ngpu" else ()
        return wrk(self.urls[who] + path, body, connections, seconds or self.seconds, headers)

    def keep(self, name: str, value: float) -> None:
        """One more value of a figure."""
        self.results.setdefault(name, []).append(value)

    def throughput(self, path: str, connections: int, who: tuple[str, ...]) -> None:
        """Requests a second of each, alternating; CPU of ours."""
        for one in who:
            before = cpu_s(self.pids)
            measured = self.load(one, path, connections)
            name = f"{path}_c{connections}"
            prefix = "" if one == "ngpu" else f"{one}_"
            self.keep(f"{prefix}{name}_rps", measured["rps"])
            self.keep(f"{prefix}{name}_p50_ms", measured["p50_ms"])
            self.keep(f"{prefix}{name}_p99_ms", measured["p99_ms"])
            if one == "ngpu":
                self.keep(f"{name}_cpu_us", (cpu_s(self.pids) - before) / measured["requests"] * 1e6)

    def small_beside_large(self) -> None:
        """Latency of small requests while two bodies of 4 MiB are always in flight."""
        command = ["wrk", "-t1", "-c2", f"-d{self.seconds + 2:g}s", "--timeout", "60s", "-s", str(HERE / "wrk.lua")]
        command += [self.urls["ngpu"] + "w3", "--", str(self.large), self.bearer]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as large:
            time.sleep(1)
            self.keep("small_beside_large_p50_ms", self.load("ngpu", "w1", 4)["p50_ms"])
            large.terminate()

    def run(self, quick: bool) -> None:
        """All rounds."""
        everyone = ("direct", "nginx", "aiohttp", "ngpu")
        others = ("nginx", "aiohttp", "ngpu") if quick else everyone
        steps: list[Callable[[], None]] = [
            lambda: self.throughput("w1", 64, others),
            lambda: self.throughput("w1", 1, ("ngpu",) if quick else everyone),
            lambda: self.throughput("w2", 200, ("ngpu",) if quick else everyone),
            lambda: self.throughput("w3", 8, ("nginx", "ngpu") if quick else everyone),
            self.small_beside_large,
        ]
        self.load("ngpu", "w1", 64, 1)  # warm
        for number in range(self.rounds):
            for step in steps:
                print(
                    f"round {number + 1} of {self.rounds}: {len(self.results)} figures",
                    end="\r",
                    file=sys.stderr,
                    flush=True,
                )
                step()
        print(" " * 40, end="\r", file=sys.stderr)


def table(figures: dict[str, float]) -> str:
    """Requests a second, p50 in ms, side by side."""
    rows = [
        f"{'':14}{'direct':>14}{'nginx':>14}{'aiohttp proxy':>16}{'ngpu':>14}{'ngpu/nginx':>13}{'ngpu/aiohttp':>14}"
    ]
    for label, name in (
        ("W1 c=64 req/s", "w1_c64_rps"),
        ("W1 c=1 p50 ms", "w1_c1_p50_ms"),
        ("W2 c=200 req/s", "w2_c200_rps"),
        ("W3 c=8 req/s", "w3_c8_rps"),
    ):
        ours = figures[name]
        cells = [figures.get(f"{who}{name}") for who in ("direct_", "nginx_", "aiohttp_")]
        row = f"{label:14}" + "".join(
            f"{'-' if cell is None else f'{cell:,.2f}':>{width}}"
            for cell, width in zip(cells, (14, 14, 16), strict=True)
        )
        ratios = "".join(
            f"{'-' if not cell else f'{ours / cell:.3f}':>{width}}"
            for cell, width in zip(cells[1:], (13, 14), strict=True)
        )
        rows.append(f"{row}{ours:>14,.2f}{ratios}")
    rows.append(f"W1 c=64 CPU of our three processes: {figures['w1_c64_cpu_us']:.0f} us a request")
    rows.append(f"small requests (c=4) beside two of 4 MiB: p50 {figures['small_beside_large_p50_ms']:.1f} ms")
    return "\n".join(rows)


def main() -> int:
    """Run the benchmark. Gives the exit status."""
    parser = argparse.ArgumentParser(prog="scripts/bench/chain", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="under a minute: one short round")
    parser.add_argument("--rounds", type=int, help="default 3; with --quick 1")
    parser.add_argument("--seconds", type=float, help="of each measurement; default 8; with --quick 3")
    options = parser.parse_args()
    options.rounds = options.rounds or (1 if options.quick else 3)
    options.seconds = options.seconds or (3 if options.quick else 8)
    state = Path(tempfile.mkdtemp(prefix="ngpu-bench-"))
    try:
        with Platform(state) as platform:
            bench = Bench(platform, options)
            bench.run(options.quick)
            figures = {name: statistics.median(values) for name, values in sorted(bench.results.items())}
    except Failed as error:
        print(f"chain: {error}\nlogs: {state / 'logs'}", file=sys.stderr)
        return 1
    where = f"{os.cpu_count()} cores, Python {machine.python_version()}"
    print(f"{time.strftime('%Y-%m-%d')}, {where}, {options.rounds} rounds of {options.seconds:g} s, medians")
    print(table(figures))
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))
    with contextlib.suppress(OSError):
        shutil.rmtree(state)
    return 0


if __name__ == "__main__":
    sys.exit(main())
