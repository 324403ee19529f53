"""Which requests begin a job and which ask after one; what is remembered of jobs, and where questions go."""

import asyncio
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from controlplane.admission import JOB_RULES, admit
from controlplane.api import translate
from controlplane.api.questions import Questions
from controlplane.ctl.workspace_file import _JOB_KEYS, Source, SpecFault, to_spec
from controlplane.errors import InvalidArgument, JobLost, QueueFull, Unavailable
from controlplane.intake import QUESTIONS
from controlplane.jobs import PRESETS, Question, begun_by, question_of, resolved
from controlplane.model import Cause, Delivery, Job, State
from controlplane.slots import AttemptResult, Request, Response
from controlplane.spec import JobRule, Spec
from tests.controlplane.fakes_dispatch import WS, FakeNode, World

CLASSIC = resolved(JobRule(preset="ngpu-classic"))
RENDER = resolved(
    JobRule(start="POST /render/*", id=("/id",), ask="GET /jobs/{id}", state="/status", done=("ok",), output="/result")
)
QUERIED = replace(RENDER, start="PUT /only", ask="POST {path}/status?job={id}&v=1", output="")
RULES = (RENDER, QUERIED, replace(CLASSIC, start="POST /removeBG"))


# The rules.


@pytest.mark.parametrize(
    ("method", "path", "rule"),
    [
        ("POST", "/render/", RULES[0]),
        ("POST", "/render/a/b", RULES[0]),
        ("POST", "/render", None),
        ("GET", "/render/a", None),
        ("PUT", "/only", RULES[1]),
        ("PUT", "/only/", None),
        ("POST", "/removeBG", RULES[2]),
        ("POST", "/removebg", None),
    ],
)
def test_request_that_may_begin_a_job(method: str, path: str, rule: JobRule | None) -> None:
    assert begun_by(RULES, method, path) is rule


@pytest.mark.parametrize(
    ("method", "path", "query", "question"),
    [
        ("GET", "/jobs/a-1", "", Question("a-1", "GET", partial=True)),
        ("GET", "/jobs/a%2F1", "x=1", Question("a/1", "GET", partial=True)),
        ("GET", "/jobs/a/b", "", None),
        ("GET", "/jobs/", "", None),
        ("DELETE", "/jobs/a-1", "", None),
        (
            "GET",
            "/removeBG",
            "taskID=20230423_11_23_05_10279",
            Question("20230423_11_23_05_10279", "GET", partial=False),
        ),
        ("GET", "/removeBG", "a=b&taskID=x%2F%26+y", Question("x/& y", "GET", partial=False)),
        # An envelope has no other method.
        ("POST", "/removeBG", "taskID=x", Question("x", "GET", partial=False)),
        ("GET", "/removeBG", "taskID=", None),
        ("GET", "/removeBG", "", None),
        ("GET", "/other", "taskID=x", None),
        ("POST", "/only/status", "v=1&job=7", Question("7", "POST", partial=False)),
        ("POST", "/only/status", "job=7", None),
        ("POST", "/only/status", "v=2&job=7", None),
    ],
)
def test_request_that_asks_after_a_job(method: str, path: str, query: str, question: Question | None) -> None:
    assert question_of(RULES, method, path, query) == question


def test_preset_fills_in_what_a_rule_leaves_out() -> None:
    rule = resolved(JobRule(preset="ngpu-classic", start="POST /create", poll_s=3.0))
    assert (rule.start, rule.poll_s, rule.done, rule.busy) == ("POST /create", 3.0, ("100", "200"), ("203",))
    assert resolved(rule) == rule
    assert (resolved(JobRule()).start, resolved(JobRule()).poll_s) == ("POST /*", 1.0)


