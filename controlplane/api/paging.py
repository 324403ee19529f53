"""A page of a list that is in memory, by cursor: as many as a message takes, however many there are."""

from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable, Iterable
from operator import itemgetter
from typing import Final, Protocol, TypeVar

import msgspec
from google.protobuf.message import Message

from controlplane.errors import InvalidArgument

#: Items on a page, and bytes after which none is added: a page is a message.
PAGE: Final = 1000
PAGE_BYTES: Final = 1024 * 1024

Item = TypeVar("Item")
Row = TypeVar("Row", bound=Message)
#: What a list is in order of; no two items have the same.
Key = tuple[str, ...]


class Asked(Protocol):
    """The request of a list."""

    limit: int
    cursor: str


def page(
    asked: Asked, items: Iterable[Item], *, key: Callable[[Item], Key], row: Callable[[Item], Row]
) -> tuple[list[Row], str]:
    """The rows that are asked for, and the cursor with which the list goes on; empty: it ends with them.

    Who was there and stays is on one page, whoever comes and goes meanwhile.
    Raises InvalidArgument for a cursor that no list gave.
    """
    after = _key_of(asked.cursor) if asked.cursor else ()
    most = min(asked.limit or PAGE, PAGE)
    rows: list[Row] = []
    size, last = 0, after
    for at, item in sorted(((key(item), item) for item in items), key=itemgetter(0)):
        if at <= after:
            continue
        if len(rows) == most or size >= PAGE_BYTES:
            return rows, urlsafe_b64encode(msgspec.json.encode(last)).decode()
        rows.append(row(item))
        size += rows[-1].ByteSize()
        last = at
    return rows, ""


def _key_of(cursor: str) -> Key:
    try:
        return _KEY.decode(urlsafe_b64decode(cursor))
    except (ValueError, msgspec.MsgspecError):
        raise InvalidArgument("cursor: is none that this list gave; begin without one.") from None


_KEY: Final = msgspec.json.Decoder(Key)
