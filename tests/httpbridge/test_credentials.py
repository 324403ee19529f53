"""The spellings of Authorization; the bridge's own token."""

from pathlib import Path

import pytest
from multidict import CIMultiDict, CIMultiDictProxy

from httpbridge import credentials
from httpbridge.credentials import TokenFile
from httpbridge.errors import BadRequest, ConfigFault, Unauthorized

ID = "367614711220405248"


def headers(*values: str) -> CIMultiDictProxy[str]:
    return CIMultiDictProxy(CIMultiDict([("authorization", value) for value in values]))


@pytest.mark.parametrize(
    "value", [f"Bearer {ID}", f"bearer {ID}", f"Bearer ngpu_{ID}", ID, f"ngpu_{ID}", f"  Bearer   {ID} "]
)
def test_spellings_of_the_workspace_id(value: str) -> None:
    assert credentials.workspace_id(headers(value)) == ID


def test_no_header_is_nobody() -> None:
    assert credentials.workspace_id(headers()) == ""


@pytest.mark.parametrize(
    "value",
    ["", "Bearer", "Bearer ", "Basic dXNlcjpwYXNz", "Bearer a b", f"Token {ID}", "Bearer demo", "demo", "ngpu_",
     f"Bearer {ID}x", f"Bearer ngpu_ngpu_{ID}", "Bearer \udcff", "Bearer ٣٦٧", "1" * 65],
)  # fmt: skip
def test_what_holds_no_id_is_refused_and_not_taken_for_nobody(value: str) -> None:
    with pytest.raises(Unauthorized):
        credentials.workspace_id(headers(value))


def test_two_headers_are_refused() -> None:
    with pytest.raises(Unauthorized, match="more than one"):
        credentials.workspace_id(headers(ID, ID))


def test_btc_addresses_are_only_looked_at_from_afar() -> None:
    assert credentials.btc_address(" 0000GFg7xJaNVN2 ") == "0000GFg7xJaNVN2"
    for value in ("a b", "x" * 129, "bc1\x00", "ä"):
        with pytest.raises(BadRequest):
            credentials.btc_address(value)


def test_the_token_is_read_anew_and_outlives_its_file(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("first\n")
    token = TokenFile(file)
    assert token() == "first"
    file.write_text("second\n")
    assert token() == "second"
    file.unlink()
    assert token() == "second"


def test_a_bridge_without_a_token_does_not_start(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    for name in ("missing", "empty"):
        with pytest.raises(ConfigFault, match="holds no token"):
            TokenFile(tmp_path / name)
