"""Every fault that a platform must survive, inflicted on real processes under load; then three accounts are compared:
what callers were told, what the database says, what the containers wrote down."""

import sys

import pytest

from scripts.fault_suite.faults import FAULTS
from scripts.fault_suite.run import Run, Skipped

pytestmark = [
    pytest.mark.slow,
    pytest.mark.netns,
    pytest.mark.docker,
    pytest.mark.timeout(300),
    # The SDK leaves the socket of a connection that is refused to the garbage collector.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def rig_of(fault: str) -> str:
    """Which of conftest's rigs is to suffer it."""
    needs = FAULTS[fault].needs
    if {"postgres", "standby"} & {*needs}:
        return "postgres"
    if "docker" in needs or "own engine" in needs:
        return "docker"
    return "nodes" if FAULTS[fault].subject == "node" else "controlplane"


CASES = [(rig_of(name), name) for name, one in FAULTS.items() if not one.variant]


@pytest.mark.parametrize(("rig", "fault"), CASES, ids=lambda value: value.replace(" ", "-"))
def test_fault_costs_no_more_than_it_must(runs: dict[str, Run], rig: str, fault: str) -> None:
    try:
        recovery = runs[rig].recovery(fault)
    except Skipped as why:
        pytest.skip(str(why))
    assert recovery.work_failed.total() == 0


@pytest.mark.parametrize("rig", ["nodes", "controlplane", "postgres", "docker"])
def test_after_all_faults_nothing_is_lost_and_every_execution_is_explained(runs: dict[str, Run], rig: str) -> None:
    try:
        findings = runs[rig].findings()
    except Skipped as why:
        pytest.skip(str(why))
    sys.stdout.write(findings.table())
    findings.check()
    assert findings.acknowledged > 0
