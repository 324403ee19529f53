"""How well a GPU is, in one value: `health` gives it, `placement` heeds it, and people see it."""

import enum

import msgspec


class Grade(enum.IntEnum):
    """How well a GPU is. The numbers are the wire's (fleet.proto); higher is worse."""

    OK = 1
    #: Costs more in placement.
    DEGRADED = 2
    #: Nothing is placed on it.
    QUARANTINED = 3


class Health(msgspec.Struct, frozen=True):
    """A GPU's grade and, in words, why. `evacuate`: what runs there is to be replaced elsewhere."""

    grade: Grade = Grade.OK
    reason: str = ""
    evacuate: bool = False
