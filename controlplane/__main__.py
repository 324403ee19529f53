"""The control plane's command: reads the settings, wires the parts in reading order, runs until a signal."""

from ngpu import lean  # isort: skip, before structlog  # noqa: F401

import asyncio
import io
import ipaddress
import os
import random
import secrets
import signal
import socket
import sys
import textwrap
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn

import structlog
import typer
from ngpu import heap

from controlplane import assets, config, ids, log, migrations
from controlplane.access import Access
from controlplane.api.assets import AssetApi
from controlplane.api.batch import Batches
from controlplane.api.deliveries import Deliveries
from controlplane.api.execute import Execution
from controlplane.api.fleet import FleetApi, known, new_token
from controlplane.api.flights import FlightsApi
from controlplane.api.gate import Gate
from controlplane.api.nodes import Nodes
from controlplane.api.owners import Owners
from controlplane.api.records import Records
from controlplane.api.server import Server
from controlplane.api.tasks import TaskApi
from controlplane.api.tunnels import Tunnels
from controlplane.api.usage import UsageApi
from controlplane.api.watch import Watch
from controlplane.api.webhooks import WebhookApi
from controlplane.api.workspaces import WorkspaceApi
from controlplane.bodies import Bodies
from controlplane.deployer import Deployer
from controlplane.destinations import Rules
from controlplane.dispatcher import Dispatcher, Graces
from controlplane.errors import NgpuError, Unavailable
from controlplane.fleet import Fleet
from controlplane.flights import Flights
from controlplane.late_receivers import LateReceivers
from controlplane.metrics import Metrics, MetricsServer, Scrape, Standby
from controlplane.model import Role, Token
from controlplane.placement import Policy
from controlplane.postings import Postings, Room
from controlplane.prices import Prices
from controlplane.receipts import Tariff
from controlplane.retention import Retention
from controlplane.signatures import Signatures
from controlplane.slots import Slots
from controlplane.state_dir import alone, identity, keep_secret, published
from controlplane.store import Store
from controlplane.store_lease import Lease, checked_loop
from controlplane.webhooks import Times

#: How long the database may take to answer a readiness check, in seconds.
READY_S: Final = 2.0
#: What was answered has so long to leave; whoever watches our health is cut off then.
FLUSH_S: Final = 0.25
#: A second signal within this is the first one's echo, in seconds.
SAME_SIGNAL_S: Final = 0.5
RANDOM_BYTES: Final = 65_536
#: The exit status of one that another has taken over from: start it again, and it stands by.
GIVE_WAY: Final = 75

_log = structlog.get_logger("controlplane")


