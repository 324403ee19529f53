"""Our own parameters: what is taken, what is refused, and that nothing but a path ever reaches a container."""

import string
from urllib.parse import quote, unquote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from httpbridge import params
from httpbridge.errors import BadRequest

OWN = frozenset({"paramUrl", "paramPort"})


@pytest.mark.parametrize(
    ("given_", "path", "query"),
    [
        ("sdapi/v1/img2img", "/sdapi/v1/img2img", ""),
        ("/sdapi/v1/img2img", "/sdapi/v1/img2img", ""),
        ("create", "/create", ""),
        ("/", "/", ""),
        ("a b/c", "/a%20b/c", ""),
        ("a%20b", "/a%20b", ""),
        ("100%", "/100%25", ""),
        ("图/像", "/%E5%9B%BE/%E5%83%8F", ""),
        ("run?x=1&y=a b", "/run", "x=1&y=a%20b"),
        ("v1/models/llama:predict", "/v1/models/llama:predict", ""),
        ("/llama:predict", "/llama:predict", ""),
        ("a#b", "/a%23b", ""),
        ("x//y", "/x//y", ""),
    ],
)
def test_a_path_becomes_a_request_line(given_: str, path: str, query: str) -> None:
    assert params.container_path(given_) == (path, query)


@pytest.mark.parametrize(
    "value",
    [
        "",
        "http://evil.example/x",
        "HTTPS://evil.example",
        "/http://evil.example",
        "javascript:alert(1)",
        "file:///etc/passwd",
        "//evil.example/x",
        "/%2Fevil.example/x",
        "%2F%2Fevil.example",
        "evil.example:80/x",
        "user@evil.example/x",
        "user%40evil.example",
        "1.2.3.4:80/x",
        "..",
        "../admin",
        "a/../../b",
        "a/..;/b",
        "%2e%2e/admin",
        "%2E%2E%2Fadmin",
        "%252e%252e/admin",
        "%25252e%25252e/admin",
        "%2525252525252e",
        "a\\b",
        "a%5Cb",
        "a%255cb",
        "a\r\nX-Evil: 1",
        "a%0d%0aX-Evil:%201",
        "a%250d%250aX-Evil:1",
        "a\x00b",
        "a%00b",
        "a\x7fb",
        "run?x=\r\n",
        "%ff",
        "%c0%ae%c0%ae/x",
    ],
)
def test_what_is_no_path_is_refused(value: str) -> None:
    with pytest.raises(BadRequest, match="paramUrl"):
        params.container_path(value)


@given(st.text())
@example("%2%65%2e")
@example("%%32%65%%32%65")
def test_whatever_passes_is_a_plain_path_however_often_it_is_decoded(value: str) -> None:
    try:
        path, query = params.container_path(value)
    except BadRequest:
        return
    allowed = set(string.ascii_letters + string.digits + "-._~%:@!$&'()*+,;=/")
    assert path.startswith("/")
    assert set(path) <= allowed
    assert set(query) <= allowed | {"?"}
    for _ in range(6):
        assert not path.startswith("//")
        assert ".." not in path
        assert "\\" not in path
        assert "\r" not in path
        assert "\n" not in path
        path = unquote(path)


@given(st.text(alphabet=string.ascii_letters + string.digits + "-_~ äß漢/", min_size=1))
def test_an_honest_path_arrives(text: str) -> None:
    text = "/" + text.strip("/")
    path, _ = params.container_path(quote(text))
    assert unquote(path) == text


@given(st.lists(st.tuples(st.text(), st.text())), st.text())
def test_what_is_not_ours_travels_byte_for_byte(pairs: list[tuple[str, str]], url: str) -> None:
    theirs = [f"{quote(k)}={quote(v)}" for k, v in pairs if k not in OWN]
    query = "&".join([*theirs, f"paramUrl={quote(url, safe='')}"])
    found, rest = params.split_query(query, OWN)
    assert found == {"paramUrl": url}
    assert rest == "&".join(theirs)


def test_a_parameter_of_ours_given_twice_is_refused() -> None:
    with pytest.raises(BadRequest, match="paramUrl is given more than once"):
        params.split_query("paramUrl=a&param%55rl=b", OWN)
    with pytest.raises(BadRequest, match="UTF-8"):
        params.split_query("paramUrl=%ff", OWN)


def test_ports() -> None:
    assert params.port(None) == 0
    assert params.port("8080") == 8080
    for value in ("", "0", "65536", "-1", "+80", "80x", "8 0", "1e3", "٨٠", "99999999999999999999"):
        with pytest.raises(BadRequest, match="paramPort"):
            params.port(value)


def test_modes() -> None:
    assert params.is_sync(None, default=True)
    assert params.is_sync("sync", default=False)
    assert not params.is_sync("Async", default=True)
    with pytest.raises(BadRequest, match="taskMode"):
        params.is_sync("later", default=True)


@pytest.mark.parametrize("value", ["20230423_11_23_05_10279", "20240415_14_30_09_89104112345678901234"])
def test_documented_task_ids(value: str) -> None:
    assert params.task_id(value) == value


@given(st.text())
@example("")
@example("20240415_14_30_09_")
@example("20240415_14_30_09_1\n")
@example("20240415_14_30_09_٣")
@example("20240415_14_30_09_" + "1" * 33)
def test_whatever_else_is_no_task_id(value: str) -> None:
    if not (value.isascii() and value.replace("_", "").isdigit() and value.count("_") == 4):
        with pytest.raises(BadRequest, match="taskID"):
            params.task_id(value)


def test_waits_are_cut_to_the_limit() -> None:
    assert params.wait_s(None, 300) == 0
    assert params.wait_s("2.5", 300) == 2.5
    assert params.wait_s("999999", 300) == 300
    for value in ("", "-1", "nan", "inf", "1e9", "soon", "1000000"):
        with pytest.raises(BadRequest, match="wait"):
            params.wait_s(value, 300)


def test_limits_cursors_addresses_and_keys() -> None:
    assert params.limit(None) == 0
    assert params.limit("10") == 10
    assert params.cursor(None) == params.cursor("") == ""
    assert params.cursor("abc=") == "abc="
    assert params.node_addr("0xCac10F51814E8e425a6877951fecb7746161c669")
    assert params.idempotency_key(None) == ""
    assert params.idempotency_key("a b") == "a b"
    for check, value in (
        (params.limit, "0"),
        (params.limit, ""),
        (params.limit, "-5"),
        (params.limit, "ten"),
        (params.cursor, "a b"),
        (params.cursor, "x" * 513),
        (params.node_addr, None),
        (params.node_addr, "0x12"),
        (params.idempotency_key, ""),
        (params.idempotency_key, "x" * 256),
        (params.idempotency_key, "ä"),
    ):
        with pytest.raises(BadRequest):
            check(value)
