"""Imported first by each long-lived program: keeps out what a library imports only to show it to people.

structlog imports rich, where it finds it, for tracebacks in colour with the values of local variables, which we never
print (see each program's `log`): 4 MiB in each process. The command line `ngpu` has rich all the same.
"""

import sys

if "structlog" not in sys.modules and "rich" not in sys.modules:
    sys.modules["rich"] = None  # type: ignore[assignment]
    try:
        import structlog  # noqa: F401
    finally:
        del sys.modules["rich"]
