"""Requests as nearly all are: whole when they come, each field once, nothing to argue about. Parsed in one go.

Everything else is left to aiohttp's parser, together with the connection it came on. So `parse` refuses nothing: it
knows one spelling of each thing and says None to all others, and takes no request about whose end or meaning two
programs could differ. What it takes, aiohttp would have taken with the same outcome; a test compares them.
"""

import asyncio
import re
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

from aiohttp import HttpVersion11, web
from multidict import CIMultiDict, CIMultiDictProxy

if TYPE_CHECKING:
    from httpbridge.connection import Connection

#: More fields than that, or a longer head, or a longer body, are not plain.
FIELDS: Final = 64
HEAD_BYTES: Final = 8 * 1024
BODY_BYTES: Final = 64 * 1024

#: A target with "#", or one that begins like an authority, is for others to judge.
_LINE: Final = re.compile(rb'(GET|POST|PUT|PATCH|DELETE) (/(?:[!"$-.0-~][!"$-~]*+)?+) HTTP/1\.1')
_FIELDS: Final = re.compile(rb"(?:\r\n[!#$%&'*+.^_`|~0-9A-Za-z-]++: [!-~]++(?: ++[!-~]++)*+)++")
_FIELD: Final = re.compile(rb"\r\n([^:]++): ([^\r]++)")
_LENGTH: Final = re.compile(rb"\r\nContent-Length: ([0-9]{1,6})(?=\r\n)", re.IGNORECASE)
#: What says more of the connection or of the body's end than that it goes on, and is so long.
_NOT_PLAIN: Final = frozenset(
    {
        b"content-length", b"transfer-encoding", b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer",
        b"upgrade", b"expect", b"http2-settings", b"sec-websocket-key1",
    }
)  # fmt: skip
_GOES_ON: Final = b"\r\nconnection: keep-alive\r\n"


class Head:
    """A request's head, less its Content-Length. The next request of a connection mostly has the same one."""

    __slots__ = ("_line", "_text", "headers", "memory", "method", "raw_headers", "raw_path")

    def __init__(
        self, line: bytes, text: bytes, raw: tuple[tuple[bytes, bytes], ...], headers: CIMultiDictProxy[str]
    ) -> None:
        self._line = line
        self._text = text
        self.method, self.raw_path, _ = line.decode().split(" ")
        self.raw_headers = raw
        self.headers = headers
        #: What handlers have made of this head, each under a key of its own: nothing that does not follow from it.
        self.memory: dict[object, Any] = {}

    def again(self, line: bytes, text: bytes) -> "Head | None":
        """The head of these lines, if at least its fields are the same."""
        if text != self._text:
            return None
        if line == self._line:
            return self
        return Head(line, text, self.raw_headers, self.headers) if _LINE.fullmatch(line) else None


class Opened(NamedTuple):
    """How a request begins. `size` bytes of body begin at `body_at`."""

    head: Head
    body_at: int
    size: int


class PlainRequest:
    """What handlers need of aiohttp's BaseRequest, by the same names."""

    __slots__ = ("body", "head", "headers", "method", "protocol")

    version = HttpVersion11
    keep_alive = True

    def __init__(self, head: Head, body: bytes, connection: "Connection") -> None:
        self.head = head
        self.method = head.method
        self.headers = head.headers
        self.body = body
        self.protocol = connection

    def take(self) -> bytes:
        """The body, once."""
        body, self.body = self.body, b""
        return body

    @property
    def raw_path(self) -> str:
        """As called."""
        return self.head.raw_path

    @property
    def raw_headers(self) -> tuple[tuple[bytes, bytes], ...]:
        """The fields in their order, but for Content-Length."""
        return self.head.raw_headers

    @property
    def remote(self) -> str | None:
        """The address at the other end."""
        return self.protocol.remote

    @property
    def transport(self) -> asyncio.Transport | None:
        """None once the caller has gone."""
        return self.protocol.transport

    @property
    def writer(self) -> "Connection":
        """What can be waited for with `drain`."""
        return self.protocol


#: What handlers get.
Request: TypeAlias = web.BaseRequest | PlainRequest


def parse(data: bytes, last: Head | None = None, most: int = HEAD_BYTES) -> Opened | None:
    """The request that `data` begins with, its head within `most` bytes; None: it is not plain.

    `last`: the head of the same connection's last one.
    """
    line_end = data.find(b"\r\n", 0, most)
    head_end = data.find(b"\r\n\r\n", line_end, most)
    if line_end < 0 or head_end < 0:
        return None
    length = _LENGTH.search(data, line_end, head_end + 2)
    if length is None:
        text, size = data[line_end:head_end], 0
    else:
        text, size = data[line_end : length.start()] + data[length.end() : head_end], int(length[1])
        if size > BODY_BYTES:
            return None
    line = data[:line_end]
    head = None if last is None else last.again(line, text)
    if head is None and (head := _head(line, text)) is None:
        return None
    return Opened(head, head_end + 4, size)


def _head(line: bytes, text: bytes) -> Head | None:
    if _LINE.fullmatch(line) is None or _FIELDS.fullmatch(text) is None:
        return None
    raw = tuple(_FIELD.findall(text))
    names = {name.lower() for name, _ in raw}
    if len(names) < len(raw) or len(raw) > FIELDS or b"host" not in names:
        return None
    unusual = names & _NOT_PLAIN
    if unusual and (unusual != {b"connection"} or _GOES_ON not in text.lower() + b"\r\n"):
        return None
    headers = CIMultiDict([(name.decode(), value.decode()) for name, value in raw])
    return Head(line, text, raw, CIMultiDictProxy(headers))
