"""What a Docker container of ours is made of, with hardened defaults, and how it is read back. Pure: JSON of
Docker's API.

Whoever wants to know what a customer's container may do reads `config`.
"""

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final

from nodedaemon.engine import Address, Assignment, Container, Exit, StartFailed
from nodedaemon.engine.volumes import NODE, mounts

#: The user a container runs as when its image says root, or nothing.
NOBODY: Final = "65534:65534"
PIDS_LIMIT: Final = 4096
#: A container's log: this many files of this size.
LOG_SIZE, LOG_FILES = "10m", "2"
#: When the machine runs out of memory, a container goes before the daemons do.
OOM_SCORE: Final = 500

REPLICA, WORKSPACE = "ngpu.replica", "ngpu.workspace"
SPEC, GENERATION = "ngpu.spec", "ngpu.generation"
RESTARTS, PORTS, DIGEST = "ngpu.restarts", "ngpu.ports", "ngpu.digest"


def config(
    assignment: Assignment,
    image: Mapping[str, Any],
    *,
    labels: Mapping[str, str],
    network: str,
    publish: bool,
    user: str,
) -> dict[str, Any]:
    """The body of POST /containers/create. `image` is its inspection's `Config`; `user` "" is the image's own.

    Raises StartFailed.
    """
    ports: dict[str, dict[str, str]] = {f"{port}/tcp": {} for port in assignment.ports}
    return {
        "Image": assignment.image,
        # The whole argv: an image's own entry point, often a shell, is not put before it.
        "Entrypoint": list(assignment.command) or None,
        "Env": [f"{name}={value}" for name, value in _env(assignment, moved=bool(user)).items()],
        "User": user,
        "Hostname": assignment.replica_id,
        "ExposedPorts": ports,
        "Labels": {
            **labels,
            REPLICA: assignment.replica_id,
            WORKSPACE: assignment.workspace,
            SPEC: assignment.spec_hash,
            GENERATION: str(assignment.generation),
            PORTS: ",".join(map(str, assignment.ports)),
        },
        "HostConfig": {
            "NetworkMode": network,
            "PortBindings": {port: [{"HostIp": "127.0.0.1", "HostPort": ""}] for port in ports} if publish else {},
            "ReadonlyRootfs": True,
            "Tmpfs": _tmpfs(assignment, image),
            "Mounts": mounts(labels[NODE], assignment),
            "CapDrop": ["ALL"],
            "SecurityOpt": ["no-new-privileges"],
            "PidsLimit": PIDS_LIMIT,
            "Memory": assignment.memory_bytes,
            # Memory and swap together: no swap.
            "MemorySwap": assignment.memory_bytes,
            "NanoCpus": int(assignment.cpus * 1e9),
            "ShmSize": assignment.shm_bytes,
            "OomScoreAdj": OOM_SCORE,
            "Ulimits": [{"Name": "core", "Soft": 0, "Hard": 0}],
            "LogConfig": {"Type": "json-file", "Config": {"max-size": LOG_SIZE, "max-file": LOG_FILES}},
            "DeviceRequests": [
                {"DeviceIDs": list(assignment.gpu_ids), "Capabilities": [["gpu", "compute", "utility", "video"]]}
            ]
            if assignment.gpu_ids
            else [],
        },
    }


def read(found: Mapping[str, Any], *, network: str, memory_kills: int) -> Container:
    """A container from its inspection. `memory_kills` as in Container."""
    labels, state = found["Config"]["Labels"], found["State"]
    ended = None
    if state["Status"] in ("exited", "dead", "removing"):
        ended = Exit(
            labels[REPLICA],
            state["ExitCode"],
            # Docker's own flag may come late.
            out_of_memory=state["OOMKilled"] or (state["ExitCode"] == 137 and memory_kills > 0),
            ran_s=max(0.0, _time(state["FinishedAt"]) - _time(state["StartedAt"])),
            memory_bytes=found["HostConfig"]["Memory"],
        )
    return Container(
        replica_id=labels[REPLICA],
        container_id=found["Id"],
        spec_hash=labels.get(SPEC, ""),
        image_digest=labels.get(DIGEST, ""),
        restarts=int(labels.get(RESTARTS, "0")),
        addresses={} if ended else _addresses(found, network),
        started=state["Status"] != "created",
        exit=ended,
        memory_kills=memory_kills,
    )


