"""All indexers of the settings, and the connections that they share."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import aiohttp

from controlplane.assets.bestinslot import BestInSlot
from controlplane.assets.http import Http
from controlplane.assets.indexer import Indexer
from controlplane.assets.ledger import Ledger
from controlplane.assets.maestro import Maestro
from controlplane.assets.opi import Opi
from controlplane.assets.settings import LEDGER, Provider, Settings
from controlplane.assets.unisat import Unisat
from controlplane.assets.xverse import Xverse

#: Connections to all indexers together.
CONNECTIONS: Final = 64


class Adapters:
    """Made in a running event loop; `close` it. `keys`: the providers', in their order."""

    def __init__(self, settings: Settings, keys: list[str]) -> None:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=CONNECTIONS),
            cookie_jar=aiohttp.DummyCookieJar(),
            # The caller's own time limit is around all requests of one indexer.
            timeout=aiohttp.ClientTimeout(total=None),
            headers={"Accept": "application/json", "Accept-Encoding": "identity", "User-Agent": "ngpu"},
        )
        http = Http(self._session)
        self.indexers = [
            _indexer(provider, key, http, settings.network)
            for provider, key in zip(settings.providers, keys, strict=True)
        ]

    async def close(self) -> None:
        """End the connections."""
        await self._session.close()


def _indexer(provider: Provider, key: str, http: Http, network: str) -> Indexer:
    if provider.kind == LEDGER:
        return Ledger(Path(provider.path), network)
    if provider.kind == "opi":
        return Opi(http, provider.url())
    keyed: Mapping[str, Callable[[Http, str, str], Indexer]] = {
        "unisat": Unisat,
        "bestinslot": BestInSlot,
        "xverse": Xverse,
        "maestro": Maestro,
    }
    return keyed[provider.kind](http, provider.url(), key)
