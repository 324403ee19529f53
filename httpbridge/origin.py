"""Who asked, as the edge saw it: for the record."""

import ipaddress
from collections.abc import Sequence
from typing import Final

from ngpu.v1 import task_pb2 as pb

from httpbridge.app import Call
from httpbridge.plain import Request

Networks = Sequence[ipaddress.IPv4Network | ipaddress.IPv6Network]

#: As much of a User-Agent as is recorded.
USER_AGENT_CHARACTERS: Final = 256


def fill(origin: pb.Origin, call: Call, operation: str, trusted_proxies: Networks) -> None:
    """Set an origin within a message that is being built."""
    origin.user_ip = _user_ip(call.request, trusted_proxies)
    origin.url = call.target
    origin.operation = operation
    origin.user_agent = _printable(call.request.headers.get("User-Agent", ""))


def _user_ip(request: Request, trusted: Networks) -> str:
    """The caller's address; behind proxies we trust, the one that the outermost of them saw."""
    address = request.remote or ""
    if trusted:
        hops = [address, *reversed(request.headers.get("X-Forwarded-For", "").split(","))]
        for hop in hops:
            try:
                known = ipaddress.ip_address(hop.strip())
            except ValueError:
                break
            address = str(known)
            if not any(known in network for network in trusted):
                break
    return address


def _printable(text: str) -> str:
    """What may stand in a protobuf string: aiohttp keeps bytes that are not UTF-8 as lone surrogates."""
    text = text[:USER_AGENT_CHARACTERS]
    return text if text.isascii() else text.encode("utf-8", "replace").decode()
