"""The way to the control plane: channels, what its errors say, and how long to wait before the next try."""

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, TypeAlias, TypeVar, cast

import grpc
from google.protobuf.message import DecodeError
from ngpu import dial, streams, wire
from ngpu.v1 import http_pb2, node_pb2_grpc

Asked = TypeVar("Asked")
Answered = TypeVar("Answered")
Metadata = tuple[tuple[str, str], ...]
#: A class that only the type checker knows.
Stub: TypeAlias = "node_pb2_grpc.NodeServiceAsyncStub"

#: To answer a unary call.
CALL_LIMIT_S: Final = 10.0
#: What grpc.aio says of a call that the other side ended while something was being sent on it (grpcio 1.85). The status
#: with which it was ended follows in a moment: it is looked for so often, so far apart.
UNTOLD: Final = "Internal error from Core"
LOOKS: Final = 20
LOOK_S: Final = 0.005


class LinkLost(Exception):
    """The stream to the control plane has ended."""


class Dialler:
    """Makes channels to the control plane. `tls_ca`: PEM file with the authority to trust; None: the system's.

    `targets`: its address; or several, with commas between them, of which one answers. `target` is that one.
    """

    def __init__(self, targets: str, *, tls: bool = False, tls_ca: Path | None = None) -> None:
        self.targets = dial.split(targets)
        self.target = self.targets[0]
        self._credentials = grpc.ssl_channel_credentials(tls_ca.read_bytes() if tls_ca else None) if tls else None

    async def reach(self) -> grpc.aio.Channel:
        """A channel to the one that answers, which is `target` from now on; if none does, calls on it say why."""
        if len(self.targets) > 1 and (found := await dial.reach(self.targets, self._dial)):
            self.target, channel = found
            return channel
        return self.channel()

    def channel(self) -> grpc.aio.Channel:
        """A channel to `target`."""
        return self._dial(self.target)

    def _dial(self, target: str) -> grpc.aio.Channel:
        # With a socket of its own, and so with no memory of earlier failures to connect.
        if self._credentials is None:
            return grpc.aio.insecure_channel(target, options=wire.BULK_CLIENT_OPTIONS)
        return grpc.aio.secure_channel(target, self._credentials, options=wire.BULK_CLIENT_OPTIONS)


class Backoff:
    """Waits that double from `first_s` to `cap_s`, each shortened by up to half so that nodes do not come in step."""

    def __init__(self, first_s: float, cap_s: float, *, chance: Callable[[], float] = random.random) -> None:
        self._first_s = self._next_s = first_s
        self._cap_s = cap_s
        self._chance = chance

    def next(self) -> float:
        """How long to wait now, in seconds."""
        wait_s = self._next_s * (0.5 + 0.5 * self._chance())
        self._next_s = min(self._next_s * 2, self._cap_s)
        return wait_s

    def reset(self) -> None:
        """It went well: begin anew."""
        self._next_s = self._first_s


def bearer(token: str) -> Metadata:
    """Metadata that carries `token`."""
    return ((wire.AUTHORIZATION, f"Bearer {token}"),)


def stub_of(channel: grpc.aio.Channel) -> Stub:
    """The service on that channel."""
    return node_pb2_grpc.NodeServiceStub(channel)


async def read(
    call: grpc.aio.StreamStreamCall[Asked, Answered] | grpc.aio.UnaryStreamCall[Asked, Answered],
) -> Answered:
    """The next message of a stream. Raises LinkLost at its end, AioRpcError."""
    with _cancelled_by_other_side():
        try:
            message = await streams.read(call)
        except grpc.aio.AioRpcError as fault:
            raise await _told(call, fault) from None
    if message is grpc.aio.EOF:
        raise LinkLost("the control plane ended it")
    return cast("Answered", message)


async def ask(call: Awaitable[Answered]) -> Answered:
    """The answer of a unary call. Raises LinkLost, AioRpcError."""
    with _cancelled_by_other_side():
        return await call


async def write(call: grpc.aio.StreamStreamCall[Asked, Answered], message: Asked) -> None:
    """Send a message on a stream; returns when the transport has room for more. Raises LinkLost, AioRpcError."""
    with _cancelled_by_other_side():
        try:
            await call.write(message)
        except asyncio.InvalidStateError:
            if call.done():
                # Whoever reads has yet to be told why.
                await read(call)
            raise LinkLost("it has ended") from None
        except grpc.aio.AioRpcError as fault:
            raise await _told(call, fault) from None


async def _told(call: grpc.aio.Call, fault: grpc.aio.AioRpcError) -> grpc.aio.AioRpcError:
    """With what the other side ended the call."""
    for _ in range(LOOKS if fault.details() == UNTOLD else 0):
        await asyncio.sleep(LOOK_S)
        if (details := await call.details()) != UNTOLD:
            first, last = await call.initial_metadata(), await call.trailing_metadata()
            return grpc.aio.AioRpcError(await call.code(), first, last, details)
    return fault


@contextlib.contextmanager
def _cancelled_by_other_side() -> Iterator[None]:
    """grpc.aio raises CancelledError also when the other side ended a call as CANCELLED: tell the two apart."""
    try:
        yield
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise LinkLost("it was cancelled by the other side") from None


def reason_of(fault: grpc.aio.AioRpcError) -> tuple[str, str]:
    """Reason and message of a failed call; the reason is empty if the control plane gave none."""
    trailing: Sequence[tuple[str, str | bytes]] = tuple(fault.trailing_metadata() or ())
    for key, value in trailing:
        if key == wire.ERROR and isinstance(value, bytes):
            try:
                error = http_pb2.Error.FromString(value)
            except DecodeError:
                break
            return error.reason, error.message
    return "", f"{fault.code().name}: {fault.details() or 'no details'}"


def words_of(fault: grpc.aio.AioRpcError | LinkLost) -> str:
    """Why a call failed or a stream ended, for a person."""
    return reason_of(fault)[1] if isinstance(fault, grpc.aio.AioRpcError) else str(fault)
