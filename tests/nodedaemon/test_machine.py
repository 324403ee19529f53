"""What is told of the machine, and what its operator allows."""

import pytest

from nodedaemon import statement
from nodedaemon.config import load
from nodedaemon.errors import ConfigFault
from nodedaemon.gpus import GpuInventory
from nodedaemon.machine import DISK_STEP_BYTES, Machine
from tests.nodedaemon.fake_engine import FakeEngine


def machine(patterns: str) -> Machine:
    settings = load(None, {"allowed_images": patterns})
    return Machine(FakeEngine(), allowed_images=settings.image_patterns)


async def test_free_disk_that_hardly_changes_is_told_as_it_was() -> None:
    engine = FakeEngine()
    node = Machine(engine)
    told = []
    for free in (1, DISK_STEP_BYTES, DISK_STEP_BYTES + 1, 2 * DISK_STEP_BYTES, 1):
        engine.disk_free_bytes = free
        await node.survey()
        told.append(node.engine.disk_free_bytes)
    assert told == [1, 1, DISK_STEP_BYTES + 1, DISK_STEP_BYTES + 1, 1]


def test_images_that_are_not_allowed_are_refused_with_what_is() -> None:
    node = machine("ghcr.io/acme/*, docker.io/library/debian:*")
    assert node.refusal("ghcr.io/acme/sd:1") == node.refusal("debian:12") == ""
    assert node.refusal("ghcr.io/else/sd") == (
        "the operator of this node does not allow ghcr.io/else/sd, only ghcr.io/acme/*, docker.io/library/debian:*"
    )


def test_without_patterns_all_are_allowed() -> None:
    assert machine("").refusal("anything") == ""


def test_the_inventory_says_what_is_allowed() -> None:
    told = statement.inventory(machine("ghcr.io/acme/*"), GpuInventory())
    assert list(told.allowed_images) == ["ghcr.io/acme/*"]


def test_too_many_patterns_are_a_fault() -> None:
    with pytest.raises(ConfigFault, match="at most 100 patterns"):
        load(None, {"allowed_images": ",".join(["x"] * 101)})
