"""The node daemon's command: reads the settings, wires the parts in reading order, runs until a signal."""

from ngpu import lean  # isort: skip, before structlog  # noqa: F401

import asyncio
import json
import os
import secrets
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import grpc
import structlog
import typer
from ngpu import heap
from ngpu.settings import split_address

from nodedaemon import config, log
from nodedaemon.bulk import Bulk
from nodedaemon.caches import Caches
from nodedaemon.command import alone, raise_open_files, settings_of, told
from nodedaemon.dial import Dialler, LinkLost, stub_of, words_of
from nodedaemon.engine import EngineDown, EngineError
from nodedaemon.engine.process import ProcessEngine
from nodedaemon.errors import NodeError, NotEnrolled, Revoked
from nodedaemon.execute import Executor
from nodedaemon.flight import Recorder
from nodedaemon.gpu_tests import GpuTests
from nodedaemon.gpus import Gpus
from nodedaemon.held import Held
from nodedaemon.identity import Identity
from nodedaemon.journal import Journal
from nodedaemon.last_use import LastUse
from nodedaemon.machine import Machine
from nodedaemon.metrics import MetricsServer, NodeCollector
from nodedaemon.relay import Relay
from nodedaemon.replicas import Replicas
from nodedaemon.session import GOODBYE_LIMIT_S, Session, enroll
from nodedaemon.simulated.command import simulate, simulate_fault
from nodedaemon.spool import Spool

if TYPE_CHECKING:
    from nodedaemon.engine.docker import DockerEngine

#: For the control plane to acknowledge the last results when the daemon stops.
LAST_ACKS_S: Final = 2.0
#: For containers to stop when the daemon is to leave nothing behind.
STOP_CONTAINERS_S: Final = 60.0

_log = structlog.get_logger("nodedaemon")


async def serve(settings: config.Config, stop: asyncio.Event, *, stop_containers: bool) -> None:
    """Run until `stop` is set. Raises NodeError, OSError."""
    # Who we are, and what we have.
    identity = Identity.load(settings.state_dir / "node.key")
    kind = await _engine_kind(settings, identity.address)
    if settings.engine == "auto":
        _publish(settings.state_dir / "engine", kind)
    engine = _engine(settings, kind, identity.address)
    gpus, machine = Gpus(engine.owns), Machine(engine, allowed_images=settings.image_patterns)

    # What runs containers, and what passes requests to them.
    replicas = Replicas(
        engine,
        may_start=lambda one: machine.refusal(one.image) or gpus.refusal(one.gpu_ids) or caches.refusal(one),
        blind=None if isinstance(engine, ProcessEngine) else engine.blind,
    )
    gpu_tests = GpuTests(gpus, held=replicas.holds)
    caches = Caches(
        engine,
        replicas,
        LastUse(settings.state_dir / "volumes.json"),
        volume_limit_bytes=settings.volumes,
        disk_reserve_bytes=settings.disk_reserve,
        image_idle_s=settings.image_idle,
    )
    # Processes end with the daemon: nothing of theirs could be gone on with.
    held = Held(settings.state_dir) if kind == "docker" else None
    relay = Relay(held=held)
    spool, journal = (
        Spool(settings.state_dir / "spool", limit_bytes=settings.spool_limit),
        Journal(settings.state_dir / "journal"),
    )
    dialler = Dialler(settings.controlplane, tls=settings.with_tls, tls_ca=settings.tls_ca)
    bulk = Bulk(dialler.channel())
    recorder = Recorder(logs=engine, replicas=replicas, gpus=gpus, tell=bulk.record)
    executor = Executor(
        places=replicas,
        relay=relay,
        bulk=bulk,
        spool=spool,
        journal=journal,
        taken=held.taken if held else (),
        record=recorder.keep,
    )
    replicas.on_exit(executor.container_exited)

    # What speaks.
    session = Session(
        dialler=dialler,
        identity=identity,
        boot_id=secrets.token_hex(16),
        name=settings.node_name(),
        token=settings.join_token(),
        executor=executor,
        bulk=bulk,
        replicas=replicas,
        gpus=gpus,
        machine=machine,
        caches=caches,
        gpu_tests=gpu_tests,
    )
    metrics = MetricsServer(NodeCollector(executor, spool, session, replicas, gpus))
    address_file = settings.state_dir / "metrics_address"

    # Life.
    try:
        if settings.metrics_listen:
            _publish(address_file, await metrics.start(*split_address(settings.metrics_listen)))
        _log.info("node_started", node=identity.address, engine=kind, state_dir=str(settings.state_dir))
        async with asyncio.TaskGroup() as group:
            loops = [
                group.create_task(gpus.run(), name="gpus"),
                group.create_task(gpu_tests.run(), name="gpu tests"),
                group.create_task(machine.run(), name="machine"),
                group.create_task(replicas.run(), name="replicas"),
                group.create_task(caches.run(), name="caches"),
                group.create_task(executor.run(), name="executor"),
                group.create_task(spool.run(), name="spool"),
                group.create_task(recorder.run(), name="flights"),
                group.create_task(heap.give_back(), name="heap"),
            ]
            speaking = group.create_task(_speak(gpus, machine, replicas, session), name="session")
            await stop.wait()
            await _hand_over(settings, executor, session, speaking, leave=held is not None and not stop_containers)
            for loop in loops:
                loop.cancel()
    except BaseExceptionGroup as faults:
        fault = _first(faults)
        stop_containers = stop_containers or isinstance(fault, Revoked)
        raise fault from None
    finally:
        address_file.unlink(missing_ok=True)
        await metrics.stop()
        await spool.settle()
        journal.close()
        if stop_containers or kind == "process":
            # Processes are our children: nobody could take them up again.
            await _stop_containers(replicas)
        await engine.close()
        await bulk.shut()
        relay.close()
        if held:
            held.close()
        spool.close()
        _log.info("node_stopped", results_left=len(spool))


