"""`ngpu-bridge`: reads the settings, wires the parts, serves until told to stop."""

from ngpu import lean  # isort: skip, before structlog  # noqa: F401

import asyncio
import resource
import signal
import ssl
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import grpc
import structlog
import typer
from ngpu import heap
from ngpu.settings import split_address

from httpbridge import config as configuration
from httpbridge import log as logs
from httpbridge.about import About
from httpbridge.answers import Answers
from httpbridge.app import App, Limits
from httpbridge.bodies import BodyReader, Budget
from httpbridge.calls import ControlPlane
from httpbridge.config import Config
from httpbridge.credentials import TokenFile
from httpbridge.errors import ConfigFault
from httpbridge.lookups import Lookups
from httpbridge.metrics import Metrics
from httpbridge.raw import Raw
from httpbridge.routes import passthrough, raw, routes
from httpbridge.submit import Submission
from httpbridge.tasks import Tasks

#: Files open besides connections.
SPARE_FILES = 256
#: Whoever calls first is to find the bridge connected, if the control plane can be reached within this time.
START_S = 5.0

log = structlog.get_logger(__name__)


async def serve(config: Config) -> None:
    """Serve until SIGTERM or SIGINT."""
    token = TokenFile(config.token_file)
    async with ControlPlane(config.controlplane, token, credentials=_client_tls(config)) as control_plane:
        app, about = assemble(config, control_plane)
        batch = asyncio.create_task(control_plane.run(), name="batch")
        giving_back = asyncio.create_task(heap.give_back(), name="heap")
        try:
            await _listen(config, app, about, batch, control_plane.batch.tried)
        finally:
            batch.cancel()
            giving_back.cancel()
            await asyncio.gather(batch, giving_back, return_exceptions=True)


def assemble(config: Config, control_plane: ControlPlane) -> tuple[App, About]:
    """All parts, each given what it needs."""
    metrics = Metrics()
    budget = Budget(config.body_memory)
    reader = BodyReader(limit_bytes=config.body_limit, stall_limit_s=config.stall_time, total_limit_s=config.body_time)
    answers = Answers(control_plane)
    submission = Submission(
        control_plane, answers, reader, budget,
        accepted_result_code=config.accepted_result_code,
        require_auth=config.require_auth,
        sync_wait_s=config.sync_wait,
        trusted_proxies=config.proxies,
    )  # fmt: skip
    tasks = Tasks(
        control_plane, answers, budget,
        zone=config.zone, wait_limit_s=config.sync_wait, require_auth=config.require_auth,
    )  # fmt: skip
    lookups = Lookups(control_plane, require_auth=config.require_auth)
    about = About(control_plane.batch, metrics)
    limits = Limits(
        connections=config.max_connections,
        idle_s=config.idle_time,
        stall_s=config.stall_time,
        line_bytes=config.max_line,
    )
    _measure(metrics, control_plane, budget)
    pass_through = Raw(control_plane, reader, trusted_proxies=config.proxies)
    table = routes(submission, tasks, lookups, about)
    return App(table, passthrough(submission), raw(pass_through), metrics, limits), about


