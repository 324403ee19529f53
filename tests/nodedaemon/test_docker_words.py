"""What is pure about Docker: its words, what a container is made of, and whose a cached image is."""

from pathlib import Path
from typing import Any

import pytest

from nodedaemon.engine import (
    GIB,
    Credentials,
    CredentialsRefused,
    DiskFull,
    EngineError,
    Exit,
    GpuMissing,
    ImageMissing,
    Mount,
    OutOfMemory,
    PullFailed,
    RegistryUnreachable,
    StartFailed,
    device_check,
)
from nodedaemon.engine import container as made
from nodedaemon.engine.docker_words import PullProgress, pull_error, start_error
from nodedaemon.engine.network import rules
from nodedaemon.engine.private_images import PrivateImages
from nodedaemon.engine.volumes import check, name_of
from tests.nodedaemon.fake_engine import assignment

LABELS = {"ngpu.node": "0xnode"}
HUB = "pull access denied for x/y, repository does not exist or may require 'docker login': denied: requested access to"


@pytest.mark.parametrize(
    ("said", "credentials", "error"),
    [
        ("manifest for r/x:1 not found: manifest unknown: manifest unknown", False, ImageMissing),
        (HUB, False, ImageMissing),
        (HUB, True, ImageMissing),
        ("no matching manifest for linux/arm64/v8 in the manifest list entries", False, ImageMissing),
        ("invalid reference format: repository name must be lowercase", False, ImageMissing),
        ('Head "https://r/v2/x/manifests/1": no basic auth credentials', False, CredentialsRefused),
        ("unauthorized: authentication required", True, CredentialsRefused),
        ("Get https://r/v2/: denied: access forbidden", True, CredentialsRefused),
        ('Get "http://r/v2/": dial tcp 127.0.0.1:9: connect: connection refused', False, RegistryUnreachable),
        ('Get "https://r/v2/": dial tcp: lookup r on 10.0.0.1:53: no such host', False, RegistryUnreachable),
        ("net/http: request canceled while waiting for connection", False, RegistryUnreachable),
        ("x509: certificate signed by unknown authority", False, RegistryUnreachable),
        ("write /var/lib/docker/tmp/GetImageBlob1: no space left on device", False, DiskFull),
        ("toomanyrequests: You have reached your pull rate limit", False, PullFailed),
        ("something new", False, PullFailed),
    ],
)
def test_words_of_a_pull(said: str, credentials: bool, error: type[EngineError]) -> None:
    found = pull_error(said, "r/x:1", credentials=credentials)
    assert type(found) is error
    assert "r/x:1" in str(found) or said in str(found)


@pytest.mark.parametrize(
    ("said", "error", "words"),
    [
        ('could not select device driver "" with capabilities: [[gpu]]', GpuMissing, "NVIDIA container toolkit"),
        ("nvidia-container-cli: device error: GPU-9: unknown device: unknown", GpuMissing, "there is no such GPU"),
        ("nvidia-container-cli: initialization error: driver not loaded", GpuMissing, "toolkit failed"),
        ('exec: "x": executable file not found in $PATH: unknown', StartFailed, "start command"),
        ("container init was OOM-killed (memory limit too low?)", OutOfMemory, "its limit is 2 GiB"),
        ("mkdir /var/lib/docker/overlay2/x: no space left on device", DiskFull, "disk"),
        ("something new", StartFailed, "something new"),
    ],
)
def test_words_of_a_start(said: str, error: type[EngineError], words: str) -> None:
    found = start_error(said, memory_bytes=2 * GIB)
    assert type(found) is error
    assert words in str(found)


def event(layer: str, status: str, current: int = 0, total: int = 0) -> dict[str, Any]:
    detail = {"current": current, "total": total} if total else {}
    return {"id": layer, "status": status, "progressDetail": detail}


