"""Nothing is lost or invented between plain values and messages."""

import base64
from datetime import UTC, datetime

import msgspec
import pytest
from google.protobuf.descriptor import Descriptor
from ngpu.v1 import http_pb2, node_pb2, task_pb2, workspace_pb2

from controlplane import model, report
from controlplane.api import translate
from controlplane.deployer import Assignment
from controlplane.dispatcher import TaskView
from controlplane.explain import Candidate, Decision
from controlplane.model import Cause, Delivery, State
from controlplane.slots import Failure, Request, Response, Start
from controlplane.spec import GIB, GpuNeed, JobRule, Limits, Readiness, Registry, Scale, Spec, Volume

NOW = datetime(2026, 2, 3, 4, 5, 6, 789_012, tzinfo=UTC)

FULL = Spec(
    name="sd",
    image="registry.example/sd:1",
    ports=(7860, 8000),
    command=("python", "serve.py"),
    env={"TOKEN": "secret", "MODE": "fast"},
    gpu=GpuNeed("RTX 4090", 1, 8 * GIB, share=250),
    replicas=3,
    concurrency=4,
    cpus=2.5,
    memory_bytes=8 * GIB,
    shm_bytes=GIB,
    readiness=Readiness("/ready", 8000, 30.5),
    registry=Registry("user", "password"),
    limits=Limits(1.5, 2.0, 3.0, 4, 5, 6, 7, 8),
    repeatable=False,
    writable_paths=("/cache",),
    account="acme",
    scale=Scale(1, 5, 60.0, 2.5),
    volumes=(Volume("models", "/models"), Volume("hub", "/root/.cache")),
    jobs=(
        JobRule(
            preset="ngpu-classic",
            start="POST /render",
            id=("/id", "/job/id"),
            ask="GET /jobs/{id}",
            cancel="DELETE /jobs/{id}",
            state="/status",
            accepted=("taken",),
            done=("ok", "HTTP 200"),
            running=("runs",),
            waiting=("waits",),
            failed=("failed",),
            busy=("HTTP 503",),
            output="/out",
            message="/why",
            poll_s=0.5,
            limit_s=9.0,
        ),
    ),
)


def test_spec_survives_the_wire() -> None:
    assert translate.spec_of(translate.spec(FULL, secrets=True)) == FULL


def test_spec_is_shown_without_secrets() -> None:
    shown = translate.spec(FULL, secrets=False)
    assert dict(shown.env) == {"TOKEN": "", "MODE": ""}
    assert shown.registry.username == "user"
    assert "password" not in str(shown)
    assert "secret" not in str(shown)


def test_what_is_not_said_takes_its_default() -> None:
    said = workspace_pb2.WorkspaceSpec(name="a", image="b", ports=[80], replicas=1)
    assert translate.spec_of(said) == Spec(name="a", image="b", ports=(80,))
    # 0 replicas are allowed: registered, not running.
    said.replicas = 0
    assert translate.spec_of(said).replicas == 0


@pytest.mark.parametrize("time", [NOW, model.EPOCH, datetime(1969, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)])
def test_times_survive_the_wire(time: datetime) -> None:
    stamp = translate.timestamp(time)
    assert stamp is not None
    assert translate.time_of(stamp) == time
    assert stamp.ToDatetime(UTC) == time


@pytest.mark.parametrize("seconds", [0.0, 0.25, 3600.0, 1.000_000_001])
def test_durations_survive_the_wire(seconds: float) -> None:
    assert translate.seconds_of(translate.duration(seconds)) == pytest.approx(seconds, abs=1e-9)


