"""What descriptions are taken, and that every fault is told at once."""

import contextlib
import math
from typing import Any

import pytest
from msgspec.structs import replace

from controlplane.admission import RESERVED_ROUTES, admit, admit_replicas, admit_route, admit_update
from controlplane.errors import InvalidArgument
from controlplane.spec import GIB, MIB, GpuNeed, Limits, Readiness, Registry, Scale, Spec, Volume

SPEC = Spec(name="demo", image="demo:1", ports=(8000,))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"name": "a"},
        {"name": "a" + "b" * 62},
        {"image": "ghcr.io/team/demo@sha256:" + "a" * 64},
        {"ports": (1, 65535), "readiness": Readiness("/health?deep=1".partition("?")[0], 65535, 1)},
        {"command": ("python", "-c", "print('a; b && c')", "")},
        {"env": {"A": "", "_B1": "x=y\n"}},
        {"gpu": GpuNeed("RTX 4090", 8, 24 * GIB)},
        {"replicas": 0},
        {"replicas": 1000, "concurrency": 1024},
        {"cpus": 0.5, "memory_bytes": 64 * MIB, "shm_bytes": 64 * MIB},
        {"registry": Registry("user", "secret")},
        {"writable_paths": ("/data", "/var/cache/models", "/home/u ser")},
        {"account": "team 7"},
        {"gpu": GpuNeed("4090", 1, 8 * GIB, share=1)},
        {"gpu": GpuNeed(count=1, share=999)},
        {"volumes": (Volume("models", "/models"), Volume("m2", "/models2")), "writable_paths": ("/modelsx",)},
        {"limits": Limits(queue_time_s=0.5, max_attempts=1, queue_length=1)},
    ],
)
def test_taken(changes: dict[str, Any]) -> None:
    admit(replace(SPEC, **changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": ""}, "name:"),
        ({"name": "Demo"}, "name:"),
        ({"name": "1demo"}, "name:"),
        ({"name": "a" * 64}, "name:"),
        ({"name": "demo\n"}, "name:"),
        ({"name": "w-0123456789ab"}, "looks like a workspace's uid"),
        ({"account": "a\nb"}, "account:"),
        ({"image": ""}, "image: '' is no image reference"),
        ({"image": "Demo"}, "image: 'Demo' is no image reference"),
        ({"registry": Registry("user", "")}, "registry: username and password come together"),
        ({"ports": ()}, "ports: from 1 to 16"),
        ({"ports": tuple(range(1, 18))}, "ports: from 1 to 16"),
        ({"ports": (0,)}, "ports: 0 is not from 1 to 65535"),
        ({"ports": (65536,)}, "ports: 65536 is not"),
        ({"ports": (80, 80)}, "ports: each only once"),
        ({"command": ("",)}, "command: the program's name is empty"),
        ({"command": ("a", "b\0")}, "command: an argument has a NUL"),
        ({"env": {"1A": ""}}, "env: '1A' is no name"),
        ({"env": {"A=B": ""}}, "env: 'A=B' is no name"),
        ({"env": {"": ""}}, "env: '' is no name"),
        ({"env": {"A": "\0"}}, "NUL in its value"),
        ({"env": {"NGPU_PORT_80": "1"}}, "env: NGPU_PORT_80 is set by the platform"),
        ({"env": {"NVIDIA_VISIBLE_DEVICES": "all"}}, "env: NVIDIA_VISIBLE_DEVICES is set by the platform"),
        ({"env": {"A": "x" * 70_000}}, "longer than 32 KiB"),
        ({"replicas": -1}, "replicas: -1 is not from 0 to 1000"),
        ({"replicas": 1001}, "replicas: 1001"),
        ({"concurrency": 0}, "concurrency: 0"),
        ({"concurrency": 1025}, "concurrency: 1025"),
        ({"cpus": 0}, "cpus: 0"),
        ({"cpus": math.nan}, "cpus: nan"),
        ({"cpus": math.inf}, "cpus: inf"),
        ({"memory_bytes": MIB, "shm_bytes": MIB}, "memory_bytes: 1048576 is not"),
        ({"shm_bytes": 5 * GIB}, "shm_bytes: more than memory_bytes"),
        ({"gpu": GpuNeed(count=65)}, "gpu.count: 65"),
        ({"gpu": GpuNeed("4090")}, "gpu.count: 0, though"),
        ({"gpu": GpuNeed("a" * 129, 1)}, "gpu.model:"),
        ({"gpu": GpuNeed(count=1, share=1000)}, "gpu.share: 1000 is not from 1 to 999"),
        ({"gpu": GpuNeed(count=1, share=-1)}, "gpu.share: -1 is not"),
        ({"gpu": GpuNeed(count=2, share=500)}, "gpu.share: a share is one of a single GPU: gpu.count must be 1, not 2"),
        ({"gpu": GpuNeed(share=500)}, "gpu.count must be 1, not 0"),
        ({"volumes": (Volume("Models", "/models"),)}, "volumes: 'Models' is no name"),
        ({"volumes": (Volume("m", "/a"), Volume("m", "/b"))}, "volumes: each name only once"),
        ({"volumes": (Volume("m", "models"),)}, "volumes: 'models' is no plain absolute path"),
        ({"volumes": (Volume("m", "/"),)}, "volumes: '/' is no plain"),
        ({"volumes": (Volume("m", "/a/../b"),)}, "volumes: '/a/../b' is no plain"),
        ({"volumes": (Volume("m", "/dev/shm"),)}, "volumes: '/dev/shm' belongs to the system"),
        ({"volumes": (Volume("m", "/tmp/m"),)}, "volumes: '/tmp/m' and '/tmp' lie one in the other"),
        ({"volumes": (Volume("m", "/a"), Volume("n", "/a/b"))}, "volumes: '/a/b' and '/a' lie one in the other"),
        ({"volumes": (Volume("m", "/a"),), "writable_paths": ("/a/b",)}, "'/a' and '/a/b' lie one"),
        ({"volumes": tuple(Volume(f"m{n}", f"/m{n}") for n in range(9))}, "volumes: at most 8"),
        ({"readiness": Readiness("health")}, "readiness.path:"),
        ({"readiness": Readiness("/a b")}, "readiness.path:"),
        ({"readiness": Readiness("/../etc")}, "readiness.path:"),
        ({"readiness": Readiness(port=81)}, "readiness.port: 81 is none of the ports"),
        ({"readiness": Readiness(start_limit_s=0)}, "readiness.start_limit_s:"),
        ({"limits": Limits(run_time_s=0)}, "limits.run_time_s: 0"),
        ({"limits": Limits(queue_length=10**9)}, "limits.queue_length:"),
        ({"limits": Limits(max_attempts=0)}, "limits.max_attempts:"),
        ({"scale": Scale(2, 1)}, "scale.min_replicas: 2 is more than scale.max_replicas, 1"),
        ({"scale": Scale(1)}, "scale.max_replicas: say how many"),
        ({"scale": Scale(0, 1001)}, "scale.max_replicas: 1001"),
        ({"scale": Scale(0, 1, idle_time_s=1)}, "scale.idle_time_s: 1 is not"),
        ({"scale": Scale(0, 1, queue_wait_s=0)}, "scale.queue_wait_s: 0 is not"),
        ({"writable_paths": ("data",)}, "writable_paths: 'data' is no plain absolute path"),
        ({"writable_paths": ("/",)}, "writable_paths: '/'"),
        ({"writable_paths": ("/a/../b",)}, "writable_paths:"),
        ({"writable_paths": ("/a:rw",)}, "writable_paths:"),
        ({"writable_paths": ("/a", "/a")}, "writable_paths: each only once"),
        ({"writable_paths": ("/proc/x",)}, "belongs to the system"),
        ({"writable_paths": tuple(f"/d{n}" for n in range(33))}, "writable_paths: at most 32"),
    ],
)
def test_refused_in_words(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        admit(replace(SPEC, **changes))
    assert words in str(refused.value)
    assert "; " not in str(refused.value), "one fault, one sentence"


def test_every_fault_is_told_at_once() -> None:
    with pytest.raises(InvalidArgument) as refused:
        admit(replace(SPEC, name="Demo", image="", ports=(0, 0), replicas=-1, cpus=0, writable_paths=("x",)))
    for name in ("name", "image", "ports", "replicas", "cpus", "writable_paths"):
        assert f"{name}:" in str(refused.value)


@pytest.mark.parametrize("replicas", [-1, 1001])
def test_replicas_have_a_range(replicas: int) -> None:
    with pytest.raises(InvalidArgument):
        admit_replicas(replicas, Scale())


@pytest.mark.parametrize(("replicas", "fits"), [(0, False), (1, True), (3, True), (4, False)])
def test_replicas_that_follow_the_load_stay_within_its_bounds(replicas: int, fits: bool) -> None:
    with contextlib.nullcontext() if fits else pytest.raises(InvalidArgument, match="between 1 and 3"):
        admit_replicas(replicas, Scale(1, 3))


@pytest.mark.parametrize(
    ("changes", "faults"),
    [
        ({}, 0),
        ({"image": "demo:2", "replicas": 9}, 0),
        ({"name": "other"}, 1),
        ({"ports": (9000,)}, 1),
        ({"name": "other", "ports": (1,)}, 2),
    ],
)
def test_an_update_keeps_the_name_and_the_ports_of_routes(changes: dict[str, Any], faults: int) -> None:
    said = ""
    try:
        admit_update(SPEC, replace(SPEC, **changes), {"img2img": 8000})
    except InvalidArgument as error:
        said = str(error)
    assert len(said.split("; ")) * bool(said) == faults


@pytest.mark.parametrize(
    ("name", "port", "path"),
    [
        ("img2img", 0, ""),
        ("sdapi/v1/img2img", 8000, "/sdapi/v1/img2img"),
        ("a.b_c-d", 0, "/%7Euser"),
        ("tasks", 0, ""),
        ("task/run", 0, ""),
        ("x" * 128, 0, ""),
    ],
)
def test_routes_taken(name: str, port: int, path: str) -> None:
    admit_route(name, port, path, (8000,))


@pytest.mark.parametrize(
    ("name", "port", "path", "words"),
    [
        ("", 0, "", "route: a name has"),
        ("x" * 129, 0, "", "route: a name has"),
        ("a b", 0, "", "route: a name has"),
        ("a&b", 0, "", "route: a name has"),
        ("/a", 0, "", "neither begins nor ends"),
        ("a/", 0, "", "neither begins nor ends"),
        ("a//b", 0, "", "neither begins nor ends"),
        ("a/../b", 0, "", "neither begins nor ends"),
        *((name, 0, "", "a name of the REST interface itself") for name in sorted(RESERVED_ROUTES)),
        ("brc20/checkAddress", 0, "", "a name of the REST interface itself"),
        ("a", 81, "", "port: 81 is none of the workspace's ports (8000)"),
        ("a", 0, "a", "path:"),
        ("a", 0, "//host/a", "path:"),
        ("a", 0, "/%2F/host", "path:"),
        ("a", 0, "/a/%2e%2e/b", "path:"),
        ("a", 0, "/a\\b", "path:"),
        ("a", 0, "/a%0d%0ab", "path:"),
        ("a", 0, "/a?b=c", "path:"),
        ("a", 0, "/" + "a" * 2048, "path: longer than 2048"),
    ],
)
def test_routes_refused_in_words(name: str, port: int, path: str, words: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        admit_route(name, port, path, (8000,))
    assert words in str(refused.value)
