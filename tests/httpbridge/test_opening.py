"""A large envelope, opened as it comes, gives what the whole of it gives, however it is cut."""

import itertools
import json
from collections.abc import AsyncGenerator, Sequence

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from httpbridge import envelope
from httpbridge.bodies import Budget
from httpbridge.envelope import JSON, Payload
from httpbridge.errors import BadRequest
from httpbridge.json_check import KEPT_BYTES, JsonCheck
from httpbridge.opening import TAIL_BYTES, Opening, Superseded

ADDRESS = "bc1qar0srrr7xfkvy5l643lydnw9re59gtzzwf5mdq"


class Body:
    """A body that comes in pieces, and knows how many of its bytes it has given."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self._pieces = pieces
        self.given = 0

    async def __aiter__(self) -> AsyncGenerator[bytes, None]:
        for piece in self._pieces:
            if piece:
                self.given += len(piece)
                yield piece


def cut(body: bytes, cuts: Sequence[int]) -> list[bytes]:
    edges = sorted({0, len(body), *(cut % (len(body) + 1) for cut in cuts)})
    return [body[a:b] for a, b in itertools.pairwise(edges)]


async def opened(pieces: Sequence[bytes], sent_as: str = JSON, *, enough: int = 1) -> tuple[Payload, bool]:
    """What the container gets, and whether it went on as it came."""
    body = aiter(Body(pieces))
    opening = Opening(body, sent_as, "")
    with Budget(2**30).hold() as hold:
        if not await opening.begin(hold, enough):
            whole = opening.begun + b"".join([piece async for piece in body])
            return envelope.open_(whole, sent_as), False
    try:
        inner = b"".join([piece async for piece in opening.pieces()])
    except Superseded as other:
        return other.payload, True
    return Payload(inner, opening.content_type, opening.btc_address), True


async def same(body: bytes, cuts: Sequence[int], sent_as: str = JSON, *, enough: int = 1) -> None:
    """Both ways give the same, or refuse it."""
    try:
        expected = envelope.open_(body, sent_as)
    except BadRequest:
        with pytest.raises(BadRequest):
            await opened(cut(body, cuts), sent_as, enough=enough)
        return
    assert (await opened(cut(body, cuts), sent_as, enough=enough))[0] == expected


CUTS = st.lists(st.integers(0, 1000), max_size=20)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)
DATA = st.text() | VALUES.map(json.dumps)
#: So much of one that it is seen for what it is, and a string of it is long enough to be cut.
MEMBERS = st.lists(
    st.tuples(st.just("data"), DATA)
    | st.tuples(st.just("data"), VALUES)
    | st.tuples(st.just("btc_address"), st.sampled_from(["", ADDRESS, "a b", None, 5]))
    | st.tuples(st.text(), VALUES),
    min_size=1,
    max_size=4,
)


def written(members: Sequence[tuple[str, object]], *, ascii_only: bool, spaced: bool) -> bytes:
    """JSON, in which a key may come again."""
    colon, comma = (" : ", " ,\n") if spaced else (":", ",")
    texts = (
        f"{json.dumps(key, ensure_ascii=ascii_only)}{colon}{json.dumps(value, ensure_ascii=ascii_only)}"
        for key, value in members
    )
    return ("{" + comma.join(texts) + "}").encode()


@given(MEMBERS, st.booleans(), st.booleans(), CUTS, st.sampled_from([1, 30, 200]))
@example([("data", 'x\U0001f600\\"\n' * 9), ("data", "y")], True, True, [40, 41, 42, 43, 44, 45, 46, 47, 48], 1)
async def test_however_it_is_cut(
    members: list[tuple[str, object]], ascii_only: bool, spaced: bool, cuts: list[int], enough: int
) -> None:
    await same(written(members, ascii_only=ascii_only, spaced=spaced), cuts, enough=enough)


@given(
    DATA,
    st.integers(0, 10**6),
    st.sampled_from([b"", b"\x00", b'"', b"\\", b"\\u12", b"\\ud800", b"\xff", b"\xe7\x8c", b"}", b",", b'"}', b"x"]),
    st.integers(0, 2),
    CUTS,
)
async def test_what_is_not_json_is_refused_however_it_is_cut(
    data: str, at: int, put_in: bytes, taken_out: int, cuts: list[int]
) -> None:
    body = json.dumps({"btc_address": "", "data": data, "more": [1]}, ensure_ascii=False).encode()
    at %= len(body) + 1
    await same(body[:at] + put_in + body[at + taken_out :], cuts)


@pytest.mark.parametrize("sent_as", [JSON, "application/x-www-form-urlencoded", "", "text/plain; a=b"])
@pytest.mark.parametrize(
    ("body", "as_it_comes"),
    [
        (b'{"data":"abc"}', True),
        (b' { "btc_address" : null , "n" : -1.5e3 , "data" : "{}" } ', True),
        (b'{"data":"","btc_address":"%b","x":{}}' % ADDRESS.encode(), True),
        (b'{"data":{"a": "b"}}', False),
        (b'{"d\\u0061ta":"abc"}', False),
        (b'{"nested":{"data":"x"},"data":"abc"}', False),
        (b'{"prompt":"data"}', False),
    ],
)
async def test_the_documented_form_goes_on_as_it_comes(body: bytes, as_it_comes: bool, sent_as: str) -> None:
    payload, streamed = await opened([body], sent_as)
    assert (payload, streamed) == (envelope.open_(body, sent_as), as_it_comes)


@pytest.mark.parametrize(
    ("body", "sent_as"),
    [(b"\x89PNG\r\n" * 9, "image/png"), (b"[1, 2", JSON), (b"a=1&b=2", "application/x-www-form-urlencoded")],
)
async def test_what_has_no_envelope_goes_on_as_it_is(body: bytes, sent_as: str) -> None:
    assert await opened(cut(body, [3, 7]), sent_as) == (Payload(body, sent_as, ""), True)


async def test_no_more_is_held_than_what_came_last() -> None:
    """Bytes that were given and have not gone on: a piece and the rest of an escape, whatever the size of the body."""
    piece = b'\\ud83d\\ude00 some "text" '.replace(b'"', b'\\"') * 100
    body = Body([b'{"data":"', *[piece] * 1000, b'"}'])
    pieces = aiter(body)
    opening = Opening(pieces, JSON, "")
    with Budget(2**30).hold() as hold:
        assert await opening.begin(hold, 5)
    gone_on = most = 0
    async for inner in opening.pieces():
        gone_on += len(json.dumps(inner.decode())) - 2
        most = max(most, body.given - gone_on)
    assert gone_on == len(piece) * 1000
    assert most < 2 * len(piece)


async def test_what_follows_the_string_has_a_limit() -> None:
    await opened([b'{"data":"x","more":"', b"y" * (TAIL_BYTES - 100), b'"}'])
    with pytest.raises(BadRequest, match="may follow"):
        await opened([b'{"data":"x","more":"', b"y" * TAIL_BYTES, b'"}'])


def is_json(pieces: Sequence[bytes]) -> bool:
    check = JsonCheck()
    for piece in pieces:
        check.feed(piece)
    return check.end()


@given(VALUES, st.booleans(), st.booleans(), CUTS)
def test_json_is_json_however_it_is_cut(value: object, ascii_only: bool, indented: bool, cuts: list[int]) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only, indent=1 if indented else None).encode()
    assert is_json(cut(text, cuts))


@given(
    VALUES,
    st.integers(0, 10**6),
    st.sampled_from(
        [b"", b",", b'"', b"\\", b"[", b"]", b"{", b"}", b":", b" ", b"0", b"x", b"\x01", b"null", b"\\u1"]
    ),
    st.integers(0, 2),
    CUTS,
)
def test_what_is_no_json_is_none_however_it_is_cut(
    value: object, at: int, put_in: bytes, taken_out: int, cuts: list[int]
) -> None:
    text = json.dumps(value).encode()
    at %= len(text) + 1
    text = text[:at] + put_in + text[at + taken_out :]
    try:
        expected = bool(msgspec.json.decode(text, type=msgspec.Raw))
    except msgspec.DecodeError:
        expected = False
    assert is_json(cut(text, cuts)) == expected


def test_a_number_without_end_is_not_kept() -> None:
    assert is_json([b"1" * KEPT_BYTES])
    assert not is_json([b"1" * KEPT_BYTES, b"1"])
    assert is_json([b'"', b"x" * KEPT_BYTES, b"x" * KEPT_BYTES, b'"'])
