"""Webhooks with real processes: asked for over REST, delivered over a kill -9 of the control plane, signed."""

import base64
import hashlib
import hmac
import json
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from scripts.programs import Platform
from tests.images import echo_directory
from tests.system.conftest import Rest, until, workspace_file

SETTINGS = {
    "NGPU_CONTROLPLANE_WEBHOOKS__ALLOW_HTTP": "true",
    "NGPU_CONTROLPLANE_WEBHOOKS__ALLOW_NETWORKS": "127.0.0.0/8",
    "NGPU_CONTROLPLANE_WEBHOOKS__FIRST_PAUSE": "0.2s",
}


class Receiver:
    """Somebody's web server. `status`: what it answers; 0: nothing, it hangs until it is closed."""

    def __init__(self, port: int = 0, status: int = 204) -> None:
        self.status = status
        self.posts: list[tuple[dict[str, str], bytes]] = []
        self._closed = threading.Event()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.posts.append(({name.lower(): value for name, value in self.headers.items()}, body))
                if receiver.status:
                    self.send_response(receiver.status)
                    self.end_headers()
                else:
                    receiver._closed.wait()

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/ended"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def got(self, number: int) -> list[dict[str, Any]]:
        """The JSON of so many posts."""
        until(lambda: len(self.posts) >= number)
        return [json.loads(body) for _, body in self.posts]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


@pytest.fixture
def platform(tmp_path: Path) -> Iterator[Platform]:
    with Platform(tmp_path, settings=SETTINGS) as running:
        images = tmp_path / "images"
        echo_directory(images)
        running.start_node("node", "--engine", "process", "--process-images", str(images), "--stop-containers")
        running.start_bridge()
        file = workspace_file(running.state, "echo", "echo", concurrency=8)
        running.ngpu("workspace", "create", file, "--wait", "--timeout", "60s")
        yield running


@pytest.fixture
def rest(platform: Platform) -> Rest:
    return Rest(platform.url, platform.ngpu("workspace", "show", "echo")["workspace"]["id"])


def is_signed(platform: Platform, headers: dict[str, str], body: bytes) -> bool:
    secret = platform.ngpu("workspace", "webhook-secret", "echo")["secret"]["secret"]
    text = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    digest = hmac.new(base64.b64decode(secret.removeprefix("whsec_")), text, hashlib.sha256).digest()
    return headers["webhook-signature"] == f"v1,{base64.b64encode(digest).decode()}"


def webhook(rest: Rest, task: str) -> Any:
    def detailed() -> Any:
        # The bridge may need a moment to find a control plane that was started anew.
        status, answer = rest.call("GET", f"/user/getDetailed?taskID={task}")
        return status == 200 and answer["taskInfo"]["ext"]["webhook"]

    return until(detailed)


def test_every_door_takes_a_callback(platform: Platform, rest: Rest, receiver: Receiver) -> None:
    header = {"X-NGPU-Callback-Url": receiver.url}
    submit = "/user/schedulingTask?paramUrl=echo"
    tasks = [rest.ok("POST", f"{submit}&callback_url={receiver.url}", {"data": "a"})["taskID"]]
    tasks.append(rest.ok("POST", submit, {"data": "b"}, headers=header)["taskID"])
    tasks.append(rest.ok("POST", "/user/echo", {"data": "c"}, headers=header)["taskID"])
    status, headers, answer = rest.raw("POST", "/run/echo", b"d", header)
    assert status == 200
    # Of where its end is told the container has learned nothing.
    assert b"callback" not in answer.lower()
    tasks.append(headers["x-ngpu-task-id"])
    submitted = platform.ngpu("task", "submit", "echo", "-w", "echo", "-d", "e", "--callback-url", receiver.url)
    tasks.append(submitted["task"]["task_id"])
    told = receiver.got(5)
    assert {one["taskID"] for one in told} == set(tasks)
    for one in told:
        assert (one["type"], one["result_code"], one["state"]) == ("task.completed", 200, 3)
        assert "callback" not in one["data"].lower()
        # The very answer of queryTask.
        queried = rest.ok("GET", f"/user/queryTask?taskID={one['taskID']}")
        assert {name: one[name] for name in queried} == queried
    assert all(is_signed(platform, *post) for post in receiver.posts)
    shown = until(lambda: (found := webhook(rest, tasks[0]))["state"] == "delivered" and found)
    assert (shown["url"], shown["tries"], shown["log"][0]["httpStatus"]) == (receiver.url, 1, 204)
    with urllib.request.urlopen(f"http://{platform.metrics}/metrics") as answer:
        figures = answer.read().decode()
    assert 'ngpu_webhooks_ended_total{state="delivered"} 5.0' in figures
    assert 'ngpu_webhook_tries_total{outcome="delivered"} 5.0' in figures
    assert 'ngpu_webhooks{state="under_way"} 0.0' in figures
    # Whoever has but the task's id does not see where its end was told.
    assert webhook(Rest(platform.url), tasks[0])["url"] == ""


