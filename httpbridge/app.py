"""The HTTP server: finds a request's handler in a dictionary, and lets no error out but as JSON.

Connections are ours (`connection`), and aiohttp's low-level server behind them, without its Application: one look-up
instead of a router, no middlewares. Whoever hangs up has his handler cancelled, which is how the control plane gets to
know.
"""

import asyncio
import itertools
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, NamedTuple, TypeVar
from urllib.parse import quote, unquote

import structlog
from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from httpbridge.connection import Server
from httpbridge.envelope import Said, encode
from httpbridge.errors import BadRequest, BridgeError, MethodNotAllowed, NotFound
from httpbridge.metrics import Metrics
from httpbridge.plain import HEAD_BYTES, PlainRequest, Request
from httpbridge.reply import Reply, refused

log = structlog.get_logger(__name__)

#: What is passed to containers lies under this.
USER: Final = "/user/"
#: What is a container's own HTTP, under this.
RUN: Final = "/run/"
#: In the metrics: a path that is none of ours, and a caller who went before his answer.
UNKNOWN: Final = "unknown"
HUNG_UP: Final = 499
#: How long what a refused caller still sends is read away, so that he gets to read why.
LINGER_S: Final = 5.0

_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._\-]{1,64}")
#: What aiohttp says of a request that is not HTTP may quote it at length.
_FAULT_CHARACTERS: Final = 200
_ASCII: Final = "".join(map(chr, range(0x21, 0x7F)))

_FULL_BODY: Final = encode(Said(503, "Too many connections; try again soon"))
_FULL: Final = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
    b"X-Request-Id: full\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(_FULL_BODY), _FULL_BODY)
)


Made = TypeVar("Made")


class Call(NamedTuple):
    """A request on its way to its handler."""

    request: Request
    request_id: str
    #: As called: path and query, percent-encoded.
    target: str
    path: str
    query: str
    #: What was made of the same head before; None: it is not known. See `plain.Head`.
    memory: dict[object, Any] | None

    def once(self, key: object, make: Callable[["Call"], Made]) -> Made:
        """`make` of this call, or what it gave for a call with the same head. Only of what follows from the head."""
        if self.memory is None:
            return make(self)
        made: Made | None = self.memory.get(key)
        if made is None:
            made = self.memory[key] = make(self)
        return made


Handler = Callable[[Call], Awaitable[Reply]]


class Route(NamedTuple):
    """A path: its handlers by method, and what the metrics call it."""

    name: str
    handlers: Mapping[str, Handler]

    def handler(self, method: str) -> Handler:
        """What answers to `method`; HEAD is GET without the body. Raises MethodNotAllowed."""
        found = self.handlers.get("GET" if method == "HEAD" else method)
        if found is None:
            allow = sorted({*self.handlers, *(["HEAD"] if "GET" in self.handlers else [])})
            raise MethodNotAllowed(f"{self.name} does not answer to {method}", allow=", ".join(allow))
        return found


class AnyMethod(NamedTuple):
    """A path that answers to every method alike."""

    name: str
    answer: Handler

    def handler(self, method: str) -> Handler:  # noqa: ARG002 a Route asks
        """What answers to `method`."""
        return self.answer


class Limits(NamedTuple):
    """What one caller, and what all together, may take up."""

    connections: int
    #: A connection on which no whole request came for so long is closed.
    idle_s: float
    #: A caller who takes nothing of his answer for so long is cut off.
    stall_s: float
    #: Of the request line, and of one header.
    line_bytes: int


