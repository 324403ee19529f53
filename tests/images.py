"""Test images made without a registry, and a registry to push them to.

An image is a root file system of a few Debian packages and one script, given to `docker import`. Its tag is a hash
of what it is made of, so that it is built once per machine and two test runs side by side share it.
"""

import contextlib
import hashlib
import io
import json
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import docker

ECHO = Path(__file__).with_name("echo.py")
BASE_IMAGE = Path(__file__).parent.parent / "scripts" / "base-image"
#: The registry fixture's user, and the bcrypt hash of the password (htpasswd is in no package that we need otherwise).
USERNAME, PASSWORD = "puller", "let-me-in"
HTPASSWD = "puller:$2b$05$abcdefghijklmnopqrstuu3Jd./u/rH1RxB6auX5v7gLP6uWhKCgG\n"


def why_no_images() -> str:
    """Why test images cannot be built here; "" if they can."""
    missing = [tool for tool in ("apt-get", "dpkg") if not shutil.which(tool)]
    return f"needs Debian's {' and '.join(missing)} to build images" if missing else ""


def echo_image(api: docker.APIClient) -> str:
    """The reference of an image that runs echo.py; builds it (some 5 s) if this machine has none yet."""
    digest = hashlib.sha256(BASE_IMAGE.read_bytes() + ECHO.read_bytes()).hexdigest()[:16]
    reference = f"ngpu-test-echo:{digest}"
    if api.images(reference):
        return reference
    with tempfile.TemporaryDirectory(prefix="ngpu-image-") as directory:
        root = Path(directory) / "root"
        subprocess.run([BASE_IMAGE, "--rootfs", root, "busybox-static"], check=True, capture_output=True)
        (root / "srv").mkdir()
        shutil.copy(ECHO, root / "srv" / "echo.py")
        # `sh`, `sleep`, `cat` and the like, for tests that look around.
        for tool in ("sh", "sleep", "cat", "id", "ls"):
            (root / "bin" / tool).unlink(missing_ok=True)
            (root / "bin" / tool).symlink_to("busybox")
        tar_path = Path(directory) / "root.tar"
        with tarfile.open(tar_path, "w") as tar:
            tar.add(root, arcname=".", filter=_plain)
        command = json.dumps(["/usr/bin/python3", "-u", "/srv/echo.py"])
        repository, tag = reference.rsplit(":", 1)
        said = api.import_image(src=str(tar_path), repository=repository, tag=tag, changes=[f"CMD {command}"])
        answer = json.loads(said.splitlines()[-1])
        if "error" in answer:
            raise RuntimeError(answer["error"])
    return reference


def variant(api: docker.APIClient, name: str, *changes: str, extra_bytes: int = 0) -> str:
    """The echo image with Dockerfile instructions (`USER 1000`, `ENV A=b`) and a layer of random bytes on top."""
    base = echo_image(api)
    tag = hashlib.sha256(repr((name, base, changes, extra_bytes)).encode()).hexdigest()[:16]
    reference = f"ngpu-test-{name}:{tag}"
    if api.images(reference):
        return reference
    lines = [f"FROM {base}", *changes]
    context = io.BytesIO()
    with tarfile.open(fileobj=context, mode="w") as tar:
        if extra_bytes:
            lines.append("COPY extra /extra")
            _add(tar, "extra", hashlib.shake_256(tag.encode()).digest(extra_bytes))
        _add(tar, "Dockerfile", "\n".join(lines).encode())
    context.seek(0)
    for event in api.build(
        fileobj=context, custom_context=True, tag=reference, rm=True, forcerm=True, network_mode="none", decode=True
    ):
        if "error" in event:
            raise RuntimeError(event["error"])
    return reference


def echo_directory(images: Path, name: str = "echo", env: Mapping[str, str] | None = None) -> str:
    """The same server as an image directory of the process engine below `images`; returns its reference."""
    directory = images / name.replace("/", "_").replace(":", "_")
    directory.mkdir(parents=True, exist_ok=True)
    shutil.copy(ECHO, directory / "echo.py")
    lines = ["command = " + json.dumps([sys.executable, "-u", "echo.py"]), "[env]"]
    lines += [f"{key} = {json.dumps(value)}" for key, value in (env or {}).items()]
    (directory / "image.toml").write_text("\n".join(lines) + "\n")
    return name


#: Starts a program; the second is where a port that it opens is reached.
Spawn = tuple[Callable[..., "subprocess.Popen[bytes]"], str]


@contextlib.contextmanager
def registry(*, credentials: bool = False, data: Path | None = None, spawn: Spawn | None = None) -> Iterator[str]:
    """A registry on a free port of 127.0.0.1, its `host:port`; with `credentials` it wants USERNAME and PASSWORD.

    `data`: two may share a directory. `spawn`: to run it in another network namespace.
    """
    start, reached_at = spawn or (_quietly, "127.0.0.1")
    with tempfile.TemporaryDirectory(prefix="ngpu-registry-") as directory:
        root = Path(directory)
        port = _free_port()
        auth = ""
        if credentials:
            (root / "htpasswd").write_text(HTPASSWD)
            auth = f"auth: {{htpasswd: {{realm: test, path: {root}/htpasswd}}}}\n"
        (root / "config.yml").write_text(
            "version: 0.1\nlog: {level: error}\n"
            f"storage: {{filesystem: {{rootdirectory: {data or root / 'data'}}}}}\n"
            f"http: {{addr: '{'0.0.0.0' if spawn else '127.0.0.1'}:{port}'}}\n{auth}"
        )
        process = start("docker-registry", "serve", str(root / "config.yml"))
        try:
            _wait_until_open(reached_at, port, process)
            yield f"127.0.0.1:{port}"
        finally:
            process.kill()
            process.wait()


def push(api: docker.APIClient, image: str, registry_address: str, name: str, *, credentials: bool = False) -> str:
    """Push a local image to the registry under that name, forget it here, and return its reference."""
    reference = f"{registry_address}/{name}"
    repository, tag = reference.rsplit(":", 1)
    api.tag(image, repository, tag)
    auth = {"username": USERNAME, "password": PASSWORD} if credentials else None
    for event in api.push(reference, stream=True, decode=True, auth_config=auth):
        if "error" in event:
            raise RuntimeError(event["error"])
    api.remove_image(reference)
    return reference


def _plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = "root"
    if member.name == "./tmp":
        member.mode = 0o1777
    return member


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _quietly(*argv: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _wait_until_open(host: str, port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError("docker-registry ended at once")
        with contextlib.suppress(OSError):
            socket.create_connection((host, port), timeout=1).close()
            return
        time.sleep(0.05)
    raise RuntimeError("docker-registry does not listen")
