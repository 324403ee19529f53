"""Asks the indexers in order until one answers, once an address however many want to know, and remembers it a while."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from decimal import Decimal
from typing import TYPE_CHECKING, Final

import msgspec
import structlog

from controlplane.assets.address import InvalidAddress, parse_address
from controlplane.assets.indexer import Indexer, IndexerFault
from controlplane.assets.settings import Settings
from controlplane.errors import AssetUnknown, InvalidArgument

if TYPE_CHECKING:
    from controlplane.assets.adapters import Adapters

#: Addresses being looked up at once; past it callers are told to try again.
LOOKUPS: Final = 512
#: An indexer that has failed is asked last for so long.
REST_S: Final = 15.0
#: What a caller is told to wait when nobody answers.
RETRY_AFTER_S: Final = 5.0

_log = structlog.get_logger()


class Holding(msgspec.Struct, frozen=True):
    """What an address has of a ticker: `ticker` as in the settings, `balance` in token units and above zero."""

    ticker: str
    balance: Decimal


Holdings = tuple[Holding, ...]


class Assets:
    """Answers `check`. Make it anywhere, use it in one event loop, `close` it at the end.

    Raises OSError if a key's file cannot be read.
    """

    def __init__(self, settings: Settings, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._monotonic = monotonic
        self._keys = [provider.key() for provider in settings.providers]
        self._adapters: Adapters | None = None
        self._rest_until: dict[Indexer, float] = {}
        self._not_before: dict[Indexer, float] = {}
        self._remembered: OrderedDict[str, tuple[float, Holdings]] = OrderedDict()
        self._lookups: dict[str, asyncio.Task[Holdings]] = {}

    async def check(self, address: str) -> Holdings:
        """Which of the configured tickers the address holds, in configured order; empty: none.

        Raises InvalidArgument if it is no address of the configured network, AssetUnknown if nobody can say what it
        holds.
        """
        try:
            known = parse_address(address, self._settings.network).text
        except InvalidAddress as error:
            raise InvalidArgument(f"The BTC address is not valid: {error}.") from error
        if not self._settings.providers:
            raise AssetUnknown(
                "BTC addresses cannot be checked: no indexer is configured. Leave the address out, or ask the operator "
                "of this platform to set one up."
            )
        if (remembered := self._recall(known)) is not None:
            return remembered
        lookup = self._lookups.get(known)
        if lookup is None:
            if len(self._lookups) >= LOOKUPS:
                raise AssetUnknown("Too many BTC addresses are being checked at once.", retry_after_s=RETRY_AFTER_S)
            lookup = asyncio.create_task(self._look_up(known), name="asset-lookup")
            self._lookups[known] = lookup
            lookup.add_done_callback(lambda lookup: self._looked_up(known, lookup))
        # It outlives a caller who goes away: others may wait for the same answer, and who asks next is glad of it.
        await asyncio.wait((lookup,))
        if lookup.cancelled():
            raise AssetUnknown("The control plane is stopping; the BTC address could not be checked.")
        return lookup.result()

    async def close(self) -> None:
        """End the lookups under way, and the connections."""
        lookups = list(self._lookups.values())
        for lookup in lookups:
            lookup.cancel()
        await asyncio.gather(*lookups, return_exceptions=True)
        if self._adapters is not None:
            await self._adapters.close()

    def _looked_up(self, address: str, lookup: asyncio.Task[Holdings]) -> None:
        del self._lookups[address]
        if not lookup.cancelled():
            lookup.exception()  # every caller may be gone; then nobody else takes note of it

    def _recall(self, address: str) -> Holdings | None:
        expiry, holdings = self._remembered.get(address, (0.0, ()))
        if expiry <= self._monotonic():
            self._remembered.pop(address, None)
            return None
        self._remembered.move_to_end(address)
        return holdings

    def _remember(self, address: str, holdings: Holdings) -> None:
        seconds = self._settings.cache_s if holdings else min(self._settings.cache_empty_s, self._settings.cache_s)
        self._remembered[address] = (self._monotonic() + seconds, holdings)
        self._remembered.move_to_end(address)
        while len(self._remembered) > self._settings.cache_entries:
            self._remembered.popitem(last=False)

    async def _look_up(self, address: str) -> Holdings:
        if self._adapters is None:
            # aiohttp takes 8 MiB, and most check nothing. It takes 0.2 s, in which calls go on.
            make = await asyncio.to_thread(_load)
            # Here and not in the constructor: its session belongs to a running event loop.
            self._adapters = self._adapters or make(self._settings, self._keys)
        for indexer in self._in_order(self._adapters.indexers):
            try:
                async with asyncio.timeout(self._settings.timeout_s):
                    balances = await indexer.balances(address, self._settings.tickers)
            except IndexerFault as fault:
                self._let_rest(indexer, str(fault), fault.retry_after_s)
            except TimeoutError:
                self._let_rest(indexer, f"no answer within {self._settings.timeout_s:g} s", 0.0)
            else:
                self._rest_until.pop(indexer, None)
                held = tuple(Holding(t, balances[t]) for t in self._settings.tickers if balances[t] > 0)
                if not indexer.is_local:
                    self._remember(address, held)
                return held
        raise AssetUnknown(retry_after_s=RETRY_AFTER_S)

    def _in_order(self, indexers: list[Indexer]) -> list[Indexer]:
        """By preference, those that have just failed last: a dead one costs its time limit once, not at every check.

        Who told us for how long to stay away is not asked at all until then.
        """
        now = self._monotonic()
        willing = (indexer for indexer in indexers if self._not_before.get(indexer, 0.0) <= now)
        return sorted(willing, key=lambda indexer: self._rest_until.get(indexer, 0.0) > now)

    def _let_rest(self, indexer: Indexer, reason: str, seconds: float) -> None:
        _log.warning("indexer_failed", indexer=indexer.kind, reason=reason)
        now = self._monotonic()
        self._rest_until[indexer] = now + REST_S
        self._not_before[indexer] = now + seconds


def _load() -> "type[Adapters]":
    from controlplane.assets.adapters import Adapters

    return Adapters
