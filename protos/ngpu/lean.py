"""Imported first by each long-lived program: what must be settled before other libraries are imported.

structlog imports rich, where it finds it, for tracebacks in colour with the values of local variables, which we never
print (see each program's `log`): 4 MiB in each process. The command line `ngpu` has rich all the same.

gRPC's newer way of reading and writing sockets, its event engine, hands each event through three threads before Python
hears of it; the one before it, through two. A message there and back on a stream takes 165 us of a client's time
instead of 285 (grpcio 1.85). It is read from the environment while gRPC is imported, once; where somebody has set it,
that is left as it is. A release that knows only one way ignores it.
"""

import os
import sys

_EXPERIMENTS = "GRPC_EXPERIMENTS"

if "structlog" not in sys.modules and "rich" not in sys.modules:
    sys.modules["rich"] = None  # type: ignore[assignment]
    try:
        import structlog  # noqa: F401
    finally:
        del sys.modules["rich"]

if _EXPERIMENTS not in os.environ:
    os.environ[_EXPERIMENTS] = "-event_engine_client,-event_engine_listener"
    try:
        import grpc.aio  # noqa: F401
    finally:
        # Not for what we start: it may know other ways.
        del os.environ[_EXPERIMENTS]
