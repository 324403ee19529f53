"""UsageService: what was used, what it cost, and at which prices."""

import re
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from datetime import datetime
from typing import Final

import structlog
from ngpu.v1 import usage_pb2 as pb

from controlplane.access import Kind
from controlplane.api import translate
from controlplane.api.gate import Caller
from controlplane.errors import InvalidArgument, NgpuError, NotFound
from controlplane.fleet import Fleet
from controlplane.model import Attempt, Price
from controlplane.prices import PRICE_NANOS, PRICES, Prices, amount_text, nanos_of
from controlplane.store import Store
from controlplane.store_usage import By, Usage, UsageQuery

#: Of a price's words.
WORDS_CHARS: Final = 200

_WORDS: Final = re.compile(r"[a-z0-9 ._/()|-]*", re.IGNORECASE | re.ASCII)

_log = structlog.get_logger(__name__)


class TooManyPrices(NgpuError):
    """So many prices are kept already; set fewer by using words that several GPU models share."""

    code = "RESOURCE_EXHAUSTED"
    reason = "TOO_MANY_PRICES"


class UsageApi:
    """All methods of the service."""

    def __init__(self, fleet: Fleet, store: Store, prices: Prices, *, clock: Callable[[], datetime]) -> None:
        self._fleet = fleet
        self._store = store
        self._prices = prices
        self._clock = clock

    async def get_usage(self, request: pb.GetUsageRequest, caller: Caller) -> AsyncIterator[pb.GetUsageResponse]:
        """See usage.proto."""
        try:
            by = frozenset(By(key) for key in request.by)
        except ValueError:
            raise InvalidArgument("by: must be DAY, HOUR, WORKSPACE, ACCOUNT, NODE or GPU_MODEL.") from None
        if {By.DAY, By.HOUR} <= by:
            raise InvalidArgument("by: DAY and HOUR do not go together.")
        async with aclosing(self._store.usage(self._query(request.filter, caller, by))) as pages:
            async for page in pages:
                yield pb.GetUsageResponse(rows=map(self._usage, page))

    async def list_receipts(
        self, request: pb.ListReceiptsRequest, caller: Caller
    ) -> AsyncIterator[pb.ListReceiptsResponse]:
        """See usage.proto."""
        async with aclosing(self._store.receipts(self._query(request.filter, caller))) as pages:
            async for page in pages:
                yield pb.ListReceiptsResponse(receipts=map(self._receipt, page))

    def _query(self, message: pb.ReceiptFilter, caller: Caller, by: frozenset[By] = frozenset()) -> UsageQuery:
        if not message.HasField("start_time"):
            raise InvalidArgument("filter.start_time: is missing.")
        try:
            start = translate.time_of(message.start_time)
            end = translate.time_of(message.end_time) if message.HasField("end_time") else self._clock()
        except OverflowError:
            raise InvalidArgument("filter: a time is out of range.") from None
        own = caller.principal.id if caller.principal.kind is Kind.WORKSPACE else None
        uid = own
        if message.workspace:
            uid = self._fleet.workspace(message.workspace).uid
            if own not in {None, uid}:
                raise NotFound("There is no such workspace, or it is not yours.")
        return UsageQuery(
            start=start,
            end=end,
            workspace_uid=uid,
            account=message.account if message.HasField("account") else None,
            node_addr=self._node_addr(message.node) if message.node else None,
            by=by,
        )

    def _node_addr(self, key: str) -> str:
        try:
            return self._fleet.node(key).addr
        except NotFound:
            # Its own words are for nodes.
            raise NotFound(f"There is no node {key[:80]!r}.") from None

    def _usage(self, row: Usage) -> pb.Usage:
        return pb.Usage(
            start_time=translate.timestamp(row.start),
            workspace=self._workspace_name(row.workspace_uid),
            workspace_uid=row.workspace_uid,
            account=row.account,
            node_addr=row.node_addr,
            node_name=self._node_name(row.node_addr),
            gpu_model=row.gpu_model,
            attempts=row.attempts,
            free_attempts=row.free_attempts,
            gpu_us=row.gpu_us,
            billed_gpu_us=row.billed_gpu_us,
            cost=amount_text(row.cost_nanos),
        )

    def _receipt(self, row: Attempt) -> pb.Receipt:
        return pb.Receipt(
            task_id=row.task_id,
            workspace=self._workspace_name(row.workspace_uid),
            workspace_uid=row.workspace_uid,
            account=row.account,
            attempt=translate.attempt_of_row(row),
        )

    def _workspace_name(self, uid: str) -> str:
        try:
            return self._fleet.workspace(uid).name if uid else ""
        except NotFound:
            return ""

    def _node_name(self, addr: str) -> str:
        try:
            return self._fleet.node(addr).name if addr else ""
        except NotFound:
            return ""

    # Prices.

    async def set_price(self, request: pb.SetPriceRequest, caller: Caller) -> pb.SetPriceResponse:
        """See usage.proto."""
        message, now = request.price, self._clock()
        words = " ".join(message.gpu_model.split())
        if len(words) > WORDS_CHARS or not _WORDS.fullmatch(words):
            raise InvalidArgument(f"gpu_model: must be words of a GPU's model, at most {WORDS_CHARS} characters.")
        try:
            nanos = nanos_of(message.price)
            effective = translate.time_of(message.effective_time) if message.HasField("effective_time") else now
        except (ValueError, OverflowError) as error:
            raise InvalidArgument(f"price: {error}.") from None
        if nanos > PRICE_NANOS:
            raise InvalidArgument(f"price: must be at most {amount_text(PRICE_NANOS)} a second.")
        if effective < now:
            raise InvalidArgument("effective_time: is past; what was has its price already.")
        if len(self._prices) >= PRICES:
            raise TooManyPrices
        row = Price(gpu_model=words, effective_time=effective, nanos=nanos)
        await self._store.put_price(row)
        self._prices.add(row)
        _log.info(
            "price_set", gpu_model=words, price=amount_text(nanos), effective=str(effective), by=caller.principal.id
        )
        return pb.SetPriceResponse(price=_price(row))

    async def list_prices(self, request: pb.ListPricesRequest, caller: Caller) -> pb.ListPricesResponse:  # noqa: ARG002
        """See usage.proto."""
        return pb.ListPricesResponse(prices=map(_price, self._prices.rows()))


def _price(row: Price) -> pb.Price:
    return pb.Price(
        gpu_model=row.gpu_model, price=amount_text(row.nanos), effective_time=translate.timestamp(row.effective_time)
    )
