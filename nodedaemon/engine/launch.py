"""What stands between the daemon and a replica's process: a program that sets its limits and then becomes it.

In a program of its own and not in the child of a fork: the daemon has threads, and Python code between fork and exec
may hang on their locks. `python -I -S launch.py PARENT_PID STATUS_FD ADDRESS_SPACE_BYTES ARGV...`; what goes wrong
is written to STATUS_FD, which closes when the process has become what it should.
"""

import ctypes
import os
import resource
import signal
import sys

PR_SET_PDEATHSIG = 1
OPEN_FILES = 65536
#: When the machine runs out of memory, a replica goes before the daemons do.
OOM_SCORE = b"500"


def main() -> None:
    """Limits, then exec."""
    parent, status, address_space = (int(word) for word in sys.argv[1:4])
    argv = sys.argv[4:]
    os.set_inheritable(status, False)
    # With its daemon gone nobody could stop it.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = OPEN_FILES if most == resource.RLIM_INFINITY else min(most, OPEN_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    if address_space:
        resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))
    score = os.open("/proc/self/oom_score_adj", os.O_WRONLY)
    os.write(score, OOM_SCORE)
    os.close(score)
    try:
        os.execvp(argv[0], argv)  # noqa: S606
    except OSError as error:
        os.write(status, (error.strerror or str(error)).encode())
        sys.exit(127)


if __name__ == "__main__":
    main()
