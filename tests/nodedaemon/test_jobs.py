"""Jobs are followed to their end: by questions, over restarts of the daemon, and never twice."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from ngpu import wire
from ngpu.v1 import node_pb2, task_pb2, workspace_pb2

from nodedaemon.engine import Exit
from nodedaemon.jobs import TROUBLES, Job
from nodedaemon.journal import Journal
from tests.nodedaemon.fakes import SOON_S, ExecuteStream, FakeControlPlane, Wire
from tests.nodedaemon.test_execute import Boot, Node, boot, plane, serving, start

__all__ = ["boot", "plane"]

CUSTOMER, PLATFORM = task_pb2.CAUSE_CUSTOMER, task_pb2.CAUSE_PLATFORM


def rule(**fields: Any) -> workspace_pb2.JobRule:
    """As of the preset ngpu-classic, and in a hurry."""
    classic = {
        "id": ["/task_id"],
        "ask": "GET {path}?taskID={id}",
        "state": "/result_code",
        "accepted": ["100"],
        "done": ["100"],
        "running": ["102"],
        "waiting": ["101"],
        "failed": ["104"],
        "busy": ["203"],
        "message": "/msg",
        "poll": Duration(nanos=5_000_000),
    }
    return workspace_pb2.JobRule(**(classic | fields))  # type: ignore[arg-type]


class Classic:
    """A container with one job, "j/1". `says` is what it answers to questions, the last for ever."""

    def __init__(self, *says: Any, begun: Any = None) -> None:
        self.begun = begun or {"result_code": 100, "task_id": "j/1"}
        self.says = list(says)
        self.asked: list[str] = []
        self.news = asyncio.Event()

    async def __call__(self, wire_: Wire) -> None:
        while True:
            request = await wire_.request()
            self.asked.append(f"{request.method} {request.target}")
            self.news.set()
            if request.method == "POST":
                said: Any = self.begun
            else:
                said = self.says.pop(0) if len(self.says) > 1 else self.says[0]
            if said is None:
                return
            status, said = said if isinstance(said, tuple) else (200, said)
            await wire_.answer(json.dumps(said).encode(), status=status)

    @property
    def posts(self) -> int:
        return sum(line.startswith("POST") for line in self.asked)

    async def questions(self, number: int) -> None:
        """Until it was asked so often."""
        async with asyncio.timeout(SOON_S):
            while len(self.asked) < number + 1:
                self.news.clear()
                await self.news.wait()


RUNNING, DONE = {"result_code": 102}, {"result_code": 100, "url": "here"}


def starts(path: str = "/removeBG", **fields: Any) -> list[node_pb2.Start]:
    return [start(path=path, job=rule(**fields))]


async def job_of(stream: ExecuteStream) -> node_pb2.Job:
    """The next frame's one job."""
    while True:
        frame = await stream.frame()
        assert not frame.results
        if frame.jobs:
            (job,) = frame.jobs
            return job


async def test_result_is_the_jobs_and_gpus_are_held_all_the_time(boot: Boot) -> None:
    node, classic = boot(), Classic({"result_code": 101}, RUNNING, RUNNING, DONE)
    async with serving(node, classic, gpus=("GPU-1",)):
        stream = await node.connect()
        stream.send(starts=starts())
        job = await job_of(stream)
        assert (job.attempt_id, job.job_id) == ("t.1", "j/1")
        result = await stream.result()
    assert (result.job_id, result.delivery) == ("j/1", task_pb2.DELIVERY_ANSWERED)
    assert json.loads(result.response.body.inline) == DONE
    assert result.response.body.size == len(result.response.body.inline)
    assert classic.asked == ["POST /removeBG"] + ["GET /removeBG?taskID=j%2F1"] * 4
    assert result.gpu_us >= 4 * 5000
    assert result.last_byte_after_us >= result.first_byte_after_us + 4 * 5000


async def test_answer_without_a_job_is_passed_on_as_ever(boot: Boot) -> None:
    node, classic = boot(), Classic(RUNNING, begun=(422, {"detail": "no image"}))
    async with serving(node, classic):
        stream = await node.connect()
        stream.send(starts=starts())
        result = await stream.result()
    assert (result.response.status, result.job_id, classic.asked) == (422, "", ["POST /removeBG"])


@pytest.mark.parametrize("when", ["at first", "later"])
async def test_busy_container_has_not_taken_the_job(boot: Boot, when: str) -> None:
    busy = {"result_code": 203, "msg": "full"}
    node, classic = boot(), Classic(busy, begun=busy if when == "at first" else None)
    async with serving(node, classic):
        stream = await node.connect()
        stream.send(starts=starts())
        result = await stream.result()
    assert (result.failure.reason, result.failure.cause) == ("BUSY", PLATFORM)
    assert "full" in result.failure.message
    assert len(classic.asked) == (1 if when == "at first" else 2)


