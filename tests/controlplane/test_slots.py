"""What is free follows from what nodes say they hold, and from nothing else."""

import pytest

from controlplane.slots import SILENCE_END_S, Replica, Slots, Start

NOW = 1000.0


class Nowhere:
    """A link to nothing."""

    def start(self, start: Start) -> None: ...
    def cancel(self, attempt_id: str) -> None: ...
    def ack(self, attempt_id: str) -> None: ...


def ready(slots: Slots, replica_id: str, node_addr: str, capacity: int, uid: str = "w-1") -> Replica:
    replica = slots.known(replica_id, uid, node_addr, NOW)
    replica.capacity = capacity
    return replica


def test_free_is_capacity_less_what_is_in_flight() -> None:
    slots = Slots()
    slots.connect("n1", Nowhere(), "", (), NOW)
    replica = ready(slots, "r1", "n1", 2)
    slots.take("t1.1", replica, NOW)
    assert replica.free == 1
    assert slots.release("t1.1", "n1", 0.0) == ("w-1",)
    assert slots.release("t1.1", "n1", 0.0) == ()
    assert replica.free == 2


def test_nothing_is_free_on_a_node_that_is_not_connected() -> None:
    slots = Slots()
    link = Nowhere()
    slots.connect("n1", link, "", (), NOW)
    replica = ready(slots, "r1", "n1", 2)
    assert slots.disconnect("n1", link, NOW)
    assert replica.free == 0
    assert slots.link("n1") is None


def test_end_of_an_older_link_changes_nothing() -> None:
    slots = Slots()
    older, newer = Nowhere(), Nowhere()
    slots.connect("n1", older, "", (), NOW)
    slots.connect("n1", newer, "", (), NOW)
    assert not slots.disconnect("n1", older, NOW)
    assert slots.link("n1") is newer


def test_node_restates_what_is_in_flight_when_it_connects() -> None:
    slots = Slots()
    slots.connect("n1", Nowhere(), "", (), NOW)
    replica = ready(slots, "r1", "n1", 3)
    slots.take("t1.1", replica, NOW)
    slots.take("t2.1", replica, NOW)
    slots.reserve("t3.1", replica)
    slots.connect("n1", Nowhere(), "", {"t2.1"}, NOW)
    # The node cannot know of what it has not been given yet.
    assert set(replica.in_flight) == {"t2.1", "t3.1"}


def test_unknown_attempt_costs_each_replica_of_its_node_a_slot_until_it_is_over() -> None:
    slots = Slots()
    slots.connect("n1", Nowhere(), "", {"t9.1"}, NOW)
    first, second = ready(slots, "r1", "n1", 1), ready(slots, "r2", "n1", 2, "w-2")
    assert (first.free, second.free) == (0, 1)
    assert slots.release("t9.1", "n1", 0.0) == {"w-1", "w-2"}
    assert (first.free, second.free) == (1, 2)


def test_only_its_own_node_ends_an_attempt() -> None:
    slots = Slots()
    slots.connect("n1", Nowhere(), "", (), NOW)
    replica = ready(slots, "r1", "n1", 1)
    slots.take("t1.1", replica, NOW)
    assert slots.release("t1.1", "n2", 0.0) == ()
    assert replica.free == 0


def test_heartbeat_shows_what_is_missing_for_long_only() -> None:
    slots = Slots()
    slots.connect("n1", Nowhere(), "", {"t9.1"}, NOW)
    replica = ready(slots, "r1", "n1", 9)
    slots.take("old", replica, NOW)
    slots.take("held", replica, NOW)
    slots.take("young", replica, NOW + 20)
    slots.reserve("reserved", replica)
    assert slots.missing("n1", {"held"}, NOW + 10) == ["t9.1", "old"]
    assert slots.missing("n2", set(), NOW + 10) == []


def test_replica_that_is_gone_leaves_nothing_behind() -> None:
    slots = Slots()
    slots.connect("n1", Nowhere(), "", (), NOW)
    replica = ready(slots, "r1", "n1", 1)
    slots.take("t1.1", replica, NOW)
    assert slots.remove("r1") == ["t1.1"]
    assert slots.remove("r1") == []
    assert slots.replica("r1") is None
    assert not slots.pool("w-1").replicas
    assert slots.release("t1.1", "n1", 0.0) == ()


