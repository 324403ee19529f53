"""`/run`: what travels and what does not, answers that are still coming, and every way they may break."""

import asyncio
import json
import struct
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import grpc
import pytest
from ngpu import wire
from ngpu.v1 import http_pb2
from ngpu.v1 import task_pb2 as pb
from yarl import URL

from tests.httpbridge.conftest import BEARER, Bridge, StartBridge
from tests.httpbridge.fake_controlplane import WORKSPACE, Answer, Broken, Exchange, FakeControlPlane, Refused
from tests.httpbridge.test_server import parsed

HEAD = f"Host: x\r\nAuthorization: Bearer {WORKSPACE}\r\n"
#: A step of a Watch: an event, an error that ends it, or something to wait for.
Step = pb.WatchResponse | grpc.StatusCode | asyncio.Event


class Streaming(FakeControlPlane):
    """One whose containers may take their time over an answer: `head`, then what each Watch in turn is to say."""

    def __init__(self) -> None:
        super().__init__()
        self.head: http_pb2.HttpResponse | None = None
        self.watches: list[list[Step]] = []
        self.watched: list[pb.WatchRequest] = []
        self.cancelled: list[str] = []
        self.hung_up = asyncio.Event()
        self.upload_requests: list[pb.UploadRequest] = []
        self.discarded = asyncio.Event()
        #: What the container of a connection that has changed its protocol does with the caller's bytes.
        self.talk: Callable[[AsyncIterator[bytes]], AsyncIterator[bytes]] | None = None

    async def _schedule(self, request: pb.ScheduleRequest) -> pb.ScheduleResponse:
        if self.head is None:
            return await super()._schedule(request)
        self.container = forever
        return pb.ScheduleResponse(task=self._accept(request).view, response=self.head)

    async def _cancel(self, request: pb.CancelRequest) -> pb.CancelResponse:
        self.cancelled.append(request.task_id)
        return await super()._cancel(request)

    async def Watch(self, request: pb.WatchRequest, context: Any) -> AsyncIterator[pb.WatchResponse]:  # noqa: N802
        if not request.cancel_on_hangup or not self.watches:
            async for event in super().Watch(request, context):
                yield event
            if request.part == pb.WatchRequest.PART_UNSPECIFIED:
                yield pb.WatchResponse(task=self.tasks[request.task_id].view)
            return
        self.watched.append(request)
        try:
            for step in self.watches.pop(0):
                if isinstance(step, asyncio.Event):
                    await step.wait()
                elif isinstance(step, grpc.StatusCode):
                    await context.abort(step, "broken on purpose")
                else:
                    yield step
        except (asyncio.CancelledError, GeneratorExit):
            self.hung_up.set()
            raise

    async def Upload(self, request_iterator: Any, context: Any) -> pb.UploadResponse:  # noqa: N802
        first = await anext(aiter(request_iterator))
        assert first.workspace_id or first.route
        if not first.discard:
            return await super().Upload(_again(first, request_iterator), context)
        self.upload_requests.append(first)
        if first.size > self.body_limit:
            await self._refuse(
                context, Refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_LARGE", "the workspace takes less")
            )
        agreed = ((wire.UPLOAD_ID, "upload-" + "1" * 32), (wire.UPLOAD_LIMIT, str(self.body_limit)))
        await context.send_initial_metadata(agreed)
        body, last = b"", False
        try:
            async for piece in request_iterator:
                self.upload_requests.append(piece)
                body += piece.data
                last = last or piece.last
        finally:
            if not last:
                self.discarded.set()
        self.uploads["upload-" + "1" * 32] = body
        return pb.UploadResponse(upload_id="upload-" + "1" * 32, size=len(body))

    async def Connect(self, request_iterator: Any, context: Any) -> AsyncIterator[pb.ConnectResponse]:  # noqa: N802
        await self._admit(context)
        first = await anext(aiter(request_iterator))
        assert (first.task_id in self.tasks, first.workspace_id, first.data) == (True, WORKSPACE, b"")
        if self.talk is None:
            await self._refuse(context, Refused(grpc.StatusCode.NOT_FOUND, "NOT_FOUND", "it has gone"))
        async for data in self.talk(request.data async for request in request_iterator):
            yield pb.ConnectResponse(data=data)


async def _again(first: pb.UploadRequest, rest: Any) -> AsyncIterator[pb.UploadRequest]:
    yield first
    async for piece in rest:
        yield piece


