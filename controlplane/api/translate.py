"""Plain values to messages and back: nothing is decided here.

Bodies pass through as the bytes they are; protobuf copies them once, when it builds the message.
"""

from datetime import datetime, timedelta

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from ngpu.v1 import node_pb2, workspace_pb2

from controlplane import report
from controlplane.model import EPOCH, MICROSECOND
from controlplane.spec import GpuNeed, Limits, Readiness, Registry, Spec

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


def spec_of(message: workspace_pb2.WorkspaceSpec) -> Spec:
    """A spec off the wire: what is 0 or unset takes its default. Not checked."""
    limits, default = message.limits, _DEFAULT.limits
    return Spec(
        name=message.name,
        image=message.image,
        ports=tuple(message.ports),
        command=tuple(message.command),
        env=dict(message.env),
        gpu=GpuNeed(message.gpu.model, message.gpu.count, message.gpu.min_memory_bytes),
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
        ),
        repeatable=message.repeatable if message.HasField("repeatable") else _DEFAULT.repeatable,
        writable_paths=tuple(message.writable_paths),
        account=message.account,
    )


def spec(plain: Spec, *, secrets: bool) -> workspace_pb2.WorkspaceSpec:
    """A spec on the wire. Without `secrets` the environment's values and the registry's password stay behind."""
    message = workspace_pb2.WorkspaceSpec(
        name=plain.name,
        image=plain.image,
        command=plain.command,
        env=plain.env if secrets else dict.fromkeys(plain.env, ""),
        gpu=workspace_pb2.GpuNeed(
            model=plain.gpu.model, count=plain.gpu.count, min_memory_bytes=plain.gpu.min_memory_bytes
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
        ),
        repeatable=plain.repeatable,
        writable_paths=plain.writable_paths,
        account=plain.account,
    )
    if plain.registry.username or plain.registry.password:
        message.registry.username = plain.registry.username
        message.registry.password = plain.registry.password if secrets else ""
    return message


def report_of(message: node_pb2.HeartbeatRequest) -> report.Report:
    """A node's report off the wire. Raises ValueError for a state this version does not know."""
    return report.Report(
        inventory=inventory_of(message.inventory),
        readings=tuple(_reading_of(reading) for reading in message.readings),
        replicas=tuple(
            report.ReplicaReport(
                replica_id=replica.replica_id,
                state=report.ReplicaState(replica.state),
                progress=replica.progress,
                message=replica.message,
                capacity=replica.capacity,
                restarts=replica.restarts,
                spec_hash=replica.spec_hash,
                image_digest=replica.image_digest,
            )
            for replica in message.replicas
        ),
        images=tuple(report.CachedImage(image.reference, image.size_bytes) for image in message.images),
        attempt_ids=tuple(message.attempt_ids),
        goodbye=message.goodbye,
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
    )


def _reading_of(message: node_pb2.GpuReading) -> report.GpuReading:
    offered = {field.name: value for field, value in message.ListFields() if field.name != "xids"}
    return report.GpuReading(**{"gpu_id": "", **offered}, xids=tuple(message.xids))
