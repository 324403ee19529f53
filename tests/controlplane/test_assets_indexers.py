"""Every adapter against a server on this machine that speaks exactly the documented shape, and then does not."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from decimal import Decimal
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from controlplane.assets import Assets, Holding, Provider, Settings
from controlplane.errors import AssetUnknown

ADDRESS = "bc1pp8vyhh2ma0ntzjwr26xxrn5r0w296yu68wdwle5rrhgtv3a2lgkqtyayus"
KEY = "secret-key"
E18 = 10**18

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Indexer:
    """A server that answers every request with `answer`, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[web.Request] = []
        self.answer: Handler = self.unset
        self.url = ""

    async def unset(self, request: web.Request) -> web.StreamResponse:
        raise AssertionError("the test sets an answer")

    def says(self, content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        async def answer(_: web.Request) -> web.StreamResponse:
            return web.json_response(content, status=status, headers=headers)

        self.answer = answer

    def says_text(self, text: str | bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        async def answer(_: web.Request) -> web.StreamResponse:
            body = text.encode() if isinstance(text, str) else text
            return web.Response(body=body, status=status, headers=headers, content_type="text/html")

        self.answer = answer

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(request)
        return await self.answer(request)


@pytest.fixture
async def indexer() -> AsyncIterator[Indexer]:
    served = Indexer()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", served.handle)
    async with TestServer(app) as server:
        served.url = str(server.make_url("")).rstrip("/")
        yield served


async def check(kind: str, indexer: Indexer, *tickers: str, address: str = ADDRESS) -> tuple[Holding, ...]:
    provider = Provider(kind=kind, base_url=indexer.url, api_key=KEY)
    assets = Assets(Settings(providers=(provider,), tickers=tickers or ("AINN",), timeout_s=2.0))
    try:
        return await assets.check(address)
    finally:
        await assets.close()


HELD = (Holding("AINN", Decimal("100.5")),)


# --- the documented shapes ---


def unisat(overall: str, available: str = "0", transferable: str = "0") -> Any:
    return {
        "code": 0,
        "msg": "OK",
        "data": {
            "ticker": "ainn",
            "overallBalance": overall,
            "transferableBalance": transferable,
            "availableBalance": available,
            "availableBalanceSafe": available,
            "availableBalanceUnSafe": "0",
            "transferableCount": 1,
            "transferableInscriptions": [],
            "historyCount": 3,
            "historyInscriptions": [],
        },
    }


def bestinslot(*rows: tuple[str, str]) -> Any:
    return {
        "block_height": 840000,
        "data": [
            {
                "ticker": ticker,
                "overall_balance": balance,
                "available_balance": "0.000000000000000000000000000000000000",
                "transferrable_balance": balance,
                "image_url": None,
                "min_listed_unit_price": 335.94,
            }
            for ticker, balance in rows
        ],
    }


def xverse(*rows: tuple[str, str], total: int | None = None) -> Any:
    items = [
        {"ticker": t, "overallBalance": b, "availableBalance": "0", "transferableBalance": b, "name": None}
        for t, b in rows
    ]
    return {"limit": 60, "offset": 0, "total": len(items) if total is None else total, "items": items}


def maestro(cursor: str | None = None, **rows: str) -> Any:
    return {
        "data": {ticker: {"total": balance, "available": "0.0"} for ticker, balance in rows.items()},
        "last_updated": {"block_hash": "00", "block_height": 840000},
        "next_cursor": cursor,
    }


def opi(overall: int | str, available: int | str = "0") -> Any:
    return {
        "error": None,
        "result": {"overall_balance": str(overall), "available_balance": str(available), "block_height": 840857},
    }


SHAPES: dict[str, Any] = {
    "unisat": unisat("100.5", "100.1", "0.4"),
    "bestinslot": bestinslot(("ainn", "100.5000000000000000")),
    "xverse": xverse(("AINN", "100.5")),
    "maestro": maestro(AINN="100.5"),
    "opi": opi(100_500_000_000_000_000_000, E18),
}
NOTHING: dict[str, Any] = {
    "unisat": unisat("0"),
    "bestinslot": bestinslot(),
    "xverse": xverse(),
    "maestro": maestro(),
    "opi": opi("0"),
}
KINDS = sorted(SHAPES)


@pytest.mark.parametrize("kind", KINDS)
async def test_reads_the_documented_answer(kind: str, indexer: Indexer) -> None:
    indexer.says(SHAPES[kind])
    assert await check(kind, indexer) == HELD


@pytest.mark.parametrize("kind", KINDS)
async def test_holding_nothing_is_an_answer(kind: str, indexer: Indexer) -> None:
    indexer.says(NOTHING[kind])
    assert await check(kind, indexer) == ()


@pytest.mark.parametrize("kind", KINDS)
async def test_tickers_are_compared_without_case(kind: str, indexer: Indexer) -> None:
    indexer.says(SHAPES[kind])
    assert await check(kind, indexer, "aInN") == (Holding("aInN", Decimal("100.5")),)


@pytest.mark.parametrize(
    ("kind", "target", "header", "value"),
    [
        ("unisat", f"/v1/indexer/address/{ADDRESS}/brc20/AINN/info", "Authorization", f"Bearer {KEY}"),
        ("bestinslot", f"/v3/brc20/wallet_balances?address={ADDRESS}&ticker=ainn", "x-api-key", KEY),
        ("xverse", f"/v1/ordinals/address/{ADDRESS}/brc20?ticker=AINN", "x-api-key", KEY),
        ("maestro", f"/v0/addresses/{ADDRESS}/brc20", "api-key", KEY),
        ("opi", f"/v1/brc20/get_current_balance_of_wallet?address={ADDRESS}&ticker=ainn", "Authorization", None),
    ],
)
async def test_asks_as_documented(kind: str, target: str, header: str, value: str | None, indexer: Indexer) -> None:
    indexer.says(SHAPES[kind])
    await check(kind, indexer)
    [asked] = indexer.asked
    assert asked.method == "GET"
    assert asked.path_qs == target
    assert asked.headers.get(header) == value


async def test_several_tickers_in_configured_order(indexer: Indexer) -> None:
    indexer.says(maestro(ORDI="7", ainn="3", sats="0"))
    held = await check("maestro", indexer, "SATS", "AINN", "ORDI", "PEPE")
    assert held == (Holding("AINN", Decimal(3)), Holding("ORDI", Decimal(7)))
    assert len(indexer.asked) == 1


async def test_a_ticker_of_any_letters_is_escaped(indexer: Indexer) -> None:
    answer = unisat("1")
    answer["data"]["ticker"] = "a/?é"
    indexer.says(answer)
    assert await check("unisat", indexer, "A/?É") == (Holding("A/?É", Decimal(1)),)
    assert indexer.asked[0].raw_path.endswith("/brc20/A%2F%3F%C3%89/info")


async def test_overall_is_the_sum_where_only_the_parts_are_told(indexer: Indexer) -> None:
    answer = unisat("0", "100", "0.5")
    del answer["data"]["overallBalance"]
    indexer.says(answer)
    assert await check("unisat", indexer) == HELD


async def test_bestinslot_is_searched_if_its_filter_is_not_obeyed(indexer: Indexer) -> None:
    indexer.says(bestinslot(("oxbt", "5000.0000000000000000"), ("ainn", "100.5")))
    assert await check("bestinslot", indexer) == HELD
    indexer.says(bestinslot(("oxbt", "5000.0000000000000000")))
    assert await check("bestinslot", indexer) == ()


async def test_xverse_is_asked_for_all_pages(indexer: Indexer) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        if request.query.get("offset"):
            return web.json_response(xverse(("ordi", "1"), ("ainn", "100.5"), total=4))
        return web.json_response(xverse(("sats", "1"), ("pepe", "1"), total=4))

    indexer.answer = answer
    assert await check("xverse", indexer) == HELD
    assert [request.query.get("offset") for request in indexer.asked] == [None, "2"]


async def test_xverse_that_never_gives_the_rest_is_not_believed(indexer: Indexer) -> None:
    indexer.says(xverse(("sats", "1"), total=1000))
    with pytest.raises(AssetUnknown):
        await check("xverse", indexer)
    assert len(indexer.asked) <= 20


async def test_maestro_is_asked_for_all_pages(indexer: Indexer) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        if request.query.get("cursor") == "c1":
            return web.json_response(maestro(AINN="100.5"))
        return web.json_response(maestro("c1", ORDI="1"))

    indexer.answer = answer
    assert await check("maestro", indexer) == HELD


async def test_opi_no_balance_found_is_zero(indexer: Indexer) -> None:
    indexer.says({"error": "no balance found", "result": None}, status=400)
    assert await check("opi", indexer) == ()


@pytest.mark.parametrize("error", ["ticker is required", "block not indexed yet", "internal error", ""])
async def test_opi_any_other_400_is_a_fault(error: str, indexer: Indexer) -> None:
    indexer.says({"error": error, "result": None}, status=400)
    with pytest.raises(AssetUnknown):
        await check("opi", indexer)


async def test_opi_counts_in_fractions_of_ten_to_the_eighteenth(indexer: Indexer) -> None:
    indexer.says(opi(1))
    assert await check("opi", indexer) == (Holding("AINN", Decimal("0.000000000000000001")),)


async def test_unisat_code_other_than_zero_is_a_fault(indexer: Indexer) -> None:
    indexer.says({"code": -2003, "msg": "API rate limit", "data": None})
    with pytest.raises(AssetUnknown):
        await check("unisat", indexer)


async def test_unisat_answer_about_another_ticker_is_a_fault(indexer: Indexer) -> None:
    answer = unisat("5")
    answer["data"]["ticker"] = "ordi"
    indexer.says(answer)
    with pytest.raises(AssetUnknown):
        await check("unisat", indexer)


# --- what must never be taken for an answer ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("status", [301, 302, 401, 403, 404, 429, 500, 502, 503])
async def test_any_other_status_is_a_fault(kind: str, status: int, indexer: Indexer) -> None:
    indexer.says(SHAPES[kind], status=status, headers={"Location": f"{indexer.url}/elsewhere"})
    with pytest.raises(AssetUnknown):
        await check(kind, indexer)
    assert len(indexer.asked) == 1  # a redirect is not followed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "text",
    [
        "",
        "<html><body><h1>502 Bad Gateway</h1></body></html>",
        "null",
        "[]",
        "{}",
        '"100"',
        '{"data": "100"}',
        '{"code": 0, "msg": "OK", "data": {"x": 1}}',
        b"\xff\xfe\x00",
        "[" * 100_000,
    ],
)
async def test_garbage_is_a_fault(kind: str, text: str | bytes, indexer: Indexer) -> None:
    indexer.says_text(text)
    with pytest.raises(AssetUnknown):
        await check(kind, indexer)


BAD_BALANCES: list[Any] = [
    "",
    "-1",
    "1e9",
    "NaN",
    "Infinity",
    "1,000",
    " 1",
    "1.",
    ".5",
    "0x10",
    "１",
    "1" * 100,
    None,
    1.5,
    True,
    [],
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("balance", BAD_BALANCES, ids=repr)
async def test_a_malformed_balance_is_a_fault_and_not_zero(kind: str, balance: Any, indexer: Indexer) -> None:
    def spoil(content: Any) -> Any:
        if isinstance(content, dict):
            return {
                key: balance
                if key in ("overallBalance", "overall_balance", "total") and isinstance(value, str)
                else spoil(value)
                for key, value in content.items()
                if not (balance is None and key in ("transferableBalance", "transferrable_balance"))
            }
        return [spoil(item) for item in content] if isinstance(content, list) else content

    indexer.says(spoil(SHAPES[kind]))
    with pytest.raises(AssetUnknown):
        await check(kind, indexer)


async def test_opi_fraction_of_its_unit_is_a_fault(indexer: Indexer) -> None:
    indexer.says(opi("100.5"))
    with pytest.raises(AssetUnknown):
        await check("opi", indexer)


@pytest.mark.parametrize("kind", ["unisat", "maestro", "opi"])
async def test_more_available_than_overall_is_a_fault(kind: str, indexer: Indexer) -> None:
    answers = {
        "unisat": unisat("1", "2"),
        "maestro": {"data": {"AINN": {"total": "1", "available": "1.1"}}},
        "opi": opi(1, 2),
    }
    indexer.says(answers[kind])
    with pytest.raises(AssetUnknown):
        await check(kind, indexer)


@pytest.mark.parametrize("kind", KINDS)
async def test_an_endless_answer_is_cut_off(kind: str, indexer: Indexer) -> None:
    sent = 0

    async def answer(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        response = web.StreamResponse()
        await response.prepare(request)
        while sent < 64 * 1024 * 1024:
            await response.write(b" " * 65536)
            sent += 65536
        return response

    indexer.answer = answer
    with pytest.raises(AssetUnknown):
        await check(kind, indexer)
    assert sent < 32 * 1024 * 1024


async def test_an_answer_that_breaks_off_is_a_fault(indexer: Indexer) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "1000"})
        await response.prepare(request)
        await response.write(json.dumps(SHAPES["unisat"]).encode())
        assert request.transport is not None
        request.transport.close()
        return response

    indexer.answer = answer
    with pytest.raises(AssetUnknown):
        await check("unisat", indexer)
