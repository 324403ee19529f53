"""AssetService: does a BTC address hold one of the configured assets?"""

from typing import Protocol

from ngpu.v1 import asset_pb2 as pb

from controlplane.api.gate import Caller
from controlplane.assets import Holding


class Assets(Protocol):
    """Who says what an address holds."""

    async def check(self, address: str) -> tuple[Holding, ...]:
        """What it holds of the configured tickers; empty: nothing. Raises InvalidArgument, AssetUnknown."""


class AssetApi:
    """CheckAddress."""

    def __init__(self, assets: Assets) -> None:
        self._assets = assets

    async def check_address(self, request: pb.CheckAddressRequest, caller: Caller) -> pb.CheckAddressResponse:  # noqa: ARG002
        """See asset.proto."""
        held = await self._assets.check(request.address)
        return pb.CheckAddressResponse(
            # "f": a Decimal of its own accord would say 1E+2.
            holdings=[pb.Holding(ticker=holding.ticker, balance=f"{holding.balance:f}") for holding in held]
        )
