"""Do containers still see their GPUs? A program that looks from inside their control groups.

When systemd is told to read its units anew it sets the devices that each group may use to those that it knows of, and
it does not know of the GPUs that NVIDIA's hook has let in: from then on they are there, and refused. Only a process in
the group can tell. It asks with access(2), which the kernel answers as it would answer open(2), and which never reaches
a driver that may hang; it needs nothing of the image; and it needs root.

`python -I -S device_check.py PID...`: a line for each pid of a container's first process: the pid, and the device nodes
that it has and may not use. A pid of which nothing can be told has no line.
"""

import os
import stat
import sys

#: Device nodes of a GPU.
PREFIX = "nvidia"


def main() -> None:
    """One after the other."""
    groups = mounts(lines("/proc/self/mounts"))
    for pid in sys.argv[1:]:
        try:
            nodes = devices(pid)
            enter(group(lines(f"/proc/{pid}/cgroup"), groups))
        except (OSError, LookupError):
            continue
        # From here to the next group what is needed of memory counts as the container's.
        refused = [node for node in nodes if not os.access(node, os.R_OK | os.W_OK)]
        sys.stdout.write(" ".join([pid, *(node.rpartition("/")[2] for node in refused)]) + "\n")
        sys.stdout.flush()


def devices(pid: str) -> list[str]:
    """Its GPUs' device nodes."""
    directory = f"/proc/{pid}/root/dev"
    found = [f"{directory}/{name}" for name in sorted(os.listdir(directory)) if name.startswith(PREFIX)]  # noqa: PTH208
    return [node for node in found if stat.S_ISCHR(os.lstat(node).st_mode)]


def lines(path: str) -> list[str]:
    """Of one of the kernel's files."""
    with open(path) as file:  # noqa: PTH123
        return file.read().splitlines()


def mounts(said: list[str]) -> dict[str, str]:
    """Where the control groups are that say which devices may be used: by `devices` (version 1) and by `` (2)."""
    found = {}
    for line in said:
        _, where, kind, options = line.split()[:4]
        if kind == "cgroup2":
            found[""] = where
        elif kind == "cgroup" and "devices" in options.split(","):
            found["devices"] = where
    return found


def group(said: list[str], where: dict[str, str]) -> str:
    """The directory of a process's group. Raises LookupError."""
    parts = (line.split(":", 2) for line in said)
    paths = {"devices" if "devices" in names.split(",") else names: path for _, names, path in parts}
    kind = "devices" if "devices" in where else ""
    return where[kind] + paths[kind]


def enter(directory: str) -> None:
    """Be in that group from now on."""
    file = os.open(f"{directory}/cgroup.procs", os.O_WRONLY)
    try:
        os.write(file, b"0")
    finally:
        os.close(file)


if __name__ == "__main__":
    main()
