"""The flight recorder on the wire: nodes tell their part, owners read both."""

from collections.abc import AsyncIterator

from google.protobuf.message import DecodeError
from ngpu.v1 import flight_pb2, node_pb2
from ngpu.v1 import task_pb2 as pb

from controlplane import explain, ids
from controlplane.api import translate
from controlplane.api.gate import Caller
from controlplane.api.nodes import session_of
from controlplane.api.owners import Owners
from controlplane.dispatcher import Dispatcher
from controlplane.errors import NotFound, Unavailable
from controlplane.flights import NODE_BYTES, Flight, Flights, FlightTooLarge, Sample
from controlplane.store import Store


class FlightsApi:
    """TaskService.GetFlights and NodeService.Record."""

    def __init__(self, owners: Owners, dispatcher: Dispatcher, store: Store, flights: Flights) -> None:
        self._owners = owners
        self._dispatcher = dispatcher
        self._store = store
        self._flights = flights

    async def record(self, request: node_pb2.RecordRequest, caller: Caller) -> node_pb2.RecordResponse:
        """See node.proto."""
        addr = session_of(caller).node_addr
        try:
            ids.split_attempt_id(request.attempt_id)
        except ValueError as error:
            raise NotFound(f"{error}.") from None
        data = request.flight.SerializeToString()
        if len(data) > NODE_BYTES:
            raise FlightTooLarge
        if self._dispatcher.attempt_is_current(addr, request.attempt_id):
            raise Unavailable("The attempt has not ended here yet; try again soon.", retry_after_s=1.0)
        await self._flights.add(request.attempt_id, addr, data)
        return node_pb2.RecordResponse()

    async def get_flights(self, request: pb.GetFlightsRequest, caller: Caller) -> AsyncIterator[pb.GetFlightsResponse]:
        """See task.proto."""
        why = "a container's log is for its workspace alone"
        owner = self._owners.proven(request.workspace_id, caller.principal, why)
        row = await self._store.task(request.task_id)
        if row is None or (owner and row.workspace_uid != owner):
            raise NotFound("There is no such task, or it is not yours.")
        for attempt in await self._store.attempts(row.id):
            if request.attempt not in {0, attempt.number}:
                continue
            attempt_id = ids.attempt_id(row.id, attempt.number)
            flight, told = await self._flights.plane(attempt_id), await self._flights.node(attempt_id)
            if flight is None and not attempt.failure_reason:
                continue
            answer = pb.GetFlightsResponse(
                attempt=translate.attempt_of_row(attempt), placement=await self._placement(attempt.replica_id)
            )
            if flight is not None:
                answer.plane.CopyFrom(_plane(flight))
            if told:
                try:
                    answer.node.MergeFromString(told)
                except DecodeError:
                    answer.node.log_message = "What the node told of it cannot be read."
            yield answer

    async def _placement(self, replica_id: str) -> str:
        replica = await self._store.replica(replica_id)
        decision = None if replica is None else explain.decode(replica.explanation_json)
        return "" if decision is None else explain.summary(decision)


def _plane(flight: Flight) -> flight_pb2.PlaneFlight:
    return flight_pb2.PlaneFlight(
        kind=flight.kind,
        replica_state=flight.replica_state,
        image_digest=flight.image_digest,
        silent_since_time=translate.timestamp(flight.silent_since),
        gpu_samples=map(_sample, flight.samples),
    )


def _sample(sample: Sample) -> flight_pb2.GpuSample:
    reading = sample.reading
    return flight_pb2.GpuSample(
        time=translate.timestamp(sample.time),
        gpu_id=reading.gpu_id,
        memory_used_bytes=reading.memory_used_bytes,
        utilization=reading.utilization,
        temperature_c=reading.temperature_c,
        power_w=reading.power_w,
        xids=reading.xids,
        error=reading.error,
    )
