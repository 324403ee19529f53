"""Grades of GPUs: the table of signs, how long each counts, and what takes it back."""

from dataclasses import dataclass, field

import pytest

from controlplane.health import (
    APPLICATION_XIDS,
    EVACUATE_AFTER_S,
    FOREIGN_MEMORY_BYTES,
    QUARANTINE_XIDS,
    RECOVER_AFTER_S,
    RESTART_XIDS,
    XIDS_KEPT,
    Grade,
    Health,
    Memory,
    after_test,
    is_news,
    judge,
    judge_all,
    moved,
    restarts,
)
from controlplane.report import Gpu, GpuReading

OK = GpuReading("GPU-1", utilization=10, temperature_c=60, clocks_event_reasons=0, recovery_action=0)
GIB = 1024**3


def reading(**values: object) -> GpuReading:
    return GpuReading("GPU-1", **values)  # type: ignore[arg-type]


@dataclass
class Card:
    """One GPU over time."""

    memory: Memory = field(default_factory=Memory)
    now_s: float = 1000.0

    def reads(self, sign: GpuReading | None, *, after_s: float = 5.0) -> Health:
        self.now_s += after_s
        self.memory = judge(self.memory, sign, self.now_s)
        return self.memory.health


@pytest.mark.parametrize(
    ("sign", "grade", "words"),
    [
        (OK, Grade.OK, ""),
        (reading(), Grade.OK, ""),
        (None, Grade.QUARANTINED, "no reading"),
        (reading(error="GPU is lost"), Grade.QUARANTINED, "cannot be read: GPU is lost"),
        (reading(row_remap_pending=True), Grade.QUARANTINED, "reset the GPU"),
        (reading(row_remap_failed=True), Grade.QUARANTINED, "replace the GPU"),
        (reading(recovery_action=1), Grade.QUARANTINED, "reset of the GPU"),
        (reading(recovery_action=2), Grade.QUARANTINED, "reboot"),
        (reading(recovery_action=4), Grade.QUARANTINED, "drain and reset"),
        (reading(recovery_action=9), Grade.QUARANTINED, "recovery action 9"),
        (reading(foreign_memory_bytes=3 * GIB), Grade.QUARANTINED, "3.0 GiB held by a process that is not ours"),
        (reading(foreign_memory_bytes=FOREIGN_MEMORY_BYTES), Grade.OK, ""),
        (reading(xids=(79,)), Grade.QUARANTINED, "Xid 79 (GPU has fallen off the bus)"),
        (reading(xids=(12345,)), Grade.QUARANTINED, "Xid 12345 (not known to us)"),
        *((reading(xids=(xid,)), Grade.QUARANTINED, f"Xid {xid}") for xid in QUARANTINE_XIDS),
        *((reading(xids=(xid,)), Grade.OK, "") for xid in APPLICATION_XIDS | RESTART_XIDS),
    ],
)
def test_each_sign_has_its_grade_and_words(sign: GpuReading | None, grade: Grade, words: str) -> None:
    health = Card().reads(sign)
    assert health.grade is grade
    assert words in health.reason
    assert bool(health.reason) is (grade is not Grade.OK)


def test_all_reasons_are_told() -> None:
    health = Card().reads(reading(error="Timeout", xids=(48,)))
    assert health.reason == (
        "cannot be read: Timeout; Xid 48 (double-bit memory error): reset and test the GPU, then open the node again"
    )


def test_what_runs_is_moved_only_when_a_grave_sign_lasts() -> None:
    card = Card()
    assert not card.reads(reading(error="Unknown")).evacuate
    assert not card.reads(reading(error="Unknown"), after_s=EVACUATE_AFTER_S - 1).evacuate
    assert card.reads(reading(error="Unknown"), after_s=1).evacuate


def test_memory_of_a_stranger_moves_nothing_and_ends_at_once() -> None:
    card = Card()
    for _ in range(20):
        assert not card.reads(reading(foreign_memory_bytes=8 * GIB)).evacuate
    assert card.reads(OK) == Health()


def test_a_level_ends_and_the_gpu_is_trusted_again_after_a_while() -> None:
    card = Card()
    card.reads(reading(row_remap_pending=True))
    watched = card.reads(OK)
    assert watched.grade is Grade.QUARANTINED
    assert watched.reason.startswith("until a moment ago: memory rows wait")
    assert card.reads(OK, after_s=RECOVER_AFTER_S - 6).reason == watched.reason
    assert card.reads(OK) == Health()


def test_a_gpu_that_flaps_stays_out_and_is_evacuated() -> None:
    card = Card()
    for _ in range(10):
        flap = card.reads(reading(error="Timeout"))
        assert card.reads(OK).grade is Grade.QUARANTINED
    assert flap.evacuate


