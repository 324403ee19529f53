"""Workspaces described in TOML: what is read, and that every fault is told at once."""

import contextlib
import re
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from hypothesis import given
from hypothesis import strategies as st
from ngpu.v1 import workspace_pb2 as pb

from controlplane.ctl.workspace_file import _KEYS, Source, SpecFault, load, to_spec

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").rglob("*.toml"))

WHOLE = """
name = "img2img"
image = "registry.example/img2img:1"
command = ["python3", "server.py"]
ports = [8080, 9000]
replicas = 2
concurrency = 4
cpus = 2.5
memory = "16GiB"
shm = "1GiB"
repeatable = false
writable_paths = ["/data"]
account = "customer 7"

[env]
MODEL = "v2"
STEPS = 20

[gpu]
model = "RTX 4090"
count = 1
memory = "24GB"

[volumes]
models = "/models"
hub-cache = "/root/.cache"

[readiness]
path = "/health"
port = 9000
start_limit = "15m"

[registry]
username = "me"
password_file = "password"

[limits]
queue_time = "5m"
run_time = 90
total_time = "1h30m"
request_body = "10MiB"
response_body = "1GiB"
queue_length = 50
max_attempts = 2
"""


def spec_of(text: str, **options: Any) -> pb.WorkspaceSpec:
    return to_spec(load(Path("w.toml"), text), Source(options, "options"))


def faults_of(text: str, **options: Any) -> list[str]:
    with pytest.raises(SpecFault) as caught:
        spec_of(text, **options)
    return caught.value.faults


def test_every_key(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("hunter2\n")
    file = tmp_path / "w.toml"
    file.write_text(WHOLE)
    spec = to_spec(load(file))
    assert spec == pb.WorkspaceSpec(
        name="img2img",
        image="registry.example/img2img:1",
        command=["python3", "server.py"],
        env={"MODEL": "v2", "STEPS": "20"},
        gpu=pb.GpuNeed(model="RTX 4090", count=1, min_memory_bytes=24 * 10**9),
        ports=[8080, 9000],
        replicas=2,
        concurrency=4,
        cpus=2.5,
        memory_bytes=16 << 30,
        shm_bytes=1 << 30,
        readiness=pb.Readiness(path="/health", port=9000, start_limit=Duration(seconds=900)),
        registry=pb.RegistryCredentials(username="me", password="hunter2"),
        limits=pb.Limits(
            queue_time=Duration(seconds=300),
            run_time=Duration(seconds=90),
            total_time=Duration(seconds=5400),
            request_body_bytes=10 << 20,
            response_body_bytes=1 << 30,
            queue_length=50,
            max_attempts=2,
        ),
        repeatable=False,
        writable_paths=["/data"],
        account="customer 7",
        volumes=[pb.Volume(name="models", path="/models"), pb.Volume(name="hub-cache", path="/root/.cache")],
    )


def test_the_least() -> None:
    spec = spec_of('name = "a"\nimage = "b"\nports = [1]')
    assert spec == pb.WorkspaceSpec(name="a", image="b", ports=[1], replicas=1)
    assert not spec.HasField("repeatable")


def test_a_share_of_a_gpu_is_a_part_of_one() -> None:
    least = 'name = "a"\nimage = "b"\nports = [1]\n'
    assert spec_of(f"{least}[gpu]\nshare = 0.25").gpu == pb.GpuNeed(count=1, share_milli=250)
    assert spec_of(f"{least}[gpu]\ncount = 2\nshare = 0.001").gpu == pb.GpuNeed(count=2, share_milli=1)
    for share in ("1", "0.0004", "2.5", '"250"'):
        (fault,) = faults_of(f"{least}[gpu]\nshare = {share}")
        assert fault.startswith("w.toml: gpu.share: must be a")


def test_volumes_may_be_tables() -> None:
    least = 'name = "a"\nimage = "b"\nports = [1]\n'
    models = [pb.Volume(name="models", path="/models")]
    assert spec_of(f'{least}volumes = [{{name = "models", path = "/models"}}]').volumes == models
    for wrong in ('"models"', '["/models"]', '[{name = "models"}]', "{models = 1}"):
        (fault,) = faults_of(f"{least}volumes = {wrong}")
        assert fault.startswith("w.toml: volumes: ")


def test_registered_and_not_running() -> None:
    assert spec_of('name = "a"\nimage = "b"\nports = [1]\nreplicas = 0').replicas == 0


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.parent.name)
def test_the_examples_are_real(path: Path) -> None:
    assert to_spec(load(path)).name


