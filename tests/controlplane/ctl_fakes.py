"""A control plane that says what the test tells it to, over real gRPC on a free port of this machine."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent import futures
from datetime import UTC, datetime, timedelta
from typing import Any, NoReturn

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message_factory import GetMessageClass
from google.protobuf.timestamp_pb2 import Timestamp
from ngpu import wire
from ngpu.v1 import asset_pb2, http_pb2
from ngpu.v1 import fleet_pb2 as fleet
from ngpu.v1 import task_pb2 as task
from ngpu.v1 import usage_pb2 as usage
from ngpu.v1 import workspace_pb2 as workspace
from typer.testing import Result

#: The command line: arguments, and the exit code that is expected.
Ngpu = Callable[..., Result]

TOKEN = "operator-token"
ID = "012345678901234567890123"
TASK = "20260131_14_00_09_01234567890123456789"
NODE = "0xCac10F51814E8e425a6877951fecb7746161c669"


def at(second: int = 0) -> Timestamp:
    stamp = Timestamp()
    stamp.FromDatetime(datetime(2026, 1, 31, 14, 0, tzinfo=UTC) + timedelta(seconds=second))
    return stamp


def a_replica(state: workspace.ReplicaState.ValueType, **fields: Any) -> workspace.Replica:
    given = {"id": "r-0a1b2c3d4e5f", "node_name": "node-1", "node_addr": NODE} | fields
    return workspace.Replica(state=state, create_time=at(), **given)


def a_workspace(*replicas: workspace.Replica, wanted: int = 1, **fields: Any) -> workspace.Workspace:
    spec = workspace.WorkspaceSpec(name="img2img", image="demo", ports=[8080], replicas=wanted, concurrency=1, cpus=1)
    ready = sum(replica.state == workspace.REPLICA_STATE_READY for replica in replicas)
    counts = {"ready_replicas": ready, "updated_replicas": ready, "wanted_replicas": wanted, "generation": 1}
    return workspace.Workspace(id=ID, spec=spec, create_time=at(), replicas=replicas, **{**counts, **fields})


def a_task(state: task.TaskState.ValueType, **fields: Any) -> task.Task:
    return task.Task(task_id=TASK, state=state, create_time=at(), **({"attempt": 1} | fields))


class Refusal(Exception):
    """Ends a call: with the house's own error if it has a reason, else bare, as gRPC itself would."""

    def __init__(self, code: grpc.StatusCode, reason: str = "", message: str = "", retry_after_ms: int = 0) -> None:
        super().__init__(message)
        self.code = code
        self.error = http_pb2.Error(code=code.value[0], reason=reason, message=message, retry_after_ms=retry_after_ms)


class FakeControlPlane:
    """`answers[method]` is an answer, a Refusal, the list of events of a stream, or a function of the request.

    A list of lists: one for each time the stream is opened. `asked` are the requests (of Upload: all messages).
    """

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {}
        self.asked: list[Any] = []
        self.opened: Counter[str] = Counter()
        self.gone = threading.Event()
        self._server = grpc.server(futures.ThreadPoolExecutor(8), options=wire.SERVER_OPTIONS)
        for file in (workspace, fleet, task, asset_pb2, usage):
            for service in file.DESCRIPTOR.services_by_name.values():
                handlers = {method.name: self._handler(method) for method in service.methods}
                self._server.add_generic_rpc_handlers(
                    (grpc.method_handlers_generic_handler(service.full_name, handlers),)
                )
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def stop(self) -> None:
        self.gone.set()
        self._server.stop(None).wait()

    def last(self) -> Any:
        return self.asked[-1]

    def _handler(self, method: MethodDescriptor) -> "grpc.RpcMethodHandler[Any, Any]":
        codec: dict[str, Any] = {
            "request_deserializer": GetMessageClass(method.input_type).FromString,
            "response_serializer": GetMessageClass(method.output_type).SerializeToString,
        }
        if method.client_streaming:
            return grpc.stream_unary_rpc_method_handler(
                lambda requests, context: self._take(method.name, list(requests), context), **codec
            )
        if method.server_streaming:
            return grpc.unary_stream_rpc_method_handler(
                lambda request, context: self._events(method.name, request, context), **codec
            )
        return grpc.unary_unary_rpc_method_handler(
            lambda request, context: self._take(method.name, request, context), **codec
        )

    def _take(self, method: str, request: Any, context: grpc.ServicerContext) -> Any:
        metadata = dict(context.invocation_metadata())
        if metadata.get(wire.AUTHORIZATION) != f"Bearer {TOKEN}":
            refuse(context, Refusal(grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED", "The token is not known."))
        self.asked.append(request)
        answer = self.answers.get(method)
        if callable(answer):
            answer = answer(request)
        if isinstance(answer, Refusal):
            refuse(context, answer)
        return answer

    def _events(self, method: str, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        events = self._take(method, request, context)
        if events and isinstance(events[0], list):
            events = events[self.opened[method]]
        self.opened[method] += 1
        for event in events:
            if isinstance(event, Refusal):
                refuse(context, event)
            yield event
        if method == "WatchWorkspace":
            # The real one never ends by itself.
            context.add_callback(self.gone.set)
            self.gone.wait()


def refuse(context: grpc.ServicerContext, refusal: Refusal) -> NoReturn:
    if refusal.error.reason:
        context.set_trailing_metadata(((wire.ERROR, refusal.error.SerializeToString()),))
    context.abort(refusal.code, refusal.error.message or "gone")


def a_node(name: str = "node-1", **fields: Any) -> fleet.Node:
    given: dict[str, Any] = {"connected": True, "availability": fleet.AVAILABILITY_OPEN} | fields
    return fleet.Node(addr=NODE, name=name, **given)
