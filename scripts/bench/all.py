"""Runs the benchmarks one after the other, and writes what they print into docs/benchmarks.md.

Each has its place there between two marks, `begin NAME` and `end NAME`; what stands around them is written by people. A
benchmark that fails leaves that in its place, with the date. Run it when the machine has nothing else to do: each says
above its table if it had. --full takes about an hour on two cores, --quick about five minutes.
"""

import argparse
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from scripts.bench.loads import HERE
from scripts.programs import ROOT

PAGE = ROOT / "docs" / "benchmarks.md"
PLOT = ROOT / "docs" / "benchmarks-chain.png"
#: Well above what any takes.
LIMIT_S = 3600.0


@dataclass(frozen=True)
class Section:
    """A place of the page: its name, its command, how it is run; `full_only`: nothing in the quick form."""

    name: str
    command: str
    arguments: tuple[str, ...] = ()
    full_only: bool = False


SECTIONS = (
    Section("chain", "chain"),
    Section("curves", "chain", ("--plot", str(PLOT), "--seconds", "5"), full_only=True),
    Section("profile", "chain", ("--profile", "--seconds", "15"), full_only=True),
    Section("profile-w3", "chain", ("--profile", "w3_c8", "--seconds", "15"), full_only=True),
    Section("durable", "durable"),
    Section("memory", "memory"),
    Section("soak", "soak", full_only=True),
    Section("coldstart", "coldstart"),
    Section("heartbeats", "heartbeats"),
    Section("placement", "placement", ("--plot", str(ROOT / "docs" / "benchmarks-placement.png"))),
    Section("routing", "routing"),
)


def run(section: Section, *, quick: bool) -> str:
    """What is to stand in the page: all that the command prints but its line of JSON."""
    command = [str(HERE / section.command), *(["--quick"] if quick else []), *section.arguments]
    print(f"scripts/bench/{section.command} {' '.join(command[1:])}", file=sys.stderr)
    failed = f"**Failed** on {time.strftime('%Y-%m-%d')}"
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        try:
            said, _ = running.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            running.terminate()
            return f"{failed}: no end after {LIMIT_S:.0f} s."
        except BaseException:
            running.terminate()
            raise
    print(said)
    if running.returncode:
        return f"{failed}: exit status {running.returncode}."
    lines = said.strip().splitlines()
    form = "Short form (--quick). " if quick else ""
    return form + "\n".join(lines[:-1]).strip()


def placed(page: str, name: str, text: str) -> str:
    """The page with the text between the marks of that name. Raises ValueError if it has none."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    if begin not in page or end not in page:
        raise ValueError(f"{PAGE} has no place for {name}: {begin} and {end}")
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    return pattern.sub(lambda _: f"{begin}\n{text}\n{end}", page, count=1)


def write_whole(path: Path, text: str) -> None:
    """Whoever reads it reads all of it."""
    draft = path.with_suffix(".new")
    draft.write_text(text)
    draft.replace(path)


def main() -> int:
    """Run them. Gives the exit status: 1 if any failed."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench/all", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    form = parser.add_mutually_exclusive_group(required=True)
    form.add_argument("--quick", action="store_true", help="the short form of each, ours only")
    form.add_argument("--full", action="store_true", help="what is to be kept")
    parser.add_argument(
        "--only", metavar="LIST", help=f"of {','.join(section.name for section in SECTIONS)}; default all there are"
    )
    parser.add_argument("--dry", action="store_true", help="print, and leave the page as it is")
    options = parser.parse_args()
    names = options.only.split(",") if options.only else [section.name for section in SECTIONS]
    if unknown := set(names) - {section.name for section in SECTIONS}:
        parser.error(f"there is no {', '.join(sorted(unknown))}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    failed = False
    for section in SECTIONS:
        if section.name not in names or (options.quick and section.full_only):
            continue
        if not (HERE / section.command).exists():
            print(f"scripts/bench/{section.command} is not there", file=sys.stderr)
            continue
        text = run(section, quick=options.quick)
        failed = failed or text.startswith("**Failed**")
        # Read anew each time: a run is long, and people write too.
        if not options.dry:
            write_whole(PAGE, placed(PAGE.read_text(), section.name, text))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
