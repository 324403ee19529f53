"""What the dispatcher promises when attempts fail, nodes vanish and come back, and the control plane is killed."""

from controlplane import explain
from controlplane.dispatcher import HELD_AFTER_S, RESULT_GRACE_S
from controlplane.ejection import EJECTION_S, IN_A_ROW, PAUSE_S
from controlplane.errors import Unavailable
from controlplane.model import Cause, Delivery, State
from controlplane.recovery import Graces
from controlplane.retries import PLATFORM_ATTEMPTS
from controlplane.slots import SILENCE_S
from tests.controlplane.fakes_dispatch import WS, FakeNode, World

GRACES = Graces()
#: Longer than any first backoff.
BACKOFF_S = 1.0


async def test_lost_node_reruns_repeatable_task_elsewhere(world: World) -> None:
    lost, other = world.node("n1", r1=1), world.node("n2", r2=0)
    future = world.submit()
    await world.settle()
    lost.disconnect()
    other.serve("r2")
    await world.advance(GRACES.reconnect_s - 0.1)
    assert other.given == []
    await world.advance(0.2)
    await world.advance(BACKOFF_S)
    await other.has("t1.2")
    other.answer("t1.2")
    assert (await future).attempt == 2
    first, second = await world.store.attempts("t1")
    assert (first.failure_reason, first.cause, first.gpu_us) == ("NODE_LOST", Cause.PLATFORM, 0)
    assert second.failure_reason == ""


async def test_blip_costs_nothing(world: World) -> None:
    node = world.node("n1", r1=1)
    future = world.submit()
    await world.settle()
    node.disconnect()
    await world.advance(3)
    node.connect()
    await world.advance(GRACES.reconnect_s)
    node.answer("t1.1")
    view = await future
    assert (view.state, view.attempt) == (State.COMPLETED, 1)
    assert node.given == ["t1.1"]


async def test_answer_given_while_the_link_was_down_is_taken_on_return(world: World) -> None:
    node = world.node("n1", r1=1)
    future = world.submit()
    node.disconnect()
    node.answer("t1.1", b"spooled")
    await world.advance(5)
    node.connect()
    view = await future
    assert view.response is not None
    assert view.response.body == b"spooled"
    assert node.acked == ["t1.1"]


async def test_late_result_of_a_given_up_attempt_changes_nothing(world: World) -> None:
    lost, other = world.node("n1", r1=1), world.node("n2", r2=0)
    future = world.submit()
    await world.settle()
    lost.disconnect()
    other.serve("r2")
    await world.advance(GRACES.reconnect_s)
    await world.advance(BACKOFF_S)
    await other.has("t1.2")
    lost.answer("t1.1", b"late")
    lost.connect()
    await world.settle()
    assert lost.acked == ["t1.1"]
    assert await world.state("t1") is State.RUNNING
    other.answer("t1.2", b"right")
    view = await future
    assert view.response is not None
    assert view.response.body == b"right"


async def test_given_up_attempt_that_still_runs_is_cancelled_on_return_and_keeps_its_slot(world: World) -> None:
    node = world.node("n1", r1=1)
    world.submit()
    await world.settle()
    node.disconnect()
    await world.advance(GRACES.reconnect_s)
    await world.advance(BACKOFF_S)
    node.connect()
    await world.settle()
    assert node.cancelled == ["t1.1"]
    assert node.given == ["t1.1"]
    node.heed_cancels()
    await node.has("t1.2")


async def test_what_a_node_does_not_hold_on_return_was_never_sent(world: World) -> None:
    node = world.node("n1", r1=1)
    node.break_link()
    world.submit(world.new(repeatable=False))
    await world.settle()
    node.connect()
    await world.settle()
    await world.advance(BACKOFF_S)
    await node.has("t1.2")
    (attempt,) = await world.store.attempts("t1")
    assert (attempt.delivery, attempt.cause) == (Delivery.NOT_SENT, Cause.PLATFORM)