async def _speak(gpus: Gpus, machine: Machine, replicas: Replicas, session: Session) -> None:
    # A report that does not yet know what is here would say that nothing is.
    await gpus.read()
    await machine.survey()
    await replicas.listed()
    await session.run()


async def _hand_over(
    settings: config.Config, executor: Executor, session: Session, speaking: asyncio.Task[None], *, leave: bool
) -> None:
    """Finish what runs, leave it to the next daemon or give it back, and say goodbye."""
    _log.info("node_stopping", running=executor.running, grace_s=settings.stop_grace)
    executor.close()
    session.report_soon()
    await executor.finish(settings.stop_grace, leave=leave)
    if session.up:
        await executor.quiet(LAST_ACKS_S)
    session.leave()
    done, _ = await asyncio.wait([speaking], timeout=GOODBYE_LIMIT_S + 1)
    if not done:
        speaking.cancel()


async def _stop_containers(replicas: Replicas) -> None:
    try:
        await replicas.stop_all(within_s=STOP_CONTAINERS_S)
    except (EngineError, TimeoutError) as fault:
        _log.error("containers_left", reason=str(fault) or "they did not stop in time")


async def _engine_kind(settings: config.Config, node_addr: str) -> str:
    """`docker` or `process`.

    `auto` decides once: a Docker that is down one day must not turn containers into processes.
    """
    chosen = settings.state_dir / "engine"
    if settings.engine != "auto":
        return settings.engine
    if chosen.exists():
        return "process" if chosen.read_text().strip() == "process" else "docker"
    docker = _engine(settings, "docker", node_addr)
    try:
        await docker.info()
    except EngineDown as fault:
        _log.warning("docker_missing", reason=str(fault), instead="processes, which are not kept apart")
        return "process"
    finally:
        await docker.close()
    return "docker"


def _engine(settings: config.Config, kind: str, node_addr: str) -> "DockerEngine | ProcessEngine":
    if kind == "docker":
        # Docker's library takes 7 MiB: a node that runs processes needs none of it.
        from nodedaemon.engine.docker import DockerEngine

        return DockerEngine(node_addr, state_dir=settings.state_dir, allow_root=settings.allow_root)
    return ProcessEngine(node_addr, images=settings.images, state_dir=settings.state_dir)


