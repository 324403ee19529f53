"""Who calls: the four spellings of `Authorization` that clients of the original send; and as whom the bridge calls.

A workspace's id is decimal digits alone. That is checked here because the control plane's GetWorkspace also takes
names, which begin with a letter: nobody gets at a workspace by knowing what it is called.
"""

import re
from pathlib import Path
from typing import Final

import structlog
from multidict import CIMultiDictProxy

from httpbridge.errors import BadRequest, ConfigFault, Unauthorized

log = structlog.get_logger(__name__)

_WORKSPACE_ID: Final = re.compile(r"(?:ngpu_)?([0-9]{1,64})", re.ASCII)
#: The longest Bitcoin address in use has 62.
BTC_ADDRESS_CHARACTERS: Final = 128
_BTC_ADDRESS: Final = re.compile(rf"[\x21-\x7e]{{0,{BTC_ADDRESS_CHARACTERS}}}")


def workspace_id(headers: CIMultiDictProxy[str]) -> str:
    """The workspace's id from `Bearer <id>`, `Bearer ngpu_<id>`, `<id>` or `ngpu_<id>`; "" without the header.

    Raises Unauthorized if the header is there and holds anything else, or is there twice.
    """
    value = headers.get("Authorization")
    if value is None:
        return ""
    if len(headers.getall("Authorization")) > 1:
        raise Unauthorized("There is more than one Authorization header; send one")
    scheme, _, rest = value.strip().partition(" ")
    secret = rest.strip() if scheme.lower() == "bearer" else value.strip()
    match = _WORKSPACE_ID.fullmatch(secret)
    if match is None:
        raise Unauthorized(
            "The Authorization header holds no workspace id: send `Authorization: Bearer <workspace id>`"
        )
    return match[1]


def btc_address(value: str) -> str:
    """`value`, if it can be an address at all; whether it is one the control plane says. Raises BadRequest."""
    value = value.strip()
    if _BTC_ADDRESS.fullmatch(value) is None:
        raise BadRequest("The BTC address is malformed: it is at most 128 letters and digits")
    return value


class TokenFile:
    """The bridge's token as the file has it now; as it had it last, should the file be gone."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._token = ""
        self._version: tuple[int, int, int] | None = None
        self()

    def __call__(self) -> str:
        """The token. Raises ConfigFault if there never was one."""
        try:
            found = self._path.stat()
            if (version := (found.st_mtime_ns, found.st_ino, found.st_size)) != self._version:
                self._token = self._path.read_text().strip() or self._token
                self._version = version
        except OSError as error:
            log.warning("token_file_unreadable", reason=str(error))
        if not self._token:
            raise ConfigFault(f"token_file: {self._path} holds no token")
        return self._token
