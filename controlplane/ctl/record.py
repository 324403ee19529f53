"""`ngpu task record`: what the flight recorder kept of attempts that failed or were slow."""

import json
from collections.abc import Iterable
from typing import Annotated

import grpc
import typer
from google.protobuf.json_format import MessageToDict
from google.protobuf.timestamp_pb2 import Timestamp
from ngpu.v1 import flight_pb2
from ngpu.v1 import task_pb2 as pb

from controlplane.ctl.attempts import attempts_shown
from controlplane.ctl.command import connected
from controlplane.ctl.output import cell, facts, plain, short, table
from controlplane.ctl.session import Session
from controlplane.ctl.units import moment, size_text


@connected
def record(
    session: Session,
    task: Annotated[str, typer.Argument(help="Its id.")],
    attempt: Annotated[int, typer.Option(min=0, help="Only this attempt; 0: all.")] = 0,
) -> None:
    """Show what the flight recorder kept of a task's attempts that failed or were slow.

    Why there, what happened to the container, how the GPUs were, and what the container wrote meanwhile: also when
    container and node are gone. A node needs some seconds to tell its part. With --json a line an attempt.

    \b
    Examples:
      ngpu task record 20260131_14_00_09_01234567890123456789
      ngpu task record 20260131_14_00_09_01234567890123456789 --attempt 1 --json
    """
    request, empty = pb.GetFlightsRequest(task_id=task, attempt=attempt), True
    try:
        for answer in session.stream(session.tasks.GetFlights, request, limit_s=None):
            empty = False
            if session.out.json:
                content = MessageToDict(answer, preserving_proto_field_name=True)
                session.out.write(json.dumps(content, ensure_ascii=False))
            else:
                _show(session, answer)
    except grpc.RpcError as error:
        raise session.problem(error) from error
    if empty:
        session.out.say("Nothing is recorded: no attempt failed or was slow, or it is past its retention.")


def _show(session: Session, answer: pb.GetFlightsResponse) -> None:
    out, plane, node = session.out, answer.plane, answer.node
    out.show(attempts_shown([answer.attempt]))
    told = "" if answer.HasField("node") else "nothing: it was lost before, or what it told is past its retention"
    lines = [
        ("recorded", f"it was {plane.kind}" if plane.kind == "slow" else plane.kind),
        ("placement", answer.placement),
        ("replica then", plane.replica_state),
        ("image", node.image_digest or plane.image_digest),
        ("node silent", f"since {_time(plane.silent_since_time)}" if plane.HasField("silent_since_time") else ""),
        ("node told", told),
    ]
    out.show(facts("flight", lines))
    samples = node.gpu_samples or plane.gpu_samples
    if samples:
        out.show(cell("\nGPUs", "bold"))
        headers = ("TIME", "GPU", "USE", "MEMORY", "TEMPERATURE", "POWER", "FAULTS")
        out.show(table(*headers, rows=map(_sample, samples), right=("USE", "MEMORY", "TEMPERATURE", "POWER")))
    if node.events:
        out.show(cell("\nreplica", "bold"))
        out.show(table("TIME", "STATE", "WHAT HAPPENED", rows=_events(node.events)))
    if answer.HasField("node"):
        out.show(cell("\ncontainer's log" + (f" ({node.log_message})" if node.log_message else ""), "bold"))
        for line in node.log.splitlines():
            out.write(f"  {plain(line)}")


def _sample(one: flight_pb2.GpuSample) -> tuple[object, ...]:
    faults = " ".join(filter(None, (one.error, *(f"Xid {number}" for number in one.xids))))
    return (
        _time(one.time),
        short(one.gpu_id),
        f"{one.utilization}%" if one.HasField("utilization") else "",
        size_text(one.memory_used_bytes) if one.HasField("memory_used_bytes") else "",
        f"{one.temperature_c} °C" if one.HasField("temperature_c") else "",
        f"{one.power_w:.0f} W" if one.HasField("power_w") else "",
        faults,
    )


def _events(events: Iterable[flight_pb2.ReplicaEvent]) -> Iterable[tuple[object, ...]]:
    return ((_time(one.time), one.state, one.message) for one in events)


def _time(stamp: Timestamp) -> str:
    """To the millisecond: here it is about what came first."""
    at = moment(stamp)
    return f"{at.astimezone():%Y-%m-%d %H:%M:%S}.{at.microsecond // 1000:03d}" if at else ""