async def test_start_that_never_left_runs_elsewhere_at_once(world: World) -> None:
    node, other = world.node("n1", r1=1), world.node("n2")
    node.break_link()
    world.submit(world.new(repeatable=False))
    node.disconnect()
    await world.settle()
    other.serve("r2")
    await world.advance(BACKOFF_S)
    await other.has("t1.2")


async def test_sent_and_not_repeatable_is_held_for_its_node(world: World) -> None:
    node, other = world.node("n1", r1=1), world.node("n2", r2=0)
    future = world.submit(world.new(repeatable=False))
    await world.settle()
    world.dispatcher.sent("n1", "t1.1")
    node.disconnect()
    other.serve("r2")
    world.dispatcher.node_lost("n1")
    await world.advance(GRACES.hold_s - 1)
    assert not future.done()
    node.answer("t1.1", b"in time")
    node.connect()
    view = await future
    assert view.response is not None
    assert view.response.body == b"in time"
    assert other.given == []


async def test_outcome_of_a_held_task_is_unknown_when_its_node_stays_away(world: World) -> None:
    node, other = world.node("n1", r1=1), world.node("n2", r2=0)
    future = world.submit(world.new(repeatable=False))
    await world.settle()
    node.disconnect()
    other.serve("r2")
    await world.advance(GRACES.hold_s)
    failure = (await future).failure
    assert failure is not None
    assert failure.reason == "OUTCOME_UNKNOWN"
    assert other.given == []


async def test_word_that_a_node_is_lost_spares_the_grace(world: World) -> None:
    node, other = world.node("n1", r1=1), world.node("n2", r2=0)
    world.submit()
    await world.settle()
    world.dispatcher.node_lost("n1")
    await world.advance(BACKOFF_S)
    assert world.dispatcher.attempt_is_current("n1", "t1.1")  # it is connected
    node.disconnect()
    other.serve("r2")
    world.dispatcher.node_lost("n1")
    await world.advance(0)
    await world.advance(BACKOFF_S)
    await other.has("t1.2")


async def test_all_nodes_silent_at_once_reschedules_nothing(world: World) -> None:
    nodes = [world.node(f"n{n}", **{f"r{n}": 1}) for n in range(1, 4)]
    futures = [world.submit() for _ in nodes]
    await world.settle()
    for node in nodes:
        node.disconnect()
    await world.advance(SILENCE_S - 10)
    for node in nodes:
        node.connect()
        for attempt_id in list(node.running):
            node.answer(attempt_id)
    for future in futures:
        assert (await future).attempt == 1


async def test_who_stops_gives_no_node_up_that_it_leaves(world: World) -> None:
    node, other = world.node("n1", r1=1), world.node("n2", r2=0)
    future = world.submit()
    await world.settle()
    await world.dispatcher.stop()
    node.disconnect()
    other.serve("r2")
    await world.advance(GRACES.reconnect_s)
    assert await world.store.attempts("t1") == []
    assert isinstance(future.exception(), Unavailable)


async def test_silence_of_all_nodes_is_believed_in_the_end(world: World) -> None:
    nodes = [world.node(f"n{n}", **{f"r{n}": 1}) for n in range(1, 3)]
    world.submit()
    await world.settle()
    for node in nodes:
        node.disconnect()
    await world.advance(SILENCE_S)
    await world.advance(1)
    assert await world.state("t1") is State.QUEUED


async def test_newer_link_wins_and_the_end_of_the_older_means_nothing(world: World) -> None:
    node = world.node("n1", r1=1)
    older = node.break_link()
    node.connect()
    world.dispatcher.node_down("n1", older)
    world.submit()
    assert node.given == ["t1.1"]
    await world.settle()