def test_presets_are_admitted() -> None:
    for name in filter(None, PRESETS):
        admit(Spec(name="a", image="b", ports=(80,), jobs=(resolved(JobRule(preset=name)),)))
    admit(Spec(name="a", image="b", ports=(80,), jobs=RULES))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"preset": "modern"}, "preset: 'modern' is not known; known are ngpu-classic"),
        ({"start": "/render"}, "start: '/render' is no method and path"),
        ({"start": "POST render"}, "start:"),
        ({"start": "POST //evil"}, "start:"),
        ({"start": "POST /a/../b"}, "start:"),
        ({"start": "POST /{path}"}, "start:"),
        ({"id": ()}, "id: say where"),
        ({"id": ("task_id",)}, "id: 'task_id' is no JSON pointer"),
        ({"ask": ""}, "ask: '' is no method and path with {id}"),
        ({"ask": "GET /jobs"}, "ask: 'GET /jobs'"),
        ({"ask": "GET http://evil/{id}"}, "ask:"),
        ({"ask": "GET /jobs/{id}/{name}"}, "ask:"),
        ({"ask": "GET /jobs/{id} HTTP/1.1"}, "ask:"),
        ({"cancel": "/jobs/{id}"}, "cancel:"),
        ({"state": "status"}, "state: 'status' is no JSON pointer"),
        ({"state": ""}, "state: say where 'ok' is to be found"),
        ({"done": ()}, "done: say which answer"),
        ({"done": ("",)}, "done: '' is no word"),
        ({"done": ("HTTP 20",)}, "done: 'HTTP 20' is no word of an answer, and no status"),
        ({"failed": ("ok",)}, "failed: 'ok' means done already"),
        ({"busy": ("HTTP 503",), "running": ("HTTP 503",)}, "busy: 'HTTP 503' means running already"),
        ({"output": "result"}, "output: 'result' is no JSON pointer"),
        ({"poll_s": 0.01}, "poll_s: 0.01 is not from 0.05 to 60"),
        ({"limit_s": -1.0}, "limit_s:"),
        ({"busy": tuple(f"w{number}" for number in range(33))}, "busy: at most 32 words"),
    ],
)
def test_rule_that_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        admit(Spec(name="a", image="b", ports=(80,), jobs=(replace(RENDER, **changes),)))
    assert f"jobs: {words}" in str(caught.value)


def test_faults_are_told_by_rule_and_there_are_not_too_many() -> None:
    with pytest.raises(InvalidArgument, match="jobs, rule 2: done: say"):
        admit(Spec(name="a", image="b", ports=(80,), jobs=(RENDER, replace(RENDER, done=()))))
    with pytest.raises(InvalidArgument, match="jobs: at most 16 rules"):
        admit(Spec(name="a", image="b", ports=(80,), jobs=(RENDER,) * (JOB_RULES + 1)))


# The file.


def source(value: Any) -> Source:
    return Source({"name": "a", "image": "b", "ports": [1], "async": value}, "w.toml")


def test_file_names_a_preset_or_has_tables() -> None:
    (rule,) = to_spec(source("ngpu-classic")).jobs
    assert rule.preset == "ngpu-classic"
    first, second = to_spec(
        source([{"id": "/id", "done": [100, "ok", True, "HTTP 200"], "poll": "500ms"}, {"busy": 503}])
    ).jobs
    assert (list(first.id), list(first.done)) == (["/id"], ["100", "ok", "true", "HTTP 200"])
    assert first.poll.nanos == 500_000_000
    assert list(second.busy) == ["503"]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (7, 'async: must be a preset, such as "ngpu-classic"'),
        ([{"idd": "/id"}], "async: idd: is not known; did you mean id?"),
        ([{"id": {}}], "async: id: must be text or a number"),
        ([{"poll": "soon"}], "async: poll:"),
    ],
)
def test_fault_in_the_file_is_named(value: Any, words: str) -> None:
    with pytest.raises(SpecFault) as caught:
        to_spec(source(value))
    assert words in str(caught.value)


def test_documented_rule_has_every_key_and_is_admitted() -> None:
    text = (Path(__file__).parents[2] / "docs/services.md").read_text()
    (block,) = [block for block in re.findall(r"```toml\n(.*?)```", text, re.DOTALL) if "[[async]]" in block]
    document = tomllib.loads(block)
    assert set(document["async"][0]) | {"preset"} == set(_JOB_KEYS)
    admit(translate.spec_of(to_spec(source(document["async"]))))
    assert question_of(translate.spec_of(to_spec(source(document["async"]))).jobs, "GET", "/jobs/7", "") is not None


# What becomes of tasks.


@pytest.fixture
def world(world: World) -> World:
    known = world.fleet.workspaces[WS]
    world.fleet.workspaces[WS] = replace(known, spec=replace(known.spec, jobs=(CLASSIC,)))
    return world


def asking(world: World, job_id: str = "j1") -> "asyncio.Task[Any]":
    """A caller asks after a job, as the API has it done."""
    request = Request("GET", "/run", f"taskID={job_id}")
    new = replace(world.new(), request=request)
    questions = Questions(world.store, world.dispatcher)
    return asyncio.create_task(
        questions.ask(new, Question(job_id, "GET", partial=False), wait_s=1e9, cancel_on_hangup=False)
    )


