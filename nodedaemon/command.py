"""What the commands of `ngpu-node` have in common: settings, one daemon a state directory, and how they end."""

import contextlib
import fcntl
import resource
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import typer

from nodedaemon import config
from nodedaemon.errors import ConfigFault, NodeError, StateDirBusy


def settings_of(file: Path | None, options: dict[str, Any]) -> config.Config:
    """Settings from file, environment and what was typed; ends the command if they cannot be used."""
    try:
        return config.load(file, options)
    except ConfigFault as fault:
        fail(f"The settings cannot be used:\n{textwrap.indent(str(fault), '  ')}", fault.exit_code)


@contextlib.contextmanager
def told() -> Iterator[None]:
    """What is the operator's business is told in a sentence, and the exit status says which kind it was."""
    try:
        yield
    except NodeError as fault:
        fail(str(fault), fault.exit_code)
    except OSError as fault:
        fail(str(fault), 1)


def fail(words: str, code: int) -> NoReturn:
    """End the command."""
    print(f"ngpu-node: {words}", file=sys.stderr)  # noqa: T201
    raise typer.Exit(code)


@contextlib.contextmanager
def alone(state_dir: Path) -> Iterator[None]:
    """Two daemons with one key would take each other's sessions. Raises StateDirBusy."""
    state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (state_dir / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StateDirBusy from None
        yield


def raise_open_files() -> None:
    """A connection for each attempt: the usual limit of 1,024 is soon reached."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65_536) if hard > 0 else 65_536, hard))
