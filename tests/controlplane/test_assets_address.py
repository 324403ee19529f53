"""BTC addresses: the official vectors, and what people mistype."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.assets.address import NETWORKS, InvalidAddress, parse_address

DOCUMENTED = "bc1pp8vyhh2ma0ntzjwr26xxrn5r0w296yu68wdwle5rrhgtv3a2lgkqtyayus"

# BIP-350, "Test vectors for v0-v16 native segregated witness addresses".
BIP350_VALID = [
    ("BC1QW508D6QEJXTDG4Y5R3ZARVARY0C5XW7KV8F3T4", "0014751e76e8199196d454941c45d1b3a323f1433bd6"),
    (
        "tb1qrp33g0q5c5txsp9arysrx4k6zdkfs4nce4xj0gdcccefvpysxf3q0sl5k7",
        "00201863143c14c5166804bd19203356da136c985678cd4d27a1b8c6329604903262",
    ),
    (
        "bc1pw508d6qejxtdg4y5r3zarvary0c5xw7kw508d6qejxtdg4y5r3zarvary0c5xw7kt5nd6y",
        "5128751e76e8199196d454941c45d1b3a323f1433bd6751e76e8199196d454941c45d1b3a323f1433bd6",
    ),
    ("BC1SW50QGDZ25J", "6002751e"),
    ("bc1zw508d6qejxtdg4y5r3zarvaryvaxxpcs", "5210751e76e8199196d454941c45d1b3a323"),
    (
        "tb1qqqqqp399et2xygdj5xreqhjjvcmzhxw4aywxecjdzew6hylgvsesrxh6hy",
        "0020000000c4a5cad46221b2a187905e5266362b99d5e91c6ce24d165dab93e86433",
    ),
    (
        "tb1pqqqqp399et2xygdj5xreqhjjvcmzhxw4aywxecjdzew6hylgvsesf3hn0c",
        "5120000000c4a5cad46221b2a187905e5266362b99d5e91c6ce24d165dab93e86433",
    ),
    (
        "bc1p0xlxvlhemja6c4dqv22uapctqupfhlxm9h8z3k2e72q4k9hcz7vqzk5jj0",
        "512079be667ef9dcbbac55a06295ce870b07029bfcdb2dce28d959f2815b16f81798",
    ),
]
BIP350_INVALID = [
    ("tc1p0xlxvlhemja6c4dqv22uapctqupfhlxm9h8z3k2e72q4k9hcz7vq5zuyut", "Invalid human-readable part"),
    ("bc1p0xlxvlhemja6c4dqv22uapctqupfhlxm9h8z3k2e72q4k9hcz7vqh2y7hd", "Bech32 instead of Bech32m"),
    ("tb1z0xlxvlhemja6c4dqv22uapctqupfhlxm9h8z3k2e72q4k9hcz7vqglt7rf", "Bech32 instead of Bech32m"),
    ("BC1S0XLXVLHEMJA6C4DQV22UAPCTQUPFHLXM9H8Z3K2E72Q4K9HCZ7VQ54WELL", "Bech32 instead of Bech32m"),
    ("bc1qw508d6qejxtdg4y5r3zarvary0c5xw7kemeawh", "Bech32m instead of Bech32"),
    ("tb1q0xlxvlhemja6c4dqv22uapctqupfhlxm9h8z3k2e72q4k9hcz7vq24jc47", "Bech32m instead of Bech32"),
    ("bc1p38j9r5y49hruaue7wxjce0updqjuyyx0kh56v8s25huc6995vvpql3jow4", "Invalid character in checksum"),
    ("BC130XLXVLHEMJA6C4DQV22UAPCTQUPFHLXM9H8Z3K2E72Q4K9HCZ7VQ7ZWS8R", "Invalid witness version"),
    ("bc1pw5dgrnzv", "Invalid program length (1 byte)"),
    ("bc1p0xlxvlhemja6c4dqv22uapctqupfhlxm9h8z3k2e72q4k9hcz7v8n0nx0muaewav253zgeav", "Invalid program length (41)"),
    ("BC1QR508D6QEJXTDG4Y5R3ZARVARYV98GJ9P", "Invalid program length for witness version 0"),
    ("tb1p0xlxvlhemja6c4dqv22uapctqupfhlxm9h8z3k2e72q4k9hcz7vq47Zagq", "Mixed case"),
    ("bc1p0xlxvlhemja6c4dqv22uapctqupfhlxm9h8z3k2e72q4k9hcz7v07qwwzcrf", "zero padding of more than 4 bits"),
    ("tb1p0xlxvlhemja6c4dqv22uapctqupfhlxm9h8z3k2e72q4k9hcz7vpggkg4j", "Non-zero padding"),
    ("bc1gmk9yu", "Empty data section"),
]
# Bitcoin Core, src/test/data/key_io_valid.json (addresses) ...
CORE_VALID = [
    ("mainnet", "1FsSia9rv4NeEwvJ2GvXrX7LyxYspbN2mo", "76a914a31c06bd463e3923bc1aadbde48b16976c08071788ac"),
    ("mainnet", "36j4NfKv6Akva9amjWrLG6MuSQym1GuEmm", "a914373b819a068f32b7a6b38b6b38729647cfde01c287"),
    ("testnet", "mzK2FFDEhxqHcmrJw1ysqFkVyhUULo45hZ", "76a914ce28b26c57472737f5c3561a1761185bd8589a4388ac"),
    ("testnet", "2NC2hEhe28ULKAJkW5MjZ3jtTMJdvXmByvK", "a914ce0bba75891ff9ec60148d4bd4a09ee2dc5c933187"),
    ("signet", "mww4LvqtTMKvmeQvizPz2EQv26xTneWrbg", "76a914b4110ba93ac54afc14da3bdd19614774a2d55d2988ac"),
    ("signet", "2N1r7aC69VHeE7yQJPDLi9T1PYq4wnwvjuT", "a9145e5a35ab44b3efaea5129ba22b88ba3e2976614587"),
    ("regtest", "n4fajahJrAuKbN7uNsKjLjQkz9Qn5ewJXQ", "76a914fdeca3b08e38af53d7c4c60e3ad208ce5066441088ac"),
    ("regtest", "2MxFajLApXpYk4VodBSZSt7rw8y4ryABkfA", "a91436e9f191e0b75036a77f65e2eaa4752443233fbe87"),
    ("mainnet", "bc1qvyq0cc6rahyvsazfdje0twl7ez82ndmuac2lhv", "00146100fc6343edc8c874496cb2f5bbfec88ea9b77c"),
    ("mainnet", "bc1z2rksukkjr8", "520250ed"),
    ("testnet", "tb1rgv5m6uvdk3kc7qsuz0c79v88ycr5w4wa", "53104329bd718db46d8f021c13f1e2b0e726"),
    (
        "signet",
        "tb1pae5um27ahn8n73pgexe3kcwlp8dhswpn684h2k2w6t9a7w3eq65qephd5y",
        "5120ee69cdabddbccf3f4428c9b31b61df09db783833d1eb75594ed2cbdf3a3906a8",
    ),
    ("regtest", "bcrt1qdavt4j2sd7dlhqsavtnfxvzppw6k7qy97tmnu9", "00146f58bac9506f9bfb821d62e69330410bb56f0085"),
    (
        "regtest",
        "bcrt1sx6p8njlx7h9mc2agz4yg82dzne23050ncq72cneeecez2pst8mahn8xecsf8g6hzx94420",
        "6028368279cbe6f5cbbc2ba8154883a9a29e5517d1f3c03cac4f39ce3225060b3efb799cd9c412746ae2",
    ),
]
# ... and key_io_invalid.json, with a private key and a base58 string of another coin among them.
CORE_INVALID = [
    "",
    "x",
    "1GAdfviErV2Ew95FPtZyikz2qGP3gyCB6Hyu94sedAkPpA523m3fQwps9YKUZkKgQckGPKhRsFR",
    "37G2kMDLpmWVhimxRdzwNfE8JFvWXnJYnVcXeeGrek2qumdJuK7XArcVVpRtLLjRra3t64BEPF2",
    "giymtio7u7oqWtmC9YnvAEKkLF3JQpAdkEFkVJKYrVDfaLbhaDpX1ihfF2vZmya1i61fwLPC3YQ",
    "8iVk9nLM3nYwRuwypjy9NK5rsuZH7BbrQRZ1pgcQmvMnjAgRXD",
    "tc1qeul5g2xfkvdkrhcfmdursv73ad64jnkjl9c40f",
    "tb13hty4qmumlwpp6chxjvcyzza4duqgtmxw3xhm3u9ahj4nyhtwz8eq7ynrj4",
    "bcrt1r2qxpwuge",
    "bc10uexgzna2dpfk0vjt35srz6a27ps6m0l89jweznt83n2sqn2fx4hvn9ym5af8wut34sfrqhk3",
    "bc1qdsuzmn04k2z8vryw8l4dj8m5ygqgnne5n",
    "bcrt1qzwmyj0z924g7fzs5yvnrkc43y76RVyr2lh5t4r",
    "bc1p702xksx4z3uqf0u2phllxkfe5cgu0adxptqs0uelx0tqt8e885sqryes2l",
    "2UVPFpGYnLHJezFzjUo42our6PMEoozzRdM",
    "KzNbAQ4mexfAxa6RKBzHQqfoTycaeWpv2p",
    "5JuW2AMDYu4xVwRG9DZW18VbzQrGcd5RCgb99sS6ehJsNQXu5b9",
    "TB1QFDFM763VXVSUNZHQLPWC0Q8FG5LJX6ZN",
    "tb1ly0q7p",
]

BECH32 = "qpzry9x8gf2tvdw0s3jn54khce6mua7l"


def network_of(address: str) -> str:
    return "testnet" if address.lower().startswith("tb1") else "mainnet"


def test_the_documented_address_is_valid() -> None:
    assert parse_address(DOCUMENTED).text == DOCUMENTED


@pytest.mark.parametrize(("address", "script"), BIP350_VALID)
def test_bip350_valid(address: str, script: str) -> None:
    parsed = parse_address(address, network_of(address))
    assert parsed.script.hex() == script
    assert parsed.text == address.lower()


@pytest.mark.parametrize(("address", "reason"), BIP350_INVALID)
@pytest.mark.parametrize("network", NETWORKS)
def test_bip350_invalid(address: str, reason: str, network: str) -> None:
    with pytest.raises(InvalidAddress):
        parse_address(address, network)


@pytest.mark.parametrize(("network", "address", "script"), CORE_VALID)
def test_bitcoin_core_valid(network: str, address: str, script: str) -> None:
    assert parse_address(address, network).script.hex() == script


@pytest.mark.parametrize("address", CORE_INVALID)
@pytest.mark.parametrize("network", NETWORKS)
def test_bitcoin_core_invalid(address: str, network: str) -> None:
    with pytest.raises(InvalidAddress):
        parse_address(address, network)


@pytest.mark.parametrize(("network", "address", "script"), [case for case in CORE_VALID if case[0] != "mainnet"])
def test_only_mainnet_unless_told(network: str, address: str, script: str) -> None:
    with pytest.raises(InvalidAddress, match=r"network|mainnet"):
        parse_address(address)


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("", "empty"),
        (f" {DOCUMENTED}", "characters"),
        (f"{DOCUMENTED}\n", "characters"),
        # KELVIN SIGN, which lower() turns into a k.
        ("bc1qw508d6qejxtdg4y5r3zarvary0c5xw7\u212av8f3t4", "characters"),
        ("bc1p" + "q" * 200, "longer"),
        (DOCUMENTED[:-1] + "q", "mistyped"),
        (DOCUMENTED[:20].upper() + DOCUMENTED[20:], "upper and lower case"),
        ("1FsSia9rv4NeEwvJ2GvXrX7LyxYspbN2mp", "mistyped"),
        ("0000000000000000000000000GFg7xJaNVN2", "neither bech32"),
        ("1BoatSLRHtKN", "length"),
        ("bc1p0xlxvlhemja6c4dqv22uapctqupfhlxm9h8z3k2e72q4k9hcz7vqh2y7hd", "needs a bech32m checksum"),
        ("tb1qw508d6qejxtdg4y5r3zarvary0c5xw7kxpjzsx", "begin with bc1"),
    ],
)
def test_says_what_is_wrong(address: str, why: str) -> None:
    with pytest.raises(InvalidAddress, match=re.escape(why)):
        parse_address(address)


@given(st.integers(4, len(DOCUMENTED) - 1), st.sampled_from(BECH32))
def test_one_wrong_bech32_character_is_found(position: int, character: str) -> None:
    mutated = DOCUMENTED[:position] + character + DOCUMENTED[position + 1 :]
    if mutated == DOCUMENTED:
        assert parse_address(mutated).text == DOCUMENTED
    else:
        with pytest.raises(InvalidAddress):
            parse_address(mutated)


@given(st.sets(st.integers(4, len(DOCUMENTED) - 1), min_size=1, max_size=4), st.data())
def test_up_to_four_wrong_bech32_characters_are_found(positions: set[int], data: st.DataObject) -> None:
    characters = list(DOCUMENTED)
    for position in positions:
        others = [c for c in BECH32 if c != DOCUMENTED[position]]
        characters[position] = data.draw(st.sampled_from(others))
    with pytest.raises(InvalidAddress):
        parse_address("".join(characters))


@given(st.integers(0, 33), st.sampled_from("123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"))
def test_one_wrong_base58_character_is_found(position: int, character: str) -> None:
    good = "1FsSia9rv4NeEwvJ2GvXrX7LyxYspbN2mo"
    mutated = good[:position] + character + good[position + 1 :]
    if mutated != good:
        with pytest.raises(InvalidAddress):
            parse_address(mutated)


@given(st.text(max_size=100) | st.text("bc1tqpzry9x8", max_size=95), st.sampled_from(sorted(NETWORKS)))
@settings(max_examples=300)
def test_never_anything_but_an_address_or_a_refusal(text: str, network: str) -> None:
    try:
        parsed = parse_address(text, network)
    except InvalidAddress:
        return
    assert parse_address(parsed.text, network) == parsed