def test_progress_counts_bytes_of_all_layers_and_never_falls() -> None:
    progress = PullProgress()
    heard = [
        progress.feed(e)
        for e in (
            event("1.0", "Pulling from library/x"),
            event("a", "Pulling fs layer"),
            event("b", "Pulling fs layer"),
            event("a", "Downloading", 50, 100),
            # Ten times as large, which makes the share that is done smaller.
            event("b", "Downloading", 0, 1000),
            event("b", "Downloading", 500, 1000),
            event("a", "Download complete"),
            event("b", "Downloading", 1000, 1000),
            event("a", "Pull complete"),
            event("b", "Extracting", 500, 1000),
            event("b", "Pull complete"),
            {"status": "Status: Downloaded newer image for x"},
        )
    ]
    assert heard == [0, 0, 0, 17, 17, 35, 38, 70, 72, 86, 99, 99]


def test_progress_of_nothing_to_do() -> None:
    progress = PullProgress()
    assert progress.feed({"status": "Status: Image is up to date for x"}) == 0
    assert progress.feed(event("a", "Already exists")) == 0


@pytest.mark.parametrize(
    ("user", "root", "name"),
    [
        ("", True, True), ("root", True, True), ("0", True, False), ("00:5", True, False), ("+0", True, False),
        ("0:0", True, False), ("root:app", True, True), ("1000", False, False), ("1000:0", False, False),
        ("app", False, True), ("app:app", False, True),
    ],
)  # fmt: skip
def test_which_users_are_root(user: str, root: bool, name: bool) -> None:
    assert made.is_root(user) is root
    assert made.is_name(user) is name


def test_a_name_may_be_roots() -> None:
    passwd = "root:x:0:0::/:\napp:x:1000:0::/:\ntoor:x:0:0::/:\nbroken\n"
    assert made.is_named_root("toor:app", passwd)
    assert not made.is_named_root("app", passwd)
    assert not made.is_named_root("none", passwd)
    assert made.is_named_root("app", None)


def test_gpus_are_given_by_id() -> None:
    wanted = assignment(gpu_ids=("GPU-1", "GPU-2"), env={"NVIDIA_VISIBLE_DEVICES": "all"})
    config = made.config(wanted, {}, labels=LABELS, network="ngpu", publish=False, user="")
    assert config["HostConfig"]["DeviceRequests"] == [
        {"DeviceIDs": ["GPU-1", "GPU-2"], "Capabilities": [["gpu", "compute", "utility", "video"]]}
    ]
    assert "NVIDIA_VISIBLE_DEVICES=GPU-1,GPU-2" in config["Env"]


@pytest.mark.parametrize("path", ["relative", "/", "/a/../b", ""])
def test_writable_paths_are_absolute(path: str) -> None:
    with pytest.raises(EngineError, match="cannot be a writable path"):
        made.config(assignment(writable_paths=(path,)), {}, labels=LABELS, network="ngpu", publish=False, user="")


def test_a_share_of_a_gpu_is_told_and_gets_the_gpu() -> None:
    config = made.config(
        assignment(gpu_ids=("GPU-1",), gpu_share=250), {}, labels=LABELS, network="ngpu", publish=False, user=""
    )
    assert config["HostConfig"]["DeviceRequests"][0]["DeviceIDs"] == ["GPU-1"]
    assert "NGPU_GPU_SHARE_MILLI=250" in config["Env"]


def test_volumes_are_the_workspaces_own_and_in_place_of_what_the_image_declares() -> None:
    wanted = assignment(workspace_uid="w-1", mounts=(Mount("models", "/models"),), writable_paths=("/out",))
    image: dict[str, Any] = {"Volumes": {"/models": {}, "/data": {}}}
    config = made.config(wanted, image, labels=LABELS, network="ngpu", publish=False, user="")
    (mount,) = config["HostConfig"]["Mounts"]
    assert (mount["Type"], mount["Target"], mount["VolumeOptions"]) == ("volume", "/models", {"NoCopy": True})
    assert config["HostConfig"]["Tmpfs"].keys() == {"/tmp", "/out", "/data"}
    assert "NGPU_VOLUME_MODELS=/models" in config["Env"]
    others = [name_of("0xnode", "w-2", "models"), name_of("0xother", "w-1", "models"), name_of("0xnode", "w-1", "m")]
    assert mount["Source"] not in others