def test_report_survives_the_wire() -> None:
    message = node_pb2.HeartbeatRequest(
        inventory=node_pb2.Inventory(
            gpus=[node_pb2.Gpu(id="GPU-1", model="A100", memory_bytes=80 * GIB, index=3, pci_bus_id="0:1")],
            cpus=8.5,
            memory_bytes=1,
            disk_free_bytes=2,
            engine="docker",
            engine_version="28",
            driver_version="550",
            cuda_version="12",
            os="linux",
            daemon_version="0.1",
            gpu_message="one is missing",
            volume_limit_bytes=7,
        ),
        readings=[
            node_pb2.GpuReading(gpu_id="GPU-1", temperature_c=0, xids=[79, 31], row_remap_failed=False),
            node_pb2.GpuReading(gpu_id="GPU-2", error="lost"),
        ],
        replicas=[
            node_pb2.ReplicaReport(
                replica_id="r-1",
                state=workspace_pb2.REPLICA_STATE_READY,
                progress=100,
                message="m",
                capacity=2,
                restarts=1,
                spec_hash="h",
                image_digest="d",
            )
        ],
        images=[node_pb2.CachedImage(reference="i", size_bytes=5)],
        attempt_ids=["t.1"],
        goodbye=True,
        volumes=[node_pb2.KeptVolume(workspace_uid="w-1", name="models", size_bytes=6)],
    )
    assert translate.report_of(message) == report.Report(
        inventory=report.Inventory(
            (report.Gpu("GPU-1", "A100", 80 * GIB, 3, "0:1"),),
            8.5,
            1,
            2,
            "docker",
            "28",
            "550",
            "12",
            "linux",
            "0.1",
            "one is missing",
            7,
        ),
        # A reading of 0 is a reading; one that is not offered is None.
        readings=(
            report.GpuReading("GPU-1", temperature_c=0, xids=(79, 31), row_remap_failed=False),
            report.GpuReading("GPU-2", error="lost"),
        ),
        replicas=(report.ReplicaReport("r-1", report.ReplicaState.READY, 100, "m", 2, 1, "h", "d"),),
        images=(report.CachedImage("i", 5),),
        attempt_ids=("t.1",),
        goodbye=True,
        volumes=(report.KeptVolume("w-1", "models", 6),),
    )
    assert translate.inventory(translate.inventory_of(message.inventory)) == message.inventory


def test_unknown_state_of_a_replica_is_refused() -> None:
    message = node_pb2.HeartbeatRequest(replicas=[node_pb2.ReplicaReport(replica_id="r-1")])
    with pytest.raises(ValueError, match="0"):
        translate.report_of(message)


def test_task_with_everything() -> None:
    view = TaskView(
        task_id="t",
        workspace_uid="w-1",
        state=State.FAILED,
        attempt=3,
        create_time=NOW,
        start_time=NOW,
        end_time=NOW,
        failure=Failure(Cause.PLATFORM, "NODE_LOST", "The node was lost."),
        queue_position=4,
        waiting_for="a slot",
    )
    message = task_pb2.Task()
    translate.fill_task(message, view)
    assert (message.task_id, message.state, message.attempt) == ("t", task_pb2.TASK_STATE_FAILED, 3)
    for stamp in (message.create_time, message.start_time, message.end_time):
        assert translate.time_of(stamp) == NOW
    assert message.failure == task_pb2.Failure(cause=2, reason="NODE_LOST", message="The node was lost.")  # type: ignore[arg-type]
    # Only while it is queued.
    assert (message.queue_position, message.waiting_for) == (0, "")


def test_task_that_waits() -> None:
    message = task_pb2.Task()
    view = TaskView("t", "w-1", State.QUEUED, 0, NOW, queue_position=4, waiting_for="a slot")
    translate.fill_task(message, view)
    assert (message.queue_position, message.waiting_for) == (4, "a slot")
    assert not message.HasField("start_time")
    assert not message.HasField("end_time")
    assert not message.HasField("failure")


HEADERS = (("Content-Type", b"text/plain"), ("X-A", b"\xff"), ("X-A", b"2"))


def test_response_is_cut_where_it_is_too_long() -> None:
    plain = Response(200, HEADERS, b"12345", 5, is_utf8=True)
    whole, cut = http_pb2.HttpResponse(), http_pb2.HttpResponse()
    translate.fill_response(whole, plain, 5)
    translate.fill_response(cut, plain, 4)
    assert translate.response_of(whole) == plain
    assert (cut.body.inline, cut.body.size, cut.body.is_utf8) == (b"", 5, True)


def test_start_says_all_that_a_node_needs() -> None:
    message = node_pb2.Start()
    translate.fill_start(
        message,
        Start("t.1", "r-1", 80, Request("POST", "/p", "q=1", HEADERS, b"body", 4), 1.5, 99, streamed=True),
    )
    assert message == node_pb2.Start(
        attempt_id="t.1",
        replica_id="r-1",
        port=80,
        request=http_pb2.HttpRequest(
            method="POST",
            path="/p",
            query="q=1",
            headers=[http_pb2.Header(name=name, value=value) for name, value in HEADERS],
            body=http_pb2.Body(inline=b"body", size=4),
        ),
        run_time_limit_ms=1500,
        response_body_limit_bytes=99,
        streamed=True,
    )


