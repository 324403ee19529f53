"""What a container's answers say about a job that it works on by itself: pure, by the rule of its workspace.

The words of a rule are texts: a value in the answer's JSON, or "HTTP 503", its status. See JobRule in workspace.proto.
"""

import enum
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote

from ngpu.v1 import workspace_pb2

#: Longest id of a job that is taken for one.
ID_CHARS: Final = 256
#: Of a container's own words, so many characters are told on.
WORDS_CHARS: Final = 500
_ABSENT: Final = object()


class Stand(enum.Enum):
    """Where a job stands, by an answer."""

    #: Of a first answer only: there is no job, this is the task's answer.
    ANSWER = enum.auto()
    BEGUN = enum.auto()
    #: Goes on: it runs, or waits within its container.
    UNDER_WAY = enum.auto()
    DONE = enum.auto()
    FAILED = enum.auto()
    #: The container has not taken it.
    BUSY = enum.auto()
    #: The rule does not know such an answer.
    UNCLEAR = enum.auto()


@dataclass(frozen=True, slots=True)
class Finding:
    """What an answer says. `document`: its JSON, if it was read; `job_id` where it has BEGUN; `words` for a person."""

    stand: Stand
    document: Any = _ABSENT
    job_id: str = ""
    words: str = ""


@dataclass(frozen=True, slots=True)
class Output:
    """What a job has brought forth. `kind`: its Content-Type."""

    data: bytes
    kind: bytes


def first(rule: workspace_pb2.JobRule, status: int, body: bytes) -> Finding:
    """What the answer to the request that may begin a job says."""
    document = _parsed(body)
    said = _words(rule, status, document)
    if _is_one(said, rule.busy):
        return Finding(Stand.BUSY, document, words=_about(rule, status, body, document))
    if _is_one(said, rule.failed):
        return Finding(Stand.FAILED, document, words=_about(rule, status, body, document))
    job_id = _id(rule.id, document) if status < 300 else ""
    if _is_one(said, rule.done) and not (job_id and _is_one(said, rule.accepted)):
        return Finding(Stand.DONE, document)
    return Finding(Stand.BEGUN, document, job_id) if job_id else Finding(Stand.ANSWER, document)


def later(rule: workspace_pb2.JobRule, status: int, body: bytes) -> Finding:
    """What the answer to a question after a job says."""
    document = _parsed(body)
    said = _words(rule, status, document)
    for stand, words in (
        (Stand.DONE, rule.done),
        (Stand.UNDER_WAY, rule.running),
        (Stand.UNDER_WAY, rule.waiting),
        (Stand.FAILED, rule.failed),
        (Stand.BUSY, rule.busy),
    ):
        if _is_one(said, words):
            return Finding(stand, document, words=_about(rule, status, body, document))
    return Finding(Stand.UNCLEAR, document, words=_about(rule, status, body, document))


def output_of(pointer: str, document: Any) -> Output | None:
    """The output within an answer's JSON: text as it is, anything else as JSON. None: it is not there."""
    value = found(document, pointer)
    if value is _ABSENT:
        return None
    if isinstance(value, str):
        return Output(value.encode(errors="replace"), b"text/plain; charset=utf-8")
    return Output(json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(), b"application/json")


def target(template: str, path: str, job_id: str) -> tuple[str, str, str]:
    """Method, path and query of a request about a job: `GET {path}?taskID={id}` with both names filled in."""
    method, _, form = template.partition(" ")
    target_path, _, query = form.partition("?")
    quoted = quote(job_id, safe="")
    return method, target_path.replace("{path}", path).replace("{id}", quoted), query.replace("{id}", quoted)


def found(document: Any, pointer: str) -> Any:
    """What a JSON pointer (RFC 6901) leads to, or _ABSENT."""
    value = document
    for part in pointer.split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(value, dict) and name in value:
            value = value[name]
        elif isinstance(value, list) and name.isdecimal() and int(name) < len(value):
            value = value[int(name)]
        else:
            return _ABSENT
    return value


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return _ABSENT


def _words(rule: workspace_pb2.JobRule, status: int, document: Any) -> tuple[str, str]:
    """The status and the value, as a rule may name them; "": it says nothing."""
    value = _text(found(document, rule.state)) if rule.state and status < 300 else ""
    return f"HTTP {status}", value


def _is_one(said: tuple[str, str], words: Iterable[str]) -> bool:
    return any(word in words for word in said if word)


def _id(pointers: Iterable[str], document: Any) -> str:
    for pointer in pointers:
        text = _text(found(document, pointer))
        if text and len(text) <= ID_CHARS and text.isprintable():
            return text
    return ""


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value) if isinstance(value, int | float) else ""


def _about(rule: workspace_pb2.JobRule, status: int, body: bytes, document: Any) -> str:
    said = _text(found(document, rule.message)) if rule.message else ""
    said = said or body[: 4 * WORDS_CHARS].decode(errors="replace")
    return f"HTTP {status}: {said[:WORDS_CHARS]}" if status >= 300 else said[:WORDS_CHARS]