def _first(faults: BaseExceptionGroup[BaseException]) -> BaseException:
    """What ended the daemon: the operator's business before all else."""
    leaves = [_first(fault) if isinstance(fault, BaseExceptionGroup) else fault for fault in faults.exceptions]
    return next((leaf for leaf in leaves if isinstance(leaf, NodeError)), leaves[0])


def _publish(file: Path, text: str) -> None:
    """Whole or not at all."""
    new = file.with_name(f"{file.name}.new")
    new.write_text(text + "\n")
    new.replace(file)


async def _until_signal(settings: config.Config, *, stop_containers: bool) -> None:
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def on_signal(number: int) -> None:
        if stop.is_set():
            # Asked twice: the journal and the spool say at the next start what became of the rest.
            os._exit(128 + number)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    await serve(settings, stop, stop_containers=stop_containers)


app = typer.Typer(
    name="ngpu-node",
    help="""The node daemon of NGPU: gives this machine's GPUs to a control plane.

    It runs the containers that the control plane assigns to it, passes requests to them, and reports how they and the
    GPUs are. It only ever dials out: no port of this machine needs to be open.

    Once: get a one-time token from an operator of the platform (`ngpu token create --role node`), save it in a file,
    and run `ngpu-node join --controlplane HOST:PORT --token-file FILE`. From then on: `ngpu-node run --controlplane
    HOST:PORT`, for example as a systemd service. The node's identity is the key in STATE_DIR/node.key: keep it, and
    never copy it to another machine.
    """,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigFile = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help=f"TOML file with settings; else ${config.ENV_FILE}.")
]
ControlPlane = Annotated[str | None, typer.Option(metavar="HOST:PORT", help="The control plane; of all, with commas.")]
StateDir = Annotated[Path | None, typer.Option(metavar="DIR", help="The node's key and spool. [.ngpu/node]")]
EngineKind = Annotated[str | None, typer.Option(metavar="auto|docker|process", help="What runs containers.")]
TokenFile = Annotated[Path | None, typer.Option(metavar="FILE", help="One-time token, if not yet joined.")]
Name = Annotated[str | None, typer.Option(metavar="NAME", help="Name for people. [the machine's]")]
Tls = Annotated[bool | None, typer.Option("--tls", help="Speak TLS to the control plane.")]
TlsCa = Annotated[Path | None, typer.Option(metavar="FILE", help="Roots to trust, PEM; implies --tls.")]
AllowPlaintext = Annotated[bool | None, typer.Option("--allow-plaintext", help="No TLS to another machine.")]


@app.command()
def run(  # noqa: PLR0917, typer takes them by name
    config_file: ConfigFile = None,
    controlplane: ControlPlane = None,
    state_dir: StateDir = None,
    engine: EngineKind = None,
    token_file: TokenFile = None,
    name: Name = None,
    tls: Tls = None,
    tls_ca: TlsCa = None,
    allow_plaintext: AllowPlaintext = None,
    process_images: Annotated[Path | None, typer.Option(metavar="DIR", help="Images of the process engine.")] = None,
    metrics_listen: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="For /metrics. [off]")] = None,
    stop_grace: Annotated[str | None, typer.Option(metavar="TIME", help="For running tasks at SIGTERM. [30s]")] = None,
    log_level: Annotated[str | None, typer.Option(metavar="LEVEL", help="debug, info, warning or error.")] = None,
    stop_containers: Annotated[bool, typer.Option("--stop-containers", help="Leave no container running.")] = False,
) -> None:
    """Run until SIGTERM or SIGINT (a second one ends it at once). Joins first, if it has not and a token is given.

    At the end running tasks get STOP_GRACE to finish, the control plane is told, and containers keep running for the
    next start to take up with what they still work on, unless --stop-containers is given (processes of the process
    engine always end).

    Exit status: 0 stopped as asked; 2 settings, key or state directory cannot be used; 3 another daemon has taken over
    this node's key; 4 not joined, or the token was refused; 5 revoked. With systemd:
    RestartPreventExitStatus=2 3 4 5.
    """
    options = {key: value for key, value in locals().items() if key not in ("config_file", "stop_containers")}
    settings = settings_of(config_file, options)
    log.set_up(settings.log_level, settings.log_format)
    raise_open_files()
    with told(), alone(settings.state_dir):
        heap.settle()
        asyncio.run(_until_signal(settings, stop_containers=stop_containers))


