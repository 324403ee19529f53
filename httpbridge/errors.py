"""Every way the bridge refuses a call: a class's docstring is its message, `status` its HTTP status and `result_code`.

Raised anywhere below `app`, turned into `{"result_code", "msg"}` there and nowhere else.
"""

from typing import ClassVar


class BridgeError(Exception):
    """Something went wrong inside; the operator finds the details in the log under this answer's X-Request-Id."""

    status: ClassVar[int] = 500
    #: Seconds for `Retry-After` where the raiser names none; 0: the header is left out.
    retry_after_s: float = 0.0

    def __init__(self, message: str = "", *, retry_after_s: float = 0.0, task_id: str = "") -> None:
        super().__init__(message or " ".join((type(self).__doc__ or "").split()))
        self.task_id = task_id
        if retry_after_s:
            self.retry_after_s = retry_after_s

    @property
    def headers(self) -> dict[str, str]:
        """Response headers beside the usual ones."""
        # Whole seconds, rounded up: 0 would invite a caller to hammer.
        return {"Retry-After": str(max(1, -int(-self.retry_after_s // 1)))} if self.retry_after_s else {}


class BadRequest(BridgeError):
    """The request is not valid."""

    status = 400


class Unauthorized(BridgeError):
    """No valid credential: send `Authorization: Bearer <workspace id>`."""

    status = 401

    @property
    def headers(self) -> dict[str, str]:
        """RFC 9110 wants a challenge beside every 401."""
        return {"WWW-Authenticate": "Bearer"}


class Forbidden(BridgeError):
    """That is not allowed."""

    status = 403


class NotFound(BridgeError):
    """There is no such thing, or it is not yours."""

    status = 404


class MethodNotAllowed(BridgeError):
    """This path does not answer to that method."""

    status = 405

    def __init__(self, message: str = "", *, allow: str) -> None:
        super().__init__(message)
        self._allow = allow

    @property
    def headers(self) -> dict[str, str]:
        """Which methods it answers to."""
        return {"Allow": self._allow}


class SlowClient(BridgeError):
    """The request's body came too slowly; send it again in one go."""

    status = 408


class Conflict(BridgeError):
    """That exists already, otherwise than you say."""

    status = 409


class Gone(BridgeError):
    """The body is past its retention; what else is known of the task is still in getDetailed."""

    status = 410


class TooLarge(BridgeError):
    """The body is larger than this service takes."""

    status = 413


class TooMany(BridgeError):
    """Too much waits already; try again later."""

    status = 429
    retry_after_s = 1.0


class BadGateway(BridgeError):
    """There is no answer of the container."""

    status = 502


class Unavailable(BridgeError):
    """The service is not ready for that now; try again soon."""

    status = 503
    retry_after_s = 1.0


class TimeLimit(BridgeError):
    """It took longer than its time limit."""

    status = 504


class ConfigFault(Exception):
    """Settings that cannot be used; the message names every fault, a line each."""
