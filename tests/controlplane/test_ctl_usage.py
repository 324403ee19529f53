"""`ngpu usage` and `ngpu price` against a fake control plane: what is asked, and what is printed how."""

import csv
import io
import json

import pytest
from ngpu.v1 import task_pb2
from ngpu.v1 import usage_pb2 as pb

from tests.controlplane.ctl_fakes import NODE, TASK, FakeControlPlane, Ngpu, at


def a_row(**fields: object) -> pb.Usage:
    given = {"attempts": 3, "free_attempts": 1, "gpu_us": 7_500_000, "billed_gpu_us": 5_000_001, "cost": "0.000625000"}
    return pb.Usage(**{**given, **fields})  # type: ignore[arg-type]


def a_receipt(cause: task_pb2.Cause.ValueType = task_pb2.CAUSE_UNSPECIFIED) -> pb.Receipt:
    attempt = task_pb2.Attempt(
        number=1,
        node_addr=NODE,
        queue_time=at(1),
        assign_time=at(2),
        end_time=at(9),
        sent_after_us=1000,
        gpu_us=6_000_000,
        gpu_ids=["GPU-1", "GPU-2"],
        gpu_model="RTX 4090",
        http_status=200,
        price="0.000250000",
        cost="0.001500000",
    )
    if cause:
        attempt.failure.CopyFrom(task_pb2.Failure(cause=cause, reason="NODE_LOST", message="Lost."))
    return pb.Receipt(task_id=TASK, workspace="img2img", workspace_uid="w-1", account="=acme", attempt=attempt)


def test_usage_is_shown_grouped_as_asked(plane: FakeControlPlane, ngpu: Ngpu) -> None:
    plane.answers["GetUsage"] = [
        pb.GetUsageResponse(rows=[a_row(start_time=at(), account="acme")]),
        pb.GetUsageResponse(rows=[a_row(start_time=at(), account="")]),
    ]
    result = ngpu("usage", "--by", "account,day", "--from", "2026-01-01T00:00:00Z", "--to", "2026-02-01T00:00:00Z")
    asked = plane.last()
    assert list(asked.by) == [pb.USAGE_KEY_DAY, pb.USAGE_KEY_ACCOUNT]
    assert asked.filter.start_time.ToJsonString() == "2026-01-01T00:00:00Z"
    assert asked.filter.end_time.ToJsonString() == "2026-02-01T00:00:00Z"
    assert not asked.filter.HasField("account")
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[0] == ["DAY", "ACCOUNT", "ATTEMPTS", "FREE", "GPU", "TIME", "BILLED", "COST"]
    assert lines[1] == ["2026-01-31", "acme", "3", "1", "7.5s", "5s", "0.000625000"]
    assert lines[2][1] == "(none)"


def test_what_to_count_is_passed_on(plane: FakeControlPlane, ngpu: Ngpu) -> None:
    plane.answers["GetUsage"] = [pb.GetUsageResponse(rows=[a_row()])]
    ngpu("usage", "-w", "img2img", "--account", "", "--node", "node-1")
    asked = plane.last().filter
    assert (asked.workspace, asked.account, asked.node) == ("img2img", "", "node-1")
    assert asked.HasField("account")


def test_csv_is_exact_and_safe_for_spreadsheets(plane: FakeControlPlane, ngpu: Ngpu) -> None:
    row = a_row(start_time=at(), workspace="img2img", workspace_uid="w-1", account='=HYPERLINK("x", "y")')
    plane.answers["GetUsage"] = [pb.GetUsageResponse(rows=[row])]
    result = ngpu("usage", "--by", "hour,workspace,account", "--csv")
    (line,) = csv.DictReader(io.StringIO(result.stdout))
    assert line == {
        "start": "2026-01-31T14:00:00Z",
        "workspace": "img2img",
        "workspace_uid": "w-1",
        "account": '\'=HYPERLINK("x", "y")',
        "attempts": "3",
        "free_attempts": "1",
        "gpu_seconds": "7.500000",
        "billed_gpu_seconds": "5.000001",
        "cost": "0.000625000",
    }


