"""The command `ngpu-node`: what it says, and what it ends with."""

import asyncio
import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from nodedaemon.__main__ import app
from tests.nodedaemon.fakes import control_plane


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("NGPU_NODE_"):
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def quiet_logs() -> Iterator[None]:
    """The command sets logging up for its process, which here is that of the tests."""
    import logging

    import structlog

    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    structlog.reset_defaults()


def ngpu_node(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("command", [(), ("run",), ("join",), ("show",), ("settings",)])
def test_help_teaches(command: tuple[str, ...]) -> None:
    result = ngpu_node(*command, "--help")
    assert result.exit_code == 0
    assert len(result.output) > 100


def test_settings_are_listed() -> None:
    result = ngpu_node("settings")
    assert result.exit_code == 0
    assert "NGPU_NODE_CONTROLPLANE" in result.output


def test_every_fault_of_the_settings_is_told(tmp_path: Path) -> None:
    result = ngpu_node("run", "--state-dir", tmp_path, "--engine", "podman", "--controlplane", "nowhere")
    assert result.exit_code == 2
    assert "engine:" in result.stderr
    assert "controlplane:" in result.stderr


def test_state_dir_belongs_to_one_daemon(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = ngpu_node("run", "--state-dir", tmp_path, "--engine", "process")
    assert result.exit_code == 2
    assert "Another node daemon" in result.stderr


def test_joining_wants_a_token(tmp_path: Path) -> None:
    result = ngpu_node("join", "--state-dir", tmp_path)
    assert result.exit_code == 4
    assert "--token-file" in result.stderr


async def test_joining(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("join-me\n")
    options = ("--state-dir", tmp_path / "node", "--name", "my-node", "--token-file", token)
    async with control_plane() as plane:
        result = await asyncio.to_thread(ngpu_node, "join", *options, "--controlplane", plane.address)
        assert result.exit_code == 0, result.stderr
        (address,) = plane.nodes
        assert address in result.output
        token.write_text("stale")
        result = await asyncio.to_thread(ngpu_node, "join", *options, "--controlplane", plane.address)
        assert result.exit_code == 4
        assert "not known here" in result.stderr


def test_joining_where_nobody_listens(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("join-me")
    with contextlib.closing(__import__("socket").create_server(("127.0.0.1", 0))) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    result = ngpu_node("join", "--state-dir", tmp_path, "--token-file", token, "--controlplane", address)
    assert result.exit_code == 1
    assert "did not answer" in result.stderr


def test_show_tells_address_and_machine(tmp_path: Path) -> None:
    result = ngpu_node("show", "--state-dir", tmp_path, "--engine", "process", "--json")
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["address"].startswith("0x")
    assert facts["engine"].startswith("process")
    assert facts["cpus"] >= 1
    # Looking decides nothing.
    assert not (tmp_path / "engine").exists()
    assert ngpu_node("show", "--state-dir", tmp_path, "--engine", "process").stdout.startswith("address:")