async def test_failed_job_is_the_customers(boot: Boot) -> None:
    node, classic = boot(), Classic(RUNNING, {"result_code": 104, "msg": "CUDA out of memory"})
    async with serving(node, classic):
        stream = await node.connect()
        stream.send(starts=starts())
        result = await stream.result()
    assert (result.failure.reason, result.failure.cause) == ("JOB_FAILED", CUSTOMER)
    assert "CUDA out of memory" in result.failure.message
    assert result.delivery == task_pb2.DELIVERY_ANSWERED


async def test_output_is_what_its_pointer_says(boot: Boot) -> None:
    node, classic = boot(), Classic(RUNNING, {"result_code": 100, "data": {"image": "ü"}})
    async with serving(node, classic):
        stream = await node.connect()
        stream.send(starts=starts(output="/data/image"))
        result = await stream.result()
    assert result.response.body.inline == "ü".encode()
    assert [(header.name, header.value) for header in result.response.headers] == [
        ("Content-Type", b"text/plain; charset=utf-8")
    ]


async def test_missing_output_is_said_to_be_missing(boot: Boot) -> None:
    node, classic = boot(), Classic(DONE)
    async with serving(node, classic):
        stream = await node.connect()
        stream.send(starts=starts(output="/data/image"))
        result = await stream.result()
    assert result.failure.reason == "BAD_RESPONSE"
    assert "/data/image" in result.failure.message


async def test_large_output_is_delivered_beside(boot: Boot, plane: FakeControlPlane) -> None:
    done = {"result_code": 100, "image": "x" * (3 * wire.CHUNK_BYTES)}
    node, classic = boot(), Classic(RUNNING, done)
    async with serving(node, classic):
        stream = await node.connect()
        stream.send(starts=starts())
        result = await stream.result()
    assert json.loads(bytes(plane.stored["t.1"])) == done
    assert (result.response.body.size, result.response.body.inline) == (len(plane.stored["t.1"]), b"")
    assert result.response.body.is_utf8


async def test_output_over_the_limit_is_refused(boot: Boot) -> None:
    node, classic = boot(), Classic(RUNNING, {"result_code": 100, "image": "x" * 200_000})
    async with serving(node, classic):
        stream = await node.connect()
        given = starts()
        given[0].response_body_limit_bytes = 100_000
        stream.send(starts=given)
        assert (await stream.result()).failure.reason == "RESPONSE_TOO_LARGE"


async def test_questions_may_go_wrong_for_a_while(boot: Boot) -> None:
    troubles = [(500, "oops"), (404, "not yet"), None, {"other": 1}]
    assert len(troubles) < TROUBLES
    node, classic = boot(), Classic(RUNNING, *troubles, RUNNING, *troubles, DONE)
    async with serving(node, classic):
        stream = await node.connect()
        stream.send(starts=starts())
        assert json.loads((await stream.result()).response.body.inline) == DONE


async def test_container_that_does_not_know_its_job_is_told_of(boot: Boot) -> None:
    node, classic = boot(), Classic((404, {"msg": "no task j/1"}))
    async with serving(node, classic):
        stream = await node.connect()
        stream.send(starts=starts())
        result = await stream.result()
    assert (result.failure.reason, result.failure.cause) == ("BAD_RESPONSE", CUSTOMER)
    assert "HTTP 404: no task j/1" in result.failure.message
    assert len(classic.asked) == 1 + TROUBLES


async def test_cancel_tells_the_container_and_asks_no_more(boot: Boot) -> None:
    node, classic = boot(), Classic(RUNNING)
    async with serving(node, classic):
        stream = await node.connect()
        stream.send(starts=starts(cancel="DELETE {path}?taskID={id}"))
        await classic.questions(3)
        stream.send(cancels=["t.1"])
        result = await stream.result()
        assert (result.failure.reason, result.job_id) == ("CANCELLED", "j/1")
        assert classic.asked[-1] == "DELETE /removeBG?taskID=j%2F1"
        assert node.executor.held() == ["t.1"], "what it held it holds no more"
        assert node.executor.running == 0


async def test_run_time_is_the_jobs_too(boot: Boot) -> None:
    node, classic = boot(), Classic(RUNNING)
    async with serving(node, classic):
        stream = await node.connect()
        stream.send(starts=[start(path="/removeBG", job=rule(), limit_ms=100)])
        result = await stream.result()
    assert (result.failure.reason, result.failure.cause) == ("RUN_TIME_LIMIT", CUSTOMER)


async def test_containers_exit_ends_its_jobs(boot: Boot) -> None:
    node, classic = boot(), Classic(RUNNING)
    async with serving(node, classic):
        stream = await node.connect()
        stream.send(starts=starts(cancel="DELETE {path}?taskID={id}"))
        await classic.questions(1)
        node.executor.container_exited(Exit("r-1", 137, at=float("inf")))
        result = await stream.result()
    assert result.failure.reason == "CONTAINER_EXITED"
    assert not any(line.startswith("DELETE") for line in classic.asked)