@app.command()
def join(  # noqa: PLR0917, typer takes them by name
    config_file: ConfigFile = None,
    controlplane: ControlPlane = None,
    state_dir: StateDir = None,
    token_file: TokenFile = None,
    name: Name = None,
    tls: Tls = None,
    tls_ca: TlsCa = None,
    allow_plaintext: AllowPlaintext = None,
) -> None:
    """Make this node known to the control plane, once, with a one-time token (--token-file or $NGPU_NODE_TOKEN)."""
    options = {key: value for key, value in locals().items() if key != "config_file"}
    settings = settings_of(config_file, options)
    log.set_up(settings.log_level, settings.log_format)
    with told():
        if not settings.join_token():
            raise NotEnrolled("No token: give --token-file FILE, or set NGPU_NODE_TOKEN.")
        identity = Identity.load(settings.state_dir / "node.key")
        given = asyncio.run(_join(settings, identity))
        typer.echo(f"Joined as {given}, address {identity.address}. Now start `ngpu-node run`.")


@app.command()
def show(
    config_file: ConfigFile = None,
    state_dir: StateDir = None,
    engine: EngineKind = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Show this node's address, and what the control plane would be told of the machine. Speaks to nobody."""
    settings = settings_of(config_file, {"state_dir": state_dir, "engine": engine})
    log.set_up("error", settings.log_format)
    with told():
        identity = Identity.load(settings.state_dir / "node.key")
        facts = asyncio.run(_inventory(settings, identity.address))
        if as_json:
            typer.echo(json.dumps(facts, indent=2))
            return
        for fact, value in facts.items():
            lines = value if isinstance(value, list) else [value]
            for line in lines or ["none"]:
                typer.echo(f"{fact + ':':<13}{_words(line)}")


@app.command(name="settings")
def show_settings() -> None:
    """List every setting: its name in the TOML file, its variable in the environment, its default, what it means."""
    for name, default, meaning in config.settings():
        typer.echo(f"{name} = {default or '(empty)'}\n    {config.env_name(name)}\n    {meaning}\n")


async def _join(settings: config.Config, identity: Identity) -> str:
    dialler = Dialler(settings.controlplane, tls=settings.with_tls, tls_ca=settings.tls_ca)
    async with await dialler.reach() as channel:
        try:
            return await enroll(stub_of(channel), identity, settings.join_token(), settings.node_name())
        except (grpc.aio.AioRpcError, LinkLost) as fault:
            raise NodeError(f"The control plane at {settings.controlplane} did not answer: {words_of(fault)}") from None


async def _inventory(settings: config.Config, node_addr: str) -> dict[str, Any]:
    engine = _engine(settings, await _engine_kind(settings, node_addr), node_addr)
    gpus, machine = Gpus(engine.owns), Machine(engine)
    reading = asyncio.create_task(gpus.run(), name="gpus")
    try:
        await gpus.read()
        await machine.survey()
    finally:
        reading.cancel()
        await asyncio.wait([reading])
        await engine.close()
    found = gpus.inventory()
    return {
        "address": node_addr,
        "engine": f"{machine.engine.name or 'none answers'} {machine.engine.version}".strip(),
        "isolation": machine.engine.isolation,
        "limits": list(machine.engine.limits),
        "cpus": machine.cpus,
        "memory": machine.memory_bytes,
        "disk free": machine.engine.disk_free_bytes,
        "os": machine.os,
        "driver": found.driver_version,
        "gpus": [{"id": gpu.id, "model": gpu.model, "memory_bytes": gpu.memory_bytes} for gpu in found.gpus],
        "gpu message": found.message,
    }


def _words(value: object) -> str:
    if isinstance(value, dict):
        return f"{value['model']}, {value['memory_bytes'] / 1024**3:.1f} GiB, {value['id']}"
    if isinstance(value, int):
        return f"{value / 1024**3:.1f} GiB"
    return str(value) or "-"


app.command()(simulate)
app.command()(simulate_fault)


def main() -> None:
    """The console script."""
    app()


if __name__ == "__main__":
    main()
