"""A soak: minutes of mixed callers against the three processes, then an audit of what was recorded.

Small calls (waiting, asked after, raw), large ones both ways (through the envelope and /run), server-sent events read
to their end, callers who hang up among them, slow senders, slow readers, WebSockets: each kind by a few callers who
check every byte of every answer. Bodies are deleted a minute after their tasks, so that deletion is at work too.

Memory is resident memory of each process, looked at every second. Flat: the median of the last third of the time is not
above that of the first third (after a minute to warm up, or a tenth of the time).

The audit reads every task of the workspace from the control plane over gRPC (ListTasks, GetDetail) and compares: no
task that no caller knows of, none missing; the state of each; the sizes of both bodies, a WebSocket's bytes among them.
"""

import argparse
import asyncio
import re
import shutil
import statistics
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import aiohttp
import grpc
from ngpu import wire
from ngpu.v1 import task_pb2 as pb
from ngpu.v1 import task_pb2_grpc

from scripts.bench import loads, product, sheet
from scripts.bench.loads import rss_mib
from scripts.bench.sheet import Goal
from scripts.bench.soak_callers import Book, Callers, Done
from scripts.programs import Failed, Platform

EVERY_S: Final = 1.0
#: Questions of the audit under way at once.
AUDITORS: Final = 16
#: After the last call: a node still has to say that what was hung up on is over.
SETTLE_S: Final = 60.0
SETTINGS: Final = {"NGPU_CONTROLPLANE_BODY_RETENTION": "60s"}
WORKSPACE: Final = """
name = "soak"
image = "soak"
ports = [8080]
concurrency = 64
[limits]
queue_length = 10000
"""
GOALS: Final = (
    Goal("calls that went wrong", "errors", 0, most=True),
    Goal("tasks recorded otherwise than counted", "mismatches", 0, most=True),
    *(
        Goal(f"{name}: last third over first", f"growth_mib_{name.replace(' ', '_')}", 15, 5, most=True, unit="MiB")
        for name in product.PROGRAMS
    ),
)


class Watched:
    """Resident memory of each process while the block runs. `samples`: (seconds since its begin, MiB of each)."""

    def __init__(self, pids: list[int]) -> None:
        self._pids = pids
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory")
        self.samples: list[tuple[float, list[float]]] = []

    def _watch(self) -> None:
        began = time.monotonic()
        while not self._over.is_set():
            try:
                self.samples.append((time.monotonic() - began, [rss_mib([pid]) for pid in self._pids]))
            except OSError:
                return  # one has died: its callers tell
            self._over.wait(EVERY_S)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def between(self, begin_s: float, end_s: float) -> list[float]:
        """Medians of each in that time."""
        found = [each for at, each in self.samples if begin_s <= at < end_s]
        if not found:
            raise Failed(f"no memory was measured between {begin_s:.0f} and {end_s:.0f} s: has a process died?")
        return [statistics.median(column) for column in zip(*found, strict=True)]


async def call(platform: Platform, workspace_id: str, seconds: float) -> Book:
    """What the callers have counted."""
    book = Book()
    headers = {"Authorization": f"Bearer {workspace_id}"}
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(platform.url, headers=headers, connector=connector) as session:
        await Callers(session, book).run(seconds)
    return book


async def audit(platform: Platform, workspace_id: str, done: dict[str, Done]) -> list[str]:
    """What is recorded otherwise than the callers have counted, in words."""
    auth = ((wire.AUTHORIZATION, f"Bearer {workspace_id}"),)
    async with grpc.aio.insecure_channel(platform.server, options=wire.CLIENT_OPTIONS) as channel:
        tasks: Any = task_pb2_grpc.TaskServiceStub(channel)
        states = await _states(tasks, auth)
        deadline = time.monotonic() + SETTLE_S
        while time.monotonic() < deadline and any(state <= pb.TASK_STATE_RUNNING for state in states.values()):
            await asyncio.sleep(1)
            states = await _states(tasks, auth)
        wrong = [f"{task_id}: no caller knows of it" for task_id in states.keys() - done.keys()]
        wrong += [f"{task_id}: not recorded ({done[task_id].kind})" for task_id in done.keys() - states.keys()]
        left = iter([task_id for task_id in done if task_id in states])

        async def check() -> None:
            for task_id in left:
                # A byte at most of each body: only their sizes are wanted.
                request = pb.GetDetailRequest(task_id=task_id, max_inline_bytes=1)
                detail = await tasks.GetDetail(request, metadata=auth, timeout=60)
                wrong.extend(f"{task_id}: {words}" for words in _differences(detail, states[task_id], done[task_id]))

        async with asyncio.TaskGroup() as group:
            for number in range(AUDITORS):
                group.create_task(check(), name=f"auditor {number}")
    return wrong


