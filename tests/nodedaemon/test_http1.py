"""HTTP as bytes: what goes to a container, and every way its answer may come or be wrong."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ngpu.v1 import http_pb2

from nodedaemon.http1 import HEAD_BYTES, BadRequest, Malformed, ResponseParser, request_head


def request(
    method: str = "GET",
    path: str = "/",
    *,
    query: str = "",
    headers: tuple[tuple[str, bytes], ...] = (),
    size: int = 0,
) -> http_pb2.HttpRequest:
    return http_pb2.HttpRequest(
        method=method,
        path=path,
        query=query,
        headers=[http_pb2.Header(name=name, value=value) for name, value in headers],
        body=http_pb2.Body(size=size),
    )


def parse(data: bytes, method: str = "GET") -> tuple[ResponseParser, bytes]:
    parser = ResponseParser(method)
    return parser, parser.feed(data)


def fields(parser: ResponseParser) -> list[tuple[str, bytes]]:
    return [(field.name, field.value) for field in parser.headers]


# Requests.


def test_request_head_is_what_was_asked_with_the_containers_host() -> None:
    asked = request("POST", "/a%20b", query="x=1&y", headers=(("Accept", b"*/*"), ("X-A", b"\xff")), size=3)
    assert request_head(asked, "10.0.0.2:8000") == (
        b"POST /a%20b?x=1&y HTTP/1.1\r\nHost: 10.0.0.2:8000\r\nAccept: */*\r\nX-A: \xff\r\nContent-Length: 3\r\n\r\n"
    )


@pytest.mark.parametrize(
    ("method", "size", "expected"),
    [("GET", 0, False), ("DELETE", 0, False), ("POST", 0, True), ("PUT", 0, True), ("DELETE", 2, True)],
)
def test_length_is_said_where_a_body_is_expected(method: str, size: int, expected: bool) -> None:
    assert (b"Content-Length" in request_head(request(method, size=size), "h:1")) is expected


def test_hop_by_hop_and_platform_fields_do_not_reach_the_container() -> None:
    never = (
        "Connection", "Keep-Alive", "Proxy-Authorization", "TE", "Trailer", "Transfer-Encoding", "Upgrade", "Expect",
        "Host", "Content-Length", "Authorization", "X-NGPU-Port", "x-ngpu-anything", "Proxy-Connection",
    )  # fmt: skip
    head = request_head(request(headers=tuple((name, b"smuggled") for name in never)), "h:1")
    assert head == b"GET / HTTP/1.1\r\nHost: h:1\r\n\r\n"


def test_fields_named_by_connection_do_not_travel_either() -> None:
    fields = (("X-Secret", b"1"), ("connection", b"close, x-SECRET"), ("X-Open", b"2"))
    assert request_head(request(headers=fields), "h:1") == b"GET / HTTP/1.1\r\nHost: h:1\r\nX-Open: 2\r\n\r\n"


@pytest.mark.parametrize(
    "bad",
    [
        request(method="GE T"),
        request(method=""),
        request(path="//elsewhere/x"),
        request(path="http://elsewhere/"),
        request(path=""),
        request(path="/a b"),
        request(path="/a\r\nX: y"),
        request(path="/ä"),
        request(query="a\nb"),
        request(headers=(("X", b"a\r\nY: b"),)),
        request(headers=(("X", b"a\0"),)),
        request(headers=(("X Y", b"a"),)),
        request(headers=(("", b"a"),)),
    ],
)
def test_what_could_be_read_as_another_request_is_refused(bad: http_pb2.HttpRequest) -> None:
    with pytest.raises(BadRequest):
        request_head(bad, "h:1")


# Responses.


def test_answer_of_known_length() -> None:
    parser, body = parse(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX-A: 1\r\nX-A:  2 \r\n\r\nhello")
    assert (parser.status, fields(parser), body) == (200, [("X-A", b"1"), ("X-A", b"2")], b"hello")
    assert parser.complete
    assert parser.reusable


def test_hop_by_hop_and_platform_fields_do_not_come_back() -> None:
    parser, _ = parse(
        b"HTTP/1.1 200 OK\r\nConnection: keep-alive, X-Hop\r\nX-Hop: 1\r\nKeep-Alive: timeout=5\r\nUpgrade: h2c\r\n"
        b"X-NGPU-Task-Id: forged\r\nTrailer: X\r\nProxy-Authenticate: y\r\nSet-Cookie: a\r\nContent-Length: 0\r\n\r\n"
    )
    assert fields(parser) == [("Set-Cookie", b"a")]
    assert parser.reusable


@pytest.mark.parametrize(
    ("method", "status", "framing"),
    [
        ("HEAD", b"200", b"Content-Length: 100\r\n"),
        ("HEAD", b"200", b"Transfer-Encoding: chunked\r\n"),
        ("GET", b"204", b""),
        ("GET", b"304", b"Content-Length: 100\r\n"),
    ],
)
def test_answers_without_a_body_end_with_their_head(method: str, status: bytes, framing: bytes) -> None:
    parser, body = parse(b"HTTP/1.1 " + status + b" X\r\n" + framing + b"\r\n", method)
    assert (body, parser.complete, parser.reusable) == (b"", True, True)


def test_chunked_answer_with_extensions_and_trailers() -> None:
    parser, body = parse(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;a=b\r\nhello\r\n1\r\n!\r\n0\r\nX-Sum: 1\r\n\r\n"
    )
    assert (body, parser.complete, parser.reusable) == (b"hello!", True, True)
    assert fields(parser) == []


def test_answer_until_close() -> None:
    parser, body = parse(b"HTTP/1.0 200 OK\r\n\r\nsome")
    assert not parser.complete
    body += parser.feed(b" more")
    assert parser.eof()
    assert (body, parser.complete, parser.reusable) == (b"some more", True, False)


def test_early_close_is_no_end() -> None:
    for data in (b"", b"HTTP/1.1 200", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhell"):
        parser = ResponseParser("GET")
        parser.feed(data)
        assert not parser.eof()


def test_interim_answers_are_passed_over() -> None:
    parser, body = parse(
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
    )
    assert (parser.status, fields(parser), body) == (200, [], b"ok")


@pytest.mark.parametrize(
    ("head", "reusable"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n", False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\nConnection: Keep-Alive\r\n\r\n", True),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\nHTTP/1.1 200 OK\r\n", False),
        (b"HTTP/1.1 204 X\r\n\r\nunasked", False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", False),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nrest", False),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n0\r\n\r\n", False),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n", True),
    ],
)
def test_connection_is_reused_only_where_that_is_safe(head: bytes, reusable: bool) -> None:
    parser, _ = parse(head)
    assert parser.complete
    assert parser.reusable is reusable


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n", "does not begin like HTTP"),
        (b"\x15\x03\x01\x00\x02", "does not begin like HTTP"),
        (b"HTTP/2.0 200 OK\r\n\r\n", "does not begin like HTTP"),
        (b"HTTP/1.1 abc OK\r\n\r\n", "status line"),
        (b"HTTP/1.1 2000 OK\r\n\r\n", "status line"),
        (b"HTTP/1.1 777 OK\r\n\r\n", "status is 777"),
        (b"HTTP/1.1 101 Switching\r\n\r\n", "another protocol"),
        (b"HTTP/1.1 100 C\r\n\r\n" * 17, "interim"),
        (b"HTTP/1.1 200 OK\nContent-Length: 0\n\n", "LF instead of CRLF"),
        (b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n", "no header field"),
        (b"HTTP/1.1 200 OK\r\nA: 1\r\n folded\r\n\r\n", "no header field"),
        (b"HTTP/1.1 200 OK\r\nA : 1\r\n\r\n", "no header field"),
        (b"HTTP/1.1 200 OK\r\nA: 1\rB: 2\r\n\r\n", "stray"),
        (b"HTTP/1.1 200 OK\r\nA: \0\r\n\r\n", "stray"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", "not one number"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: +1\r\n\r\n", "not one number"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1, 2\r\n\r\n", "not one number"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", "Transfer-Encoding"),
        (b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", "Transfer-Encoding"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n", "size of a chunk"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n", "size of a chunk"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1" + b"0" * 20 + b"\r\n", "size of a chunk"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nab\r\n", "longer than it says"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;" + b"x" * 5000, "longer than"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n" + b"A: b\r\n" * 20_000, "trailer"),
        (b"HTTP/1.1 200 OK\r\nA: " + b"x" * HEAD_BYTES, "longer than"),
        (b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 300 + b"\r\n", "header fields"),
    ],
)
def test_what_is_no_http_is_named(data: bytes, words: str) -> None:
    with pytest.raises(Malformed, match=words):
        parse(data)


_FRAMINGS = st.sampled_from(["length", "chunked", "close"])


@given(st.binary(max_size=300), _FRAMINGS, st.lists(st.integers(1, 40), max_size=30), st.data())
def test_pieces_do_not_matter(payload: bytes, framing: str, sizes: list[int], data: st.DataObject) -> None:
    """However an answer is cut into reads and chunks, it reads the same."""
    head = b"HTTP/1.1 200 OK\r\nX-A: b\r\n"
    if framing == "length":
        raw = head + b"Content-Length: %d\r\n\r\n" % len(payload) + payload
    elif framing == "chunked":
        raw, rest = head + b"Transfer-Encoding: chunked\r\n\r\n", payload
        for size in sizes:
            piece, rest = rest[:size], rest[size:]
            if piece:
                raw += b"%x\r\n%s\r\n" % (len(piece), piece)
        if rest:
            raw += b"%X;ext\r\n%s\r\n" % (len(rest), rest)
        raw += b"0\r\n\r\n"
    else:
        raw = head + b"\r\n" + payload
    parser, body = ResponseParser("GET"), b""
    while raw:
        step = data.draw(st.integers(1, len(raw)))
        body += parser.feed(raw[:step])
        raw = raw[step:]
    parser.eof()
    assert (parser.status, fields(parser), body, parser.complete) == (200, [("X-A", b"b")], payload, True)
    assert parser.reusable is (framing != "close")


@given(st.binary(max_size=200))
def test_no_bytes_do_more_than_be_malformed(noise: bytes) -> None:
    for prefix in (b"", b"HTTP/1.1 ", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"):
        try:
            parse(prefix + noise)
        except Malformed:
            continue
