"""When a webhook is posted again, and what is remembered of each try: pure functions over plain values.

2xx is delivered. 410 says that the receiver wants no more. Everything else, redirects too, is a failure and is tried
again: after a pause drawn evenly from 0 to a bound that doubles from try to try (full jitter: a crowd that failed
together does not come back together), not before the receiver's Retry-After, and for the last time when the whole time
is over.
"""

import re
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Final

import msgspec

from controlplane.model import Told, Webhook

#: The bound of the pause doubles up to this, in seconds.
PAUSE_MOST_S: Final = 7200.0
#: No pause is shorter than this, or than the bound of the first.
PAUSE_LEAST_S: Final = 1.0
#: However long a receiver asks to be left alone, it is tried again after this.
RETRY_AFTER_S: Final = 6 * 3600.0
#: So long after its time is over a webhook whose turn has not come is given up without a last try.
LATE_TIME: Final = timedelta(minutes=10)
#: Tries of one webhook, whatever the times are set to.
TRIES: Final = 100
#: Of these the last are remembered.
TRIES_KEPT: Final = 20
#: What is remembered of an error is cut to this.
ERROR_CHARS: Final = 200

GONE: Final = 410

_ID_PREFIX: Final = "msg_"


class Times(msgspec.Struct, frozen=True):
    """How long a webhook is tried, in seconds: in all, and the bound of the first pause."""

    give_up_s: float = 86_400.0
    first_pause_s: float = 5.0


class Answer(msgspec.Struct, frozen=True):
    """What came of one post. `status` 0: no answer came, and `error` says why."""

    status: int = 0
    error: str = ""
    #: How long the receiver asks to be left alone, in seconds.
    retry_after_s: float = 0.0
    duration_s: float = 0.0


class Try(msgspec.Struct, frozen=True):
    """One post, for the record."""

    number: int
    time: datetime
    duration_s: float
    status: int
    error: str


_TRIES: Final = msgspec.json.Decoder(list[Try])


def webhook_id(task_id: str) -> str:
    """The `webhook-id` of every try. No "." may be in it: it is signed as part of a text with dots between."""
    return _ID_PREFIX + task_id


def tries_of(row: Webhook) -> list[Try]:
    """The tries that are remembered, oldest first."""
    return _TRIES.decode(row.tries_json)


def is_late(row: Webhook, now: datetime, times: Times, *, host_fails: bool) -> bool:
    """Its time is long over: its turn has not come among the many for a receiver that does not answer.

    One that was never posted is posted once all the same (it may be we who did not run), unless its host fails now.
    """
    last = row.create_time + timedelta(seconds=times.give_up_s)
    return (row.tries > 0 or host_fails) and now > last + LATE_TIME


def after(row: Webhook, answer: Answer, times: Times, *, began: datetime, now: datetime, jitter: float) -> Webhook:
    """The webhook after a try that began then and ended now. `jitter`: from 0 to 1."""
    number = row.tries + 1
    entry = Try(number, began, round(answer.duration_s, 3), answer.status, _error_of(answer)[:ERROR_CHARS])
    state, next_time = Told.WAITING, None
    if 200 <= answer.status < 300:
        state = Told.DELIVERED
    elif answer.status == GONE or number >= TRIES:
        state = Told.GIVEN_UP
    else:
        next_time = _next_time(row, answer, now, times, jitter)
        if next_time is None:
            state = Told.GIVEN_UP
    return Webhook(
        task_id=row.task_id,
        workspace_uid=row.workspace_uid,
        host=row.host,
        state=state,
        create_time=row.create_time,
        next_time=next_time,
        tries=number,
        tries_json=msgspec.json.encode([*tries_of(row), entry][-TRIES_KEPT:]),
    )


def _next_time(row: Webhook, answer: Answer, now: datetime, times: Times, jitter: float) -> datetime | None:
    last = row.create_time + timedelta(seconds=times.give_up_s)
    if now >= last:
        return None
    # 2.0 ** 1000 and more is no float.
    bound_s = min(times.first_pause_s * 2.0 ** min(row.tries, 60), PAUSE_MOST_S)
    least_s = min(PAUSE_LEAST_S, times.first_pause_s)
    pause_s = max(bound_s * jitter, least_s, min(answer.retry_after_s, RETRY_AFTER_S))
    return min(now + timedelta(seconds=pause_s), last)


def _error_of(answer: Answer) -> str:
    if answer.error or 200 <= answer.status < 300:
        return answer.error
    if answer.status == GONE:
        return "The receiver answered 410: it wants no more."
    if 300 <= answer.status < 400:
        return f"The receiver answered {answer.status}: redirects are not followed."
    return f"The receiver answered {answer.status}."


def retry_after_s(value: str, now: datetime) -> float:
    """A Retry-After field, seconds or a date, in seconds; 0 for what is neither."""
    value = value.strip()
    if re.fullmatch(r"[0-9]{1,9}", value):
        return float(value)
    try:
        moment = parsedate_to_datetime(value)
    except ValueError:
        return 0.0
    return max(0.0, ((moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - now).total_seconds())
