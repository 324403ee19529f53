"""When a webhook is posted again and what is remembered of it, as tables; how it is signed; what it says."""

import base64
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ngpu.v1 import http_pb2
from ngpu.v1 import task_pb2 as pb

from controlplane.model import State, Task, Told, Webhook
from controlplane.notice import INLINE_BYTES, notice_of
from controlplane.signatures import shown, signature
from controlplane.webhooks import (
    ERROR_CHARS,
    PAUSE_MOST_S,
    RETRY_AFTER_S,
    TRIES,
    TRIES_KEPT,
    Answer,
    Times,
    after,
    is_late,
    retry_after_s,
    tries_of,
    webhook_id,
)
from httpbridge import answers, envelope

END = datetime(2026, 1, 31, 14, 0, 9, 123_456, tzinfo=UTC)
TIMES = Times(give_up_s=86_400.0, first_pause_s=5.0)
DAY = timedelta(days=1)


def waiting(**fields: Any) -> Webhook:
    values: dict[str, Any] = {
        "task_id": "t",
        "workspace_uid": "w",
        "host": "example.com",
        "state": Told.WAITING,
        "create_time": END,
        "next_time": END,
    }
    return Webhook(**values | fields)


def tried(answer: Answer, row: Webhook | None = None, *, late: timedelta = timedelta(), jitter: float = 1.0) -> Webhook:
    now = END + late
    return after(row or waiting(), answer, TIMES, began=now, now=now, jitter=jitter)


# Signatures.


def test_signature_of_the_published_example() -> None:
    # The vector of the specification's own libraries.
    secret = base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    signed = signature(secret, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert signed == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_secret_is_shown_as_libraries_take_it() -> None:
    assert shown(bytes(32)) == f"whsec_{'A' * 43}="


def test_id_has_no_dot() -> None:
    assert webhook_id("20260131_14_00_09_01234567890123456789") == "msg_20260131_14_00_09_01234567890123456789"


# Tries.


@pytest.mark.parametrize(
    ("status", "state"),
    [
        (200, Told.DELIVERED),
        (204, Told.DELIVERED),
        (299, Told.DELIVERED),
        (410, Told.GIVEN_UP),
        *((status, Told.WAITING) for status in (0, 100, 199, 300, 301, 307, 400, 401, 404, 409, 429, 500, 503)),
    ],
)
def test_what_an_answer_means(status: int, state: Told) -> None:
    row = tried(Answer(status))
    assert (row.state, row.next_time is None) == (state, state is not Told.WAITING)
    assert row.tries == 1


def test_pauses_double_up_to_a_bound() -> None:
    row, pauses = waiting(), []
    for _ in range(14):
        row = tried(Answer(500), row)
        assert row.next_time is not None
        pauses.append((row.next_time - END).total_seconds())
    assert pauses == [5, 10, 20, 40, 80, 160, 320, 640, 1280, 2560, 5120, PAUSE_MOST_S, PAUSE_MOST_S, PAUSE_MOST_S]


@given(st.floats(0, 1), st.integers(0, TRIES - 2))
def test_pause_is_drawn_from_all_of_its_bound(jitter: float, tries: int) -> None:
    row = tried(Answer(500), waiting(tries=tries), jitter=jitter)
    assert row.next_time is not None
    pause = (row.next_time - END).total_seconds()
    bound = min(5 * 2.0**tries, PAUSE_MOST_S)
    assert pause == pytest.approx(max(1.0, bound * jitter), abs=1e-5)


def test_last_try_is_when_the_time_is_over() -> None:
    row = tried(Answer(500), waiting(tries=20), late=DAY - timedelta(seconds=9))
    assert row.next_time == END + DAY
    row = tried(Answer(500), row, late=DAY)
    assert (row.state, row.next_time) == (Told.GIVEN_UP, None)


def test_tries_have_an_end_whatever_the_times() -> None:
    assert tried(Answer(500), waiting(tries=TRIES - 2)).state is Told.WAITING
    assert tried(Answer(500), waiting(tries=TRIES - 1)).state is Told.GIVEN_UP


@pytest.mark.parametrize(("asked", "pause"), [(0.0, 5.0), (3.0, 5.0), (60.0, 60.0), (1e9, RETRY_AFTER_S)])
def test_receiver_is_left_alone_as_it_asks_within_bounds(asked: float, pause: float) -> None:
    row = tried(Answer(429, retry_after_s=asked))
    assert row.next_time == END + timedelta(seconds=pause)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("", 0),
        ("120", 120),
        (" 7 ", 7),
        ("-1", 0),
        ("1.5", 0),
        ("9" * 10, 0),
        ("soon", 0),
        ("Sat, 31 Jan 2026 14:01:09 GMT", 60 - 0.123456),
        ("Sat, 31 Jan 2026 13:00:00 GMT", 0),
        ("Sat, 99 Jan 2026 13:00:00 GMT", 0),
    ],
)
def test_retry_after(value: str, seconds: float) -> None:
    assert retry_after_s(value, END) == pytest.approx(seconds)


