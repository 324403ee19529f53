"""What a process in a container's group may use of its devices, as the kernel has it."""

import ctypes
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nodedaemon.engine import device_check

#: bpf(2) on x86-64, its commands, and what a program of that kind is attached as.
BPF, LOAD, ATTACH, CGROUP_DEVICE, AS_DEVICE, ALLOW_MULTI = 321, 5, 8, 15, 6, 2
DEVICE = "/dev/fuse"

LOOK = f"""
import os, sys
sys.path.insert(0, {str(Path(device_check.__file__).parent)!r})
from device_check import enter
enter(sys.argv[1])
print(os.access({DEVICE!r}, os.R_OK | os.W_OK), os.access("/dev", os.R_OK))
"""


@pytest.fixture
def group() -> Iterator[Path]:
    """A group of version 2, of which systemd has taken away all devices."""
    where = device_check.mounts(device_check.lines("/proc/self/mounts")).get("")
    if os.geteuid() != 0 or where is None or os.uname().machine != "x86_64" or not Path(DEVICE).exists():
        pytest.skip("needs root, control groups of version 2, x86-64 and /dev/fuse")
    directory = Path(where, f"ngpu-test-{os.getpid()}")
    directory.mkdir()
    yield directory
    directory.rmdir()


def refuse_all(directory: Path) -> None:
    """A program that says no, as systemd attaches one with a list of what it knows."""
    no = struct.pack("<BBhi", 0xB7, 0, 0, 0) + struct.pack("<BBhi", 0x95, 0, 0, 0)
    code, licence = ctypes.create_string_buffer(no), ctypes.create_string_buffer(b"GPL")
    program = bpf(LOAD, struct.pack("<IIQQ", CGROUP_DEVICE, 2, ctypes.addressof(code), ctypes.addressof(licence)))
    group = os.open(directory, os.O_RDONLY)
    try:
        bpf(ATTACH, struct.pack("<IIII", group, program, AS_DEVICE, ALLOW_MULTI))
    finally:
        os.close(group)
        os.close(program)


def bpf(command: int, attributes: bytes) -> int:
    whole = ctypes.create_string_buffer(attributes, 128)
    done: int = ctypes.CDLL(None, use_errno=True).syscall(BPF, command, whole, len(whole))
    if done < 0:
        pytest.skip(f"this kernel lets no such program be loaded: {os.strerror(ctypes.get_errno())}")
    return done


def seen_from(directory: Path) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", LOOK, str(directory)], capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def test_a_group_of_version_2_tells_what_was_taken_away_and_no_driver_is_asked(group: Path) -> None:
    assert seen_from(group) == ["True", "True"]
    refuse_all(group)
    assert seen_from(group) == ["False", "True"]