def digest(image: Mapping[str, Any]) -> str:
    """From an image's inspection: the registry's digest if it came from one, else the image's own."""
    return str((image.get("RepoDigests") or [image["Id"]])[0]).rpartition("@")[2]


def is_root(user: str) -> bool:
    """Does an image's `User` ("", "app", "0:0", ...) say root? Of a name other than root's one cannot tell.

    See is_named_root.
    """
    name = user.split(":", 1)[0].strip()
    return name in ("", "root") or (name.lstrip("+-").isdecimal() and int(name) == 0)


def is_name(user: str) -> bool:
    """Does it name a user whose number only the image knows?"""
    return not user.split(":", 1)[0].strip().lstrip("+-").isdecimal()


def is_named_root(user: str, passwd: str | None) -> bool:
    """Is that name one of number 0 in the image's /etc/passwd? Taken to be so when that cannot be read."""
    if passwd is None:
        return True
    name = user.split(":", maxsplit=1)[0]
    fields = (line.split(":") for line in passwd.splitlines())
    return any(f[0] == name and is_root(f[2]) for f in fields if len(f) > 2)


def _env(assignment: Assignment, *, moved: bool) -> dict[str, str]:
    return {
        # Root's home is not for another user to write to.
        **({"HOME": "/tmp"} if moved else {}),  # noqa: S108
        **assignment.env,
        "PORT": str(assignment.ports[0]),
        **{f"NGPU_PORT_{port}": str(port) for port in assignment.ports},
        **{mount.variable: mount.path for mount in assignment.mounts},
        **({"NGPU_GPU_SHARE_MILLI": str(assignment.gpu_share)} if assignment.gpu_share else {}),
        # Where NVIDIA's runtime is the default one, this variable alone would open every GPU to whoever sets it.
        "NVIDIA_VISIBLE_DEVICES": ",".join(assignment.gpu_ids) or "void",
    }


def _tmpfs(assignment: Assignment, image: Mapping[str, Any]) -> dict[str, str]:
    for path in assignment.writable_paths:
        if not path.startswith("/") or path == "/" or ".." in path.split("/"):
            raise StartFailed(f"{path!r} cannot be a writable path: it must be absolute, and not the root")
    # An image's volumes would else be directories of this machine, without limit.
    paths = {"/tmp", *assignment.writable_paths, *(image.get("Volumes") or ())}  # noqa: S108
    paths -= {mount.path for mount in assignment.mounts}
    # Half of the container's memory each, as is the kernel's way; what they hold counts as its memory.
    # `exec`: programs that compile at run time load the result from there.
    options = f"rw,nosuid,nodev,exec,mode=1777,size={assignment.memory_bytes // 2}"
    return dict.fromkeys(sorted(paths), options)


def _addresses(found: Mapping[str, Any], network: str) -> dict[int, Address]:
    ports = [int(port) for port in found["Config"]["Labels"].get(PORTS, "").split(",") if port]
    settings = found["NetworkSettings"]
    if found["HostConfig"].get("PortBindings"):
        bound = {port: settings["Ports"].get(f"{port}/tcp") for port in ports}
        return {port: (on[0]["HostIp"], int(on[0]["HostPort"])) for port, on in bound.items() if on}
    ip = settings["Networks"].get(network, {}).get("IPAddress")
    return {port: (ip, port) for port in ports} if ip else {}


def _time(text: str) -> float:
    return datetime.fromisoformat(text).timestamp() if not text.startswith("0001") else 0.0
