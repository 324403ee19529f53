"""How well each GPU of a node is: readings in, grade and reason out. Pure.

Most signs are levels: the driver states them anew in every reading, and when they end, so does the grade. Xids are
events: a grade made by one stays until the GPU has passed a test, for which its node is asked (`GpuTests`), or an
operator says so (`after_test`). What must be remembered between two reports is in Memory, explicitly; nothing here
keeps anything.

The table follows NVIDIA's Xid catalogue and the recovery action that the driver itself recommends (NVML field 230).
A sign that is not known counts as bad: wrongly left out, a GPU earns nothing for an hour; wrongly left in, it spoils
every task that is sent to it.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Final

import msgspec

from controlplane.grade import Grade, Health
from controlplane.report import Gpu, GpuReading, GpuTest, GpuTestState

__all__ = [
    "GpuTests",
    "Grade",
    "Health",
    "Memory",
    "after_test",
    "is_news",
    "judge",
    "judge_all",
    "moved",
    "next_test_s",
    "restarts",
    "without_wait",
]


class GpuTests(msgspec.Struct, frozen=True, omit_defaults=True):
    """The tests of a GPU after Xids.

    `number`: of the one that is asked for; 0: none is. `running`: its node has said that it runs. `last`, `words`,
    `ended_s`: how the last one ended, and when; None: none has. `count`: those that the next one waits the longer for.
    """

    number: int = 0
    running: bool = False
    last: GpuTestState | None = None
    words: str = ""
    ended_s: float = 0.0
    count: int = 0


class Memory(msgspec.Struct, frozen=True, omit_defaults=True):
    """What must be known of a GPU's past: the only state of this module. Times are the caller's monotonic seconds.

    `grave_since_s`, `grave_seen_s`: when a grave sign was first and last seen; None: not of late. `slow_minutes`:
    minutes with a slowdown, newest last. `xids`: those that keep it in quarantine. `tests`: what was done about them.
    """

    health: Health = Health()
    grave_since_s: float | None = None
    grave_seen_s: float = 0.0
    slow_minutes: tuple[int, ...] = ()
    xids: tuple[int, ...] = ()
    tests: GpuTests = GpuTests()


#: A grave sign must last so long before what runs on the GPU is moved: a hiccup of NVML must not cost a customer a
#: replica. Nothing new is placed there from the first.
EVACUATE_AFTER_S: Final = 15.0
#: So long without a grave sign until the GPU is trusted again: one that flaps stays out.
RECOVER_AFTER_S: Final = 15.0
#: Minutes looked back upon, and how many of them with a slowdown make a GPU degraded (0.6 a minute).
SLOW_WINDOW_MINUTES: Final = 10
SLOW_MINUTES: Final = 6
#: Before the reason while a GPU is watched for RECOVER_AFTER_S.
_RECOVERING: Final = "until a moment ago: "
#: Memory that processes not of ours may hold: a desktop or a monitor is no reason to refuse a GPU.
FOREIGN_MEMORY_BYTES: Final = 512 * 1024 * 1024
#: Xids remembered of one GPU.
XIDS_KEPT: Final = 8
#: From the end of a test to the next, if there is to be one; each time twice as long, up to that.
FIRST_WAIT_S: Final = 600.0
WAIT_CAP_S: Final = 86_400.0
#: A GPU that was well for so long since it passed begins with no wait again.
WELL_S: Final = 86_400.0
#: Of a node's words on a test.
WORDS_KEPT: Final = 500

#: Xids that the application on the GPU caused: nothing follows.
APPLICATION_XIDS: Final = frozenset({13, 31, 43, 45, 68, 109})
#: A contained memory error: the container that hit it must start anew, the GPU is well.
RESTART_XIDS: Final = frozenset({94})
#: Xids of the GPU itself, in words. One that is in no table is treated like these.
QUARANTINE_XIDS: Final[Mapping[int, str]] = {
    48: "double-bit memory error",
    62: "internal micro-controller halted",
    63: "memory row being remapped",
    64: "memory row could not be remapped",
    74: "NVLink error",
    79: "GPU has fallen off the bus",
    95: "uncontained memory error",
    119: "GPU system processor timed out",
    120: "GPU system processor failed",
    140: "unrecovered memory error",
    143: "GPU failed to initialise",
}

#: Clocks event reasons that are a fault of cooling or power: HW slowdown, SW thermal, HW thermal, HW power brake.
_SLOWDOWNS: Final = 0x08 | 0x20 | 0x40 | 0x80
#: NVML's recovery actions (field 230) besides 0, none.
_RECOVERY: Final[Mapping[int, str]] = {
    1: "the driver asks for a reset of the GPU",
    2: "the driver asks for a reboot of the node",
    3: "the driver asks to end peer-to-peer traffic and reset the GPU",
    4: "the driver asks to drain and reset the GPU",
}
_GIB: Final = 1024**3


def _reading_failed(reading: GpuReading, _memory: Memory) -> str:
    return f"cannot be read: {reading.error}" if reading.error else ""


def _remap_failed(reading: GpuReading, _memory: Memory) -> str:
    return "a memory row could not be remapped: replace the GPU" if reading.row_remap_failed else ""


def _remap_pending(reading: GpuReading, _memory: Memory) -> str:
    return "memory rows wait to be remapped: reset the GPU" if reading.row_remap_pending else ""


def _recovery_asked(reading: GpuReading, _memory: Memory) -> str:
    action = reading.recovery_action
    return _RECOVERY.get(action, f"the driver asks for recovery action {action}") if action else ""


def _xid(_reading: GpuReading, memory: Memory) -> str:
    return f"{_names(memory.xids)}: {_test_words(memory.tests)}" if memory.xids else ""


def _names(xids: Iterable[int]) -> str:
    return ", ".join(f"Xid {xid} ({QUARANTINE_XIDS.get(xid, 'not known to us')})" for xid in xids)


def _test_words(tests: GpuTests) -> str:
    if tests.number:
        return "it is being tested" if tests.running else "its node is asked to test it"
    match tests.last:
        case GpuTestState.FAILED:
            return f"it failed its test: {tests.words}; reset or replace it, it is tested again"
        case GpuTestState.UNABLE:
            return (
                f"the test cannot be run: {tests.words}; mend that, or reset and test it yourself and uncordon the node"
            )
        case _:
            return "it is tested once no replica holds it and no other grave sign is left"


def _slowed_down(_reading: GpuReading, memory: Memory) -> str:
    slow = len(memory.slow_minutes)
    if slow < SLOW_MINUTES:
        return ""
    return f"slowed down by heat or power in {slow} of the last {SLOW_WINDOW_MINUTES} minutes"


def _foreign_memory(reading: GpuReading, _memory: Memory) -> str:
    held = reading.foreign_memory_bytes or 0
    return f"{held / _GIB:.1f} GiB held by a process that is not ours" if held > FOREIGN_MEMORY_BYTES else ""


class Rule(msgspec.Struct, frozen=True):
    """If `says` has words, the GPU is at best of that grade. `grave`: what runs there is in danger too."""

    says: Callable[[GpuReading, Memory], str]
    grade: Grade
    grave: bool = False


#: The policy, gravest first.
RULES: Final = (
    Rule(_reading_failed, Grade.QUARANTINED, grave=True),
    Rule(_remap_failed, Grade.QUARANTINED, grave=True),
    Rule(_xid, Grade.QUARANTINED, grave=True),
    Rule(_recovery_asked, Grade.QUARANTINED, grave=True),
    Rule(_remap_pending, Grade.QUARANTINED, grave=True),
    # What runs there already has its memory; only a start would fail.
    Rule(_foreign_memory, Grade.QUARANTINED),
    Rule(_slowed_down, Grade.DEGRADED),
)


def judge(
    memory: Memory, reading: GpuReading | None, now_s: float, *, test: GpuTest | None = None, number: int = 0
) -> Memory:
    """The GPU's standing after one more reading. None: the report had none of it, which counts as a failed one.

    `now_s`: a monotonic clock's seconds. `test`: what the same report says of a test. `number`: for a new test, if one
    is due; it must never have been used for this GPU. 0: it cannot be tested now, for a replica holds it.
    """
    if reading is None:
        reading = GpuReading(gpu_id="", error="the node gave no reading of it")
    if _is_well(memory) and _says_nothing(reading):
        return memory
    if memory.xids or reading.xids:
        memory = _after_xids(memory, reading, test, now_s)
    if (slow := _slow_minutes(memory, reading, int(now_s // 60))) != memory.slow_minutes:
        memory = msgspec.structs.replace(memory, slow_minutes=slow)
    found = _found(memory, reading)
    if number and [rule.says for rule, _ in found if rule.grade is Grade.QUARANTINED] == [_xid]:
        tests = memory.tests
        if not tests.number and now_s >= next_test_s(tests):
            tests = msgspec.structs.replace(tests, number=number, running=False)
            memory = msgspec.structs.replace(memory, tests=tests)
            found = _found(memory, reading)
    grade = max((rule.grade for rule, _ in found), default=Grade.OK)
    reason = "; ".join(words for _, words in found)
    since_s = memory.grave_since_s
    if any(rule.grave for rule, _ in found):
        since_s = now_s if since_s is None else since_s
        health = Health(grade, reason, evacuate=now_s - since_s >= EVACUATE_AFTER_S)
        return msgspec.structs.replace(memory, health=health, grave_since_s=since_s, grave_seen_s=now_s)
    if since_s is not None and now_s - memory.grave_seen_s < RECOVER_AFTER_S:
        was = memory.health.reason.removeprefix(_RECOVERING)
        return msgspec.structs.replace(memory, health=Health(Grade.QUARANTINED, _RECOVERING + was))
    return msgspec.structs.replace(memory, health=Health(grade, reason), grave_since_s=None)


def _is_well(memory: Memory) -> bool:
    """Nothing in its past counts now."""
    return not (memory.health.reason or memory.xids or memory.slow_minutes or memory.grave_since_s is not None)


def _says_nothing(reading: GpuReading) -> bool:
    """None of the signs. So it is with nearly every reading there is: this is there to be quick."""
    return not (
        reading.error
        or reading.xids
        or reading.row_remap_failed
        or reading.row_remap_pending
        or reading.recovery_action
        or (reading.clocks_event_reasons or 0) & _SLOWDOWNS
        or (reading.foreign_memory_bytes or 0) > FOREIGN_MEMORY_BYTES
    )


def _found(memory: Memory, reading: GpuReading) -> list[tuple[Rule, str]]:
    return [(rule, words) for rule in RULES if (words := rule.says(reading, memory))]


def _after_xids(memory: Memory, reading: GpuReading, test: GpuTest | None, now_s: float) -> Memory:
    """Xids that are new, and what became of the test that they call for."""
    tests, new = memory.tests, _bad_xids(reading)
    if new and not memory.xids and tests.last is GpuTestState.PASSED and now_s - tests.ended_s > WELL_S:
        tests = GpuTests()
    if tests.number:
        tests = _after_report(tests, test, new, now_s)
    if not new and memory.tests.number and not tests.number and tests.last is GpuTestState.PASSED:
        return msgspec.structs.replace(after_test(memory), tests=tests)
    xids = tuple(dict.fromkeys((*memory.xids, *new)))[-XIDS_KEPT:]
    return msgspec.structs.replace(memory, xids=xids, tests=tests)


def _after_report(tests: GpuTests, test: GpuTest | None, new: Collection[int], now_s: float) -> GpuTests:
    """The test that is asked for, after a report that speaks of it, or does not."""
    if new:
        # What it finds says nothing of them: if it has not begun, another is asked for.
        if tests.running:
            return _ended(tests, GpuTestState.FAILED, f"{_names(new)} came meanwhile", now_s)
        return msgspec.structs.replace(tests, number=0)
    if test is None or test.number != tests.number:
        if tests.running:
            return _ended(tests, GpuTestState.UNABLE, "the node or its daemon went down meanwhile", now_s)
        return tests
    if test.state in (GpuTestState.WAITING, GpuTestState.RUNNING):
        return msgspec.structs.replace(tests, running=test.state is GpuTestState.RUNNING)
    return _ended(tests, test.state, test.words[:WORDS_KEPT], now_s)


def _ended(tests: GpuTests, state: GpuTestState, words: str, now_s: float) -> GpuTests:
    return GpuTests(last=state, words=words, ended_s=now_s, count=tests.count + 1)


def next_test_s(tests: GpuTests) -> float:
    """From when on a GPU that is in quarantine may be tested next, in seconds of the same clock."""
    if not tests.count:
        return 0.0
    return tests.ended_s + min(FIRST_WAIT_S * (1 << min(tests.count - 1, 16)), WAIT_CAP_S)


def judge_all(
    memories: Mapping[str, Memory],
    gpus: Iterable[Gpu],
    readings: Iterable[GpuReading],
    now_s: float,
    *,
    tests: Iterable[GpuTest] = (),
    number: int = 0,
    testable: Collection[str] = (),
) -> dict[str, Memory]:
    """The standing of every GPU of a node after a report, in the inventory's order. `testable`: no replica holds them.

    GPUs known before and missing from the inventory follow, in quarantine, for as long as they are given in `memories`:
    a card that fell off the bus is not forgotten because the driver no longer counts it.
    """
    by_id = {reading.gpu_id: reading for reading in readings}
    said = {test.gpu_id: test for test in tests}
    judged = {
        gpu.id: judge(
            memories.get(gpu.id, Memory()),
            by_id.get(gpu.id),
            now_s,
            test=said.get(gpu.id),
            number=number if gpu.id in testable else 0,
        )
        for gpu in gpus
    }
    for gpu_id, memory in memories.items():
        if gpu_id not in judged:
            judged[gpu_id] = judge(memory, GpuReading(gpu_id, error="missing from the node's inventory"), now_s)
    return judged


def after_test(memory: Memory) -> Memory:
    """After an operator's word that the GPU was tested: Xids and our own tests no longer count. Levels still do."""
    return msgspec.structs.replace(memory, xids=(), grave_since_s=None, tests=GpuTests())


