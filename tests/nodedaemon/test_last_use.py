"""When things were last used, over restarts and bad files."""

from pathlib import Path

import pytest

from nodedaemon import last_use
from nodedaemon.last_use import LastUse


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_it_survives_a_restart(tmp_path: Path) -> None:
    clock = Clock()
    ledger = LastUse(tmp_path / "state" / "used.json", clock=clock)
    ledger.touch(["a", "b"])
    clock.now += 10
    ledger.touch(["a"])
    ledger.forget(["c"])
    again = LastUse(tmp_path / "state" / "used.json", clock=clock)
    assert again.oldest() == ["b", "a"]
    assert (again.idle_s("a"), again.idle_s("b"), again.idle_s("c")) == (0, 10, 0)
    assert "a" in again
    again.forget(["a", "b"])
    assert LastUse(tmp_path / "state" / "used.json").oldest() == []


def test_a_clock_that_goes_back_makes_nothing_idle(tmp_path: Path) -> None:
    clock = Clock()
    ledger = LastUse(tmp_path / "used.json", clock=clock)
    ledger.touch(["a"])
    clock.now -= 500
    assert ledger.idle_s("a") == 0


def test_what_cannot_be_read_is_nobodys(tmp_path: Path) -> None:
    for text in ("", "{", "[1]", '{"a": "x"}', '{"a": null}', "\0"):
        (tmp_path / "used.json").write_text(text)
        ledger = LastUse(tmp_path / "used.json")
        assert ledger.oldest() == [], text
        ledger.touch(["b"])
        assert LastUse(tmp_path / "used.json").oldest() == ["b"]


def test_it_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(last_use, "LIMIT", 2)
    clock = Clock()
    ledger = LastUse(tmp_path / "used.json", clock=clock)
    for key in "abc":
        clock.now += 1
        ledger.touch([key])
    assert ledger.oldest() == ["b", "c"]
