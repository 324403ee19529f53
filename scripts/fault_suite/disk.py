"""A small disk of one's own, to fill to the last byte."""

import contextlib
import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

FILLER = "filler"


def why_no_disks() -> str:
    """Why none can be made here; "" if they can."""
    return "" if os.geteuid() == 0 else "needs root, to mount a small disk"


@contextlib.contextmanager
def small_disk(directory: Path, size_bytes: int) -> Iterator[Path]:
    """`directory`, which is made, on a file system of that size: ext4 in a file; without loop devices, in memory."""
    directory.mkdir(parents=True)
    image = directory.with_name(f"{directory.name}.img")
    with image.open("wb") as file:
        file.truncate(size_bytes)
    if not (_run("mkfs.ext4", "-q", "-F", "-m", "0", image) and _run("mount", "-o", "loop", image, directory)):
        options = f"size={size_bytes},mode=0700"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "small", directory], check=True, capture_output=True)
    directory.chmod(0o700)
    try:
        yield directory
    finally:
        # Lazily: a program that is about to end may still have a file open.
        _run("umount", "-l", directory)
        image.unlink()


def _run(*command: str | Path) -> bool:
    """Did it do what it should?"""
    try:
        return subprocess.run(command, check=False, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def full(directory: Path) -> Iterator[None]:
    """Not a byte is left on that disk until the block ends."""
    filler = directory / FILLER
    try:
        with filler.open("wb", buffering=0) as file:
            for size in (1024 * 1024, 4096, 1):
                try:
                    while file.write(b"x" * size) == size:
                        pass
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
        yield
    finally:
        filler.unlink(missing_ok=True)
