"""The connection to the control plane: which one, with which token, and what its errors mean to whoever typed."""

import ipaddress
import os
import queue
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar, cast

import grpc
from ngpu import dial, wire
from ngpu.v1.asset_pb2_grpc import AssetServiceStub
from ngpu.v1.fleet_pb2_grpc import FleetServiceStub
from ngpu.v1.http_pb2 import Error
from ngpu.v1.task_pb2_grpc import TaskServiceStub
from ngpu.v1.usage_pb2_grpc import UsageServiceStub
from ngpu.v1.workspace_pb2_grpc import WorkspaceServiceStub

from controlplane.ctl.output import Output
from controlplane.ctl.problem import Exit, Problem
from controlplane.ctl.units import duration_text

DEFAULT_SERVER: Final = "127.0.0.1:50051"
#: For an answer that is not waited for on purpose.
CALL_LIMIT_S: Final = 30.0
#: No token is longer.
_TOKEN_BYTES: Final = 4096

Answer = TypeVar("Answer")

_EXITS: Final = {
    grpc.StatusCode.INVALID_ARGUMENT: Exit.USAGE,
    grpc.StatusCode.OUT_OF_RANGE: Exit.USAGE,
    grpc.StatusCode.NOT_FOUND: Exit.NOT_FOUND,
    grpc.StatusCode.PERMISSION_DENIED: Exit.NOT_ALLOWED,
    grpc.StatusCode.UNAUTHENTICATED: Exit.NOT_ALLOWED,
}


@dataclass(frozen=True)
class Target:
    """Which control plane, how, and as whom. `token_file` empty: found, see `find_token`."""

    server: str = DEFAULT_SERVER
    token_file: Path | None = None
    tls: bool = False
    tls_ca: Path | None = None
    plaintext: bool = False


class Session(AbstractContextManager["Session"]):
    """What a command works with: the output, and the services, with the token over a channel opened when needed."""

    def __init__(self, target: Target, out: Output) -> None:
        self.target = target
        self.out = out
        self._opened: list[grpc.Channel] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for channel in self._opened:
            channel.close()

    @property
    def now(self) -> datetime:
        """The time, UTC."""
        return datetime.now(UTC)

    @cached_property
    def _channel(self) -> grpc.Channel:
        channels = _open(self.target)
        self._opened += channels
        return channels[0] if len(channels) == 1 else _answering(channels)

    @cached_property
    def _metadata(self) -> tuple[tuple[str, str], ...]:
        return ((wire.AUTHORIZATION, f"Bearer {find_token(self.target.token_file, os.environ)}"),)

    @cached_property
    def tasks(self) -> TaskServiceStub:
        """TaskService."""
        return TaskServiceStub(self._channel)

    @cached_property
    def workspaces(self) -> WorkspaceServiceStub:
        """WorkspaceService."""
        return WorkspaceServiceStub(self._channel)

    @cached_property
    def fleet(self) -> FleetServiceStub:
        """FleetService."""
        return FleetServiceStub(self._channel)

    @cached_property
    def assets(self) -> AssetServiceStub:
        """AssetService."""
        return AssetServiceStub(self._channel)

    @cached_property
    def usage(self) -> UsageServiceStub:
        """UsageService."""
        return UsageServiceStub(self._channel)

    def call(self, method: Callable[..., Answer], request: Any, *, limit_s: float = CALL_LIMIT_S) -> Answer:
        """One answer. `request` is an iterator for Upload. Raises Problem."""
        try:
            return method(request, metadata=self._metadata, timeout=limit_s)
        except grpc.RpcError as error:
            raise self.problem(error) from error

    def pages(self, method: Callable[..., Answer], request: Any) -> Answer:
        """All pages of a list as one answer. Raises Problem."""
        answer: Any = self.call(method, request)
        while answer.cursor:
            request.cursor = answer.cursor
            answer.ClearField("cursor")
            answer.MergeFrom(self.call(method, request))
        return cast("Answer", answer)

    def stream(
        self, method: Callable[..., Iterator[Answer]], request: Any, *, limit_s: float | None
    ) -> Iterator[Answer]:
        """Answers one by one; the call ends when the iterator is closed. Raises grpc.RpcError: see `problem`."""
        call = method(request, metadata=self._metadata, timeout=limit_s)
        try:
            yield from call
        finally:
            call.cancel()  # type: ignore[attr-defined]  # it is a grpc.Call too

    def problem(self, error: grpc.RpcError) -> Problem:
        """An error of a call, as one line that says what to do."""
        code = error.code()
        if told := error_of(error):
            retry = f" Try again in {duration_text(told.retry_after_ms / 1000)}." if told.retry_after_ms else ""
            return Problem(told.message + retry, _EXITS.get(code, Exit.FAILED))
        details = error.details() or ""
        if code is grpc.StatusCode.UNAVAILABLE:
            return Problem(
                f"The control plane does not answer at {self.target.server} ({_why_not(details)}). Start it "
                "with `ngpu-controlplane run`, or name another with --server or NGPU_SERVER.",
                Exit.UNREACHABLE,
            )
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return Problem(f"The control plane at {self.target.server} took too long to answer.", Exit.UNREACHABLE)
        if code is grpc.StatusCode.UNIMPLEMENTED:
            return Problem(
                f"What answers at {self.target.server} does not know this call: is it an NGPU of this version?"
            )
        return Problem(f"{details or 'The call failed'} ({code.name})", _EXITS.get(code, Exit.FAILED))