def test_json_is_a_line_a_row(plane: FakeControlPlane, ngpu: Ngpu) -> None:
    plane.answers["GetUsage"] = [pb.GetUsageResponse(rows=[a_row(account="a"), a_row(account="b")])]
    lines = ngpu("usage", "--by", "account", "--json").stdout.splitlines()
    assert [json.loads(line)["account"] for line in lines] == ["a", "b"]
    assert json.loads(lines[0])["cost"] == "0.000625000"


def test_receipts_can_be_exported(plane: FakeControlPlane, ngpu: Ngpu) -> None:
    both = [a_receipt(), a_receipt(task_pb2.CAUSE_PLATFORM)]
    plane.answers["ListReceipts"] = [pb.ListReceiptsResponse(receipts=both)]
    paid, free = csv.DictReader(io.StringIO(ngpu("usage", "--receipts", "--csv").stdout))
    assert (paid["task"], paid["gpu_seconds"], paid["billed_gpu_seconds"]) == (TASK, "12.000000", "12.000000")
    assert (paid["queued"], paid["assigned"]) == ("2026-01-31T14:00:01Z", "2026-01-31T14:00:02Z")
    assert (paid["recorded"], paid["sent_after_seconds"]) == ("2026-01-31T14:00:09Z", "0.001000")
    assert (free["failure"], free["gpu_seconds"], free["billed_gpu_seconds"]) == ("NODE_LOST", "12.000000", "0.000000")
    shown = ngpu("usage", "--receipts").stdout
    assert "NODE_LOST (free)" in shown
    assert "0.001500000" in shown


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--by", "week"), "there is no 'week'"),
        (("--receipts", "--by", "day"), "not grouped"),
        (("--csv", "--json"), "do not go together"),
        (("--from", "yesterday"), "--from"),
    ],
)
def test_wrong_usage_is_told(ngpu: Ngpu, options: tuple[str, ...], says: str) -> None:
    assert says in ngpu("usage", *options, code=2).stderr


def test_a_price_is_set(plane: FakeControlPlane, ngpu: Ngpu) -> None:
    plane.answers["SetPrice"] = lambda asked: pb.SetPriceResponse(
        price=pb.Price(gpu_model=asked.price.gpu_model, price="0.000125000", effective_time=at())
    )
    result = ngpu("price", "set", "0.000125", "--gpu", "RTX 4090")
    assert plane.last().price == pb.Price(gpu_model="RTX 4090", price="0.000125")
    assert "A second of RTX 4090 costs 0.000125000 from" in result.stdout
    ngpu("price", "set", "1", "--from", "2099-01-01T00:00:00Z")
    assert plane.last().price.effective_time.ToJsonString() == "2099-01-01T00:00:00Z"


def test_prices_are_listed_with_which_of_them_hold(plane: FakeControlPlane, ngpu: Ngpu) -> None:
    later = at()
    later.seconds += 100 * 366 * 86400
    plane.answers["ListPrices"] = pb.ListPricesResponse(
        prices=[
            pb.Price(price="0.1", effective_time=at()),
            pb.Price(gpu_model="4090", price="0.2", effective_time=at()),
            pb.Price(gpu_model="4090", price="0.3", effective_time=at(1)),
            pb.Price(gpu_model="4090", price="0.4", effective_time=later),
        ]
    )
    lines = ngpu("price", "list").stdout.splitlines()[1:]
    assert [next(word for word in ("now", "over", "to come") if word in line) for line in lines] == [
        "now",
        "over",
        "now",
        "to come",
    ]
    plane.answers["ListPrices"] = pb.ListPricesResponse()
    assert "costs nothing" in ngpu("price", "list").stdout
