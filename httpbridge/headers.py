"""Which header fields travel between caller and container: all that are end to end, none that are the platform's."""

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Final

from ngpu.v1 import http_pb2

from httpbridge.errors import BadGateway, BadRequest

#: All fields of one call together.
TOTAL_BYTES: Final = 32 * 1024
#: Names whose fate is remembered; callers choose names, so there is an end to it.
REMEMBERED: Final = 1024

#: RFC 9110, 7.6.1; what each hop sets anew; what was meant for us.
_STAY: Final = frozenset(
    {
        "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer",
        "transfer-encoding", "upgrade", "http2-settings",
        "host", "content-length", "expect", "authorization",
    }
)  # fmt: skip
#: With the envelope besides: Content-Type is what `envelope` says, and a compressed answer could not be put into `data`
#: as the text it is.
_OF_ENVELOPE: Final = frozenset({"content-type", "btcaddress", "idempotency-key", "accept-encoding"})
#: Of a container's answer: each hop's own, except where the answer has no body to tell its length by.
_OF_HOP: Final = _STAY - {"host", "content-length", "expect", "authorization"}
_PLATFORM: Final = "x-ngpu-"
_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_BAD_VALUE: Final = re.compile(rb"[\r\n\0]")


def forward(
    fields: Iterable[tuple[bytes, bytes]], connection: str, into: http_pb2.HttpRequest, *, envelope: bool = True
) -> None:
    """Add to `into` what travels. `connection`: the Connection field, which may name more that must not.

    `envelope`: the body is taken out of its envelope. Raises BadRequest if it is too much.
    """
    named = {_plain(name.strip()) for name in connection.split(",")} if connection else ()
    total = 0
    add = into.headers.add
    for raw, value in fields:
        name = _name(raw, envelope)
        if name and not (named and _plain(name) in named):
            total += len(raw) + len(value)
            add(name=name, value=value)
    if total > TOTAL_BYTES:
        raise BadRequest(f"The header fields are larger than {TOTAL_BYTES} bytes together")


def back(response: http_pb2.HttpResponse, *, bodiless: bool) -> list[tuple[str, str]]:
    """The fields of a container's answer that go to the caller, `bodiless` with its Content-Length.

    Raises BadGateway: a node is not ours, and must not be able to say something in the name of the bridge.
    """
    fields: list[tuple[str, str]] = []
    for header in response.headers:
        plain = _plain(header.name)
        if plain in _OF_HOP or plain.startswith(_PLATFORM) or (plain == "content-length" and not bodiless):
            continue
        if _TOKEN.fullmatch(header.name) is None or _BAD_VALUE.search(header.value):
            raise BadGateway("The container's answer has a header that HTTP does not allow")
        fields.append((header.name, header.value.decode("latin-1")))
    return fields


@lru_cache(maxsize=REMEMBERED)
def _name(raw: bytes, envelope: bool) -> str:
    """As it travels; "" if it does not."""
    name = raw.decode("ascii")
    plain = _plain(name)
    stays = plain in _STAY or (envelope and plain in _OF_ENVELOPE) or plain.startswith(_PLATFORM)
    return "" if stays else name


def _plain(name: str) -> str:
    # CGI and its heirs make one name of X-NGPU-A and X_NGPU_A.
    return name.lower().replace("_", "-")
