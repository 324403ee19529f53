"""Which header fields of a caller travel to the container: all that are end to end, none that are the platform's."""

from collections.abc import Iterable
from functools import lru_cache
from typing import Final

from ngpu.v1 import http_pb2

from httpbridge.errors import BadRequest

#: All fields of one call together.
TOTAL_BYTES: Final = 32 * 1024
#: Names whose fate is remembered; callers choose names, so there is an end to it.
REMEMBERED: Final = 1024

#: RFC 9110, 7.6.1; what each hop sets anew; what was meant for us. Content-Type is what `envelope` says.
_STAY: Final = frozenset(
    {
        "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer",
        "transfer-encoding", "upgrade", "http2-settings",
        "host", "content-length", "content-type", "expect",
        "authorization", "btcaddress", "idempotency-key",
        # A compressed answer could not be put into `data` as the text it is.
        "accept-encoding",
    }
)  # fmt: skip
_PLATFORM: Final = "x-ngpu-"


def forward(fields: Iterable[tuple[bytes, bytes]], connection: str, into: http_pb2.HttpRequest) -> None:
    """Add to `into` what travels. `connection`: the Connection field, which may name more that must not.

    Raises BadRequest if it is too much.
    """
    named = {_plain(name.strip()) for name in connection.split(",")} if connection else ()
    total = 0
    add = into.headers.add
    for raw, value in fields:
        name = _name(raw)
        if name and not (named and _plain(name) in named):
            total += len(raw) + len(value)
            add(name=name, value=value)
    if total > TOTAL_BYTES:
        raise BadRequest(f"The header fields are larger than {TOTAL_BYTES} bytes together")


@lru_cache(maxsize=REMEMBERED)
def _name(raw: bytes) -> str:
    """As it travels; "" if it does not."""
    name = raw.decode("ascii")
    plain = _plain(name)
    return "" if plain in _STAY or plain.startswith(_PLATFORM) else name


def _plain(name: str) -> str:
    # CGI and its heirs make one name of X-NGPU-A and X_NGPU_A.
    return name.lower().replace("_", "-")
