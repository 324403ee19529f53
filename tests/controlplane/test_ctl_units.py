"""Sizes, durations and times, read and written."""

from datetime import UTC, datetime, timedelta

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st

from controlplane.ctl.units import (
    age_text,
    duration_text,
    parse_duration,
    parse_size,
    parse_time,
    size_text,
    time_text,
)

NOW = datetime(2026, 1, 31, 14, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (0, 0),
        (512, 512),
        ("512B", 512),
        ("1KiB", 1024),
        ("1.5 GiB", 1610612736),
        ("4gib", 4 << 30),
        ("24GB", 24 * 10**9),
    ],
)
def test_sizes(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "4", "4G", "GiB", "-1GiB", "1e3GiB", "4GiB4", -1, 1.5, True, None, [], "٤GiB"])
def test_what_is_no_size(text: object) -> None:
    with pytest.raises(ValueError, match="not a size: write for example 512MiB or 4GiB"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [(90, 90), (0.5, 0.5), ("90s", 90), ("10m", 600), ("1h30m", 5400), ("1.5h", 5400), ("250ms", 0.25)],
)
def test_durations(text: object, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "10", "m", "-5s", "10 minutes", "1h 30m", "1e9d", "99999999d", True, None, float("nan")]
)
def test_what_is_no_duration(text: object) -> None:
    with pytest.raises(ValueError, match="not a duration: write for example 90s, 10m or 1h30m"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "time"),
    [
        ("2h", NOW - timedelta(hours=2)),
        ("2026-01-30T10:00:00Z", datetime(2026, 1, 30, 10, tzinfo=UTC)),
        ("2026-01-30 10:00+08:00", datetime(2026, 1, 30, 2, tzinfo=UTC)),
        ("2026-01-30", datetime(2026, 1, 30).astimezone(UTC)),  # this machine's zone is meant
    ],
)
def test_times(text: str, time: datetime) -> None:
    assert parse_time(text, NOW) == time


def test_what_is_no_time() -> None:
    with pytest.raises(ValueError, match="not a time"):
        parse_time("yesterday", NOW)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1000 B"),
        (1536, "1.5 KiB"),
        (64 << 20, "64 MiB"),
        (24 << 30, "24 GiB"),
        (1 << 50, "1.02e+03 TiB"),
    ],
)
def test_size_text(number: int, text: str) -> None:
    assert size_text(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.3512, "351ms"),
        (1.234, "1.23s"),
        (59, "59s"),
        (60, "1m"),
        (61, "1m 1s"),
        (3600, "1h"),
        (7500, "2h 5m"),
        (3605, "1h"),
        (200_000, "2d 7h"),
    ],
)
def test_duration_text(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


@given(st.integers(0, 10**6))
def test_what_is_written_can_be_read(seconds: int) -> None:
    assert parse_duration(duration_text(seconds).replace(" ", "")) == pytest.approx(seconds, rel=0.1)


def test_ages() -> None:
    def stamp(seconds: float) -> Timestamp:
        made = Timestamp()
        made.FromDatetime(NOW + timedelta(seconds=seconds))
        return made

    assert age_text(stamp(-310), NOW) == "5m 10s ago"
    assert age_text(stamp(0.2), NOW) == "0s ago"
    assert age_text(stamp(3600), NOW) == "in 1h"
    assert age_text(Timestamp(), NOW) == time_text(Timestamp()) == "-"