def test_result_is_a_response_or_a_failure() -> None:
    stamp = translate.timestamp(NOW)
    answered = translate.result_of(
        node_pb2.Result(
            attempt_id="t.1",
            delivery=task_pb2.DELIVERY_ANSWERED,
            response=http_pb2.HttpResponse(status=503, body=http_pb2.Body(inline=b"x")),
            sent_after_us=1,
            first_byte_after_us=2,
            last_byte_after_us=3,
            gpu_us=4,
            end_time=stamp,
        )
    )
    assert answered.response == Response(503, (), b"x", 1)
    assert answered.failure is None
    assert (answered.sent_after_us, answered.first_byte_after_us, answered.last_byte_after_us) == (1, 2, 3)
    assert (answered.gpu_us, answered.end_time, answered.delivery) == (4, NOW, Delivery.ANSWERED)
    failed = translate.result_of(
        node_pb2.Result(
            attempt_id="t.1",
            delivery=task_pb2.DELIVERY_SENT,
            failure=task_pb2.Failure(cause=task_pb2.CAUSE_CUSTOMER, reason="CONTAINER_EXITED", message="m"),
        )
    )
    assert failed.response is None
    assert failed.failure == Failure(Cause.CUSTOMER, "CONTAINER_EXITED", "m")


@pytest.mark.parametrize(
    "message",
    [
        node_pb2.Result(attempt_id="t.1"),
        node_pb2.Result(attempt_id="t.1", delivery=task_pb2.DELIVERY_SENT, failure=task_pb2.Failure(reason="X")),
    ],
)
def test_result_that_says_too_little_is_refused(message: node_pb2.Result) -> None:
    with pytest.raises(ValueError, match="0"):
        translate.result_of(message)


def test_rows_are_shown_as_they_are() -> None:
    json = msgspec.json.encode([[name, base64.b64encode(value).decode()] for name, value in HEADERS])
    assert translate.headers_of_row(json) == HEADERS
    row = model.Task(
        id="t",
        workspace_uid="w-1",
        state=State.CANCELLED,
        create_time=NOW,
        end_time=NOW,
        port=80,
        method="GET",
        path="/",
        attempt=2,
        cause=1,
        failure_reason="CANCELLED",
        failure_message="It was cancelled.",
    )
    message = translate.task_of_row(row)
    assert (message.state, message.attempt) == (task_pb2.TASK_STATE_CANCELLED, 2)
    assert message.failure.reason == "CANCELLED"
    attempt = translate.attempt_of_row(
        model.Attempt(
            task_id="t",
            number=1,
            replica_id="r-1",
            node_addr="0x1",
            node_ip="192.0.2.1",
            gpu_ids_json=b'["GPU-1"]',
            delivery=Delivery.SENT,
            assign_time=NOW,
            end_time=NOW,
            gpu_us=5,
            cause=2,
            failure_reason="NODE_LOST",
            failure_message="m",
            reason="free",
        )
    )
    assert list(attempt.gpu_ids) == ["GPU-1"]
    assert attempt.failure.reason == "NODE_LOST"
    assert (attempt.node_ip, attempt.reason, attempt.gpu_us) == ("192.0.2.1", "free", 5)


def test_node_gets_secrets_and_whether_it_drains() -> None:
    message = translate.assignment(Assignment("r-1", "sd", 2, FULL, ("GPU-1",), "hash", True, "w-1"))
    assert message.workspace_uid == "w-1"
    assert translate.spec_of(message.spec) == FULL
    assert (message.replica_id, message.workspace_name, message.generation) == ("r-1", "sd", 2)
    assert (list(message.gpu_ids), message.spec_hash, message.draining) == (["GPU-1"], "hash", True)


def test_decision_keeps_every_part() -> None:
    message = translate.decision(
        Decision(NOW, "replica r-1", "0x1", (Candidate("0x1", "n", "", {"load": 0.5}, 0.5),), {"cordoned": 2})
    )
    assert dict(message.candidates[0].parts) == {"load": 0.5}
    assert dict(message.refusals) == {"cordoned": 2}
    assert (message.subject, message.chosen) == ("replica r-1", "0x1")


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        (State, task_pb2.TaskState),
        (Delivery, task_pb2.Delivery),
        (Cause, task_pb2.Cause),
        (report.ReplicaState, workspace_pb2.ReplicaState),
    ],
)
def test_numbers_are_the_wires(plain: type[State], message: object) -> None:
    wire = {name.rsplit("STATE_")[-1].rsplit("DELIVERY_")[-1].rsplit("CAUSE_")[-1]: n for name, n in message.items()}  # type: ignore[attr-defined]
    wire.pop("UNSPECIFIED")
    assert {state.name: state.value for state in plain} == wire


def test_every_field_of_a_spec_is_translated() -> None:
    def names(descriptor: Descriptor) -> set[str]:
        return {field.name for field in descriptor.fields}

    assert names(workspace_pb2.WorkspaceSpec.DESCRIPTOR) == set(Spec.__struct_fields__)
