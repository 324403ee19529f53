"""A PostgreSQL of one's own, to stop and start."""

import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path


def why_no_postgres() -> str:
    """Why none can be had here; "" if it can."""
    return "" if _bin() else "needs PostgreSQL's programs (apt-get install postgresql)"


def _bin() -> Path | None:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    return found[-1].parent if found else None


class Postgres:
    """A cluster on a free port, with an empty database `ngpu`; `address` is HOST:PORT. Gone at the end."""

    def __init__(self) -> None:
        binaries = _bin()
        assert binaries, why_no_postgres()
        self._bin = binaries
        # initdb refuses root.
        self._as = [] if os.geteuid() else ["runuser", "-u", "postgres", "--"]
        self._home = ""
        self.address = ""

    def __enter__(self) -> "Postgres":
        self._home = tempfile.mkdtemp(prefix="ngpu-postgres-")
        if self._as:
            shutil.chown(self._home, "postgres")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        try:
            self._run("initdb", "-A", "trust", "-U", "ngpu", "-E", "UTF8", "--no-locale", "-D", f"{self._home}/data")
            self.start()
            host, port = self.address.split(":")
            self._run("createdb", "-h", host, "-p", port, "-U", "ngpu", "ngpu")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run([*self._as, str(self._bin / "pg_ctl"), *self._stopping()], check=False, capture_output=True)
        shutil.rmtree(self._home, ignore_errors=True)

    def url(self, address: str = "") -> str:
        """Of the database, over that way to it."""
        return f"postgresql+psycopg://ngpu@{address or self.address}/ngpu"

    def start(self) -> None:
        """Returns once it answers."""
        options = f"-p {self.address.split(':')[1]} -k {self._home} -c listen_addresses=127.0.0.1"
        log = f"{self._home}/log"
        self._run("pg_ctl", "-D", f"{self._home}/data", "-l", log, "-w", "-t", "30", "-o", options, "start")

    def stop(self) -> None:
        """As a crash does it."""
        self._run("pg_ctl", *self._stopping())

    def _stopping(self) -> tuple[str, ...]:
        return ("-D", f"{self._home}/data", "-m", "immediate", "stop")

    def _run(self, program: str, *arguments: str) -> None:
        # Not captured: the server would hold the pipe.
        with Path(os.devnull).open("wb") as nowhere:
            subprocess.run(
                [*self._as, str(self._bin / program), *arguments], check=True, cwd="/", stdout=nowhere, stderr=nowhere
            )
