"""A parcel on the wire is the message that protobuf makes of it, and the other way round."""

from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from ngpu import parcels
from ngpu.parcels import FIELDS, SMALL_BYTES, Parcel
from ngpu.v1 import node_pb2, task_pb2

LARGE = bytes(range(256)) * 20


def varint(value: int) -> bytes:
    written = b""
    while value > 0x7F:
        written += bytes([value & 0x7F | 0x80])
        value >>= 7
    return written + bytes([value])


kinds = pytest.mark.parametrize("kind", sorted(parcels.CARRIERS, key=str))
pieces = st.one_of(st.binary(max_size=300), st.binary(min_size=SMALL_BYTES, max_size=SMALL_BYTES * 5))
#: What follows a field's number: anything that fits its wire type.
values = {
    0: st.integers(0, 2**64 - 1).map(varint),
    1: st.binary(min_size=8, max_size=8),
    2: st.binary(max_size=200).map(lambda data: varint(len(data)) + data),
    5: st.binary(min_size=4, max_size=4),
}
#: Fields that no message has.
strangers = st.sampled_from(sorted(values)).flatmap(
    lambda kind: st.tuples(st.integers(100, 2**20), values[kind]).map(lambda one: varint(one[0] << 3 | kind) + one[1])
)


def of_protobuf(kind: type[Any], raw: bytes) -> Parcel[Any]:
    message = kind.FromString(raw)
    data = message.data
    message.ClearField("data")
    return Parcel(message, data)


@kinds
@given(data=pieces)
def test_what_is_written_is_what_protobuf_reads(kind: type[Any], data: bytes) -> None:
    message = kind()
    if "offset" in kind.DESCRIPTOR.fields_by_name:
        message.offset = len(data)
    raw = parcels.writer(kind)(Parcel(message, data))
    message.data = data
    assert kind.FromString(raw) == message


@kinds
@given(data=pieces, more=st.lists(strangers, max_size=4), at=st.integers(0, 4))
def test_what_protobuf_reads_is_read(kind: type[Any], data: bytes, more: list[bytes], at: int) -> None:
    raw = b"".join([*more[:at], kind(data=data).SerializeToString(), *more[at:]])
    assert parcels.reader(kind)(raw) == of_protobuf(kind, raw)


@kinds
@given(raw=st.binary(max_size=100), tail=st.integers(0, 3))
def test_what_protobuf_does_not_read_is_not_read(kind: type[Any], raw: bytes, tail: int) -> None:
    whole = raw + kind(data=LARGE).SerializeToString()
    whole = whole[: len(whole) - tail]
    try:
        expected = of_protobuf(kind, whole)
    except DecodeError:
        with pytest.raises(DecodeError):
            parcels.reader(kind)(whole)
    else:
        assert parcels.reader(kind)(whole) == expected


def test_of_data_that_comes_twice_the_last_counts() -> None:
    first, last = (task_pb2.UploadRequest(data=data).SerializeToString() for data in (LARGE, b"last"))
    assert parcels.reader(task_pb2.UploadRequest)(first + last).data == b"last"


def test_behind_many_fields_it_is_found_all_the_same() -> None:
    many = b"\xa0\x06\x01" * FIELDS
    raw = many + node_pb2.FetchResponse(data=LARGE).SerializeToString()
    assert parcels.reader(node_pb2.FetchResponse)(raw).data == LARGE


def test_the_other_fields_are_read() -> None:
    sent = task_pb2.UploadRequest(upload_id="u", data=LARGE, last=True, size=2**40)
    message, data = parcels.reader(task_pb2.UploadRequest)(sent.SerializeToString())
    assert (message.upload_id, message.last, message.size, message.data, data) == ("u", True, 2**40, b"", LARGE)
