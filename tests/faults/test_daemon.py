"""The node's daemon is killed with -9, or stopped at once, again and again while its containers work: all waits on."""

import contextlib
import random
import sys
import time
from collections.abc import Iterator

import pytest

from controlplane.model import Delivery, State
from scripts.fault_suite.callers import Callers
from scripts.fault_suite.records import Execution, executions, recorded, token_of
from scripts.fault_suite.rig import Docker, Rig
from tests.engine import connected
from tests.images import echo_image, why_no_images

pytestmark = [pytest.mark.slow, pytest.mark.docker, pytest.mark.timeout(240)]

DEATHS = 4
#: How long each piece of work takes, and how many are begun in a second: no more than there are slots for.
WORK_S = 3.0
RATE = 2.0
#: From a daemon's start to its end.
LIFE_S = (1.0, 2.5)
#: So long before a death a request has been sent whole, and so long before its answer none of that has come.
MARGIN_S = 0.2
END_LIMIT_S = 90.0
#: The defaults, or nearly: a busy machine takes its time to start a daemon.
SETTINGS = {
    "NGPU_CONTROLPLANE_NODE_TIMEOUT": "15s",
    "NGPU_CONTROLPLANE_RECONNECT_GRACE": "15s",
    "NGPU_CONTROLPLANE_HOLD": "60s",
}


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    if why := why_no_images():
        pytest.skip(why)
    with contextlib.closing(connected()) as client:
        if not client.api.base_url.startswith("http+docker://"):
            pytest.skip("the Docker engine is not on this machine")
        engine = Docker("unix:///var/run/docker.sock", client, echo_image(client.api))
        state = tmp_path_factory.mktemp("daemon") / "state"
        with Rig(state, docker=engine, nodes=1, small_disks=False, bridge=SETTINGS) as rig:
            yield rig


def test_what_containers_work_on_while_their_daemon_dies_is_executed_once(rig: Rig) -> None:
    chance = random.Random()
    callers = rig.callers = Callers(rig.work, rig.once, rate=RATE, seconds=(WORK_S, WORK_S), chance=chance)
    deaths = []
    for number in range(DEATHS):
        time.sleep(chance.uniform(*LIFE_S))
        deaths.append(time.time())
        if number % 3 == 2:
            rig.node("alpha").stop()
        else:
            rig.node("alpha").kill()
        rig.start_node("alpha", NGPU_NODE_STOP_GRACE="0s")
    callers.stop(END_LIMIT_S)
    assert all(call.end for call in callers.calls)
    assert rig._ears
    rig._ears.catch_up()

    runs: dict[str, list[Execution]] = {}
    for run in executions(rig.worker_logs):
        runs.setdefault(run.token, []).append(run)
    waited = twice = 0
    for task in recorded(rig.database_url).values():
        mine = sorted(runs.get(token_of(task.task), []), key=lambda run: run.begin)
        first = mine[0]
        failed = [one.failure_message for one in task.attempts if one.failure_reason]
        if any(first.begin + MARGIN_S < death < first.begin + WORK_S - MARGIN_S for death in deaths):
            waited += 1
            # Also of what must not run twice.
            assert (len(mine), State(task.task.state)) == (1, State.COMPLETED), failed
        elif len(mine) > 1:
            twice += 1
            assert any(one.failure_reason and one.delivery != Delivery.NOT_SENT for one in task.attempts), task
    sys.stdout.write(f"{waited} executions were under way at {DEATHS} deaths, {twice} others done twice\n")
    assert waited >= DEATHS
