"""Times of the REST surface."""

from datetime import UTC, datetime, timedelta, timezone
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from httpbridge import times
from httpbridge.errors import BadRequest

CHINA = timezone(timedelta(hours=8))
BERLIN = ZoneInfo("Europe/Berlin")


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


@pytest.mark.parametrize(
    ("value", "start", "end"),
    [
        ("2024-04-11", "2024-04-11 00:00:00", "2024-04-12 00:00:00"),
        ("2024-04-11 13:36:11", "2024-04-11 13:36:11", "2024-04-11 13:36:12"),
        ("2024-04-11T13:36:11", "2024-04-11 13:36:11", "2024-04-11 13:36:12"),
        ("2024-04-11T13:36", "2024-04-11 13:36:00", "2024-04-11 13:37:00"),
        ("2024-04-11T13:36:11Z", "2024-04-11 13:36:11", "2024-04-11 13:36:12"),
        ("2024-04-11T13:36:11.5Z", "2024-04-11 13:36:11.500000", "2024-04-11 13:36:11.500001"),
        ("2024-04-11T13:36:11+08:00", "2024-04-11 05:36:11", "2024-04-11 05:36:12"),
        ("2024-04-11T13:36:11 08:00", "2024-04-11 05:36:11", "2024-04-11 05:36:12"),
        ("2024-04-11T13:36:11-0330", "2024-04-11 17:06:11", "2024-04-11 17:06:12"),
        ("1969-12-31", "1970-01-01 00:00:00", "1970-01-01 00:00:00"),
        ("0001-01-01T00:00:00+14:00", "1970-01-01 00:00:00", "1970-01-01 00:00:01"),
        ("9999-12-31", "9999-01-01 00:00:00", "9999-01-01 00:00:00"),
        ("9999-12-31T23:59:59-14:00", "9999-01-01 00:00:00", "9999-01-01 00:00:00"),
        ("2099-01-01", "2099-01-01 00:00:00", "2099-01-02 00:00:00"),
    ],
)
def test_start_is_included_and_end_with_its_unit(value: str, start: str, end: str) -> None:
    assert times.start(value, UTC) == at(start)
    assert times.end(value, UTC) == at(end)


def test_without_a_zone_it_is_the_displays() -> None:
    assert times.start("2024-04-11", CHINA) == at("2024-04-10 16:00:00")
    assert times.end("2024-04-11", CHINA) == at("2024-04-11 16:00:00")


def test_a_day_is_as_long_as_its_calendar_says() -> None:
    start, end = times.start("2024-03-31", BERLIN), times.end("2024-03-31", BERLIN)
    assert start is not None
    assert end is not None
    assert end - start == timedelta(hours=23)


def test_nothing_given_is_no_bound() -> None:
    assert times.start(None, UTC) is None
    assert times.end("", UTC) is None


@pytest.mark.parametrize(
    "value",
    ["yesterday", "2024-13-01", "2024-02-30", "2024-1-1", "11.04.2024", "1712842571", "2024-04-11 25:00:00",
     "2024-04-11T13:36:11+25:00", "2024-04-11T13:36.5", "2024-04-11; drop table", "２０２４-04-11", "2024-04-11\x00"],
)  # fmt: skip
def test_what_is_no_time_is_refused(value: str) -> None:
    with pytest.raises(BadRequest, match="startTime"):
        times.start(value, UTC)
    with pytest.raises(BadRequest, match="endTime"):
        times.end(value, UTC)


@given(st.text())
def test_any_text_is_a_time_or_refused(value: str) -> None:
    for parse in (times.start, times.end):
        try:
            moment = parse(value, BERLIN)
        except BadRequest:
            continue
        assert moment is None or times.EPOCH <= moment <= times.LAST


@given(st.datetimes(min_value=datetime(1970, 1, 2), max_value=datetime(9000, 1, 1)))
def test_what_answers_show_may_be_put_into_a_query(moment: datetime) -> None:
    moment = moment.replace(tzinfo=UTC)
    shown = times.show(moment, CHINA)
    start, end = times.start(shown, CHINA), times.end(shown, CHINA)
    assert start is not None
    assert end is not None
    assert start <= moment < end


def test_times_are_shown_in_the_display_zone() -> None:
    assert times.show(at("2024-04-15 06:30:11.9"), CHINA) == "2024-04-15 14:30:11"
    assert times.show(None, CHINA) == ""
