"""The first command of the README, with each engine, as a new user runs it."""

import os
import re
import signal
import subprocess
import time
import uuid
from pathlib import Path

import pytest

from scripts.programs import BIN, ROOT

UP_LIMIT_S = 180


def left_running(marker: str) -> list[str]:
    """Command lines of processes that inherited the marker of a test."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if marker.encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            pass  # ended while we looked
    return found


def containers_of(node_home: Path) -> list[str]:
    """Containers of the node that kept its key there."""
    shown = subprocess.run(
        [BIN / "ngpu-node", "show", "--state-dir", node_home], capture_output=True, text=True, check=True
    )
    address = re.search("0x[0-9a-fA-F]{40}", shown.stdout)
    assert address, shown.stdout
    command = ["docker", "ps", "-aq", "--filter", f"label=ngpu.node={address[0]}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.slow
@pytest.mark.timeout(UP_LIMIT_S + 20)
@pytest.mark.parametrize("engine", ["process", pytest.param("docker", marks=pytest.mark.docker)])
def test_up_check_deploys_calls_verifies_and_leaves_nothing(
    engine: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    if engine == "docker":
        request.getfixturevalue("docker_engine")
    marker = f"UP_TEST={uuid.uuid4()}"
    done = subprocess.run(
        ["env", marker, ROOT / "scripts" / "up", "--check", "--engine", engine, "--state-dir", tmp_path],
        capture_output=True,
        text=True,
        check=False,
        timeout=UP_LIMIT_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("160x160 -> 320x320") == 2, done.stdout
    assert left_running(marker) == []
    assert engine != "docker" or containers_of(tmp_path / "node") == []


@pytest.mark.slow
@pytest.mark.timeout(UP_LIMIT_S + 20)
def test_up_stays_until_ctrl_c_and_then_leaves_nothing(tmp_path: Path) -> None:
    marker = f"UP_TEST={uuid.uuid4()}"
    anywhere = ["--port", "0", "--grpc-port", "0", "--state-dir", str(tmp_path)]
    command = ["env", marker, str(ROOT / "scripts" / "up"), "--engine", "process", *anywhere]
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
    assert left_running(marker) == []