def test_there_are_examples() -> None:
    assert EXAMPLES


def test_options_win_key_by_key() -> None:
    text = 'name = "a"\nimage = "b"\nports = [1]\n[gpu]\ncount = 1\nmodel = "4090"\n[env]\nA = "1"\nB = "1"'
    spec = spec_of(text, image="c", gpu={"count": 2}, env={"B": "2", "C": "2"})
    assert spec.image == "c"
    assert (spec.gpu.count, spec.gpu.model) == (2, "4090")
    assert dict(spec.env) == {"A": "1", "B": "2", "C": "2"}


def test_all_faults_at_once_with_file_and_key() -> None:
    text = """
nam = "img2img"
image = 7
ports = [8080, 99999]
command = "python3 server.py"
replicas = -1
memory = "16 gigs"
repeatable = "yes"
cpus = true
readiness = "/health"

[gpu]
modell = "4090"
count = "1"

[env]
DEBUG = true

[registry]
password_file = "/nonexistent/password"

[limits]
run_time = "fast"

[wat]
x = 1
"""
    assert faults_of(text, memory="lots") == [
        "w.toml: nam: is not known: did you mean name?",
        'w.toml: image: must be text, such as "abc", not 7',
        "w.toml: ports: must be a port from 1 to 65535, not 99999",
        'w.toml: command: must be a list, such as ["python3", "server.py"], not \'python3 server.py\'',
        "w.toml: replicas: must be a whole number from 0 up, not -1",
        "w.toml: memory: '16 gigs' is not a size: write for example 512MiB or 4GiB",
        "w.toml: repeatable: must be true or false, not 'yes'",
        "w.toml: cpus: must be a number, not true",
        "w.toml: readiness: must be a table, [readiness], not '/health'",
        "w.toml: gpu.modell: is not known: did you mean gpu.model?",
        "w.toml: gpu.count: must be a whole number from 0 up, not '1'",
        'w.toml: env: DEBUG must be text, such as "abc", not true',
        "w.toml: registry.password_file: cannot be read: [Errno 2] No such file or directory: '/nonexistent/password'",
        "w.toml: limits.run_time: 'fast' is not a duration: write for example 90s, 10m or 1h30m",
        *[fault for fault in faults_of("[wat]\nx = 1") if "wat" in fault],
        "options: memory: 'lots' is not a size: write for example 512MiB or 4GiB",
        "w.toml: name: is missing",
    ]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("gpu.mem", "gpu.memory"), ("gpus", "gpu.count"), ("port", "ports"), ("cmd", "command"), ("environment", "env")],
)
def test_suggestions(typed: str, meant: str) -> None:
    section, _, key = typed.rpartition(".")
    text = f"[{section}]\n{key} = 1" if section else f"{typed} = 1"
    assert f"w.toml: {typed}: is not known: did you mean {meant}?" in faults_of(text)


def test_a_file_that_is_not_there_or_not_toml(tmp_path: Path) -> None:
    with pytest.raises(SpecFault, match=r"nothing\.toml: cannot be read: No such file"):
        load(tmp_path / "nothing.toml")
    with pytest.raises(SpecFault, match="cannot be read: Is a directory"):
        load(tmp_path)
    assert "is not valid TOML" in faults_of("name = ")[0]
    (tmp_path / "binary").write_bytes(b"\xff\x00")
    with pytest.raises(SpecFault, match="is not valid TOML"):
        load(tmp_path / "binary")
    assert "is longer than" in faults_of("#" * 300_000)[0]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
KEYS = st.sampled_from(
    [
        "name",
        "image",
        "command",
        "env",
        "ports",
        "replicas",
        "cpus",
        "memory",
        "gpu",
        "readiness",
        "limits",
        "registry",
        "x",
    ]
)


@given(st.dictionaries(KEYS, VALUES, max_size=6))
def test_whatever_is_written_is_a_spec_or_faults(document: dict[str, Any]) -> None:
    source = Source({"name": "a", "image": "b", "ports": [1], **document}, "w.toml")
    with contextlib.suppress(SpecFault):
        assert isinstance(to_spec(source), pb.WorkspaceSpec)


def test_the_documented_file_has_every_key_and_the_defaults_it_says() -> None:
    text = (Path(__file__).parents[2] / "docs/cli.md").read_text()
    [block] = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    spec_of(block)
    keys = {line.split(" = ")[0] for line in block.splitlines() if " = " in line}
    named = {key.rpartition(".")[2] for key in _KEYS} - {"env", "password_file"}
    assert named <= keys