async def forever(exchange: Exchange) -> Answer:
    await asyncio.Event().wait()
    raise AssertionError


@pytest.fixture
async def fake() -> AsyncIterator[Streaming]:
    async with Streaming() as control_plane:
        yield control_plane


def head(status: int = 200, size: int = 0, **headers: str) -> http_pb2.HttpResponse:
    return http_pb2.HttpResponse(
        status=status,
        headers=[http_pb2.Header(name=n.replace("_", "-"), value=v.encode("latin-1")) for n, v in headers.items()],
        body=http_pb2.Body(size=size),
    )


def running(attempt: int = 1) -> pb.WatchResponse:
    return pb.WatchResponse(task=pb.Task(state=pb.TASK_STATE_RUNNING, attempt=attempt))


def ended(state: "pb.TaskState.ValueType" = pb.TASK_STATE_COMPLETED) -> pb.WatchResponse:
    failure = pb.Failure(reason="CONNECTION_CLOSED", message="It closed.") if state != pb.TASK_STATE_COMPLETED else None
    return pb.WatchResponse(task=pb.Task(state=state, attempt=1, failure=failure))


def data(offset: int, piece: bytes) -> pb.WatchResponse:
    return pb.WatchResponse(data=piece, offset=offset)


async def call(bridge: Bridge, method: str, path: str, **options: Any) -> tuple[int, bytes, Any]:
    headers = BEARER | options.pop("headers", {})
    async with bridge.client.request(
        method, URL(bridge.url + path, encoded=True), headers=headers, **options
    ) as response:
        return response.status, await response.read(), response.headers


# What travels.


async def test_request_and_answer_are_passed_on_as_they_are(bridge: Bridge, fake: Streaming) -> None:
    async def container(exchange: Exchange) -> Answer:
        headers = [("Content-Type", b"image/png"), ("Set-Cookie", b"a"), ("Set-Cookie", b"\xe9"), ("Date", b"then")]
        return Answer(b"\x89PNG", 207, headers)

    fake.container = container
    status, body, headers = await call(
        bridge,
        "PATCH",
        "/run/a;b/%7E?x=1&&y=%C3%A9&taskMode=Async",
        data=b"{not json",
        headers={"Content-Type": "application/json", "BtcAddress": "x", "Idempotency-Key": "k", "X-NGPU-Port": "8081"},
    )
    assert (status, body) == (207, b"\x89PNG")
    assert headers.getall("Set-Cookie") == ["a", "é"] or len(headers.getall("Set-Cookie")) == 2
    assert headers.getall("Date") == ["then"]
    assert headers["X-Request-Id"]
    assert headers["X-NGPU-Task-Id"] in fake.tasks
    assert not headers.keys() & {"Cache-Control", "X-Content-Type-Options"}
    (exchange,) = fake.exchanges
    assert (exchange.port, exchange.method, exchange.path) == (8081, "PATCH", "/a;b/%7E")
    assert (exchange.query, exchange.body) == ("x=1&&y=%C3%A9&taskMode=Async", b"{not json")
    assert [exchange.header(name) for name in ("content-type", "btcaddress", "idempotency-key", "x-ngpu-port")] == [
        "application/json",
        "x",
        "k",
        None,
    ]
    assert exchange.header("authorization") is None
    (asked,) = fake.scheduled
    assert (asked.streamed, asked.cancel_on_hangup, asked.idempotency_key, asked.btc_address) == (True, True, "", "")
    assert (asked.origin.operation, asked.origin.url) == ("run", "/run/a;b/%7E?x=1&&y=%C3%A9&taskMode=Async")


@pytest.mark.parametrize(
    ("path", "method"),
    [("/run/user/queryTask?taskID=1", "GET"), ("/run/healthz", "GET"), ("/run/", "OPTIONS"), ("/run/a&b", "DELETE")],
)
async def test_nothing_under_run_is_ours(bridge: Bridge, fake: Streaming, path: str, method: str) -> None:
    assert (await call(bridge, method, path))[0] == 200
    assert f"/run{fake.exchanges[0].path}" == path.partition("?")[0]


async def test_run_alone_is_not_found(bridge: Bridge) -> None:
    assert (await call(bridge, "GET", "/run"))[0] == 404


