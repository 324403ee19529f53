"""What all commands have in common: the options for connection and output, and how they end."""

import contextlib
import functools
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from controlplane.ctl.output import Output, plain
from controlplane.ctl.problem import Exit, Problem
from controlplane.ctl.session import DEFAULT_SERVER, Session, Target

_PANEL = "Connection and output"


def _shared(
    *,
    server: Annotated[
        str,
        typer.Option(
            "--server",
            envvar="NGPU_SERVER",
            metavar="HOST:PORT,...",
            help="The control plane, or all.",
            rich_help_panel=_PANEL,
        ),
    ] = DEFAULT_SERVER,
    token_file: Annotated[
        Path | None,
        typer.Option(
            "--token-file",
            metavar="FILE",
            help="File with the token. Otherwise $NGPU_TOKEN, $NGPU_TOKEN_FILE, ./.ngpu/controlplane/operator.token or "
            "~/.config/ngpu/token.",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    tls: Annotated[
        bool, typer.Option("--tls", envvar="NGPU_TLS", help="Connect with TLS.", rich_help_panel=_PANEL)
    ] = False,
    tls_ca: Annotated[
        Path | None,
        typer.Option(
            "--tls-ca",
            envvar="NGPU_TLS_CA",
            metavar="FILE",
            help="Certificate of the CA to trust; means --tls.",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    plaintext: Annotated[
        bool,
        typer.Option(
            "--plaintext",
            envvar="NGPU_PLAINTEXT",
            help="Send the token unencrypted to another machine.",
            rich_help_panel=_PANEL,
        ),
    ] = False,
    json: Annotated[
        bool,
        typer.Option("--json", help="Print the answer as JSON: the message of the API.", rich_help_panel=_PANEL),
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print the bare essential.", rich_help_panel=_PANEL)
    ] = False,
) -> Session:
    target = Target(server=server, token_file=token_file, tls=tls, tls_ca=tls_ca, plaintext=plaintext)
    return Session(target, Output(json=json, quiet=quiet))


_SHARED = inspect.signature(_shared).parameters


def connected(function: Callable[..., None]) -> Callable[..., None]:
    """A command of a function whose first parameter is the Session: it gains the shared options, and ends in order."""
    own = list(inspect.signature(function).parameters.values())[1:]

    @functools.wraps(function)
    def run(**arguments: Any) -> None:
        shared = {name: arguments.pop(name) for name in _SHARED}
        with _ending_well(), _shared(**shared) as session:
            function(session, **arguments)

    del run.__wrapped__  # typer would read its signature instead
    run.__signature__ = inspect.Signature([*own, *_SHARED.values()])  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *_SHARED.values())}
    return run


@contextlib.contextmanager
def _ending_well() -> Iterator[None]:
    """Ends the command with one line on stderr and the right exit code, whatever happens inside. Never a traceback."""
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except Problem as error:
        _tell(str(error))
        raise typer.Exit(error.code) from error
    except KeyboardInterrupt as error:
        raise typer.Exit(Exit.INTERRUPTED) from error
    except BrokenPipeError as error:
        # Whoever read our output has gone (`| head`); the interpreter must not complain when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(Exit.FAILED) from error
    except Exception as error:
        if os.environ.get("NGPU_DEBUG"):
            traceback.print_exception(error)
        _tell(f"Something unforeseen: {type(error).__name__}: {error}. NGPU_DEBUG=1 shows where; please report it.")
        raise typer.Exit(Exit.FAILED) from error


def _tell(text: str) -> None:
    for line in text.splitlines():
        sys.stderr.write(f"ngpu: {plain(line)}\n")
