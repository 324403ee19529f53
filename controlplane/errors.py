"""The control plane's errors: a class's docstring is its default message; `api` translates them once, at the edge.

`code` names a gRPC status; `reason` is the constant that callers branch on (http.proto, Error); `retry_after_s` is set
where trying again as it is may help.
"""

from typing import ClassVar


class NgpuError(Exception):
    """Something went wrong inside the control plane; the log has the details under this request's id."""

    code: ClassVar[str] = "INTERNAL"
    reason: ClassVar[str] = "INTERNAL"

    def __init__(self, message: str = "", *, retry_after_s: float = 0.0) -> None:
        super().__init__(message or (type(self).__doc__ or ""))
        self.retry_after_s = retry_after_s


class InvalidArgument(NgpuError):
    """The request is not valid."""

    code = "INVALID_ARGUMENT"
    reason = "INVALID_ARGUMENT"


class Unauthenticated(NgpuError):
    """No valid credential: send `authorization: Bearer TOKEN`."""

    code = "UNAUTHENTICATED"
    reason = "UNAUTHENTICATED"


class Forbidden(NgpuError):
    """This credential's role may not do that."""

    code = "PERMISSION_DENIED"
    reason = "FORBIDDEN"


class NotFound(NgpuError):
    """There is no such thing, or it is not yours."""

    code = "NOT_FOUND"
    reason = "NOT_FOUND"


class NodeUnknown(NotFound):
    """This node has not enrolled: run `ngpu-node join` with a token from `ngpu token create --role node`."""

    reason = "NODE_UNKNOWN"


class NodeRevoked(Forbidden):
    """This node was revoked by an operator of the platform; ask them before you enrol it again under a new key."""

    reason = "NODE_REVOKED"


class Superseded(NgpuError):
    """A newer session of this node has begun; this one is over."""

    code = "ABORTED"
    reason = "SUPERSEDED"


class Conflict(NgpuError):
    """That exists already."""

    code = "ALREADY_EXISTS"
    reason = "CONFLICT"


class TooLarge(NgpuError):
    """The body is larger than the workspace's limit."""

    code = "RESOURCE_EXHAUSTED"
    reason = "TOO_LARGE"


class QueueFull(NgpuError):
    """The workspace's queue is full; try again later, or ask its owner for more replicas."""

    code = "RESOURCE_EXHAUSTED"
    reason = "QUEUE_FULL"


class OutOfRange(NgpuError):
    """The offset is past the end."""

    code = "OUT_OF_RANGE"
    reason = "OUT_OF_RANGE"


class Expired(NgpuError):
    """The body is past its retention; what is known of the task besides is still there."""

    code = "FAILED_PRECONDITION"
    reason = "EXPIRED"


class JobLost(NotFound):
    """The replica that knew this job is gone, and its task has not been completed: begin it anew."""

    reason = "JOB_LOST"


class AssetMissing(Forbidden):
    """The BTC address holds none of the assets that are asked for here."""

    reason = "ASSET_MISSING"


class Unavailable(NgpuError):
    """The control plane cannot do that now; try again soon."""

    code = "UNAVAILABLE"
    reason = "UNAVAILABLE"


class AssetUnknown(Unavailable):
    """The BTC address could not be checked: no indexer is configured or none answers. Try again, or leave it out."""

    reason = "ASSET_UNKNOWN"


class StaleAttempt(NgpuError):
    """The attempt has been given up; what is said of it changes nothing."""

    code = "NOT_FOUND"
    reason = "NOT_FOUND"
