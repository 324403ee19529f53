"""The documented envelope, both ways: out of a caller's body the container's, into ours the container's answer.

`data` is never parsed into Python objects: a string travels byte for byte, other JSON as it was written less the
white space (numbers keep their spelling), and what is not JSON is not touched at all.
"""

import codecs
import re
from base64 import b64encode
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Final, NamedTuple

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType, field
from ngpu.v1 import task_pb2 as pb

from httpbridge import credentials
from httpbridge.errors import BadRequest

JSON: Final = "application/json"
TEXT: Final = "text/plain; charset=utf-8"
BASE64: Final = "base64"

#: Media types under which clients of the original send JSON: some say so, `curl -d` says it is a form.
_MAY_BE_JSON: Final = frozenset({"", "application/x-www-form-urlencoded", "text/plain", "application/octet-stream"})


#: Whatever begins otherwise is no JSON.
_JSON_BEGINS: Final = frozenset(b' \t\r\n{["-0123456789tfn')
_OBJECT: Final = re.compile(rb"[ \t\r\n]*\{")


class Payload(NamedTuple):
    """What the container gets."""

    body: bytes | bytearray
    #: "" for none.
    content_type: str
    btc_address: str

    def put_into(self, request: pb.ScheduleRequest) -> None:
        """Complete a request that has all but these."""
        _describe(request, self.content_type, self.btc_address)
        body = request.request.body
        body.inline = bytes(self.body)
        body.size = len(self.body)


class Stored(NamedTuple):
    """The same where the body is large: it lies with the control plane."""

    upload_id: str
    size: int
    content_type: str
    btc_address: str

    def put_into(self, request: pb.ScheduleRequest) -> None:
        """Complete a request that has all but these."""
        _describe(request, self.content_type, self.btc_address)
        body = request.request.body
        body.upload_id = self.upload_id
        body.size = self.size


def _describe(request: pb.ScheduleRequest, content_type: str, btc_address: str) -> None:
    if btc_address:
        request.btc_address = btc_address
    if content_type:
        request.request.headers.add(name="Content-Type", value=content_type.encode("utf-8", "surrogateescape"))


class _Envelope(Struct):
    data: Raw | UnsetType = UNSET
    btc_address: Raw | UnsetType = UNSET


_ENVELOPE: Final = msgspec.json.Decoder(_Envelope)
_MEMBERS: Final = msgspec.json.Decoder(dict[str, Raw])
_ANY: Final = msgspec.json.Decoder(Raw)
_STRING: Final = msgspec.json.Decoder(str)
_ADDRESS: Final = msgspec.json.Decoder(str | None)
encode: Final = msgspec.json.Encoder().encode


def open_(body: bytes | bytearray, content_type: str, content_encoding: str = "") -> Payload:
    """The container's body out of a caller's. Raises BadRequest.

    * A JSON object with `data`: the envelope. A string is the body as it stands (`application/json` if it is JSON
      itself, as frameworks like FastAPI insist on that, else `text/plain`; no type if empty); other JSON is serialised
      compactly.
    * A JSON object without `data`: itself the body, less `btc_address`.
    * Anything else: the body as it stands, under the type it came with.

    Whether it is JSON is seen by the type and, where that says little, by the body.
    """
    says_json = said_to_be_json(body, content_type, content_encoding)
    if says_json is None:
        return Payload(body, content_type, "")
    try:
        return _open_json(body, content_type if says_json else JSON)
    except msgspec.ValidationError:  # an array or a bare value
        return Payload(body, content_type, "")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        if says_json:
            raise BadRequest(f"The body is not valid JSON: {where(error)}") from None
        return Payload(body, content_type, "")


def said_to_be_json(body: bytes | bytearray, content_type: str, content_encoding: str) -> bool | None:
    """Whether a body, of which this is the beginning, says that it is JSON; None: it is no envelope, whatever it is."""
    media_type = content_type.partition(";")[0].strip().lower()
    says_json = media_type == JSON or media_type.endswith("+json")
    if (
        not body
        or content_encoding.lower() not in ("", "identity")
        or not (says_json or (media_type in _MAY_BE_JSON and _OBJECT.match(body)))
    ):
        return None
    return says_json


def address_beside(body: bytes, data: bytes) -> str | None:
    """The address in an envelope; None if its `data` is, as JSON, another than that. Raises BadRequest."""
    try:
        envelope = _ENVELOPE.decode(body)
    except (msgspec.DecodeError, RecursionError) as error:
        raise BadRequest(f"The body is not valid JSON: {where(error)}") from None
    if envelope.data is UNSET or bytes(envelope.data) != data:
        return None
    return "" if envelope.btc_address is UNSET else _address(envelope.btc_address)


