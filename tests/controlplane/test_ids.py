"""Ids have the documented shapes, and their randomness comes in by the door."""

import hashlib
import re
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest

from controlplane import ids


def ones(count: int) -> bytes:
    return b"\x01" * count


def test_task_id_is_the_time_in_the_display_zone_and_twenty_digits() -> None:
    now = datetime(2024, 12, 31, 23, 5, 9, 999_999, tzinfo=UTC)
    digits = f"{int.from_bytes(ones(16)) % ids.TaskIds.FIRST:020d}"
    assert ids.TaskIds(UTC, ones).new(now) == f"20241231_23_05_09_{digits}"
    assert ids.TaskIds(ZoneInfo("Asia/Shanghai"), ones).new(now) == f"20250101_07_05_09_{digits}"


def test_task_ids_of_one_second_ascend_in_steps_nobody_knows() -> None:
    made, now = ids.TaskIds(UTC), datetime(2024, 12, 31, 23, 5, 9, tzinfo=UTC)
    numbers = [int(made.new(now)[-20:]) for _ in range(1000)]
    steps = {after - before for before, after in pairwise(numbers)}
    assert numbers[0] < ids.TaskIds.FIRST
    assert len(steps) == 999
    assert 0 < min(steps) < ids.TaskIds.STEP / 10 < ids.TaskIds.STEP * 9 / 10 < max(steps) <= ids.TaskIds.STEP


def test_each_second_begins_anew_and_so_does_one_with_more_tasks_than_numbers() -> None:
    now = datetime(2024, 12, 31, 23, 5, 9, tzinfo=UTC)
    # The same step and the same beginning each time: the greatest there are.
    made = ids.TaskIds(UTC, (ids.TaskIds.FIRST - 1).to_bytes)
    first = made.new(now)
    assert made.new(now + timedelta(seconds=1)) == first.replace("_09_", "_10_")
    seen = [made.new(now + timedelta(seconds=1)) for _ in range(50_001)]
    assert seen[:50_000] == sorted(set(seen[:50_000]))
    assert seen[50_000][-20:] == first[-20:]


def test_digits_keep_their_leading_zeros() -> None:
    assert ids.workspace_id(bytes) == "0" * 24


def test_shapes() -> None:
    assert re.fullmatch(r"\d{8}_\d\d_\d\d_\d\d_\d{20}", ids.TaskIds(UTC).new(datetime.now(UTC)))
    assert re.fullmatch(r"\d{24}", ids.workspace_id())
    assert re.fullmatch(r"w-[0-9a-f]{12}", ids.workspace_uid())
    assert re.fullmatch(r"r-[0-9a-f]{12}", ids.replica_id())
    assert re.fullmatch(r"t-[0-9a-f]{12}", ids.token_id())
    assert re.fullmatch(r"upload-[0-9a-f]{32}", ids.upload_id())
    assert re.fullmatch(r"ngpu_node_[0-9A-Za-z_-]{43}", ids.token_secret("node"))


def test_no_two_are_alike() -> None:
    assert len({ids.token_secret("operator") for _ in range(100)}) == 100


def test_attempt_id_comes_apart_again() -> None:
    assert ids.attempt_id("20241231_23_05_09_00000000000000000001", 12) == "20241231_23_05_09_00000000000000000001.12"
    assert ids.split_attempt_id("20241231_23_05_09_00000000000000000001.12") == (
        "20241231_23_05_09_00000000000000000001",
        12,
    )


@pytest.mark.parametrize("bad", ["", ".", "x", "x.", ".1", "x.0", "x.01", "x.-1", "x.1a", "x.²", "x.1234567890"])
def test_what_is_no_attempt_id_is_refused(bad: str) -> None:
    with pytest.raises(ValueError, match="not an attempt's id"):
        ids.split_attempt_id(bad)


def test_of_a_secret_only_its_hash_is_kept() -> None:
    assert ids.secret_hash("ngpu_operator_x") == hashlib.sha256(b"ngpu_operator_x").digest()
    assert len(ids.secret_hash("\ud800")) == 32  # whatever a caller sends
