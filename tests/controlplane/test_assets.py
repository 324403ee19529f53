"""Assets: order of indexers, time limits, one lookup for many, memory, settings, the ledger."""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from structlog.testing import capture_logs

from controlplane.assets import Assets, Holding, Provider, Settings, faults
from controlplane.errors import AssetUnknown, InvalidArgument

ADDRESS = "bc1pp8vyhh2ma0ntzjwr26xxrn5r0w296yu68wdwle5rrhgtv3a2lgkqtyayus"
OTHER = "1FsSia9rv4NeEwvJ2GvXrX7LyxYspbN2mo"
KEY = "secret-key"
HELD = (Holding("AINN", Decimal("100.5")),)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Opi:
    """An indexer whose answer can be held back."""

    def __init__(self) -> None:
        self.asked = 0
        self.status = 200
        self.headers: dict[str, str] = {}
        self.balance = 100_500_000_000_000_000_000
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.is_asked = asyncio.Event()
        self.url = ""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.asked += 1
        self.is_asked.set()
        await self.may_answer.wait()
        if self.status != 200:
            return web.Response(text="<h1>no</h1>", status=self.status, headers=self.headers)
        return web.json_response({"error": None, "result": {"overall_balance": str(self.balance)}})

    def provider(self) -> Provider:
        return Provider(kind="opi", base_url=self.url)


@asynccontextmanager
async def served() -> AsyncIterator[Opi]:
    indexer = Opi()
    app = web.Application()
    app.router.add_get("/v1/brc20/get_current_balance_of_wallet", indexer.handle)
    async with TestServer(app) as server:
        indexer.url = str(server.make_url(""))
        yield indexer
        indexer.may_answer.set()


@pytest.fixture
async def first() -> AsyncIterator[Opi]:
    async with served() as indexer:
        yield indexer


@pytest.fixture
async def second() -> AsyncIterator[Opi]:
    async with served() as indexer:
        yield indexer


@pytest.fixture
def clock() -> Clock:
    return Clock()


Make = Callable[..., Assets]


@pytest.fixture
async def make(clock: Clock) -> AsyncIterator[Make]:
    made: list[Assets] = []

    def make(*providers: Provider, **settings: object) -> Assets:
        made.append(Assets(Settings(providers=providers, **settings), monotonic=clock))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for assets in made:
        await assets.close()


async def fails(check: Awaitable[object]) -> str:
    with pytest.raises(AssetUnknown) as caught:
        await check
    return str(caught.value)


async def test_no_indexer_is_an_error_and_not_an_empty_answer(make: Make) -> None:
    assert "no indexer is configured" in await fails(make().check(ADDRESS))


async def test_a_bad_address_is_refused_before_anybody_is_asked(make: Make, first: Opi) -> None:
    with pytest.raises(InvalidArgument, match="mistyped character"):
        await make(first.provider()).check(ADDRESS[:-1] + "q")
    assert first.asked == 0


async def test_addresses_of_the_configured_network_only(make: Make, first: Opi) -> None:
    testnet = "tb1qw508d6qejxtdg4y5r3zarvary0c5xw7kxpjzsx"
    with pytest.raises(InvalidArgument, match="another network"):
        await make(first.provider()).check(testnet)
    assert await make(first.provider(), network="signet").check(testnet) == HELD


@pytest.mark.parametrize("status", [401, 429, 500, 503])
async def test_the_next_indexer_answers_for_one_that_fails(make: Make, first: Opi, second: Opi, status: int) -> None:
    first.status = status
    assets = make(first.provider(), second.provider())
    assert await assets.check(ADDRESS) == HELD
    assert (first.asked, second.asked) == (1, 1)


async def test_the_first_is_asked_alone_while_it_answers(make: Make, first: Opi, second: Opi) -> None:
    assert await make(first.provider(), second.provider()).check(ADDRESS) == HELD
    assert second.asked == 0


async def test_a_slow_indexer_is_given_up(make: Make, first: Opi, second: Opi) -> None:
    first.may_answer.clear()
    assets = make(first.provider(), second.provider(), timeout_s=0.05)
    assert await assets.check(ADDRESS) == HELD


async def test_an_unreachable_indexer_is_given_up(make: Make, second: Opi) -> None:
    assets = make(Provider(kind="opi", base_url="http://127.0.0.1:1"), second.provider())
    assert await assets.check(ADDRESS) == HELD


async def test_nobody_answers(make: Make, first: Opi, second: Opi) -> None:
    first.status = second.status = 500
    assets = make(first.provider(), second.provider())
    with pytest.raises(AssetUnknown) as caught:
        await assets.check(ADDRESS)
    assert caught.value.retry_after_s > 0
    # A failure is not remembered.
    second.status = 200
    assert await assets.check(ADDRESS) == HELD