class App:
    """Routes by exact path; `passthrough` for everything else under `/user/`, `raw` for all that is under `/run/`."""

    def __init__(
        self,
        routes: Mapping[str, Route],
        passthrough: Route,
        raw: AnyMethod,
        metrics: Metrics,
        limits: Limits,
    ) -> None:
        self._routes = routes
        self._passthrough = passthrough
        self._raw = raw
        self._metrics = metrics
        self._limits = limits
        self._new_id = map("{}{:08x}".format, itertools.repeat(secrets.token_hex(6)), itertools.count(1)).__next__

    def server(self) -> Server:
        """A factory of connections, for `loop.create_server`. To be called inside the loop."""
        limits = self._limits
        return Server(
            self.handle,
            self._aiohttp(),
            most=limits.connections,
            idle_s=limits.idle_s,
            line_bytes=min(limits.line_bytes, HEAD_BYTES),
            full=_FULL,
        )

    def _aiohttp(self) -> web.Server:
        return _Server(
            self.handle,
            handler_cancellation=True,
            access_log=None,
            # Bodies travel as they are; and a small compressed one could be a very large one.
            auto_decompress=False,
            # Also the time a head may take: nothing else bounds a caller who sends it byte by byte.
            keepalive_timeout=self._limits.idle_s,
            lingering_time=min(LINGER_S, self._limits.stall_s),
            max_line_size=self._limits.line_bytes,
            max_field_size=self._limits.line_bytes,
        )

    async def handle(self, request: Request) -> Reply:
        """Answer one request, whatever happens."""
        began = time.perf_counter()
        request_id = request.headers.get("X-Request-Id", "")
        if _REQUEST_ID.fullmatch(request_id) is None:
            request_id = self._new_id()
        name = UNKNOWN
        self._metrics.in_flight += 1
        try:
            if type(request) is PlainRequest:
                memory = request.head.memory
                found = memory.get(self)
                if found is None:
                    found = memory[self] = self._find(request)
            else:
                memory = None
                found = self._find(request)
            target, path, query, route = found
            name = route.name
            reply = await route.handler(request.method)(Call(request, request_id, target, path, query, memory))
        except BridgeError as error:
            reply = refused(error)
        except (asyncio.CancelledError, ConnectionError):
            self._metrics.observe(name, HUNG_UP, time.perf_counter() - began)
            raise
        except Exception:
            log.exception("fault", request_id=request_id, operation=name)
            reply = refused(BridgeError())
        finally:
            self._metrics.in_flight -= 1
        reply.request_id = request_id
        reply.stall_limit_s = self._limits.stall_s
        self._metrics.observe(name, reply.status, time.perf_counter() - began)
        return reply

    def _find(self, request: Request) -> tuple[str, str, str, Route | AnyMethod]:
        """Target, path, query and route. Raises NotFound."""
        target = request.raw_path
        if not target.startswith("/"):
            # RFC 9112, 3.2.2: a server must take an absolute URL too.
            assert isinstance(request, web.BaseRequest)
            target = request.rel_url.raw_path_qs
        if not target.isascii():
            target = quote(target.encode("utf-8", "surrogateescape"), safe=_ASCII)
        path, _, query = target.partition("?")
        route = self._routes.get(path)
        if route is not None:
            return target, path, query, route
        if path.startswith(RUN):
            return target, path, query, self._raw
        # The original's documents print `/user/queryTask&taskID=...`.
        literal, ampersand, literal_query = target.partition("&")
        if ampersand and (route := self._routes.get(literal)) is not None:
            return target, literal, literal_query, route
        # Other spellings of a path of ours are ours too: none of them may reach a container.
        if (route := self._routes.get(unquote(path).rstrip("/"))) is not None:
            return target, path, query, route
        if path.startswith(USER):
            return target, path, query, self._passthrough
        raise NotFound("There is no such path here; /docs lists all")


class _Server(web.Server):
    """Makes connections that speak JSON even when what comes in is not HTTP."""

    def __init__(self, handler: Callable[[web.BaseRequest], Awaitable[Reply]], **options: Any) -> None:
        super().__init__(handler, **options)
        self._options = options

    def __call__(self) -> RequestHandler:
        options = {name: value for name, value in self._options.items() if name != "handler_cancellation"}
        return _Connection(self, loop=asyncio.get_running_loop(), **options)


class _Connection(RequestHandler):
    __slots__ = ()

    def handle_error(
        self,
        request: web.BaseRequest,  # noqa: ARG002
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what could not be parsed. `App.handle` leaves nothing else to come here."""
        if status != 400:
            log.error("fault", exc_info=exc)
            reply = refused(BridgeError())
        else:
            words = (message or "").strip().partition("\n")[0].strip().rstrip(":")[:_FAULT_CHARACTERS]
            reply = refused(BadRequest(f"This is not valid HTTP: {words}"))
        reply.request_id = secrets.token_hex(8)
        reply.force_close()
        return reply