@pytest.mark.parametrize("url", ["https://10.0.0.1/", "ftp://example.com/", "https://u:p@example.com/", "https://["])
def test_bad_url_is_refused(rest: Rest, url: str) -> None:
    status, answer = rest.call("POST", f"/user/schedulingTask?paramUrl=echo&callback_url={url}", {"data": "a"})
    assert (status, answer["result_code"]) == (400, 400)
    assert "callback_url" in answer["msg"]


def test_kill_between_end_and_delivery(platform: Platform, rest: Rest) -> None:
    receiver = Receiver(status=0)
    submit = f"/user/schedulingTask?paramUrl=echo&callback_url={receiver.url}"
    tasks = [rest.ok("POST", submit, {"data": str(number)})["taskID"] for number in range(10)]
    for task in tasks:
        assert rest.ended(task)["result_code"] == 200
    # All have ended, some are being posted, none has been answered.
    until(lambda: receiver.posts)
    platform.controlplane.kill()
    receiver.close()
    begun = {json.loads(body)["taskID"]: headers["webhook-id"] for headers, body in receiver.posts}
    platform.start_controlplane()
    back = Receiver(receiver.port)
    try:
        until(lambda: {json.loads(body)["taskID"] for _, body in back.posts} == set(tasks))
        until(lambda: all(webhook(rest, task)["state"] == "delivered" for task in tasks))
        assert len(back.posts) == len(tasks)
        for headers, body in back.posts:
            task = json.loads(body)["taskID"]
            assert headers["webhook-id"] == begun.get(task, f"msg_{task}")
            assert is_signed(platform, headers, body)
    finally:
        back.close()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_kills_at_any_moment_lose_no_webhook(platform: Platform, rest: Rest, receiver: Receiver) -> None:
    """Under load, killed again and again: of every acknowledged task the end is told."""
    accepted: list[str] = []
    stop = threading.Event()

    def submit() -> None:
        while not stop.is_set():
            status, answer = rest.call(
                "POST", f"/user/schedulingTask?paramUrl=echo&callback_url={receiver.url}", {"data": "x"}
            )
            if status == 200:
                accepted.append(answer["taskID"])
            else:
                time.sleep(0.05)

    submitters = [threading.Thread(target=submit) for _ in range(4)]
    for submitter in submitters:
        submitter.start()
    try:
        for _ in range(4):
            time.sleep(1.5)
            platform.controlplane.kill()
            platform.start_controlplane()
    finally:
        time.sleep(1)
        stop.set()
        for submitter in submitters:
            submitter.join()
    assert len(accepted) > 20
    until(lambda: set(accepted) <= {json.loads(body)["taskID"] for _, body in list(receiver.posts)})
    until(lambda: all(webhook(rest, task)["state"] == "delivered" for task in accepted[-20:]))
