"""The gate every call passes: who calls, may they, and what went wrong in words.

One table says who may call what; a method that is not in it cannot be served. Errors are translated here and nowhere
else. Methods of the services are plain coroutines (or async generators) of a request and a Caller, named as in Python.
"""

import asyncio
import collections
import re
import secrets
import urllib.parse
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

import grpc
import structlog
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message_factory import GetMessageClass
from ngpu import parcels, wire
from ngpu.v1 import http_pb2

from controlplane.access import Access, Kind, Principal
from controlplane.errors import Forbidden, NgpuError, Unavailable

_log = structlog.get_logger(__name__)

In = TypeVar("In")
Out = TypeVar("Out")

_OPERATOR: Final = frozenset({Kind.OPERATOR})
_FRONT: Final = frozenset({Kind.OPERATOR, Kind.SERVICE})
_CUSTOMER: Final = frozenset({Kind.OPERATOR, Kind.SERVICE, Kind.WORKSPACE})
_OWNER: Final = frozenset({Kind.OPERATOR, Kind.WORKSPACE})
_NODE: Final = frozenset({Kind.NODE})
#: Open: these prove a key by a signature.
_ANYBODY: Final = frozenset(Kind)

#: Who may call what. There is no default: a method without a line here is a mistake that stops the start.
ROLES: Final[dict[str, frozenset[Kind]]] = {
    "ngpu.v1.TaskService.Schedule": _CUSTOMER,
    "ngpu.v1.TaskService.Batch": _CUSTOMER,
    "ngpu.v1.TaskService.Upload": _CUSTOMER,
    "ngpu.v1.TaskService.Query": _CUSTOMER,
    "ngpu.v1.TaskService.ListTasks": _CUSTOMER,
    "ngpu.v1.TaskService.GetDetail": _CUSTOMER,
    "ngpu.v1.TaskService.GetFlights": _CUSTOMER,
    "ngpu.v1.TaskService.Watch": _CUSTOMER,
    "ngpu.v1.TaskService.Connect": _CUSTOMER,
    "ngpu.v1.TaskService.Cancel": _CUSTOMER,
    "ngpu.v1.TaskService.RedeliverWebhook": _CUSTOMER,
    "ngpu.v1.WorkspaceService.CreateWorkspace": _OPERATOR,
    "ngpu.v1.WorkspaceService.GetWorkspace": _CUSTOMER,
    "ngpu.v1.WorkspaceService.ListWorkspaces": _OPERATOR,
    "ngpu.v1.WorkspaceService.ScaleWorkspace": _OWNER,
    "ngpu.v1.WorkspaceService.UpdateWorkspace": _OPERATOR,
    "ngpu.v1.WorkspaceService.DeleteWorkspace": _OPERATOR,
    "ngpu.v1.WorkspaceService.WatchWorkspace": _CUSTOMER,
    "ngpu.v1.WorkspaceService.GetWebhookSecret": _OWNER,
    "ngpu.v1.WorkspaceService.RotateWebhookSecret": _OWNER,
    "ngpu.v1.WorkspaceService.PublishRoute": _OPERATOR,
    "ngpu.v1.WorkspaceService.ListRoutes": _FRONT,
    "ngpu.v1.WorkspaceService.DeleteRoute": _OPERATOR,
    "ngpu.v1.NodeService.Challenge": _ANYBODY,
    "ngpu.v1.NodeService.Enroll": _ANYBODY,
    "ngpu.v1.NodeService.Login": _ANYBODY,
    "ngpu.v1.NodeService.Heartbeat": _NODE,
    "ngpu.v1.NodeService.Execute": _NODE,
    "ngpu.v1.NodeService.Fetch": _NODE,
    "ngpu.v1.NodeService.Deliver": _NODE,
    "ngpu.v1.NodeService.Tunnel": _NODE,
    "ngpu.v1.NodeService.Record": _NODE,
    "ngpu.v1.AssetService.CheckAddress": _CUSTOMER,
    "ngpu.v1.FleetService.ListNodes": _FRONT,
    "ngpu.v1.FleetService.GetNode": _FRONT,
    "ngpu.v1.FleetService.SetNodeAvailability": _OPERATOR,
    "ngpu.v1.FleetService.RevokeNode": _OPERATOR,
    "ngpu.v1.FleetService.TestGpus": _OPERATOR,
    "ngpu.v1.FleetService.CreateToken": _OPERATOR,
    "ngpu.v1.FleetService.ListTokens": _OPERATOR,
    "ngpu.v1.FleetService.RevokeToken": _OPERATOR,
    "ngpu.v1.FleetService.Explain": _OWNER,
    "ngpu.v1.FleetService.PlanWorkspace": _OPERATOR,
    "ngpu.v1.UsageService.GetUsage": _OWNER,
    "ngpu.v1.UsageService.ListReceipts": _OWNER,
    "ngpu.v1.UsageService.SetPrice": _OPERATOR,
    "ngpu.v1.UsageService.ListPrices": _OWNER,
}

