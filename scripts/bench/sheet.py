"""What a benchmark found: figures, goals and tables, printed as Markdown with one line of JSON last.

The tables go as they are into docs/benchmarks.md (see all.py), so that what a person reads there is what was printed.
"""

import json
import os
import platform as machine
import shutil
import sqlite3
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from scripts.programs import ROOT

#: Cores that may be busy with other work before it shows in the figures.
QUIET_CORES = 0.15


class Figures:
    """Named figures, measured in rounds; what is told is their median."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = {}

    def keep(self, name: str, value: float) -> None:
        """One more measurement of a figure."""
        self._values.setdefault(name, []).append(value)

    def __getitem__(self, name: str) -> float:
        return statistics.median(self._values[name])

    def get(self, name: str) -> float | None:
        """The median, or None if it was not measured."""
        return self[name] if name in self._values else None

    def ratio(self, name: str, other: str) -> float | None:
        """Of two medians; None if one was not measured."""
        of, to = self.get(name), self.get(other)
        return of / to if of is not None and to else None

    def json(self) -> str:
        """All medians, on one line."""
        return json.dumps({name: round(self[name], 4) for name in sorted(self._values)})


@dataclass(frozen=True)
class Goal:
    """A figure, or its ratio `to` another, and what it must be and should reach. `most`: less is better."""

    what: str
    figure: str
    must: float | None
    reach: float | None = None
    to: str = ""
    most: bool = False
    unit: str = ""

    def value(self, figures: Figures) -> float | None:
        """What was measured."""
        return figures.ratio(self.figure, self.to) if self.to else figures.get(self.figure)

    def verdict(self, figures: Figures) -> str:
        """`reached`; `pass`: what must be; `FAIL`: not even that; `-`: not measured."""
        value = self.value(figures)
        if value is None:
            return "-"

        def holds(limit: float | None) -> bool:
            return limit is None or (value <= limit if self.most else value >= limit)

        if not holds(self.must):
            return "**FAIL**"
        if self.reach is not None and holds(self.reach):
            return "reached"
        return "pass" if self.must is not None else "not reached"


def number(value: float | None, unit: str = "") -> str:
    """Three figures and a thousands separator; `-` for None."""
    if value is None:
        return "-"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    text = f"{value:,.{digits}f}"
    return f"{text} {unit}" if unit and unit != "x" else text + unit


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """An aligned table; the first column to the left, the others to the right."""
    lines = [list(head), *map(list, rows)]
    widths = [max(3, *(len(line[column]) for line in lines)) for column in range(len(head))]

    def shown(line: Sequence[str]) -> str:
        first = line[0].ljust(widths[0])
        return "| " + " | ".join([first, *map(str.rjust, line[1:], widths[1:])]) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return "\n".join([shown(lines[0]), rule, *map(shown, lines[1:])])


def goals_table(goals: Iterable[Goal], figures: Figures) -> str:
    """Goals that were measured, with words."""
    rows = []
    for goal in goals:
        if (value := goal.value(figures)) is None:
            continue
        unit = goal.unit or ("x" if goal.to else "")
        limits = [
            "-" if limit is None else ("<= " if goal.most else "") + number(limit, unit)
            for limit in (goal.must, goal.reach)
        ]
        rows.append([goal.what, number(value, unit), *limits, goal.verdict(figures)])
    return markdown(["goal", "measured", "must", "to reach", "verdict"], rows)


def where(busy: float, *others: str) -> str:
    """The line above every table: date, machine, versions, commit, and `busy`, cores that had other work."""
    known = []
    for package in ("grpcio", "aiohttp", "protobuf"):
        try:
            known.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    parts = [
        time.strftime("%Y-%m-%d"),
        f"{os.cpu_count()} cores ({_processor()})",
        f"{machine.system()} {machine.release()}",
        f"Python {machine.python_version()}",
        *known,
        f"SQLite {sqlite3.sqlite_version}",
        *others,
        f"commit {_commit()}",
    ]
    text = ", ".join(part for part in parts if part) + "."
    if busy > QUIET_CORES:
        text += f" **The machine was busy with other work** ({busy:.1f} cores, before it began): figures are too low."
    return text


def busy_cores(seconds: float = 1.0) -> float:
    """How many cores the machine keeps busy by itself. Asked before a benchmark starts anything."""
    before = _idle_s()
    time.sleep(seconds)
    return max(0.0, (os.cpu_count() or 1) - (_idle_s() - before) / seconds)


def _idle_s() -> float:
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    return (int(fields[4]) + int(fields[5])) / os.sysconf("SC_CLK_TCK")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return machine.machine()


def _commit() -> str:
    git = shutil.which("git")
    if git is None:
        return "unknown"

    def said(*arguments: str) -> str:
        return subprocess.run(
            [git, "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False
        ).stdout.strip()

    changed = " and changes" if said("status", "--porcelain", "--", "controlplane", "nodedaemon", "httpbridge") else ""
    return (said("rev-parse", "--short", "HEAD") or "unknown") + changed


def tool_version(*command: str) -> str:
    """The first line that a tool says about itself, or nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    lines = (done.stdout + done.stderr).strip().splitlines()
    return lines[0].strip() if lines else ""


def in_rounds(count: int, seconds: float) -> str:
    """How the figures came about."""
    return f"{count} rounds of {seconds:g} s, medians." if count > 1 else f"One round of {seconds:g} s."


def progress(text: str) -> None:
    """What is being done, on a terminal's one line of stderr."""
    end = "\r" if sys.stderr.isatty() else "\n"
    print(f"{text:78}", end=end, file=sys.stderr, flush=True)


def rounds(count: int, steps: Sequence[tuple[str, Callable[[], None]]]) -> None:
    """All steps, `count` times over, so that what the machine does to one it does to all."""
    for turn in range(count):
        for name, step in steps:
            progress(f"round {turn + 1} of {count}: {name}")
            step()
    progress("")
