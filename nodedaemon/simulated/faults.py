"""What may happen to a simulated node: the words for it, and what chance does. Pure."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

#: For one of the nodes that are up, by chance.
ANY: Final = "any"

_UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


class BadFault(ValueError):
    """Words that are no fault; the message says what they should be."""


@dataclass(frozen=True, slots=True)
class Fault:
    """`number`, `times`: as the kind needs. `lasts_s`: 0: until it is healed, or returns."""

    kind: str
    node: str
    gpu: int = 0
    number: int = 0
    times: float = 1.0
    lasts_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of fault: its arguments after the node's name, in order; whether it may last; and what it is."""

    arguments: tuple[str, ...]
    lasts: bool
    meaning: str


KINDS: Final = {
    "kill": Kind((), True, "daemon and containers are gone at once, without a goodbye; its connection breaks"),
    "stop": Kind((), True, "the daemon is stopped: it says goodbye; its containers end too"),
    "return": Kind((), False, "a node that was killed or stopped is switched on, with its key and its images"),
    "silence": Kind((), True, "its network is cut: nothing gets through either way; containers work on"),
    "slow": Kind(("TIMES",), True, "requests, pulls and starts take so many times as long (4x)"),
    "gpu-xid": Kind(("GPU", "XID"), False, "the driver reports that Xid error of its GPU of that index"),
    "gpu-lost": Kind(("GPU",), True, "the driver no longer reaches that GPU"),
    "gpu-bad": Kind(("GPU",), True, "that GPU fails the test that follows an Xid"),
    "container-exit": Kind(("CODE",), False, "one of its containers, by chance, ends with that code"),
    "pull-fail": Kind((), True, "no registry answers: pulls fail"),
    "disk-full": Kind((), True, "no room for images: pulls fail"),
    "heal": Kind((), False, "ends silence, slow, gpu-lost, gpu-bad, pull-fail and disk-full"),
}

#: What `--chaos` does: how often each comes, against the others; and between how many seconds it lasts.
CHAOS: Final = {
    "kill": (3, (10.0, 60.0)),
    "stop": (1, (10.0, 60.0)),
    "silence": (2, (1.0, 30.0)),
    "slow": (2, (10.0, 60.0)),
    "gpu-xid": (1, (0.0, 0.0)),
    "gpu-lost": (2, (10.0, 60.0)),
    "container-exit": (4, (0.0, 0.0)),
    "pull-fail": (1, (5.0, 30.0)),
    "disk-full": (1, (5.0, 30.0)),
}
#: The application's, one that a restart mends, and two of the GPU itself: those stay until it has passed a test.
XIDS: Final = (13, 31, 94, 48, 79)
#: How a container ends: by its own fault, and killed.
CODES: Final = (1, 137)
#: How much slower a node is.
TIMES: Final = (2.0, 4.0, 8.0)


def usage() -> list[str]:
    """A line for each kind."""
    return [f"{_form(name):<38} {kind.meaning}" for name, kind in KINDS.items()]


def parse(words: Sequence[str]) -> Fault:
    """A fault as it is typed: `gpu-xid sim-017 0 79`, `silence any 30s`. Raises BadFault."""
    if not words or words[0] not in KINDS:
        raise BadFault(f"there is no fault {' '.join(words[:1])!r}: {', '.join(KINDS)}")
    name, kind = words[0], KINDS[words[0]]
    given = list(words[1:])
    least = 1 + len(kind.arguments)
    if not least <= len(given) <= least + kind.lasts:
        raise BadFault(f"write: {_form(name)}")
    values: dict[str, float] = {}
    for argument, word in zip(kind.arguments, given[1:], strict=False):
        values[argument] = _number(argument, word)
    return Fault(
        kind=name,
        node=given[0],
        gpu=int(values.get("GPU", 0)),
        number=int(values.get("XID", values.get("CODE", 0))),
        times=values.get("TIMES", 1.0),
        lasts_s=_seconds(given[least]) if len(given) > least else 0.0,
    )


def words_of(fault: Fault) -> str:
    """As it is typed: what `parse` makes the fault of."""
    kind = KINDS[fault.kind]
    values = {"GPU": fault.gpu, "XID": fault.number, "CODE": fault.number, "TIMES": f"{fault.times:g}x"}
    words = [fault.kind, fault.node, *(str(values[argument]) for argument in kind.arguments)]
    return " ".join([*words, f"{fault.lasts_s:g}s"] if kind.lasts and fault.lasts_s else words)


def by_chance(chance: random.Random, node: str, gpus: int) -> Fault:
    """What `--chaos` does to that node."""
    kinds = [kind for kind in CHAOS if gpus or not kind.startswith("gpu-")]
    kind = chance.choices(kinds, [CHAOS[each][0] for each in kinds])[0]
    lasts_s = round(chance.uniform(*CHAOS[kind][1]), 1)
    match kind:
        case "gpu-xid":
            return Fault(kind, node, gpu=chance.randrange(gpus), number=chance.choice(XIDS))
        case "gpu-lost":
            return Fault(kind, node, gpu=chance.randrange(gpus), lasts_s=lasts_s)
        case "container-exit":
            return Fault(kind, node, number=chance.choice(CODES))
        case "slow":
            return Fault(kind, node, times=chance.choice(TIMES), lasts_s=lasts_s)
        case _:
            return Fault(kind, node, lasts_s=lasts_s)


def _form(name: str) -> str:
    kind = KINDS[name]
    return " ".join((name, "NODE", *kind.arguments, *(("[TIME]",) if kind.lasts else ())))


def _number(argument: str, word: str) -> float:
    if argument == "TIMES":
        found = re.fullmatch(r"(\d+(?:\.\d+)?)x?", word)
        if found is None or not float(found[1]):
            raise BadFault(f"{word!r} is not how many times as long: write 4x")
        return float(found[1])
    if not word.isdecimal():
        raise BadFault(f"{word!r} is no {argument}: write a number")
    return int(word)


def _seconds(word: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|h)?", word)
    if found is None:
        raise BadFault(f"{word!r} is no time: write 30s or 5m")
    return float(found[1]) * _UNITS[found[2] or "s"]
