"""The control plane's command: reads the settings, wires the parts in reading order, runs until a signal."""

import asyncio
import fcntl
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import structlog
import typer

from controlplane import assets, config, ids, log, migrations
from controlplane.access import Access
from controlplane.api.assets import AssetApi
from controlplane.api.batch import Batches
from controlplane.api.deliveries import Deliveries
from controlplane.api.execute import Execution
from controlplane.api.fleet import FleetApi, known, new_token
from controlplane.api.gate import Gate
from controlplane.api.nodes import Nodes
from controlplane.api.server import Server
from controlplane.api.tasks import TaskApi
from controlplane.api.workspaces import WorkspaceApi
from controlplane.bodies import Bodies
from controlplane.deployer import Deployer
from controlplane.dispatcher import Dispatcher
from controlplane.errors import NgpuError, Unavailable
from controlplane.fleet import Fleet
from controlplane.metrics import Metrics, MetricsServer, Scrape
from controlplane.model import Role
from controlplane.retention import Retention
from controlplane.store import Store

_log = structlog.get_logger("controlplane")


async def serve(settings: config.Config, stop: asyncio.Event) -> None:
    """Run until `stop` is set. Raises OSError (an address that cannot be had), NgpuError (no database)."""
    state_dir = settings.state_dir
    async with AsyncExitStack() as stack:
        # What remembers.
        store = await Store.open(settings.database)
        stack.push_async_callback(store.close)
        bodies = await Bodies.open(state_dir / "bodies")
        stack.push_async_callback(bodies.close)
        retention = Retention(
            store, bodies, bodies_s=settings.body_retention, uploads_s=settings.upload_retention, clock=_now
        )

        # Who and what there is.
        fleet = Fleet(store, clock=_now)
        stack.push_async_callback(fleet.close)
        await fleet.load()
        access = Access(workspace_of=fleet.workspace_of, clock=_now)
        await _first_tokens(store, state_dir)
        access.load(map(known, await store.tokens()))
        holdings = assets.Assets(asset_settings(settings.assets))
        stack.push_async_callback(holdings.close)

        # What decides.
        metrics = Metrics()
        dispatcher = Dispatcher(store, fleet, metrics=metrics)
        deployer = Deployer(fleet, dispatcher)
        await dispatcher.start()

        # What speaks.
        gate = Gate(access)
        deliveries = Deliveries()
        tasks = TaskApi(
            fleet=fleet,
            dispatcher=dispatcher,
            store=store,
            bodies=bodies,
            deliveries=deliveries,
            assets=holdings,
            new_task_id=lambda: ids.task_id(_now(), settings.zone),
            allow_unchecked=settings.asset_check_on_error == "allow",
        )
        batches = Batches(tasks, gate)
        nodes = Nodes(
            access=access,
            fleet=fleet,
            deployer=deployer,
            dispatcher=dispatcher,
            report_every_s=settings.heartbeat_interval,
            timeout_s=settings.node_timeout,
        )
        execution = Execution(dispatcher=dispatcher, fleet=fleet, bodies=bodies, deliveries=deliveries)
        fleet_api = FleetApi(
            access=access, fleet=fleet, deployer=deployer, dispatcher=dispatcher, store=store, clock=_now
        )
        server = Server(
            gate,
            {
                "TaskService": [tasks, batches],
                "WorkspaceService": [WorkspaceApi(fleet, dispatcher)],
                "NodeService": [nodes, execution],
                "AssetService": [AssetApi(holdings)],
                "FleetService": [fleet_api],
            },
        )
        http = MetricsServer(Scrape(metrics, fleet, dispatcher, store, gate.calls), lambda: _ready(store, stop))
