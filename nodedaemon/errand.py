"""The errand of a connection: the attempt whose request was sent on it last, noted so that another daemon can go on.

The note is written once, before the first byte of the request goes out, and never touched until the next one. How far
the errand has come since is not in it: the kernel counts the bytes of each connection, in and out, whoever holds it,
and that is compared with what the counts must be when the request is sent whole and nothing of its answer was read. So
no crash can come between an act and the note of it.
"""

import fcntl
import socket
import struct
import termios
from dataclasses import dataclass
from typing import Final, NamedTuple

from google.protobuf.message import DecodeError
from ngpu.v1 import node_pb2

#: Longer ones are not noted: some 200, and the rule of an attempt that may become a job.
ERRAND_BYTES: Final = 2000
#: accepted_at; run time limit, record after, port; body limit; flags; how many bytes of ids follow.
_FIXED: Final = struct.Struct("<dIIIQBH")
_STREAMED, _HEAD, _GPUS, _JOB = 1, 2, 4, 8
#: In the kernel's struct tcp_info: the state, and after 120 bytes bytes_acked and bytes_received.
_TCP_INFO: Final = struct.Struct("=B119xQQ")
_CLOSE_WAIT: Final = 8
_INT: Final = struct.Struct("=i")


@dataclass(frozen=True, slots=True)
class Errand:
    """What it takes to go on. `job`: the bare Start of an attempt that may become a job (see `jobs`), or None.

    `accepted_at`: by the machine's monotonic clock, which is the same for every daemon: notes do not outlive a boot.
    """

    start: node_pb2.Start
    container_id: str
    accepted_at: float
    is_head: bool
    has_gpus: bool
    job: node_pb2.Start | None


def pack(
    start: node_pb2.Start, container_id: str, accepted_at: float, *, has_gpus: bool, job: node_pb2.Start | None
) -> bytes | None:
    """The note of an errand; None: it cannot be noted."""
    ids = f"{start.attempt_id}\0{start.replica_id}\0{container_id}".encode()
    if not container_id or len(ids) > ERRAND_BYTES:
        return None
    flags = (
        (_STREAMED if start.streamed else 0)
        | (_HEAD if start.request.method == "HEAD" else 0)
        | (_GPUS if has_gpus else 0)
        | (_JOB if job is not None else 0)
    )
    note = (
        _FIXED.pack(
            accepted_at,
            start.run_time_limit_ms,
            start.record_after_ms,
            start.port,
            start.response_body_limit_bytes,
            flags,
            len(ids),
        )
        + ids
    )
    if job is not None:
        note += job.SerializeToString()
    return note if len(note) <= ERRAND_BYTES else None


def unpack(note: bytes) -> Errand | None:
    """None: it cannot be read."""
    if len(note) < _FIXED.size:
        return None
    accepted_at, limit_ms, record_ms, port, body_limit, flags, size = _FIXED.unpack_from(note)
    ids, rest = note[_FIXED.size :][:size], note[_FIXED.size + size :]
    try:
        attempt_id, replica_id, container_id = ids.decode().split("\0")
        start = node_pb2.Start(
            attempt_id=attempt_id,
            replica_id=replica_id,
            port=port,
            run_time_limit_ms=limit_ms,
            record_after_ms=record_ms,
            response_body_limit_bytes=body_limit,
            streamed=bool(flags & _STREAMED),
        )
        job = node_pb2.Start.FromString(rest) if flags & _JOB else None
    except (ValueError, DecodeError):
        return None
    return Errand(start, container_id, accepted_at, bool(flags & _HEAD), bool(flags & _GPUS), job)


class Counts(NamedTuple):
    """What the kernel has counted on a connection, whoever had it.

    `sent`: bytes it took from us, and one for the connection's own beginning. `received`: bytes that were read from it.
    """

    sent: int
    received: int


def counts(sock: socket.socket) -> Counts | None:
    """None: this kernel does not say."""
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
        if len(info) < _TCP_INFO.size:
            return None
        state, acknowledged, received = _TCP_INFO.unpack(info)
        unread = _INT.unpack(fcntl.ioctl(sock, termios.FIONREAD, bytes(_INT.size)))[0]
        queued = _INT.unpack(fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(_INT.size)))[0]
    except OSError:
        return None
    # The other side's end of stream is counted like a byte, but not among the unread ones.
    end = 1 if state == _CLOSE_WAIT else 0
    return Counts(acknowledged + queued, received - unread - end)
