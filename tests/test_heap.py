"""What the three programs keep in memory: no library that they do not need, nothing for long that is free."""

import os
import subprocess
import sys

import pytest
from ngpu import heap

#: Once it has read its options.
LOADED = """
import contextlib, sys, {program}.__main__
with contextlib.suppress(SystemExit):
    {program}.__main__.main()
print(*{{name.partition('.')[0] for name in sys.modules}}, file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("program", "option", "unneeded"),
    [
        ("controlplane", "settings", {"rich", "pygments", "aiohttp", "alembic", "docker"}),
        ("nodedaemon", "settings", {"rich", "pygments", "aiohttp", "docker", "requests", "sqlalchemy", "pydantic"}),
        ("httpbridge", "--settings", {"rich", "pygments", "yaml", "docker", "sqlalchemy", "pydantic"}),
    ],
)
def test_a_program_starts_without_what_it_may_never_need(program: str, option: str, unneeded: set[str]) -> None:
    command = [sys.executable, "-c", LOADED.format(program=program), option]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "listen" in done.stdout
    assert not unneeded & set(done.stderr.split())


def test_the_command_line_has_its_colours_all_the_same() -> None:
    code = "from ngpu import lean; import structlog, rich.console; print(structlog.dev.rich)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "None"


@pytest.mark.parametrize("said", ["", "tcp_rcv_lowat"])
def test_how_grpc_reads_sockets_is_settled_for_this_process_only(said: str) -> None:
    code = "from ngpu import lean; import os; print(os.environ.get('GRPC_EXPERIMENTS', ''))"
    environment = {name: value for name, value in os.environ.items() if name != "GRPC_EXPERIMENTS"}
    environment |= {"GRPC_EXPERIMENTS": said} if said else {}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == said


def test_what_is_free_is_given_back_when_work_ends_and_now_and_then_while_it_lasts() -> None:
    work, used, given = heap.Work(now=0.0, used=0.0), 0.0, []
    for now in range(2, 61, 2):
        # Half a core from the 11th second to the 36th, else next to nothing.
        used += 1.0 if 10 < now <= 36 else 0.001
        if work.is_due(float(now), used):
            given.append(now)
    assert given == [12, 22, 32, 38]
