"""Why something was chosen: plain values kept beside what was decided, bounded, told in words.

A Decision mirrors fleet.proto's. It is stored as JSON in the row it explains, so that the answer to "why there?" is the
one given at the time and not one made up later.
"""

from collections import Counter
from collections.abc import Iterable
from datetime import datetime
from typing import Final

import msgspec

#: Candidates kept of those refused; all are counted in `refusals`.
REFUSED_KEPT: Final = 100
#: Candidates kept of those accepted, cheapest first.
ACCEPTED_KEPT: Final = 10


class Candidate(msgspec.Struct, frozen=True, omit_defaults=True):
    """One that was considered: refused in words, or with each part of its cost by name (lower is better)."""

    id: str
    name: str = ""
    refusal: str = ""
    parts: dict[str, float] = {}
    cost: float = 0.0


class Decision(msgspec.Struct, frozen=True, omit_defaults=True):
    """One choice between candidates. `chosen` is one's id, or empty: none. `refusals`: how many for which reason."""

    time: datetime
    subject: str
    chosen: str = ""
    candidates: tuple[Candidate, ...] = ()
    refusals: dict[str, int] = {}


def decide(time: datetime, subject: str, accepted: Iterable[Candidate], refused: Iterable[Candidate]) -> Decision:
    """The cheapest of `accepted` (ties by id), and why the others not. Keeps a bounded number of candidates."""
    ranked = sorted(accepted, key=lambda candidate: (candidate.cost, candidate.id))
    refused = tuple(refused)
    return Decision(
        time=time,
        subject=subject,
        chosen=ranked[0].id if ranked else "",
        candidates=(*ranked[:ACCEPTED_KEPT], *refused[:REFUSED_KEPT]),
        refusals=counted(refused),
    )


def counted(refused: Iterable[Candidate]) -> dict[str, int]:
    """How many were refused for which reason, most frequent first."""
    return dict(Counter(candidate.refusal for candidate in refused).most_common())


_ENCODER = msgspec.json.Encoder()
_DECODER = msgspec.json.Decoder(Decision)


def encode(decision: Decision) -> bytes:
    """As JSON, for a row."""
    return _ENCODER.encode(decision)


def decode(data: bytes | None) -> Decision | None:
    """From a row; None if nothing is kept there or it cannot be read: an explanation must not stop a start."""
    if not data:
        return None
    try:
        return _DECODER.decode(data)
    except msgspec.DecodeError:
        return None


def summary(decision: Decision) -> str:
    """The decision in one sentence."""
    refused = sum(decision.refusals.values())
    if not decision.chosen:
        if not refused:
            return f"{_capital(decision.subject)}: there is no candidate at all."
        return f"{_capital(decision.subject)}: none of {refused} will do: {in_words(decision.refusals)}."
    chosen = next((c for c in decision.candidates if c.id == decision.chosen), Candidate(decision.chosen))
    accepted = sum(1 for candidate in decision.candidates if not candidate.refusal)
    text = f"{_capital(decision.subject)}: {chosen.name or chosen.id}"
    if accepted > 1:
        second = next(c for c in decision.candidates if not c.refusal and c.id != chosen.id)
        text += f", the cheapest of {accepted}{'' if accepted < ACCEPTED_KEPT else ' or more'}"
        if second.cost > chosen.cost:
            text += f" ({chosen.cost:.3f} against {second.cost:.3f} for {second.name or second.id})"
    else:
        text += ", the only one that will do"
    return text + (f"; refused: {in_words(decision.refusals)}." if refused else ".")


def in_words(refusals: dict[str, int]) -> str:
    """`3 too little GPU memory, 1 is drained`: most frequent first."""
    ranked = sorted(refusals.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {reason}" for reason, count in ranked)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
