"""Has this BTC address the asset? The only package that knows BRC-20 indexers, one adapter a file.

    assets = Assets(Settings(providers=(Provider(kind="unisat", api_key="..."),)))
    for holding in await assets.check("bc1p..."): ...

`Assets` keeps to three rules: it never guesses (no indexer, no answer, an answer that makes no sense: AssetUnknown),
it asks no indexer twice for what it has just been told, and it holds no caller longer than the indexers' time limits.
"""

from controlplane.assets.holdings import Assets, Holding
from controlplane.assets.settings import Provider, Settings, faults

__all__ = ["Assets", "Holding", "Provider", "Settings", "faults"]
