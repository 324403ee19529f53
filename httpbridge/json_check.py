"""Is text that comes in pieces JSON? Seen without ever holding it whole, and not byte by byte.

Each stretch of text is made a document of its own: before it what would open the containers that it lies in, after it
what would close those that it leaves open. Whether that is JSON a parser in C says, and regular expressions find where
to cut: behind a comma or bracket that is in no string, or within a long string.
"""

import enum
import re
from typing import Final

import msgspec

#: What is kept for the next piece at most: a number or a key longer than that is taken for no JSON.
KEPT_BYTES: Final = 256 * 1024

_VALID: Final = msgspec.json.Decoder(msgspec.Raw)
#: As far as no string is left open.
_CLOSED: Final = re.compile(rb'(?:[^"]++|"[^"\\]*+(?:\\.[^"\\]*+)*+")*+', re.DOTALL)
#: The inside of a string, up to its end or an escape that is not all there; halves of a pair stay together.
_INSIDE: Final = re.compile(
    rb'[^"\\]*+(?:\\(?:[^u]|u(?![dD][89a-bA-B])[0-9a-fA-F]{4}|u[dD][89a-bA-B][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})'
    rb'[^"\\]*+)*+',
    re.DOTALL,
)
#: Whatever is longer is not the beginning of an escape.
ESCAPE_BYTES: Final = len(rb"\ud83d\ude00")
_STRING: Final = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_SPACE: Final = b" \t\r\n"
_NO_BRACKETS: Final = bytes(set(range(256)) - set(b"[]{}"))
_CLOSER: Final = {ord("["): b"]", ord("{"): b"}"}
_MEMBER: Final = {ord("["): b"0", ord("{"): b'"":0'}


class _At(enum.Enum):
    """Behind what the last stretch ended."""

    BEGIN = enum.auto()
    OPENED = enum.auto()
    VALUE = enum.auto()
    COMMA = enum.auto()
    #: Within a string that is a value.
    STRING = enum.auto()


class JsonCheck:
    """Takes pieces; `end` says whether all of them together are JSON. Their UTF-8 is not looked at."""

    def __init__(self) -> None:
        self._possible = True
        # Open brackets, outermost first.
        self._stack = b""
        self._at = _At.BEGIN
        self._kept = b""

    def feed(self, piece: bytes) -> None:
        """The next piece."""
        if not self._possible:
            return
        text = self._kept + piece
        while text and self._possible:
            before = len(text)
            text = self._string(text) if self._at is _At.STRING else self._outside(text)
            if len(text) == before:
                break
        self._kept = text
        if len(text) > KEPT_BYTES:
            self._possible = False

    def end(self) -> bool:
        """There is no more."""
        return self._possible and self._at is not _At.STRING and _is_valid(self._before() + self._kept)

    def _string(self, text: bytes) -> bytes:
        """Take what belongs to the string that we are in; gives the rest."""
        end = end_of_string(text)
        self._possible = _is_valid(b'"%b"' % text[:end])
        if text[end : end + 1] == b'"':
            self._at = _At.VALUE
            return text[end + 1 :]
        if len(text) - end > ESCAPE_BYTES:
            # Not an escape that is still to come.
            self._possible = False
        return text[end:]

    def _outside(self, text: bytes) -> bytes:
        """Take as much as can be judged of text that begins in no string; gives the rest."""
        if self._at is _At.VALUE and not self._stack:
            # Behind the whole document.
            self._possible = not text.strip(_SPACE)
            return b""
        match = _CLOSED.match(text)
        assert match is not None
        end = match.end()
        closed = text[:end]
        if end < len(text) and self._is_value_next(closed):
            self._take(closed, _At.STRING, b'""')
            return text[end + 1 :]
        # What lies behind the last quote is in no string.
        cut = max(closed.rfind(mark, closed.rfind(b'"') + 1) for mark in (b",", b"[", b"{", b"]", b"}")) + 1
        if cut:
            last = closed[cut - 1]
            at = _At.COMMA if last == ord(",") else _At.OPENED if last in _CLOSER else _At.VALUE
            self._take(closed[:cut], at, b"")
        return text[cut:]

    def _is_value_next(self, closed: bytes) -> bool:
        """Whether a string that begins behind it is a value, not a key."""
        said = closed.rstrip(_SPACE)
        if said:
            if said.endswith(b":"):
                return True
            if not said.endswith((b",", b"[")):
                return False
            stack = self._stack_after(closed)
            return stack is not None and stack.endswith(b"[")
        return self._at is _At.BEGIN or (self._at in {_At.OPENED, _At.COMMA} and self._stack.endswith(b"["))

    def _take(self, stretch: bytes, at: _At, value: bytes) -> None:
        """Judge a stretch, `value` put behind it."""
        stack = self._stack_after(stretch)
        if stack is None:
            self._possible = False
            return
        before = self._before()
        self._stack, self._at = stack, at
        after = _MEMBER[stack[-1]] if at is _At.COMMA and stack else b""
        closers = b"".join(_CLOSER[bracket] for bracket in reversed(stack))
        self._possible = _is_valid(before + stretch + value + after + closers)

    def _before(self) -> bytes:
        """What opens the containers that the next stretch lies in, as far as it has come."""
        stack = self._stack
        if not stack:
            return b"0" if self._at is _At.VALUE else b""
        top = stack[-1]
        opened = b"".join(b"[" if bracket == ord("[") else b'{"":' for bracket in stack[:-1]) + bytes([top])
        if self._at is _At.OPENED:
            return opened
        return opened + _MEMBER[top] + (b"," if self._at is _At.COMMA else b"")

    def _stack_after(self, stretch: bytes) -> bytes | None:
        """The open brackets behind a stretch that leaves no string open; None: they do not match."""
        brackets = _STRING.sub(b"", stretch).translate(None, _NO_BRACKETS)
        size = -1
        while len(brackets) != size:
            size = len(brackets)
            brackets = brackets.replace(b"{}", b"").replace(b"[]", b"")
        closed = len(brackets) - len(brackets.lstrip(b"]}"))
        opened = brackets[closed:]
        if closed > len(self._stack) or b"]" in opened or b"}" in opened:
            return None
        return self._stack[: len(self._stack) - closed] + opened


def end_of_string(text: bytes) -> int:
    """How much of `text`, which begins inside a string, is its inside; as far as it can be told.

    Behind it: the quote, the end of `text`, or less than ESCAPE_BYTES that may become an escape; else it is no JSON.
    """
    if b"\\" not in text:
        end = text.find(b'"')
        return end if end >= 0 else len(text)
    match = _INSIDE.match(text)
    assert match is not None
    return match.end()


def _is_valid(document: bytes) -> bool:
    try:
        _VALID.decode(document)
    except (msgspec.DecodeError, RecursionError):
        return False
    return True
