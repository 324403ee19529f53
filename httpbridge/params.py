"""What is asked: our own query parameters, taken out of the query and judged; what is not ours travels on untouched.

A path for a container is judged as given and after every percent-decoding, because nobody knows how often the container
decodes: it must never become an address, leave its own tree, or end a header line.
"""

import re
from collections.abc import Set
from typing import Final
from urllib.parse import quote, unquote, unquote_plus

from httpbridge.errors import BadRequest

#: Nobody encodes an honest path more often than this.
DECODINGS: Final = 4

#: Nearly every path, and nothing in it to judge.
_PLAIN_PATH: Final = re.compile(r"/?[A-Za-z0-9_\-]+(?:/[A-Za-z0-9_\-]+)*")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")
_SCHEME: Final = re.compile(r"/?[A-Za-z][A-Za-z0-9+.\-]*://|[^/]*[:@]")
_STRAY_PERCENT: Final = re.compile(r"%(?![0-9A-Fa-f]{2})")
_PORT: Final = re.compile(r"[0-9]{1,5}")
_TASK_ID: Final = re.compile(r"[0-9]{8}_[0-9]{2}_[0-9]{2}_[0-9]{2}_[0-9]{1,32}")
_NODE_ADDR: Final = re.compile(r"0x[0-9A-Fa-f]{40}")
_SECONDS: Final = re.compile(r"[0-9]{1,6}(\.[0-9]{1,6})?")
_COUNT: Final = re.compile(r"[0-9]{1,9}")
_CURSOR: Final = re.compile(r"[\x21-\x7e]{1,512}")
#: The rest is judged by the control plane, whose operator says where such may lead.
_CALLBACK: Final = re.compile(r"https?://[\x21-\x7e]+")
_CALLBACK_CHARS: Final = 2048
_KEY: Final = re.compile(r"[\x20-\x7e]{1,255}")
#: The most urgent; the least is -PRIORITY.
PRIORITY: Final = 5
_PRIORITY: Final = re.compile(rf"\+?[0-{PRIORITY}]|-[0-{PRIORITY}]")


def split_query(query: str, own: Set[str]) -> tuple[dict[str, str], str]:
    """Our own parameters, decoded, and the rest of `query` as it stands. Raises BadRequest.

    A parameter of ours given twice is refused: which of two values counts, no two programs agree on.
    """
    if not query:
        return {}, ""
    found: dict[str, str] = {}
    rest: list[str] = []
    for piece in query.split("&"):
        name, _, value = piece.partition("=")
        is_plain = "%" not in piece and "+" not in piece
        if not is_plain:
            name = unquote_plus(name)
        if name not in own:
            rest.append(piece)
        elif name in found:
            raise BadRequest(f"{name} is given more than once")
        elif is_plain:
            found[name] = value
        else:
            try:
                found[name] = unquote_plus(value, errors="strict")
            except UnicodeDecodeError:
                raise BadRequest(f"{name} is not UTF-8") from None
    return found, as_it_may_stand("&".join(rest))


def as_it_may_stand(part: str) -> str:
    """A path or query with what may not stand in a request line escaped, as whoever sent it should have done."""
    return _STRAY_PERCENT.sub("%25", part).replace("#", "%23")


def container_path(value: str, name: str = "paramUrl") -> tuple[str, str]:
    """A path (and query, after a `?`) of the container as `(path, query)`, percent-encoded, the path from its "/" on.

    Raises BadRequest, speaking of `name`.
    """
    if _PLAIN_PATH.fullmatch(value):
        return value if value[0] == "/" else f"/{value}", ""
    if not value:
        raise BadRequest(f"{name} is missing: give the path of the container's API, e.g. sdapi/v1/img2img")
    if _CONTROL.search(value):
        raise BadRequest(f"{name} has a control character in it")
    path, _, query = value.partition("?")
    _judge_path(path, name)
    path = _encoded(path, "/")
    return path if path.startswith("/") else f"/{path}", _encoded(query, "/?")


