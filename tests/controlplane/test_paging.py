"""Pages: all of a list, each item once, however many there are."""

import pytest
from ngpu.v1 import fleet_pb2 as pb

from controlplane.api import paging
from controlplane.api.paging import page
from controlplane.errors import InvalidArgument


def list_of(names: list[str], *, limit: int = 0, cursor: str = "") -> tuple[list[str], str]:
    """A page of nodes with these names."""
    rows, following = page(
        pb.ListNodesRequest(limit=limit, cursor=cursor),
        names,
        key=lambda name: (name, "0x0"),
        row=lambda name: pb.Node(name=name),
    )
    return [row.name for row in rows], following


def test_a_list_that_a_message_takes_is_one_page() -> None:
    assert list_of(["c", "a", "b"]) == (["a", "b", "c"], "")
    assert list_of([]) == ([], "")


def test_pages_have_all_of_a_list_once_while_others_come_and_go() -> None:
    first, cursor = list_of(["a", "b", "c", "d"], limit=2)
    assert first == ["a", "b"]
    # The one it ended with is gone, and one has come before it.
    second, cursor = list_of(["a", "aa", "c", "d"], limit=2, cursor=cursor)
    assert (second, cursor) == (["c", "d"], "")


def test_a_page_is_never_more_than_a_message_takes() -> None:
    many = [f"{number:05}" for number in range(paging.PAGE + 1)]
    rows, cursor = list_of(many, limit=1_000_000)
    assert rows == many[:-1]
    assert list_of(many, cursor=cursor) == ([many[-1]], "")
    large = [f"{number}" * (paging.PAGE_BYTES // 3) for number in range(8)]
    rows, cursor = list_of(large)
    assert rows == large[:3]
    assert list_of(large, cursor=cursor)[0] == large[3:6]


@pytest.mark.parametrize("cursor", ["?", "bm8=", "WzFd", "é", "a" * 5])
def test_a_cursor_that_no_list_gave_is_refused(cursor: str) -> None:
    with pytest.raises(InvalidArgument, match="cursor"):
        list_of(["a"], cursor=cursor)
