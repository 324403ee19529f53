"""The store alone: acknowledged tasks a second, reads a second, and the price of a page of a long list.

A task is added and ended, each awaited until it is on disk, by 64 callers at once. Run: python -m scripts.bench.store
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from controlplane import ids
from controlplane.migrations import migrate
from controlplane.model import Attempt, Delivery, State, Task
from controlplane.store import End, Store, TaskQuery

CALLERS = 64
BODY = b"x" * 300
TASK_IDS = ids.TaskIds(UTC)


def new_task(workspace_uid: str, now: datetime) -> Task:
    return Task(
        id=TASK_IDS.new(now),
        workspace_uid=workspace_uid,
        state=State.RUNNING,
        create_time=now,
        start_time=now,
        port=80,
        method="POST",
        path="/run",
        request_body=BODY,
        request_size=len(BODY),
        attempt=1,
        replica_id="r-000000000000",
        node_addr="0x" + "0" * 40,
        assign_time=now,
        assign_reason="least busy",
    )


async def finish(store: Store, task: Task) -> None:
    now = datetime.now(UTC)
    await store.finish(
        Attempt(
            task_id=task.id,
            number=1,
            replica_id=task.replica_id,
            node_addr=task.node_addr,
            delivery=Delivery.ANSWERED,
            assign_time=task.create_time,
            end_time=now,
            http_status=200,
        ),
        End(
            state=State.COMPLETED,
            end_time=now,
            response_status=200,
            response_body=BODY,
            response_size=len(BODY),
        ),
    )


async def each(count: int, callers: int, work: Callable[[], Awaitable[object]]) -> tuple[float, float]:
    """Do the work `count` times from so many callers. Gives times a second, and CPU in microseconds each."""
    left = count

    async def call() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            await work()

    began, began_cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(call() for _ in range(callers)))
    return count / (time.perf_counter() - began), (time.process_time() - began_cpu) / count * 1e6


async def page_ms(store: Store, workspace_uid: str, start: datetime) -> float:
    """The median of reading one page of 1,000."""
    times = []
    for _ in range(9):
        began = time.perf_counter()
        async for page in store.list_tasks(TaskQuery(workspace_uid=workspace_uid, start=start, limit=1000)):
            assert len(page.task_ids) == 1000
        times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times)


async def measure(url: str, tasks: int, rows: int) -> dict[str, float]:
    migrate(url)
    store = await Store.open(url)
    results: dict[str, float] = {}

    async def task() -> None:
        new = new_task("w-load", datetime.now(UTC))
        await store.add_task(new)
        await finish(store, new)

    results["tasks_per_s"], results["task_cpu_us"] = await each(tasks, CALLERS, task)
    one_rate, _ = await each(min(tasks, 500), 1, task)
    results["task_c1_ms"] = 1e3 / one_rate

    known = "".join([page.task_ids[0] async for page in store.list_tasks(TaskQuery(workspace_uid="w-load", limit=1))])
    results["reads_per_s"], results["read_cpu_us"] = await each(tasks, CALLERS, lambda: store.task(known))

    began = datetime(2025, 1, 1, tzinfo=UTC)
    for workspace_uid, count in (("w-short", 1000), ("w-long", rows)):
        for first in range(0, count, 5000):
            steps = range(first, min(first + 5000, count))
            await asyncio.gather(
                *(store.add_task(new_task(workspace_uid, began + timedelta(seconds=step))) for step in steps)
            )
    results["page_of_1k_ms"] = await page_ms(store, "w-short", began)
    results[f"page_of_{rows}_ms"] = await page_ms(store, "w-long", began + timedelta(seconds=rows // 2))
    await store.close()
    return {name: round(value, 3) for name, value in results.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few seconds")
    parser.add_argument("--url", help="an empty database to fill; default: SQLite in the temporary directory")
    options = parser.parse_args()
    tasks, rows = (5_000, 10_000) if options.quick else (30_000, 1_000_000)
    with tempfile.TemporaryDirectory(prefix="ngpu-") as directory:
        url = options.url or f"sqlite:///{Path(directory) / 'ngpu.db'}"
        results = asyncio.run(measure(url, tasks, rows))
    for name, value in results.items():
        print(f"{name:20} {value:12,.3f}")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
