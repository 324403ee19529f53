"""What the benchmarks share: loads by wrk, what processes use, a run from its start to its last line."""

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from scripts.bench import sheet
from scripts.programs import ROOT, Failed, Program

HERE = ROOT / "scripts" / "bench"
MIB = 1024 * 1024
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
SAMPLE_S = 0.05


@dataclass(frozen=True)
class Load:
    """What one run of wrk measured; times in milliseconds."""

    requests: int
    seconds: float
    p50_ms: float
    p99_ms: float
    max_ms: float
    errors: int

    @property
    def rps(self) -> float:
        """Requests a second."""
        return self.requests / self.seconds


def wrk_command(
    url: str, connections: int, seconds: float, arguments: Sequence[str], script: str = "wrk.lua"
) -> list[str]:
    """wrk with one of our scripts. One thread: the others of the machine's cores are for what is measured."""
    return [
        *("wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--timeout", "60s"),
        *("-s", str(HERE / script), url, "--", *arguments),
    ]


def run_wrk(command: list[str]) -> dict[str, Any]:
    """What the script printed last. Raises Failed with what wrk said."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        measured: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        raise Failed(f"wrk: {done.stdout}{done.stderr}") from None
    return measured


def wrk(url: str, connections: int, seconds: float, *headers: str, body: Path | None = None, wait_ms: int = 0) -> Load:
    """One run of wrk: POST `body`, or GET. `wait_ms`: before each request of a connection."""
    arguments = [str(body) if body else "-", str(wait_ms), *headers]
    return Load(**run_wrk(wrk_command(url, connections, seconds, arguments)))


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def cpu_s(pids: Sequence[int]) -> float:
    """User and system seconds of processes; one that is gone counts nothing."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])
    return total / TICKS_PER_S


def family(pid: int) -> list[int]:
    """A process and all its living descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                children.setdefault(int(fields[1]), []).append(int(entry.name))
    found = [pid]
    for parent in found:
        found += children.get(parent, [])
    return found


def end_family(program: Program) -> None:
    """Stop a program, then what it started and left behind."""
    started = {pid: _born(pid) for pid in family(program.pid)}
    program.stop()
    for pid, born in started.items():
        # The number may be another's by now.
        if born and _born(pid) == born:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _born(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def rss_mib(pids: Sequence[int]) -> float:
    """Resident memory of processes together."""
    return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids) * PAGE_BYTES / MIB


class Memory:
    """Watches the resident memory of processes while the block runs; MiB, all together and each."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._pids = tuple(pids)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory")
        self.before_mib = 0.0
        self.peak_mib = 0.0
        self.peaks_mib = [0.0] * len(pids)
        self.samples: list[tuple[float, float]] = []

    @property
    def growth_mib(self) -> float:
        """The peak over what it was before."""
        return self.peak_mib - self.before_mib

    def _look(self) -> None:
        each = [rss_mib([pid]) for pid in self._pids]
        self.peaks_mib = [max(pair) for pair in zip(self.peaks_mib, each, strict=True)]
        self.peak_mib = max(self.peak_mib, sum(each))
        self.samples.append((time.monotonic(), sum(each)))

    def _watch(self) -> None:
        # A process that has died is told by whoever loads it.
        with contextlib.suppress(OSError):
            while not self._stop.wait(SAMPLE_S):
                self._look()

    def __enter__(self) -> Self:
        self._look()
        self.before_mib = self.peak_mib
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()


@contextlib.contextmanager
def running(*commands: list[str]) -> Iterator[list[subprocess.Popen[str]]]:
    """Commands beside the block, their output kept; ended with it."""
    started: list[subprocess.Popen[str]] = []
    try:
        for command in commands:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            started.append(process)
        yield started
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.wait()


def options(name: str, doc: str | None) -> argparse.ArgumentParser:
    """What every benchmark has; `main` parses."""
    parser = argparse.ArgumentParser(
        prog=f"scripts/bench/{name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="under a minute: one short round, ours only")
    return parser


def add_rounds(parser: argparse.ArgumentParser, rounds: int = 3, seconds: float = 8) -> None:
    """What those have that measure in rounds, with the defaults of the full form."""
    parser.add_argument("--rounds", type=int, metavar="N", help=f"default {rounds}; with --quick 1")
    parser.add_argument(
        "--seconds", type=float, metavar="S", help=f"of each measurement; default {seconds:g}; with --quick 3"
    )
    parser.set_defaults(full=(rounds, seconds))


def main(
    name: str,
    parser: argparse.ArgumentParser,
    measure: Callable[[Path, argparse.Namespace, float], sheet.Figures],
) -> int:
    """Parse, make a directory for all state, measure, print the figures as JSON. Gives the exit status.

    `measure` prints its tables; it is given the directory, the options and how many cores had other work before.
    """
    chosen = parser.parse_args()
    if "full" in chosen:
        rounds, seconds = (1, 3) if chosen.quick else chosen.full
        chosen.rounds = chosen.rounds or rounds
        chosen.seconds = chosen.seconds or seconds
    # Ends what was started, as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
    state = Path(tempfile.mkdtemp(prefix="ngpu-bench-"))
    try:
        figures = measure(state, chosen, sheet.busy_cores())
    except Failed as error:
        print(f"{name}: {error}\nlogs: {state}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, SystemExit):
        shutil.rmtree(state, ignore_errors=True)
        return 130
    print(figures.json())
    shutil.rmtree(state, ignore_errors=True)
    return 0