async def test_what_a_node_must_not_say(bridge: Bridge, fake: Streaming) -> None:
    async def container(exchange: Exchange) -> Answer:
        names = (b"Transfer-Encoding", b"Connection", b"Content-Length", b"Keep-Alive", b"Upgrade", b"X-NGPU-Task-Id")
        return Answer(b"ok", 200, [(name.decode(), b"7") for name in names])

    fake.container = container
    answer = await bridge.raw(f"GET /run/x HTTP/1.1\r\n{HEAD}Connection: close\r\n\r\n".encode())
    first, *lines = answer.partition(b"\r\n\r\n")[0].decode().split("\r\n")
    assert first == "HTTP/1.1 200 OK"
    assert sorted(line.partition(":")[0] for line in lines) == [
        "Connection", "Content-Length", "Date", "X-NGPU-Task-Id", "X-Request-Id",
    ]  # fmt: skip
    assert "Content-Length: 2" in lines


@pytest.mark.parametrize(
    "header", [("X", b"a\r\nSet-Cookie: b"), ("X", b"a\nb"), ("X Y", b"a"), ("X:", b"a"), ("", b"a")]
)
async def test_header_that_would_be_more_than_one_is_refused(
    bridge: Bridge, fake: Streaming, header: tuple[str, bytes]
) -> None:
    async def container(exchange: Exchange) -> Answer:
        return Answer(b"ok", 200, [header])

    fake.container = container
    status, body, _ = await call(bridge, "GET", "/run/x")
    assert (status, json.loads(body)["result_code"]) == (502, 502)


@pytest.mark.parametrize(
    ("method", "status", "sent", "wanted"), [("HEAD", 200, b"", "99"), ("GET", 304, b"", "99"), ("GET", 204, b"", None)]
)
async def test_answers_without_a_body(
    bridge: Bridge, fake: Streaming, method: str, status: int, sent: bytes, wanted: str | None
) -> None:
    async def container(exchange: Exchange) -> Answer:
        return Answer(sent, status, [("Content-Length", b"99")] if wanted else [])

    fake.container = container
    answer = await bridge.raw(f"{method} /run/x HTTP/1.1\r\n{HEAD}Connection: close\r\n\r\n".encode())
    code, headers, body = parsed(answer)
    assert (code, body, headers.get("Content-Length"), headers.get("Transfer-Encoding")) == (status, b"", wanted, None)


# Refusals.


@pytest.mark.parametrize(
    ("broken", "status", "result_code"),
    [
        (Broken("RUN_TIME_LIMIT", "too slow", pb.CAUSE_CUSTOMER), 504, 504),
        (Broken("NODE_LOST", "gone"), 502, 500),
        (Broken("RESPONSE_TOO_LARGE", "too much", pb.CAUSE_CUSTOMER), 502, 500),
    ],
)
async def test_failed_tasks_are_json(
    bridge: Bridge, fake: Streaming, broken: Broken, status: int, result_code: int
) -> None:
    async def container(exchange: Exchange) -> Answer:
        raise broken

    fake.container = container
    code, body, headers = await call(bridge, "GET", "/run/x")
    assert (code, json.loads(body)) == (status, {"result_code": result_code, "msg": str(broken)})
    assert headers["X-NGPU-Task-Id"] in fake.tasks
    assert headers["Content-Type"] == "application/json"