async def test_failed_attempt_runs_again_after_a_backoff_on_another_replica(world: World) -> None:
    first, other = world.node("n1", r1=1), world.node("n2", r2=1)
    world.submit()
    await world.settle()
    first.fail("t1.1", "CONNECT_FAILED", delivery=Delivery.NOT_SENT)
    await world.settle()
    view = await world.dispatcher.query("t1")
    assert view.waiting_for == "attempt 2 begins in 0.1 s; the last one failed: It was CONNECT_FAILED."
    assert first.acked == ["t1.1"]
    assert other.given == []
    await world.advance(0.1)
    await other.has("t1.2")


async def test_customers_failures_use_up_the_attempts(world: World) -> None:
    node = world.node("n1", r1=1)
    future = world.submit()
    for number in range(1, 4):
        await world.settle()
        await world.advance(100)
        await node.has(f"t1.{number}")
        world.clock.advance(100)
        node.fail(f"t1.{number}", "CONTAINER_EXITED", cause=Cause.CUSTOMER)
    failure = (await future).failure
    assert failure is not None
    assert failure.reason == "ATTEMPTS_USED_UP"
    assert failure.message == "3 attempts failed; the last one: It was CONTAINER_EXITED."
    # Each is the customer's, and each had its GPU for 100 s.
    row = await world.store.task("t1")
    assert row is not None
    assert row.gpu_us == sum(attempt.gpu_us for attempt in await world.store.attempts("t1")) > 0


async def test_platforms_failures_use_none_of_the_customers_attempts_and_have_a_bound(world: World) -> None:
    node = world.node("n1", r1=1)
    future = world.submit()
    for number in range(1, PLATFORM_ATTEMPTS + 1):
        assert not future.done()
        await world.settle()
        await world.advance(31)
        await node.has(f"t1.{number}")
        node.fail(f"t1.{number}")
    failure = (await future).failure
    assert failure is not None
    assert (failure.reason, failure.cause) == ("ATTEMPTS_USED_UP", Cause.PLATFORM)
    row = await world.store.task("t1")
    assert row is not None
    assert row.gpu_us == 0


async def test_task_that_takes_down_its_container_on_two_nodes_takes_no_third(world: World) -> None:
    first, second, third = (world.node(f"n{n}", **{f"r{n}": 1}) for n in range(1, 4))
    future = world.submit()
    await world.settle()
    first.fail("t1.1", "CONTAINER_EXITED", cause=Cause.CUSTOMER)
    await world.settle()
    await world.advance(BACKOFF_S)
    await second.has("t1.2")
    second.fail("t1.2", "CONTAINER_EXITED", cause=Cause.CUSTOMER)
    failure = (await future).failure
    assert failure is not None
    assert failure.reason == "CONTAINER_EXITED"
    assert third.given == []


async def test_result_from_a_node_that_was_not_given_the_attempt_changes_nothing(world: World) -> None:
    node, liar = world.node("n1", r1=1), world.node("n2")
    world.submit()
    await world.settle()
    liar.running["t1.1"] = node.running["t1.1"]
    liar.answer("t1.1", b"a lie")
    await world.settle()
    assert await world.state("t1") is State.RUNNING
    assert world.dispatcher.running_on("r1") == 1
    assert not world.dispatcher.attempt_is_current("n2", "t1.1")


async def test_result_given_twice_is_one_end(world: World) -> None:
    node = world.node("n1", r1=1)
    future = world.submit()
    await world.settle()
    node.answer("t1.1")
    node.connect()  # sends it again, before it is on disk
    await future
    assert node.ended == {}
    assert len(await world.store.attempts("t1")) == 1


async def test_attempt_that_heartbeats_do_not_mention_for_long_is_lost(world: World) -> None:
    node = world.node("n1", r1=1)
    world.submit()
    await world.settle()
    node.running.clear()
    world.dispatcher.held("n1", [])
    assert world.dispatcher.running_on("r1") == 1  # it may be on its way
    await world.advance(HELD_AFTER_S + 1)
    world.dispatcher.held("n1", [])
    await world.settle()
    await world.advance(BACKOFF_S)
    await node.has("t1.2")


