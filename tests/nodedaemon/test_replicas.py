"""Desired against running, on a fake engine and a fake clock."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
import pytest_asyncio

from nodedaemon.engine import Credentials, DiskFull, EngineDown, Exit, GpuMissing, PullFailed, Readiness, StartFailed
from nodedaemon.replica import BACKOFF_LIMIT_S, HEALTHY_S, backoff_s
from nodedaemon.replicas import SIGHT_S, ReplicaReport, Replicas, State, plan
from tests.nodedaemon.fake_engine import FakeEngine, FakeProbe, FakeTime, assignment, settle

A = assignment("r-a")
B = assignment("r-b", spec_hash="h2")


@pytest.mark.parametrize(
    ("desired", "kept", "found", "start", "stop"),
    [
        pytest.param([], {}, {}, [], [], id="nothing"),
        pytest.param([A], {}, {}, ["r-a"], [], id="a new one is started"),
        pytest.param([A], {"r-a": "h1"}, {"r-a": "h1"}, [], [], id="one that is kept is left alone"),
        pytest.param([A], {"r-a": "h1"}, {}, [], [], id="its container is its own task's affair"),
        pytest.param([A], {}, {"r-a": "h1"}, ["r-a"], [], id="a found one of the same hash is adopted"),
        pytest.param([A], {}, {"r-a": "h0"}, [], ["r-a"], id="a found one of another hash is stopped first"),
        pytest.param([A], {"r-a": "h0"}, {"r-a": "h0"}, [], ["r-a"], id="a changed one is stopped first"),
        pytest.param([A], {"r-a": "h1"}, {"r-a": "h0"}, [], ["r-a"], id="kept but the container is another"),
        pytest.param([], {"r-a": "h1"}, {"r-x": "h9"}, [], ["r-a", "r-x"], id="what is not desired is stopped"),
        pytest.param([A, B], {"r-b": "h2"}, {}, ["r-a"], [], id="each for itself"),
    ],
)
def test_plan(
    desired: list[object], kept: dict[str, str], found: dict[str, str], start: list[str], stop: list[str]
) -> None:
    wanted = {a.replica_id: a for a in (A, B) if a in desired}
    todo = plan(wanted, kept, found)
    assert [a.replica_id for a in todo.start] == start
    assert list(todo.stop) == stop


def test_backoff_doubles_up_to_five_minutes() -> None:
    assert [backoff_s(n) for n in (1, 2, 3, 9, 10, 5000)] == [1, 2, 4, 256, BACKOFF_LIMIT_S, BACKOFF_LIMIT_S]


class Node:
    """The parts around Replicas, and a few looks at it."""

    def __init__(self) -> None:
        self.engine = FakeEngine("echo")
        self.time = FakeTime()
        self.probe = FakeProbe()
        self.refusals: dict[str, str] = {}
        self.exits: list[Exit] = []
        self.daemon = self.new_daemon()
        self.task: asyncio.Task[None] | None = None

    def new_daemon(self) -> Replicas:
        replicas = Replicas(
            self.engine,
            may_start=lambda a: self.refusals.get(a.replica_id, ""),
            blind=self.engine.blind,
            probe=self.probe,
            monotonic=self.time.monotonic,
            sleep=self.time.sleep,
        )
        replicas.on_exit(self.exits.append)
        return replicas

    async def run(self) -> None:
        self.task = asyncio.create_task(self.daemon.run())
        await settle()

    async def end(self) -> None:
        if self.task:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)

    async def restart(self) -> None:
        await self.end()
        self.daemon = self.new_daemon()
        await self.run()

    async def apply(self, *assignments: object) -> None:
        self.daemon.apply(assignments)  # type: ignore[arg-type]
        await settle()

    def report(self, replica_id: str = "r-a") -> ReplicaReport:
        return {r.replica_id: r for r in self.daemon.reports()}[replica_id]


@pytest_asyncio.fixture
async def node() -> AsyncIterator[Node]:
    node = Node()
    await node.run()
    yield node
    await node.end()


async def test_a_replica_is_pulled_started_probed_and_ready(node: Node) -> None:
    await node.apply(replace(A, image="big", concurrency=3))
    assert node.report().state is State.PULLING
    node.engine.pulling[0].progress(50)
    assert (node.report().progress, node.report().capacity) == (45, 0)
    node.probe.missing["10.0.0.1"] = "port 8080: connection refused"
    node.engine.pulling[0].end.set_result("sha256:big")
    await settle()
    assert node.report().state is State.STARTING
    assert node.report().message == "waiting until it is ready: port 8080: connection refused"
    assert node.daemon.address("r-a", 8080) is None
    node.probe.missing.clear()
    await node.time.advance(1)
    assert node.report() == ReplicaReport("r-a", State.READY, 100, "", 3, 0, "h1", "sha256:big")
    assert node.daemon.address("r-a", 8080) == ("10.0.0.1", 8080)
    assert node.daemon.address("r-a", 8081) is None


async def test_every_change_is_told(node: Node) -> None:
    seen = node.daemon.version
    await node.apply(A)
    assert await node.daemon.changed(seen) > seen
    seen = node.daemon.version
    waiter = asyncio.create_task(node.daemon.changed(seen))
    await settle()
    assert not waiter.done()
    node.engine.kill("r-a")
    await settle()
    assert await waiter > seen


async def test_nothing_is_stopped_before_the_control_plane_has_spoken() -> None:
    node = Node()
    node.engine.put(A)
    await node.run()
    await node.daemon.listed()
    assert node.report().state is State.STARTING
    assert "found after a restart" in node.report().message
    await node.apply()
    assert node.engine.stopped == ["r-a"]
    assert node.daemon.reports() == ()
    await node.end()


async def test_a_running_container_is_adopted_not_restarted(node: Node) -> None:
    await node.apply(A)
    assert node.engine.started == ["r-a"]
    await node.restart()
    await node.apply(A)
    assert node.report().state is State.READY
    assert node.daemon.address("r-a", 8080) == ("10.0.0.1", 8080)
    assert node.engine.started == ["r-a"]
    assert node.engine.stopped == []


async def test_a_container_that_ended_while_the_daemon_was_away_backs_off_with_its_history(node: Node) -> None:
    node.engine.put(A, restarts=3)
    node.engine.kill("r-a", 3)
    await node.restart()
    await node.apply(A)
    assert node.report().state is State.BACKOFF
    assert "next start after 8 s: the container exited with code 3" in node.report().message
    await node.time.advance(8)
    assert (node.report().state, node.report().restarts) == (State.READY, 4)


async def test_a_container_made_but_never_started_is_made_anew_at_once(node: Node) -> None:
    node.engine.put(A, started=False)
    await node.restart()
    await node.apply(A)
    assert (node.report().state, node.report().restarts) == (State.READY, 0)


async def test_another_spec_replaces_the_container(node: Node) -> None:
    await node.apply(A)
    await node.apply(replace(A, spec_hash="h9", image="echo"))
    assert node.engine.stopped == ["r-a"]
    assert node.engine.there["r-a"].spec_hash == "h9"
    assert node.report().state is State.READY


async def test_draining_takes_nothing_new_and_keeps_the_address(node: Node) -> None:
    await node.apply(A)
    await node.apply(replace(A, draining=True))
    assert (node.report().state, node.report().capacity, node.report().message) == (State.READY, 0, "draining")
    assert node.daemon.address("r-a", 8080)
    await node.apply(A)
    assert node.report().capacity == 1
    assert node.engine.started == ["r-a"]


async def test_a_container_that_exits_is_restarted_with_backoff(node: Node) -> None:
    await node.apply(A)
    node.engine.last_words["r-a"] = "no model\n"
    for failures in (1, 2, 3):
        node.engine.kill("r-a", 3, ran_s=2)
        await settle()
        report = node.report()
        assert report.state is State.BACKOFF
        assert report.message == (
            f"next start after {2 ** (failures - 1)} s: "
            "the container exited with code 3 after 2 s; its last lines:\nno model"
        )
        assert node.daemon.address("r-a", 8080) is None
        await node.time.advance(2 ** (failures - 1) - 0.1)
        assert node.report().state is State.BACKOFF
        await node.time.advance(0.2)
        assert (node.report().state, node.report().restarts) == (State.READY, failures)
        assert node.report().message == f"restarted {failures} times"
    assert [e.code for e in node.exits] == [3, 3, 3]


async def test_backoff_begins_anew_after_ten_minutes_of_health(node: Node) -> None:
    await node.apply(A)
    for ran_s in (1, 1, 1, HEALTHY_S):
        node.engine.kill("r-a", 1, ran_s=ran_s)
        await settle()
        message = node.report().message
        await node.time.advance(BACKOFF_LIMIT_S)
    assert message.startswith("next start after 1 s")


@pytest.mark.parametrize(
    ("how", "words", "outside"),
    [
        ({"code": 0}, "exited with code 0", False),
        ({"code": 3}, "exited with code 3", False),
        ({"code": 139}, "was ended by SIGSEGV", False),
        ({"code": 137}, "was ended by SIGKILL from outside", True),
        ({"code": 143}, "was ended by SIGTERM from outside", True),
        ({"code": 137, "out_of_memory": True}, "ran out of memory (its limit is 1 GiB)", False),
        ({"code": None}, "was removed by somebody else than this daemon", True),
        ({"code": 255}, "exited with code 255", False),
    ],
)
async def test_every_end_has_its_own_words(node: Node, how: dict[str, int], words: str, outside: bool) -> None:
    await node.apply(A)
    node.engine.kill("r-a", **how)  # type: ignore[arg-type]
    await settle()
    assert f"the container {words} after 1 s" in node.report().message
    assert node.exits[0].from_outside is outside


async def test_an_end_while_starting_says_so(node: Node) -> None:
    node.probe.missing["10.0.0.1"] = "port 8080: connection refused"
    await node.apply(A)
    node.engine.kill("r-a", 137, out_of_memory=True)
    await settle()
    assert (
        "ran out of memory (its limit is 1 GiB) after 1 s before it was ready; it wrote nothing"
        in node.report().message
    )


async def test_a_removed_container_is_made_anew(node: Node) -> None:
    await node.apply(A)
    node.engine.remove("r-a")
    await settle()
    assert "removed by somebody else" in node.report().message
    await node.time.advance(1)
    assert node.report().state is State.READY


@pytest.mark.parametrize(
    ("readiness", "words"),
    [
        (Readiness(8080, "", 60), "port 8080 never opened within 60 s; its last lines:\nwaiting"),
        (
            Readiness(8080, "/ok", 60),
            "GET /ok on port 8080 was never answered below 500 within 60 s (last: no); its last lines:\nwaiting",
        ),
    ],
)
async def test_one_that_is_never_ready_is_given_up_and_tried_again(
    node: Node, readiness: Readiness, words: str
) -> None:
    node.probe.missing["10.0.0.1"] = "no"
    node.engine.last_words["r-a"] = "waiting"
    await node.apply(replace(A, readiness=readiness))
    await node.time.advance(59)
    assert node.report().state is State.STARTING
    await node.time.advance(2)
    assert node.report().state is State.BACKOFF
    assert node.report().message == f"next start after 1 s: {words}"
    assert node.engine.stopped == ["r-a"]
    assert node.exits == []
    await node.time.advance(1)
    assert node.report().state is State.READY


async def test_an_image_that_is_missing_is_looked_for_again(node: Node) -> None:
    await node.apply(replace(A, image="missing/image"))
    assert node.report().state is State.BACKOFF
    assert "There is no such image" in node.report().message
    assert node.report().restarts == 0
    await node.time.advance(1)
    assert node.report().message.startswith("next start after 2 s")


async def test_one_that_fails_does_not_hurt_the_others(node: Node) -> None:
    node.engine.start_errors["r-a"] = DiskFull()
    await node.apply(A, B)
    assert (node.report("r-a").state, node.report("r-b").state) == (State.BACKOFF, State.READY)
    assert "disk" in node.report("r-a").message
    del node.engine.start_errors["r-a"]
    await node.time.advance(1)
    assert node.report("r-a").state is State.READY


async def test_a_fault_of_our_own_is_one_replicas_trouble(node: Node) -> None:
    node.engine.start_errors["r-a"] = RuntimeError("bug")  # type: ignore[assignment]
    await node.apply(A, B)
    assert (node.report("r-a").state, node.report("r-b").state) == (State.BACKOFF, State.READY)
    assert "the node daemon failed at it" in node.report("r-a").message


async def test_replicas_of_one_image_share_a_pull(node: Node) -> None:
    await node.apply(replace(A, image="big"), replace(B, image="big"))
    assert len(node.engine.pulling) == 1
    node.engine.pulling[0].progress(60)
    node.engine.pulling[0].progress(30)
    assert node.report("r-a").progress == node.report("r-b").progress == 54
    # One that is taken away does not end it for the other; a third one joins where it stands.
    await node.apply(replace(B, image="big"), assignment("r-c", image="big"))
    assert node.report("r-c").progress == 54
    node.engine.pulling[0].end.set_result("sha256:big")
    await settle()
    assert (node.report("r-b").state, node.report("r-c").state) == (State.READY, State.READY)


async def test_a_pull_fails_for_all_who_share_it_and_is_begun_anew(node: Node) -> None:
    await node.apply(replace(A, image="big"), replace(B, image="big"))
    node.engine.pulling[0].end.set_exception(PullFailed("the registry says no"))
    await settle()
    assert "the registry says no" in node.report("r-a").message
    assert "the registry says no" in node.report("r-b").message
    await node.time.advance(1)
    assert len(node.engine.pulling) == 1


async def test_a_pull_that_nobody_wants_ends(node: Node) -> None:
    await node.apply(replace(A, image="big"))
    assert node.engine.pulling
    await node.apply()
    assert not node.engine.pulling
    assert node.daemon.reports() == ()


async def test_other_credentials_are_another_pull(node: Node) -> None:
    await node.apply(
        replace(A, image="big", registry=Credentials("a", "1")), replace(B, image="big", registry=Credentials("b", "2"))
    )
    assert len(node.engine.pulling) == 2
    assert "1" not in repr(node.engine.pulling[0].credentials)


async def test_a_gpu_that_may_not_be_used_is_not_started_on(node: Node) -> None:
    node.refusals["r-a"] = "GPU-1 holds 3.0 GiB of a process that is not ours"
    await node.apply(replace(A, gpu_ids=("GPU-1",)))
    assert "GPU-1 holds 3.0 GiB" in node.report().message
    assert node.engine.started == []
    assert node.daemon.gpu_ids("r-a") == ("GPU-1",)
    node.refusals.clear()
    await node.time.advance(1)
    assert node.report().state is State.READY


async def test_engine_down_is_said_of_all_and_recovered_from(node: Node) -> None:
    await node.apply(A)
    node.engine.go_down()
    await settle()
    await node.apply(A, B)
    # What runs may go on, but takes nothing new.
    assert (node.report("r-a").state, node.report("r-a").message) == (State.BACKOFF, "the engine does not answer")
    assert node.report("r-a").capacity == 0
    assert (node.report("r-b").state, node.report("r-b").message) == (State.BACKOFF, "the engine does not answer")
    # As an engine's restart does, its containers have ended.
    node.engine.come_up()
    node.engine.kill("r-a", 137)
    await node.time.advance(1)
    assert "the container ended while the engine was down (code 137)" in node.report("r-a").message
    assert node.exits[-1].from_outside
    await node.time.advance(1)
    assert (node.report("r-a").state, node.report("r-b").state) == (State.READY, State.READY)


async def test_containers_that_outlive_their_engine_are_not_restarted(node: Node) -> None:
    await node.apply(A)
    node.engine.go_down()
    await node.time.advance(60)
    node.engine.come_up()
    await node.time.advance(60)
    assert (node.report().state, node.report().message, node.report().capacity) == (State.READY, "", 1)
    assert node.engine.started == ["r-a"]


async def test_an_engine_that_was_away_must_say_anew_whose_address_it_is(node: Node) -> None:
    await node.apply(A, B)
    at = node.daemon.address("r-a", 8080)
    assert at == ("10.0.0.1", 8080)
    node.engine.go_down()
    await settle()
    assert node.daemon.address("r-a", 8080) is None
    # It comes back and gives the address to another's container; every port answers all the while.
    ended, other = node.engine.there["r-a"], node.engine.there["r-b"]
    node.engine.there["r-a"] = replace(ended, addresses={}, exit=Exit("r-a", 137))
    node.engine.there["r-b"] = replace(other, addresses={8080: at})
    node.engine.come_up()
    node.engine.holds_lists = True
    await node.time.advance(2)
    assert (node.daemon.address("r-a", 8080), node.daemon.address("r-b", 8080)) == (None, None)
    node.engine.holds_lists = False
    for arrives in node.engine.on_the_way:
        arrives.set()
    await settle()
    assert (node.daemon.address("r-a", 8080), node.daemon.address("r-b", 8080)) == (None, at)
    await node.time.advance(2)
    assert node.daemon.address("r-a", 8080) == ("10.0.0.3", 8080)


async def test_a_list_made_before_the_engine_was_away_confirms_nothing(node: Node) -> None:
    await node.apply(A)
    node.engine.holds_lists = True
    node.engine.look()
    await settle()
    node.engine.break_stream()
    await settle()
    assert (node.daemon.address("r-a", 8080), node.report().capacity) == (None, 0)
    # Its events are heard again, and only now the list arrives.
    await node.time.advance(1)
    node.engine.on_the_way[0].set()
    await settle()
    assert (node.daemon.address("r-a", 8080), node.report().capacity) == (None, 0)
    node.engine.on_the_way[1].set()
    await settle()
    assert (node.daemon.address("r-a", 8080), node.report().capacity) == (("10.0.0.1", 8080), 1)
    assert node.engine.started == ["r-a"]


async def test_a_container_started_while_nobody_watches_waits_to_be_confirmed(node: Node) -> None:
    node.engine.break_stream()
    await settle()
    await node.apply(A)
    assert (node.engine.started, node.daemon.address("r-a", 8080)) == (["r-a"], None)
    await node.time.advance(1)
    assert node.daemon.address("r-a", 8080) == ("10.0.0.1", 8080)


async def test_an_engine_that_answers_nothing_but_still_stands_changes_no_address(node: Node) -> None:
    await node.apply(A)
    node.engine.start_errors["r-b"] = EngineDown("no answer within 60 s")
    node.engine.holds_lists = True
    await node.apply(A, B)
    assert (node.report("r-a").message, node.report("r-a").capacity) == ("no answer within 60 s", 1)
    assert node.daemon.address("r-a", 8080) == ("10.0.0.1", 8080)
    # It tells of no ends any more: the port does.
    node.probe.missing["10.0.0.1"] = "port 8080: connection refused"
    await node.time.advance(1)
    assert (node.report("r-a").state, node.report("r-a").capacity) == (State.BACKOFF, 0)
    node.probe.missing.clear()
    await node.time.advance(1)
    assert (node.report("r-a").state, node.report("r-a").capacity) == (State.READY, 1)


async def test_engine_down_from_the_start() -> None:
    node = Node()
    node.engine.go_down("no socket")
    await node.run()
    await node.daemon.listed()
    await node.apply(A)
    assert node.report() == ReplicaReport("r-a", State.ASSIGNED, message="no socket")
    node.engine.come_up()
    await node.time.advance(2)
    assert node.report().state is State.READY
    await node.end()


async def test_a_stop_is_tried_until_it_is_done(node: Node) -> None:
    await node.apply(A)
    node.engine.go_down()
    await node.apply()
    assert (node.report().state, node.report().message) == (State.STOPPING, "the engine does not answer")
    node.engine.come_up()
    await node.time.advance(1)
    assert node.engine.stopped == ["r-a"]
    assert node.daemon.reports() == ()


async def test_a_lost_event_is_made_good(node: Node) -> None:
    await node.apply(A)
    node.engine._looks.clear()
    node.engine.kill("r-a")
    await settle()
    assert node.report().state is State.READY
    node.engine._looks.append(lambda: None)
    await node.time.advance(31)
    assert node.report().restarts == 1


async def test_who_asks_for_an_exit_waits_for_the_engine_to_tell(node: Node) -> None:
    await node.apply(A)
    since = node.time.now
    asked = asyncio.create_task(node.daemon.exited("r-a", since=since, within_s=2))
    await node.time.advance(0.5)
    assert not asked.done()
    node.engine.kill("r-a", 3)
    await settle()
    known = await asked
    assert known is not None
    assert (known.code, known.at) == (3, since + 0.5)
    # One of before is no answer, and none comes.
    asked = asyncio.create_task(node.daemon.exited("r-a", since=node.time.now + 1, within_s=2))
    await node.time.advance(2)
    assert await asked is None


async def test_two_with_shares_of_one_gpu_run_on_it_at_once_and_end_apart(node: Node) -> None:
    shares = [replace(one, gpu_ids=("GPU-1",), gpu_share=500) for one in (A, B)]
    await node.apply(*shares)
    assert [report.state for report in node.daemon.reports()] == [State.READY, State.READY]
    assert node.daemon.gpu_ids("r-a") == node.daemon.gpu_ids("r-b") == ("GPU-1",)
    node.engine.kill("r-a")
    await settle()
    assert [report.state for report in node.daemon.reports()] == [State.BACKOFF, State.READY]
    await node.time.advance(1)
    assert [report.state for report in node.daemon.reports()] == [State.READY, State.READY]


async def test_a_container_that_has_lost_sight_of_its_gpus_is_made_anew(node: Node) -> None:
    await node.apply(replace(A, gpu_ids=("GPU-1",)), B)
    node.engine.sightless = {"r-a": "it may no longer use nvidia0", "r-b": "it has none", "r-x": "not ours"}
    await node.time.advance(SIGHT_S)
    node.engine.sightless.clear()
    (ended, *_) = node.exits
    assert (ended.replica_id, ended.from_outside) == ("r-a", True)
    assert ended.words == (
        "was ended by this daemon: it has lost sight of its GPUs (it may no longer use nvidia0), as after a reload of "
        "systemd; it is made anew"
    )
    assert node.report("r-a").state is State.BACKOFF
    assert ended.words in node.report("r-a").message
    # It no longer works for nobody.
    assert node.engine.stopped == ["r-a", "r-b"]
    await node.time.advance(1)
    assert (node.report("r-a").state, node.report("r-a").restarts) == (State.READY, 1)


async def test_without_gpus_nobody_is_asked_whether_they_are_seen(node: Node) -> None:
    await node.apply(A)
    node.engine.sightless = {"r-a": "what?"}
    await node.time.advance(SIGHT_S)
    assert node.exits == []


async def test_what_is_ended_for_the_customers_own_doing_is_the_customers(node: Node) -> None:
    await node.apply(A)
    node.daemon.end("r-a", "its volumes hold too much", customers=True)
    node.daemon.end("r-a", "again", customers=False)
    node.daemon.end("r-none", "is not there", customers=False)
    await settle()
    assert [(ended.why, ended.from_outside) for ended in node.exits] == [("its volumes hold too much", False)]
    assert node.daemon.address("r-a", 8080) is None
    await node.time.advance(1)
    assert node.report().state is State.READY


async def test_what_should_be_here_and_what_still_is(node: Node) -> None:
    assert node.daemon.assignments() is None
    await node.apply(A, B)
    assert {one.replica_id for one in node.daemon.assignments() or ()} == {"r-a", "r-b"}
    await node.apply(B)
    assert {one.replica_id for one in node.daemon.assignments() or ()} == {"r-b"}


async def test_that_the_disk_is_full_is_told_each_time(node: Node) -> None:
    told: list[str] = []
    node.daemon.on_full(lambda: told.append("full"))
    node.engine.start_errors = {"r-a": DiskFull(), "r-b": GpuMissing()}
    await node.apply(A, B)
    assert told == ["full"]
    await node.time.advance(1)
    assert told == ["full", "full"]


async def test_stopping_all_leaves_nothing(node: Node) -> None:
    await node.apply(A, B)
    await node.end()
    assert node.engine.there.keys() == {"r-a", "r-b"}
    await node.daemon.stop_all(within_s=5)
    assert node.engine.there == {}


async def test_distinct_errors_have_distinct_words(node: Node) -> None:
    errors = [DiskFull(), GpuMissing(), StartFailed("exec: no such file")]
    for error in errors:
        node.engine.start_errors["r-a"] = error
        await node.apply(replace(A, spec_hash=str(error)))
        assert str(error) in node.report().message
