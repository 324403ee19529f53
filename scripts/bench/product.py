"""The product under load: control plane, node and bridge as three processes, with one workspace that is nginx.

The container is nginx with its echo module, run by the node as a local process, so that what is measured is ours.
Its paths: /w1 answers 300 B, /w2 the same after 20 ms, /w3 4 MiB, /w64 64 MiB; each reads what it is sent.
"""

import argparse
import contextlib
import http.client
import json
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from scripts.bench import sheet
from scripts.bench.loads import MIB, cpu_s, free_port
from scripts.programs import Failed, Platform, Program

SMALL_BYTES = 300
LARGE_BYTES = 4 * MIB
#: As much as the bridge and the workspace take by default, envelope and all.
HUGE_BYTES = 64 * MIB - 1024
READY_LIMIT_S = 60.0
WORKSPACE = """
name = "bench"
image = "bench"
ports = [8080]
concurrency = 512
[limits]
queue_length = 10000
"""

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
        # Read what is sent, then redirect: a file is answered to GET only, and error_page makes it one.
        location = /w3 {{ client_body_buffer_size 8m; echo_read_request_body; echo_exec /post/large; }}
        location = /w64 {{ client_body_buffer_size 65m; echo_read_request_body; echo_exec /post/huge; }}
        location = /post/large {{ error_page 405 =200 /large; }}
        location = /post/huge {{ error_page 405 =200 /huge; }}
        location = /large {{ }}
        location = /huge {{ }}
    }}
"""
#: As a person who knows it sets it up for large bodies: nothing goes to its disk on the way.
PROXY = """
    upstream backend {{ server 127.0.0.1:{backend}; keepalive 256; }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location / {{
            proxy_pass http://backend; proxy_http_version 1.1; proxy_set_header Connection "";
            proxy_request_buffering off; proxy_buffers 16 64k; proxy_buffer_size 64k; proxy_busy_buffers_size 256k;
            proxy_max_temp_file_size 0;
        }}
    }}
"""
#: nginx as a workspace's container: its port comes from the environment.
RUN = """#!/bin/sh
set -eu
home=$(mktemp -d)
for file in large huge; do ln "$file" "$home/$file" 2>/dev/null || cp "$file" "$home/$file"; done
mkdir "$home/post"; ln -s ../large ../huge "$home/post"
sed -e "s#@PORT@#$PORT#g" -e "s#@HOME@#$home#g" nginx.conf >"$home/nginx.conf"
exec nginx -p "$home" -c "$home/nginx.conf" -g 'daemon off;'
"""


#: As they are started.
PROGRAMS = ("control plane", "node daemon", "bridge")


def keep_cpu(figures: sheet.Figures, name: str, before: Sequence[float], after: Sequence[float], count: int) -> None:
    """CPU of each of the three for one of `count`, from readings before and after. `cpu_words` tells it."""
    for program, begun, ended in zip(PROGRAMS, before, after, strict=True):
        figures.keep(f"{name}_cpu_us_{program.replace(' ', '_')}", (ended - begun) / max(1, count) * 1e6)


def cpu_words(figures: sheet.Figures, name: str) -> str:
    """What `keep_cpu` kept, in words."""
    return ", ".join(
        f"{program} {sheet.number(figures[f'{name}_cpu_us_' + program.replace(' ', '_')])}" for program in PROGRAMS
    )


class Product:
    """The three programs, up, and the workspace ready. `pids`: control plane, node, bridge."""

    def __init__(self, platform: Platform) -> None:
        self.platform = platform
        state = platform.state
        _container(state / "images")
        platform.start_node(
            "node", "--engine", "process", "--process-images", str(state / "images"), "--stop-containers"
        )
        platform.start_bridge()
        self.pids = [program.pid for program in platform.programs]
        self.bearer_id = self.workspace("bench", WORKSPACE)
        self.bearer = f"Authorization: Bearer {self.bearer_id}"
        self.small = self._body("small", SMALL_BYTES)
        self.large = self._body("large", LARGE_BYTES)
        #: With the documented envelope, and raw.
        self.url = f"{platform.url}/user/"
        self.raw_url = f"{platform.url}/run/"
        await_answer(self.url + "w1", self.small, self.bearer)

    def workspace(self, name: str, spec: str) -> str:
        """A new workspace, ready. Gives its id."""
        return workspace(self.platform, name, spec)

    @property
    def programs(self) -> dict[str, int]:
        """The three by name, with their process ids."""
        return dict(zip(PROGRAMS, self.pids, strict=True))

    def cpu_by_program(self) -> list[float]:
        """User and system seconds so far of each of the three."""
        return [cpu_s([pid]) for pid in self.pids]

    def has_raw(self) -> bool:
        """Whether this version of the bridge has the raw pass-through."""
        try:
            post(self.raw_url + "w1", self.small, self.bearer).close()
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return False
            raise Failed(f"{self.raw_url}w1: HTTP {error.code}: {error.read(500).decode(errors='replace')}") from None
        return True

    def get(self, path_and_query: str) -> dict[str, Any]:
        """The JSON answer of the REST API."""
        request = urllib.request.Request(self.platform.url + path_and_query, headers=_headers(self.bearer))  # noqa: S310
        with urllib.request.urlopen(request, timeout=60) as response:  # noqa: S310
            answer: dict[str, Any] = json.load(response)
            return answer

    def submit(self) -> str:
        """One asynchronous task. Gives its id."""
        with post(self.url + "schedulingTask?paramUrl=w1&paramPort=8080", self.small, self.bearer) as response:
            task_id: str = json.load(response)["taskID"]
            return task_id

    def ended_task(self) -> str:
        """The id of a task that has its result."""
        task_id = self.submit()
        if self.get(f"/user/queryTask?taskID={task_id}&wait=30")["result_code"] != 200:
            raise Failed(f"task {task_id} did not end well")
        return task_id

    def start_backend(self) -> int:
        """The same container once more, without us. Gives its port."""
        home = self.platform.state / "backend"
        shutil.copytree(self.platform.state / "images" / "bench", home)
        port = free_port()
        environment = {"PORT": str(port), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "TMPDIR": str(home)}
        self.platform.launch(["/bin/sh", "-c", f"cd {home} && exec sh run.sh"], "backend", environment)
        return port

    def start_nginx(self, backend: int, workers: int = 2) -> tuple[str, Program]:
        """nginx as a proxy before a backend. Gives its URL."""
        home = self.platform.state / "nginx"
        home.mkdir()
        port = free_port()
        http = PROXY.format(backend=backend, port=port)
        (home / "nginx.conf").write_text(NGINX.format(home=home, workers=workers, http=http))
        command = ["nginx", "-p", str(home), "-c", str(home / "nginx.conf"), "-g", "daemon off;"]
        return f"http://127.0.0.1:{port}/", self.platform.launch(command, "nginx")

    def _body(self, name: str, size: int) -> Path:
        path = self.platform.state / f"{name}.json"
        # A string, as the documents have it: with the envelope it is `size` and some.
        path.write_text(json.dumps({"btc_address": "", "data": "x" * size}))
        return path


def workspace(platform: Platform, name: str, spec: str) -> str:
    """A new workspace, ready. Gives its id."""
    path = platform.state / f"{name}.toml"
    path.write_text(spec)
    platform.ngpu("workspace", "create", str(path), "--wait", "--timeout", f"{READY_LIMIT_S:.0f}s")
    workspace_id: str = platform.ngpu("workspace", "show", name)["workspace"]["id"]
    return workspace_id


@contextlib.contextmanager
def up(state: Path, *, settings: dict[str, str] | None = None) -> Iterator[Product]:
    """The product in that directory, ended with the block."""
    with Platform(state, settings=settings) as platform:
        yield Product(platform)


def add_note(parser: argparse.ArgumentParser) -> None:
    """What the help of every benchmark that loads the product says of it."""
    parser.epilog = """