async def test_slot_of_a_given_up_attempt_is_freed_by_a_heartbeat_if_no_result_comes(world: World) -> None:
    node = world.node("n1", r1=1)
    world.submit()
    await world.settle()
    await world.dispatcher.cancel("t1")
    node.running.clear()
    await world.advance(HELD_AFTER_S + 1)
    world.dispatcher.held("n1", [])
    assert world.dispatcher.running_on("r1") == 0


async def test_last_results_of_a_replica_that_is_gone_are_awaited(world: World) -> None:
    node = world.node("n1", r1=2, r2=0)
    answered, lost = world.submit(), world.submit()
    await world.settle()
    world.dispatcher.replica_gone("r1")
    node.answer("t1.1")
    assert (await answered).state is State.COMPLETED
    await world.advance(RESULT_GRACE_S)
    node.serve("r2")
    await world.advance(BACKOFF_S)
    await node.has("t2.2")
    node.answer("t2.2")
    assert (await lost).attempt == 2
    assert (await world.store.attempts("t2"))[0].failure_reason == "REPLICA_LOST"


async def test_slot_that_vanishes_while_the_start_is_written_is_no_attempt_of_the_customers(world: World) -> None:
    await world.submit(wait_s=0)
    node = world.node("n1", r1=1)
    node.disconnect()
    await world.settle()
    assert node.given == []
    node.connect()
    await world.advance(BACKOFF_S)
    await node.has("t1.2")


# kill -9 of the control plane.


async def test_queued_tasks_queue_again_in_order_after_a_restart(world: World) -> None:
    for _ in range(3):
        await world.submit(wait_s=0)
    await world.restart()
    waiting = [world.dispatcher.waiting(f"t{n}") for n in (1, 2, 3)]
    assert [view and view.queue_position for view in waiting] == [0, 1, 2]
    node = world.node("n1", r1=3)
    await node.has("t1.1", "t2.1", "t3.1")
    assert node.running["t1.1"].request.body == b"body"


async def test_running_tasks_are_resumed_and_not_rerun_after_a_restart(world: World) -> None:
    node = world.node("n1", r1=2)
    for _ in range(2):
        await world.submit(wait_s=0)
    await world.kill()
    node.answer("t1.1", b"while you were away")
    world.clock.advance(600)
    await world.begin()
    node.connect()
    world.dispatcher.set_capacity("r1", WS, "n1", 2)
    node.answer("t2.1")
    for number in (1, 2):
        view = await world.dispatcher.query(f"t{number}", wait_s=60)
        assert (view.state, view.attempt) == (State.COMPLETED, 1)
    await world.settle()
    assert node.given == ["t1.1", "t2.1"]
    assert sorted(node.acked) == ["t1.1", "t2.1"]


async def test_replica_is_not_overfilled_by_what_runs_there_since_before_a_restart(world: World) -> None:
    node = world.node("n1", r1=2)
    await world.submit(wait_s=0)
    await world.submit(wait_s=0)
    await world.dispatcher.cancel("t2")  # the node has not heeded it when the control plane dies
    await world.restart()
    await world.submit(wait_s=0)
    node.connect()
    await world.settle()
    assert node.given == ["t1.1", "t2.1"]
    assert node.cancelled == ["t2.1", "t2.1"]
    node.heed_cancels()
    await node.has("t3.1")


async def test_attempt_that_never_reached_its_node_before_a_restart_runs_again(world: World) -> None:
    node = world.node("n1", r1=1)
    node.break_link()
    await world.submit(wait_s=0)
    await world.restart()
    node.connect()
    await world.settle()
    await world.advance(BACKOFF_S)
    await node.has("t1.2")


async def test_node_that_does_not_come_back_after_a_restart_is_lost_after_a_grace(world: World) -> None:
    world.node("n1", r1=1)
    await world.submit(wait_s=0)
    await world.restart()
    other = world.node("n2", r2=1)
    # That it has not reported yet says little.
    world.dispatcher.node_lost("n1")
    await world.advance(GRACES.start_s - 1)
    assert other.given == []
    await world.advance(1)
    await world.advance(BACKOFF_S)
    await other.has("t1.2")


