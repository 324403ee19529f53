"""schemathesis against openapi.yaml: whatever is sent, what comes back is what the description says.

The bridge runs in a thread of its own, because schemathesis calls it synchronously.
"""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from ngpu.v1 import task_pb2 as pb
from schemathesis.core.parameters import ParameterLocation
from schemathesis.specs.openapi.checks import negative_data_rejection, unsupported_method

from httpbridge.__main__ import assemble
from httpbridge.calls import ControlPlane
from httpbridge.config import Config
from tests.httpbridge.fake_controlplane import TOKEN, WORKSPACE, Answer, Exchange, FakeControlPlane

DESCRIPTION = Path(__file__).parents[2] / "httpbridge" / "openapi.yaml"
schema = schemathesis.openapi.from_path(DESCRIPTION)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A bridge with one task that has a documented id."""
    ready = threading.Event()
    addresses: list[str] = []
    loop = asyncio.new_event_loop()
    end = asyncio.Event()
    token_file = tmp_path_factory.mktemp("bridge") / "token"
    token_file.write_text(TOKEN)

    async def serve() -> None:
        async with FakeControlPlane() as fake, ControlPlane(fake.address, token_file.read_text) as control_plane:
            # Which ports there are no description of the bridge can say.
            fake.workspaces[WORKSPACE].ports = list(range(1, 65536))
            fake.container = _echo
            known = fake.add_task(state=pb.TASK_STATE_COMPLETED)
            fake.tasks["20240415_14_30_09_89104112345678901234"] = fake.tasks.pop(known)
            app, _ = assemble(Config(controlplane=fake.address, token_file=token_file), control_plane)
            run = asyncio.create_task(control_plane.run())
            connections = app.server()
            server = await loop.create_server(connections, "127.0.0.1", 0)
            while not control_plane.batch.is_up:
                await asyncio.sleep(0.01)
            addresses.append(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
            ready.set()
            await end.wait()
            server.close()
            await connections.shutdown(1)
            run.cancel()
            await asyncio.gather(run, return_exceptions=True)

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), name="bridge")
    thread.start()
    assert ready.wait(10)
    yield addresses[0]
    loop.call_soon_threadsafe(end.set)
    thread.join(10)
    loop.close()


async def _echo(exchange: Exchange) -> Answer:
    # Not as JSON: what comes back under /run is what was sent.
    return Answer(exchange.body, headers=[("Content-Type", b"application/octet-stream")])


@schema.parametrize()
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_any_call(case: Any, url: str) -> None:
    # That something is wrong on purpose must be noticed where it is one query parameter. It need not be where it is a
    # header (of the wrong type it arrives as text all the same), parameters that nobody knows (they are the
    # container's), or a path (which escapes it may have no pattern can say; test_params does).
    how = case.meta.phase.data if case.meta else None
    in_query = getattr(how, "parameter_location", None) is ParameterLocation.QUERY
    must_be_noticed = in_query and getattr(how, "parameter", None) not in (None, "paramUrl")
    case.call_and_validate(
        base_url=url,
        headers={"Authorization": f"Bearer {WORKSPACE}"},
        excluded_checks=[
            *([] if must_be_noticed else [negative_data_rejection]),
            # Under /run no method is undeclared: all are the container's.
            *([unsupported_method] if case.operation.path.startswith("/run/") else []),
        ],
    )
