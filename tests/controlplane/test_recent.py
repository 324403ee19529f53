"""Tasks that ended a moment ago: known for a while, in bounded memory."""

from datetime import UTC, datetime

import pytest

from controlplane import recent
from controlplane.model import State
from controlplane.recent import RECENT_S, VIEW_BYTES, Recent
from controlplane.slots import Headers, Response
from controlplane.tasks import TaskView

NOW = datetime(2026, 1, 1, tzinfo=UTC)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def view(task_id: str, body: bytes = b"", headers: Headers = ()) -> TaskView:
    response = Response(200, headers, body, len(body))
    return TaskView(task_id, "w-1", State.COMPLETED, 1, NOW, response=response)


def test_it_is_known_for_a_while() -> None:
    clock = Clock()
    known = Recent(clock)
    known.keep(view("a"))
    clock.now = RECENT_S - 1
    known.keep(view("a", b"not again: it has not changed"))
    assert known.get("a") == view("a")
    clock.now = RECENT_S
    assert known.get("a") is None
    assert known.get("b") is None


def test_the_oldest_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    known = Recent(Clock())
    monkeypatch.setattr(recent, "VIEWS", 2)
    for task_id in "abc":
        known.keep(view(task_id))
    assert [known.get(task_id) is not None for task_id in "abc"] == [False, True, True]


def test_bodies_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    known = Recent(clock)
    monkeypatch.setattr(recent, "BYTES", 3 * VIEW_BYTES)
    known.keep(view("a", b"x" * VIEW_BYTES))
    known.keep(view("b"))
    assert known.get("a") is not None
    known.keep(view("c"))
    assert known.get("a") is None
    clock.now = RECENT_S
    assert known.get("b") is known.get("c") is None
    known.keep(view("d", b"x" * 2 * VIEW_BYTES))
    assert known.get("d") is not None


def test_headers_count(monkeypatch: pytest.MonkeyPatch) -> None:
    known = Recent(Clock())
    monkeypatch.setattr(recent, "BYTES", 3 * VIEW_BYTES)
    known.keep(view("a", headers=(("x-long", b"x" * VIEW_BYTES),)))
    known.keep(view("b"))
    assert known.get("a") is None
    assert known.get("b") is not None
