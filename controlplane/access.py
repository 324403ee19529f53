"""Who is calling: tokens, workspace ids, node keys and node sessions. Knows nothing of the wire and nothing of SQL.

Rule of this file: a secret is compared by its SHA-256 and never kept or logged. Secrets are 256 random bits (workspace
ids: 24 random decimal digits), so a slow hash would add nothing but a way to keep us busy.
"""

import asyncio
import enum
import hmac
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Final, Literal, NoReturn

import coincurve
from eth_hash.auto import keccak

from controlplane import ids
from controlplane.errors import NgpuError, Superseded, Unauthenticated
from controlplane.model import Role

Clock = Callable[[], datetime]

#: Challenges that nobody has answered yet; past it the oldest must expire first.
NONCES: Final = 10_000
#: How long a challenge is good, in seconds.
NONCE_LIFETIME_S: Final = 60.0
#: Some clients of the original platform send their workspace's id with this before it.
WORKSPACE_PREFIX: Final = "ngpu_"


class TooManyChallenges(NgpuError):
    """Too many challenges are outstanding; try again in a minute."""

    code = "RESOURCE_EXHAUSTED"
    reason = "RATE_LIMITED"


class Kind(enum.Enum):
    """As what somebody calls."""

    #: No credential asked for, none looked at.
    NOBODY = "nobody"
    OPERATOR = "operator"
    SERVICE = "service"
    #: A one-time token for enrolment: opens nothing else.
    JOIN = "join"
    #: A workspace's own id.
    WORKSPACE = "workspace"
    #: A node with a session.
    NODE = "node"


_KIND_OF: Final = {Role.OPERATOR: Kind.OPERATOR, Role.SERVICE: Kind.SERVICE, Role.NODE: Kind.JOIN}


@dataclass(frozen=True, slots=True)
class Principal:
    """Who calls. `id`: a token's id, a workspace's uid or a node's address."""

    kind: Kind
    id: str
    session: "Session | None" = None


@dataclass(frozen=True, slots=True)
class KnownToken:
    """What must be known of a token to let its holder in."""

    id: str
    secret_hash: bytes
    role: Role
    expire_time: datetime | None = None
    revoke_time: datetime | None = None


class Ending:
    """A reason to end, once there is one. The first stays."""

    def __init__(self) -> None:
        self.error: NgpuError | None = None
        self._event = asyncio.Event()

    def end(self, error: NgpuError) -> None:
        """End for that reason."""
        if self.error is None:
            self.error = error
            self._event.set()

    async def wait(self) -> NoReturn:
        """Wait for the reason, and raise it."""
        await self._event.wait()
        assert self.error is not None
        raise self.error


class Session:
    """One login of a node, and the streams under it. Over once a newer began, the node was revoked or went silent."""

    def __init__(self, node_addr: str, token_hash: bytes, boot_id: str) -> None:
        self.node_addr = node_addr
        self.token_hash = token_hash
        self.boot_id = boot_id
        self.error: NgpuError | None = None
        self._streams: dict[str, Ending] = {}

    def end(self, error: NgpuError) -> None:
        """End it and its streams for that reason. The first reason stays."""
        self.error = self.error or error
        for stream in self._streams.values():
            stream.end(self.error)

    @contextmanager
    def stream(self, kind: str) -> Iterator[Ending]:
        """A stream of that kind is up; an older one, whose end may not have been noticed yet, ends as Superseded."""
        if (older := self._streams.get(kind)) is not None:
            older.end(Superseded())
        ending = self._streams[kind] = Ending()
        if self.error is not None:
            ending.end(self.error)
        try:
            yield ending
        finally:
            if self._streams.get(kind) is ending:
                del self._streams[kind]


