"""The long form of the fault suite: faults chosen by chance, one or two at a time, as long as asked; then the audit.

Rigs suffer side by side: one with SQLite, one with PostgreSQL, one with two control planes on one PostgreSQL, one with
the machine's Docker engine, as far as there are such things here. The seed decides which faults come in which order and
how long they last; when within a task they hit is the machine's doing, so that the same seed is the same plan and not
the same run.

Prints each fault as it is over, recovery times by fault, and the audit's counts. Exit status 1: something was lost,
doubled without an explanation, or cost more than it may.
"""

import argparse
import contextlib
import os
import platform
import random
import secrets
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from scripts.fault_suite.faults import FAULTS, Fault, suffer
from scripts.fault_suite.postgres import Postgres, why_no_postgres
from scripts.fault_suite.rig import Docker, Recovery, Rig
from scripts.programs import ROOT

#: How often two faults come at once.
TWO_AT_ONCE: Final = 0.25
#: After the last fault, for everything to end.
END_LIMIT_S: Final = 120.0
ENGINE: Final = "unix:///var/run/docker.sock"

_printing = threading.Lock()


def say(text: str) -> None:
    """A line, whole."""
    with _printing:
        print(text, flush=True)


def main() -> int:
    """Exit status."""
    parser = argparse.ArgumentParser(
        prog="scripts/faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=20.0, help="how long faults are inflicted [20]")
    parser.add_argument("--seed", type=int, default=None, help="the plan of an earlier run [a new one]")
    parser.add_argument("--rigs", default="sqlite,postgres,pair,docker", help="which [sqlite,postgres,pair,docker]")
    parser.add_argument("--only", default="", help="only faults with these words in their names")
    parser.add_argument(
        "--outage",
        type=float,
        default=0,
        metavar="SECONDS",
        help="once, leave tasks and take the control plane away [0]",
    )
    parser.add_argument("--keep", type=Path, help="an empty directory for databases and logs, kept")
    parser.add_argument("--list", action="store_true", help="name the faults, and end")
    given = parser.parse_args()
    if given.list:
        say("\n".join(f"{one.name:<62} costs {one.costs}" for one in FAULTS.values()))
        return 0
    seed = secrets.randbelow(10**6) if given.seed is None else given.seed
    say(f"seed {seed}, {given.minutes:g} minutes, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {machine()}")
    with contextlib.ExitStack() as stack:
        directory = given.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ngpu-faults-")))
        names = given.rigs.split(",")
        with ThreadPoolExecutor(len(names)) as pool:
            # A plan of its own for each, so that none depends on how fast another is.
            outcomes = [pool.submit(endure, name, directory / name, f"{seed} {name}", given) for name in names]
            faults = [fault for outcome in outcomes for fault in outcome.result()]
    say(f"\nseed {seed}: " + ("all is as it must be" if not faults else f"{len(faults)} FAULTS"))
    for fault in faults:
        say(fault)
    return 1 if faults else 0


def machine() -> str:
    """In a few words."""
    return f"{os.cpu_count()} CPUs, Linux {platform.release()}, Python {platform.python_version()}"


def endure(name: str, state: Path, seed: str, given: argparse.Namespace) -> list[str]:
    """One rig, from its start to its audit; what is wrong, in words."""
    faults: list[str] = []
    try:
        with rig_of(name, state, random.Random(seed), given.outage) as (rig, why):  # noqa: S311
            if rig is None:
                say(f"{name}: left out: {why}")
                return []
            if rig.pair:
                rig.pair.both()
            rig.begin()
            inflict_for(rig, name, given.minutes * 60, given.only, faults)
            findings = rig.finish(END_LIMIT_S)
            try:
                findings.check()
            except AssertionError as error:
                faults.append(f"{name}: {error}")
            with _printing:
                print(f"\n== {name}\n\n{table(rig.recoveries)}\n\n{findings.table()}", flush=True)
                for one in rig.switches:
                    print(
                        f"{one.fault}: the other served after {one.serves_s:.1f} s, all there after {one.whole_s:.1f} s"
                    )
    except Exception as error:
        faults.append(f"{name}: {type(error).__name__}: {error}")
    return faults


def inflict_for(rig: Rig, name: str, seconds: float, only: str, faults: list[str]) -> None:
    """Fault after fault until the time is over."""
    possible = [one for one in FAULTS.values() if only in one.name and not one.why_not(rig)]
    for one in FAULTS.values():
        if why := one.why_not(rig):
            say(f"{name}: skipped {one.name}: {why}")
    deadline = time.monotonic() + seconds
    for one in [one for one in possible if "outage" in one.needs]:
        possible.remove(one)
        inflict(rig, name, [one], faults)
    while possible and time.monotonic() < deadline:
        chosen = [rig.chance.choice(possible)]
        others = [one for one in possible if one.subject != chosen[0].subject]
        if others and rig.chance.random() < TWO_AT_ONCE:
            chosen.append(rig.chance.choice(others))
        inflict(rig, name, chosen, faults)


def inflict(rig: Rig, name: str, chosen: Sequence[Fault], faults: list[str]) -> None:
    """These at once, and say what they cost."""
    words, before = "", len(rig.recoveries)
    try:
        suffer(rig, *(one.name for one in chosen))
    except Exception as error:
        faults.append(f"{name}: {' + '.join(one.name for one in chosen)}: {type(error).__name__}: {error}")
        words = f"  FAULT {type(error).__name__} {error}"
    at = f"{datetime.now(UTC):%H:%M:%S} {name}"
    said = line(rig.recoveries[-1]) if len(rig.recoveries) > before else " + ".join(one.name for one in chosen)
    say(f"{at}: {said}{words}")


def line(recovery: Recovery) -> str:
    """What one fault has cost."""
    lost = ", ".join(f"{number} {reason}" for reason, number in recovery.attempts.items()) or "none"
    return (
        f"{recovery.fault}: lasted {recovery.lasted_s:.1f} s, silence {recovery.silence_s:.1f} s, "
        f"settled after {recovery.settled_s:.1f} s, attempts lost: {lost}"
    )


def table(recoveries: Sequence[Recovery]) -> str:
    """Recovery times by fault."""
    by_fault: dict[str, list[Recovery]] = {}
    for one in recoveries:
        by_fault.setdefault(one.fault, []).append(one)
    rows = ["| fault | times | lasted, s | longest silence, s | given up after, s | settled after, s | attempts lost |"]
    rows.append("|---|---|---|---|---|---|---|")
    for fault, ones in sorted(by_fault.items()):
        noticed = max(one.noticed_s for one in ones)
        rows.append(
            f"| {fault} | {len(ones)} | {statistics.median(one.lasted_s for one in ones):.1f} "
            f"| {max(one.silence_s for one in ones):.1f} | {f'{noticed:.1f}' if noticed else '-'} "
            f"| {max(one.settled_s for one in ones):.1f} | {sum(one.attempts.total() for one in ones)} |"
        )
    return "\n".join(rows)


@contextlib.contextmanager
def rig_of(name: str, state: Path, chance: random.Random, outage_s: float) -> Iterator[tuple[Rig | None, str]]:
    """The rig of that name; or None, and why there is none."""
    parts: dict[str, Any] = {"chance": chance, "quick": False, "outage_s": outage_s}
    with contextlib.ExitStack() as stack:
        if name in ("postgres", "pair"):
            if why := why_no_postgres():
                yield None, why
                return
            parts |= {"postgres": stack.enter_context(Postgres()), "nodes": 2, "standby": name == "pair"}
        elif name == "docker":
            docker, why = docker_here()
            if docker is None:
                yield None, why
                return
            parts |= {"docker": docker, "nodes": 2}
        elif name != "sqlite":
            raise ValueError(f"there is no rig {name!r}: sqlite, postgres, pair or docker")
        yield stack.enter_context(Rig(state, **parts)), ""


def docker_here() -> tuple[Docker | None, str]:
    """The machine's own engine, with an image that has Python in it; or why there is none."""
    import docker

    try:
        client = docker.from_env(timeout=60)
        client.ping()
        made = subprocess.run([ROOT / "scripts" / "base-image"], check=True, capture_output=True, text=True)
    except (docker.errors.DockerException, subprocess.CalledProcessError, OSError) as error:
        return None, f"no Docker engine: {error}"
    return Docker(os.environ.get("DOCKER_HOST", ENGINE), client, made.stdout.strip()), ""


if __name__ == "__main__":
    sys.exit(main())
