"""A file instead of an indexer, for private networks: who holds what, in TOML or JSON, read anew whenever it changes.

    # ledger.toml
    [bc1pp8vyhh2ma0ntzjwr26xxrn5r0w296yu68wdwle5rrhgtv3a2lgkqtyayus]
    AINN = "100.5"

An address that is not in it holds nothing. A file that is missing or wrong is a fault: nobody is let in by it.
"""

import asyncio
import json
import tomllib
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

from controlplane.assets.address import InvalidAddress, parse_address
from controlplane.assets.indexer import IndexerFault, amount

#: Some tens of thousands of addresses; past that an indexer is the better choice.
LEDGER_BYTES: Final = 8 * 1024 * 1024

_Stamp = tuple[int, int, int]


class Ledger:
    """See the module. `network` is that of its addresses."""

    kind = "ledger"
    is_local = True

    def __init__(self, path: Path, network: str) -> None:
        self._path = path
        self._network = network
        self._stamp: _Stamp | None = None
        self._held: Mapping[str, Mapping[str, Decimal]] = {}
        self._reading = asyncio.Lock()

    async def balances(self, address: str, tickers: Sequence[str]) -> dict[str, Decimal]:
        """See Indexer."""
        async with self._reading:
            try:
                stat = self._path.stat()
                stamp = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
                if stamp != self._stamp:
                    self._held = await asyncio.to_thread(_read, self._path, self._network)
                    self._stamp = stamp
            except OSError as error:
                raise IndexerFault(f"its file cannot be read: {error}") from error
        held = self._held.get(address, {})
        return {ticker: held.get(ticker.casefold(), Decimal(0)) for ticker in tickers}


def _read(path: Path, network: str) -> Mapping[str, Mapping[str, Decimal]]:
    """Address to ticker (case folded) to balance. Raises IndexerFault naming the first fault, and OSError."""
    with path.open("rb") as file:
        raw = file.read(LEDGER_BYTES + 1)
    if len(raw) > LEDGER_BYTES:
        raise IndexerFault(f"its file is larger than {LEDGER_BYTES} bytes")
    try:
        text = raw.decode()
        content: Any = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise IndexerFault(f"its file is not valid: {error}") from error
    if not isinstance(content, dict):
        raise IndexerFault("its file must map addresses to tickers to balances")
    held: dict[str, dict[str, Decimal]] = {}
    for number, (address, tickers) in enumerate(content.items(), 1):
        try:
            canonical = parse_address(address, network).text
        except InvalidAddress as error:
            raise IndexerFault(f"the address of entry {number} of its file is not valid: {error}") from error
        if not isinstance(tickers, dict) or not all(type(balance) in (str, int) for balance in tickers.values()):
            raise IndexerFault(f'entry {number} of its file must be tickers with balances, such as AINN = "100.5"')
        held[canonical] = {ticker.casefold(): amount(str(balance)) for ticker, balance in tickers.items()}
    return held
