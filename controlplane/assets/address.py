"""Is this a Bitcoin address? bech32 (BIP-173), bech32m (BIP-350), base58check (P2PKH and P2SH), and nothing else.

Written out here because PyPI's `bech32` refuses every bech32m address, so all of taproot, and the other packages bring
a wallet along.
"""

import hashlib
from dataclasses import dataclass
from typing import Final, NamedTuple

#: No Bitcoin address is longer; whoever sends more is not sending one.
MAX_LENGTH: Final = 90


class InvalidAddress(ValueError):
    """Not an address of the network asked for; the message says why, as the end of a sentence."""


@dataclass(frozen=True)
class Address:
    """A valid address: `text` in its usual form (bech32 in lower case), `script` the locking script it stands for."""

    text: str
    script: bytes


class Network(NamedTuple):
    """How the addresses of a network begin."""

    prefix: str
    p2pkh: int
    p2sh: int


NETWORKS: Final = {
    "mainnet": Network("bc", 0x00, 0x05),
    "testnet": Network("tb", 0x6F, 0xC4),
    "signet": Network("tb", 0x6F, 0xC4),
    "regtest": Network("bcrt", 0x6F, 0xC4),
}


def parse_address(text: str, network: str = "mainnet") -> Address:
    """The address that `text` is. Raises InvalidAddress, with words for whoever typed it."""
    if not text:
        raise InvalidAddress("it is empty")
    # Before anything else: lower() turns some letters outside ASCII into ASCII ones.
    if not text.isascii() or not text.isalnum():
        raise InvalidAddress("it has characters other than the letters a-z and digits")
    if len(text) > MAX_LENGTH:
        raise InvalidAddress(f"it is longer than {MAX_LENGTH} characters")
    prefix, separator, _ = text.lower().partition("1")
    if separator and prefix in {known.prefix for known in NETWORKS.values()}:
        return _parse_segwit(text, prefix, network)
    return _parse_base58(text, network)


# --- bech32 and bech32m ---

_CHARSET: Final = "qpzry9x8gf2tvdw0s3jn54khce6mua7l"
_GENERATOR: Final = (0x3B6A57B2, 0x26508E6D, 0x1EA119FA, 0x3D4233DD, 0x2A1462B3)
_BECH32: Final = 1
_BECH32M: Final = 0x2BC830A3
_CHECKSUM_LENGTH: Final = 6


def _parse_segwit(text: str, prefix: str, network: str) -> Address:
    if text not in (text.lower(), text.upper()):
        raise InvalidAddress("it mixes upper and lower case")
    text = text.lower()
    values = [_CHARSET.find(character) for character in text[len(prefix) + 1 :]]
    if -1 in values:
        raise InvalidAddress("it has a character that bech32 does not use (1, b, i or o)")
    if len(values) <= _CHECKSUM_LENGTH:
        raise InvalidAddress("it is too short")
    version, checksum = values[0], _checksum(prefix, values)
    if checksum not in (_BECH32, _BECH32M):
        raise InvalidAddress("its checksum does not match: look for a mistyped character")
    if version > 16:
        raise InvalidAddress(f"its witness version is {version}, the highest is 16")
    if checksum != (_BECH32M if version else _BECH32):
        needed, got = ("bech32m", "bech32") if version else ("bech32", "bech32m")
        raise InvalidAddress(f"its witness version {version} needs a {needed} checksum and it has one of {got}")
    program = _to_bytes(values[1:-_CHECKSUM_LENGTH])
    if not 2 <= len(program) <= 40 or (version == 0 and len(program) not in (20, 32)):
        raise InvalidAddress(f"its witness program has {len(program)} bytes, which version {version} does not allow")
    if prefix != NETWORKS[network].prefix:
        raise InvalidAddress(f"it is of another network: {network} addresses begin with {NETWORKS[network].prefix}1")
    return Address(text, bytes([version + 0x50 if version else 0, len(program)]) + program)


def _checksum(prefix: str, values: list[int]) -> int:
    """What remains of prefix, data and checksum: the constant of the encoding, if they belong together."""
    remainder = 1
    for value in [*(ord(c) >> 5 for c in prefix), 0, *(ord(c) & 31 for c in prefix), *values]:
        top = remainder >> 25
        remainder = (remainder & 0x1FFFFFF) << 5 ^ value
        for bit, generator in enumerate(_GENERATOR):
            remainder ^= generator if top >> bit & 1 else 0
    return remainder


def _to_bytes(values: list[int]) -> bytes:
    """Groups of five bits as bytes. What is left over must be padding: less than one group, all zero."""
    bits = 0
    for value in values:
        bits = bits << 5 | value
    padding = len(values) * 5 % 8
    if padding > 4 or bits & (1 << padding) - 1:
        raise InvalidAddress("its padding is not zero")
    return (bits >> padding).to_bytes(len(values) * 5 // 8)


# --- base58check ---

_BASE58: Final = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
#: Version, hash, checksum.
_BASE58_BYTES: Final = 1 + 20 + 4


def _parse_base58(text: str, network: str) -> Address:
    number = 0
    for character in text:
        digit = _BASE58.find(character)
        if digit < 0:
            raise InvalidAddress("it is neither bech32 (bc1...) nor base58 (1... or 3...)")
        number = number * 58 + digit
    # Each leading "1" is a zero byte; the number itself has lost them.
    zeros = len(text) - len(text.lstrip("1"))
    raw = bytes(zeros) + number.to_bytes((number.bit_length() + 7) // 8)
    if len(raw) != _BASE58_BYTES:
        raise InvalidAddress("its length is not that of an address")
    payload, checksum = raw[:-4], raw[-4:]
    if hashlib.sha256(hashlib.sha256(payload).digest()).digest()[:4] != checksum:
        raise InvalidAddress("its checksum does not match: look for a mistyped character")
    version, digest = payload[0], payload[1:]
    wanted = NETWORKS[network]
    if version == wanted.p2pkh:
        return Address(text, b"\x76\xa9\x14" + digest + b"\x88\xac")
    if version == wanted.p2sh:
        return Address(text, b"\xa9\x14" + digest + b"\x87")
    raise InvalidAddress(f"it is not an address of {network}")