async def test_one_that_failed_is_asked_last_for_a_while(make: Make, first: Opi, second: Opi, clock: Clock) -> None:
    first.status = 500
    assets = make(first.provider(), second.provider(), cache_s=0, cache_empty_s=0)
    await assets.check(ADDRESS)
    await assets.check(ADDRESS)
    assert (first.asked, second.asked) == (1, 2)
    first.status = 200
    clock.now += 16
    await assets.check(ADDRESS)
    assert (first.asked, second.asked) == (2, 2)


async def test_retry_after_is_kept(make: Make, first: Opi, second: Opi, clock: Clock) -> None:
    first.status, first.headers = 429, {"Retry-After": "120"}
    assets = make(first.provider(), second.provider(), cache_s=0, cache_empty_s=0)
    await assets.check(ADDRESS)
    clock.now += 119
    await assets.check(ADDRESS)
    assert first.asked == 1
    clock.now += 2
    await assets.check(ADDRESS)
    assert first.asked == 2


async def test_who_asked_to_be_left_alone_is(make: Make, first: Opi, clock: Clock) -> None:
    first.status, first.headers = 429, {"Retry-After": "30"}
    assets = make(first.provider())
    await fails(assets.check(ADDRESS))
    first.status = 200
    await fails(assets.check(ADDRESS))
    assert first.asked == 1
    clock.now += 31
    assert await assets.check(ADDRESS) == HELD


async def test_log_has_neither_address_nor_key(make: Make, first: Opi) -> None:
    first.status = 500
    assets = make(first.provider(), Provider(kind="unisat", base_url="http://127.0.0.1:1", api_key=KEY))
    with capture_logs() as logs:
        await fails(assets.check(ADDRESS))
    assert [line["indexer"] for line in logs] == ["opi", "unisat"]
    assert ADDRESS not in str(logs)
    assert KEY not in str(logs)


# --- memory ---


async def test_an_answer_is_remembered_for_its_time(make: Make, first: Opi, clock: Clock) -> None:
    assets = make(first.provider(), cache_s=60)
    await assets.check(ADDRESS)
    clock.now += 59
    assert await assets.check(ADDRESS.upper()) == HELD
    assert first.asked == 1
    clock.now += 2
    first.balance = 0
    assert await assets.check(ADDRESS) == ()
    assert first.asked == 2


async def test_holding_nothing_is_remembered_shorter(make: Make, first: Opi, clock: Clock) -> None:
    first.balance = 0
    assets = make(first.provider(), cache_s=60, cache_empty_s=10)
    assert await assets.check(ADDRESS) == ()
    first.balance = 10**18
    clock.now += 9
    assert await assets.check(ADDRESS) == ()
    clock.now += 2
    assert await assets.check(ADDRESS) == (Holding("AINN", Decimal(1)),)


async def test_memory_is_bounded_and_keeps_what_is_asked_for(make: Make, first: Opi) -> None:
    third = "36j4NfKv6Akva9amjWrLG6MuSQym1GuEmm"
    assets = make(first.provider(), cache_entries=2)
    await assets.check(ADDRESS)
    await assets.check(OTHER)
    await assets.check(ADDRESS)
    await assets.check(third)  # forgets OTHER
    assert first.asked == 3
    await assets.check(ADDRESS)
    assert first.asked == 3
    await assets.check(OTHER)
    assert first.asked == 4


# --- many callers ---


async def test_one_lookup_for_many_callers(make: Make, first: Opi) -> None:
    first.may_answer.clear()
    assets = make(first.provider())
    callers = [asyncio.create_task(assets.check(ADDRESS)) for _ in range(20)]
    await first.is_asked.wait()
    first.may_answer.set()
    assert await asyncio.gather(*callers) == [HELD] * 20
    assert first.asked == 1


async def test_a_caller_who_goes_away_takes_nobody_along(make: Make, first: Opi) -> None:
    first.may_answer.clear()
    assets = make(first.provider())
    gone, stays = asyncio.create_task(assets.check(ADDRESS)), asyncio.create_task(assets.check(ADDRESS))
    await first.is_asked.wait()
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    first.may_answer.set()
    assert await stays == HELD
    assert first.asked == 1


async def test_all_callers_learn_of_a_failure(make: Make, first: Opi) -> None:
    first.status = 500
    first.may_answer.clear()
    assets = make(first.provider())
    callers = [asyncio.create_task(assets.check(ADDRESS)) for _ in range(3)]
    await first.is_asked.wait()
    first.may_answer.set()
    for outcome in await asyncio.gather(*callers, return_exceptions=True):
        assert isinstance(outcome, AssetUnknown)


