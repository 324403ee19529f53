"""How a peer's queue is loaded by its own Python client: `closed` and `paced`, from blocking calls.

Run as: python PEER.py closed|paced SECONDS. Prints one line of JSON.
"""

import json
import queue
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TypeVar

Handle = TypeVar("Handle")

#: Tasks under way in the closed loop.
OUTSTANDING = 64
#: Tasks a second in the paced form.
PER_S = 50
WARM_S = 1.0
#: Threads that wait for results in the paced form: as many as a slow peer has under way in half a second and more.
WAITERS = 32
PAYLOAD = "x" * 300


def closed(submit: Callable[[str], Handle], result: Callable[[Handle], str], seconds: float) -> dict[str, float]:
    """Keep OUTSTANDING tasks under way; `tps` of those whose result was read. One thread, which suits these clients."""
    waiting = deque(submit(PAYLOAD) for _ in range(OUTSTANDING))
    warm = time.perf_counter() + WARM_S
    began, done = 0.0, 0
    while True:
        answer = result(waiting.popleft())
        if len(answer) != len(PAYLOAD):
            raise ValueError(answer)
        now = time.perf_counter()
        if began and now - began > seconds:
            break
        if began:
            done += 1
        elif now > warm:
            began = now
        waiting.append(submit(PAYLOAD))
    while waiting:
        result(waiting.popleft())
    return {"tps": done / (now - began)}


def paced(submit: Callable[[str], Handle], result: Callable[[Handle], str], seconds: float) -> dict[str, float]:
    """PER_S tasks a second, whatever becomes of them. `result_..._ms` is from before the submit to the result read."""
    submits: list[float] = []
    results: list[float] = []
    waiting: queue.SimpleQueue[tuple[Handle, float] | None] = queue.SimpleQueue()

    def wait() -> None:
        while (task := waiting.get()) is not None:
            result(task[0])
            results.append(time.perf_counter() - task[1])

    waiters = [threading.Thread(target=wait, name="waiter") for _ in range(WAITERS)]
    for waiter in waiters:
        waiter.start()
    due = time.perf_counter()
    for _ in range(int(PER_S * seconds)):
        began = time.perf_counter()
        handle = submit(PAYLOAD)
        submits.append(time.perf_counter() - began)
        waiting.put((handle, began))
        due += 1 / PER_S
        time.sleep(max(0.0, due - time.perf_counter()))
    for _ in waiters:
        waiting.put(None)
    for waiter in waiters:
        waiter.join()
    return latencies(submits, results)


def latencies(submits: list[float], results: list[float]) -> dict[str, float]:
    """Medians of seconds, in ms."""
    return {
        "submit_p50_ms": statistics.median(submits) * 1e3,
        "result_p50_ms": statistics.median(results) * 1e3,
        "result_p99_ms": sorted(results)[int(len(results) * 0.99)] * 1e3,
    }


def main(submit: Callable[[str], Handle], result: Callable[[Handle], str]) -> None:
    """What the command line asks for."""
    load = {"closed": closed, "paced": paced}[sys.argv[1]]
    print(json.dumps(load(submit, result, float(sys.argv[2]))))
