"""How a long-lived program of ours keeps its memory: `settle` once everything is imported, `give_back` while it runs.

glibc gives each thread that asks while another does a heap of its own, up to eight for each core, and hardly ever gives
one back: two are as fast here and take 17 MiB less. It takes a large piece from the system and not from a heap, but
what is large for it, and what it leaves free at a heap's end, grows with each large piece that it frees, up to 32 and
64 MiB: we say it once. Nor does it give back what is free below whatever small thing came to lie at the end: 5 to 8 MiB
in each of our programs after minutes of large bodies. Python's collector looks for circles among the young every 700
objects; hardly anything here is in one, and a call makes hundreds of objects.
"""

import asyncio
import ctypes
import gc
import sys
import time
from typing import Any, Final

#: glibc's heaps; from how many bytes on a piece is large; bytes left free at a heap's end. By its numbers for `mallopt`
#: (malloc.h): M_ARENA_MAX, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD.
HEAPS: Final = 2
LARGE_BYTES: Final = 4 * 1024 * 1024
SPARE_BYTES: Final = 4 * 1024 * 1024
_GLIBC: Final = {-8: HEAPS, -3: LARGE_BYTES, -1: SPARE_BYTES}
#: Objects that may be made before the collector looks.
YOUNG_OBJECTS: Final = 20_000
#: How often it is looked whether there is work, and what of a core a program uses that has none.
LOOK_S: Final = 2.0
QUIET_CORES: Final = 0.1
#: While there is work, what is free is given back this often.
WORK_S: Final = 10.0
#: CPU time that leaves nothing behind worth the trouble.
LITTLE_S: Final = 0.1


def settle() -> None:
    """Set all that, and let the collector pass over what is there already: 50 ms each time it looks at everything."""
    if mallopt := _glibc("mallopt"):
        for name, value in _GLIBC.items():
            mallopt(name, value)
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, *gc.get_threshold()[1:])


async def give_back() -> None:
    """Give the system what is free in the heaps, until cancelled: once work has ended, and now and then under load.

    It takes a millisecond each time.
    """
    trim = _glibc("malloc_trim")
    if trim is None:
        return
    work = Work(time.monotonic(), time.process_time())
    while True:
        await asyncio.sleep(LOOK_S)
        if work.is_due(time.monotonic(), time.process_time()):
            trim(0)


class Work:
    """When what work leaves behind is to be given back. `now` and the CPU time `used` so far: seconds."""

    def __init__(self, now: float, used: float) -> None:
        self._looked = self._given = (now, used)

    def is_due(self, now: float, used: float) -> bool:
        """Whether to do it now; asked every LOOK_S."""
        looked, used_then = self._looked
        self._looked = now, used
        is_quiet = used - used_then < QUIET_CORES * (now - looked)
        given, used_then = self._given
        if used - used_then < LITTLE_S or not (is_quiet or now - given >= WORK_S):
            return False
        self._given = now, used
        return True


def _glibc(name: str) -> Any:
    """One of its functions; None where there is another C library, which does as it likes then."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