async def test_close_ends_lookups(make: Make, first: Opi) -> None:
    first.may_answer.clear()
    assets = make(first.provider())
    caller = asyncio.create_task(assets.check(ADDRESS))
    await first.is_asked.wait()
    await assets.close()
    assert "stopping" in await fails(caller)


# --- the ledger ---

TOML = f"""
[{ADDRESS}]
AINN = "100.5"
ordi = 7
"""


def ledger(path: Path) -> Provider:
    return Provider(kind="ledger", path=str(path))


def touch(path: Path, text: str) -> None:
    """Write, with a time of change of its own however fast this machine is."""
    before = path.stat().st_mtime_ns if path.exists() else 0
    path.write_text(text)
    os.utime(path, ns=(before + 1_000_000_000, before + 1_000_000_000))


async def test_ledger_in_toml_and_json(make: Make, tmp_path: Path) -> None:
    toml, js = tmp_path / "ledger.toml", tmp_path / "ledger.json"
    toml.write_text(TOML)
    js.write_text(json.dumps({ADDRESS.upper(): {"ainn": "100.5", "ORDI": 7}}))
    for path in (toml, js):
        assets = make(ledger(path), tickers=("AINN", "ORDI", "SATS"))
        assert await assets.check(ADDRESS) == (*HELD, Holding("ORDI", Decimal(7)))
        assert await assets.check(OTHER) == ()


async def test_ledger_is_read_anew_when_it_changes(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "ledger.toml"
    touch(path, TOML)
    assets = make(ledger(path))
    assert await assets.check(ADDRESS) == HELD
    touch(path, TOML.replace("100.5", "200"))
    assert await assets.check(ADDRESS) == (Holding("AINN", Decimal(200)),)
    path.unlink()
    await fails(assets.check(ADDRESS))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("= nonsense", "not valid"),
        ('[bc1qwrong]\nAINN = "1"', "address of entry 1"),
        (f'{ADDRESS} = "1"', "must be tickers"),
        (f"[{ADDRESS}]\nAINN = 0.5", "must be tickers"),
        (f"[{ADDRESS}]\nAINN = true", "must be tickers"),
        (f'[{ADDRESS}]\nAINN = "-5"', "no decimal number"),
    ],
)
async def test_a_wrong_ledger_lets_nobody_in(make: Make, tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "ledger.toml"
    path.write_text(text)
    with capture_logs() as logs:
        await fails(make(ledger(path)).check(OTHER))
    assert why in logs[0]["reason"]


async def test_an_indexer_stands_in_for_a_broken_ledger(make: Make, tmp_path: Path, first: Opi) -> None:
    assert await make(ledger(tmp_path / "missing.toml"), first.provider()).check(ADDRESS) == HELD


# --- settings ---


def test_good_settings_have_no_faults(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(f"{KEY}\n")
    keyed = Provider(kind="unisat", api_key_file=str(tmp_path / "key"))
    assert keyed.key() == KEY
    assert faults(Settings()) == []
    providers = (keyed, Provider(kind="opi"), Provider(kind="ledger", path="ledger.toml"))
    assert faults(Settings(providers=providers)) == []


def test_all_faults_are_told_at_once() -> None:
    settings = Settings(
        providers=(
            Provider(kind="unisat"),
            Provider(kind="best"),
            Provider(kind="xverse", api_key="k", base_url="ftp://x"),
            Provider(kind="maestro", api_key_file="/nonexistent"),
            Provider(kind="ledger"),
        ),
        tickers=("AINN", "ainn"),
        network="moonnet",
        timeout_s=0,
        cache_s=-1,
        cache_entries=0,
    )
    told = "\n".join(faults(settings))
    for part in (
        "providers[0].api_key: unisat needs one",
        "providers[1].kind: 'best' is not one of",
        "providers[2].base_url",
        "providers[3].api_key_file: cannot be read",
        "providers[4].path",
        "tickers: one is named twice",
        "network: must be one of mainnet",
        "timeout_s",
        "cache_s",
        "cache_entries",
    ):
        assert part in told
    assert len(told.splitlines()) == 10


def test_every_provider_has_its_documented_address() -> None:
    urls = {kind: Provider(kind=kind).url() for kind in ("unisat", "bestinslot", "xverse", "maestro", "opi")}
    assert urls == {
        "unisat": "https://open-api.unisat.io",
        "bestinslot": "https://api.bestinslot.xyz",
        "xverse": "https://api.secretkeylabs.io",
        "maestro": "https://xbt-mainnet.gomaestro-api.org",
        "opi": "http://127.0.0.1:8000",
    }


def test_a_key_is_never_shown() -> None:
    assert KEY not in repr(Settings(providers=(Provider(kind="unisat", api_key=KEY),)))
