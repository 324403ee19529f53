"""`ngpu`: the command line of customers and operators, a gRPC client and nothing else.

One module a noun (`workspaces`, `nodes`, ...) with its commands, each a function of a Session and what was typed;
`session` speaks gRPC, `output` prints, `units` reads and writes sizes and times, `problem` has the exit codes.
"""

import os


def main() -> None:
    """The console script."""
    # Before grpc is loaded: what its C core says of a failed connection is of no use to whoever typed a command.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from controlplane.ctl.app import app

    app()
