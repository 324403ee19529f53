"""`ngpu`: the command line of customers and operators, a gRPC client and nothing else.

One module a noun (`workspaces`, `nodes`, ...) with its commands, each a function of a Session and what was typed;
`session` speaks gRPC, `output` prints, `units` reads and writes sizes and times, `problem` has the exit codes.
"""

from controlplane.ctl.app import main

__all__ = ["main"]
