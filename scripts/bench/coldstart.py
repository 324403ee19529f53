"""How long the first call to a workspace without replicas waits, beside what Docker alone takes for its container.

The container is Python's own HTTP server on the base image (scripts/base-image). Docker alone: create, start, and the
first answer on its port, asked for every 5 ms. Ours: one POST to the bridge, which wakes the workspace; it is placed,
created, started, found ready, and the call answered. In turn, each from no container at all.
"""

import argparse
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any, Final

import docker
from docker.models.containers import Container

from scripts.bench import loads, product, sheet
from scripts.bench.sheet import Goal
from scripts.programs import ROOT, Failed, Platform

GOALS = (Goal("first call to Docker alone", "ours_ms", 1.3, 1.15, to="docker_ms", most=True),)
ROUNDS: Final = 9
QUICK_ROUNDS: Final = 2
POLL_S: Final = 0.005
LIMIT_S: Final = 60.0
COMMAND = (
    "from http.server import *\n"
    "class Handler(BaseHTTPRequestHandler):\n"
    "    def do_POST(self):\n"
    "        self.rfile.read(int(self.headers['Content-Length']))\n"
    "        self.send_response(200); self.send_header('Content-Length', '300'); self.end_headers()\n"
    "        self.wfile.write(b'x' * 300)\n"
    "    def log_message(self, *_): pass\n"
    "ThreadingHTTPServer(('', 8080), Handler).serve_forever()\n"
)
WORKSPACE: Final = """
name = "cold"
image = "{image}"
command = ["python3", "-c", '''{command}''']
ports = [8080]
replicas = 0
memory = "256MiB"
[scale]
min = 0
max = 1
idle = "10s"
"""
LABEL: Final = "ngpu.bench.coldstart"


def measure(state: Path, options: argparse.Namespace, busy: float) -> sheet.Figures:
    """Both, in turn."""
    engine = docker.from_env()
    image = _image()
    figures = sheet.Figures()
    rounds = QUICK_ROUNDS if options.quick else ROUNDS
    with Platform(state) as platform:
        platform.start_node("node", "--engine", "docker", "--stop-containers")
        platform.start_bridge()
        path = state / "cold.toml"
        path.write_text(WORKSPACE.format(image=image, command=COMMAND))
        bearer = f"Authorization: Bearer {platform.ngpu('workspace', 'create', str(path))['workspace']['id']}"
        body = state / "body.json"
        body.write_text('{"data": "x"}')

        def alone() -> None:
            figures.keep("docker_ms", _alone(engine, image) * 1e3)

        def ours() -> None:
            began = time.monotonic()
            with product.post(f"{platform.url}/user/w1", body, bearer, timeout_s=LIMIT_S) as response:
                response.read()
            figures.keep("ours_ms", (time.monotonic() - began) * 1e3)
            began = time.monotonic()
            with product.post(f"{platform.url}/user/w1", body, bearer, timeout_s=LIMIT_S) as response:
                response.read()
            figures.keep("warm_ms", (time.monotonic() - began) * 1e3)
            _await_none(engine, image)

        ours()  # warm: the image is looked at once
        figures = sheet.Figures()
        sheet.rounds(rounds, [("Docker alone", alone), ("first call", ours)])
    print(sheet.where(busy, f"Docker {engine.version()['Version']}"), f"{rounds} rounds, medians.\n")
    shown = sheet.number
    rows = [
        ["Docker alone: create, start, first answer", f"{shown(figures['docker_ms'])} ms"],
        ["first call to a workspace without replicas", f"{shown(figures['ours_ms'])} ms"],
        ["the call after it", f"{shown(figures['warm_ms'])} ms"],
    ]
    print(sheet.markdown(["", "measured"], rows))
    print()
    print(sheet.goals_table(GOALS, figures))
    return figures


def _image() -> str:
    sheet.progress("base image")
    done = subprocess.run([ROOT / "scripts" / "base-image"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failed(f"the base image could not be made: {done.stderr}")
    return done.stdout.strip()


def _alone(engine: docker.DockerClient, image: str) -> float:
    began = time.monotonic()
    container: Container = engine.containers.create(
        image, ["python3", "-c", COMMAND], labels=[LABEL], mem_limit="256m", user="65534:65534"
    )
    try:
        container.start()
        container.reload()
        networks: dict[str, Any] = container.attrs["NetworkSettings"]["Networks"]
        url = f"http://{networks['bridge']['IPAddress']}:8080/"
        while not _answers(url):
            if time.monotonic() - began > LIMIT_S:
                raise Failed(f"{url} does not answer")
            time.sleep(POLL_S)
        return time.monotonic() - began
    finally:
        container.remove(force=True)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, b"x", timeout=LIMIT_S) as response:  # noqa: S310
            return len(response.read()) == product.SMALL_BYTES
    except OSError:
        return False


def _await_none(engine: docker.DockerClient, image: str) -> None:
    """Until the workspace, idle, has no container any more."""
    began = time.monotonic()
    while engine.containers.list(all=True, filters={"ancestor": image}):
        if time.monotonic() - began > LIMIT_S:
            raise Failed("the idle replica was not stopped")
        time.sleep(0.1)
    # The node has said so, and the next plan has seen it.
    time.sleep(1)


def main() -> int:
    """Run the benchmark. Gives the exit status."""
    return loads.main("coldstart", loads.options("coldstart", __doc__), measure)


if __name__ == "__main__":
    sys.exit(main())
