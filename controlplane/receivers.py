"""Posts to receivers of webhooks, over HTTP, as one should to strangers: bounded, alone, and only where it may go.

Every socket is made for an address that was judged at that moment, so it does not matter what a name leads to, how a
URL was written, or how often a name server changes its mind. Redirects are not followed, no proxy is asked, no cookie
is kept, no connection is used twice, and of an answer only its head is read.
"""

import asyncio
import ipaddress
import socket
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from controlplane.destinations import Refused, Rules, host_of, refusal
from controlplane.webhooks import Answer, retry_after_s

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

#: Of what a receiver says, TLS and all, no more is taken in.
ANSWER_BYTES: Final = 64 * 1024
#: So much at once: of a thousand interim answers it takes the parser 30 ms.
PIECE_BYTES: Final = 16 * 1024

_USER_AGENT: Final = "NGPU-Webhooks/1"
#: Whether there is such a name inside, and where it leads, is nobody's business who may name hosts to us.
NOT_PUBLIC: Final = "The host does not lead to a public address."


class _NotPublic(OSError):
    """A socket to such an address is not made."""


class _Socket(socket.socket):
    """Gives no more than ANSWER_BYTES: a stranger's endless answer would keep the whole event loop busy."""

    left = ANSWER_BYTES

    def recv(self, size: int, flags: int = 0, /) -> bytes:
        """As socket.socket's; asyncio reads plain connections so."""
        data = super().recv(min(size, self._room()), flags)
        self.left -= len(data)
        return data

    def recv_into(self, buffer: "WriteableBuffer", size: int = 0, flags: int = 0, /) -> int:
        """As socket.socket's; asyncio reads TLS so."""
        size = super().recv_into(buffer, min(size or memoryview(buffer).nbytes, self._room()), flags)
        self.left -= size
        return size

    def _room(self) -> int:
        if not self.left:
            raise ConnectionAbortedError("the answer is too long")
        return min(self.left, PIECE_BYTES)


class _Resolver(AbstractResolver):
    """The system's name service, on threads of our own: one that hangs must not hold those of others."""

    def __init__(self, threads: int) -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="webhook-names")

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        found = await asyncio.get_running_loop().run_in_executor(self._threads, _addresses, host, port, family)
        return [
            ResolveResult(hostname=host, host=str(at[0]), port=port, family=kind, proto=proto, flags=_NUMERIC)
            for kind, _, proto, _, at in found
        ]

    async def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


_NUMERIC: Final = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV


def _addresses(host: str, port: int, family: socket.AddressFamily) -> list[Any]:
    return list(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, family=family))


class HttpReceivers:
    """Posts with aiohttp. `time_limit_s`: for all of one post. `concurrency`: posts at once, as the caller keeps it."""

    def __init__(
        self,
        rules: Rules,
        *,
        time_limit_s: float,
        concurrency: int,
        clock: Callable[[], datetime],
    ) -> None:
        self._rules = rules
        self._clock = clock
        self._resolver = _Resolver(concurrency)
        connector = aiohttp.TCPConnector(
            resolver=self._resolver,
            use_dns_cache=False,
            force_close=True,
            limit=concurrency,
            socket_factory=self._socket,
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            timeout=aiohttp.ClientTimeout(total=time_limit_s),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
            headers={"User-Agent": _USER_AGENT, "Content-Type": "application/json"},
        )
        self._time_limit_s = time_limit_s

    async def close(self) -> None:
        """Break off what is under way."""
        await self._session.close()
        await self._resolver.close()

    def _socket(self, info: Any) -> socket.socket:
        family, kind, proto, _, address = info
        if refusal(ipaddress.ip_address(address[0]), self._rules):
            raise _NotPublic(NOT_PUBLIC)
        made = _Socket(family=family, type=kind, proto=proto)
        made.setblocking(False)
        return made

    async def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> Answer:
        """POST `body`; see late_receivers."""
        began = time.monotonic()
        status, error, wait_s = 0, "", 0.0
        try:
            # The operator may have changed his mind since the task came.
            host_of(url, self._rules)
            # As it was given: nobody but its owner knows what its escapes mean.
            target = URL(url, encoded=True)
            async with self._session.post(target, data=body, headers=headers, allow_redirects=False) as response:
                status = response.status
                wait_s = retry_after_s(response.headers.get("Retry-After", ""), self._clock())
        except Refused as refused:
            error = str(refused).removeprefix("callback_url: ").capitalize()
        except TimeoutError:
            error = f"No answer came within {self._time_limit_s:g} s."
        except aiohttp.ClientConnectorCertificateError:
            error = "The receiver's certificate is not to be believed."
        except aiohttp.ClientConnectorSSLError:
            error = "The receiver does not speak TLS as it should."
        except aiohttp.ClientConnectorError as caught:
            error = _why(caught.os_error)
        except (aiohttp.ClientError, ValueError, OSError) as caught:
            error = f"The connection broke off or what came was no HTTP ({type(caught).__name__})."
        return Answer(status, error, wait_s, time.monotonic() - began)


def _why(error: OSError) -> str:
    if isinstance(error, _NotPublic | socket.gaierror) or NOT_PUBLIC in str(error):
        return NOT_PUBLIC
    if isinstance(error, ConnectionRefusedError):
        return "The receiver refused the connection."
    return f"The receiver cannot be reached ({type(error).__name__})."
