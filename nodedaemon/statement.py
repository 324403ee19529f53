"""All that is and all that should be, as it crosses the wire: plain values to messages and back."""

from collections.abc import Sequence
from typing import Final

from ngpu.v1 import node_pb2, workspace_pb2

from nodedaemon.engine import Assignment, CachedImage, Credentials, Mount, Readiness, Volume
from nodedaemon.gpu_tests import GpuTest
from nodedaemon.gpus import GpuInventory, GpuReading
from nodedaemon.machine import Machine
from nodedaemon.replicas import ReplicaReport

#: What a spec means that leaves it open (workspace.proto).
CPUS: Final = 1.0
MEMORY_BYTES: Final = 4 * 1024**3
SHM_BYTES: Final = 64 * 1024**2
START_LIMIT_S: Final = 600.0


def inventory(machine: Machine, gpus: GpuInventory, *, volume_limit_bytes: int = 0) -> node_pb2.Inventory:
    """What the machine has."""
    return node_pb2.Inventory(
        gpus=[
            node_pb2.Gpu(
                id=gpu.id, model=gpu.model, memory_bytes=gpu.memory_bytes, index=gpu.index, pci_bus_id=gpu.pci_bus_id
            )
            for gpu in gpus.gpus
        ],
        cpus=machine.cpus,
        memory_bytes=machine.memory_bytes,
        disk_free_bytes=machine.engine.disk_free_bytes,
        engine=machine.engine.name,
        engine_version=machine.engine.version,
        driver_version=gpus.driver_version,
        cuda_version=gpus.cuda_version,
        os=machine.os,
        daemon_version=machine.daemon_version,
        gpu_message=gpus.message,
        volume_limit_bytes=volume_limit_bytes,
        allowed_images=machine.allowed_images,
    )


def reading(now: GpuReading) -> node_pb2.GpuReading:
    """One GPU as it is; None stays unset."""
    return node_pb2.GpuReading(
        gpu_id=now.gpu_id,
        memory_used_bytes=now.memory_used_bytes,
        utilization=now.utilization,
        temperature_c=now.temperature_c,
        power_w=now.power_w,
        clocks_event_reasons=now.clocks_event_reasons,
        ecc_uncorrected=now.ecc_uncorrected,
        row_remap_pending=now.row_remap_pending,
        row_remap_failed=now.row_remap_failed,
        recovery_action=now.recovery_action,
        xids=now.xids,
        error=now.error,
        foreign_memory_bytes=now.foreign_memory_bytes,
    )


def gpu_test(test: GpuTest) -> node_pb2.GpuTest:
    """A test that is asked for, as it stands."""
    state = node_pb2.GpuTestState.ValueType(test.state)
    return node_pb2.GpuTest(gpu_id=test.gpu_id, number=test.number, state=state, words=test.words)


def replica(report: ReplicaReport, *, taking: bool) -> node_pb2.ReplicaReport:
    """One replica as it is. Without capacity, unless the node is `taking` attempts."""
    return node_pb2.ReplicaReport(
        replica_id=report.replica_id,
        state=workspace_pb2.ReplicaState.ValueType(report.state),
        progress=report.progress,
        message=report.message,
        capacity=report.capacity if taking else 0,
        restarts=report.restarts,
        spec_hash=report.spec_hash,
        image_digest=report.image_digest,
    )


def images(cached: Sequence[CachedImage]) -> list[node_pb2.CachedImage]:
    """Images in the cache."""
    return [node_pb2.CachedImage(reference=image.reference, size_bytes=image.size_bytes) for image in cached]


def volumes(kept: Sequence[Volume]) -> list[node_pb2.KeptVolume]:
    """Volumes kept here."""
    return [
        node_pb2.KeptVolume(workspace_uid=one.workspace_uid, name=one.name, size_bytes=one.size_bytes or 0)
        for one in kept
    ]


def assignment(message: node_pb2.Assignment) -> Assignment:
    """A replica that should run here, every default resolved."""
    spec = message.spec
    ports = tuple(spec.ports)
    limit = spec.readiness.start_limit
    registry = spec.registry
    return Assignment(
        replica_id=message.replica_id,
        workspace=message.workspace_name,
        generation=message.generation,
        spec_hash=message.spec_hash,
        image=spec.image,
        ports=ports,
        readiness=Readiness(
            port=spec.readiness.port or (ports[0] if ports else 0),
            path=spec.readiness.path,
            start_limit_s=limit.seconds + limit.nanos / 1e9 or START_LIMIT_S,
        ),
        command=tuple(spec.command),
        env=dict(spec.env),
        concurrency=spec.concurrency or 1,
        cpus=spec.cpus or CPUS,
        memory_bytes=spec.memory_bytes or MEMORY_BYTES,
        shm_bytes=spec.shm_bytes or SHM_BYTES,
        writable_paths=tuple(spec.writable_paths),
        workspace_uid=message.workspace_uid,
        mounts=tuple(Mount(volume.name, volume.path) for volume in spec.volumes),
        gpu_ids=tuple(message.gpu_ids),
        gpu_share=spec.gpu.share_milli,
        registry=Credentials(registry.username, registry.password) if registry.username or registry.password else None,
        draining=message.draining,
    )
