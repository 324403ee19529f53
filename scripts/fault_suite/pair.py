"""Two control planes on one PostgreSQL, and a supervisor that starts again whichever has ended."""

import contextlib
import http.client
import socket
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from scripts.programs import START_LIMIT_S, Failed, Platform, Program

#: How often the supervisor looks.
LOOK_S: Final = 0.2
#: For a control plane to say whether it is the active one.
ASK_S: Final = 1.0
#: After so long the active one is taken over from, if it stands still.
LEASE_S: Final = 4.0


def pair_settings(state: Path) -> dict[str, str]:
    """What both must agree on, as environment."""
    return {
        "NGPU_CONTROLPLANE_BODIES_DIR": str(state / "bodies"),
        "NGPU_CONTROLPLANE_LEASE": f"{LEASE_S}s",
    }


class Pair:
    """The control plane of `platform`, and one more once they are to be `both`; `platform.server` names both."""

    def __init__(self, platform: Platform) -> None:
        self._platform = platform
        self._homes = [platform.state / "controlplane", platform.state / "standby"]
        self._programs = [platform.controlplane]
        self._ended = threading.Event()
        self._supervisor = threading.Thread(target=self._supervise, name="supervisor")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._listen = f"127.0.0.1:{probe.getsockname()[1]}"

    def __enter__(self) -> Self:
        platform, first = self._platform, self._platform.controlplane
        # On the same port again, should it be started again.
        first.command[first.command.index("--listen") + 1] = platform.server
        platform.server = f"{platform.server},{self._listen}"
        platform.environment["NGPU_SERVER"] = platform.server
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._supervisor.is_alive():
            self._supervisor.join()

    def both(self) -> Program:
        """Returns the active one, once the other stands by."""
        if len(self._programs) == 1:
            where = ("--state-dir", str(self._homes[1]), "--listen", self._listen, "--metrics-listen", "127.0.0.1:0")
            self._programs.append(self._platform.start("controlplane", "run", *where, log="standby"))
            self._supervisor.start()
        deadline = time.monotonic() + START_LIMIT_S
        while sorted(map(self._is_ready, self._homes), key=str) != [False, True]:
            if time.monotonic() > deadline:
                raise Failed("there is no active control plane with another that stands by")
            time.sleep(LOOK_S)
        active = self.active
        assert active
        return active

    @property
    def active(self) -> Program | None:
        """The one that serves; None: neither, just now."""
        for home, program in zip(self._homes, self._programs, strict=False):
            if self._is_ready(home):
                return program
        return None

    def served_by_other(self, than: Program) -> bool:
        """Another one is the active one."""
        return self.active not in (None, than)

    def _is_ready(self, home: Path) -> bool | None:
        """None: it is not there, or says nothing."""
        with contextlib.suppress(OSError, http.client.HTTPException):
            asking = http.client.HTTPConnection((home / "metrics_address").read_text().strip(), timeout=ASK_S)
            with contextlib.closing(asking):
                asking.request("GET", "/readyz")
                return asking.getresponse().status == http.client.OK
        return None

    def _supervise(self) -> None:
        while not self._ended.wait(LOOK_S):
            for index, program in enumerate(self._programs):
                if program.process.poll() is not None:
                    log = "standby" if index else "controlplane"
                    self._programs[index] = self._platform.launch(program.command, log)