def test_most_are_silent_means_more_than_are_there_and_more_than_one() -> None:
    slots = Slots()
    links = {addr: Nowhere() for addr in ("n1", "n2", "n3", "n4", "n5")}
    for addr, link in links.items():
        slots.connect(addr, link, "", (), NOW)
    gone = []
    for addr, link in links.items():
        slots.disconnect(addr, link, NOW)
        gone.append(slots.most_are_silent(NOW + 1))
    assert gone == [False, False, True, True, True]
    assert not slots.most_are_silent(NOW + 120)


def test_after_a_mass_silence_the_others_have_a_while_to_come_back_whoever_asked_meanwhile() -> None:
    slots = Slots()
    links = {addr: Nowhere() for addr in ("n1", "n2", "n3")}
    for addr, link in links.items():
        slots.connect(addr, link, "", (), NOW)
        slots.disconnect(addr, link, NOW)
    for addr in ("n1", "n2"):
        slots.connect(addr, Nowhere(), "", (), NOW + 20)
    assert slots.most_are_silent(NOW + 20 + SILENCE_END_S - 1)
    assert not slots.most_are_silent(NOW + 20 + SILENCE_END_S)


def test_paces_are_averages_of_replica_and_workspace() -> None:
    slots = Slots()
    fast, slow = ready(slots, "r1", "n1", 1), ready(slots, "r2", "n1", 1)
    slots.observe(fast, 1.0, NOW)
    slots.observe(slow, 3.0, NOW)
    slow.failures = 2
    slots.observe(slow, 10.0, NOW + 1)
    assert (fast.pace_s, slow.pace_time, slow.failures) == (1.0, NOW + 1, 0)
    assert slow.pace_s == pytest.approx(4.4)
    assert fast.usual_s == 1.0 < slow.usual_s < slow.pace_s
    assert 1.0 < slots.pool("w-1").mean_s < 1.5


def test_work_of_what_runs_is_known_until_it_is_over() -> None:
    slots = Slots()
    slots.connect("n1", Nowhere(), "", (), NOW)
    replica = ready(slots, "r1", "n1", 3)
    slots.take("large", replica, NOW, 4.0)
    slots.take("plain", replica, NOW + 1)
    assert replica.oldest() == (NOW, 4.0)
    slots.release("large", "n1", 0.0)
    assert replica.oldest() == (NOW + 1, 1.0)
    slots.take("small", replica, NOW + 2, 0.5)
    slots.connect("n1", Nowhere(), "", {"plain"}, NOW + 3)
    assert not replica.works


def test_pace_is_for_a_unit_of_work() -> None:
    slots = Slots()
    replica = ready(slots, "r1", "n1", 1)
    slots.observe(replica, 8.0, NOW, work=4.0)
    assert (replica.pace_s, replica.usual_s, slots.pool("w-1").mean_s) == (2.0, 2.0, 2.0)


def test_first_task_that_loads_a_model_makes_no_replica_slow() -> None:
    slots = Slots()
    old, new = ready(slots, "r1", "n1", 1), ready(slots, "r2", "n1", 1)
    for _ in range(10):
        slots.observe(old, 0.1, NOW)
    slots.observe(new, 60.0, NOW)
    assert new.pace_s < 8 * old.pace_s
    assert slots.pool("w-1").mean_s < 0.2


def test_busy_neighbour_on_a_gpu_counts_as_far_as_it_is_busier_than_ever() -> None:
    slots = Slots()
    slots.connect("n1", Nowhere(), "", (), NOW)
    ours, theirs, apart = (
        ready(slots, name, "n1", 1, uid) for name, uid in (("r1", "w-1"), ("r2", "w-2"), ("r3", "w-3"))
    )
    for replica, gpus in ((ours, ("GPU-1",)), (theirs, ("GPU-1", "GPU-2")), (apart, ("GPU-3",))):
        slots.set_gpus(replica, gpus)
    slots.observe(ours, 1.0, NOW)
    slots.take("t1.1", theirs, NOW)
    assert (ours.crowding, apart.crowding) == (2.0, 1.0)
    for _ in range(50):
        slots.observe(ours, 2.0, NOW)
    slots.release("t1.1", "n1", 0.0)
    slots.take("t2.1", theirs, NOW)
    # By now its pace says so already.
    assert 1.0 <= ours.crowding < 1.01
    slots.remove("r2")
    assert ours.neighbours == ()
    assert ours.crowding == 1.0