def _judge_path(path: str, name: str) -> None:
    for _ in range(DECODINGS):
        if _CONTROL.search(path) or "\\" in path:
            raise BadRequest(f"{name} has a control character or backslash in it")
        if ".." in path:
            raise BadRequest(f"{name} has `..` in it")
        if path.startswith("//"):
            raise BadRequest(f"{name} begins with `//`: it is a path, never an address")
        if _SCHEME.match(path):
            raise BadRequest(
                f"{name} looks like an address: it is a path (begin it with `/` if its first part has `:` or `@`)"
            )
        try:
            decoded = unquote(path, errors="strict")
        except UnicodeDecodeError:
            raise BadRequest(f"{name} is not UTF-8 once decoded") from None
        if decoded == path:
            return
        path = decoded
    raise BadRequest(f"{name} is percent-encoded too many times")


def _encoded(text: str, safe: str) -> str:
    """`text` as it may stand in a request line: its own escapes are kept, what may not stand there is escaped."""
    return quote(_STRAY_PERCENT.sub("%25", text), safe=f"{safe}%:@!$&'()*+,;=")


def port(value: str | None, name: str = "paramPort") -> int:
    """A port; 0, the workspace's first, if it is left out. Raises BadRequest, speaking of `name`."""
    if value is None:
        return 0
    if _PORT.fullmatch(value) is None or not 1 <= int(value) <= 65535:
        raise BadRequest(f"{name} is no port: give a number from 1 to 65535, or leave it out for the first one")
    return int(value)


def is_sync(value: str | None, *, default: bool) -> bool:
    """`taskMode`: Async or Sync, in whatever case. Raises BadRequest."""
    if value is None:
        return default
    mode = value.lower()
    if mode not in ("async", "sync"):
        raise BadRequest("taskMode is Async or Sync")
    return mode == "sync"


def task_id(value: str | None) -> str:
    """`taskID`, which is required. Raises BadRequest."""
    if not value:
        raise BadRequest("taskID is missing: give the one that came with the task")
    if _TASK_ID.fullmatch(value) is None:
        raise BadRequest("taskID is malformed: a task id looks like 20240415_14_30_09_89104112345678901234")
    return value


def node_addr(value: str | None) -> str:
    """`nodeAddr`, which is required. Raises BadRequest."""
    if value is None or _NODE_ADDR.fullmatch(value) is None:
        raise BadRequest("nodeAddr is the address of a node: 0x and 40 hexadecimal digits")
    return value


def wait_s(value: str | None, most: float) -> float:
    """`wait`, in seconds, cut to `most`; 0 without it. Raises BadRequest."""
    if value is None:
        return 0.0
    if _SECONDS.fullmatch(value) is None:
        raise BadRequest("wait is a number of seconds, e.g. 30")
    return min(float(value), most)


def limit(value: str | None) -> int:
    """`limit`; 0, all of them, without it. Raises BadRequest."""
    if value is None:
        return 0
    if _COUNT.fullmatch(value) is None or int(value) == 0:
        raise BadRequest("limit is a whole number from 1 on")
    return int(value)


def cursor(value: str | None) -> str:
    """`cursor`, as an earlier answer's `nextCursor` gave it. Raises BadRequest."""
    if value and _CURSOR.fullmatch(value) is None:
        raise BadRequest("cursor is malformed: give the nextCursor of the answer before")
    return value or ""


def idempotency_key(value: str | None) -> str:
    """The `Idempotency-Key` header; "" without it. Raises BadRequest."""
    if value is None:
        return ""
    if _KEY.fullmatch(value) is None:
        raise BadRequest("Idempotency-Key is 1 to 255 printable ASCII characters")
    return value


def priority(value: str | None) -> int:
    """The `X-NGPU-Priority` header; 0 without it. Raises BadRequest."""
    if value is None:
        return 0
    if _PRIORITY.fullmatch(value) is None:
        raise BadRequest(f"X-NGPU-Priority is a whole number from -{PRIORITY} to {PRIORITY}")
    return int(value)


def callback_url(value: str | None, header: str | None) -> str:
    """Where a task's end is to be posted: `callback_url` or the X-NGPU-Callback-Url header; "" without either.

    Raises BadRequest.
    """
    if value is not None and header is not None and value != header:
        raise BadRequest("callback_url and X-NGPU-Callback-Url are not the same: give one of them")
    url = header if value is None else value
    if url is None:
        return ""
    if len(url) > _CALLBACK_CHARS or _CALLBACK.fullmatch(url) is None:
        raise BadRequest(
            "callback_url is a URL of up to 2048 printable ASCII characters, e.g. https://example.com/ended"
        )
    return url