#: Of an error's message. It travels twice in the trailing metadata, of which gRPC takes no more than 8 KiB.
MESSAGE_CHARS: Final = 1500
#: A call that has failed waits so long for the sending of its first message, which nothing but a dead peer keeps up.
FIRST_S: Final = 5.0
#: Of a caller's own id for a call.
REQUEST_ID_CHARS: Final = 64
#: Answers what it has before it ends at a stop.
_ENDS_BY_ITSELF: Final = "ngpu.v1.TaskService.Batch"

_NOBODY: Final = Principal(Kind.NOBODY, "")
_CODES: Final = {code.name: code for code in grpc.StatusCode}


class Stream(Generic[In, Out]):
    """The two ends of a streaming call. Only one task may be in `read`, and one in `write`."""

    def __init__(self, context: Any) -> None:
        self._context = context
        # What is sent first carries the initial metadata. grpcio forgets that it does if it is cancelled meanwhile, and
        # then cannot send the call's end either, for which the other side would wait for ever.
        self._first: asyncio.Task[None] | None = None

    async def read(self) -> In | None:
        """The next message; None: there are no more."""
        message = await self._context.read()
        return None if message is grpc.aio.EOF else message

    async def accept(self, metadata: tuple[tuple[str, str], ...] = ()) -> None:
        """Send the initial metadata now: what was read so far is in order."""
        await self._send_first(self._context.send_initial_metadata(metadata))

    async def write(self, message: Out) -> None:
        """Send it; waits while the other side has no room."""
        if self._first is None:
            await self._send_first(self._context.write(message))
        else:
            await self._context.write(message)

    async def _send_first(self, sending: "Coroutine[Any, Any, None]") -> None:
        self._first = asyncio.create_task(sending, name="first message of a stream")
        await asyncio.shield(self._first)

    async def settle(self) -> None:
        """Wait until what was sent first is on its way; FIRST_S at most."""
        if self._first is not None and not self._first.done():
            await asyncio.wait([self._first], timeout=FIRST_S)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls, from where, and under which id it is logged."""

    principal: Principal
    ip: str
    request_id: str
    #: Raises Unauthenticated once the credential no longer holds: for streams, which outlive revocations.
    check: Callable[[], Principal]


class Gate:
    """Wraps the services' methods. `calls` counts how they ended, by (method, status name)."""

    def __init__(self, access: Access, *, new_request_id: Callable[[], str] = lambda: secrets.token_hex(8)) -> None:
        self._access = access
        self._new_request_id = new_request_id
        self.calls: collections.Counter[tuple[str, str]] = collections.Counter()
        self._running: set[asyncio.Task[Any]] = set()
        self._streams: set[asyncio.Task[Any]] = set()
        self._stopping = False

    def guard(self, service: ServiceDescriptor, apis: Sequence[object]) -> grpc.GenericRpcHandler:
        """Handlers for every method of `service`, each a method of one of `apis` of the same name in snake case.

        Raises KeyError for a method that is not in ROLES, AttributeError for one that `apis` lack.
        """
        return grpc.method_handlers_generic_handler(
            service.full_name,
            {method.name: self._handler(method, _behaviour(apis, method.name)) for method in service.methods},
        )

    def stop(self) -> None:
        """End the streams, with Unavailable. New calls still come in until the server is stopped."""
        self._stopping = True
        for stream in self._streams:
            stream.cancel()

    async def idle(self, grace_s: float) -> None:
        """Wait until every call has ended, or so many seconds are over."""
        if self._running:
            await asyncio.wait(self._running, timeout=grace_s)

    def _handler(self, method: MethodDescriptor, inner: Callable[..., Any]) -> "grpc.RpcMethodHandler[Any, Any]":
        roles = ROLES[method.full_name]

        async def unary(request: Any, context: Any) -> Any:
            return await self._run(method, roles, context, lambda caller: inner(request, caller))

        async def server_stream(request: Any, context: Any) -> None:
            stream: Stream[Any, Any] = Stream(context)

            async def write_all(caller: Caller) -> None:
                async with aclosing(inner(request, caller)) as messages:
                    async for message in messages:
                        caller.check()
                        await stream.write(message)

            await self._run(method, roles, context, write_all, stream)

        async def client_stream(_: Any, context: Any) -> Any:
            stream: Stream[Any, Any] = Stream(context)
            return await self._run(method, roles, context, lambda caller: inner(stream, caller), stream)

        make, behaviour = {
            (False, False): (grpc.unary_unary_rpc_method_handler, unary),
            (False, True): (grpc.unary_stream_rpc_method_handler, server_stream),
            (True, False): (grpc.stream_unary_rpc_method_handler, client_stream),
            (True, True): (grpc.stream_stream_rpc_method_handler, client_stream),
        }[method.client_streaming, method.server_streaming]
        return make(
            behaviour,
            _reader(GetMessageClass(method.input_type)),
            _writer(GetMessageClass(method.output_type)),
        )

    async def _run(
        self,
        method: MethodDescriptor,
        roles: frozenset[Kind],
        context: Any,
        inner: Callable[[Caller], Awaitable[Any]],
        stream: Stream[Any, Any] | None = None,
    ) -> Any:
        name, request_id = method.name, ""
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        if (method.client_streaming or method.server_streaming) and method.full_name != _ENDS_BY_ITSELF:
            self._streams.add(task)
        try:
            metadata = dict(context.invocation_metadata())
            request_id = str(metadata.get(wire.REQUEST_ID, ""))[:REQUEST_ID_CHARS]
            check = self._check(roles, metadata.get(wire.AUTHORIZATION))
            answer = await inner(Caller(check(), ip_of(context.peer()), request_id, check))
        except asyncio.CancelledError:
            if not self._stopping or task not in self._streams or context.done():
                self.calls[name, "CANCELLED"] += 1
                raise
            error: NgpuError = Unavailable("The control plane is stopping; try again soon.")
        except Exception as caught:
            if context.done():
                # The caller has gone: what broke is our writing to him.
                self.calls[name, "CANCELLED"] += 1
                raise asyncio.CancelledError from caught
            error = self.error_of(caught, name, request_id)
        else:
            self.calls[name, "OK"] += 1
            return answer
        finally:
            self._running.discard(task)
            self._streams.discard(task)
        self.calls[name, error.code] += 1
        message = error_message(error)
        if stream is not None:
            await stream.settle()
        await context.abort(_CODES[error.code], message.message, ((wire.ERROR, message.SerializeToString()),))
        return None

    def _check(self, roles: frozenset[Kind], authorization: str | bytes | None) -> Callable[[], Principal]:
        if Kind.NOBODY in roles:
            return lambda: _NOBODY
        bearer = self._access.bearer(authorization if isinstance(authorization, str) else None)

        def check() -> Principal:
            principal = bearer()
            if principal.kind not in roles:
                raise Forbidden
            return principal

        return check

    def error_of(self, caught: BaseException, method: str, request_id: str = "") -> NgpuError:
        """What the caller is told: an error of ours as it is, anything else as INTERNAL with its traceback in the log.

        A stream's tasks live in a TaskGroup; what ended it is the first of their errors.
        """
        while isinstance(caught, BaseExceptionGroup):
            caught = caught.exceptions[0]
        if isinstance(caught, NgpuError):
            return caught
        request_id = request_id or self._new_request_id()
        _log.error("request_failed", method=method, request_id=request_id, exc_info=caught)
        return NgpuError(f"Something went wrong inside the control plane; its log has the details under {request_id}.")