async def test_time_without_a_control_plane_does_not_count_against_a_task(world: World) -> None:
    world.fleet.add_workspace(WS, queue_time_s=60, total_time_s=60)
    await world.submit(wait_s=0)
    await world.kill()
    world.clock.advance(3600)
    await world.begin()
    await world.advance(GRACES.start_s - 1)
    assert await world.state("t1") is State.QUEUED
    await world.advance(1)
    assert await world.state("t1") is State.FAILED


async def test_history_of_a_task_outlives_a_restart(world: World) -> None:
    node = world.node("n1", r1=1)
    await world.submit(wait_s=0)
    for number in range(1, 4):
        await world.restart()
        node.connect()
        await world.advance(100)
        await node.has(f"t1.{number}")
        node.fail(f"t1.{number}", "CONTAINER_EXITED", cause=Cause.CUSTOMER)
        await world.settle()
    row = await world.store.task("t1")
    assert row is not None
    assert (row.state, row.failure_reason) == (State.FAILED, "ATTEMPTS_USED_UP")


async def test_tasks_of_a_workspace_that_was_deleted_meanwhile_fail(world: World) -> None:
    await world.submit(wait_s=0)
    world.fleet.delete_workspace(WS)
    await world.restart()
    await world.settle()
    row = await world.store.task("t1")
    assert row is not None
    assert row.failure_reason == "WORKSPACE_DELETED"


async def test_unrecorded_start_is_a_stranger_that_is_cancelled(world: World) -> None:
    node = world.node("n1", r1=1)
    world.flaky.down = True
    world.submit().add_done_callback(lambda future: future.exception())
    assert node.given == ["t1.1"]
    node.break_link()
    await world.restart()
    node.connect()
    assert node.cancelled == ["t1.1"]
    node.heed_cancels()
    assert node.acked == ["t1.1"]
    world.submit()
    assert node.given == ["t1.1", "t2.1"]
    await world.settle()


# Grey failures.


async def fails(world: World, node: FakeNode, replica_id: str) -> None:
    """The next task there fails by the platform."""
    world.submit()
    await world.settle()
    given = [attempt for attempt, start in node.running.items() if start.replica_id == replica_id]
    assert given, "it was given nothing"
    node.fail(given[-1])
    await world.settle()


async def test_replica_that_fails_again_and_again_gets_nothing_for_a_while_and_then_one_task(world: World) -> None:
    bad = world.node("n1", r1=2)
    for _ in range(IN_A_ROW):
        await fails(world, bad, "r1")
    # The only one that serves is not ejected: it is paused for a second, and tried with one task.
    assert world.dispatcher.doubts(WS)["r1"].startswith("paused for 1 s after 3 failures in a row")
    await world.advance(PAUSE_S + BACKOFF_S)
    await bad.has("t1.2")
    assert list(bad.running) == ["t1.2"]
    # Now another can do its work.
    good = world.node("n2", r2=9)
    bad.fail("t1.2")
    await world.settle()
    words = "ejected for 30 s after 4 failures in a row: It was CONNECTION_CLOSED."
    assert world.dispatcher.doubts(WS) == {"r1": words}
    await world.advance(BACKOFF_S)
    await good.has("t1.3", "t2.2", "t3.2")
    for attempt_id in list(good.running):
        good.answer(attempt_id)
    await world.advance(EJECTION_S)
    assert world.dispatcher.doubts(WS)["r1"].startswith("on trial after 4 failures")
    world.dispatcher.set_capacity("r2", WS, "n2", 0)
    world.submit()
    world.submit()
    await world.settle()
    assert list(bad.running) == ["t4.1"]
    bad.answer("t4.1")
    await world.settle()
    assert world.dispatcher.doubts(WS) == {}