async def test_job_whose_engine_is_away_is_asked_after_when_it_is_back(boot: Boot) -> None:
    node, classic = boot(), Classic(RUNNING)
    async with serving(node, classic) as address:
        node.replicas.containers["r-1"] = "c-1"
        stream = await node.connect()
        stream.send(starts=starts())
        await job_of(stream)
        await classic.questions(2)
        del node.replicas.addresses["r-1"]
        asked = len(classic.asked)
        # Longer than questions that go wrong are put up with.
        await asyncio.sleep(10 * 0.005)
        assert len(classic.asked) <= asked + 1
        classic.says = [DONE]
        node.replicas.addresses["r-1"] = address
        assert json.loads((await stream.result()).response.body.inline) == DONE


async def test_job_whose_container_is_gone_is_lost(boot: Boot) -> None:
    node, classic = boot(), Classic(RUNNING)
    async with serving(node, classic):
        node.replicas.containers["r-1"] = "c-1"
        stream = await node.connect()
        stream.send(starts=starts())
        await job_of(stream)
        del node.replicas.addresses["r-1"], node.replicas.containers["r-1"]
        assert (await stream.result()).failure.reason == "REPLICA_LOST"


# Restarts.


async def follow_until_killed(node: Node, classic: Classic) -> None:
    node.replicas.containers["r-1"] = "c-1"
    stream = await node.connect()
    stream.send(starts=starts())
    await job_of(stream)
    await classic.questions(2)
    await node.kill()


async def test_killed_daemons_job_is_followed_by_the_next(boot: Boot) -> None:
    classic = Classic(RUNNING)
    first = boot()
    async with serving(first, classic, gpus=("GPU-1",)) as address:
        await follow_until_killed(first, classic)
        node = boot()
        stream = await node.connect()
        assert list(stream.resume.running) == ["t.1"]
        # Its container is found only now.
        node.replicas.containers["r-1"] = "c-1"
        node.replicas.gpus["r-1"] = ("GPU-1",)
        node.replicas.addresses["r-1"] = address
        assert (await job_of(stream)).job_id == "j/1"
        classic.says = [RUNNING, DONE]
        result = await stream.result()
        assert (result.job_id, json.loads(result.response.body.inline)) == ("j/1", DONE)
        assert classic.posts == 1
        assert result.gpu_us > 0
        node.executor.close()
        stream.send(acks=["t.1"])
        assert await node.executor.quiet(SOON_S)
    assert boot().journal.interrupted == ()


async def test_job_of_a_container_that_was_replaced_is_lost(boot: Boot) -> None:
    classic = Classic(RUNNING)
    first = boot()
    async with serving(first, classic) as address:
        await follow_until_killed(first, classic)
        asked = len(classic.asked)
        node = boot()
        node.replicas.containers["r-1"] = "c-2"
        node.replicas.addresses["r-1"] = address
        stream = await node.connect()
        result = await stream.result()
    assert (result.failure.reason, result.failure.cause) == ("REPLICA_LOST", PLATFORM)
    assert result.delivery == task_pb2.DELIVERY_ANSWERED
    assert len(classic.asked) == asked


async def test_time_without_a_daemon_counts(boot: Boot) -> None:
    classic = Classic(RUNNING)
    first = boot()
    async with serving(first, classic) as address:
        first.replicas.containers["r-1"] = "c-1"
        stream = await first.connect()
        stream.send(starts=[start(path="/removeBG", job=rule(), limit_ms=200)])
        await job_of(stream)
        await first.kill()
        await asyncio.sleep(0.25)
        node = boot()
        node.replicas.containers["r-1"] = "c-1"
        node.replicas.addresses["r-1"] = address
        stream = await node.connect()
        async with asyncio.timeout(0.2):
            assert (await stream.result()).failure.reason == "RUN_TIME_LIMIT"


async def test_new_stream_is_told_of_the_jobs_that_run(boot: Boot) -> None:
    node, classic = boot(), Classic(RUNNING)
    async with serving(node, classic):
        stream = await node.connect()
        stream.send(starts=starts())
        await job_of(stream)
        await node.disconnect(stream)
        stream = await node.connect()
        assert (await job_of(stream)).job_id == "j/1"


def test_note_is_read_back_and_a_torn_one_is_none(tmp_path: Path) -> None:
    given = Job.of(start(body=b"large" * 1000, path="/removeBG", job=rule()), 17)
    given.id, given.container_id = "j/1", "c-1"
    journal = Journal(tmp_path / "journal")
    journal.begin("t.1")
    journal.note("t.1", given.note())
    journal.begin("t.2")
    journal.note("t.2", b"ended")
    journal.end("t.2")
    journal.begin("t.3")
    again = Journal(tmp_path / "journal")
    assert set(again.notes) == {"t.1"}
    read = Job.noted(again.notes["t.1"])
    assert read == given
    assert not read.start.request.body.size
    text = (tmp_path / "journal").read_bytes()
    at = text.index(b"N t.1") + 40
    for damaged in (text[:at] + b"\n" + text[at:], text[:at] + b"A" + text[at + 1 :]):
        (tmp_path / "journal").write_bytes(damaged)
        after = Journal(tmp_path / "journal")
        assert after.interrupted == ("t.1", "t.3")
        assert after.notes == {}
    assert Job.noted(b"{}") is None
    assert Job.noted(b"") is None
