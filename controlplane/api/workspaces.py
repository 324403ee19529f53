"""WorkspaceService: what runs, how many of it, and under which public names."""

import asyncio
from collections.abc import AsyncIterator
from typing import Final

import structlog
from ngpu.v1 import workspace_pb2 as pb

from controlplane import standing
from controlplane.access import WORKSPACE_PREFIX, Kind, Principal
from controlplane.api import translate
from controlplane.api.gate import Caller
from controlplane.api.paging import page
from controlplane.dispatcher import Dispatcher
from controlplane.errors import NotFound
from controlplane.fleet import Fleet, Replica, Route, Workspace
from controlplane.report import ReplicaState

#: A watcher is told at most this often, in seconds.
WATCH_S: Final = 0.25

_log = structlog.get_logger(__name__)


class WorkspaceApi:
    """All methods of the service."""

    def __init__(self, fleet: Fleet, dispatcher: Dispatcher) -> None:
        self._fleet = fleet
        self._dispatcher = dispatcher

    async def create_workspace(self, request: pb.CreateWorkspaceRequest, caller: Caller) -> pb.CreateWorkspaceResponse:
        """See workspace.proto."""
        workspace = await self._fleet.create_workspace(translate.spec_of(request.spec))
        _log.info("workspace_created", workspace=workspace.uid, name=workspace.name, by=caller.principal.id)
        return pb.CreateWorkspaceResponse(workspace=self._message(workspace, caller.principal))

    async def get_workspace(self, request: pb.GetWorkspaceRequest, caller: Caller) -> pb.GetWorkspaceResponse:
        """See workspace.proto."""
        workspace = self.find(request.workspace, caller.principal)
        return pb.GetWorkspaceResponse(workspace=self._message(workspace, caller.principal))

    async def list_workspaces(self, request: pb.ListWorkspacesRequest, caller: Caller) -> pb.ListWorkspacesResponse:
        """See workspace.proto."""
        rows, cursor = page(
            request,
            self._fleet.workspaces(deleted=request.deleted),
            key=lambda workspace: (workspace.name, workspace.create_time.isoformat(), workspace.uid),
            row=lambda workspace: self._message(workspace, caller.principal, replicas=False),
        )
        return pb.ListWorkspacesResponse(workspaces=rows, cursor=cursor)

    async def scale_workspace(self, request: pb.ScaleWorkspaceRequest, caller: Caller) -> pb.ScaleWorkspaceResponse:
        """See workspace.proto."""
        found = self.find(request.workspace, caller.principal)
        workspace = await self._fleet.scale_workspace(found.uid, request.replicas)
        _log.info("workspace_scaled", workspace=workspace.uid, replicas=request.replicas, by=caller.principal.id)
        return pb.ScaleWorkspaceResponse(workspace=self._message(workspace, caller.principal))

    async def update_workspace(self, request: pb.UpdateWorkspaceRequest, caller: Caller) -> pb.UpdateWorkspaceResponse:
        """See workspace.proto."""
        found = self.find(request.workspace, caller.principal)
        workspace = await self._fleet.replace_workspace(found.uid, translate.spec_of(request.spec))
        _log.info("workspace_updated", workspace=workspace.uid, generation=workspace.generation, by=caller.principal.id)
        return pb.UpdateWorkspaceResponse(workspace=self._message(workspace, caller.principal))

    async def delete_workspace(self, request: pb.DeleteWorkspaceRequest, caller: Caller) -> pb.DeleteWorkspaceResponse:
        """See workspace.proto."""
        workspace = await self._fleet.delete_workspace(self.find(request.workspace, caller.principal).uid)
        _log.info("workspace_deleted", workspace=workspace.uid, name=workspace.name, by=caller.principal.id)
        return pb.DeleteWorkspaceResponse()

    async def watch_workspace(
        self, request: pb.WatchWorkspaceRequest, caller: Caller
    ) -> AsyncIterator[pb.WatchWorkspaceResponse]:
        """See workspace.proto."""
        uid = self.find(request.workspace, caller.principal).uid
        while True:
            version = self._fleet.workspace_changes.version(uid)
            yield pb.WatchWorkspaceResponse(workspace=self._message(self._fleet.workspace(uid), caller.principal))
            await asyncio.sleep(WATCH_S)
            await self._fleet.workspace_changes.newer(uid, version)

    async def publish_route(self, request: pb.PublishRouteRequest, caller: Caller) -> pb.PublishRouteResponse:
        """See workspace.proto."""
        wanted = request.route
        route = await self._fleet.publish_route(wanted.name, wanted.workspace, port=wanted.port, path=wanted.path)
        _log.info("route_published", route=route.name, workspace=route.workspace_uid, by=caller.principal.id)
        return pb.PublishRouteResponse(route=self._route(route))

    async def list_routes(self, request: pb.ListRoutesRequest, caller: Caller) -> pb.ListRoutesResponse:  # noqa: ARG002
        """See workspace.proto."""
        rows, cursor = page(request, self._fleet.routes(), key=lambda route: (route.name,), row=self._route)
        return pb.ListRoutesResponse(routes=rows, cursor=cursor)

    async def delete_route(self, request: pb.DeleteRouteRequest, caller: Caller) -> pb.DeleteRouteResponse:
        """See workspace.proto."""
        await self._fleet.delete_route(request.name)
        _log.info("route_deleted", route=request.name[:128], by=caller.principal.id)
        return pb.DeleteRouteResponse()

    def find(self, key: str, principal: Principal) -> Workspace:
        """By id or name; by id alone for services, which pass on what their callers sent as credential.

        For a workspace itself also by nothing at all. Raises NotFound.
        """
        if principal.kind is Kind.OPERATOR:
            return self._fleet.workspace(key.removeprefix(WORKSPACE_PREFIX))
        if principal.kind is Kind.WORKSPACE:
            own = self._fleet.workspace(principal.id)
            if key.removeprefix(WORKSPACE_PREFIX) in {"", own.id, own.name}:
                return own
        elif uid := self._fleet.workspace_of(key.removeprefix(WORKSPACE_PREFIX)):
            return self._fleet.workspace(uid)
        raise NotFound("There is no such workspace, or it is not yours.")

    def _message(self, workspace: Workspace, principal: Principal, *, replicas: bool = True) -> pb.Workspace:
        placed = self._fleet.replicas_of(workspace.uid)
        stand = [(replica, self._fleet.state_of(replica)) for replica in placed]
        ready = [replica for replica, state in stand if state.state is ReplicaState.READY]
        doubts = self._dispatcher.doubts(workspace.uid)
        message = pb.Workspace(
            # The credential: services know it from whoever may know it.
            id="" if principal.kind is Kind.SERVICE else workspace.id,
            spec=translate.spec(workspace.spec, secrets=False),
            generation=workspace.generation,
            create_time=translate.timestamp(workspace.create_time),
            delete_time=translate.timestamp(workspace.delete_time),
            ready_replicas=len(ready),
            queued_tasks=self._dispatcher.queued(workspace.uid),
            running_tasks=self._dispatcher.running(workspace.uid),
            message=standing.words(workspace, stand, self._fleet.failing, doubts),
            wanted_replicas=workspace.wanted,
            updated_replicas=sum(replica.generation == workspace.generation for replica in ready),
        )
        if replicas:
            message.replicas.extend(self._replica(replica, doubts.get(replica.id, "")) for replica in placed)
        return message

    def _replica(self, replica: Replica, doubt: str) -> pb.Replica:
        state = self._fleet.state_of(replica)
        return pb.Replica(
            id=replica.id,
            node_addr=replica.node_addr,
            node_name=self._fleet.node(replica.node_addr).name,
            state=int(state.state),  # type: ignore[arg-type]
            progress=state.progress,
            message="; ".join(filter(None, (state.message, doubt))),
            gpu_ids=replica.gpu_ids,
            create_time=translate.timestamp(replica.create_time),
            restarts=state.restarts,
            running_tasks=self._dispatcher.running_on(replica.id),
            generation=replica.generation,
        )

    def _route(self, route: Route) -> pb.Route:
        return pb.Route(
            name=route.name,
            workspace=self._fleet.workspace(route.workspace_uid).name,
            port=route.port,
            path=route.path,
            create_time=translate.timestamp(route.create_time),
        )