async def serve(settings: config.Config, stop: asyncio.Event, lease: Lease | None = None) -> None:  # noqa: PLR0915, wiring is read whole
    """Run until `stop` is set. Raises OSError (an address that cannot be had), NgpuError (no database)."""
    async with AsyncExitStack() as stack:
        # What remembers.
        store = await Store.open(settings.database, lease)
        stack.push_async_callback(store.close)
        bodies = await Bodies.open(settings.bodies)
        stack.push_async_callback(bodies.close)
        retention = Retention(
            store,
            bodies,
            bodies_s=settings.body_retention,
            uploads_s=settings.upload_retention,
            recorded_bytes=settings.recorded_body,
            clock=_now,
        )

        # Who and what there is.
        fleet = Fleet(store, clock=_now)
        stack.push_async_callback(fleet.close)
        await fleet.load()
        access = Access(workspace_of=fleet.workspace_of, clock=_now)
        await _first_tokens(store, settings.state_dir)
        access.load(map(known, await store.tokens()))
        holdings = assets.Assets(asset_settings(settings.assets))
        stack.push_async_callback(holdings.close)

        # What decides.
        metrics = Metrics()
        graces = Graces(reconnect_s=settings.reconnect_grace, start_s=settings.start_grace, hold_s=settings.hold)
        prices = Prices(await store.prices())
        terms = Tariff(fleet, prices).terms
        flights = Flights(
            fleet, bodies, slow_s=settings.slow_attempt, retention_s=settings.flight_retention, clock=_now
        )
        dispatcher = Dispatcher(
            store,
            Slots(),
            fleet,
            graces=graces,
            clock=_now,
            metrics=metrics,
            terms=terms,
            recorder=flights,
            account_queue_length=settings.account_queue_length,
        )
        deployer = Deployer(
            fleet,
            dispatcher,
            lost_after_s=settings.node_timeout,
            policy=placement_policy(settings.placement),
            clock=_now,
        )
        destinations = destination_rules(settings.webhooks)
        task_ids = ids.TaskIds(settings.zone, _pooled())
        receivers = LateReceivers(
            destinations,
            time_limit_s=settings.webhooks.time_limit,
            concurrency=settings.webhooks.concurrency,
            clock=_now,
        )
        stack.push_async_callback(receivers.close)
        signatures = Signatures(store, clock=_now)
        postings = _postings(settings.webhooks, store, receivers, signatures)

        # What speaks.
        gate = Gate(access)
        deliveries = Deliveries()
        owners = Owners(fleet, dispatcher)
        tasks = TaskApi(
            owners=owners,
            fleet=fleet,
            dispatcher=dispatcher,
            store=store,
            bodies=bodies,
            assets=holdings,
            new_task_id=lambda: task_ids.new(_now()),
            allow_unchecked=settings.asset_check_on_error == "allow",
            destinations=destinations,
        )
        batches = Batches(tasks, owners, gate)
        records = Records(owners, fleet, dispatcher, store, bodies)
        watch = Watch(owners, dispatcher, store, bodies, deliveries)
        nodes = Nodes(
            access=access,
            fleet=fleet,
            deployer=deployer,
            dispatcher=dispatcher,
            flights=flights,
            report_every_s=settings.heartbeat_interval,
            timeout_s=settings.node_timeout,
            stopping=stop.is_set,
        )
        execution = Execution(dispatcher=dispatcher, bodies=bodies, deliveries=deliveries)
        tunnels = Tunnels(owners, dispatcher)
        flights_api = FlightsApi(owners, dispatcher, store, flights)
        fleet_api = FleetApi(
            access=access, fleet=fleet, deployer=deployer, dispatcher=dispatcher, store=store, clock=_now
        )
        workspaces = WorkspaceApi(fleet, dispatcher)
        webhook_api = WebhookApi(workspaces, owners, store, signatures, clock=_now)
        server = Server(
            gate,
            {
                "TaskService": [tasks, batches, records, watch, tunnels, flights_api, webhook_api],
                "WorkspaceService": [workspaces, webhook_api],
                "NodeService": [nodes, execution, tunnels, flights_api],
                "AssetService": [AssetApi(holdings)],
                "FleetService": [fleet_api],
                "UsageService": [UsageApi(fleet, store, prices, clock=_now)],
            },
        )
        http = MetricsServer(
            Scrape(metrics, fleet, dispatcher, store, gate.calls, postings), lambda: _ready(store, stop)
        )

        # Life.
        await dispatcher.start()
        tls = await asyncio.to_thread(_pem, settings.tls_key, settings.tls_cert)
        address = await server.start(settings.listen, tls=tls)
        stack.push_async_callback(server.stop, 0)
        metrics_address = await http.start(settings.metrics_listen) if settings.metrics_listen else ""
        stack.push_async_callback(http.stop)
        async with asyncio.TaskGroup() as group:
            loops = [
                group.create_task(dispatcher.run(), name="dispatcher"),
                group.create_task(deployer.run(), name="deployer"),
                group.create_task(retention.run(), name="retention"),
                group.create_task(flights.run(), name="flights"),
                group.create_task(postings.run(), name="postings"),
                group.create_task(heap.give_back(), name="heap"),
            ]
            with published(settings.state_dir, address=address, metrics_address=metrics_address):
                where = {"address": address, "metrics_address": metrics_address}
                _log.info("listening", **where, state_dir=str(settings.state_dir))
                await stop.wait()
            _log.info("stopping")
            await server.leave()
            await dispatcher.stop()
            batches.stop()
            gate.stop()
            await gate.idle(settings.stop_grace)
            await server.stop(FLUSH_S)
            for loop in loops:
                loop.cancel()
    _log.info("stopped")


async def _ready(store: Store, stop: asyncio.Event) -> str:
    """Why we are not ready to serve; empty: we are."""
    if stop.is_set():
        return "stopping"
    try:
        async with asyncio.timeout(READY_S):
            await store.task("")
    except (TimeoutError, Unavailable) as error:
        return f"the database does not answer: {error}"
    return ""


