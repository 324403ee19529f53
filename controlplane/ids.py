"""Every kind of id and secret, each made in one place. Randomness comes in by the door, as a source of random bytes."""

import hashlib
import secrets
from base64 import urlsafe_b64encode
from collections.abc import Callable
from datetime import datetime, tzinfo
from typing import Final

#: Gives that many random bytes.
Random = Callable[[int], bytes]


class TaskIds:
    """Ids of tasks: `YYYYMMDD_HH_MM_SS_` in the display zone and 20 random digits; who has one may read the result.

    Those of one second ascend: the first is random below FIRST, each other a random step of up to STEP above the last.
    So the indexes of the database grow at their end, and a commit writes three fifths of what it would. Who knows the
    id before or after a task's has STEP numbers to try; who knows none of that second, FIRST and more.
    """

    #: Half of all numbers are left for the steps of a second: a hundred thousand of them, and more.
    FIRST: Final = 5 * 10**19
    STEP: Final = 10**15

    def __init__(self, zone: tzinfo, rand: Random = secrets.token_bytes) -> None:
        self._zone = zone
        self._rand = rand
        self._second = 0
        self._prefix = ""
        self._last = 0

    def new(self, now: datetime) -> str:
        """An id of that time."""
        second = int(now.timestamp())
        # 16 bytes are so many more than either that the remainder's bias is below 1e-18.
        number = int.from_bytes(self._rand(16))
        self._last += 1 + number % self.STEP
        if second != self._second or self._last >= 10**20:
            self._second = second
            self._prefix = f"{datetime.fromtimestamp(second, self._zone):%Y%m%d_%H_%M_%S}"
            self._last = number % self.FIRST
        return f"{self._prefix}_{self._last:020d}"


def workspace_id(rand: Random = secrets.token_bytes) -> str:
    """24 random decimal digits: the workspace's credential."""
    return _digits(24, rand)


def workspace_uid(rand: Random = secrets.token_bytes) -> str:
    """How rows and nodes refer to a workspace: `w-` and 12 hex digits."""
    return f"w-{rand(6).hex()}"


def replica_id(rand: Random = secrets.token_bytes) -> str:
    """`r-` and 12 hex digits."""
    return f"r-{rand(6).hex()}"


def token_id(rand: Random = secrets.token_bytes) -> str:
    """How people refer to a token: `t-` and 12 hex digits. Not its secret."""
    return f"t-{rand(6).hex()}"


def upload_id(rand: Random = secrets.token_bytes) -> str:
    """`upload-` and 32 hex digits; also the body's name in the body store."""
    return f"upload-{rand(16).hex()}"


def attempt_id(task: str, number: int) -> str:
    """The task's id, ".", and the attempt's number, from 1."""
    return f"{task}.{number}"


def split_attempt_id(attempt: str) -> tuple[str, int]:
    """The task's id and the attempt's number. Raises ValueError if `attempt` is none that `attempt_id` makes."""
    task, dot, number = attempt.rpartition(".")
    if not (task and dot and number.isascii() and number.isdecimal() and number[0] != "0" and len(number) <= 9):
        raise ValueError(f"not an attempt's id: {attempt[:80]!r}")
    return task, int(number)


def token_secret(kind: str, rand: Random = secrets.token_bytes) -> str:
    """`ngpu_`, the kind (`operator`, `service`, `node`, `session`), `_`, and 256 random bits (43 characters)."""
    return f"ngpu_{kind}_{urlsafe_b64encode(rand(32)).rstrip(b'=').decode()}"


def secret_hash(secret: str) -> bytes:
    """What is kept of a secret: its SHA-256, 32 bytes."""
    return hashlib.sha256(secret.encode(errors="surrogatepass")).digest()


def _digits(count: int, rand: Random) -> str:
    # 16 bytes are so many more than 10**24 that the remainder's bias is below 1e-14.
    return f"{int.from_bytes(rand(16)) % 10**count:0{count}d}"