class Access:
    """Tells who a bearer is. `workspace_of` gives the uid of the workspace with that id, or None."""

    def __init__(
        self,
        *,
        workspace_of: Callable[[str], str | None],
        clock: Clock = lambda: datetime.now(UTC),
        monotonic: Callable[[], float] = time.monotonic,
        random_bytes: ids.Random = secrets.token_bytes,
    ) -> None:
        self._workspace_of = workspace_of
        self._clock = clock
        self._monotonic = monotonic
        self._random_bytes = random_bytes
        self._tokens: dict[bytes, KnownToken] = {}
        self._sessions: dict[bytes, Session] = {}
        self._session_of: dict[str, Session] = {}
        self._previous: dict[str, bytes] = {}
        # In order of their end: dicts keep the order of insertion, and all live equally long.
        self._nonces: dict[bytes, tuple[str, float]] = {}

    def load(self, tokens: Iterable[KnownToken]) -> None:
        """Know these tokens too."""
        for token in tokens:
            self._tokens[token.secret_hash] = token

    def revoke(self, token_id: str) -> None:
        """Let the token's holder in no more. No error if it is not known."""
        for token in [token for token in self._tokens.values() if token.id == token_id]:
            self._tokens[token.secret_hash] = replace(token, revoke_time=self._clock())

    def bearer(self, authorization: str | None) -> Callable[[], Principal]:
        """The question who sends `authorization` (`Bearer SECRET`, or the secret alone); a stream asks it repeatedly.

        Raises Unauthenticated, here or when asked; when asked also what has ended a node's session.
        """
        bearer = _bearer(authorization)
        return partial(self._principal, bearer, ids.secret_hash(bearer))

    def _principal(self, bearer: str, digest: bytes) -> Principal:
        session = self._sessions.get(digest)
        if session is not None:
            if session.error is not None:
                raise session.error
            return Principal(Kind.NODE, session.node_addr, session)
        token = self._tokens.get(digest)
        if token is not None and hmac.compare_digest(token.secret_hash, digest):
            self._check(token)
            return Principal(_KIND_OF[token.role], token.id)
        workspace_id = bearer.removeprefix(WORKSPACE_PREFIX)
        uid = self._workspace_of(workspace_id) if workspace_id.isdigit() else None
        if uid is None:
            raise Unauthenticated("The credential is not known here: check the token, or the workspace's id.")
        return Principal(Kind.WORKSPACE, uid)

    def join_token(self, secret: str) -> KnownToken:
        """The one-time token with this secret, whether it was used or not. Raises Unauthenticated."""
        digest = ids.secret_hash(secret)
        token = self._tokens.get(digest)
        if token is None or token.role is not Role.NODE:
            raise Unauthenticated("The token is not known here: make one with `ngpu token create --role node`.")
        self._check(token)
        return token

    def _check(self, token: KnownToken) -> None:
        if token.revoke_time is not None:
            raise Unauthenticated("The token was revoked.")
        if token.expire_time is not None and token.expire_time <= self._clock():
            raise Unauthenticated("The token has expired.")

    def challenge(self, node_addr: str) -> bytes:
        """A nonce for that node to sign. Raises TooManyChallenges."""
        now = self._monotonic()
        while self._nonces:
            nonce, (_, end) = next(iter(self._nonces.items()))
            if end > now:
                break
            del self._nonces[nonce]
        if len(self._nonces) >= NONCES:
            raise TooManyChallenges(retry_after_s=NONCE_LIFETIME_S)
        nonce = self._random_bytes(32)
        self._nonces[nonce] = (node_addr.lower(), now + NONCE_LIFETIME_S)
        return nonce

    def prove(self, purpose: Literal["enroll", "login"], node_addr: str, nonce: bytes, signature: bytes) -> str:
        """The address (EIP-55) of the key that signed the challenge. Uses the nonce up. Raises Unauthenticated."""
        issued_to, end = self._nonces.pop(nonce, ("", 0.0))
        if issued_to != node_addr.lower() or end <= self._monotonic():
            raise Unauthenticated("The nonce is not known, was used or is too old: ask for a new challenge.")
        signer = recover(proof_text(purpose, node_addr, nonce), signature)
        if signer is None or not hmac.compare_digest(signer.lower().encode(), node_addr.lower().encode()):
            raise Unauthenticated("The signature is not of the key with that address.")
        return signer

    def begin_session(self, node_addr: str, boot_id: str) -> str:
        """A new session's token. The node's older session ends as Superseded."""
        self.end_session(node_addr, Superseded())
        if (older := self._session_of.get(node_addr)) is not None:
            # One back is kept, so that its late calls hear why; the ones before are forgotten.
            self._sessions.pop(self._previous.get(node_addr, b""), None)
            self._previous[node_addr] = older.token_hash
        token = ids.token_secret("session", self._random_bytes)
        session = Session(node_addr, ids.secret_hash(token), boot_id)
        self._sessions[session.token_hash] = self._session_of[node_addr] = session
        return token

    def end_session(self, node_addr: str, error: NgpuError) -> None:
        """End the node's session and its streams, if it has one."""
        session = self._session_of.get(node_addr)
        if session is not None:
            session.end(error)

    def session_of(self, node_addr: str) -> Session | None:
        """The node's session, if one is up."""
        session = self._session_of.get(node_addr)
        return None if session is None or session.error is not None else session


def proof_text(purpose: str, node_addr: str, nonce: bytes) -> bytes:
    """What a node signs (node.proto, KeyProof)."""
    return f"ngpu-node-v1:{purpose}:{node_addr.lower()}:{nonce.hex()}".encode()


def recover(text: bytes, signature: bytes) -> str | None:
    """The EIP-55 address of the key that signed keccak-256 of `text`, or None if no key gives that signature.

    `signature`: r || s || v, 65 bytes, v 0 or 1.
    """
    if len(signature) != 65 or signature[64] > 1:
        return None
    try:
        key = coincurve.PublicKey.from_signature_and_message(signature, keccak(text), hasher=None)
    except Exception:  # the library raises it bare for a signature that is of no key
        return None
    return address_of(key.format(compressed=False))


def address_of(public_key: bytes) -> str:
    """The Ethereum-style address, in EIP-55's mixed case, of an uncompressed secp256k1 key (65 bytes)."""
    digits = keccak(public_key[1:])[-20:].hex()
    marks = keccak(digits.encode()).hex()
    return "0x" + "".join(d.upper() if int(m, 16) >= 8 else d for d, m in zip(digits, marks, strict=False))


def _bearer(authorization: str | None) -> str:
    if not authorization:
        raise Unauthenticated
    scheme, space, rest = authorization.strip().partition(" ")
    if not space:
        return scheme
    if scheme.lower() != "bearer" or not rest.strip():
        raise Unauthenticated
    return rest.strip()