async def test_ejected_replica_is_tried_at_once_when_no_other_is_left(world: World) -> None:
    good = world.node("n2", r2=1)
    world.submit()
    bad = world.node("n1", r1=1)
    for _ in range(IN_A_ROW):
        await fails(world, bad, "r1")
    assert world.dispatcher.doubts(WS)["r1"].startswith("ejected")
    good.disconnect()
    await world.advance(BACKOFF_S)
    assert world.dispatcher.doubts(WS)["r1"].startswith("on trial")
    await bad.has("t2.2")


async def test_errors_that_come_fast_do_not_make_a_replica_look_fast(world: World) -> None:
    bad, good = world.node("n1", r1=1), world.node("n2", r2=1)
    for _ in range(5):
        world.submit()
        world.submit()
        await world.settle()
        for attempt_id in list(bad.running):
            bad.answer(attempt_id, status=500)
        for attempt_id in list(good.running):
            good.answer(attempt_id)
        await world.settle()
        if world.dispatcher.doubts(WS):
            break
    assert world.dispatcher.doubts(WS)["r1"].startswith("ejected for 30 s without a good answer")
    world.submit()
    world.submit()
    await world.settle()
    assert (len(bad.running), len(good.running)) == (0, 1)
    view = await world.dispatcher.query(f"t{world.numbers}")
    assert "Replica r1 is ejected for 30 s without a good answer" in view.waiting_for


async def test_what_an_outage_has_failed_is_run_again_little_by_little(world: World) -> None:
    node = world.node("n1", r1=40)
    futures = [world.submit() for _ in range(40)]
    await world.settle()
    for attempt_id in list(node.running):
        node.fail(attempt_id)
    await world.settle()
    view = await world.dispatcher.query("t40")
    assert "held back" in view.waiting_for
    again: list[int] = []
    for _ in range(100):
        await world.advance(1.0)
        again.append(len(node.given))
        for attempt_id in list(node.running):
            node.answer(attempt_id)
        await world.settle()
        if all(future.done() for future in futures):
            break
    # A fifth of them and ten more at once, the others soon after, and all in the end.
    assert again[1] < 40 + 20
    assert {(await future).state for future in futures} == {State.COMPLETED}


async def test_attempt_that_failed_keeps_how_the_replicas_stood_and_why_each_was_not_chosen(world: World) -> None:
    node = world.node("n1", r1=1)
    world.node("n2", r2=0)
    world.submit()
    world.submit()
    await world.settle()
    assert world.dispatcher.decision("t1") is not None
    assert world.dispatcher.decision("t2") is None
    node.fail("t1.1")
    await world.settle()
    node.answer("t2.1")
    await world.advance(BACKOFF_S)
    await node.has("t1.2")
    node.answer("t1.2")
    await world.settle()
    first, second = (explain.decode(one.decision_json) for one in await world.store.attempts("t1"))
    assert first is not None
    assert second is not None
    assert (first.subject, first.chosen) == ("attempt 1", "r1")
    assert [(one.id, one.name) for one in first.candidates] == [("r1", "name-of-n1"), ("r2", "name-of-n2")]
    assert first.refusals == {"it takes no tasks now": 1}
    assert "failed_before" in second.candidates[0].parts


async def test_attempt_that_was_answered_as_usual_keeps_the_words_alone(world: World) -> None:
    node = world.node("n1", r1=1)
    world.node("n2", r2=0)
    world.submit()
    node.answer("t1.1")
    await world.settle()
    (attempt,) = await world.store.attempts("t1")
    assert attempt.decision_json is None
    assert attempt.reason


async def test_what_waits_for_its_time_calls_for_no_replica(world: World) -> None:
    node = world.node("n1", r1=1)
    world.submit()
    await world.settle()
    node.fail("t1.1")
    await world.settle()
    load = world.dispatcher.load(WS)
    assert (load.queued, load.oldest_s, world.dispatcher.queued(WS)) == (0, 0.0, 1)