def test_last_tries_are_remembered_in_order() -> None:
    row = waiting()
    for number in range(1, TRIES_KEPT + 6):
        row = tried(Answer(error=f"fault {number} " + "x" * 1000, duration_s=0.5), row)
    log = tries_of(row)
    assert [one.number for one in log] == list(range(6, TRIES_KEPT + 6))
    assert (row.tries, log[-1].duration_s, len(log[-1].error)) == (TRIES_KEPT + 5, 0.5, ERROR_CHARS)


@pytest.mark.parametrize(
    ("tries", "minutes", "host_fails", "late"),
    [(1, 11, False, True), (1, 9, True, False), (0, 11, False, False), (0, 11, True, True), (0, 9, True, False)],
)
def test_whose_turn_does_not_come_is_given_up(tries: int, minutes: int, host_fails: bool, late: bool) -> None:
    now = END + DAY + timedelta(minutes=minutes)
    assert is_late(waiting(tries=tries), now, TIMES, host_fails=host_fails) is late


# The notice.


def ended(state: State = State.COMPLETED, **columns: Any) -> Task:
    values: dict[str, Any] = {
        "id": "20260131_14_00_09_01234567890123456789",
        "workspace_uid": "w",
        "state": state,
        "create_time": END - timedelta(seconds=3.9),
        "end_time": END,
        "port": 80,
        "method": "POST",
        "path": "/x",
    }
    return Task(**values | columns)


def answer(body: bytes, status: int = 200, kind: str = "text/plain") -> dict[str, Any]:
    return {
        "response_status": status,
        "response_headers_json": msgspec.json.encode([["Content-Type", kind.encode()]]),
        "response_body": body if len(body) <= INLINE_BYTES else None,
        "response_size": len(body),
    }


FAILED = {"cause": 2, "failure_reason": "NODE_LOST", "failure_message": "The node is gone."}
LATE = {"cause": 1, "failure_reason": "RUN_TIME_LIMIT", "failure_message": "It ran too long."}
CALLED_OFF = {"cause": 1, "failure_reason": "CANCELLED", "failure_message": "It was cancelled."}

ENDS = [
    ended(**answer(b"said \xc3\xa9")),
    ended(**answer(b"\xff\x00")),
    ended(**answer(b"")),
    ended(**answer(b"{}", 422)),
    ended(**answer(b"", 503)),
    ended(**answer(b"", 101)),
    ended(State.FAILED, **FAILED),
    ended(State.FAILED, **LATE),
    ended(State.FAILED),
    ended(State.CANCELLED, **CALLED_OFF),
    ended(State.CANCELLED),
]


@pytest.mark.parametrize("row", ENDS)
def test_notice_says_what_query_task_says(row: Task) -> None:
    said = msgspec.json.decode(notice_of(row))
    task = pb.Task(task_id=row.id, state=int(row.state))  # type: ignore[arg-type]
    task.failure.reason, task.failure.message = row.failure_reason, row.failure_message
    task.create_time.FromDatetime(row.create_time)
    assert row.end_time is not None
    task.end_time.FromDatetime(row.end_time)
    body = http_pb2.Body(inline=row.response_body or b"", size=row.response_size)
    response = http_pb2.HttpResponse(status=row.response_status, body=body)
    _, result_code, msg = answers.ruling(task, response)
    data, encoding = answers.text_of(body)
    seconds = int(answers.seconds_taken(task, END))
    queried = envelope.Queried(result_code, msg, row.id, data, encoding, body.size, seconds)
    wanted = msgspec.json.decode(envelope.encode(queried))
    assert {name: said[name] for name in wanted} == wanted
    assert said["state"] == answers.STATES[task.state]


def test_notice_has_a_type_and_a_time_besides() -> None:
    said = msgspec.json.decode(notice_of(ENDS[0]))
    assert (said["type"], said["timestamp"]) == ("task.completed", "2026-01-31T14:00:09.123456Z")
    assert (said["content_type"], said["http_status"], said["error"]) == ("text/plain", 200, None)
    assert [msgspec.json.decode(notice_of(ended(state)))["type"] for state in (State.FAILED, State.CANCELLED)] == [
        "task.failed",
        "task.cancelled",
    ]
    error = msgspec.json.decode(notice_of(ended(State.FAILED, **FAILED)))["error"]
    assert error == {"cause": "platform", "reason": "NODE_LOST", "message": "The node is gone."}


@pytest.mark.parametrize("size", [INLINE_BYTES, INLINE_BYTES + 1])
def test_long_response_is_not_in_the_notice(size: int) -> None:
    raw = notice_of(ended(**answer(b"x" * size)), "https://ngpu.example/")
    said = msgspec.json.decode(raw)
    assert said["result_size"] == size
    assert said["result_url"] == f"https://ngpu.example/user/queryTask?taskID={ENDS[0].id}"
    assert (said.get("data_omitted"), len(said["data"])) == ((None, size) if size <= INLINE_BYTES else (True, 0))
    assert len(raw) < INLINE_BYTES + 1000


def test_response_past_its_retention_is_not_in_the_notice() -> None:
    row = ended(**{**answer(b"gone"), "response_body": None})
    said = msgspec.json.decode(notice_of(row))
    assert (said["data"], said["data_omitted"], said["result_size"]) == ("", True, 4)
