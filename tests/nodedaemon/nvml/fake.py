"""Builds the fake driver libraries, where the loader looks first; what they say is a file that a test edits."""

import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

NVML = Path(__file__).with_name("fake_nvml.c")
CUDA = Path(__file__).with_name("fake_cuda.c")

#: A healthy card, as most tests want it.
HEALTHY = {
    "uuid": "GPU-{n}",
    "name": "NVIDIA GeForce RTX 4090",
    "memory": "25757220864",
    "used": "1073741824",
    "utilization": "37",
    "temperature": "61",
    "power": "312500",
    "clocks": "0x4",
    "ecc": "0",
    "remap_pending": "0",
    "remap_failed": "0",
    "recovery": "0",
}


class FakeDriver:
    """What the fake library says. `set` and `drop` take effect at its next call."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch, *, gpus: int = 1) -> None:
        self._directory = directory
        self._file = directory / "nvml.txt"
        self._said = {"driver": "550.54.15", "cuda": "12040", "count": str(gpus)}
        for n in range(gpus):
            self._said.update({f"{n}.{key}": value.format(n=n) for key, value in HEALTHY.items()})
        self._lists: list[str] = []
        self._write()
        build(NVML, directory / "libnvidia-ml.so.1")
        monkeypatch.setenv("LD_LIBRARY_PATH", str(directory), prepend=os.pathsep)
        monkeypatch.setenv("FAKE_NVML", str(self._file))

    def with_cuda(self) -> None:
        """CUDA is there too."""
        build(CUDA, self._directory / "libcuda.so.1")

    def without_cuda(self) -> None:
        """Whatever this machine has."""
        (self._directory / "libcuda.so.1").write_bytes(b"")

    def set(self, **values: str) -> None:
        """`gpu0_temperature="50"` sets 0.temperature, `count="2"` the count."""
        self._said.update({_key(name): value for name, value in values.items()})
        self._write()

    def drop(self, *names: str) -> None:
        """From now on not supported."""
        for name in names:
            del self._said[_key(name)]
        self._write()

    def add(self, name: str, value: str) -> None:
        """One more Xid or process."""
        self._lists.append(f"{_key(name)} {value}")
        self._write()

    def clear(self) -> None:
        """No Xids and processes any more."""
        self._lists.clear()
        self._write()

    def _write(self) -> None:
        part = self._file.with_suffix(".part")
        part.write_text(
            "".join(f"{key} {value}\n" for key, value in self._said.items()) + "\n".join([*self._lists, ""])
        )
        part.replace(self._file)


def build(source: Path, library: Path) -> None:
    """Put a fake library there, or skip the test where there is no compiler."""
    library.write_bytes(_compiled(source))


@functools.cache
def _compiled(source: Path) -> bytes:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if not compiler:
        pytest.skip("needs a C compiler to build the fake NVIDIA driver library")
    flags = ["-O2", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    with tempfile.TemporaryDirectory() as directory:
        made = Path(directory) / "made.so"
        subprocess.run([compiler, *flags, "-o", made, source, "-lm"], check=True)
        return made.read_bytes()


def _key(name: str) -> str:
    if name.startswith("cu"):
        return f"cuda.{name}" if name != "cuda" else name
    return name.removeprefix("gpu").replace("_", ".", 1) if name.startswith("gpu") else name
