"""The attempts of a task in words: where each went and why, when what happened, whose fault it was, what it cost."""

from collections.abc import Iterable, Iterator

from google.protobuf.timestamp_pb2 import Timestamp
from ngpu.v1 import task_pb2 as pb
from rich.console import Group, RenderableType

from controlplane.ctl.output import cell, counted, facts
from controlplane.ctl.units import duration_text, moment, time_text

_DELIVERY = {
    pb.DELIVERY_NOT_SENT: "no byte reached the container",
    pb.DELIVERY_SENT_PARTLY: "the container has had some of the request, perhaps all",
    pb.DELIVERY_SENT: "the container has had the whole request",
    pb.DELIVERY_ANSWERED: "the container answered",
}
#: From here on numbers are of second attempts.
SECOND = 1_000_000
_CAUSE = {pb.CAUSE_CUSTOMER: "on the customer's side", pb.CAUSE_PLATFORM: "on the platform's side: free of charge"}


def attempts_shown(attempts: Iterable[pb.Attempt]) -> RenderableType:
    """One block for each."""
    blocks: list[RenderableType] = []
    for one in attempts:
        blocks += [cell(""), facts(f"attempt {_name(one.number)}", _lines(one))]
    return Group(*blocks)


def _name(number: int) -> str:
    """Of a second attempt, which has the number of the first and a million: `1, second`."""
    return str(number) if number < SECOND else f"{number - SECOND}, second"


def _lines(one: pb.Attempt) -> Iterator[tuple[str, object]]:
    failed = one.failure.message
    yield "where", " ".join(filter(None, (f"{one.replica_id} on {one.node_addr}", one.node_ip and f"({one.node_ip})")))
    yield "why there", one.reason
    yield "waited", _between(one.queue_time, one.assign_time)
    yield "assigned", time_text(one.assign_time)
    yield "then", _course(one)
    if not one.HasField("end_time"):
        yield "now", "in progress"
        return
    yield "recorded", f"{time_text(one.end_time)}, {_between(one.assign_time, one.end_time)} after its assignment"
    yield "delivery", _DELIVERY.get(one.delivery, "")
    status = f"status {one.http_status}" if one.http_status else ""
    yield "outcome", cell(f"{failed} ({one.failure.reason})", "red") if failed else status
    yield "whose fault", _CAUSE.get(one.failure.cause, "") if failed else ""
    if one.gpu_ids:
        held = (
            f"{duration_text(one.gpu_us / 1e6) or '0s'} of {counted(len(one.gpu_ids), 'GPU')} {one.gpu_model}".strip()
        )
        yield "GPU time", f"{held}: {', '.join(one.gpu_ids)}"
        yield "cost", f"{one.cost} at {one.price} a second" if one.cost else ""


def _course(one: pb.Attempt) -> str:
    """E.g. `sent after 12ms, first byte after 3.1s, last byte after 3.4s`."""
    steps = (
        ("sent", one.sent_after_us),
        ("first byte", one.first_byte_after_us),
        ("last byte", one.last_byte_after_us),
    )
    return ", ".join(f"{name} after {duration_text(us / 1e6)}" for name, us in steps if us)


def _between(start: Timestamp, end: Timestamp) -> str:
    begun, ended = moment(start), moment(end)
    return (duration_text((ended - begun).total_seconds()) or "0s") if begun and ended else ""
