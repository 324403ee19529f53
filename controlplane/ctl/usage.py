"""`ngpu usage`: what was used and what it cost, as a table, as CSV or as JSON."""

import csv
import json
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Annotated, Any, Final

import grpc
import typer
from google.protobuf.json_format import MessageToDict
from google.protobuf.timestamp_pb2 import Timestamp
from ngpu.v1 import task_pb2
from ngpu.v1 import usage_pb2 as pb

from controlplane.ctl.command import connected
from controlplane.ctl.output import cell, short, table
from controlplane.ctl.problem import Exit, Problem
from controlplane.ctl.session import Session
from controlplane.ctl.units import duration_text, moment, parse_time

#: What usage can be grouped by, and the columns that this makes.
KEYS: Final = {
    "day": (pb.USAGE_KEY_DAY, ("start",)),
    "hour": (pb.USAGE_KEY_HOUR, ("start",)),
    "workspace": (pb.USAGE_KEY_WORKSPACE, ("workspace", "workspace_uid")),
    "account": (pb.USAGE_KEY_ACCOUNT, ("account",)),
    "node": (pb.USAGE_KEY_NODE, ("node", "node_addr")),
    "gpu-model": (pb.USAGE_KEY_GPU_MODEL, ("gpu_model",)),
}
SUMS: Final = ("attempts", "free_attempts", "gpu_seconds", "billed_gpu_seconds", "cost")
#: A spreadsheet takes what begins so for a formula.
_FORMULA: Final = ("=", "+", "-", "@", "\t", "\r")