async def _first_tokens(store: Store, directory: Path) -> None:
    """At the first start: tokens for this machine's operator and bridge, in files only their owner can read.

    Later too for an operator, if no operator's token is good any more: else nobody could ever make one.
    """
    tokens = await store.tokens()

    def is_spent(secret: str) -> bool:
        return any(token.secret_hash == ids.secret_hash(secret) for token in tokens)

    for role, name in ((Role.OPERATOR, "operator"), (Role.SERVICE, "bridge")):
        if any(token.role == role and (role is Role.SERVICE or _is_good(token)) for token in tokens):
            continue
        row, secret = new_token(role, f"{name}, made at a start", now=_now())
        file = directory / f"{name}.token"
        # The file first: after a crash between the two the next start takes the secret from it.
        kept = await asyncio.to_thread(keep_secret, file, secret, unless=is_spent)
        row.secret_hash = ids.secret_hash(kept)
        await store.add_token(row)
        _log.info("token_made", name=name, file=str(file))


def _is_good(token: Token) -> bool:
    return token.revoke_time is None and (token.expire_time is None or token.expire_time > _now())


def _pem(key: Path | None, cert: Path | None) -> tuple[bytes, bytes] | None:
    return (key.read_bytes(), cert.read_bytes()) if key is not None and cert is not None else None


def _now() -> datetime:
    return datetime.now(UTC)


def _pooled() -> ids.Random:
    """Random bytes fetched many at a time: to ask the system for each task's gives way to the thread that commits."""
    pool = io.BytesIO()

    def take(count: int) -> bytes:
        nonlocal pool
        if len(taken := pool.read(count)) < count:
            pool = io.BytesIO(secrets.token_bytes(RANDOM_BYTES))
            taken = pool.read(count)
        return taken

    return take


def asset_settings(section: config.Assets) -> assets.Settings:
    """The assets' section in that package's own words."""
    return assets.Settings(
        providers=tuple(
            assets.Provider(
                kind=provider.kind,
                base_url=provider.base_url,
                api_key=provider.api_key.get_secret_value(),
                api_key_file=provider.api_key_file,
                path=provider.path,
            )
            for provider in section.providers
        ),
        tickers=tuple(section.tickers),
        network=section.network,
        timeout_s=section.timeout,
        cache_s=section.cache,
        cache_empty_s=section.cache_empty,
        cache_entries=section.cache_entries,
    )


def placement_policy(section: config.Placement) -> Policy:
    """The placement's section in that module's own words."""
    weights = section.model_dump()
    return Policy(disk_reserve_bytes=weights.pop("disk_reserve"), **weights)


def destination_rules(section: config.Webhooks) -> Rules:
    """Where the webhooks' section lets webhooks go."""
    return Rules(section.allow_http, tuple(map(ipaddress.ip_network, section.allow_networks)))


def _postings(section: config.Webhooks, store: Store, receivers: LateReceivers, signatures: Signatures) -> Postings:
    return Postings(
        store,
        receivers,
        signatures,
        clock=_now,
        jitter=random.random,
        times=Times(section.give_up_after, section.first_pause),
        room=Room(section.concurrency, section.concurrency_per_host, section.concurrency_per_workspace),
        bridge_url=section.bridge_url,
    )


async def _stand_by(settings: config.Config, lease: Lease, stop: asyncio.Event) -> bool:
    """Wait until this is the active control plane; False if it is to stop first. Who asks is told how it stands.

    Raises NgpuError (no database, or one whose bodies are elsewhere).
    """
    await asyncio.to_thread(migrations.check_current, settings.database)
    async with AsyncExitStack() as stack:
        active = ""

        async def ready() -> str:
            return f"standing by; the active control plane is {active}"

        async def waits(holder: str) -> None:
            nonlocal active
            if not active and settings.metrics_listen:
                http = MetricsServer(Standby(), ready)
                where = await http.start(settings.metrics_listen)
                stack.push_async_callback(http.stop)
                stack.enter_context(published(settings.state_dir, metrics_address=where))
            active = holder or "not known yet"
            _log.info("standing_by", active=active)

        if not await lease.take(stop, waits):
            return False
    _log.info("active", epoch=lease.epoch)
    return True


def _give_way(why: str) -> NoReturn:
    """What others do by now must not be disturbed by what we would do in a stop."""
    _log.error("lease_lost", reason=why)
    os._exit(GIVE_WAY)


async def _until_signal(settings: config.Config, lease: Lease | None) -> None:
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    first: list[float] = []

    def on_signal(number: int) -> None:
        # One Ctrl-C often comes twice: to the whole group, and passed on by who started us.
        if first and loop.time() - first[0] > SAME_SIGNAL_S:
            # Asked again: whatever has not reached the disk was promised to nobody.
            os._exit(128 + number)
        first.append(loop.time())
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    if lease is None or await _stand_by(settings, lease, stop):
        await serve(settings, stop, lease)