async def begun(world: World, node: FakeNode, job_id: str = "j1") -> "asyncio.Future[Any]":
    """A task has become a job."""
    future = world.submit()
    attempt_id = node.given[-1]
    world.dispatcher.begun(node.addr, attempt_id, job_id)
    world.dispatcher.begun(node.addr, attempt_id, job_id)
    await world.settle()
    return future


async def test_start_has_the_rule_and_its_limit(world: World) -> None:
    known = world.fleet.workspaces[WS]
    world.fleet.workspaces[WS] = replace(known, spec=replace(known.spec, jobs=(replace(CLASSIC, limit_s=5.0),)))
    node = world.node("n1", r1=2)
    world.submit()
    start = node.running["t1.1"]
    assert start.job is not None
    assert (start.job.ask, start.run_time_limit_s) == ("GET {path}?taskID={id}", 5.0)
    world.submit(replace(world.new(), request=Request("GET", "/run")))
    assert (node.running["t2.1"].job, node.running["t2.1"].run_time_limit_s) == (None, 600.0)
    await world.settle()


async def test_job_is_remembered_while_it_runs_and_as_long_as_its_bodies(world: World) -> None:
    node = world.node("n1", r1=1)
    future = await begun(world, node)
    job = await world.store.job(WS, "j1")
    assert job == Job(workspace_uid=WS, id="j1", task_id="t1", attempt=1, replica_id="r1", node_addr="n1")
    assert await world.store.job("w-2", "j1") is None
    node.answer("t1.1")
    await future
    assert await world.store.jobs_of("t1") == [job]
    await world.store.expire_bodies(["t1"], world.clock.utcnow())
    assert await world.store.job(WS, "j1") is None


async def test_result_alone_tells_of_the_job_too(world: World) -> None:
    node = world.node("n1", r1=1)
    future = world.submit()
    response = Response(200, (), b"done", 4)
    world.dispatcher.result("n1", AttemptResult("t1.1", Delivery.ANSWERED, response=response, job_id="j1"))
    await future
    assert await world.store.job(WS, "j1") is not None
    node.running.clear()


