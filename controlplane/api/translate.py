"""Plain values to messages and back: nothing is decided here.

Bodies pass through as the bytes they are; protobuf copies them once, when it builds the message.
"""

from datetime import datetime, timedelta

import msgspec
from google.protobuf.duration_pb2 import Duration
from google.protobuf.internal.containers import RepeatedCompositeFieldContainer
from google.protobuf.timestamp_pb2 import Timestamp
from msgspec.structs import replace
from ngpu.image import PATTERNS
from ngpu.v1 import fleet_pb2, http_pb2, node_pb2, task_pb2, workspace_pb2

from controlplane import model, report
from controlplane.deployer import Assignment
from controlplane.dispatcher import TaskView
from controlplane.explain import Decision
from controlplane.jobs import resolved
from controlplane.model import EPOCH, MICROSECOND
from controlplane.prices import amount_text
from controlplane.slots import AttemptResult, Failure, Headers, Response, Start
from controlplane.spec import GpuNeed, JobRule, Limits, Readiness, Registry, Scale, Spec, Volume

_HEADERS = msgspec.json.Decoder(Headers)
_DEFAULT = Spec(name="", image="", ports=())


def timestamp(time: datetime | None) -> Timestamp | None:
    """A time on the wire; None stays unset."""
    if time is None:
        return None
    microseconds = (time - EPOCH) // MICROSECOND
    return Timestamp(seconds=microseconds // 1_000_000, nanos=microseconds % 1_000_000 * 1000)


def time_of(stamp: Timestamp) -> datetime:
    """A time off the wire, to the microsecond."""
    return EPOCH + timedelta(seconds=stamp.seconds, microseconds=stamp.nanos // 1000)


def seconds_of(duration: Duration) -> float:
    """A duration off the wire; unset is 0."""
    return duration.seconds + duration.nanos / 1e9


def duration(seconds: float) -> Duration:
    """A duration on the wire."""
    whole = int(seconds)
    return Duration(seconds=whole, nanos=round((seconds - whole) * 1e9))


def fill_time(stamp: Timestamp, time: datetime) -> None:
    """Set a time within a message that is being built."""
    microseconds = (time - EPOCH) // MICROSECOND
    stamp.seconds = microseconds // 1_000_000
    stamp.nanos = microseconds % 1_000_000 * 1000


def fill_task(message: task_pb2.Task, view: TaskView) -> None:
    """Set a task within a message that is being built: on the hot path, so nothing is built twice."""
    message.task_id = view.task_id
    message.state = view.state.value  # type: ignore[assignment]
    message.attempt = view.attempt
    fill_time(message.create_time, view.create_time)
    if view.start_time is not None:
        fill_time(message.start_time, view.start_time)
    if view.end_time is not None:
        fill_time(message.end_time, view.end_time)
    if view.failure is not None:
        fill_failure(message.failure, view.failure.cause, view.failure.reason, view.failure.message)
    if view.state is model.State.QUEUED:
        fill_wait(message, view)


def fill_wait(message: task_pb2.Task, view: TaskView) -> None:
    """Set a queued task's place and why it waits within a message that is being built."""
    message.queue_position = view.queue_position
    message.waiting_for = view.waiting_for
    if view.expected_wait_s:
        message.expected_wait.CopyFrom(duration(view.expected_wait_s))


def fill_failure(message: task_pb2.Failure, cause: int, reason: str, words: str) -> None:
    """Set a failure within a message that is being built."""
    message.cause = cause  # type: ignore[assignment]
    message.reason = reason
    message.message = words


def fill_response(message: http_pb2.HttpResponse, response: Response, max_inline_bytes: int) -> None:
    """Set a response within a message that is being built; a body over `max_inline_bytes` is cut."""
    message.status = response.status
    fill_headers(message.headers, response.headers)
    body = message.body
    body.size = response.size
    body.is_utf8 = response.is_utf8
    if len(response.body) <= max_inline_bytes:
        body.inline = response.body


def fill_headers(message: RepeatedCompositeFieldContainer[http_pb2.Header], headers: Headers) -> None:
    """Set headers within a message that is being built."""
    for name, value in headers:
        message.add(name=name, value=value)


def fill_start(message: node_pb2.Start, start: Start) -> None:
    """Set an attempt's start within a message that is being built."""
    message.attempt_id = start.attempt_id
    message.replica_id = start.replica_id
    message.port = start.port
    message.run_time_limit_ms = round(start.run_time_limit_s * 1000)
    if start.record_after_s < start.run_time_limit_s:
        message.record_after_ms = round(start.record_after_s * 1000)
    message.response_body_limit_bytes = start.response_body_limit_bytes
    message.streamed = start.streamed
    if start.concurrency:
        message.concurrency = start.concurrency
        message.wait_limit_ms = round(start.wait_limit_s * 1000)
    if start.job is not None:
        message.job.CopyFrom(job_rule(start.job))
    plain, request = start.request, message.request
    request.method = plain.method
    request.path = plain.path
    request.query = plain.query
    fill_headers(request.headers, plain.headers)
    request.body.size = plain.size
    request.body.inline = plain.body


def task_of_row(row: model.Task) -> task_pb2.Task:
    """A recorded task on the wire."""
    message = task_pb2.Task(
        task_id=row.id,
        state=int(row.state),  # type: ignore[arg-type]
        attempt=row.attempt,
        create_time=timestamp(row.create_time),
        start_time=timestamp(row.start_time),
        end_time=timestamp(row.end_time),
    )
    if row.failure_reason:
        fill_failure(message.failure, row.cause, row.failure_reason, row.failure_message)
    return message


def attempt_of_row(row: model.Attempt) -> task_pb2.Attempt:
    """A recorded attempt on the wire."""
    message = task_pb2.Attempt(
        number=row.number,
        replica_id=row.replica_id,
        node_addr=row.node_addr,
        node_ip=row.node_ip,
        delivery=int(row.delivery),  # type: ignore[arg-type]
        assign_time=timestamp(row.assign_time),
        end_time=timestamp(row.end_time),
        sent_after_us=row.sent_after_us,
        first_byte_after_us=row.first_byte_after_us,
        last_byte_after_us=row.last_byte_after_us,
        gpu_us=row.gpu_us,
        gpu_ids=msgspec.json.decode(row.gpu_ids_json, type=list[str]),
        http_status=row.http_status,
        reason=row.reason,
        queue_time=timestamp(row.queue_time),
        gpu_model=row.gpu_model,
        price=amount_text(row.price_nanos),
        cost=amount_text(row.cost_nanos),
    )
    if row.failure_reason:
        fill_failure(message.failure, row.cause, row.failure_reason, row.failure_message)
    return message


def headers_of_row(json: bytes) -> Headers:
    """Headers as they are recorded."""
    return _HEADERS.decode(json)


def result_of(message: node_pb2.Result) -> AttemptResult:
    """The end of an attempt off the wire. Raises ValueError for a delivery or cause this version does not know."""
    response = failure = None
    if message.HasField("failure"):
        failed = message.failure
        failure = Failure(model.Cause(failed.cause), failed.reason, failed.message)
    else:
        response = response_of(message.response)
    return AttemptResult(
        attempt_id=message.attempt_id,
        delivery=model.Delivery(message.delivery),
        response=response,
        failure=failure,
        sent_after_us=message.sent_after_us,
        first_byte_after_us=message.first_byte_after_us,
        last_byte_after_us=message.last_byte_after_us,
        gpu_us=message.gpu_us,
        end_time=time_of(message.end_time) if message.HasField("end_time") else None,
        job_id=message.job_id,
        waited_us=message.waited_us,
    )


def response_of(message: http_pb2.HttpResponse) -> Response:
    """A response off the wire."""
    body = message.body
    return Response(
        status=message.status,
        headers=tuple([(header.name, header.value) for header in message.headers]),
        body=body.inline,
        size=body.size or len(body.inline),
        is_utf8=body.is_utf8,
    )


def assignment(plain: Assignment) -> node_pb2.Assignment:
    """A replica that should run, for its node: with secrets."""
    return node_pb2.Assignment(
        replica_id=plain.replica_id,
        workspace_name=plain.workspace_name,
        generation=plain.generation,
        spec=spec(plain.spec, secrets=True),
        gpu_ids=plain.gpu_ids,
        spec_hash=plain.spec_hash,
        draining=plain.draining,
        workspace_uid=plain.workspace_uid,
    )


def decision(plain: Decision) -> fleet_pb2.Decision:
    """A choice between candidates on the wire."""
    return fleet_pb2.Decision(
        time=timestamp(plain.time),
        subject=plain.subject,
        chosen=plain.chosen,
        candidates=[
            fleet_pb2.Candidate(id=one.id, name=one.name, refusal=one.refusal, parts=one.parts, cost=one.cost)
            for one in plain.candidates
        ],
        refusals=plain.refusals,
    )


def spec_of(message: workspace_pb2.WorkspaceSpec) -> Spec:
    """A spec off the wire: what is 0 or unset takes its default. Not checked."""
    limits, default = message.limits, _DEFAULT.limits
    return Spec(
        name=message.name,
        image=message.image,
        ports=tuple(message.ports),
        command=tuple(message.command),
        env=dict(message.env),
        gpu=GpuNeed(message.gpu.model, message.gpu.count, message.gpu.min_memory_bytes, share=message.gpu.share_milli),
        replicas=message.replicas,
        concurrency=message.concurrency or _DEFAULT.concurrency,
        cpus=message.cpus or _DEFAULT.cpus,
        memory_bytes=message.memory_bytes or _DEFAULT.memory_bytes,
        shm_bytes=message.shm_bytes or _DEFAULT.shm_bytes,
        readiness=Readiness(
            message.readiness.path,
            message.readiness.port,
            seconds_of(message.readiness.start_limit) or _DEFAULT.readiness.start_limit_s,
        ),
        registry=Registry(message.registry.username, message.registry.password),
        limits=Limits(
            queue_time_s=seconds_of(limits.queue_time) or default.queue_time_s,
            run_time_s=seconds_of(limits.run_time) or default.run_time_s,
            total_time_s=seconds_of(limits.total_time) or default.total_time_s,
            request_body_bytes=limits.request_body_bytes or default.request_body_bytes,
            response_body_bytes=limits.response_body_bytes or default.response_body_bytes,
            queue_length=limits.queue_length or default.queue_length,
            max_attempts=limits.max_attempts or default.max_attempts,
            rate=limits.rate or default.rate,
        ),
        repeatable=message.repeatable if message.HasField("repeatable") else _DEFAULT.repeatable,
        cancel_on_hangup=(
            message.cancel_on_hangup if message.HasField("cancel_on_hangup") else _DEFAULT.cancel_on_hangup
        ),
        writable_paths=tuple(message.writable_paths),
        account=message.account,
        scale=Scale(
            message.scale.min_replicas,
            message.scale.max_replicas,
            seconds_of(message.scale.idle_time) or _DEFAULT.scale.idle_time_s,
            seconds_of(message.scale.queue_wait) or _DEFAULT.scale.queue_wait_s,
        ),
        jobs=tuple(resolved(_job_rule_of(rule)) for rule in message.jobs),
        volumes=tuple(Volume(volume.name, volume.path) for volume in message.volumes),
        hedge=message.hedge,
    )


def _job_rule_of(message: workspace_pb2.JobRule) -> JobRule:
    return JobRule(
        preset=message.preset,
        start=message.start,
        id=tuple(message.id),
        ask=message.ask,
        cancel=message.cancel,
        state=message.state,
        accepted=tuple(message.accepted),
        done=tuple(message.done),
        running=tuple(message.running),
        waiting=tuple(message.waiting),
        failed=tuple(message.failed),
        busy=tuple(message.busy),
        output=message.output,
        message=message.message,
        poll_s=seconds_of(message.poll),
        limit_s=seconds_of(message.limit),
    )


def job_rule(plain: JobRule) -> workspace_pb2.JobRule:
    """A rule for jobs on the wire."""
    return workspace_pb2.JobRule(
        preset=plain.preset,
        start=plain.start,
        id=plain.id,
        ask=plain.ask,
        cancel=plain.cancel,
        state=plain.state,
        accepted=plain.accepted,
        done=plain.done,
        running=plain.running,
        waiting=plain.waiting,
        failed=plain.failed,
        busy=plain.busy,
        output=plain.output,
        message=plain.message,
        poll=duration(plain.poll_s),
        limit=duration(plain.limit_s) if plain.limit_s else None,
    )


def spec(plain: Spec, *, secrets: bool) -> workspace_pb2.WorkspaceSpec:
    """A spec on the wire. Without `secrets` the environment's values and the registry's password stay behind."""
    message = workspace_pb2.WorkspaceSpec(
        name=plain.name,
        image=plain.image,
        command=plain.command,
        env=plain.env if secrets else dict.fromkeys(plain.env, ""),
        gpu=workspace_pb2.GpuNeed(
            model=plain.gpu.model,
            count=plain.gpu.count,
            min_memory_bytes=plain.gpu.min_memory_bytes,
            share_milli=plain.gpu.share,
        ),
        ports=plain.ports,
        replicas=plain.replicas,
        concurrency=plain.concurrency,
        cpus=plain.cpus,
        memory_bytes=plain.memory_bytes,
        shm_bytes=plain.shm_bytes,
        readiness=workspace_pb2.Readiness(
            path=plain.readiness.path,
            port=plain.readiness.port,
            start_limit=duration(plain.readiness.start_limit_s),
        ),
        limits=workspace_pb2.Limits(
            queue_time=duration(plain.limits.queue_time_s),
            run_time=duration(plain.limits.run_time_s),
            total_time=duration(plain.limits.total_time_s),
            request_body_bytes=plain.limits.request_body_bytes,
            response_body_bytes=plain.limits.response_body_bytes,
            queue_length=plain.limits.queue_length,
            max_attempts=plain.limits.max_attempts,
            rate=plain.limits.rate,
        ),
        repeatable=plain.repeatable,
        cancel_on_hangup=plain.cancel_on_hangup,
        writable_paths=plain.writable_paths,
        account=plain.account,
        jobs=[job_rule(rule) for rule in plain.jobs],
        volumes=[workspace_pb2.Volume(name=volume.name, path=volume.path) for volume in plain.volumes],
        hedge=plain.hedge,
    )
    if plain.scale.max_replicas:
        message.scale.min_replicas = plain.scale.min_replicas
        message.scale.max_replicas = plain.scale.max_replicas
        message.scale.idle_time.CopyFrom(duration(plain.scale.idle_time_s))
        message.scale.queue_wait.CopyFrom(duration(plain.scale.queue_wait_s))
    if plain.registry.username or plain.registry.password:
        message.registry.username = plain.registry.username
        message.registry.password = plain.registry.password if secrets else ""
    return message


def report_of(message: node_pb2.HeartbeatRequest, before: report.Report | None = None) -> report.Report:
    """A node's report off the wire; `before`: the last one of its stream, None if it is the first.

    What is as before is the same object. Raises ValueError for a state this version does not know.
    """
    readings = tuple([_reading_of(reading) for reading in message.readings])
    if message.same and before is not None:
        return replace(before, readings=readings, goodbye=message.goodbye)
    return report.Report(
        inventory=inventory_of(message.inventory),
        readings=readings,
        replicas=tuple(_replica_report_of(replica) for replica in message.replicas),
        images=tuple(report.CachedImage(image.reference, image.size_bytes) for image in message.images),
        attempt_ids=tuple(message.attempt_ids),
        goodbye=message.goodbye,
        volumes=tuple(report.KeptVolume(one.workspace_uid, one.name, one.size_bytes) for one in message.volumes),
        gpu_tests=tuple(
            report.GpuTest(one.gpu_id, one.number, report.GpuTestState(one.state), one.words)
            for one in message.gpu_tests
        ),
    )


def _replica_report_of(message: node_pb2.ReplicaReport) -> report.ReplicaReport:
    return report.ReplicaReport(
        replica_id=message.replica_id,
        state=report.ReplicaState(message.state),
        progress=message.progress,
        message=message.message,
        capacity=message.capacity,
        restarts=message.restarts,
        spec_hash=message.spec_hash,
        image_digest=message.image_digest,
    )


def _reading_of(message: node_pb2.GpuReading) -> report.GpuReading:
    # What every report says anew; a loop over its fields takes twice as long.
    has, xids = message.HasField, message.xids
    return report.GpuReading(
        gpu_id=message.gpu_id,
        memory_used_bytes=message.memory_used_bytes if has("memory_used_bytes") else None,
        utilization=message.utilization if has("utilization") else None,
        temperature_c=message.temperature_c if has("temperature_c") else None,
        power_w=message.power_w if has("power_w") else None,
        clocks_event_reasons=message.clocks_event_reasons if has("clocks_event_reasons") else None,
        ecc_uncorrected=message.ecc_uncorrected if has("ecc_uncorrected") else None,
        row_remap_pending=message.row_remap_pending if has("row_remap_pending") else None,
        row_remap_failed=message.row_remap_failed if has("row_remap_failed") else None,
        recovery_action=message.recovery_action if has("recovery_action") else None,
        xids=tuple(xids) if xids else (),
        error=message.error,
        foreign_memory_bytes=message.foreign_memory_bytes if has("foreign_memory_bytes") else None,
    )


def inventory_of(message: node_pb2.Inventory) -> report.Inventory:
    """What a machine has, off the wire."""
    return report.Inventory(
        gpus=tuple(report.Gpu(gpu.id, gpu.model, gpu.memory_bytes, gpu.index, gpu.pci_bus_id) for gpu in message.gpus),
        cpus=message.cpus,
        memory_bytes=message.memory_bytes,
        disk_free_bytes=message.disk_free_bytes,
        engine=message.engine,
        engine_version=message.engine_version,
        driver_version=message.driver_version,
        cuda_version=message.cuda_version,
        os=message.os,
        daemon_version=message.daemon_version,
        gpu_message=message.gpu_message,
        volume_limit_bytes=message.volume_limit_bytes,
        allowed_images=tuple(message.allowed_images[:PATTERNS]),
    )


def inventory(plain: report.Inventory) -> node_pb2.Inventory:
    """What a machine has, on the wire."""
    return node_pb2.Inventory(
        gpus=[
            node_pb2.Gpu(
                id=gpu.id,
                model=gpu.model,
                memory_bytes=gpu.memory_bytes,
                index=gpu.index,
                pci_bus_id=gpu.pci_bus_id,
            )
            for gpu in plain.gpus
        ],
        cpus=plain.cpus,
        memory_bytes=plain.memory_bytes,
        disk_free_bytes=plain.disk_free_bytes,
        engine=plain.engine,
        engine_version=plain.engine_version,
        driver_version=plain.driver_version,
        cuda_version=plain.cuda_version,
        os=plain.os,
        daemon_version=plain.daemon_version,
        gpu_message=plain.gpu_message,
        volume_limit_bytes=plain.volume_limit_bytes,
        allowed_images=plain.allowed_images,
    )
