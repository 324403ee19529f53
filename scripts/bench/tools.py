"""Virtualenvs for what the product does not need: peers to compare with, py-spy, matplotlib.

Each in ~/.cache/ngpu-bench/NAME (XDG_CACHE_HOME is heeded), kept from run to run; its versions are as pip had them on
the day it was made, and are told with the figures. Remove the directory to have it made anew.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from scripts.bench.sheet import progress
from scripts.programs import Failed


@dataclass(frozen=True)
class Tool:
    """A virtualenv by that name, with these packages as pip knows them; it is made for the first."""

    name: str
    packages: tuple[str, ...]

    @property
    def home(self) -> Path:
        """Where it is."""
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return cache / "ngpu-bench" / self.name

    @property
    def python(self) -> str:
        """Its interpreter."""
        return str(self.home / "bin" / "python")

    def program(self, name: str) -> str:
        """One of its programs."""
        return str(self.home / "bin" / name)

    def install(self) -> None:
        """Make it if it is not there. Raises Failed with what pip said."""
        stamp = self.home / "installed.json"
        if stamp.exists() and json.loads(stamp.read_text()) == list(self.packages):
            return
        progress(f"installing {', '.join(self.packages)} in {self.home} (once) ...")
        _run([sys.executable, "-m", "venv", str(self.home)])
        for package in self.packages:
            _run([self.python, "-m", "pip", "install", "-q", "--disable-pip-version-check", package])
        stamp.write_text(json.dumps(self.packages))

    def version(self) -> str:
        """`name version` of what it is made for."""
        name = self.packages[0].partition("[")[0]
        return f"{name} {_run([self.python, '-c', _VERSION, name]).strip()}"


_VERSION = "import importlib.metadata, sys; print(importlib.metadata.version(sys.argv[1]))"


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failed(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


#: For the programs of the benchmarks themselves.
INSTRUMENTS = Tool("instruments", ("py-spy", "matplotlib"))
