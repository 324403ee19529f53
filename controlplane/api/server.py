"""The gRPC server: every service behind the gate, and health and reflection beside it."""

from collections.abc import Mapping, Sequence
from typing import Final

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection
from ngpu import wire
from ngpu.settings import split_address
from ngpu.v1 import asset_pb2, fleet_pb2, node_pb2, task_pb2, usage_pb2, workspace_pb2

from controlplane.api.gate import Gate

#: Calls at once, streams among them; past it gRPC answers RESOURCE_EXHAUSTED.
CONCURRENT_CALLS: Final = 20_000

#: Every service there is.
SERVICES: Final[tuple[ServiceDescriptor, ...]] = tuple(
    service
    for file in (task_pb2, workspace_pb2, node_pb2, asset_pb2, fleet_pb2, usage_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
)


class Server:
    """Listens once `start`ed. `apis`: who serves each service, one or several together, by the service's short name."""

    def __init__(self, gate: Gate, apis: Mapping[str, Sequence[object]]) -> None:
        self._server = grpc.aio.server(options=wire.SERVER_OPTIONS, maximum_concurrent_rpcs=CONCURRENT_CALLS)
        self._server.add_generic_rpc_handlers(tuple(gate.guard(service, apis[service.name]) for service in SERVICES))
        self._health = HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = [service.full_name for service in SERVICES]
        reflection.enable_server_reflection(
            [*names, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME], self._server
        )
        self._names = names

    async def start(self, listen: str, *, tls: tuple[bytes, bytes] | None = None) -> str:
        """Listen at HOST:PORT; with `tls`, key and certificate chain as PEM. Gives the address with the port taken.

        Raises OSError if it cannot.
        """
        try:
            if tls is not None:
                port = self._server.add_secure_port(listen, grpc.ssl_server_credentials([tls]))
            else:
                port = self._server.add_insecure_port(listen)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {listen}: {error}") from error
        for name in self._names:
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        await self._server.start()
        host, _ = split_address(listen)
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    async def leave(self) -> None:
        """Tell health checks that this server is about to stop."""
        await self._health.enter_graceful_shutdown()

    async def stop(self, grace_s: float) -> None:
        """Take no new calls; end those that run after `grace_s` seconds at the latest."""
        await self._server.stop(grace_s)
