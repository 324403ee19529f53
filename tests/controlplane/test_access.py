"""Who is let in, as what, and who is not."""

import asyncio
from datetime import UTC, datetime, timedelta

import coincurve
import pytest
from eth_hash.auto import keccak

from controlplane import ids
from controlplane.access import (
    NONCES,
    Access,
    Kind,
    KnownToken,
    TooManyChallenges,
    address_of,
    proof_text,
    recover,
)
from controlplane.errors import NgpuError, NodeRevoked, Superseded, Unauthenticated
from controlplane.model import Role

START = datetime(2026, 1, 1, tzinfo=UTC)
#: Of the key 1; also in every Ethereum library's tests.
ADDR = "0x7E5F4552091A69125d5DfCb7b8C2659029395Bdf"
KEY = coincurve.PrivateKey(bytes(31) + b"\1")
WORKSPACE_ID = "012345678901234567890123"


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def now(self) -> datetime:
        return START + timedelta(seconds=self.seconds)

    def monotonic(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def access(clock: Clock) -> Access:
    return Access(
        workspace_of={WORKSPACE_ID: "w-1"}.get,
        clock=clock.now,
        monotonic=clock.monotonic,
    )


def token(secret: str, role: Role, expire_time: datetime | None = None) -> KnownToken:
    return KnownToken(f"t-{secret}", ids.secret_hash(secret), role, expire_time)


def sign(key: coincurve.PrivateKey, text: bytes) -> bytes:
    return bytes(key.sign_recoverable(keccak(text), hasher=None))


@pytest.mark.parametrize(
    ("role", "kind"), [(Role.OPERATOR, Kind.OPERATOR), (Role.SERVICE, Kind.SERVICE), (Role.NODE, Kind.JOIN)]
)
def test_token_opens_what_its_role_says(access: Access, role: Role, kind: Kind) -> None:
    access.load([token("s", role)])
    principal = access.bearer("Bearer s")()
    assert (principal.kind, principal.id) == (kind, "t-s")


@pytest.mark.parametrize("form", ["Bearer {}", "bearer {}", "Bearer  {} ", "{}", "Bearer ngpu_{}", "ngpu_{}"])
def test_workspace_id_is_a_bearer_in_every_form_that_clients_send(access: Access, form: str) -> None:
    principal = access.bearer(form.format(WORKSPACE_ID))()
    assert (principal.kind, principal.id) == (Kind.WORKSPACE, "w-1")


@pytest.mark.parametrize(
    "authorization",
    [None, "", " ", "Bearer", "Bearer ", "Basic s", "Bearer unknown", "Bearer w-1", "Bearer 012345678901234567890124"],
)
def test_others_are_not_let_in(access: Access, authorization: str | None) -> None:
    access.load([token("s", Role.OPERATOR)])
    with pytest.raises(Unauthenticated):
        access.bearer(authorization)()


def test_expired_token_is_told_so(access: Access, clock: Clock) -> None:
    access.load([token("s", Role.SERVICE, START + timedelta(seconds=10))])
    access.bearer("s")()
    clock.seconds = 10
    with pytest.raises(Unauthenticated, match="expired"):
        access.bearer("s")()


def test_revoked_token_is_told_so(access: Access) -> None:
    access.load([token("s", Role.SERVICE)])
    access.revoke("t-s")
    access.revoke("t-unknown")
    with pytest.raises(Unauthenticated, match="revoked"):
        access.bearer("s")()


def test_only_a_nodes_token_lets_a_node_join(access: Access) -> None:
    access.load([token("join", Role.NODE), token("s", Role.OPERATOR)])
    assert access.join_token("join").id == "t-join"
    for secret in ("s", "unknown"):
        with pytest.raises(Unauthenticated):
            access.join_token(secret)


def test_address_is_in_mixed_case() -> None:
    assert address_of(KEY.public_key.format(compressed=False)) == ADDR


@pytest.mark.parametrize("node_addr", [ADDR, ADDR.lower()])
def test_signed_challenge_proves_the_address(access: Access, node_addr: str) -> None:
    nonce = access.challenge(node_addr)
    assert access.prove("login", node_addr, nonce, sign(KEY, proof_text("login", node_addr, nonce))) == ADDR


def test_challenge_is_good_once(access: Access) -> None:
    nonce = access.challenge(ADDR)
    signature = sign(KEY, proof_text("login", ADDR, nonce))
    access.prove("login", ADDR, nonce, signature)
    with pytest.raises(Unauthenticated, match="nonce"):
        access.prove("login", ADDR, nonce, signature)


def test_challenge_is_used_up_by_a_wrong_answer(access: Access) -> None:
    nonce = access.challenge(ADDR)
    with pytest.raises(Unauthenticated, match="signature"):
        access.prove("login", ADDR, nonce, bytes(65))
    with pytest.raises(Unauthenticated, match="nonce"):
        access.prove("login", ADDR, nonce, sign(KEY, proof_text("login", ADDR, nonce)))


def test_challenge_is_good_for_a_minute(access: Access, clock: Clock) -> None:
    nonce = access.challenge(ADDR)
    clock.seconds = 60
    with pytest.raises(Unauthenticated, match="too old"):
        access.prove("login", ADDR, nonce, sign(KEY, proof_text("login", ADDR, nonce)))


def test_challenge_is_for_one_address(access: Access) -> None:
    nonce = access.challenge("0x" + "1" * 40)
    with pytest.raises(Unauthenticated, match="nonce"):
        access.prove("login", ADDR, nonce, sign(KEY, proof_text("login", ADDR, nonce)))


def test_signature_is_for_one_purpose(access: Access) -> None:
    nonce = access.challenge(ADDR)
    with pytest.raises(Unauthenticated, match="signature"):
        access.prove("enroll", ADDR, nonce, sign(KEY, proof_text("login", ADDR, nonce)))


def test_signature_of_another_key_is_refused(access: Access) -> None:
    nonce = access.challenge(ADDR)
    other = coincurve.PrivateKey(bytes(31) + b"\2")
    with pytest.raises(Unauthenticated, match="signature"):
        access.prove("login", ADDR, nonce, sign(other, proof_text("login", ADDR, nonce)))


@pytest.mark.parametrize("signature", [b"", bytes(64), bytes(65), b"\xff" * 64 + b"\0", bytes(64) + b"\x1b"])
def test_what_is_no_signature_is_of_nobody(signature: bytes) -> None:
    assert recover(b"text", signature) is None


def test_challenges_are_bounded_and_run_out(access: Access, clock: Clock) -> None:
    for _ in range(NONCES):
        access.challenge(ADDR)
    with pytest.raises(TooManyChallenges) as caught:
        access.challenge(ADDR)
    assert caught.value.retry_after_s > 0
    clock.seconds = 61
    access.challenge(ADDR)


async def ended(ending: object) -> NgpuError:
    with pytest.raises(NgpuError) as caught:
        await ending.wait()  # type: ignore[attr-defined]
    return caught.value


async def test_session_opens_what_a_node_may(access: Access) -> None:
    principal = access.bearer(access.begin_session(ADDR, "boot-1"))()
    assert (principal.kind, principal.id) == (Kind.NODE, ADDR)
    assert principal.session is access.session_of(ADDR)


async def test_newer_session_ends_the_older_and_its_streams(access: Access) -> None:
    first = access.begin_session(ADDR, "boot-1")
    session = access.bearer(first)().session
    assert session is not None
    with session.stream("execute") as execute, session.stream("heartbeat") as heartbeat:
        second = access.begin_session(ADDR, "boot-2")
        assert isinstance(await ended(execute), Superseded)
        assert isinstance(await ended(heartbeat), Superseded)
    with pytest.raises(Superseded):
        access.bearer(first)()
    assert access.bearer(second)().id == ADDR
    # One back is remembered, so that it hears why; what is older is unknown.
    access.begin_session(ADDR, "boot-3")
    with pytest.raises(Unauthenticated):
        access.bearer(first)()


async def test_newer_stream_of_a_kind_ends_the_older(access: Access) -> None:
    session = access.bearer(access.begin_session(ADDR, "boot-1"))().session
    assert session is not None
    with session.stream("execute") as older:
        with session.stream("execute") as newer:
            assert isinstance(await ended(older), Superseded)
        assert newer.error is None
    # The older one's end must not have taken the newer one's place away.
    with session.stream("execute") as again:
        session.end(NodeRevoked())
        assert isinstance(await ended(again), NodeRevoked)


async def test_ended_session_says_why_to_streams_that_come_late(access: Access) -> None:
    secret = access.begin_session(ADDR, "boot-1")
    session = access.bearer(secret)().session
    assert session is not None
    access.end_session(ADDR, NodeRevoked())
    access.end_session(ADDR, Superseded())
    assert access.session_of(ADDR) is None
    with session.stream("execute") as late:
        assert isinstance(await ended(late), NodeRevoked)
    with pytest.raises(NodeRevoked):
        access.bearer(secret)()


async def test_nothing_is_kept_of_streams_that_are_over(access: Access) -> None:
    session = access.bearer(access.begin_session(ADDR, "boot-1"))().session
    assert session is not None
    with session.stream("execute") as stream:
        pass
    session.end(Superseded())
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await stream.wait()
