"""The first command of the README, with each engine, as a new user runs it."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from scripts.programs import ROOT

UP_LIMIT_S = 180


def ours() -> set[str]:
    """Processes and containers of the platform that run now."""
    listed = subprocess.run(["ps", "-eo", "pid=,args="], capture_output=True, text=True, check=True).stdout.splitlines()
    processes = {line.split(None, 1)[0] for line in listed if re.search(r"/ngpu-(controlplane|node|bridge) ", line)}
    docker = subprocess.run(
        ["docker", "ps", "-q", "--filter", "label=ngpu.replica"], capture_output=True, text=True, check=False
    )
    return processes | set(docker.stdout.split())


@pytest.mark.slow
@pytest.mark.timeout(UP_LIMIT_S + 20)
@pytest.mark.parametrize("engine", ["process", pytest.param("docker", marks=pytest.mark.docker)])
def test_up_check_deploys_calls_verifies_and_leaves_nothing(engine: str, request: pytest.FixtureRequest) -> None:
    if engine == "docker":
        request.getfixturevalue("docker_engine")
    before = ours()
    done = subprocess.run(
        [ROOT / "scripts" / "up", "--check", "--engine", engine],
        capture_output=True,
        text=True,
        check=False,
        timeout=UP_LIMIT_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("160x160 -> 320x320") == 2, done.stdout
    assert ours() - before == set()


@pytest.mark.slow
@pytest.mark.timeout(UP_LIMIT_S + 20)
def test_up_stays_until_ctrl_c_and_then_leaves_nothing(tmp_path: Path) -> None:
    before = ours()
    anywhere = ["--port", "0", "--grpc-port", "0", "--state-dir", str(tmp_path)]
    command = [str(ROOT / "scripts" / "up"), "--engine", "process", *anywhere]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as up:
        assert up.stdout is not None
        seen = ""
        deadline = time.monotonic() + UP_LIMIT_S
        while "Ctrl-C stops everything" not in seen:
            line = up.stdout.readline()
            assert line, seen
            assert time.monotonic() < deadline, seen
            seen += line
        assert (tmp_path / "result-sync.png").read_bytes().startswith(b"\x89PNG")
        # As a terminal does: to the whole group.
        os.killpg(up.pid, signal.SIGINT)
        rest = up.stdout.read()
        assert up.wait(60) == 0, seen + rest
    assert "nothing is left running" in rest
    assert ours() - before == set()
