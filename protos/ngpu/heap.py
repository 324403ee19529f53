"""How a long-lived program of ours keeps its memory: called once by each, when everything is imported.

glibc gives each thread that asks while another does a heap of its own, up to eight for each core, and hardly ever gives
one back: two are as fast here and take 17 MiB less. Python's collector looks for circles among the young every 700
objects; hardly anything here is in one, and a call makes hundreds of objects.
"""

import ctypes
import gc
import sys
from typing import Final

#: glibc's heaps. Its number for `mallopt` (malloc.h): M_ARENA_MAX.
HEAPS: Final = 2
_ARENA_MAX: Final = -8
#: Objects that may be made before the collector looks.
YOUNG_OBJECTS: Final = 20_000


def settle() -> None:
    """Set both, and let the collector pass over what is there already: 50 ms each time it looks at everything."""
    if sys.platform == "linux":
        # Another C library may not have it, and does as it likes then.
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_ARENA_MAX, HEAPS)
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, *gc.get_threshold()[1:])
