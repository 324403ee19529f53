"""What both ends must agree on besides messages: sizes, channel options, metadata keys.

Figures measured on two cores with grpcio 1.85: one gRPC operation costs 60-120 us whatever it carries, so small things
travel in batches; a stream takes 0.65 ms of CPU a MiB at both ends together in chunks of 500 KiB (see `parcels`), and
hardly less in larger ones, with which eight large bodies at once take too much memory.
"""

from collections.abc import Sequence
from typing import Final

#: Largest piece of a body in one message.
CHUNK_BYTES: Final = 500 * 1024
#: A body up to this rides inside Start, Result and Batch; a larger one has a stream of its own.
INLINE_BYTES: Final = 64 * 1024
#: A body up to this rides inside the answer of a unary call.
ANSWER_INLINE_BYTES: Final = 1024 * 1024
#: A batch is sent when the writer is free, with at most this many items ...
BATCH_ITEMS: Final = 256
#: ... and no further item once it has this many bytes.
BATCH_BYTES: Final = 256 * 1024
#: Unanswered calls per Batch stream.
BATCH_OUTSTANDING: Final = 4096
#: What one stream may have sent ahead of its reader. gRPC's own guess grows to many MiB wherever a reader is slower
#: than the wire: eight bodies of 64 MiB at once took 400 MiB of memory with it, and take 130 MiB with this. The price:
#: over a line with 100 ms to and fro one body moves at 10 MB/s at most.
WINDOW_BYTES: Final = 1024 * 1024
#: Largest gRPC message accepted: a batch, its last item up to the inline limit and its head, with room to spare.
MESSAGE_BYTES: Final = 4 * 1024 * 1024

#: Carries `Bearer <token>`.
AUTHORIZATION: Final = "authorization"
#: Trailing metadata: a serialised ngpu.v1.Error.
ERROR: Final = "ngpu-error-bin"
#: Initial metadata of an Upload that was accepted: what to go on with, should the stream break.
UPLOAD_ID: Final = "ngpu-upload-id"
#: Beside it: the most bytes that it may have.
UPLOAD_LIMIT: Final = "ngpu-upload-limit"
#: Carried from edge to node in logs.
REQUEST_ID: Final = "x-request-id"

# Keepalive options come in pairs: a server that does not permit what the client sends answers with GOAWAY. Together
# they are how long a dead line, or another side that stands still, goes unnoticed.
KEEPALIVE_TIME_MS: Final = 8_000
KEEPALIVE_TIMEOUT_MS: Final = 5_000

ChannelOptions = list[tuple[str, int | str]]

_SIZES: Final[ChannelOptions] = [
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    ("grpc.max_send_message_length", MESSAGE_BYTES),
]

_KEEPALIVE: Final[ChannelOptions] = [
    ("grpc.keepalive_time_ms", KEEPALIVE_TIME_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    # Without it a ping has a minute whatever the line above says: noticed after 70 s, measured with grpcio 1.85.
    ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    ("grpc.keepalive_permit_without_calls", 1),
]

_WINDOW: Final[ChannelOptions] = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", WINDOW_BYTES)]

CLIENT_OPTIONS: Final[ChannelOptions] = [
    *_SIZES,
    *_KEEPALIVE,
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    # No service config look-ups in DNS, and no proxy for what is often a loopback address.
    ("grpc.service_config_disable_resolution", 1),
]

#: Bodies go over a socket of their own: two channels to one address share one unless told otherwise.
BULK_CLIENT_OPTIONS: Final[ChannelOptions] = [*CLIENT_OPTIONS, *_WINDOW, ("grpc.use_local_subchannel_pool", 1)]

SERVER_OPTIONS: Final[ChannelOptions] = [
    *_SIZES,
    *_WINDOW,
    *_KEEPALIVE,
    ("grpc.http2.min_recv_ping_interval_without_data_ms", KEEPALIVE_TIME_MS // 2),
    ("grpc.http2.max_ping_strikes", 0),
    # Two control planes on one port would each get half of the calls without knowing.
    ("grpc.so_reuseport", 0),
]


def chunk_at(pieces: Sequence[bytes], offset: int) -> bytes:
    """Of a body in pieces, the chunk that begins at that offset; shorter at its end, empty there and past it."""
    found: list[bytes] = []
    room = CHUNK_BYTES
    for piece in pieces:
        if part := piece[offset : offset + room]:
            found.append(part)
            room -= len(part)
            if not room:
                break
        offset = max(0, offset - len(piece))
    return found[0] if len(found) == 1 else b"".join(found)