@connected
def usage(
    session: Session,
    *,
    workspace: Annotated[str, typer.Option("--workspace", "-w", help="Only of this one: name or id.")] = "",
    account: Annotated[str | None, typer.Option(help="Only of workspaces of this account.")] = None,
    node: Annotated[str, typer.Option(help="Only what this node did (and earned): name or address.")] = "",
    since: Annotated[str, typer.Option("--from", metavar="TIME", help="A date, a time, or how long ago: 12h.")] = "30d",
    until: Annotated[str | None, typer.Option("--to", metavar="TIME", help="The same; exclusive. Else now.")] = None,
    by: Annotated[
        str, typer.Option(metavar="KEYS", help=f"What to group by, with commas between: {', '.join(KEYS)}.")
    ] = "",
    receipts: Annotated[bool, typer.Option("--receipts", help="Each attempt's receipt instead of sums.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="As CSV with a line of headings.")] = False,
) -> None:
    """Show GPU time and its cost: the sum of receipts, one for each attempt of a task, whenever it is asked for.

    What the platform made fail is listed as free. Hours and days are UTC; an attempt counts for when its end was
    recorded. With --json each line is one message of the API.

    \b
    Examples:
      ngpu usage --from 2026-01-01 --to 2026-02-01 --by account,gpu-model
      ngpu usage -w img2img --by day --csv > january.csv
      ngpu usage --node gpu-box-7 --from 7d --by hour
      ngpu usage -w img2img --from 1h --receipts --json
    """
    keys = [key.strip() for key in by.split(",") if key.strip()]
    if unknown := [key for key in keys if key not in KEYS]:
        raise Problem(f"--by: there is no {unknown[0]!r}; there are {', '.join(KEYS)}.", Exit.USAGE)
    if receipts and keys:
        raise Problem("--receipts are not grouped: leave --by out.", Exit.USAGE)
    if as_csv and session.out.json:
        raise Problem("--csv and --json do not go together.", Exit.USAGE)
    chosen = pb.ReceiptFilter(workspace=workspace, node=node, account=account)
    for option, text, field in (("--from", since, chosen.start_time), ("--to", until, chosen.end_time)):
        if text is not None:
            try:
                field.FromDatetime(parse_time(text, session.now))
            except ValueError as error:
                raise Problem(f"{option}: {error}", Exit.USAGE) from error
    try:
        if receipts:
            _receipts(session, chosen, as_csv=as_csv)
        else:
            # In the order of the rows.
            _sums(session, chosen, [key for key in KEYS if key in keys], as_csv=as_csv)
    except grpc.RpcError as error:
        raise session.problem(error) from error


def _sums(session: Session, chosen: pb.ReceiptFilter, keys: list[str], *, as_csv: bool) -> None:
    request = pb.GetUsageRequest(filter=chosen, by=[KEYS[key][0] for key in keys])
    pages = session.stream(session.usage.GetUsage, request, limit_s=None)
    rows = (row for page in pages for row in page.rows)
    columns = (*(column for key in keys for column in KEYS[key][1]), *SUMS)
    if as_csv:
        _write_csv(columns, (_facts(row) for row in rows))
    elif session.out.json:
        _write_json(session, rows)
    else:
        shown = [_sum_shown(row, keys) for row in rows]
        if not shown:
            session.out.show(cell("Nothing was used in that time.", "dim"))
            return
        headers = [*(key.upper() for key in keys), "ATTEMPTS", "FREE", "GPU TIME", "BILLED", "COST"]
        session.out.show(table(*headers, rows=shown, right=headers[len(keys) :]))


def _receipts(session: Session, chosen: pb.ReceiptFilter, *, as_csv: bool) -> None:
    pages = session.stream(session.usage.ListReceipts, pb.ListReceiptsRequest(filter=chosen), limit_s=None)
    rows = (row for page in pages for row in page.receipts)
    if as_csv:
        _write_csv(tuple(_receipt_facts(pb.Receipt())), (_receipt_facts(row) for row in rows))
    elif session.out.json:
        _write_json(session, rows)
    else:
        headers = ("TASK", "ATTEMPT", "WORKSPACE", "NODE", "RECORDED", "GPU TIME", "COST", "OUTCOME")
        for page in pages:
            shown = [_receipt_shown(row) for row in page.receipts]
            session.out.show(table(*headers, rows=shown, right=("ATTEMPT", "GPU TIME", "COST")))


def _facts(row: pb.Usage) -> dict[str, object]:
    return {
        "start": _time(row.start_time),
        "workspace": row.workspace,
        "workspace_uid": row.workspace_uid,
        "account": row.account,
        "node": row.node_name,
        "node_addr": row.node_addr,
        "gpu_model": row.gpu_model,
        "attempts": row.attempts,
        "free_attempts": row.free_attempts,
        "gpu_seconds": _seconds(row.gpu_us),
        "billed_gpu_seconds": _seconds(row.billed_gpu_us),
        "cost": row.cost,
    }


def _receipt_facts(row: pb.Receipt) -> dict[str, object]:
    one = row.attempt
    gpu_us = one.gpu_us * len(one.gpu_ids)
    free = one.failure.cause == task_pb2.CAUSE_PLATFORM
    return {
        "task": row.task_id,
        "attempt": one.number,
        "workspace": row.workspace,
        "workspace_uid": row.workspace_uid,
        "account": row.account,
        "node_addr": one.node_addr,
        "gpu_model": one.gpu_model,
        "gpus": len(one.gpu_ids),
        "queued": _time(one.queue_time),
        "assigned": _time(one.assign_time),
        "sent_after_seconds": _seconds(one.sent_after_us),
        "first_byte_after_seconds": _seconds(one.first_byte_after_us),
        "last_byte_after_seconds": _seconds(one.last_byte_after_us),
        "recorded": _time(one.end_time),
        "http_status": one.http_status,
        "failure": one.failure.reason,
        "gpu_seconds": _seconds(gpu_us),
        "billed_gpu_seconds": _seconds(0 if free else gpu_us),
        "price": one.price,
        "cost": one.cost,
    }


def _sum_shown(row: pb.Usage, keys: list[str]) -> tuple[object, ...]:
    start = moment(row.start_time)
    by_key = {
        "day": f"{start:%Y-%m-%d}" if start else "",
        "hour": f"{start:%Y-%m-%d %H:00}" if start else "",
        "workspace": row.workspace,
        "account": row.account or "(none)",
        "node": row.node_name or short(row.node_addr),
        "gpu-model": row.gpu_model or "(no GPU)",
    }
    times = (duration_text(us / 1e6) for us in (row.gpu_us, row.billed_gpu_us))
    return (*(by_key[key] for key in keys), row.attempts, row.free_attempts, *times, row.cost)


def _receipt_shown(row: pb.Receipt) -> tuple[object, ...]:
    one = row.attempt
    outcome = one.failure.reason or f"status {one.http_status}"
    held = duration_text(one.gpu_us * len(one.gpu_ids) / 1e6)
    free = " (free)" if one.failure.cause == task_pb2.CAUSE_PLATFORM else ""
    node, recorded = short(one.node_addr), _time(one.end_time)
    return row.task_id, one.number, row.workspace, node, recorded, held, one.cost, outcome + free


def _write_json(session: Session, rows: Iterator[Any]) -> None:
    """A line a row: there may be more of them than memory."""
    for row in rows:
        content = MessageToDict(row, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
        session.out.write(json.dumps(content, ensure_ascii=False))


def _write_csv(columns: tuple[str, ...], rows: Iterator[dict[str, object]]) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([_safe(row[column]) for column in columns])


def _safe(value: object) -> object:
    # Names and accounts are others' words.
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value


def _seconds(us: int) -> str:
    """Exact: sums of what is printed are sums of what was counted."""
    return f"{us // 1_000_000}.{us % 1_000_000:06d}"


def _time(stamp: Timestamp) -> str:
    at: datetime | None = moment(stamp)
    return at.astimezone(UTC).isoformat().replace("+00:00", "Z") if at else ""