The product: bridge, control plane and node daemon as three processes with authentication, selection, durable record and
envelope; its state in a temporary directory that is removed. Figures that were kept: docs/benchmarks.md."""


def post(url: str, body: Path, *headers: str, timeout_s: float = 60.0) -> Any:
    """POST a file, once. The answer is a context."""
    request = urllib.request.Request(url, body.read_bytes(), _headers(*headers, "Content-Type: application/json"))  # noqa: S310
    return urllib.request.urlopen(request, timeout=timeout_s)  # noqa: S310


def await_answer(
    url: str,
    body: Path,
    *headers: str,
    program: Program | None = None,
    limit_s: float = 20.0,
    least_bytes: int = SMALL_BYTES,
) -> None:
    """Wait until a POST is answered with so many bytes or more. Raises Failed."""
    deadline = time.monotonic() + limit_s
    while True:
        said = ""
        try:
            with post(url, body, *headers) as response:
                said = response.read().decode(errors="replace")
            if len(said) >= least_bytes:
                return
        except (OSError, http.client.HTTPException) as error:
            said = str(error)
        if program is not None and program.process.poll() is not None:
            raise Failed(f"{program.command[0]} has ended; see {program.log}")
        if time.monotonic() > deadline:
            raise Failed(f"{url} did not answer as it should: {said[:200]}")
        time.sleep(0.1)


def _headers(*headers: str) -> dict[str, str]:
    return dict(header.split(": ", 1) for header in headers)


def _container(images: Path) -> None:
    """The image directory of the workspace."""
    image = images / "bench"
    image.mkdir(parents=True)
    small = json.dumps({"result": "x" * (SMALL_BYTES - 14)})
    backend = BACKEND.format(port="@PORT@", home="@HOME@", small=small)
    (image / "nginx.conf").write_text(NGINX.format(home="@HOME@", workers=1, http=backend))
    (image / "large").write_bytes(b"x" * LARGE_BYTES)
    (image / "huge").write_bytes(b"x" * HUGE_BYTES)
    (image / "run.sh").write_text(RUN)
    (image / "image.toml").write_text(
        'command = ["/bin/sh", "run.sh"]\n[env]\nPATH = "/usr/sbin:/usr/bin:/sbin:/bin"\n'
    )
