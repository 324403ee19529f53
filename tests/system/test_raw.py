"""Raw pass-through with real processes and clients that nobody here wrote, each told another base URL and key only."""

import asyncio
import contextlib
import hashlib
import http.client
import itertools
import json
import os
import re
import shutil
import signal
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
import websockets
import websockets.sync.client as ws_client

from scripts.programs import Platform, Program
from tests.system.conftest import Rest, until

KIB, MIB = 1024, 1024 * 1024
CHAT = Path(__file__).with_name("chat.py")
#: From the container's write to the caller's read, on this machine.
FIRST_EVENT_S = 0.1
HANGUP_S = 2.0
WORKSPACE = """
name = "{name}"
image = "chat"
ports = [8080, 8081]
concurrency = 16
cpus = 0.1
[limits]
request_body = "{request_body}"
response_body = "300MiB"
run_time = "{run_time}"
"""


class Caller:
    """The owner of a workspace, with the connections of the standard library: what it sends is all that is sent."""

    def __init__(self, url: str, key: str) -> None:
        self.url = url
        self.key = key
        self.rest = Rest(url, key)
        split = urlsplit(url)
        assert split.hostname
        assert split.port
        self.address = (split.hostname, split.port)

    @property
    def bearer(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    @contextlib.contextmanager
    def begin(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        """A call, up to the head of its answer."""
        with contextlib.closing(http.client.HTTPConnection(*self.address, timeout=60)) as connection:
            connection.request(method, f"/run{path}", body, {**self.bearer, **(headers or {})})
            with connection.getresponse() as answer:
                yield answer

    def head(self, line: str, *fields: str) -> bytes:
        """The head of a request, to be sent by hand."""
        return "\r\n".join([line, "Host: x", f"Authorization: Bearer {self.key}", *fields, "", ""]).encode()

    def call(self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Any:
        """The JSON of a success."""
        with self.begin(method, path, body, headers) as answer:
            assert answer.status == 200, answer.read()
            return json.load(answer)

    def raw(self, request: bytes) -> bytes:
        """Bytes out, bytes back until the bridge closes."""
        with socket.create_connection(self.address, timeout=60) as connection:
            connection.sendall(request)
            answer = b""
            while piece := connection.recv(MIB):
                answer += piece
            return answer

    def detail(self, task_id: str | None) -> dict[str, Any]:
        """What is recorded of a task, once it has ended."""
        assert task_id

        def ended() -> Any:
            info = self.rest.ok("GET", f"/user/getDetailed?taskID={task_id}")["taskInfo"]
            return info if info["responsetime"] else None

        return until(ended)  # type: ignore[no-any-return]


def start(state: Path, *bridge: str) -> Platform:
    """A platform with one process node and a workspace that runs chat.py; to be stopped by the caller."""
    image = state / "images" / "chat"
    image.mkdir(parents=True)
    shutil.copy(CHAT, image / "chat.py")
    (image / "image.toml").write_text(f"command = {json.dumps([sys.executable, '-u', 'chat.py'])}\n")
    platform = Platform(state).__enter__()
    try:
        start_node(platform)
        platform.start_bridge(*bridge)
    except BaseException:
        platform.stop()
        raise
    return platform


def start_node(platform: Platform, **options: Any) -> Program:
    images = str(platform.state / "images")
    return platform.start_node("node", "--engine", "process", "--process-images", images, **options)


def workspace(platform: Platform, name: str = "chat", *, request_body: str = "300MiB", run_time: str = "10m") -> Caller:
    file = platform.state / f"{name}.toml"
    file.write_text(WORKSPACE.format(name=name, request_body=request_body, run_time=run_time))
    platform.ngpu("workspace", "create", str(file), "--wait", "--timeout", "60s")
    return Caller(platform.url, platform.ngpu("workspace", "show", name)["workspace"]["id"])


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """For what does no harm to the others."""
    platform = start(tmp_path_factory.mktemp("raw"))
    yield platform
    platform.stop()


@pytest.fixture(scope="module")
def chat(running: Platform) -> Caller:
    return workspace(running)


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Platform]:
    """For what kills."""
    platform = start(tmp_path)
    yield platform
    platform.stop()


def events(answer: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """Server-sent events with JSON in them, as they come."""
    while line := answer.readline():
        if line.startswith(b"data: "):
            yield json.loads(line[6:])


# The openai package.


def test_openai_package(chat: Caller) -> None:
    with openai.OpenAI(base_url=f"{chat.url}/run/v1", api_key=chat.key) as client:
        assert [model.id for model in client.models.list()] == ["parrot"]
        said = client.chat.completions.create(model="parrot", messages=[{"role": "user", "content": "so it goes"}])
        assert said.choices[0].message.content == "so it goes"


def test_openai_package_streams_while_the_container_writes(chat: Caller) -> None:
    with openai.OpenAI(base_url=f"{chat.url}/run/v1", api_key=chat.key) as client:
        words = "one two three four five six"
        # Its first stream takes it a while: it makes the classes that it parses with.
        list(client.chat.completions.create(model="parrot", messages=[{"role": "user", "content": ""}], stream=True))
        late, at = [], []
        text = ""
        stream = client.chat.completions.create(
            model="parrot",
            messages=[{"role": "user", "content": words}],
            stream=True,
            extra_body={"gap": 0.2},
        )
        for chunk in stream:
            at.append(time.time())
            assert chunk.system_fingerprint
            late.append(at[-1] - float(chunk.system_fingerprint))
            text += chunk.choices[0].delta.content or ""
    assert text == words
    assert max(late) < FIRST_EVENT_S, late
    assert min(after - before for before, after in itertools.pairwise(at)) > 0.1


async def test_openai_package_with_many_streams_at_once(chat: Caller) -> None:
    async with openai.AsyncOpenAI(base_url=f"{chat.url}/run/v1", api_key=chat.key) as client:

        async def say(number: int) -> str:
            words = " ".join(f"{number}.{word}" for word in range(20))
            stream = await client.chat.completions.create(
                model="parrot",
                messages=[{"role": "user", "content": words}],
                stream=True,
                extra_body={"gap": 0.01},
            )
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            assert text == words
            return text

        assert len(set(await asyncio.gather(*map(say, range(16))))) == 16


def test_openai_package_with_a_wrong_key(chat: Caller) -> None:
    with (
        openai.OpenAI(base_url=f"{chat.url}/run/v1", api_key="4" * 24, max_retries=0) as client,
        pytest.raises(openai.AuthenticationError) as refused,
    ):
        client.models.list()
    assert refused.value.response.json()["result_code"] == 401
    assert refused.value.request_id


# The websockets package.


@contextlib.contextmanager
def socket_of(chat: Caller, port: str = "8081") -> Iterator[ws_client.ClientConnection]:
    url = chat.url.replace("http", "ws", 1)
    headers = {**chat.bearer, "X-NGPU-Port": port}
    with ws_client.connect(f"{url}/run/any/path?x=1", additional_headers=headers, max_size=None) as connection:
        yield connection


def test_websockets_package(chat: Caller) -> None:
    with socket_of(chat) as connection:
        for message in ("hello", "", "é" * 1000, b"\0\xff" * 5, os.urandom(5 * MIB)):
            connection.send(message)
            assert connection.recv() == message
        waits = []
        for _ in range(100):
            began = time.perf_counter()
            connection.send("ping")
            connection.recv()
            waits.append(time.perf_counter() - began)
        assert statistics.median(waits) < 0.05
        connection.send("close")
        with pytest.raises(websockets.ConnectionClosedError) as closed:
            connection.recv()
        assert closed.value.rcvd == websockets.frames.Close(4000, "as you wish")
        assert connection.response
        task_id = connection.response.headers["X-NGPU-Task-Id"]
    info = chat.detail(task_id)
    assert (info["state"], info["method"], info["ext"]["httpStatus"]) == (3, "run", 101)
    assert info["requrl"] == "/run/any/path?x=1"
    # Counted both ways, and not kept: what the caller sends is masked, four bytes more a message.
    assert info["ext"]["requestSize"] > info["ext"]["responseSize"] > 5 * MIB
    assert (info["request"], info["response"]) == ("", "")
    assert chat.rest.ok("GET", f"/user/queryTask?taskID={task_id}")["result_size"] == info["ext"]["responseSize"]


async def test_many_websockets_at_once(chat: Caller) -> None:
    url = chat.url.replace("http", "ws", 1)
    headers = {**chat.bearer, "X-NGPU-Port": "8081"}

    async def talk(number: int) -> None:
        async with websockets.connect(f"{url}/run/", additional_headers=headers) as connection:
            for turn in range(50):
                await connection.send(f"{number}.{turn}")
            for turn in range(50):
                assert await connection.recv() == f"{number}.{turn}"

    await asyncio.gather(*map(talk, range(12)))


def test_refused_websocket_is_an_answer_like_any_other(chat: Caller) -> None:
    with pytest.raises(websockets.InvalidStatus) as refused, socket_of(chat, "8080"):
        pass
    assert refused.value.response.status_code == 200
    about = json.loads(refused.value.response.body)
    asked = {name.lower(): value for name, value in about["headers"]}
    assert (asked["upgrade"], asked["connection"], asked["sec-websocket-version"]) == ("websocket", "Upgrade", "13")
    assert "authorization" not in asked


def test_caller_who_drops_a_websocket_ends_the_task(chat: Caller) -> None:
    with socket_of(chat) as connection:
        assert connection.response
        connection.send("x")
        connection.recv()
        connection.socket.shutdown(socket.SHUT_RDWR)
    info = chat.detail(connection.response.headers["X-NGPU-Task-Id"])
    assert info["state"] == 3
    assert info["ext"]["seconds"] < 5


# What is the same at the other end.


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_method_path_query_and_headers_are_the_callers(chat: Caller, method: str) -> None:
    target = "/a/%7Eb;v=1/file=/c%20d?x=%C3%A9&y&x=2+3&z=%3D"
    sent = {"X-Own": "1", "Accept-Encoding": "zstd", "Idempotency-Key": "k", "Cookie": "c=d", "X-Request-Id": "abc"}
    with chat.begin(method, target, b"body" if method in ("POST", "PUT", "PATCH") else None, sent) as answer:
        body = answer.read()
        assert (answer.status, answer.headers["X-Request-Id"]) == (200, "abc")
        assert re.fullmatch(r"\d{8}_\d\d_\d\d_\d\d_\d{20}", answer.headers["X-NGPU-Task-Id"])
        length = int(answer.headers["Content-Length"])
    if method == "HEAD":
        assert body == b""
        assert length > 100
        return
    about = json.loads(body)
    assert (about["method"], about["target"]) == (method, target)
    asked = [(name.lower(), value) for name, value in about["headers"]]
    for name, value in sent.items():
        assert asked.count((name.lower(), value)) == 1
    assert not {name for name, _ in asked} & {"authorization", "x-ngpu-port", "connection", "transfer-encoding"}


def test_odd_answer(chat: Caller) -> None:
    with chat.begin("GET", "/odd") as answer:
        assert answer.read() == b"odd"
        assert answer.headers.get_all("Set-Cookie") == ["a=1; Path=/", "b=2"]
        # The container's own stays; of ours only the other is added.
        assert answer.headers.get_all("X-Request-Id") == ["mine"]
        assert len(answer.headers.get_all("X-NGPU-Task-Id") or ()) == 1
        assert {"x-ngpu-not", "trailer", "link"}.isdisjoint(map(str.lower, answer.headers))
    with chat.begin("GET", "/cached") as answer:
        assert (answer.status, answer.headers["ETag"], answer.headers["Content-Length"]) == (304, '"1"', "12345")
        assert answer.read() == b""
    with chat.begin("HEAD", "/bytes?n=1234567") as answer:
        assert (answer.status, answer.headers["Content-Length"], answer.read()) == (200, "1234567", b"")


def test_connection_is_kept_and_goes_on_after_every_kind_of_answer(chat: Caller) -> None:
    connection = http.client.HTTPConnection(*chat.address, timeout=60)
    connection.connect()
    first = connection.sock
    for path in ("/v1/models", "/bytes?n=300000", "/bytes?n=300000&chunked=1", "/events?n=2&gap=0.1", "/cached", "/"):
        connection.request("GET", f"/run{path}", headers=chat.bearer)
        connection.getresponse().read()
    assert connection.sock is first
    connection.close()


def test_http_1_0(chat: Caller) -> None:
    head, _, body = chat.raw(chat.head("GET /run/bytes?n=300000&chunked=1 HTTP/1.0")).partition(b"\r\n\r\n")
    assert b"chunked" not in head
    assert body == bytes(300_000)


@pytest.mark.parametrize("size", [0, 1, 64 * KIB - 1, 64 * KIB, 64 * KIB + 1, 256 * KIB, 3 * MIB + 7])
@pytest.mark.parametrize("chunked", [False, True])
def test_bodies_are_the_same_byte_for_byte(chat: Caller, size: int, chunked: bool) -> None:
    body = os.urandom(size)
    kind = {"Content-Type": 'multipart/form-data; boundary="x\'y"'}
    pieces = (body[at : at + 10_000] for at in range(0, size, 10_000)) if chunked else body
    with chat.begin("POST", "/mirror", pieces, kind) as answer:
        assert answer.headers["Content-Type"] == kind["Content-Type"]
        assert answer.read() == body


def test_multipart_of_a_real_client(chat: Caller) -> None:
    sound = os.urandom(200_000)
    with openai.OpenAI(base_url=f"{chat.url}/run/v1", api_key=chat.key) as client:
        # The container answers it with what it has read.
        raw = client.audio.transcriptions.with_raw_response.create(file=("a.wav", sound), model="parrot")
    about = raw.http_response.json()
    kind = next(value for name, value in about["headers"] if name.lower() == "content-type")
    assert kind.startswith("multipart/form-data; boundary=")
    assert about["size"] > 200_000


def test_100_continue(chat: Caller) -> None:
    with socket.create_connection(chat.address, timeout=60) as connection:
        fields = ("Connection: close", "Content-Length: 100000", "Expect: 100-continue")
        connection.sendall(chat.head("POST /run/about HTTP/1.1", *fields))
        assert connection.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(bytes(100_000))
        answer = b""
        while piece := connection.recv(MIB):
            answer += piece
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["size"] == 100_000


# Streaming.


def test_ten_thousand_events_in_order_and_at_once(chat: Caller) -> None:
    with chat.begin("GET", "/events?n=10000") as answer:
        assert answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        first = next(stream := events(answer))
        late = time.time() - first["time"]
        numbers = [first["number"], *(event["number"] for event in stream)]
    assert numbers == list(range(10_000))
    assert late < FIRST_EVENT_S


def test_head_comes_before_the_first_event(chat: Caller) -> None:
    began = time.monotonic()
    connection = http.client.HTTPConnection(*chat.address, timeout=60)
    connection.request("GET", "/run/events?n=2&gap=1", headers=chat.bearer)
    answer = connection.getresponse()
    next(stream := events(answer))
    assert time.monotonic() - began < 0.5
    assert [event["number"] for event in stream] == [1]
    assert time.monotonic() - began > 1
    connection.close()


def test_nothing_but_the_run_time_cuts_a_silent_stream(tmp_path: Path) -> None:
    config = tmp_path / "bridge.toml"
    config.write_text('sync_wait = "1s"\nstall_time = "1s"\nidle_time = "1s"\nbody_time = "1s"\n')
    platform = start(tmp_path, "--config", str(config))
    try:
        chat = workspace(platform, run_time="6s")
        with chat.begin("GET", "/events?n=3&gap=2") as answer:
            assert [event["number"] for event in events(answer)] == [0, 1, 2]
        with socket_of(chat) as connection:
            time.sleep(2.5)
            connection.send("still there")
            assert connection.recv() == "still there"
        began = time.monotonic()
        with chat.begin("GET", "/forever?name=limit") as answer, pytest.raises(http.client.IncompleteRead):
            answer.read()
        assert 5 < time.monotonic() - began < 9
        info = chat.detail(answer.headers["X-NGPU-Task-Id"])
        assert (info["state"], info["ext"]["error"]["reason"]) == (-1, "RUN_TIME_LIMIT")
        with chat.begin("GET", "/silent?name=limit") as answer:
            assert answer.status == 504
            assert json.load(answer)["result_code"] == 504
    finally:
        platform.stop()


def test_answer_that_breaks_off_is_seen_to_break_off(chat: Caller) -> None:
    with chat.begin("GET", "/cut?n=500000") as answer, pytest.raises(http.client.IncompleteRead):
        answer.read()
    info = chat.detail(answer.headers["X-NGPU-Task-Id"])
    assert (info["state"], info["ext"]["error"]["reason"]) == (-1, "CONNECTION_CLOSED")
    assert len(info["ext"]["attempts"]) == 1
    # Where nothing has been passed on yet, it is tried again and then told.
    with chat.begin("GET", "/cut?n=5") as answer:
        assert (answer.status, json.load(answer)["result_code"]) == (502, 500)
    assert len(chat.detail(answer.headers["X-NGPU-Task-Id"])["ext"]["attempts"]) == 3


# Who hangs up.


def gone(chat: Caller, name: str) -> float:
    """When the container saw that its caller had gone."""
    at = chat.call("GET", f"/gone?name={name}")
    assert at, "it never did"
    return float(at)


def in_time(hang_up: Callable[[str], float]) -> None:
    """It takes less than HANGUP_S until the container knows; once in three times, as the machine may be busy."""
    took = []
    for name in ("first", "second", "third"):
        took.append(hang_up(name))
        if took[-1] < HANGUP_S:
            return
    raise AssertionError(took)


@pytest.mark.parametrize("path", ["forever", "silent"])
def test_caller_who_hangs_up_ends_the_containers_request(chat: Caller, path: str) -> None:
    def hang_up(name: str) -> float:
        with socket.create_connection(chat.address, timeout=60) as connection:
            connection.sendall(chat.head(f"GET /run/{path}?name={path}-{name} HTTP/1.1"))
            if path == "forever":
                assert b"X-NGPU-Task-Id" in connection.recv(4096)
            else:
                time.sleep(0.5)
        left = time.time()
        return gone(chat, f"{path}-{name}") - left

    in_time(hang_up)
    ids = chat.rest.ok("GET", "/user/queryTaskList")["taskIds"]
    states = [chat.detail(task_id)["state"] for task_id in ids[-3:-1]]
    assert -2 in states


def test_caller_who_has_all_of_it_and_hangs_up_has_cancelled_nothing(chat: Caller) -> None:
    for _ in range(10):
        with socket.create_connection(chat.address, timeout=60) as connection:
            connection.sendall(chat.head("GET /run/bytes?n=200000 HTTP/1.1"))
            answer = b""
            while b"\r\n\r\n" not in answer or len(answer.partition(b"\r\n\r\n")[2]) < 200_000:
                answer += connection.recv(MIB)
        found = re.search(rb"X-NGPU-Task-Id: (\S+)", answer)
        assert found
        assert chat.detail(found[1].decode())["state"] == 3


def test_caller_who_hangs_up_while_sending_leaves_nothing_behind(running: Platform, chat: Caller) -> None:
    before = len(chat.rest.ok("GET", "/user/queryTaskList")["taskIds"])
    with socket.create_connection(chat.address, timeout=60) as connection:
        connection.sendall(chat.head("POST /run/about HTTP/1.1", "Content-Length: 10000000") + bytes(5_000_000))
        until(lambda: uploads(running))
    until(lambda: not uploads(running))
    assert len(chat.rest.ok("GET", "/user/queryTaskList")["taskIds"]) == before


def uploads(platform: Platform) -> list[Path]:
    return list((platform.state / "controlplane" / "bodies").glob("*/upload-*"))


# Refusals, and errors of the platform.


def test_refusals_are_json(chat: Caller) -> None:
    for wanted, path, headers in (
        (401, "/x", {"Authorization": ""}),
        (401, "/x", {"Authorization": "Bearer 123"}),
        (400, "/x", {"X-NGPU-Port": "80"}),
        (400, "/x", {"X-NGPU-Port": "http"}),
        (400, "/a/../b", {}),
        (400, "//elsewhere/x", {}),
        (400, "/a%2f%2e%2e%2fb", {}),
    ):
        with chat.begin("GET", path, None, headers) as answer:
            said = json.load(answer)
            assert (answer.status, said["result_code"]) == (wanted, wanted), (path, headers, said)
            assert said["msg"]
            assert answer.headers["X-Request-Id"]


def test_too_large_a_body_is_refused_before_it_is_sent(running: Platform) -> None:
    small = workspace(running, "small", request_body="1MiB")
    with socket.create_connection(small.address, timeout=60) as connection:
        fields = ("Content-Length: 1048577", "Expect: 100-continue")
        connection.sendall(small.head("POST /run/about HTTP/1.1", *fields))
        answer = connection.recv(4096)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["result_code"] == 413
    assert not uploads(running)
    # Nobody has said how long it will be.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError), small.begin("POST", "/about", endless()) as told:
        assert told.status == 413
    assert small.call("POST", "/about", bytes(MIB))["size"] == MIB


def endless() -> Iterator[bytes]:
    for _ in range(200):
        yield bytes(64 * KIB)


# Large bodies, slow readers.


def rss(platform: Platform) -> int:
    """Of the three programs, in bytes."""
    total = 0
    for program in platform.programs:
        status = Path(f"/proc/{program.pid}/status").read_text()
        total += int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) * KIB
    return total


class Peak:
    """The most that something has been while this ran."""

    def __init__(self, measure: Callable[[], int]) -> None:
        self._measure = measure
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.most = 0

    def _watch(self) -> None:
        while not self._over.wait(0.05):
            self.most = max(self.most, self._measure())

    def __enter__(self) -> "Peak":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


@pytest.mark.slow
def test_200_mb_both_ways_and_memory_stays_flat(running: Platform, chat: Caller) -> None:
    size = 200 * MIB
    block = os.urandom(MIB)
    sent, got, length = hashlib.sha256(), hashlib.sha256(), 0
    chat.call("GET", "/about")
    idle = rss(running)

    def body() -> Iterator[bytes]:
        for number in range(size // MIB):
            piece = number.to_bytes(8, "big") + block[8:]
            sent.update(piece)
            yield piece

    with Peak(lambda: rss(running)) as peak:
        headers = {"Content-Length": str(size), "Content-Type": "application/octet-stream"}
        with chat.begin("POST", "/mirror", body(), headers) as answer:
            assert int(answer.headers["Content-Length"]) == size
            while piece := answer.read(256 * KIB):
                got.update(piece)
                length += len(piece)
    assert (length, got.digest()) == (size, sent.digest())
    assert peak.most - idle < 100 * MIB


@pytest.mark.slow
def test_slow_reader_holds_only_itself(running: Platform, chat: Caller) -> None:
    idle = rss(running)
    with chat.begin("GET", "/bytes?n=200000000") as slow, Peak(lambda: rss(running)) as peak:
        task_id = slow.headers["X-NGPU-Task-Id"]
        assert len(slow.read(1000)) == 1000
        # The container is done with him long before he is.
        info = chat.detail(task_id)
        assert info["state"] == 3
        waits = []
        for _ in range(50):
            began = time.perf_counter()
            chat.call("GET", "/about")
            waits.append(time.perf_counter() - began)
        assert statistics.median(waits) < 0.05
        assert len(slow.read()) == 199_999_000
    assert peak.most - idle < 100 * MIB


def test_slow_sender_holds_no_slot(running: Platform) -> None:
    single = workspace(running, "single", request_body="10MiB")
    sockets = []
    for _ in range(20):
        connection = socket.create_connection(single.address, timeout=60)
        connection.sendall(single.head("POST /run/about HTTP/1.1", "Content-Length: 1000000") + bytes(900_000))
        sockets.append(connection)
    shown = running.ngpu("workspace", "show", "single")["workspace"]
    assert not int(shown.get("running_tasks", 0))
    assert single.call("GET", "/about")["method"] == "GET"
    for connection in sockets:
        connection.sendall(bytes(100_000))
        assert b'"size": 1000000' in connection.recv(MIB)
        connection.close()


# What is recorded.


def test_a_call_is_recorded_like_any_task(chat: Caller) -> None:
    with chat.begin("PATCH", "/about?x=1", b"question") as answer:
        body = answer.read().decode()
        task_id = answer.headers["X-NGPU-Task-Id"]
    info = chat.detail(task_id)
    assert (info["state"], info["method"], info["requrl"]) == (3, "run", "/run/about?x=1")
    assert (info["request"], info["response"]) == ("question", body)
    assert info["ext"]["httpStatus"] == 200
    assert info["ext"]["attempts"][0]["lastByteSeconds"] > 0
    assert task_id in chat.rest.ok("GET", "/user/queryTaskList")["taskIds"]
    with chat.begin("GET", "/events?n=3&gap=0.1") as answer:
        body = answer.read().decode()
        task_id = answer.headers["X-NGPU-Task-Id"]
    assert chat.detail(task_id)["response"] == body
    assert chat.rest.ok("GET", f"/user/queryTask?taskID={task_id}")["data"] == body


# When a program dies.


def test_stream_goes_on_while_the_control_plane_is_killed_and_started(own: Platform) -> None:
    chat = workspace(own)
    with chat.begin("GET", "/events?n=80&gap=0.1") as answer:
        first = next(stream := events(answer))
        own.controlplane.kill()
        own.start_controlplane()
        numbers = [first["number"], *(event["number"] for event in stream)]
    assert numbers == list(range(80))
    assert chat.detail(answer.headers["X-NGPU-Task-Id"])["state"] == 3


def test_killed_bridge_ends_the_containers_request(own: Platform) -> None:
    key = workspace(own).key

    def kill(name: str) -> float:
        chat = Caller(own.url, key)
        with socket.create_connection(chat.address, timeout=60) as connection:
            connection.sendall(chat.head(f"GET /run/forever?name={name} HTTP/1.1"))
            while b"data: " not in connection.recv(4096):
                pass
            own.programs[-1].kill()
            left = time.time()
            own.start_bridge()
            return gone(Caller(own.url, key), name) - left

    in_time(kill)


def test_killed_node_breaks_the_answer_off(own: Platform) -> None:
    chat = workspace(own)
    with socket.create_connection(chat.address, timeout=60) as stream, socket_of(chat) as connection:
        stream.sendall(chat.head("GET /run/forever?name=node HTTP/1.1"))
        answer = b""
        while b"data: " not in answer:
            answer += stream.recv(4096)
        connection.send("x")
        connection.recv()
        own.nodes["node"].signal(signal.SIGKILL)
        with pytest.raises(websockets.ConnectionClosed):
            connection.recv(timeout=30)
        with contextlib.suppress(ConnectionResetError):
            while piece := stream.recv(MIB):
                answer += piece
    # A chunked answer that is whole ends with an empty chunk.
    assert not answer.endswith(b"\r\n0\r\n\r\n")
    found = re.search(rb"X-NGPU-Task-Id: (\S+)", answer)
    assert found
    info = chat.detail(found[1].decode())
    assert (info["state"], info["ext"]["error"]["reason"]) == (-1, "NODE_LOST")
