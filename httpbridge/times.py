"""Times of the REST surface: `YYYY-MM-DD HH:MM:SS` in the display zone outside, aware UTC inside.

An end includes the whole of the unit it is written in: a date that day, a time to the second that second. So the times
which answers show may be put into `endTime` as they stand, and ranges written in one unit fit together without gap or
overlap.
"""

import re
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from typing import Final

from httpbridge.errors import BadRequest

EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
LAST: Final = datetime(9999, 1, 1, tzinfo=UTC)

_TIME: Final = re.compile(
    r"(?P<date>[0-9]{4}-[0-9]{2}-[0-9]{2})"
    r"(?:[T ](?P<minute>[0-9]{2}:[0-9]{2})(?P<second>:[0-9]{2})?(?:[.,](?P<fraction>[0-9]{1,9}))?"
    # A "+" that was not percent-encoded arrives as a space.
    r" ?(?:(?P<utc>[Zz])|(?P<sign>[+\- ])(?P<hours>[0-9]{2}):?(?P<minutes>[0-9]{2}))?)?"
)


def start(value: str | None, zone: tzinfo) -> datetime | None:
    """`startTime`, included; None: from the first. Raises BadRequest."""
    if not value:
        return None
    moment, _ = _parse(value, zone, "startTime")
    return _utc(moment)


def end(value: str | None, zone: tzinfo) -> datetime | None:
    """`endTime` as the first moment that is no longer included; None: to the last. Raises BadRequest."""
    if not value:
        return None
    moment, unit = _parse(value, zone, "endTime")
    if moment.year >= LAST.year:
        return LAST
    # A day is a day of its own zone's calendar, which may have 23 or 25 hours.
    return _utc(moment + unit) if unit.days else _utc(moment) + unit


def show(moment: datetime | None, zone: tzinfo) -> str:
    """`YYYY-MM-DD HH:MM:SS`; "" for None."""
    return "" if moment is None else moment.astimezone(zone).strftime("%Y-%m-%d %H:%M:%S")


def _parse(value: str, zone: tzinfo, name: str) -> tuple[datetime, timedelta]:
    match = _TIME.fullmatch(value.strip())
    if match is None or (match["fraction"] and not match["second"]):
        raise BadRequest(f"{name} is no time: write YYYY-MM-DD, YYYY-MM-DD HH:MM:SS or ISO 8601")
    fraction = (match["fraction"] or "")[:6].ljust(6, "0")
    text = f"{match['date']}T{match['minute'] or '00:00'}{match['second'] or ':00'}.{fraction}"
    try:
        moment = datetime.fromisoformat(text).replace(tzinfo=_zone(match, zone))
    except ValueError:
        raise BadRequest(f"{name} is no time: {value[:40]!r} is not in the calendar") from None
    if match["fraction"]:
        return moment, timedelta(microseconds=1)
    if match["second"]:
        return moment, timedelta(seconds=1)
    return moment, timedelta(minutes=1) if match["minute"] else timedelta(days=1)


def _zone(match: re.Match[str], zone: tzinfo) -> tzinfo:
    if match["utc"]:
        return UTC
    if not match["hours"]:
        return zone
    offset = timedelta(hours=int(match["hours"]), minutes=int(match["minutes"]))
    return timezone(-offset if match["sign"] == "-" else offset)


def _utc(moment: datetime) -> datetime:
    """In UTC, from 1970 (before which there are no tasks) to 9999 (after which there is no calendar)."""
    if moment.year < EPOCH.year:
        return EPOCH
    return LAST if moment.year >= LAST.year else max(EPOCH, moment.astimezone(UTC))
