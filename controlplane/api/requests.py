"""What a caller may ask of a container: methods, paths, headers and sizes. Whatever is not plainly harmless is refused.

A path reaches the container as it was given, so it is judged both as written and as the container will decode it.
"""

import re
import urllib.parse
from typing import Final, Protocol

from ngpu import wire
from ngpu.v1 import http_pb2

from controlplane.errors import InvalidArgument, TooLarge
from controlplane.slots import Headers, Request
from controlplane.spec import Spec

#: Longest path and query together.
TARGET_BYTES: Final = 16 * 1024
HEADERS: Final = 100
#: Names and values of all headers together.
HEADERS_BYTES: Final = 32 * 1024

#: Never reach a container: of one hop only (RFC 9110, 7.6.1), set by the node itself, or meant for the platform.
_DROPPED: Final = frozenset(
    {
        "authorization",
        "connection",
        "content-length",
        "expect",
        "host",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
    }
)
_PLATFORM: Final = "x-ngpu-"
#: Of one hop only, too, unless the caller passes on what comes after it.
_UPGRADE: Final = "upgrade"

_METHOD: Final = re.compile(r"[A-Z][A-Z-]{0,31}")
#: Tunnels, and echoes of what we send.
_METHODS_REFUSED: Final = frozenset({"CONNECT", "TRACE"})
_NAME: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,256}")
_BAD_VALUE: Final = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
#: RFC 3986's path and query characters, and the few more that clients send unescaped and servers take.
_PATH: Final = re.compile(r"/(?:[A-Za-z0-9\-._~!$&'()*+,;=:@/\[\]|^`{}]|%[0-9A-Fa-f]{2})*")
_QUERY: Final = re.compile(r"(?:[A-Za-z0-9\-._~!$&'()*+,;=:@/?\[\]|^`{}\\\"<>]|%[0-9A-Fa-f]{2})*")
#: Nearly every path is plain, and needs no second look.
_PLAIN_PATH: Final = re.compile(r"(?:/[A-Za-z0-9_~-][A-Za-z0-9_~.-]*)+/?|/")
#: "//", "\\", control characters, and a segment ".." (also with parameters after ";", which some servers cut off).
_ASTRAY: Final = re.compile(r"//|[\\\x00-\x1f\x7f]|/\.\.(?=[/;]|$)")


def request_of(message: http_pb2.HttpRequest, spec: Spec, *, streamed: bool = False) -> Request:
    """A request off the wire, fit for a container of that spec; a body that was uploaded has size 0 here.

    Only a `streamed` one may ask for a change of protocol. Raises InvalidArgument, TooLarge.
    """
    method = message.method
    if not _METHOD.fullmatch(method) or method in _METHODS_REFUSED:
        raise InvalidArgument("request.method: must be an HTTP method in upper case, and neither CONNECT nor TRACE.")
    path, query = message.path, message.query
    if len(path) + len(query) > TARGET_BYTES:
        raise InvalidArgument(f"request.path and query: together longer than {TARGET_BYTES} bytes.")
    check_path(path)
    if query and not _QUERY.fullmatch(query):
        raise InvalidArgument("request.query: must be percent-encoded: no spaces, control characters or `#`.")
    body = message.body.inline
    if len(body) > wire.INLINE_BYTES:
        raise InvalidArgument(f"request.body: longer than {wire.INLINE_BYTES} bytes: send it with Upload first.")
    check_size(len(body), spec)
    return Request(method, path, query, headers_of(message, streamed=streamed), body, len(body))


def check_path(path: str) -> None:
    """Raises InvalidArgument unless it begins with one "/" and neither it nor what it decodes to leads elsewhere."""
    if _PLAIN_PATH.fullmatch(path):
        return
    if not _PATH.fullmatch(path):
        raise InvalidArgument(
            'request.path: must begin with "/" and be percent-encoded: no spaces, control characters, "?", "#" or "\\".'
        )
    for form in (path, urllib.parse.unquote(path, errors="replace")):
        if _ASTRAY.search(form):
            raise InvalidArgument(
                'request.path: must not contain "//", "..", "\\" or control characters, percent-encoded or not.'
            )


def check_size(size: int, spec: Spec) -> None:
    """Raises TooLarge if a request's body of `size` bytes is over the workspace's limit."""
    limit = spec.limits.request_body_bytes
    if size > limit:
        raise TooLarge(f"The request's body has {size} bytes; this workspace takes at most {limit}.")


def headers_of(message: http_pb2.HttpRequest, *, streamed: bool = False) -> Headers:
    """The headers that go on to the container. Raises InvalidArgument."""
    upgrade = streamed and message.method == "GET" and not message.body.size
    if len(message.headers) > HEADERS:
        raise InvalidArgument(f"request.headers: more than {HEADERS}.")
    kept: list[tuple[str, bytes]] = []
    named: set[str] = set()
    size = 0
    for header in message.headers:
        name, value = header.name, header.value
        size += len(name) + len(value)
        lower = name.lower()
        if not _NAME.fullmatch(name) or _BAD_VALUE.search(value):
            raise InvalidArgument("request.headers: a name is no token, or a value has control characters.")
        if lower == "connection":
            named.update(word.strip().lower() for word in value.decode("latin-1").split(","))
        if lower == _UPGRADE:
            if upgrade and value.lower() == b"websocket":
                kept.append((name, value))
        elif lower not in _DROPPED and not lower.startswith(_PLATFORM):
            kept.append((name, value))
    if size > HEADERS_BYTES:
        raise InvalidArgument(f"request.headers: together longer than {HEADERS_BYTES} bytes.")
    # `Connection` names further headers that are of this hop only.
    named.discard(_UPGRADE)
    return tuple(header for header in kept if header[0].lower() not in named) if named else tuple(kept)


class Chunk(Protocol):
    """A piece of a stream of bytes."""

    @property
    def data(self) -> bytes:
        """Of a message: a copy each time."""


def chunk_of(message: Chunk) -> bytes:
    """What it carries, looked at once. Raises InvalidArgument if that is more than a chunk."""
    data = message.data
    if len(data) > wire.CHUNK_BYTES:
        raise InvalidArgument(f"data: more than {wire.CHUNK_BYTES} bytes in one message.")
    return data
