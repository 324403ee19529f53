"""Grades of GPUs: the table of signs, how long each counts, and what takes it back."""

from dataclasses import dataclass, field

import pytest
from msgspec.structs import replace

from controlplane.health import (
    APPLICATION_XIDS,
    EVACUATE_AFTER_S,
    FIRST_WAIT_S,
    FOREIGN_MEMORY_BYTES,
    QUARANTINE_XIDS,
    RECOVER_AFTER_S,
    RESTART_XIDS,
    WAIT_CAP_S,
    WELL_S,
    WORDS_KEPT,
    XIDS_KEPT,
    GpuTests,
    Grade,
    Health,
    Memory,
    after_test,
    is_news,
    judge,
    judge_all,
    moved,
    next_test_s,
    restarts,
    without_wait,
)
from controlplane.report import Gpu, GpuReading, GpuTest, GpuTestState

OK = GpuReading("GPU-1", utilization=10, temperature_c=60, clocks_event_reasons=0, recovery_action=0)
GIB = 1024**3
WAITING, RUNNING, PASSED, FAILED, UNABLE = GpuTestState


def reading(**values: object) -> GpuReading:
    return GpuReading("GPU-1", **values)  # type: ignore[arg-type]


@dataclass
class Card:
    """One GPU over time."""

    memory: Memory = field(default_factory=Memory)
    now_s: float = 1000.0

    #: Of the test that is asked for next.
    number: int = 100

    def reads(self, sign: GpuReading | None, *, after_s: float = 5.0) -> Health:
        """A report while a replica holds the GPU."""
        self.now_s += after_s
        self.memory = judge(self.memory, sign, self.now_s)
        return self.memory.health

    def is_free(
        self,
        sign: GpuReading | None = None,
        state: GpuTestState | None = None,
        words: str = "",
        *,
        number: int = 0,
        after_s: float = 5.0,
    ) -> Health:
        """A report while no replica does, with what it says of the test that was asked for, or of another."""
        self.now_s += after_s
        self.number += 1
        number = number or self.memory.tests.number
        test = GpuTest("GPU-1", number, state, words) if state else None
        self.memory = judge(self.memory, sign or OK, self.now_s, test=test, number=self.number)
        return self.memory.health

    @property
    def asked(self) -> int:
        return self.memory.tests.number

    def ends(self, state: GpuTestState, words: str = "") -> Health:
        """The test that is asked for runs and ends."""
        assert self.asked
        self.is_free(state=RUNNING)
        return self.is_free(state=state, words=words)


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


def test_a_well_gpu_that_says_nothing_stays_as_it_is() -> None:
    memory = judge(Memory(), OK, 1000.0)
    assert judge(memory, replace(OK, utilization=99, temperature_c=80, memory_used_bytes=GIB), 2000.0) is memory


def test_all_reasons_are_told() -> None:
    health = Card().reads(reading(error="Timeout", xids=(48,)))
    assert health.reason == (
        "cannot be read: Timeout; Xid 48 (double-bit memory error): "
        "it is tested once no replica holds it and no other grave sign is left"
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


def test_a_gpu_that_has_passed_its_test_is_well_again() -> None:
    card = Card()
    assert not card.reads(reading(xids=(79,))).evacuate
    assert card.reads(OK, after_s=EVACUATE_AFTER_S).evacuate
    assert not card.asked
    assert card.is_free().reason == "Xid 79 (GPU has fallen off the bus): its node is asked to test it"
    number = card.asked
    assert card.is_free(state=WAITING).grade is Grade.QUARANTINED
    assert card.is_free(state=RUNNING).reason == "Xid 79 (GPU has fallen off the bus): it is being tested"
    assert card.asked == number
    assert card.is_free(state=PASSED, words="20 GiB") == Health()
    assert (card.asked, card.memory.tests.last, card.memory.tests.words) == (0, PASSED, "20 GiB")
    assert card.is_free() == Health()


def test_a_gpu_that_was_never_used_is_tested_at_once() -> None:
    card = Card()
    card.reads(reading(xids=(79,)))
    card.is_free()
    assert card.asked


@pytest.mark.parametrize(
    "sign",
    [
        reading(error="GPU is lost"),
        reading(row_remap_pending=True),
        reading(row_remap_failed=True),
        reading(recovery_action=1),
        reading(foreign_memory_bytes=8 * GIB),
    ],
)
def test_what_a_test_cannot_lift_is_not_tested_and_stays(sign: GpuReading) -> None:
    card = Card()
    card.reads(reading(xids=(63,)))
    for _ in range(10):
        assert card.is_free(sign).grade is Grade.QUARANTINED
        assert not card.asked
    # Once it has ended, the Xid is what is left. If it comes back meanwhile, a test that is passed does not lift it.
    card.is_free()
    assert card.asked
    card.is_free(state=RUNNING)
    after = card.is_free(sign, PASSED)
    assert after.grade is Grade.QUARANTINED
    assert "Xid" not in after.reason


def test_without_an_xid_nothing_is_tested() -> None:
    card = Card()
    for sign in (OK, reading(error="Timeout"), reading(row_remap_pending=True), OK, reading(xids=(13, 94))):
        card.is_free(sign)
        assert not card.asked


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (FAILED, "it failed its test: bad; reset or replace it, it is tested again"),
        (UNABLE, "the test cannot be run: bad; mend that, or reset and test it yourself and uncordon the node"),
    ],
)
def test_a_test_that_is_not_passed_is_repeated_after_growing_waits(state: GpuTestState, reason: str) -> None:
    card = Card()
    card.reads(reading(xids=(48,)))
    card.is_free()
    waits = []
    for _ in range(10):
        assert card.ends(state, "bad").reason == f"Xid 48 (double-bit memory error): {reason}"
        assert not card.asked
        waits.append(next_test_s(card.memory.tests) - card.now_s)
        card.is_free(after_s=waits[-1] - 1)
        assert not card.asked
        card.is_free(after_s=1)
    assert waits == [min(FIRST_WAIT_S * 2**n, WAIT_CAP_S) for n in range(10)]
    # Unless somebody says that it is to be now: then they begin anew.
    card.ends(state)
    card.memory = without_wait(card.memory)
    card.is_free()
    card.ends(state)
    assert next_test_s(card.memory.tests) - card.now_s == FIRST_WAIT_S


