"""A node is its key: made here, readable by its owner alone, proven by signature."""

import stat
from pathlib import Path

import coincurve
import pytest
from eth_hash.auto import keccak

from nodedaemon.errors import KeyUnusable
from nodedaemon.identity import Identity, address_of

#: The first account of the mnemonic that Ethereum's development tools share.
KNOWN_SECRET = bytes.fromhex("ac0974bec39a17e36ba4a6b4d238ff944bacb478cbed5efcae784d7bf4f2ff80")
KNOWN_ADDRESS = "0xf39Fd6e51aad88F6F4ce6aB8827279cffFb92266"


def test_address_is_the_one_ethereum_knows() -> None:
    assert Identity(KNOWN_SECRET).address == KNOWN_ADDRESS


def test_key_is_made_once_and_only_its_owner_may_read_it(tmp_path: Path) -> None:
    path = tmp_path / "state" / "node.key"
    first = Identity.load(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert Identity.load(path).address == first.address
    assert [file.name for file in path.parent.iterdir()] == ["node.key"]


def test_key_that_others_can_read_is_refused_with_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    Identity.load(path)
    path.chmod(0o640)
    with pytest.raises(KeyUnusable, match="chmod 600"):
        Identity.load(path)


@pytest.mark.parametrize("text", ["", "not hex", "ab" * 31, "00" * 32, "ff" * 32, "ab" * 33])
def test_file_that_is_no_key_is_refused_and_kept(tmp_path: Path, text: str) -> None:
    path = tmp_path / "node.key"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(KeyUnusable, match="64 hex digits"):
        Identity.load(path)
    assert path.read_text() == text


@pytest.mark.parametrize("purpose", ["enroll", "login"])
def test_proof_gives_the_address_back(purpose: str) -> None:
    identity = Identity(KNOWN_SECRET)
    nonce = bytes(range(32))
    proof = identity.prove(purpose, nonce)  # type: ignore[arg-type]
    assert (proof.node_addr, proof.nonce) == (KNOWN_ADDRESS, nonce)
    assert len(proof.signature) == 65
    assert proof.signature[64] in (0, 1)
    signed = keccak(f"ngpu-node-v1:{purpose}:{KNOWN_ADDRESS.lower()}:{nonce.hex()}".encode())
    key = coincurve.PublicKey.from_signature_and_message(proof.signature, signed, hasher=None)
    assert address_of(key.format(compressed=False)) == KNOWN_ADDRESS