def error_of(error: grpc.RpcError) -> Error | None:
    """What the control plane itself says of the error; None if it did not get to say anything."""
    for item in error.trailing_metadata() or ():
        if item.key == wire.ERROR and isinstance(item.value, bytes):
            return Error.FromString(item.value)
    return None


def _why_not(details: str) -> str:
    """gRPC's account of a connection that did not come about, cut down to what is of use."""
    if "CERTIFICATE_VERIFY_FAILED" in details:
        return "its certificate is not trusted: name the CA's with --tls-ca"
    if "handshake failed" in details:
        return "it does not speak TLS: leave --tls and --tls-ca out"
    if details.endswith("Socket closed"):
        return "it hung up: does it want --tls?"
    # gRPC's ways of connecting differ in whether they add the number of the error.
    return re.sub(r" \(\d+\)$", "", details.rsplit(": ", 1)[-1].rstrip("]"))


def find_token(file: Path | None, environment: Mapping[str, str]) -> str:
    """The token: --token-file, NGPU_TOKEN, NGPU_TOKEN_FILE, the control plane's own of this directory, the user's.

    Raises Problem.
    """
    if file is None and (token := environment.get("NGPU_TOKEN", "").strip()):
        return _checked(token, "NGPU_TOKEN")
    if file is None and environment.get("NGPU_TOKEN_FILE"):
        file = Path(environment["NGPU_TOKEN_FILE"])
    usual = (Path(".ngpu/controlplane/operator.token"), Path.home() / ".config/ngpu/token")
    if file is None:
        file = next((path for path in usual if path.exists()), None)
    if file is None:
        raise Problem(
            f"There is no token: set NGPU_TOKEN or NGPU_TOKEN_FILE, use --token-file, or write it to {usual[1]}. An "
            "operator's lies in the control plane's state directory; a workspace's id is a token for that workspace.",
            Exit.NOT_ALLOWED,
        )
    try:
        with file.open(encoding="utf-8") as opened:
            return _checked(opened.read(_TOKEN_BYTES).strip(), str(file))
    except (OSError, UnicodeError) as error:
        raise Problem(f"The token cannot be read: {error}", Exit.NOT_ALLOWED) from error


def _checked(token: str, source: str) -> str:
    # gRPC would refuse it with words about metadata.
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise Problem(f"What {source} holds is not a token.", Exit.NOT_ALLOWED)
    return token


def _answering(channels: Sequence[grpc.Channel]) -> grpc.Channel:
    """The first that answers; a control plane that stands by does not. The first of all if none does."""
    answering: queue.SimpleQueue[grpc.Channel] = queue.SimpleQueue()
    waiting = [grpc.channel_ready_future(channel) for channel in channels]
    for channel, ready in zip(channels, waiting, strict=True):
        ready.add_done_callback(partial(_put, answering, channel))
    try:
        return answering.get(timeout=dial.REACH_S)
    except queue.Empty:
        return channels[0]
    finally:
        for ready in waiting:
            ready.cancel()


def _put(into: queue.SimpleQueue[grpc.Channel], channel: grpc.Channel, _: object) -> None:
    into.put(channel)


def _open(target: Target) -> list[grpc.Channel]:
    """To each address of `target`."""
    servers = dial.split(target.server)
    if not target.tls and target.tls_ca is None:
        if not (target.plaintext or all(map(_stays_here, servers))):
            raise Problem(
                f"The token would travel to {target.server} unencrypted. Use --tls (with --tls-ca FILE for your own "
                "CA), or --plaintext where the network is yours alone.",
                Exit.USAGE,
            )
        return [grpc.insecure_channel(server, wire.CLIENT_OPTIONS) for server in servers]
    try:
        roots = target.tls_ca.read_bytes() if target.tls_ca else None
    except OSError as error:
        raise Problem(f"The CA's certificate cannot be read: {error}", Exit.USAGE) from error
    credentials = grpc.ssl_channel_credentials(roots)
    return [grpc.secure_channel(server, credentials, wire.CLIENT_OPTIONS) for server in servers]


def _stays_here(server: str) -> bool:
    host = server.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or server.startswith("unix:")