def _open_json(body: bytes | bytearray, content_type: str) -> Payload:
    envelope = _ENVELOPE.decode(body)
    address = "" if envelope.btc_address is UNSET else _address(envelope.btc_address)
    data = envelope.data
    if data is UNSET:
        _must_be_utf8(body)
        if envelope.btc_address is not UNSET:
            members = _MEMBERS.decode(body)
            del members["btc_address"]
            body = encode(members)
        return Payload(body, content_type, address)
    if bytes(memoryview(data)[:1]) == b'"':
        inner = _STRING.decode(data).encode()
        return Payload(inner, _type_of(inner), address)
    inner = msgspec.json.format(bytes(data), indent=-1)
    _must_be_utf8(inner)
    return Payload(inner, JSON, address)


def _must_be_utf8(body: bytes | bytearray) -> None:
    """Values that are copied unseen must be UTF-8 all the same. Raises UnicodeDecodeError."""
    if not body.isascii():
        body.decode()


def _address(raw: Raw) -> str:
    if bytes(raw) == b'""':
        return ""
    try:
        value = _ADDRESS.decode(raw)
    except msgspec.ValidationError:
        raise BadRequest("btc_address is a string") from None
    return credentials.btc_address(value or "")


def _type_of(body: bytes) -> str:
    if not body:
        return ""
    if body[0] not in _JSON_BEGINS:
        return TEXT
    try:
        _ANY.decode(body)
    except (msgspec.DecodeError, RecursionError):
        return TEXT
    return JSON


def where(error: Exception) -> str:
    """What is wrong with JSON, in words."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8"
    return str(error).removeprefix("JSON is malformed: ")


def text(body: bytes) -> tuple[str, str | UnsetType]:
    """A container's body as `(data, data_encoding)`: itself where it is UTF-8, else base64."""
    try:
        return body.decode(), UNSET
    except UnicodeDecodeError:
        return b64encode(body).decode(), BASE64


async def stream_string(chunks: AsyncGenerator[bytes, None], *, is_utf8: bool) -> AsyncGenerator[bytes, None]:
    """The inside of the JSON string (without its quotes) that holds a body, piece by piece as the body comes."""
    async with aclosing(chunks):
        if is_utf8:
            # The node saw that it is UTF-8; should it not be, U+FFFD serves a reader better than half an answer.
            decoder = codecs.getincrementaldecoder("utf-8")("replace")
            async for chunk in chunks:
                yield encode(decoder.decode(chunk))[1:-1]
            yield encode(decoder.decode(b"", final=True))[1:-1]
        else:
            left = b""
            async for chunk in chunks:
                left += chunk
                whole = len(left) - len(left) % 3
                yield b64encode(left[:whole])
                left = left[whole:]
            yield b64encode(left)


class Said(Struct):
    """Every answer without more to say, errors among them."""

    result_code: int
    msg: str


class Answered(Struct):
    """A synchronous call's answer."""

    result_code: int
    msg: str
    data: str
    data_encoding: str | UnsetType = UNSET
    task_id: str = field(name="taskID", default="")


class Accepted(Struct):
    """A task's acceptance, with the three spellings of its id that clients read."""

    result_code: int
    msg: str
    task_id: str = field(name="taskID")
    task_id_camel: str = field(name="taskId")
    task_id_snake: str = field(name="task_id")


class Queried(Struct):
    """A task, asked after."""

    result_code: int
    msg: str
    task_id: str = field(name="taskID")
    data: str
    data_encoding: str | UnsetType
    result_size: int
    seconds: int = field(name="task_dursion")
    #: While it is queued.
    queue_position: int | UnsetType = field(name="queuePosition", default=UNSET)
    waiting_for: str | UnsetType = field(name="waitingFor", default=UNSET)
    expected_wait_s: float | UnsetType = field(name="expectedWait", default=UNSET)


class Cancelled(Struct):
    """A task, cancelled or asked to be."""

    result_code: int
    msg: str
    task_id: str = field(name="taskID")
    state: int


class Detailed(Struct, kw_only=True):
    """`getDetailed`, `getTask`: all that is recorded, under the original's keys and in their order."""

    id: int
    userkey: str
    btcaddress: str
    workspaceid: str
    taskid: str
    requrl: str
    method: str
    userip: str
    nodeip: str
    nodeaddr: str
    requesttime: str
    responsetime: str
    request: str
    state: int
    response: str
    record_dursion: int = field(name="recordDursion")
    videodursion: int = 0
    gpudursion: int
    watermarktime: str = ""
    watermarkres: str = ""
    ext: dict[str, object]
