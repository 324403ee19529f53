"""Messages with a piece of a body, written and read without protobuf's copies of it.

On the wire they are what protobuf makes of them, with the piece as the field `data`. But protobuf copies those bytes
three times on their way out and twice on their way in; here it is once each.
"""

from collections.abc import Callable
from typing import Any, Final, Generic, NamedTuple, TypeVar

from google.protobuf.message import Message

from ngpu.v1 import node_pb2, task_pb2

M = TypeVar("M", task_pb2.UploadRequest, task_pb2.WatchResponse, node_pb2.FetchResponse, node_pb2.DeliverRequest)

#: Whoever serves or calls a method with one of these has a Parcel in its place.
CARRIERS: Final[frozenset[type[Any]]] = frozenset(M.__constraints__)
#: A message up to this is left to protobuf; so is one with more fields before its `data`.
SMALL_BYTES: Final = 4096
FIELDS: Final = 16

_VARINT, _FIXED64, _SIZED, _FIXED32 = 0, 1, 2, 5
_VARINT_BYTES: Final = 10


class Parcel(NamedTuple, Generic[M]):
    """A message, its own `data` empty, and what is to be there."""

    message: M
    data: bytes = b""


def writer(kind: type[M]) -> Callable[[Parcel[M]], bytes]:
    """What writes parcels with messages of that kind."""
    tag = _varint(_number(kind) << 3 | _SIZED)

    def write(parcel: Parcel[M]) -> bytes:
        rest, data = parcel.message.SerializeToString(), parcel.data
        return b"".join((rest, tag, _varint(len(data)), data)) if data else rest

    return write


def reader(kind: type[M]) -> Callable[[bytes], Parcel[M]]:
    """What reads them. Raises DecodeError."""
    number = _number(kind)

    def read(raw: bytes) -> Parcel[M]:
        found = _find(raw, number) if len(raw) > SMALL_BYTES else None
        if found is not None:
            at, begin, end = found
            message = kind.FromString(raw[:at] + raw[end:])
            # Should it come again, the last one counts.
            if not message.data:
                return Parcel(message, raw[begin:end])
        message = kind.FromString(raw)
        data = message.data
        message.ClearField("data")
        return Parcel(message, data)

    return read


def _number(kind: type[Message]) -> int:
    return kind.DESCRIPTOR.fields_by_name["data"].number


def _find(raw: bytes, number: int) -> tuple[int, int, int] | None:
    """Where that field begins, its bytes begin, and they end; None: not among the first, or nothing that we read."""
    at = 0
    try:
        for _ in range(FIELDS):
            key, value_at = _read_varint(raw, at)
            kind = key & 7
            if kind == _SIZED:
                size, begin = _read_varint(raw, value_at)
                end = begin + size
                if key >> 3 == number:
                    return (at, begin, end) if end <= len(raw) else None
            elif kind == _VARINT:
                _, end = _read_varint(raw, value_at)
            elif kind == _FIXED64:
                end = value_at + 8
            elif kind == _FIXED32:
                end = value_at + 4
            else:
                return None
            at = end
    except IndexError:
        pass
    return None


def _varint(value: int) -> bytes:
    written = bytearray()
    while value > 0x7F:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    written.append(value)
    return bytes(written)


def _read_varint(raw: bytes, at: int) -> tuple[int, int]:
    """The number, and what follows it at. Raises IndexError: there is none."""
    value = 0
    for number in range(_VARINT_BYTES):
        byte = raw[at + number]
        value |= (byte & 0x7F) << (7 * number)
        if byte < 0x80:
            return value, at + number + 1
    raise IndexError