def without_wait(memory: Memory) -> Memory:
    """After an operator's word that the GPU is to be tested: its next test does not wait for earlier ones."""
    return msgspec.structs.replace(memory, tests=msgspec.structs.replace(memory.tests, count=0))


def moved(memory: Memory, by_s: float) -> Memory:
    """The same in a clock that shows `by_s` seconds more: monotonic seconds end with the process that counted them."""
    minutes = round(by_s / 60)
    return msgspec.structs.replace(
        memory,
        grave_since_s=None if memory.grave_since_s is None else memory.grave_since_s + by_s,
        grave_seen_s=memory.grave_seen_s + by_s,
        tests=msgspec.structs.replace(memory.tests, ended_s=memory.tests.ended_s + by_s)
        if memory.tests.last
        else memory.tests,
        slow_minutes=tuple(minute + minutes for minute in memory.slow_minutes),
    )


def is_news(before: Memory | None, memory: Memory) -> bool:
    """Is the difference worth keeping? That a grave sign was seen once more is not."""
    return before is None or before != msgspec.structs.replace(memory, grave_seen_s=before.grave_seen_s)


def restarts(reading: GpuReading) -> bool:
    """Must the container on this GPU start anew, though the GPU is well?"""
    return not RESTART_XIDS.isdisjoint(reading.xids)


def _slow_minutes(memory: Memory, reading: GpuReading, minute: int) -> tuple[int, ...]:
    kept = tuple(m for m in memory.slow_minutes if minute - SLOW_WINDOW_MINUTES < m < minute)
    slow = (reading.clocks_event_reasons or 0) & _SLOWDOWNS or minute in memory.slow_minutes
    return (*kept, minute) if slow else kept


def _bad_xids(reading: GpuReading) -> tuple[int, ...]:
    return tuple(xid for xid in reading.xids if xid not in APPLICATION_XIDS and xid not in RESTART_XIDS)