@pytest.mark.parametrize(
    ("code", "reason", "status"),
    [
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL", 429),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_LARGE", 413),
        (grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE", 503),
        (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT", 400),
        (grpc.StatusCode.NOT_FOUND, "NOT_FOUND", 401),
    ],
)
async def test_refusals_have_their_status(
    bridge: Bridge, fake: Streaming, code: grpc.StatusCode, reason: str, status: int
) -> None:
    fake.refuse["Schedule"] = Refused(code, reason, "no", 5000)
    got, body, headers = await call(bridge, "GET", "/run/x")
    assert (got, json.loads(body)["result_code"]) == (status, status)
    assert headers.get("Retry-After") == ("5" if status in (413, 429, 503, 400) else None)


async def test_no_header_no_answer(bridge: Bridge, fake: Streaming) -> None:
    async with bridge.client.get(f"{bridge.url}/run/img2img") as response:
        assert (response.status, response.headers["WWW-Authenticate"]) == (401, "Bearer")
    assert not fake.tasks


# Bodies on their way in.


@pytest.mark.parametrize("size", [0, 1, 65_536, 65_537, 1_000_000])
@pytest.mark.parametrize("chunked", [False, True])
async def test_bodies_are_the_callers(bridge: Bridge, fake: Streaming, size: int, chunked: bool) -> None:
    body = bytes(i % 251 for i in range(size))

    async def pieces() -> AsyncIterator[bytes]:
        for at in range(0, size, 100_000):
            yield body[at : at + 100_000]

    status, answer, _ = await call(bridge, "POST", "/run/x", data=pieces() if chunked else body)
    assert (status, answer) == (200, body)
    if size <= wire.INLINE_BYTES:
        assert not fake.upload_requests
    else:
        assert fake.upload_requests[0].size == (0 if chunked else size)
        assert all(len(piece.data) <= wire.CHUNK_BYTES for piece in fake.upload_requests)


async def test_body_is_not_asked_for_that_would_be_refused(bridge: Bridge, fake: Streaming) -> None:
    fake.body_limit = 100_000
    reader, writer = await asyncio.open_connection("127.0.0.1", bridge.port)
    writer.write(f"POST /run/x HTTP/1.1\r\n{HEAD}Content-Length: 100001\r\nExpect: 100-continue\r\n\r\n".encode())
    assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 413")
    assert [request.data for request in fake.upload_requests] == [b""]
    writer.close()
    # Where nobody has said how much it will be, when it is too much.
    status, answer, _ = await call(bridge, "POST", "/run/x", data=endless())
    assert (status, json.loads(answer)["result_code"]) == (413, 413)
    assert not fake.tasks


async def endless() -> AsyncIterator[bytes]:
    for _ in range(50):
        yield bytes(20_000)
        await asyncio.sleep(0)


async def test_body_among_many_goes_on_as_it_comes(
    bridge: Bridge, fake: Streaming, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("httpbridge.calls.FILLING", 0)
    _, writer = await asyncio.open_connection("127.0.0.1", bridge.port)
    writer.write(f"POST /run/x HTTP/1.1\r\n{HEAD}Content-Length: 1000000\r\n\r\n".encode() + bytes(1000))
    async with asyncio.timeout(10):
        while sum(len(request.data) for request in fake.upload_requests) < 1000:
            await asyncio.sleep(0.005)
    writer.close()


@pytest.mark.parametrize("how", ["close", "garbage", "stall"])
async def test_body_that_never_ends_is_given_up_and_deleted(
    start_bridge: StartBridge, fake: Streaming, how: str
) -> None:
    bridge = await start_bridge(stall_time=0.2)
    reader, writer = await asyncio.open_connection("127.0.0.1", bridge.port)
    framing = "Transfer-Encoding: chunked" if how == "garbage" else "Content-Length: 1000000"
    writer.write(f"POST /run/x HTTP/1.1\r\n{HEAD}{framing}\r\n\r\n".encode())
    begun = bytes(wire.CHUNK_BYTES)
    writer.write((b"%x\r\n" % len(begun) if how == "garbage" else b"") + begun)
    while len(fake.upload_requests) < 2:
        await asyncio.sleep(0.005)
    if how == "garbage":
        writer.write(b"\r\nzz\r\n")
    if how == "close":
        writer.close()
    else:
        # aiohttp does not always tell of a fault in a body that has begun; then it counts as one that stalls.
        assert (await reader.readuntil(b"\r\n")).split()[1] in ((b"408",) if how == "stall" else (b"400", b"408"))
        writer.close()
    async with asyncio.timeout(5):
        await fake.discarded.wait()
    assert not fake.tasks


# Answers that are still coming.


async def test_answer_is_passed_on_as_it_comes(bridge: Bridge, fake: Streaming) -> None:
    more = asyncio.Event()
    fake.head = head(200, content_type="text/event-stream")
    fake.watches = [[running(), pb.WatchResponse(head=fake.head), data(0, b"one"), more, data(3, b"two"), ended()]]
    async with bridge.client.get(f"{bridge.url}/run/x", headers=BEARER) as response:
        assert response.headers["Transfer-Encoding"] == "chunked"
        assert await response.content.readany() == b"one"
        more.set()
        assert await response.content.read() == b"two"
    assert not fake.cancelled


async def test_promised_length_is_told(bridge: Bridge, fake: Streaming) -> None:
    fake.head = head(200, 6)
    fake.watches = [[running(), data(0, b"one"), data(3, b"two"), ended()]]
    status, body, headers = await call(bridge, "GET", "/run/x")
    assert (status, body, headers["Content-Length"]) == (200, b"onetwo", "6")
    assert "Transfer-Encoding" not in headers


async def test_long_answer_that_has_ended_is_read_from_the_record(bridge: Bridge, fake: Streaming) -> None:
    body = bytes(300_000)

    async def container(exchange: Exchange) -> Answer:
        return Answer(body, 201)

    fake.container = container
    status, answer, headers = await call(bridge, "GET", "/run/x")
    assert (status, answer, headers["Content-Length"]) == (201, body, "300000")


async def test_broken_stream_is_taken_up_where_it_was(bridge: Bridge, fake: Streaming) -> None:
    fake.head = head()
    fake.watches = [
        [running(), data(0, b"one"), grpc.StatusCode.UNAVAILABLE],
        [grpc.StatusCode.UNAVAILABLE],
        [running(), pb.WatchResponse(head=fake.head), data(3, b"two"), ended()],
    ]
    assert (await call(bridge, "GET", "/run/x"))[1] == b"onetwo"
    assert [request.offset for request in fake.watched] == [0, 3, 3]


@pytest.mark.parametrize(
    "steps",
    [
        [running(), data(0, b"one"), ended(pb.TASK_STATE_FAILED)],
        [running(), data(0, b"one"), ended(pb.TASK_STATE_CANCELLED)],
        [running(2), data(0, b"of another")],
        [running(), data(0, b"one"), data(4, b"gap")],
        [running(), data(0, b"one"), grpc.StatusCode.NOT_FOUND],
        [running(), data(0, b"one")],
    ],
)
async def test_answer_that_breaks_off_is_broken_off(bridge: Bridge, fake: Streaming, steps: list[Step]) -> None:
    fake.head = head()
    fake.watches = [steps]
    with pytest.raises(aiohttp.ClientPayloadError):
        await call(bridge, "GET", "/run/x")


async def test_answer_that_has_not_begun_in_all_that_time(bridge: Bridge, fake: Streaming) -> None:
    fake.head = http_pb2.HttpResponse()
    fake.watches = [[running(), pb.WatchResponse(head=head(203, 3)), data(0, b"one"), ended()]]
    status, body, _ = await call(bridge, "GET", "/run/x")
    assert (status, body) == (203, b"one")
    fake.watches = [[running(), ended(pb.TASK_STATE_FAILED)]]
    status, body, _ = await call(bridge, "GET", "/run/x")
    assert (status, json.loads(body)) == (502, {"result_code": 500, "msg": "It closed."})


# Who hangs up.


async def test_caller_who_hangs_up_before_the_answer(bridge: Bridge, fake: Streaming) -> None:
    fake.container = forever
    with pytest.raises(TimeoutError):
        await call(bridge, "GET", "/run/x", timeout=aiohttp.ClientTimeout(total=0.2))
    (task,) = fake.tasks.values()
    async with asyncio.timeout(10):
        while task.view.state != pb.TASK_STATE_CANCELLED:
            await asyncio.sleep(0.005)
    assert len(fake.abandoned) == 1


async def test_caller_who_hangs_up_during_the_answer(bridge: Bridge, fake: Streaming) -> None:
    fake.head = head()
    fake.watches = [[running(), data(0, b"one"), asyncio.Event()]]
    async with bridge.client.get(f"{bridge.url}/run/x", headers=BEARER) as response:
        assert await response.content.readany() == b"one"
        response.close()
    async with asyncio.timeout(2):
        await fake.hung_up.wait()
    # The control plane sees to it that the task ends.
    assert not fake.cancelled


async def test_reader_who_stops_is_cut_off(start_bridge: StartBridge, fake: Streaming) -> None:
    bridge = await start_bridge(stall_time=0.2)
    fake.head = head()
    piece = bytes(wire.CHUNK_BYTES)
    fake.watches = [[running(), *(data(at * len(piece), piece) for at in range(200)), ended()]]
    _, writer = await asyncio.open_connection("127.0.0.1", bridge.port, limit=1024)
    writer.write(f"GET /run/x HTTP/1.1\r\n{HEAD}\r\n".encode())
    async with asyncio.timeout(10):
        await fake.hung_up.wait()
    writer.close()


# Connections that are no longer HTTP.


UPGRADE = f"GET /run/ws HTTP/1.1\r\n{HEAD}Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: a\r\n\r\n"


async def shouting(caller: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield b"hello"
    async for said in caller:
        yield said.upper()
        if said.endswith(b"bye"):
            return


async def switched(bridge: Bridge, *, early: bytes = b"") -> tuple[asyncio.StreamReader, asyncio.StreamWriter, str]:
    reader, writer = await asyncio.open_connection("127.0.0.1", bridge.port)
    writer.write(UPGRADE.encode() + early)
    return reader, writer, (await reader.readuntil(b"\r\n\r\n")).decode()


async def test_bytes_go_both_ways(bridge: Bridge, fake: Streaming) -> None:
    fake.head = head(101, Upgrade="websocket", Sec_WebSocket_Accept="b")
    fake.talk = shouting
    reader, writer, answer = await switched(bridge, early=b"early ")
    first, *lines = answer.strip().split("\r\n")
    assert first == "HTTP/1.1 101 Switching Protocols"
    assert {"Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Accept: b"} <= set(lines)
    assert not any(line.lower().startswith(("content-length", "transfer-encoding")) for line in lines)
    assert any(line.startswith("X-NGPU-Task-Id: ") for line in lines)
    assert await reader.readexactly(11) == b"helloEARLY "
    big = bytes(range(97, 123)) * 100_000
    writer.write(big)
    assert await reader.readexactly(len(big)) == big.upper()
    writer.write(b"bye")
    # The container closes: what it said comes first.
    assert await reader.read() == b"BYE"
    writer.close()
    asked = fake.scheduled[0].request
    assert [(h.name, h.value) for h in asked.headers] == [("Sec-WebSocket-Key", b"a"), ("Upgrade", b"websocket")]


async def test_caller_who_closes_has_been_heard(bridge: Bridge, fake: Streaming) -> None:
    heard = bytearray()
    over = asyncio.Event()

    async def talk(caller: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        yield b"go"
        async for said in caller:
            heard.extend(said)
        over.set()

    fake.head = head(101, Upgrade="websocket")
    fake.talk = talk
    reader, writer, _ = await switched(bridge)
    assert await reader.readexactly(2) == b"go"
    writer.write(bytes(500_000))
    writer.close()
    async with asyncio.timeout(2):
        await over.wait()
    assert len(heard) == 500_000


async def test_caller_who_breaks_off(bridge: Bridge, fake: Streaming) -> None:
    over = asyncio.Event()

    async def talk(caller: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"tick"
                await asyncio.sleep(0.01)
        finally:
            over.set()

    fake.head = head(101, Upgrade="websocket")
    fake.talk = talk
    reader, writer, _ = await switched(bridge)
    assert await reader.readexactly(4) == b"tick"
    sock = writer.get_extra_info("socket")
    sock.setsockopt(1, 13, struct.pack("ii", 1, 0))  # SO_LINGER 0: RST instead of FIN
    writer.transport.abort()
    async with asyncio.timeout(2):
        await over.wait()


async def test_connection_that_nobody_has_is_closed(bridge: Bridge, fake: Streaming) -> None:
    fake.head = head(101, Upgrade="websocket")
    reader, writer, answer = await switched(bridge)
    assert answer.startswith("HTTP/1.1 101")
    assert await reader.read() == b""
    writer.close()


async def test_refusal_leaves_the_connection_http(bridge: Bridge, fake: Streaming) -> None:
    async def container(exchange: Exchange) -> Answer:
        return Answer(b"no", 426, [])

    fake.container = container
    reader, writer = await asyncio.open_connection("127.0.0.1", bridge.port)
    for _ in range(2):
        writer.write(UPGRADE.encode())
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 426")
        assert await reader.readexactly(2) == b"no"
    writer.close()


async def test_container_that_changes_the_protocol_unasked(bridge: Bridge, fake: Streaming) -> None:
    fake.head = head(101, Upgrade="websocket")
    status, body, headers = await call(bridge, "GET", "/run/x")
    assert (status, json.loads(body)["result_code"]) == (502, 502)
    while not fake.cancelled:
        await asyncio.sleep(0.005)
    assert fake.cancelled == [headers["X-NGPU-Task-Id"]]


async def test_only_websockets_are_asked_for(bridge: Bridge, fake: Streaming) -> None:
    request = UPGRADE.replace("websocket", "h2c").replace("Upgrade\r\n", "Upgrade, close\r\n", 1)
    status, _, _ = parsed(await bridge.raw(request.encode()))
    assert status == 200
    assert "upgrade" not in {header.name.lower() for header in fake.scheduled[0].request.headers}