async def test_job_is_remembered_once_the_database_is_back(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("controlplane.job_writes.AGAIN_S", 0.0)
    node = world.node("n1", r1=1)
    world.submit()
    await world.settle()
    world.flaky.down = True
    world.dispatcher.begun("n1", "t1.1", "j1")
    await asyncio.sleep(0)
    assert await world.store.job(WS, "j1") is None
    world.flaky.down = False
    async with asyncio.timeout(30):
        while await world.store.job(WS, "j1") is None:
            await asyncio.sleep(0)
    node.answer("t1.1")
    await world.settle()


@pytest.mark.parametrize("job_id", ["a\0b", "x" * 257])
async def test_id_that_no_container_may_have_is_not_remembered(world: World, job_id: str) -> None:
    node = world.node("n1", r1=1)
    await begun(world, node, job_id)
    assert await world.store.jobs_of("t1") == []


async def test_later_job_of_the_same_id_is_meant(world: World) -> None:
    node = world.node("n1", r1=2)
    await begun(world, node)
    await begun(world, node)
    job = await world.store.job(WS, "j1")
    assert job is not None
    assert job.task_id == "t2"


async def test_question_reaches_the_jobs_replica_past_its_queue(world: World) -> None:
    one, two = world.node("n1", r1=1), world.node("n2")
    await begun(world, one)
    two.serve("r2")
    world.submit()
    world.submit()
    one.capacity["r1"] = 2  # as many as it will be given
    asked = asking(world)
    await one.has("t4.1")
    start = one.running["t4.1"]
    assert (start.replica_id, start.request.method, start.job) == ("r1", "GET", None)
    one.answer("t4.1", b"running")
    assert (await asked).response.body == b"running"


async def test_question_in_an_envelope_is_asked_as_the_container_takes_it(world: World) -> None:
    node = world.node("n1", r1=2)
    await begun(world, node)
    questions = Questions(world.store, world.dispatcher)
    new = replace(
        world.new(),
        request=Request("POST", "/run", "taskID=j1", (("Content-Type", b"text/plain"), ("x", b"y")), b"{}", 2),
    )
    asked = asyncio.create_task(
        questions.ask(new, Question("j1", "GET", partial=False), wait_s=1e9, cancel_on_hangup=False)
    )
    await node.has("t2.1")
    assert node.running["t2.1"].request == Request("GET", "/run", "taskID=j1", (("x", b"y"),))
    node.answer("t2.1")
    await asked


async def test_question_after_a_done_job_is_answered_from_the_record(world: World) -> None:
    node = world.node("n1", r1=1)
    future = await begun(world, node)
    node.answer("t1.1", b"output")
    await future
    node.disconnect()
    await world.restart()
    view = await asking(world)
    assert (view.task_id, view.state, view.response.body) == ("t1", State.COMPLETED, b"output")
    assert node.given == ["t1.1"]


async def test_question_after_an_unknown_job_is_a_request_like_any_other(world: World) -> None:
    node = world.node("n1", r1=1)
    asked = asking(world, "nobody knows")
    await node.has("t1.1")
    node.answer("t1.1", b"what?", status=404)
    assert (await asked).response.status == 404


async def test_question_while_the_node_is_away_or_after_it_is_lost_is_told_so(world: World) -> None:
    one = world.node("n1", r1=1)
    future = await begun(world, one)
    one.disconnect()
    with pytest.raises(Unavailable, match="not connected"):
        await asking(world)
    await world.advance(11)
    with pytest.raises(Unavailable, match="task t1 begins anew elsewhere") as caught:
        await asking(world)
    assert caught.value.retry_after_s
    two = world.node("n2", r2=1)
    await world.advance(1)
    await two.has("t1.2")
    two.answer("t1.2", b"second")
    await future
    assert (await asking(world)).response.body == b"second"


async def test_question_after_a_failed_job_whose_replica_is_gone_is_told_so(world: World) -> None:
    node = world.node("n1", r1=1)
    future = await begun(world, node)
    node.fail("t1.1", "JOB_FAILED", cause=Cause.CUSTOMER, delivery=Delivery.ANSWERED)
    assert (await future).failure.reason == "JOB_FAILED"
    # The container may still have words about it.
    asked = asking(world)
    await node.has("t2.1")
    node.answer("t2.1", b"failed")
    assert (await asked).response.body == b"failed"
    world.dispatcher.replica_gone("r1")
    with pytest.raises(JobLost, match="task t1 was not completed: It was JOB_FAILED"):
        await asking(world)


async def test_lost_question_is_not_asked_elsewhere(world: World) -> None:
    one = world.node("n1", r1=2)
    await begun(world, one)
    two = world.node("n2", r2=1)
    asked = asking(world)
    await one.has("t2.1")
    one.fail("t2.1", "CONNECT_FAILED", delivery=Delivery.NOT_SENT)
    assert (await asked).failure.reason == "CONNECT_FAILED"
    await world.advance(60)
    assert two.given == []


async def test_questions_at_once_have_a_limit(world: World) -> None:
    node = world.node("n1", r1=1)
    await begun(world, node)
    node.capacity["r1"] = 1000
    asked = [asking(world) for _ in range(QUESTIONS)]
    await node.has(*(f"t{number}.1" for number in range(2, QUESTIONS + 2)))
    with pytest.raises(QueueFull, match="Too many ask"):
        await asking(world)
    for attempt_id in list(node.running):
        node.answer(attempt_id)
    await asyncio.gather(*asked)


async def given(attempt_id: str, *nodes: FakeNode) -> FakeNode:
    """The node that the attempt is given to."""
    waits = {asyncio.create_task(node.has(attempt_id)): node for node in nodes}
    done, late = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in late:
        wait.cancel()
    return waits[done.pop()]


async def test_busy_task_goes_elsewhere_and_uses_no_attempt(world: World) -> None:
    one, two = world.node("n1", r1=1), world.node("n2")
    future = world.submit()
    two.serve("r2")
    one.fail("t1.1", "BUSY", delivery=Delivery.ANSWERED)
    await world.settle()
    await world.advance(1)
    await two.has("t1.2")
    # More often than a task has attempts, or the platform tries what it caused.
    for number in range(2, 30):
        node = await given(f"t1.{number}", one, two)
        node.fail(f"t1.{number}", "BUSY", delivery=Delivery.ANSWERED)
        await world.settle()
        await world.advance(31)
    (await given("t1.30", one, two)).answer("t1.30")
    assert (await future).state is State.COMPLETED
    assert sum(attempt.cost_nanos for attempt in await world.store.attempts("t1")) == 0


async def test_what_is_always_busy_ends_with_the_tasks_time(world: World) -> None:
    world.fleet.add_workspace(WS, total_time_s=100.0)
    node = world.node("n1", r1=1)
    future = world.submit()
    for number in range(1, 20):
        if future.done():
            break
        if f"t1.{number}" in node.running:
            node.fail(f"t1.{number}", "BUSY", delivery=Delivery.ANSWERED)
        await world.settle()
        await world.advance(20)
    view = await future
    assert view.failure is not None
    assert view.failure.reason == "TOTAL_TIME_LIMIT"
