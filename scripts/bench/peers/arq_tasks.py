"""300 B of work as an arq function with Redis for queue and results; REDIS_URL says where. Run: see pace.py.

arq looks for work and for results every half second by default, which would be all that is measured: here every 5 ms.
The work is the container's; see container.py.
"""

# mypy: disable-error-code="import-not-found,misc,no-any-return"

import asyncio
import json
import os
import sys
import time
from functools import cache
from typing import Any, ClassVar

import container
import pace
from arq import create_pool
from arq.connections import RedisSettings

SETTINGS = RedisSettings.from_dsn(os.environ["REDIS_URL"])
POLL_S = 0.005
CONTAINER = container.Container()


async def work(_context: dict[str, Any], data: str) -> str:
    """What the container answers; without one what came, back."""
    return (await CONTAINER.call("/w1", data.encode())).decode() if container.URL else data


class WorkerSettings:
    """Of the worker."""

    functions: ClassVar = [work]
    redis_settings = SETTINGS
    poll_delay = POLL_S
    max_jobs = pace.OUTSTANDING


@cache
def pool() -> asyncio.Task[Any]:
    """The connections of this process."""
    return asyncio.create_task(create_pool(SETTINGS), name="pool")


async def submit(data: str) -> Any:
    """The job."""
    return await (await pool()).enqueue_job("work", data)


async def result(job: Any) -> str:
    """What the worker gave."""
    answer: str = await job.result(timeout=60, poll_delay=POLL_S)
    return answer


async def closed(seconds: float) -> dict[str, float]:
    """As pace.closed."""
    began, done = 0.0, 0
    warm = time.perf_counter() + pace.WARM_S
    end = warm + seconds

    async def call() -> None:
        nonlocal began, done
        while time.perf_counter() < end:
            await result(await submit(pace.PAYLOAD))
            now = time.perf_counter()
            began = began or (now if now > warm else 0.0)
            done += now > warm

    await asyncio.gather(*(call() for _ in range(pace.OUTSTANDING)))
    return {"tps": done / (time.perf_counter() - began)}


async def paced(seconds: float) -> dict[str, float]:
    """As pace.paced."""
    submits: list[float] = []
    results: list[float] = []

    async def call() -> None:
        began = time.perf_counter()
        job = await submit(pace.PAYLOAD)
        submits.append(time.perf_counter() - began)
        await result(job)
        results.append(time.perf_counter() - began)

    due = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for number in range(int(pace.PER_S * seconds)):
            group.create_task(call(), name=f"call {number}")
            due += 1 / pace.PER_S
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
    return pace.latencies(submits, results)


if __name__ == "__main__":
    load = {"closed": closed, "paced": paced}[sys.argv[1]]
    print(json.dumps(asyncio.run(load(float(sys.argv[2])))))
