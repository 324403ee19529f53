"""What an operator chooses: which indexers in which order, which tickers, how long to wait and to remember."""

from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import msgspec

from controlplane.assets.address import NETWORKS

#: How each kind of provider is reached unless `base_url` says otherwise: the address its makers document.
BASE_URLS: Final = {
    "unisat": "https://open-api.unisat.io",
    "bestinslot": "https://api.bestinslot.xyz",
    "xverse": "https://api.secretkeylabs.io",
    "maestro": "https://xbt-mainnet.gomaestro-api.org",
    "opi": "http://127.0.0.1:8000",
}
#: A file instead of an indexer.
LEDGER: Final = "ledger"
KINDS: Final = (*BASE_URLS, LEDGER)
#: Kinds that answer nobody without a key.
KEYED: Final = frozenset({"unisat", "bestinslot", "xverse", "maestro"})


class Provider(msgspec.Struct, frozen=True):
    """One source of balances. `kind` is one of KINDS; `path` is the ledger's file and nobody else's."""

    kind: str
    base_url: str = ""
    api_key: str = ""
    #: Read once, at start; instead of `api_key`.
    api_key_file: str = ""
    path: str = ""

    def __repr__(self) -> str:
        """Never the key: values end up in logs and tracebacks."""
        return f"Provider(kind={self.kind!r}, base_url={self.base_url!r})"

    def url(self) -> str:
        """Where it is, without a slash at the end."""
        return (self.base_url or BASE_URLS[self.kind]).rstrip("/")

    def key(self) -> str:
        """Its key, from the setting or the file; empty if there is none. Raises OSError."""
        if self.api_key or not self.api_key_file:
            return self.api_key.strip()
        return Path(self.api_key_file).read_text(encoding="utf-8").strip()


class Settings(msgspec.Struct, frozen=True):
    """All of it. Times in seconds."""

    #: In order of preference; empty: every check fails with AssetUnknown.
    providers: tuple[Provider, ...] = ()
    #: Case does not matter; they are shown as written here.
    tickers: tuple[str, ...] = ("AINN",)
    #: One of address.NETWORKS.
    network: str = "mainnet"
    #: For one provider's whole answer, however many requests it takes.
    timeout_s: float = 5.0
    #: How long an answer is believed ...
    cache_s: float = 60.0
    #: ... and how long if it was that the address holds nothing: whoever has just bought the asset tries again at once.
    cache_empty_s: float = 10.0
    cache_entries: int = 10_000


def faults(settings: Settings) -> list[str]:
    """All that is wrong with the settings, in words, each beginning with the setting's name; empty: nothing."""
    found = []
    if not settings.tickers or not all(ticker.strip() for ticker in settings.tickers):
        found.append("tickers: name at least one, none of them empty")
    if len({ticker.casefold() for ticker in settings.tickers}) < len(settings.tickers):
        found.append("tickers: one is named twice (case does not matter)")
    if settings.network not in NETWORKS:
        found.append(f"network: must be one of {', '.join(NETWORKS)}")
    if settings.timeout_s <= 0:
        found.append("timeout_s: must be more than 0")
    found += [f"{name}: must not be negative" for name in ("cache_s", "cache_empty_s") if getattr(settings, name) < 0]
    if settings.cache_entries < 1:
        found.append("cache_entries: must be at least 1")
    for number, provider in enumerate(settings.providers):
        found += [f"providers[{number}].{fault}" for fault in _provider_faults(provider)]
    return found


def _provider_faults(provider: Provider) -> list[str]:
    if provider.kind not in KINDS:
        return [f"kind: {provider.kind!r} is not one of {', '.join(KINDS)}"]
    if provider.kind == LEDGER:
        return [] if provider.path else ["path: name the ledger's file"]
    found = []
    parts = urlsplit(provider.url())
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        found.append("base_url: must be an http or https address without a query, such as https://indexer.example")
    try:
        if provider.kind in KEYED and not provider.key():
            found.append(f"api_key: {provider.kind} needs one; set api_key or api_key_file")
    except (OSError, UnicodeError) as error:
        found.append(f"api_key_file: cannot be read: {error}")
    return found