def test_an_xid_stays_until_the_gpu_was_tested() -> None:
    card = Card()
    card.reads(reading(xids=(79,)))
    assert card.reads(OK, after_s=100_000).grade is Grade.QUARANTINED
    card.memory = after_test(card.memory)
    assert card.reads(OK) == Health()


def test_a_test_does_not_take_back_a_level() -> None:
    card = Card()
    card.reads(reading(row_remap_failed=True))
    card.memory = after_test(card.memory)
    assert card.reads(reading(row_remap_failed=True)).grade is Grade.QUARANTINED


def test_xids_remembered_are_bounded_and_told_once() -> None:
    card = Card()
    for xid in range(200, 300):
        card.reads(reading(xids=(xid, xid)))
    assert card.memory.xids == tuple(range(300 - XIDS_KEPT, 300))


@pytest.mark.parametrize("reason", [0x08, 0x20, 0x40, 0x80, 0x08 | 0x01])
def test_slowdowns_in_six_of_ten_minutes_degrade(reason: int) -> None:
    card = Card(now_s=0.0)
    grades = [card.reads(reading(clocks_event_reasons=reason), after_s=60).grade for _ in range(6)]
    assert grades == [Grade.OK] * 5 + [Grade.DEGRADED]
    assert card.memory.health.reason == "slowed down by heat or power in 6 of the last 10 minutes"
    assert not card.memory.health.evacuate
    after = [card.reads(OK, after_s=60).grade for _ in range(6)]
    assert after[:4] == [Grade.DEGRADED] * 4
    assert after[-1] is Grade.OK


@pytest.mark.parametrize("reason", [0x00, 0x01, 0x02, 0x04, 0x10])
def test_idle_power_cap_and_settings_are_no_slowdown(reason: int) -> None:
    card = Card()
    for _ in range(100):
        assert card.reads(reading(clocks_event_reasons=reason), after_s=30) == Health()


def test_many_slowdowns_in_one_minute_are_one() -> None:
    card = Card(now_s=0.0)
    for _ in range(50):
        assert card.reads(reading(clocks_event_reasons=0x40), after_s=1).grade is Grade.OK
    assert len(card.memory.slow_minutes) == 1


def test_a_gpu_that_goes_missing_is_not_forgotten() -> None:
    both = [Gpu("GPU-1", "RTX 4090", 24 * GIB), Gpu("GPU-2", "RTX 4090", 24 * GIB, 1)]
    readings = [GpuReading("GPU-1"), GpuReading("GPU-2")]
    memories = judge_all({}, both, readings, 0.0)
    assert [memory.health for memory in memories.values()] == [Health(), Health()]
    memories = judge_all(memories, both[:1], readings[:1], 5.0)
    assert list(memories) == ["GPU-1", "GPU-2"]
    assert memories["GPU-1"].health == Health()
    assert "missing from the node's inventory" in memories["GPU-2"].health.reason
    memories = judge_all(memories, both[:1], readings[:1], 5.0 + EVACUATE_AFTER_S)
    assert memories["GPU-2"].health.evacuate
    back = judge_all(judge_all(memories, both, readings, 30.0), both, readings, 100.0)
    assert back["GPU-2"].health == Health()


def test_a_gpu_without_a_reading_is_out() -> None:
    memories = judge_all({}, [Gpu("GPU-1", "RTX 4090", 24 * GIB)], [], 0.0)
    assert memories["GPU-1"].health.grade is Grade.QUARANTINED


def test_only_a_contained_error_restarts_the_container() -> None:
    assert restarts(reading(xids=(13, 94)))
    assert not restarts(reading(xids=(13, 95)))


@pytest.mark.parametrize("by_s", [1.7e9, -1.7e9, 0.0])
def test_a_past_can_be_moved_to_another_clock(by_s: float) -> None:
    card = Card()
    card.reads(reading(xids=(79,), clocks_event_reasons=0x08))
    moved_on = Card(moved(card.memory, by_s), card.now_s + by_s)
    for after_s in (1.0, 14.0, 70.0):
        there, here = moved_on.reads(OK, after_s=after_s), card.reads(OK, after_s=after_s)
        assert there == here
    assert moved(moved(card.memory, by_s), -by_s) == card.memory


def test_what_of_a_gpus_past_is_worth_keeping() -> None:
    bad = judge(Memory(), reading(xids=(79,)), 10.0)
    assert is_news(None, Memory())
    assert is_news(Memory(), bad)
    assert not is_news(bad, judge(bad, OK, 11.0))
    assert is_news(bad, judge(bad, OK, 11.0 + EVACUATE_AFTER_S))
