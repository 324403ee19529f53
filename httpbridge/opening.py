"""Opening a large envelope as it comes, its `data` never held whole.

That is for the documented form: an object whose `data` is a string, with nothing but plain members before it. The
inside of that string goes on, unescaped, piece by piece; what is before and behind it is kept, and read with a mark in
the string's place by what reads small envelopes too: so the rules are the same. What has no envelope goes on as it is.
All else, like an object in place of the string, must be held whole.
"""

import re
import secrets
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Final

import msgspec
from ngpu import wire

from httpbridge import envelope
from httpbridge.bodies import Hold
from httpbridge.envelope import JSON, TEXT, Payload
from httpbridge.errors import BadRequest
from httpbridge.json_check import ESCAPE_BYTES, JsonCheck, end_of_string

#: A body of this size or less is held whole: that costs less.
WHOLE_BYTES: Final = 1024 * 1024
#: In so many bytes the string must have begun.
HEAD_BYTES: Final = 16 * 1024
#: What may be kept of the rest.
TAIL_BYTES: Final = 1024 * 1024

#: What the envelope's rules do not touch, either.
_ARRAY: Final = re.compile(rb"[ \t\r\n]*\[")
#: Up to the first byte of the string.
_HEAD: Final = re.compile(
    rb"[ \t\r\n]*+\{[ \t\r\n]*+"
    rb'(?:"(?!data")[^"\\]*+"[ \t\r\n]*+:[ \t\r\n]*+(?:"[^"\\]*+"|[-+.0-9A-Za-z]++)[ \t\r\n]*+,[ \t\r\n]*+)*+'
    rb'"data"[ \t\r\n]*+:[ \t\r\n]*+"'
)
#: A character whose end is still to come.
_CUT: Final = re.compile(rb"(?:[\xc0-\xff]|[\xe0-\xff][\x80-\xbf]|[\xf0-\xff][\x80-\xbf]{2})\Z")
_STRING: Final = msgspec.json.Decoder(str)


class Superseded(Exception):
    """`data` came again, and the last one counts: `payload`, and not what has gone on."""

    def __init__(self, payload: Payload) -> None:
        super().__init__()
        self.payload = payload


class Opening:
    """One body. `begin`, and if that says so, `pieces`; after them `content_type` and `btc_address` are there."""

    def __init__(self, body: AsyncIterator[bytes], content_type: str, content_encoding: str) -> None:
        self._body = body
        self._sent_as = content_type
        self._encoding = content_encoding
        # Where the string begins in what was read first; 0: there is no envelope.
        self._string_at = 0
        #: What `begin` has read.
        self.begun = b""
        self.content_type = content_type
        self.btc_address = ""

    async def begin(self, hold: Hold, enough_bytes: int) -> bool:
        """Read so much of it, and count it. False: it must be held whole, or is no larger. Raises Unavailable."""
        while len(self.begun) <= enough_bytes:
            piece = await anext(self._body, b"")
            if not piece:
                return False
            self.begun += piece
            if len(self.begun) > wire.INLINE_BYTES:
                hold.grow_to(len(self.begun))
        if self.begun.isspace():
            return False
        if envelope.said_to_be_json(self.begun, self._sent_as, self._encoding) is None or _ARRAY.match(self.begun):
            return True
        if head := _HEAD.match(self.begun, 0, HEAD_BYTES):
            self._string_at = head.end()
        return head is not None

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """The container's body. Raises BadRequest, Superseded: what has gone on must be taken back."""
        if self._string_at:
            async for piece in self._opened():
                yield piece
        else:
            yield self.begun
            async for piece in self._body:
                yield piece

    async def _opened(self) -> AsyncGenerator[bytes, None]:
        head, text = self.begun[: self._string_at], self.begun[self._string_at :]
        self.begun = b""
        check, size = JsonCheck(), 0
        while True:
            end, closed = _inside(text)
            if inside := _unescaped(text[:end]):
                check.feed(inside)
                size += len(inside)
                yield inside
            if closed:
                break
            piece = await anext(self._body, b"")
            if not piece:
                raise BadRequest("The body is not valid JSON: it ends within a string")
            text = text[end:] + piece
        tail = text[end:]
        async for piece in self._body:
            tail += piece
            if len(tail) > TAIL_BYTES:
                raise BadRequest(f"Of a body this large no more than {TAIL_BYTES} bytes may follow `data`")
        # No string of a caller's is the same.
        mark = secrets.token_hex().encode()
        rest = head + mark + tail
        address = envelope.address_beside(rest, b'"%b"' % mark)
        if address is None:
            raise Superseded(envelope.open_(rest, JSON))
        self.btc_address = address
        self.content_type = "" if not size else JSON if check.end() else TEXT


def _inside(text: bytes) -> tuple[int, bool]:
    """How much of the string's inside can be taken now, and whether its end has come. Raises BadRequest."""
    end = end_of_string(text)
    if text[end : end + 1] == b'"':
        return end, True
    if len(text) - end >= ESCAPE_BYTES:
        raise BadRequest("The body is not valid JSON: an escape in a string is none")
    cut = _CUT.search(text, max(0, end - 3), end)
    return cut.start() if cut else end, False


def _unescaped(text: bytes) -> bytes:
    try:
        inside = _STRING.decode(b'"%b"' % text)
        # Without an escape it is what it was, and need not be copied once more.
        return inside.encode() if b"\\" in text else text
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"The body is not valid JSON: {envelope.where(error)}") from None