async def _listen(config: Config, app: App, about: About, batch: "asyncio.Task[None]", tried: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    # Without its stream to the control plane the bridge is nothing: should that task ever die, so does the bridge.
    batch.add_done_callback(lambda _: stop.set())
    begun = {asyncio.create_task(event.wait(), name="start") for event in (tried, stop)}
    await asyncio.wait(begun, timeout=START_S, return_when=asyncio.FIRST_COMPLETED)
    for waiting in begun:
        waiting.cancel()
    host, port = split_address(config.listen)
    connections = app.server()
    server = await loop.create_server(
        connections, host, port, ssl=_server_tls(config), reuse_port=config.reuse_port or None, backlog=1024
    )
    address, port = server.sockets[0].getsockname()[:2]
    shown = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
    _write_whole(config.state_dir / "address", shown)
    log.info("listening", address=shown, tls=config.tls_cert is not None, controlplane=config.controlplane)
    await stop.wait()
    log.info("stopping", connections=len(connections.connections))
    about.is_stopping = True
    server.close()
    connections.pre_shutdown()
    await connections.shutdown(config.stop_grace)
    (config.state_dir / "address").unlink(missing_ok=True)
    if batch.done():
        batch.result()


def _measure(metrics: Metrics, control_plane: ControlPlane, budget: Budget) -> None:
    batch = control_plane.batch
    metrics.gauges |= {
        "ngpu_bridge_control_plane_up": ("1 while the stream to the control plane is up.", lambda: batch.is_up),
        "ngpu_bridge_calls_in_flight": ("Calls without an answer of the control plane.", lambda: batch.in_flight),
        "ngpu_bridge_body_memory_bytes": ("Of large request bodies being read.", lambda: budget.used_bytes),
    }
    metrics.counters |= {
        "ngpu_bridge_batch_frames": ("Frames sent to the control plane.", lambda: batch.frames_sent),
        "ngpu_bridge_batch_calls": ("Calls in them.", lambda: batch.calls_sent),
    }


def _server_tls(config: Config) -> ssl.SSLContext | None:
    if config.tls_cert is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(config.tls_cert, config.tls_key)
    return context


def _client_tls(config: Config) -> grpc.ChannelCredentials | None:
    if not config.with_tls:
        return None
    return grpc.ssl_channel_credentials(config.tls_ca.read_bytes() if config.tls_ca else None)


def _write_whole(path: Path, text: str) -> None:
    """Whoever sees the file sees all of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".new")
    draft.write_text(text)
    draft.replace(path)


def _allow_files(count: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(count, hard) if hard >= 0 else count, hard))


cli = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@cli.command()
def bridge(  # noqa: PLR0917 typer calls it
    config: Annotated[Path | None, typer.Option(help="A TOML file with settings.")] = None,
    controlplane: Annotated[
        str | None, typer.Option(help="HOST:PORT of the control plane; of all, with commas.")
    ] = None,
    token_file: Annotated[Path | None, typer.Option(help="File with the bridge's token.")] = None,
    listen: Annotated[str | None, typer.Option(help="HOST:PORT for HTTP; port 0: any free one.")] = None,
    state_dir: Annotated[Path | None, typer.Option(help="Where `address` is written once it serves.")] = None,
    tls: Annotated[bool | None, typer.Option("--tls", help="Speak TLS to the control plane.")] = None,
    tls_ca: Annotated[Path | None, typer.Option(help="Its roots, if not the system's.")] = None,
    display_timezone: Annotated[str | None, typer.Option(help="Zone of times in answers.")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    settings: Annotated[bool, typer.Option("--settings", help="List all settings and exit.")] = False,
) -> None:
    """The documented JSON/REST surface of NGPU over HTTP.

    Every setting may stand in a TOML file (--config, or NGPU_BRIDGE_CONFIG) or in the environment as
    NGPU_BRIDGE_<NAME>; what is given here wins. `--settings` lists them all.
    """
    if settings:
        for name, default, meaning in configuration.settings():
            variable = configuration.ENV_PREFIX + name.upper()
            typer.echo(f"{name} = {default or '(empty)'}\n    {variable}\n    {meaning}\n")
        return
    options = {
        "controlplane": controlplane,
        "token_file": token_file,
        "listen": listen,
        "state_dir": state_dir,
        "tls": tls,
        "tls_ca": tls_ca,
        "display_timezone": display_timezone,
        "log_level": log_level,
    }
    try:
        loaded = configuration.load(config, options)
        logs.set_up(loaded.log_level, loaded.log_format)
        _allow_files(loaded.max_connections + SPARE_FILES)
        heap.settle()
        asyncio.run(serve(loaded))
    except ConfigFault as fault:
        sys.stderr.write(f"ngpu-bridge cannot start:\n{fault}\n")
        raise typer.Exit(2) from None
    except OSError as error:
        sys.stderr.write(f"ngpu-bridge cannot start:\n{error}\n")
        raise typer.Exit(1) from None


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script."""
    cli(arguments)


if __name__ == "__main__":
    main()
