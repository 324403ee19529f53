"""What the container gets of a body, and how its answer is put into JSON."""

import base64
import itertools
import json
from collections.abc import AsyncGenerator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET

from httpbridge import envelope
from httpbridge.envelope import JSON, TEXT
from httpbridge.errors import BadRequest


@pytest.mark.parametrize(
    ("body", "inner", "content_type"),
    [
        (b'{"btc_address": "", "data": ""}', b"", ""),
        (b'{"data": "{\\"prompt\\": \\"cat\\"}"}', b'{"prompt": "cat"}', JSON),
        (b'{"data": "  [1, 2]  "}', b"  [1, 2]  ", JSON),
        (b'{"data": "manicured claws"}', b"manicured claws", TEXT),
        (b'{"data": "{not json"}', b"{not json", TEXT),
        (b'{"data": "\\u732b \\ud83d\\ude00"}', "猫 😀".encode(), TEXT),
        (b'{"data": {"b": 1, "a": [1.50, 123456789012345678]}}', b'{"b":1,"a":[1.50,123456789012345678]}', JSON),
        (b'{"data": 12345678901234567890123}', b"12345678901234567890123", JSON),
        (b'{"data": [ "a b" , null ]}', b'["a b",null]', JSON),
        (b'{"data": null}', b"null", JSON),
        (b'{"data": 1e5}', b"1e5", JSON),
        (b' {"data": 1, "more": 2} ', b"1", JSON),
        (b'{"prompt": "a  b"}', b'{"prompt": "a  b"}', JSON),
        (b'{"prompt": "a  b", "btc_address": null, "n": 1.0}', b'{"prompt":"a  b","n":1.0}', JSON),
        (b"{}", b"{}", JSON),
    ],
)  # fmt: skip
@pytest.mark.parametrize("sent_as", ["application/json", "application/x-www-form-urlencoded", "", "text/plain; a=b"])
def test_the_envelope_is_opened_whatever_it_is_sent_as(
    body: bytes, inner: bytes, content_type: str, sent_as: str
) -> None:
    payload = envelope.open_(body, sent_as)
    assert payload.body == inner
    assert payload.content_type == (sent_as if sent_as == JSON and content_type == JSON else content_type)
    assert payload.btc_address == ""


def test_the_address_is_taken_out() -> None:
    assert envelope.open_(b'{"btc_address":"bc1x","data":"a"}', JSON) == (b"a", TEXT, "bc1x")
    assert envelope.open_(b'{"btc_address":"bc1x","prompt":"a"}', JSON) == (b'{"prompt":"a"}', JSON, "bc1x")


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b"\x89PNG\r\n\x1a\n\x00", "image/png"),
        (b'{"data": "not ours"}', "image/png"),
        (b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n--x--\r\n', "multipart/form-data; boundary=x"),
        (b"a=1&b=2", "application/x-www-form-urlencoded"),
        (b"{almost json", "text/plain"),
        (b"[1, 2]", "application/json"),
        (b'"data"', "application/json"),
        (b"", "application/json"),
        (b"", ""),
        (b"\xff\xfe", ""),
    ],
)
def test_what_is_no_json_object_travels_byte_for_byte(body: bytes, content_type: str) -> None:
    assert envelope.open_(body, content_type) == (body, content_type, "")


def test_a_compressed_body_travels_as_it_is() -> None:
    assert envelope.open_(b'{"data":"x"}', JSON, "gzip") == (b'{"data":"x"}', JSON, "")
    assert envelope.open_(b'{"data":"x"}', JSON, "Identity") == (b"x", TEXT, "")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"data": ', "not valid JSON"),
        (b'{"data": "a"} trailing', "trailing"),
        (b'{"data": "\\ud800"}', "not valid JSON"),
        (b'{"data": "\xff"}', "not UTF-8"),
        (b'{"data": {"a": "\xff"}}', "not UTF-8"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b'{"data": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b"\xef\xbb\xbf{}", "not valid JSON"),
        (b'{"btc_address": 5, "data": ""}', "btc_address is a string"),
        (b'{"btc_address": ["a"]}', "btc_address is a string"),
        (b'{"btc_address": "a b", "data": ""}', "malformed"),
        (b'{"btc_address": "\\u0000", "data": ""}', "malformed"),
    ],
)
def test_what_says_it_is_json_must_be(body: bytes, words: str) -> None:
    with pytest.raises(BadRequest, match=words):
        envelope.open_(body, JSON)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(json_values)
def test_any_json_means_the_same_after_it(value: object) -> None:
    body = json.dumps({"data": value}).encode()
    inner = envelope.open_(body, JSON).body
    assert inner.decode() == value if isinstance(value, str) else json.loads(inner) == value


@given(st.binary(), st.sampled_from(["", JSON, "text/plain", "image/png", "application/x-www-form-urlencoded"]))
def test_any_bytes_are_taken_or_refused(body: bytes, content_type: str) -> None:
    try:
        envelope.open_(body, content_type)
    except BadRequest:
        assert content_type == JSON


async def in_pieces(pieces: Sequence[bytes]) -> AsyncGenerator[bytes, None]:
    for piece in pieces:
        yield piece


@given(st.text(), st.lists(st.integers(0, 40), max_size=6))
async def test_a_streamed_string_is_the_string(text: str, cuts: list[int]) -> None:
    body = text.encode()
    edges = sorted({0, len(body), *(cut % (len(body) + 1) for cut in cuts)})
    pieces = [body[a:b] for a, b in itertools.pairwise(edges)]
    inside = b"".join([piece async for piece in envelope.stream_string(in_pieces(pieces), is_utf8=True)])
    assert json.loads(b'"' + inside + b'"') == text


@given(st.lists(st.binary(max_size=10)))
async def test_a_streamed_string_of_bytes_is_their_base64(pieces: list[bytes]) -> None:
    inside = b"".join([piece async for piece in envelope.stream_string(in_pieces(pieces), is_utf8=False)])
    assert inside.decode() == base64.b64encode(b"".join(pieces)).decode()


def test_a_body_that_is_no_text_is_base64() -> None:
    assert envelope.text("猫".encode()) == ("猫", UNSET)
    assert envelope.text(b"\xff\x00") == ("/wA=", "base64")