app = typer.Typer(
    name="ngpu-controlplane",
    help="The control plane of NGPU: keeps workspaces running on nodes and gives their tasks to them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(metadata.version("ngpu"))
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and end.")
    ] = False,
) -> None:
    pass


ConfigFile = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help=f"TOML file with settings; else ${config.ENV_FILE}.")
]
StateDir = Annotated[Path | None, typer.Option(metavar="DIR", help="Database, bodies and first tokens.")]
DatabaseUrl = Annotated[str | None, typer.Option(metavar="URL", help="PostgreSQL; else SQLite in the state directory.")]


@app.command()
def run(  # noqa: PLR0917, typer takes them by name
    config_file: ConfigFile = None,
    state_dir: StateDir = None,
    database_url: DatabaseUrl = None,
    listen: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="For gRPC; port 0 is any free one.")] = None,
    metrics_listen: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="For /metrics, /healthz, /readyz; '' turns it off.")
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(metavar="FILE", help="Certificate chain, PEM.")] = None,
    tls_key: Annotated[Path | None, typer.Option(metavar="FILE", help="Its key, PEM.")] = None,
    allow_plaintext: Annotated[
        bool | None, typer.Option("--allow-plaintext", help="Listen beyond this machine without TLS.")
    ] = None,
    display_timezone: Annotated[str | None, typer.Option(metavar="ZONE", help="Of the time in task ids.")] = None,
    log_level: Annotated[str | None, typer.Option(metavar="LEVEL", help="debug, info, warning or error.")] = None,
) -> None:
    """Run until SIGTERM or SIGINT (a second one ends it at once).

    At its first start it makes STATE_DIR/operator.token for the command line `ngpu` and STATE_DIR/bridge.token for
    `ngpu-bridge`. Once it is ready, STATE_DIR/address says where it listens. SQLite is migrated at start.

    Every setting can be in the file and in the environment too; the command line wins over the environment, and that
    over the file. `ngpu-controlplane settings` lists them all.
    """
    options = {name: value for name, value in locals().items() if name != "config_file"}
    settings = _settings(config_file, options)
    # Whatever is kept here is nobody else's business: rows and bodies are customers'.
    os.umask(0o077)
    log.set_up(settings.log_level, settings.log_format)
    heap.settle()
    try:
        settings.state_dir.mkdir(parents=True, exist_ok=True)
        with alone(settings.state_dir, settings.database):
            if settings.database.startswith("sqlite"):
                migrations.migrate_apart(settings.database)
                asyncio.run(_until_signal(settings, None))
                return
            lease = Lease(
                settings.database,
                holder=f"{socket.gethostname()} ({settings.listen}), process {os.getpid()}",
                bodies_id=identity(settings.bodies),
                lease_s=settings.lease,
                lost=_give_way,
            )
            with asyncio.Runner(loop_factory=partial(checked_loop, lease.check)) as runner:
                runner.run(_until_signal(settings, lease))
    except (NgpuError, OSError, ValueError) as error:
        _fail(str(error), code=1)


@app.command()
def migrate(config_file: ConfigFile = None, state_dir: StateDir = None, database_url: DatabaseUrl = None) -> None:
    """Bring the database to this version's schema: for PostgreSQL after each upgrade. Does no harm if repeated."""
    settings = _settings(config_file, {"state_dir": state_dir, "database_url": database_url})
    os.umask(0o077)
    try:
        settings.state_dir.mkdir(parents=True, exist_ok=True)
        migrations.migrate(settings.database)
    except (NgpuError, OSError, ValueError) as error:
        _fail(str(error), code=1)
    typer.echo("The database is up to date.")


@app.command(name="settings")
def show_settings() -> None:
    """List every setting: its name in the TOML file, its variable in the environment, its default, what it means."""
    for name, default, meaning in config.settings():
        typer.echo(f"{name} = {default or '(empty)'}\n    {config.env_name(name)}\n    {meaning}\n")


def _settings(file: Path | None, options: dict[str, Any]) -> config.Config:
    try:
        return config.load(file, options, asset_faults=lambda section: assets.faults(asset_settings(section)))
    except config.ConfigFault as fault:
        _fail(f"The settings cannot be used:\n{textwrap.indent(str(fault), '  ')}", code=2)


def _fail(words: str, *, code: int) -> NoReturn:
    print(f"ngpu-controlplane: {words}", file=sys.stderr)  # noqa: T201
    raise typer.Exit(code)


def main() -> None:
    """The console script."""
    app()


if __name__ == "__main__":
    main()