async def _states(tasks: Any, auth: Any) -> dict[str, "pb.TaskState.ValueType"]:
    pages = tasks.ListTasks(pb.ListTasksRequest(full=True), metadata=auth, timeout=600)
    return {task.task_id: task.state async for page in pages for task in page.tasks}


def _differences(detail: pb.GetDetailResponse, listed: "pb.TaskState.ValueType", done: Done) -> list[str]:
    pairs = (
        ("state", pb.TaskState.Name(detail.task.state), pb.TaskState.Name(done.state)),
        ("state in the list", pb.TaskState.Name(listed), pb.TaskState.Name(done.state)),
        ("bytes of the request", detail.request.body.size, done.request_bytes),
        ("bytes of the response", detail.response.body.size, done.response_bytes),
    )
    return [f"{done.kind}: {what}: {got}, not {wanted}" for what, got, wanted in pairs if wanted not in (None, got)]


def table(book: Book) -> str:
    """What the callers have done."""
    rows = []
    for kind, calls in book.calls.items():
        took = sorted(book.took.get(kind, ()))
        p50, p99 = (took[int(len(took) * q)] * 1e3 if took else None for q in (0.5, 0.99))
        rows.append([kind, f"{calls:,}", f"{book.errors[kind]:,}", sheet.number(p50), sheet.number(p99)])
    return sheet.markdown(["callers", "calls", "went wrong", "p50 ms", "p99 ms"], rows)


def over_time(watched: Watched, seconds: float) -> str:
    """Memory in ten parts of the time."""
    part = seconds / 10
    lines = []
    for number in range(10):
        each = watched.between(number * part, (number + 1) * part)
        lines.append([f"{number * part / 60:.1f}", *map(sheet.number, each), sheet.number(sum(each))])
    return sheet.markdown(["minute", *(f"{name} MiB" for name in product.PROGRAMS), "together"], lines)


def measure(state: Path, options: argparse.Namespace, busy: float) -> sheet.Figures:
    """All of it."""
    seconds = 60 * (options.minutes or (0.5 if options.quick else 10))
    figures = sheet.Figures()
    print(sheet.where(busy) + "\n")
    image = state / "images" / "soak"
    image.mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("soak_container.py"), image / "server.py")
    (image / "image.toml").write_text(f'command = ["{sys.executable}", "-u", "server.py"]\n')
    with Platform(state, settings=SETTINGS) as platform:
        images = str(state / "images")
        platform.start_node("node", "--engine", "process", "--process-images", images, "--stop-containers")
        platform.start_bridge()
        pids = [program.pid for program in platform.programs]
        workspace_id = product.workspace(platform, "soak", WORKSPACE)
        sheet.progress(f"mixed callers for {seconds / 60:g} min")
        with Watched(pids) as watched:
            book = asyncio.run(call(platform, workspace_id, seconds))
        sheet.progress(f"audit of {len(book.done):,} tasks")
        wrong = asyncio.run(audit(platform, workspace_id, book.done))
        figures.keep("rest_mib", rss_mib(pids))
    sheet.progress("")
    kinds = Counter(done.kind for done in book.done.values())
    for kind, calls in book.calls.items():
        name = re.sub("[^a-z0-9]+", "_", kind.lower())
        figures.keep(f"calls_{name}", calls)
        figures.keep(f"recorded_{name}", kinds[kind])
    figures.keep("calls", book.calls.total())
    figures.keep("errors", book.errors.total())
    figures.keep("recorded", len(book.done))
    figures.keep("mismatches", len(wrong))
    warm_s = min(60.0, seconds / 10)
    third = (seconds - warm_s) / 3
    early, late = watched.between(warm_s, warm_s + third), watched.between(seconds - third, seconds)
    for name, before, after in zip(product.PROGRAMS, early, late, strict=True):
        figures.keep(f"growth_mib_{name.replace(' ', '_')}", after - before)
    figures.keep("early_mib", sum(early))
    figures.keep("late_mib", sum(late))
    figures.keep("peak_mib", max(sum(each) for _, each in watched.samples))
    print(table(book) + "\n")
    for kind, words in book.words.items():
        print(f"First that went wrong of {kind}: {words}\n")
    print(over_time(watched, seconds) + "\n")
    print(f"Audit: {len(book.done):,} tasks counted, {len(wrong):,} recorded otherwise.\n")
    for words in wrong[:10]:
        print(f"- {words}")
    print(sheet.goals_table(GOALS, figures))
    return figures


def main() -> int:
    """Run the soak. Gives the exit status."""
    parser = loads.options("soak", __doc__)
    parser.add_argument("--minutes", type=float, metavar="M", help="default 10; with --quick 0.5")
    product.add_note(parser)
    return loads.main("soak", parser, measure)


if __name__ == "__main__":
    sys.exit(main())
