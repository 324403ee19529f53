"""Which containers may no longer use the GPUs they were given: asks device_check.py, in a process of its own."""

import asyncio
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

CHECK: Final = Path(__file__).with_name("device_check.py")
#: It asks the kernel some dozens of questions.
CHECK_S: Final = 10.0


async def devices_refused(pids: Sequence[str]) -> dict[str, str]:
    """By pid of a container's first process, those that have device nodes of GPUs which they may not use, in words.

    Empty if nothing can be told: without root, or without control groups.
    """
    if not pids or os.geteuid() != 0:
        return {}
    try:
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", str(CHECK), *pids),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
    except OSError:
        # No memory, no more processes: it is asked again.
        return {}
    try:
        async with asyncio.timeout(CHECK_S):
            said, _ = await child.communicate()
    except TimeoutError:
        return {}
    finally:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
    told = (line.split() for line in said.decode().splitlines())
    return {pid: f"it may no longer use {', '.join(nodes)}" for pid, *nodes in told if nodes}
