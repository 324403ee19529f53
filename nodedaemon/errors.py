"""The node daemon's errors: a class's docstring is its default message, for the operator of the node.

`exit_code` is what the program ends with when the error reaches the top.
"""

from typing import ClassVar


class NodeError(Exception):
    """Something went wrong inside the node daemon; the log has the details."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str = "") -> None:
        super().__init__(message or (type(self).__doc__ or ""))


class ConfigFault(NodeError):
    """The configuration is not valid."""

    exit_code = 2


class StateDirBusy(NodeError):
    """Another node daemon uses this state directory; stop that one first, or give this one a --state-dir of its own."""

    exit_code = 2


class KeyUnusable(NodeError):
    """The node's key cannot be used."""

    exit_code = 2


class Superseded(NodeError):
    """Another daemon has begun a session with this node's key; this one stops. Give each machine a key of its own."""

    exit_code = 3


class NotEnrolled(NodeError):
    """The control plane does not know this node: join with a one-time token (`ngpu-node join --token-file FILE`)."""

    exit_code = 4


class Revoked(NodeError):
    """This node was revoked by an operator of the platform and its containers are stopped; ask before joining again."""

    exit_code = 5


class EnrolRefused(NodeError):
    """The control plane did not take the token."""

    exit_code = 4


class SpoolFull(NodeError):
    """The node's spool is full: too much waits for the control plane's acknowledgement."""
