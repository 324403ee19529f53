"""Real processes on this machine: what the tests of this directory share."""

import concurrent.futures
import contextlib
import json
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from scripts.programs import Platform
from tests.engine import connected
from tests.images import echo_directory

WAIT_S = 60.0


class Rest:
    """A caller with nothing but HTTP and JSON."""

    def __init__(self, url: str, bearer: str = "") -> None:
        self.url = url
        self.bearer = bearer

    def raw(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
        timeout: float = 60,
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers (lower case) and body, whatever the status."""
        sent = {"Content-Type": "application/json", **(headers or {})}
        if self.bearer:
            sent.setdefault("Authorization", f"Bearer {self.bearer}")
        request = urllib.request.Request(self.url + path, body, sent, method=method)
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                return response.status, {k.lower(): v for k, v in response.headers.items()}, response.read()
        except urllib.error.HTTPError as error:
            return error.code, {k.lower(): v for k, v in error.headers.items()}, error.read()

    def call(self, method: str, path: str, body: object = None, **options: Any) -> tuple[int, dict[str, Any]]:
        """Status and JSON."""
        status, _, answer = self.raw(method, path, None if body is None else json.dumps(body).encode(), **options)
        return status, json.loads(answer)

    def ok(self, method: str, path: str, body: object = None, **options: Any) -> dict[str, Any]:
        """The JSON of a success."""
        status, answer = self.call(method, path, body, **options)
        assert (status, answer.get("result_code")) == (200, 200), answer
        return answer

    def ended(self, task: str, limit_s: float = WAIT_S) -> dict[str, Any]:
        """The answer of queryTask once the task has ended."""
        deadline = time.monotonic() + limit_s
        while True:
            _, answer = self.call("GET", f"/user/queryTask?taskID={task}&wait=5")
            if answer["result_code"] not in (100, 101):
                return answer
            assert time.monotonic() < deadline, answer


class Callers:
    """Callers that call without a pause until told to stop; every answer is kept."""

    def __init__(self, one_call: Callable[[int], Any], callers: int) -> None:
        self._one_call = one_call
        self._stop = threading.Event()
        self._pool = concurrent.futures.ThreadPoolExecutor(callers)
        self.answers: list[Any] = []
        self._futures = [self._pool.submit(self._run, number) for number in range(callers)]

    def _run(self, caller: int) -> None:
        while not self._stop.is_set():
            self.answers.append(self._one_call(caller))

    def stop(self) -> list[Any]:
        """All answers. Raises what a caller raised."""
        self._stop.set()
        for future in self._futures:
            future.result()
        self._pool.shutdown()
        return self.answers


def until(what: Callable[[], Any], limit_s: float = WAIT_S) -> Any:
    """The first true answer of `what`, asked four times a second."""
    deadline = time.monotonic() + limit_s
    while True:
        if answer := what():
            return answer
        assert time.monotonic() < deadline, f"still {answer!r} after {limit_s} s"
        time.sleep(0.25)


def workspace_file(state: Path, name: str, image: str, **fields: Any) -> str:
    """A workspace description; `fields` are lines of TOML values."""
    lines = [f"name = {json.dumps(name)}", f"image = {json.dumps(image)}", "ports = [8080]"]
    lines += [f"{key} = {json.dumps(value)}" for key, value in fields.items() if not isinstance(value, dict)]
    for key, table in fields.items():
        if isinstance(table, dict):
            lines += [f"[{key}]", *(f"{inner} = {json.dumps(value)}" for inner, value in table.items())]
    path = state / f"{name}.toml"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture
def platform(tmp_path: Path) -> Iterator[Platform]:
    """A control plane; nodes and bridge are for the test to start."""
    with Platform(tmp_path) as running:
        yield running


@pytest.fixture
def unique() -> str:
    """A name that no other test run on this machine uses."""
    return f"t{uuid.uuid4().hex[:10]}"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Image directories for the process engine, with `echo` in it."""
    directory = tmp_path / "images"
    echo_directory(directory)
    return directory


@pytest.fixture
def echo(platform: Platform, images: Path) -> Rest:
    """The REST API of a platform with one process node and an echo workspace, as its owner calls it."""
    platform.start_node("node", "--engine", "process", "--process-images", str(images), "--stop-containers")
    platform.start_bridge()
    platform.ngpu(
        *("workspace", "create", workspace_file(platform.state, "echo", "echo", concurrency=8)),
        *("--wait", "--timeout", "60s"),
    )
    return Rest(platform.url, platform.ngpu("workspace", "show", "echo")["workspace"]["id"])


@pytest.fixture(scope="session")
def docker_engine() -> Iterator[Any]:
    """A client of the Docker engine; skips where none answers."""
    with contextlib.closing(connected()) as client:
        yield client
