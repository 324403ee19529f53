"""What is a plain request: never what aiohttp's parser sees otherwise, and always what common clients send."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from aiohttp import HttpVersion11
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http_parser import HttpRequestParser
from hypothesis import example, given, settings
from hypothesis import strategies as st

from httpbridge.plain import BODY_BYTES, FIELDS, HEAD_BYTES, Head, parse

POST = b"POST /user/w1 HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Type: application/json\r\n\r\n"
GET = b"GET /user/queryTask?taskID=1 HTTP/1.1\r\nHost: x:80\r\nConnection: keep-alive\r\nAccept: */*\r\n\r\n"
PUT = b"PUT /run/a/b HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\nX-NGPU-Port: 80\r\n\r\n"

#: What makes requests ambiguous, or something else.
BITS = (
    b"\r\n", b"\n", b"\r", b" ", b"\t", b"\0", b":", b",", b"\x80", b"\xff", b"\x0b", b"\x7f", b"#", b"//", b"?",
    b"%zz", b"\\", b'"', b"*", b"@", b"http://h/", b"HTTP/1.0", b"HTTP/1.1", b"OPTIONS", b"CONNECT",
    b"PRI * HTTP/2.0\r\n\r\n", b" folded\r\n", b"+", b"-", b"0", b"5", b"99", b"0x", POST, GET,
)  # fmt: skip
FIELDS_OF_NOTE = (
    b"X: y", b"Host: y", b"Content-Length: 3", b"content-length: 5", b"Content-Length : 5", b"Content-Length: 5, 5",
    b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity", b"Transfer-Encoding:\x0bchunked", b"TE: trailers",
    b"Trailer: X", b"Connection: close", b"Connection: Keep-Alive", b"Connection: keep-alive, upgrade",
    b"Keep-Alive: a=5", b"Upgrade: websocket", b"Upgrade: h2c", b"Expect: 100-continue", b"Content-Encoding: gzip",
    b"Sec-WebSocket-Key1: 1",
)  # fmt: skip
PIECES = (*BITS, *(field + b"\r\n" for field in FIELDS_OF_NOTE))


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    """Something that once was a request."""
    text = bytearray(draw(st.sampled_from((POST, GET, PUT))))
    for _ in range(draw(st.integers(0, 3))):
        lines = [0, *(at + 2 for at in range(len(text)) if text[at : at + 2] == b"\r\n")]
        at = draw(st.one_of(st.sampled_from(lines), st.integers(0, len(text))))
        drop = draw(st.sampled_from((0, 0, 0, 1, 2, 5)))
        text[at : at + drop] = draw(st.one_of(st.sampled_from(PIECES), st.binary(max_size=3)))
    return bytes(text)


class Transport:
    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


@pytest.fixture(scope="module")
def protocol() -> Iterator[BaseProtocol]:
    loop = asyncio.new_event_loop()
    protocol = BaseProtocol(loop)
    protocol.transport = Transport()  # type: ignore[assignment]
    yield protocol
    loop.close()


def aiohttp_parser(protocol: BaseProtocol) -> Any:
    return HttpRequestParser(
        protocol, protocol._loop, 2**16, max_line_size=8190, max_field_size=8190, auto_decompress=False
    )


def fields(pairs: Any) -> list[tuple[str, str]]:
    return [(name.lower(), value) for name, value in pairs if name.lower() != "content-length"]


@settings(max_examples=700, deadline=None)
@given(data=requests(), filler=st.sampled_from((b"{}", b"\r\n", b"0\r\n\r\n", b"GET / HTTP/1.1\r\n", b"\0\xff")))
@example(data=POST, filler=b"x")
@example(data=GET, filler=b"x")
@example(data=PUT, filler=b"x")
def test_what_is_plain_is_for_aiohttp_the_same_request_and_no_byte_more(
    protocol: BaseProtocol, data: bytes, filler: bytes
) -> None:
    opened = parse(data)
    if opened is None:
        return
    head, body_at, size = opened
    body = (filler * size)[:size]
    [(message, payload)], upgraded, tail = aiohttp_parser(protocol).feed_data(data[:body_at] + body)
    assert (upgraded, tail) == (False, b"")
    assert (message.method, message.path, message.version) == (head.method, head.raw_path, HttpVersion11)
    assert fields(message.headers.items()) == fields(head.headers.items())
    assert [pair for pair in message.raw_headers if pair[0].lower() != b"content-length"] == list(head.raw_headers)
    assert (message.should_close, message.upgrade, message.chunked) == (False, False, False)
    assert payload.is_eof()
    assert payload.read_nowait(-1) == body


@settings(max_examples=200, deadline=None)
@given(data=requests(), before=requests())
@example(data=POST, before=POST)
@example(data=POST, before=POST.replace(b"5", b"999"))
@example(data=POST, before=POST.replace(b"w1", b"w2"))
def test_what_is_remembered_of_the_last_request_changes_nothing(data: bytes, before: bytes) -> None:
    last = parse(before)
    opened, again = parse(data), parse(data, None if last is None else last.head)
    assert (opened is None) == (again is None)
    if opened is not None and again is not None:
        assert shown(opened.head) == shown(again.head)
        assert opened[1:] == again[1:]


def shown(head: Head) -> tuple[object, ...]:
    return head.method, head.raw_path, head.raw_headers, list(head.headers.items())


def test_the_same_head_is_the_same_object_whatever_its_body_is_long() -> None:
    first, second = parse(POST), None
    assert first is not None
    second = parse(POST.replace(b"Length: 5", b"Length: 1234"), first.head)
    assert second is not None
    assert (second.head is first.head, first.size, second.size) == (True, 5, 1234)
    other = parse(POST.replace(b"/w1", b"/w2"), first.head)
    assert other is not None
    assert (other.head.memory is first.head.memory, other.head.raw_path) == (False, "/user/w2")


@pytest.mark.parametrize(
    "request_",
    [
        # curl, requests, httpx, Go, fetch in a browser, wrk
        b"POST /user/a HTTP/1.1\r\nHost: h\r\nUser-Agent: curl/8.5.0\r\nAccept: */*\r\nAuthorization: Bearer 1\r\n"
        b"Content-Type: application/json\r\nContent-Length: 17\r\n\r\n",
        b"POST /user/a HTTP/1.1\r\nHost: h:80\r\nUser-Agent: python-requests/2.32.3\r\nAccept-Encoding: gzip\r\n"
        b"Accept: */*\r\nConnection: keep-alive\r\nContent-Length: 17\r\nContent-Type: application/json\r\n\r\n",
        b"GET /user/queryTask?taskID=1&wait=30 HTTP/1.1\r\nHost: h\r\nAccept: */*\r\nAccept-Encoding: gzip, deflate\r\n"
        b"Connection: keep-alive\r\nUser-Agent: python-httpx/0.27.2\r\n\r\n",
        b"POST /user/a HTTP/1.1\r\nHost: h\r\nUser-Agent: Go-http-client/1.1\r\nContent-Length: 17\r\n"
        b"Accept-Encoding: gzip\r\n\r\n",
        b"POST /run/v1/chat HTTP/1.1\r\nhost: h\r\nconnection: keep-alive\r\ncontent-type: application/json\r\n"
        b"accept: */*\r\naccept-language: *\r\nsec-fetch-mode: cors\r\nuser-agent: node\r\ncontent-length: 17\r\n\r\n",
        b"POST /user/w1 HTTP/1.1\r\nHost: 127.0.0.1:80\r\nContent-Type: application/json\r\nContent-Length: 17\r\n\r\n",
        b"DELETE /user/task?taskID=1 HTTP/1.1\r\nHost: h\r\n\r\n",
    ],
)
def test_what_common_clients_send_is_plain(request_: bytes) -> None:
    opened = parse(request_ + b'{"data": "hello"}')
    assert opened is not None
    assert opened.body_at == len(request_)
    assert opened.size == (17 if b"17" in request_ else 0)


def with_field(line: bytes) -> bytes:
    return POST.replace(b"Host: x\r\n", b"Host: x\r\n" + line + b"\r\n")


@pytest.mark.parametrize(
    "request_",
    [
        b"",
        POST[:-1],
        POST.replace(b"POST", b"HEAD"),
        POST.replace(b"POST", b"post"),
        POST.replace(b"HTTP/1.1", b"HTTP/1.0"),
        POST.replace(b"POST ", b"POST  "),
        POST.replace(b"/user/w1", b"http://h/user/w1"),
        POST.replace(b"/user/w1", b"//h/user/w1"),
        POST.replace(b"/user/w1", b"/user/w1#a"),
        POST.replace(b"/user/w1", b"/user/\xc3\xa4"),
        POST.replace(b"Host: x\r\n", b""),
        POST.replace(b"\r\n", b"\n"),
        POST.replace(b"Length: 5", b"Length: +5"),
        POST.replace(b"Length: 5", b"Length: %d" % (BODY_BYTES + 1)),
        with_field(b"Content-Length: 5"),
        with_field(b"CONTENT-LENGTH:5"),
        with_field(b"Transfer-Encoding: chunked"),
        with_field(b"Connection: close"),
        with_field(b"Connection: keep-alive, X"),
        with_field(b"Upgrade: websocket"),
        with_field(b"Expect: 100-continue"),
        with_field(b"X: a\r\nx: b"),
        with_field(b"X: a\r\n folded"),
        with_field(b"X:"),
        with_field(b"X: \xe4"),
        with_field(b"X : a"),
        with_field(b"X: " + b"a" * HEAD_BYTES),
        with_field(b"\r\n".join(b"X-%d: a" % n for n in range(FIELDS))),
    ],
)
def test_what_aiohttp_has_to_judge_is_not_plain(request_: bytes) -> None:
    assert parse(request_) is None
