"""What a workspace and a route must be to be taken: every fault at once, in words, with the limits by name. Pure."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Final
from urllib.parse import unquote

import msgspec
from ngpu.image import normalised

from controlplane.errors import InvalidArgument
from controlplane.jobs import PRESETS
from controlplane.spec import GIB, MIB, JobRule, Limits, Scale, Spec, Volume

REPLICAS: Final = 1000
CONCURRENCY: Final = 1024
PORTS: Final = 16
GPUS: Final = 64
#: Of a GPU, in thousandths.
SHARE: Final = (1, 999)
#: After how many times the average a second attempt begins.
HEDGE: Final = (1.5, 100.0)
CPUS: Final = 1024.0
MEMORY_BYTES: Final = (16 * MIB, 16 * 1024 * GIB)
SHM_BYTES: Final = (64 * 1024, 1024 * GIB)
START_LIMIT_S: Final = (1.0, 24 * 3600.0)
IDLE_TIME_S: Final = (10.0, 30 * 24 * 3600.0)
QUEUE_WAIT_S: Final = (0.1, 24 * 3600.0)
WRITABLE_PATHS: Final = 32
VOLUMES: Final = 8
JOB_RULES: Final = 16
JOB_WORDS: Final = 32
WORD_LENGTH: Final = 256
POLL_S: Final = (0.05, 60.0)
PATH_LENGTH: Final = 2048
#: A whole description as JSON: it travels to its nodes in every list of what they should run, and a full list of
#: placement.REPLICAS must fit into a message.
SPEC_BYTES: Final = 32 * 1024

_DAY_S: Final = 24 * 3600.0
#: Least and most of each of a task's limits.
LIMITS: Final = {
    "queue_time_s": (0.001, 7 * _DAY_S),
    "run_time_s": (0.001, _DAY_S),
    "total_time_s": (0.001, 14 * _DAY_S),
    "request_body_bytes": (1, 64 * GIB),
    "response_body_bytes": (1, 64 * GIB),
    "queue_length": (1, 100_000),
    "max_attempts": (1, 10),
    "rate": (1, 100_000),
}

_NAME: Final = re.compile(r"[a-z][a-z0-9-]{0,62}")
_UID: Final = re.compile(r"w-[0-9a-f]{12}")
_ENV_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
#: Set by us in every container.
_OUR_ENV: Final = "NGPU_"
#: A container that sets this itself would see GPUs that it was not given.
_GPU_ENV: Final = "NVIDIA_VISIBLE_DEVICES"
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")
#: A method and a path, as rules for jobs have them.
_REQUEST: Final = re.compile(r"[A-Z][A-Z-]{0,31} (?:/|\{path\})[^\x00-\x20\x7f#\\]*")
_POINTER: Final = re.compile(r"(?:/(?:[^/~\x00-\x1f\x7f]|~[01])*){1,32}")
_HTTP_WORD: Final = re.compile(r"HTTP [1-5][0-9]{2}")
_SYSTEM_PATHS: Final = ("/proc", "/sys", "/dev")

#: The REST surface's own names: a route of that name could never be called.
RESERVED_ROUTES: Final = frozenset(
    {
        "schedulingTask",
        "queryTask",
        "queryTaskList",
        "getDetailed",
        "queryNodes",
        "getTasksFromNode",
        "getTask",
        "task",
        "brc20",
    }
)
_ROUTE_NAME: Final = re.compile(r"[A-Za-z0-9._/-]{1,128}")


def admit(spec: Spec) -> None:
    """Raises InvalidArgument with every fault of a description, a sentence each."""
    _refuse(
        [
            *_name_faults(spec),
            *_image_faults(spec),
            *_port_faults(spec),
            *_start_faults(spec),
            *_size_faults(spec),
            *_readiness_faults(spec),
            *_limit_faults(spec.limits),
            *_scale_faults(spec.scale),
            *_path_faults(spec),
            *_volume_faults(spec),
            *_job_faults(spec.jobs),
        ]
    )


def admit_replicas(replicas: int, scale: Scale) -> None:
    """Raises InvalidArgument."""
    faults = _range("replicas", replicas, 0, REPLICAS)
    if scale.max_replicas and not scale.min_replicas <= replicas <= scale.max_replicas:
        faults.append(
            f"replicas: they follow the load between {scale.min_replicas} and {scale.max_replicas}: update that instead"
        )
    _refuse(faults)


def admit_update(before: Spec, spec: Spec, routes: Mapping[str, int]) -> None:
    """Raises InvalidArgument with every reason why one cannot become the other. `routes`: their ports by name."""
    faults = [] if spec.name == before.name else [f"name: a workspace keeps its name, {before.name!r}"]
    faults += [
        f"ports: the route {name!r} leads to {port}: move or delete it first"
        for name, port in sorted(routes.items())
        if port not in spec.ports
    ]
    _refuse(faults)


def admit_route(name: str, port: int, path: str, ports: tuple[int, ...]) -> None:
    """Raises InvalidArgument with every fault of a route to a workspace with these ports. 0 and "" are defaults."""
    faults = []
    if not _ROUTE_NAME.fullmatch(name):
        faults.append('route: a name has 1 to 128 of letters, digits, "-", "_", "." and "/"')
    elif any(part in ("", ".", "..") for part in name.split("/")):
        faults.append('route: a name neither begins nor ends with "/", nor has "//", "." or ".." as a part')
    elif name in RESERVED_ROUTES or name.startswith("brc20/"):
        faults.append(f"route: {name!r} is a name of the REST interface itself, choose another")
    if port and port not in ports:
        faults.append(f"port: {port} is none of the workspace's ports ({', '.join(map(str, ports))})")
    if path:
        faults += _url_path_faults("path", path)
    _refuse(faults)


def _refuse(faults: list[str]) -> None:
    if faults:
        raise InvalidArgument("; ".join(faults))


def _range(name: str, value: float, least: float, most: float) -> list[str]:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value) or not least <= value <= most:
        return [f"{name}: {value!r} is not from {least:g} to {most:g}"]
    return []


def _name_faults(spec: Spec) -> Iterable[str]:
    if not _NAME.fullmatch(spec.name):
        yield 'name: 1 to 63 of a-z, 0-9 and "-", beginning with a letter'
    elif _UID.fullmatch(spec.name):
        yield "name: it looks like a workspace's uid, choose another"
    if len(spec.account) > 256 or _CONTROL.search(spec.account):
        yield "account: at most 256 printable characters"


def _image_faults(spec: Spec) -> Iterable[str]:
    try:
        normalised(spec.image)
    except ValueError as error:
        yield f"image: {error}"
    if bool(spec.registry.username) != bool(spec.registry.password):
        yield "registry: username and password come together"


def _port_faults(spec: Spec) -> Iterable[str]:
    if not 1 <= len(spec.ports) <= PORTS:
        yield f"ports: from 1 to {PORTS} of them, the first is the default"
    for port in spec.ports:
        yield from _range("ports", port, 1, 65535)
    if len(set(spec.ports)) < len(spec.ports):
        yield "ports: each only once"


def _start_faults(spec: Spec) -> Iterable[str]:
    if any("\0" in part for part in spec.command):
        yield "command: an argument has a NUL in it"
    elif spec.command and not spec.command[0]:
        yield "command: the program's name is empty"
    for name, value in spec.env.items():
        if not _ENV_NAME.fullmatch(name):
            yield f"env: {name[:80]!r} is no name of a variable"
        elif name.startswith(_OUR_ENV) or name == _GPU_ENV:
            yield f"env: {name} is set by the platform"
        if "\0" in value:
            yield f"env: {name[:80]!r} has a NUL in its value"
    if len(msgspec.json.encode(spec)) > SPEC_BYTES:
        yield f"the whole description is longer than {SPEC_BYTES // 1024} KiB: put large files into the image"


def _size_faults(spec: Spec) -> Iterable[str]:
    yield from _range("replicas", spec.replicas, 0, REPLICAS)
    yield from _range("concurrency", spec.concurrency, 1, CONCURRENCY)
    yield from _range("cpus", spec.cpus, 0.01, CPUS)
    if spec.hedge:
        yield from _range("hedge", spec.hedge, *HEDGE)
    yield from _range("memory_bytes", spec.memory_bytes, *MEMORY_BYTES)
    yield from _range("shm_bytes", spec.shm_bytes, *SHM_BYTES)
    if spec.shm_bytes > spec.memory_bytes:
        yield "shm_bytes: more than memory_bytes, of which it is a part"
    yield from _range("gpu.count", spec.gpu.count, 0, GPUS)
    yield from _range("gpu.min_memory_bytes", spec.gpu.min_memory_bytes, 0, MEMORY_BYTES[1])
    if len(spec.gpu.model) > 128 or _CONTROL.search(spec.gpu.model):
        yield "gpu.model: at most 128 printable characters"
    if not spec.gpu.count and (spec.gpu.model or spec.gpu.min_memory_bytes):
        yield "gpu.count: 0, though it is said which GPU: say how many"
    if spec.gpu.share:
        yield from _range("gpu.share", spec.gpu.share, *SHARE)
        if spec.gpu.count != 1:
            yield f"gpu.share: a share is one of a single GPU: gpu.count must be 1, not {spec.gpu.count}"


def _readiness_faults(spec: Spec) -> Iterable[str]:
    if spec.readiness.path:
        yield from _url_path_faults("readiness.path", spec.readiness.path)
    if spec.readiness.port and spec.readiness.port not in spec.ports:
        yield f"readiness.port: {spec.readiness.port} is none of the ports"
    yield from _range("readiness.start_limit_s", spec.readiness.start_limit_s, *START_LIMIT_S)


def _limit_faults(limits: Limits) -> Iterable[str]:
    for name, (least, most) in LIMITS.items():
        yield from _range(f"limits.{name}", getattr(limits, name), least, most)


def _scale_faults(scale: Scale) -> Iterable[str]:
    yield from _range("scale.max_replicas", scale.max_replicas, 0, REPLICAS)
    yield from _range("scale.min_replicas", scale.min_replicas, 0, REPLICAS)
    if not scale.max_replicas and scale != Scale():
        yield "scale.max_replicas: say how many replicas there may be at most"
    elif scale.min_replicas > scale.max_replicas:
        yield f"scale.min_replicas: {scale.min_replicas} is more than scale.max_replicas, {scale.max_replicas}"
    yield from _range("scale.idle_time_s", scale.idle_time_s, *IDLE_TIME_S)
    yield from _range("scale.queue_wait_s", scale.queue_wait_s, *QUEUE_WAIT_S)


def _job_faults(rules: tuple[JobRule, ...]) -> Iterable[str]:
    if len(rules) > JOB_RULES:
        yield f"jobs: at most {JOB_RULES} rules"
    for number, rule in enumerate(rules, 1):
        which = f"jobs, rule {number}" if len(rules) > 1 else "jobs"
        yield from (f"{which}: {fault}" for fault in _rule_faults(rule))


def _rule_faults(rule: JobRule) -> Iterable[str]:
    if rule.preset not in PRESETS:
        known = ", ".join(sorted(filter(None, PRESETS)))
        yield f"preset: {rule.preset[:80]!r} is not known; known are {known}"
    if not _is_request(rule.start.removesuffix("*")) or "{" in rule.start:
        yield f"start: {rule.start[:80]!r} is no method and path, such as 'POST /render' or 'POST /*'"
    for name in ("ask", "cancel"):
        form = getattr(rule, name)
        if (form or name == "ask") and not ("{id}" in form and _is_request(form)):
            yield f"{name}: {form[:80]!r} is no method and path with {{id}} in it, such as 'GET /jobs/{{id}}'"
    if not rule.id:
        yield "id: say where the job's id is in the first answer, such as '/task_id'"
    pointers = [("id", pointer) for pointer in rule.id]
    pointers += [(name, pointer) for name in ("state", "output", "message") if (pointer := getattr(rule, name))]
    for name, pointer in pointers:
        if len(pointer) > PATH_LENGTH or not _POINTER.fullmatch(pointer):
            yield f"{name}: {pointer[:80]!r} is no JSON pointer, such as '/data/id'"
    yield from _word_faults(rule)
    yield from _range("poll_s", rule.poll_s, *POLL_S)
    if rule.limit_s:
        yield from _range("limit_s", rule.limit_s, *LIMITS["run_time_s"])


def _word_faults(rule: JobRule) -> Iterable[str]:
    if not rule.done:
        yield "done: say which answer means that the job is done, such as 'succeeded' or 'HTTP 200'"
    seen: dict[str, str] = {}
    for name in ("done", "running", "waiting", "failed", "busy", "accepted"):
        words = getattr(rule, name)
        if len(words) > JOB_WORDS:
            yield f"{name}: at most {JOB_WORDS} words"
        for word in words:
            other = seen.setdefault(word, name)
            if not 1 <= len(word) <= WORD_LENGTH or (word.startswith("HTTP ") and not _HTTP_WORD.fullmatch(word)):
                yield f"{name}: {word[:80]!r} is no word of an answer, and no status such as 'HTTP 503'"
            elif other != name and not (name == "accepted" and other in {"done", "running", "waiting"}):
                yield f"{name}: {word[:80]!r} means {other} already"
            elif not rule.state and not word.startswith("HTTP "):
                yield f"state: say where {word[:80]!r} is to be found in an answer, such as '/status'"


def _is_request(form: str) -> bool:
    """Is it a method and a plain path, whatever stands in its places?"""
    filled = form.replace("{id}", "0")
    if not _REQUEST.fullmatch(filled):
        return False
    path = filled.partition(" ")[2].partition("?")[0].replace("{path}", "/p", 1)
    return "{" not in filled.replace("{path}", "", 1) and not _url_path_faults("", path)


def _path_faults(spec: Spec) -> Iterable[str]:
    if len(spec.writable_paths) > WRITABLE_PATHS:
        yield f"writable_paths: at most {WRITABLE_PATHS}"
    if len(set(spec.writable_paths)) < len(spec.writable_paths):
        yield "writable_paths: each only once"
    for path in spec.writable_paths:
        yield from _mount_faults("writable_paths", path)


def _volume_faults(spec: Spec) -> Iterable[str]:
    if len(spec.volumes) > VOLUMES:
        yield f"volumes: at most {VOLUMES}"
    if len({volume.name for volume in spec.volumes}) < len(spec.volumes):
        yield "volumes: each name only once"
    for volume in spec.volumes:
        if not _NAME.fullmatch(volume.name):
            yield f'volumes: {volume.name[:80]!r} is no name: 1 to 63 of a-z, 0-9 and "-", beginning with a letter'
        yield from _mount_faults("volumes", volume.path)
    for volume, path in _overlaps(spec.volumes, (*spec.writable_paths, "/tmp")):  # noqa: S108
        yield f"volumes: {volume.path[:80]!r} and {path[:80]!r} lie one in the other"


def _overlaps(volumes: tuple[Volume, ...], others: tuple[str, ...]) -> Iterable[tuple[Volume, str]]:
    """Volumes that hide something else, or are hidden by it."""
    for number, volume in enumerate(volumes):
        for path in (*(other.path for other in volumes[:number]), *others):
            if f"{volume.path}/".startswith(f"{path}/") or f"{path}/".startswith(f"{volume.path}/"):
                yield volume, path


def _mount_faults(name: str, path: str) -> Iterable[str]:
    """May something be put there in a container?"""
    parts = path.split("/")
    # ":" and "," would end the path in an engine's mount options.
    plain = len(path) <= PATH_LENGTH and not re.search(r"[\x00-\x1f\x7f:,]", path)
    if not (plain and parts[0] == "" and len(parts) > 1 and not {"", ".", ".."} & set(parts[1:])):
        yield f"{name}: {path[:80]!r} is no plain absolute path"
    elif any(path == system or path.startswith(f"{system}/") for system in _SYSTEM_PATHS):
        yield f"{name}: {path[:80]!r} belongs to the system"


def _url_path_faults(name: str, path: str) -> list[str]:
    decoded = unquote(path)
    if len(path) > PATH_LENGTH:
        return [f"{name}: longer than {PATH_LENGTH}"]
    if (
        not path.startswith("/")
        or decoded.startswith("//")
        or re.search(r"[\s\\?#]", path)
        or "\\" in decoded
        or _CONTROL.search(decoded)
        or ".." in decoded.split("/")
    ):
        return [f'{name}: {path[:80]!r} is no path of the container: "/" and names, without "..", "?", "#" and spaces']
    return []
