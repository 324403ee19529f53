"""Sizes, durations and times as people write and read them: `4GiB`, `1h30m`, `3 minutes ago`."""

import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Final

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

_SIZES: Final[Mapping[str, int]] = {
    "b": 1,
    **{f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", 1)},
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgt", 1)},
}
_DURATIONS: Final[Mapping[str, float]] = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86_400}
_DURATION: Final = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)", re.ASCII)
_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?b)", re.ASCII | re.IGNORECASE)
#: A hundred years: past it a typing mistake is likelier than a wish.
_LONGEST_S: Final = 100 * 366 * 86_400.0


def parse_size(value: object) -> int:
    """`"4GiB"` (1024), `"4GB"` (1000) or a number of bytes, as bytes. Raises ValueError with what is allowed."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if isinstance(value, str) and (match := _SIZE.fullmatch(value.strip())):
        return round(float(match[1]) * _SIZES[match[2].lower()])
    raise ValueError(f"{value!r} is not a size: write for example 512MiB or 4GiB")


def parse_duration(value: object) -> float:
    """`"90s"`, `"1h30m"` or a number of seconds, as seconds. Raises ValueError with what is allowed."""
    seconds = -1.0
    if isinstance(value, int | float) and not isinstance(value, bool):
        seconds = float(value)
    elif isinstance(value, str):
        parts = _DURATION.findall(value.strip())
        if parts and "".join(number + unit for number, unit in parts) == value.strip():
            seconds = sum(float(number) * _DURATIONS[unit] for number, unit in parts)
    if 0 <= seconds <= _LONGEST_S:
        return seconds
    raise ValueError(f"{value!r} is not a duration: write for example 90s, 10m or 1h30m")


def parse_time(text: str, now: datetime) -> datetime:
    """`2026-01-31`, `2026-01-31 14:00`, ISO 8601 (local if it names no zone), or a duration ago. Raises ValueError."""
    try:
        return now - timedelta(seconds=parse_duration(text))
    except ValueError:
        pass
    try:
        return datetime.fromisoformat(text).astimezone(UTC)
    except ValueError:
        raise ValueError(
            f"{text!r} is not a time: write a date (2026-01-31), date and time, or how long ago (2h)"
        ) from None


def duration_message(seconds: float) -> Duration:
    """As protobuf has it."""
    message = Duration()
    message.FromTimedelta(timedelta(seconds=seconds))
    return message


def size_text(number: int) -> str:
    """`1.5 GiB`."""
    amount = float(number)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.3g} {unit}" if amount < 1000 else f"{amount:.0f} {unit}"
        amount /= 1024
    return f"{amount:.3g} TiB"


def duration_text(seconds: float) -> str:
    """The two largest units, `2h 5m`, or `7.35s`, or `350ms`."""
    if 0 < seconds < 1:
        return f"{seconds * 1000:.3g}ms"
    if seconds < 10:
        return f"{seconds:.3g}s"
    parts: list[str] = []
    rest = round(seconds)
    for unit, length in (("d", 86_400), ("h", 3600), ("m", 60), ("s", 1)):
        if rest >= length or (parts and unit != "d"):
            parts.append(f"{rest // length}{unit}")
            rest %= length
    return " ".join(part for part in parts[:2] if not part.startswith("0"))


def moment(stamp: Timestamp) -> datetime | None:
    """The time, aware; None if it is unset."""
    return stamp.ToDatetime(UTC) if stamp.seconds or stamp.nanos else None


def time_text(stamp: Timestamp) -> str:
    """In the zone of this machine, to the second: `2026-01-31 14:00:00`; `-` if unset."""
    at = moment(stamp)
    return f"{at.astimezone():%Y-%m-%d %H:%M:%S}" if at else "-"


def age_text(stamp: Timestamp, now: datetime) -> str:
    """`5m 10s ago`; `-` if unset."""
    at = moment(stamp)
    if at is None:
        return "-"
    seconds = (now - at).total_seconds()
    return f"in {duration_text(-seconds)}" if seconds < -1 else f"{duration_text(max(0, round(seconds)))} ago"