def test_a_test_that_was_passed_before_the_xid_counts_for_nothing() -> None:
    card = Card()
    card.reads(reading(xids=(79,)))
    card.is_free()
    first = card.asked
    # Another comes before the test has begun: what was asked for is void, and its outcome too.
    card.is_free(reading(xids=(48,)))
    assert card.asked not in (0, first)
    assert card.is_free(state=PASSED, number=first).grade is Grade.QUARANTINED
    assert card.ends(PASSED) == Health()


@pytest.mark.parametrize("state", [RUNNING, PASSED])
def test_an_xid_during_a_test_fails_it(state: GpuTestState) -> None:
    card = Card()
    card.reads(reading(xids=(79,)))
    card.is_free()
    card.is_free(state=RUNNING)
    number = card.asked
    health = card.is_free(reading(xids=(95,)), state)
    assert "it failed its test: Xid 95 (uncontained memory error) came meanwhile" in health.reason
    assert card.is_free(state=PASSED, number=number).grade is Grade.QUARANTINED
    assert not card.asked
    card.is_free(after_s=FIRST_WAIT_S)
    assert card.asked


def test_an_application_s_xid_does_not() -> None:
    card = Card()
    card.reads(reading(xids=(79,)))
    card.is_free()
    card.is_free(state=RUNNING)
    assert card.is_free(reading(xids=(13, 94)), PASSED) == Health()


def test_a_test_that_takes_its_machine_down_is_not_repeated_at_once() -> None:
    card = Card()
    card.reads(reading(xids=(79,)))
    card.is_free()
    # It may take a while until the node has heard of it.
    card.is_free()
    assert card.asked
    card.is_free(state=RUNNING)
    assert "the test cannot be run: the node or its daemon went down meanwhile" in card.is_free().reason
    assert not card.asked


def test_a_gpu_that_passes_and_fails_again_waits_longer_unless_it_was_well_for_long() -> None:
    card = Card()
    for n in range(4):
        card.reads(reading(xids=(79,)), after_s=60.0)
        card.is_free(after_s=FIRST_WAIT_S * 2 ** (n - 1) - 66 if n else 5)
        assert bool(card.asked) is (n == 0)
        card.is_free()
        card.is_free()
        assert card.ends(PASSED) == Health()
    card.reads(reading(xids=(79,)), after_s=WELL_S)
    card.is_free()
    assert card.asked


def test_an_operators_word_ends_a_test_and_forgets_earlier_ones() -> None:
    card = Card()
    card.reads(reading(xids=(79,)))
    card.is_free()
    card.ends(FAILED)
    card.memory = after_test(card.memory)
    assert (card.is_free(), card.memory.tests) == (Health(), GpuTests())


def test_what_a_node_says_of_a_test_is_bounded() -> None:
    card = Card()
    card.reads(reading(xids=(79,)))
    card.is_free()
    card.ends(FAILED, "x" * 10_000)
    assert len(card.memory.tests.words) == WORDS_KEPT


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
    card.is_free()
    card.ends(FAILED)
    moved_on = Card(moved(card.memory, by_s), card.now_s + by_s)
    for after_s in (1.0, 14.0, 70.0):
        there, here = moved_on.reads(OK, after_s=after_s), card.reads(OK, after_s=after_s)
        assert there == here
    assert moved(moved(card.memory, by_s), -by_s) == card.memory
    assert next_test_s(moved(card.memory, by_s).tests) == pytest.approx(next_test_s(card.memory.tests) + by_s)


def test_what_of_a_gpus_past_is_worth_keeping() -> None:
    bad = judge(Memory(), reading(xids=(79,)), 10.0)
    assert is_news(None, Memory())
    assert is_news(Memory(), bad)
    assert not is_news(bad, judge(bad, OK, 11.0))
    assert is_news(bad, judge(bad, OK, 11.0 + EVACUATE_AFTER_S))
