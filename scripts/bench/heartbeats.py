"""What idle nodes cost the control plane: simulated daemons, each on a connection of its own, reporting every 5 s.

Each enrols with a one-time token, logs in with its key, and keeps both streams of a real daemon; its first report says
8 GPUs and 10 images, and all others, as a real daemon's, how the GPUs are and that the rest is as before. CPU is the
control plane's, user and system; `idle` is without nodes.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import grpc
from ngpu import wire
from ngpu.v1 import fleet_pb2, fleet_pb2_grpc

from scripts.bench import hotspots, loads, sheet
from scripts.bench.loads import cpu_s, rss_mib
from scripts.bench.sheet import Goal
from scripts.bench.tools import INSTRUMENTS
from scripts.programs import Failed, Platform

NODES = 1000
QUICK_NODES = 200
GPUS = 8
#: Processes that the nodes are spread over: one would be busier than what it measures.
PROCESSES = 2
IDLE_S = 5.0
#: After all are up, before anything is measured.
SETTLE_S = 5.0

GOALS = (
    Goal("1,000 nodes, share of a core", "core_share_1000", 0.10, 0.05, most=True, unit="of a core"),
    Goal("sessions lost", "lost", 0, most=True),
)


def join_tokens(address: str, secret: str, count: int) -> list[str]:
    """One-time tokens, one for each node."""
    with grpc.insecure_channel(address, options=wire.CLIENT_OPTIONS) as channel:
        stub: Any = fleet_pb2_grpc.FleetServiceStub(channel)
        metadata = ((wire.AUTHORIZATION, f"Bearer {secret}"),)
        request = fleet_pb2.CreateTokenRequest(role=fleet_pb2.ROLE_NODE, name="simulated")
        return [stub.CreateToken(request, metadata=metadata).secret for _ in range(count)]


@contextmanager
def daemons(address: str, tokens: list[str], log: Path) -> Iterator["subprocess.Popen[str]"]:
    """A process with a node for each token, ended with the block."""
    command = [sys.executable, "-m", "scripts.bench.daemons", address, str(GPUS)]
    with log.open("ab") as errors:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        _pipe(process.stdin).write("\n".join([*tokens, "end", ""]))
        _pipe(process.stdin).flush()
        yield process
    finally:
        process.terminate()
        process.wait()


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


def _line(process: "subprocess.Popen[str]", log: Path) -> str:
    line = _pipe(process.stdout).readline().strip()
    if not line:
        raise Failed(f"the simulated daemons have ended: {log.read_text()[-2000:]}")
    return line


def _reports(processes: list["subprocess.Popen[str]"], log: Path) -> list[dict[str, float]]:
    for process in processes:
        _pipe(process.stdin).write("report\n")
        _pipe(process.stdin).flush()
    return [json.loads(_line(process, log)) for process in processes]


def measure(state: Path, options: argparse.Namespace, busy: float) -> sheet.Figures:
    """Idle, then with all nodes."""
    count: int = options.nodes or (QUICK_NODES if options.quick else NODES)
    if options.profile:
        INSTRUMENTS.install()
    figures = sheet.Figures()
    keep = figures.keep
    with Platform(state) as platform, ExitStack() as running:
        pid = platform.controlplane.pid
        log = platform.logs / "daemons.log"
        time.sleep(2)
        sheet.progress("idle")
        keep("idle_core_share", _share(pid, IDLE_S))
        keep("idle_mib", rss_mib([pid]))
        sheet.progress(f"{count} tokens")
        secret = (platform.state / "controlplane" / "operator.token").read_text().strip()
        # In a process of its own: one that has used gRPC cannot fork the next ones cleanly.
        tokens = _tokens(platform.server, secret, count)
        sheet.progress(f"{count} nodes join")
        began, used = time.monotonic(), cpu_s([pid])
        processes = [
            running.enter_context(daemons(platform.server, tokens[first::PROCESSES], log)) for first in range(PROCESSES)
        ]
        for process in processes:
            _line(process, log)
        keep("join_s", time.monotonic() - began)
        keep("join_cpu_ms", (cpu_s([pid]) - used) / count * 1e3)
        time.sleep(SETTLE_S)
        _reports(processes, log)
        for turn in range(options.rounds):
            sheet.progress(f"{count} nodes report: round {turn + 1} of {options.rounds}")
            keep("core_share", _share(pid, options.seconds))
            told = _reports(processes, log)
            reports = sum(each["reports"] for each in told)
            keep("reports_per_s", reports / options.seconds)
            keep("report_p50_ms", max(each["p50_ms"] for each in told))
            keep("report_p99_ms", max(each["p99_ms"] for each in told))
            keep("lost", sum(each["lost"] for each in told))
        keep("mib", rss_mib([pid]))
        hot = hotspots.tables({"control plane": pid}, options.seconds, state) if options.profile else ""
    keep("report_cpu_us", (figures["core_share"] - figures["idle_core_share"]) / figures["reports_per_s"] * 1e6)
    # From fewer nodes it is an estimate: as if a report cost the same whatever their number.
    share = figures["core_share"] if count == NODES else figures["idle_core_share"] + figures["report_cpu_us"] / 5000
    keep("core_share_1000", share)
    sheet.progress("")
    print(sheet.where(busy), sheet.in_rounds(options.rounds, options.seconds) + "\n")
    print(_table(figures, count))
    print()
    print(sheet.goals_table(GOALS, figures))
    if hot:
        print(f"\n{hot}")
    return figures


def _tokens(address: str, secret: str, count: int) -> list[str]:
    command = [sys.executable, "-m", "scripts.bench.heartbeats", "--tokens", address, str(count)]
    done = subprocess.run(command, input=secret, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failed(f"tokens could not be made: {done.stderr}")
    return done.stdout.split()


def _share(pid: int, seconds: float) -> float:
    """CPU of a process over that time, as a share of a core."""
    began, before = time.monotonic(), cpu_s([pid])
    time.sleep(seconds)
    return (cpu_s([pid]) - before) / (time.monotonic() - began)


def _table(figures: sheet.Figures, count: int) -> str:
    shown = sheet.number
    rows = [
        ["idle", f"{100 * figures['idle_core_share']:.1f} % of a core", f"{shown(figures['idle_mib'])} MiB"],
        [
            f"{count:,} nodes join",
            f"{shown(figures['join_s'])} s",
            f"{shown(figures['join_cpu_ms'])} ms of CPU each, first report included",
        ],
        [
            f"{count:,} nodes report",
            f"{100 * figures['core_share']:.1f} % of a core",
            f"{shown(figures['reports_per_s'])} reports/s, {shown(figures['report_cpu_us'])} us of CPU each, "
            f"{shown(figures['mib'])} MiB",
        ],
        [
            "a report's answer",
            f"p50 {shown(figures['report_p50_ms'])} ms",
            f"p99 {shown(figures['report_p99_ms'])} ms",
        ],
    ]
    return sheet.markdown(["control plane", "measured", "with"], rows)


def main() -> int:
    """Run the benchmark. Gives the exit status."""
    if sys.argv[1:2] == ["--tokens"]:
        print(*join_tokens(sys.argv[2], sys.stdin.read(), int(sys.argv[3])), sep="\n")
        return 0
    parser = loads.options("heartbeats", __doc__)
    loads.add_rounds(parser, rounds=3, seconds=20)
    parser.add_argument(
        "--nodes",
        type=int,
        metavar="N",
        help=f"default {NODES:,}; with --quick {QUICK_NODES}, for figures of {NODES:,}",
    )
    parser.add_argument(
        "--profile", action="store_true", help="also the control plane's hottest functions while all report (py-spy)"
    )
    return loads.main("heartbeats", parser, measure)


if __name__ == "__main__":
    sys.exit(main())
