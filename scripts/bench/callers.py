"""Callers of durable tasks: paced over REST, and in a closed loop over the gRPC Batch stream.

Run in a process of its own: python -m scripts.bench.callers rest|batch SETTINGS, which is JSON of what the class has.
Prints one line of JSON.
"""

import asyncio
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import grpc
from ngpu import wire
from ngpu.v1 import task_pb2 as pb
from ngpu.v1 import task_pb2_grpc

from scripts.bench.peers import pace


@dataclass(frozen=True)
class Settings:
    """Where to call, as whom, for how long; `target` is the bridge's URL or the control plane's address."""

    target: str
    bearer: str
    body_file: str
    seconds: float

    @property
    def body(self) -> bytes:
        """What is submitted."""
        return Path(self.body_file).read_bytes()


async def paced(settings: Settings) -> dict[str, float]:
    """PER_S tasks a second: submitted, then asked after with wait=. From the first byte sent to the result read."""
    submits: list[float] = []
    results: list[float] = []
    body = settings.body
    headers = {"Authorization": f"Bearer {settings.bearer}", "Content-Type": "application/json"}
    async with aiohttp.ClientSession(settings.target, headers=headers) as session:

        async def call() -> None:
            began = time.perf_counter()
            async with session.post("/user/schedulingTask?paramUrl=w1&paramPort=8080", data=body) as answer:
                task_id = (await answer.json())["taskID"]
            submits.append(time.perf_counter() - began)
            async with session.get(f"/user/queryTask?taskID={task_id}&wait=30") as answer:
                said: dict[str, Any] = await answer.json()
            if said["result_code"] != 200 or not said["result_size"]:
                raise ValueError(said)
            results.append(time.perf_counter() - began)

        await call()
        submits.clear()
        results.clear()
        due = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for number in range(int(pace.PER_S * settings.seconds)):
                group.create_task(call(), name=f"call {number}")
                due += 1 / pace.PER_S
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
    return pace.latencies(submits, results)


class Batch:
    """One Batch stream, with a future for each call."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._futures: dict[int, asyncio.Future[pb.Answer]] = {}
        self._calls: list[pb.Call] = []
        self._waiting = asyncio.Event()
        self._last_id = 0

    async def call(self, **method: Any) -> pb.Answer:
        """The answer to one call. Raises ValueError with the error's message."""
        self._last_id += 1
        future: asyncio.Future[pb.Answer] = asyncio.get_running_loop().create_future()
        self._futures[self._last_id] = future
        self._calls.append(pb.Call(id=self._last_id, **method))
        self._waiting.set()
        answer = await future
        if answer.HasField("error"):
            raise ValueError(answer.error.message)
        return answer

    async def write(self) -> None:
        """Whatever waits goes in one frame."""
        while True:
            await self._waiting.wait()
            calls, self._calls = self._calls[: wire.BATCH_ITEMS], self._calls[wire.BATCH_ITEMS :]
            if not self._calls:
                self._waiting.clear()
            await self._stream.write(pb.BatchRequest(calls=calls))

    async def read(self) -> None:
        """Answers, in any order."""
        while (frame := await self._stream.read()) is not grpc.aio.EOF:
            for answer in frame.answers:
                self._futures.pop(answer.id).set_result(answer)


async def closed(settings: Settings) -> dict[str, float]:
    """OUTSTANDING tasks under way: Schedule, then Query with wait, each answered on the one stream."""
    request = pb.ScheduleRequest(workspace_id=settings.bearer)
    request.request.method, request.request.path = "POST", "/w1"
    request.request.body.inline = pace.PAYLOAD.encode()
    request.request.body.size = len(pace.PAYLOAD)
    done = 0
    async with grpc.aio.insecure_channel(settings.target, options=wire.CLIENT_OPTIONS) as channel:
        stream = task_pb2_grpc.TaskServiceStub(channel).Batch(
            metadata=((wire.AUTHORIZATION, f"Bearer {settings.bearer}"),)
        )
        batch = Batch(stream)
        links = [asyncio.create_task(link, name="link") for link in (batch.read(), batch.write())]
        began = time.perf_counter()
        end = began + settings.seconds

        async def call() -> None:
            nonlocal done
            while time.perf_counter() < end:
                task = (await batch.call(schedule=request)).schedule.task
                query = pb.QueryRequest(task_id=task.task_id)
                query.wait.FromSeconds(30)
                answer = (await batch.call(query=query)).query
                if answer.task.state != pb.TASK_STATE_COMPLETED or not answer.response.body.inline:
                    raise ValueError(str(answer))
                done += 1

        async def callers() -> None:
            async with asyncio.TaskGroup() as group:
                for number in range(pace.OUTSTANDING):
                    group.create_task(call(), name=f"caller {number}")

        calling = asyncio.create_task(callers(), name="callers")
        # A broken stream would leave the callers waiting for ever.
        await asyncio.wait([calling, *links], return_when=asyncio.FIRST_COMPLETED)
        for task in (*links, calling):
            if task.done():
                task.result()
        elapsed = time.perf_counter() - began
        for link in links:
            link.cancel()
        await asyncio.gather(*links, return_exceptions=True)
    return {"tps": done / elapsed}


if __name__ == "__main__":
    load = {"rest": paced, "batch": closed}[sys.argv[1]]
    print(json.dumps(asyncio.run(load(Settings(**json.loads(sys.argv[2]))))))