@pytest.mark.parametrize(
    ("uid", "name"), [("", "models"), ("../w", "models"), ("w-1", "../m"), ("w-1", "M"), ("w-1", "")]
)
def test_a_volume_leads_nowhere_else(uid: str, name: str) -> None:
    with pytest.raises(EngineError, match="cannot be a volume"):
        check(assignment(workspace_uid=uid, mounts=(Mount(name, "/m"),)))


@pytest.mark.parametrize(
    ("mounted", "said", "directory"),
    [
        ("cgroup2 /sys/fs/cgroup cgroup2 rw", "0::/docker/c1", "/sys/fs/cgroup/docker/c1"),
        (
            "cgroup2 /sys/fs/cgroup cgroup2 rw",
            "0::/system.slice/docker-c1.scope",
            "/sys/fs/cgroup/system.slice/docker-c1.scope",
        ),
        (
            "cgroup /cg/m cgroup rw,memory 0 0\ncgroup /cg/devices cgroup rw,devices 0 0\ncgroup2 /cg/u cgroup2 rw",
            "4:memory:/m\n3:devices:/docker/c1\n0::/u",
            "/cg/devices/docker/c1",
        ),
        ("cgroup /cg/devices cgroup rw,devices,misc 0 0", "3:misc,devices:/docker/c1", "/cg/devices/docker/c1"),
    ],
)
def test_where_a_container_is_asked_about_its_devices(mounted: str, said: str, directory: str) -> None:
    assert device_check.group(said.splitlines(), device_check.mounts(mounted.splitlines())) == directory


def test_a_late_out_of_memory_flag_is_made_up_for() -> None:
    found = {
        "Id": "c1",
        "Config": {"Labels": {"ngpu.replica": "r-1", "ngpu.ports": "8080"}},
        "State": {
            "Status": "exited", "ExitCode": 137, "OOMKilled": False,
            "StartedAt": "2026-01-01T00:00:00.123456789Z", "FinishedAt": "2026-01-01T00:00:02.5Z",
        },
        "HostConfig": {"Memory": GIB},
        "NetworkSettings": {"Networks": {}},
    }  # fmt: skip
    ended = made.read(found, network="ngpu", memory_kills=1).exit
    assert ended
    assert (ended.code, ended.out_of_memory, round(ended.ran_s, 2), ended.memory_bytes) == (137, True, 2.38, GIB)
    ended = made.read(found, network="ngpu", memory_kills=0).exit
    assert ended == Exit("r-1", 137, ran_s=ended.ran_s if ended else 0, memory_bytes=GIB)


def test_the_walls_name_the_bridge() -> None:
    assert all(rule[1:3] == ["-i", "ngpu0"] for rule in rules("ngpu0"))


ANNE, BEN = Credentials("a", "1"), Credentials("b", "2")


def test_a_private_image_is_open_to_those_who_opened_it(tmp_path: Path) -> None:
    images = PrivateImages(tmp_path / "state" / "private.json")
    assert images.open_to(None, "x:1", "sha256:1")
    images.opened(ANNE, "x:1", "sha256:1")
    for again in (images, PrivateImages(tmp_path / "state" / "private.json")):
        assert again.open_to(ANNE, "x:1", "sha256:1")
        assert not again.open_to(BEN, "x:1", "sha256:1")
        assert not again.open_to(None, "x:1", "sha256:1")
        # By another name it is the same image.
        assert not again.open_to(None, "y:1", "sha256:1")
    images.opened(BEN, "x:1", "sha256:1")
    assert images.open_to(ANNE, "x:1", "sha256:1")
    assert images.open_to(BEN, "x:1", "sha256:1")
    # Who gets it without credentials shows that it is open to all.
    images.opened(None, "x:1", "sha256:1")
    assert images.open_to(None, "x:1", "sha256:1")


def test_credentials_that_are_refused_make_nothing_private(tmp_path: Path) -> None:
    images = PrivateImages(tmp_path / "private.json")
    images.opened(ANNE, "x:1")
    images.refused(ANNE, "x:1")
    images.refused(BEN, "y:1")
    assert images.open_to(None, "x:1")
