"""Who this node is: a secp256k1 key made here, kept in a file that only its owner can read, and never sent.

The node's address is that of the key, as Ethereum writes it (EIP-55). It is proven by signing what the control plane
asks (node.proto, KeyProof).
"""

import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Self

import coincurve
from eth_hash.auto import keccak
from ngpu.v1 import node_pb2

from nodedaemon.errors import KeyUnusable

KEY_BYTES = 32


class Identity:
    """A key and its address. `address` is 0x and 40 hex digits, in EIP-55's mixed case."""

    def __init__(self, secret: bytes) -> None:
        """`secret`: the private key, 32 bytes. Raises ValueError for what is no key."""
        if len(secret) != KEY_BYTES:
            raise ValueError(f"{len(secret)} bytes are no key")
        self._key = coincurve.PrivateKey(secret)
        self.address = address_of(self._key.public_key.format(compressed=False))

    @classmethod
    def load(cls, path: Path, *, random_bytes: Callable[[int], bytes] = secrets.token_bytes) -> Self:
        """The key in that file, which is made if there is none. Raises KeyUnusable."""
        try:
            if not path.exists():
                _create(path, random_bytes(KEY_BYTES).hex())
            mode, text = path.stat().st_mode, path.read_text()
        except OSError as fault:
            raise KeyUnusable(f"{path} cannot be read or made: {fault.strerror}.") from None
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise KeyUnusable(f"{path} can be read by others than its owner: run `chmod 600 {path}`.")
        try:
            return cls(bytes.fromhex(text.strip()))
        except ValueError:
            raise KeyUnusable(
                f"{path} does not hold a key (64 hex digits). Restore it; or remove it, and join again as a new node."
            ) from None

    def prove(self, purpose: Literal["enroll", "login"], nonce: bytes) -> node_pb2.KeyProof:
        """Proof of the key, for that purpose and nonce alone."""
        text = f"ngpu-node-v1:{purpose}:{self.address.lower()}:{nonce.hex()}".encode()
        signature = self._key.sign_recoverable(keccak(text), hasher=None)
        return node_pb2.KeyProof(node_addr=self.address, nonce=nonce, signature=signature)


def address_of(public_key: bytes) -> str:
    """The address of an uncompressed public key (65 bytes), in EIP-55's mixed case."""
    digits = keccak(public_key[1:])[-20:].hex()
    mask = keccak(digits.encode()).hex()
    return "0x" + "".join(d.upper() if int(m, 16) >= 8 else d for d, m in zip(digits, mask, strict=False))


def _create(path: Path, text: str) -> None:
    """Whole or not at all, and never over another's."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    new = path.with_name(f"{path.name}.{os.getpid()}")
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(fd, "w") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        path.hardlink_to(new)
    finally:
        new.unlink()