def error_message(error: NgpuError) -> http_pb2.Error:
    """An error on the wire."""
    words = str(error)
    return http_pb2.Error(
        code=_CODES[error.code].value[0],
        reason=error.reason,
        message=words if len(words) <= MESSAGE_CHARS else f"{words[:MESSAGE_CHARS]} ...",
        retry_after_ms=round(error.retry_after_s * 1000),
    )


def ip_of(peer: str) -> str:
    """The address in gRPC's name of a peer: `ipv4:192.0.2.1:1234`, `ipv6:%5B::1%5D:1234`; else empty."""
    family, _, rest = urllib.parse.unquote(peer).partition(":")
    return rest.rpartition(":")[0].strip("[]") if family in {"ipv4", "ipv6"} else ""


def _reader(kind: type[Any]) -> Callable[[bytes], Any]:
    return parcels.reader(kind) if kind in parcels.CARRIERS else kind.FromString


def _writer(kind: type[Any]) -> Callable[[Any], bytes]:
    return parcels.writer(kind) if kind in parcels.CARRIERS else kind.SerializeToString


def _behaviour(apis: Sequence[object], method: str) -> Callable[..., Any]:
    name = re.sub(r"(?<!^)([A-Z])", r"_\1", method).lower()
    for api in apis:
        if hasattr(api, name):
            return getattr(api, name)  # type: ignore[no-any-return]
    raise AttributeError(f"nobody serves {method}")
