"""Where programs spend their time: py-spy samples all of them at once, under whatever load there is.

Two views, because neither is enough: CPU of each thread by the kernel's count (gRPC's own work has no Python frames),
and functions by samples of whoever holds the interpreter's lock (threads that wait are not in it).
"""

import contextlib
import json
import subprocess
from collections import Counter
from pathlib import Path

from scripts.bench import sheet
from scripts.bench.loads import TICKS_PER_S
from scripts.bench.tools import INSTRUMENTS
from scripts.programs import Failed

SAMPLES_PER_S = 100
SHOWN = 12
#: Threads below it are not told.
LEAST_SHARE = 0.01


def tables(programs: dict[str, int], seconds: float, state: Path) -> str:
    """Sample the programs (name to pid) for so long. Two tables each. Raises Failed."""
    files = {name: state / f"{name.replace(' ', '-')}.stacks" for name in programs}
    names = {program: _thread_names(pid) for program, pid in programs.items()}
    before = {program: _thread_cpu_s(pid) for program, pid in programs.items()}
    spies = []
    for program, pid in programs.items():
        command = [
            *(INSTRUMENTS.program("py-spy"), "record", "--pid", str(pid), "--duration", str(max(1, round(seconds)))),
            *("--rate", str(SAMPLES_PER_S), "--gil", "--function", "--format", "raw", "--output", str(files[program])),
        ]
        spies.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    said = [spy.communicate()[0] for spy in spies]
    parts = []
    for program, pid in programs.items():
        if not files[program].exists():
            raise Failed(f"py-spy said of the {program}: {' '.join(said)}")
        after = _thread_cpu_s(pid)
        used = {thread: (cpu - before[program].get(thread, 0.0)) / seconds for thread, cpu in after.items()}
        parts += [_threads(program, used, names[program]), _functions(program, files[program].read_text())]
    return "\n\n".join(parts)


def _threads(program: str, used: dict[int, float], names: dict[int, str]) -> str:
    rows: Counter[str] = Counter()
    for thread, share in used.items():
        rows[names.get(thread, "of gRPC's own")] += share  # type: ignore[assignment]  # Counter adds floats as well
    shown = [[name, f"{100 * share:.0f} %"] for name, share in rows.most_common() if share >= LEAST_SHARE]
    return sheet.markdown([f"{program}: thread", "of a core"], [*shown, ["all", f"{100 * sum(used.values()):.0f} %"]])


def _functions(program: str, stacks: str) -> str:
    """From lines of `frame;frame;... count`, outermost first."""
    own: Counter[str] = Counter()
    within: Counter[str] = Counter()
    for line in stacks.splitlines():
        frames, _, count = line.rpartition(" ")
        names = frames.split(";")
        own[names[-1]] += int(count)
        for frame in set(names):
            within[frame] += int(count)
    total = own.total() or 1
    rows = [
        [f"`{frame}`", f"{100 * count / total:.1f} %", f"{100 * within[frame] / total:.1f} %"]
        for frame, count in own.most_common(SHOWN)
    ]
    return sheet.markdown([f"{program}: function", "itself", "with what it calls"], rows)


def _thread_names(pid: int) -> dict[int, str]:
    """The Python threads of a process."""
    command = [INSTRUMENTS.program("py-spy"), "dump", "--json", "--pid", str(pid)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failed(f"py-spy cannot look into process {pid} (it needs root, or kernel.yama.ptrace_scope = 0): "
                     f"{done.stderr.strip()}")  # fmt: skip
    return {thread["os_thread_id"]: thread["thread_name"] or "unnamed" for thread in json.loads(done.stdout)}


def _thread_cpu_s(pid: int) -> dict[int, float]:
    used = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            fields = (task / "stat").read_text().rpartition(")")[2].split()
            used[int(task.name)] = (int(fields[11]) + int(fields[12])) / TICKS_PER_S
    return used
