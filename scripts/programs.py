"""The three programs as child processes on this machine: for scripts/up, the system tests and the benchmarks alike."""

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
START_LIMIT_S = 30.0
STOP_LIMIT_S = 30.0
#: Put before a command: it ends when we do, also by kill -9. Not by a hook between fork and exec: gRPC's own hooks
#: would run there too, and hang where the parent has used gRPC.
_END_WITH_PARENT = ["setpriv", "--pdeathsig", "TERM", "--"] if shutil.which("setpriv") else []


class Failed(Exception):
    """A program did not do what it should; the message says what it said."""


class Program:
    """A program as a child process in a session of its own, with its log in a file.

    A Ctrl-C at the terminal is for the parent, which stops its programs in order; if the parent is killed they end too.
    """

    def __init__(self, command: list[str], log: Path, environment: dict[str, str]) -> None:
        self.name = Path(command[0]).name
        self.command = command
        self.log = log
        self.began = time.time()
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [*_END_WITH_PARENT, *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """The process id."""
        return self.process.pid

    def check_starting(self, what: str) -> None:
        """Raise Failed, with the end of the log, if it has ended or takes too long."""
        if self.process.poll() is not None or time.time() - self.began > START_LIMIT_S:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-20:])
            raise Failed(f"{self.name} did not {what}; the end of {self.log}:\n{tail}")

    def await_file(self, path: Path) -> str:
        """The contents of a file that the program writes once it is ready."""
        while not (path.exists() and path.stat().st_mtime >= self.began - 0.05 and path.read_text().strip()):
            self.check_starting("start")
            time.sleep(0.05)
        return path.read_text().strip()

    def stop(self) -> int:
        """SIGTERM, and SIGKILL if that does not help. Gives the exit status; nothing to do if it has ended."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                return self.process.wait(STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                print(f"{self.name} does not stop; killing it", file=sys.stderr)
        return self.kill()

    def kill(self) -> int:
        """SIGKILL. Gives the exit status."""
        self.process.kill()
        return self.process.wait()

    def signal(self, number: int) -> None:
        """Send a signal."""
        self.process.send_signal(number)


class Platform:
    """A control plane, and nodes and a bridge as asked for, with all their state below one directory.

    Ports: 0 is any free one. Everything that was started is stopped, last first, at the end of the `with` block.
    """

    def __init__(
        self, state: Path, *, host: str = "127.0.0.1", grpc_port: int = 0, settings: dict[str, str] | None = None
    ) -> None:
        self.state = state.resolve()
        self.logs = self.state / "logs"
        self._listen = f"{host}:{grpc_port}"
        #: Of every program: the caller's own settings of NGPU taken out, `settings` put in.
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("NGPU_")}
        self.environment |= settings or {}
        self.programs: list[Program] = []
        self.nodes: dict[str, Program] = {}
        self.server = ""
        self.metrics = ""
        self.url = ""

    def __enter__(self) -> Self:
        self.logs.mkdir(parents=True, exist_ok=True)
        try:
            self.start_controlplane()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop everything, last started first."""
        while self.programs:
            self.programs.pop().stop()

    def start(self, name: str, *arguments: str, log: str = "", environment: dict[str, str] | None = None) -> Program:
        """Start `ngpu-NAME ARGUMENTS`."""
        return self.launch([str(BIN / f"ngpu-{name}"), *arguments], log or name, environment)

    def launch(self, command: list[str], log: str, environment: dict[str, str] | None = None) -> Program:
        """Start any command as one of the platform's programs."""
        program = Program(command, self.logs / f"{log}.log", self.environment | (environment or {}))
        self.programs.append(program)
        return program

    def start_controlplane(self) -> Program:
        """Start the control plane; after a kill, on the same port as before."""
        home = self.state / "controlplane"
        listen = self._listen
        program = self.start(
            *("controlplane", "run", "--state-dir", str(home), "--listen", listen, "--metrics-listen", "127.0.0.1:0"),
        )
        host, _, port = program.await_file(home / "address").rpartition(":")
        self._listen = f"{host}:{port}"
        self.server = f"{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
        self.metrics = program.await_file(home / "metrics_address")
        self.environment |= {"NGPU_SERVER": self.server, "NGPU_TOKEN_FILE": str(home / "operator.token")}
        self.controlplane = program
        return program

    def node_token(self) -> str:
        """A new one-time token."""
        token: str = self.ngpu("token", "create", "--role", "node", "--name", "a node of this machine")["secret"]
        return token

    def start_node(
        self,
        name: str,
        *arguments: str,
        prefix: tuple[str, ...] = (),
        server: str = "",
        environment: dict[str, str] | None = None,
    ) -> Program:
        """Start a node daemon (behind the command `prefix`), which joins if it has not yet; wait until it has."""
        home = self.state / name
        home.mkdir(parents=True, exist_ok=True)
        token = home / "join.token"
        if not token.exists():
            token.touch(mode=0o600)
            token.write_text(self.node_token())
        command = [
            *(
                *prefix,
                str(BIN / "ngpu-node"),
                "run",
                "--state-dir",
                str(home),
                "--controlplane",
                server or self.server,
            ),
            *("--name", name, "--token-file", str(token), *arguments),
        ]
        program = self.launch(command, name, environment)
        self.nodes[name] = program
        while not self.node(name).get("connected"):
            program.check_starting("join")
            time.sleep(0.1)
        return program

    def node(self, name: str) -> dict[str, Any]:
        """The node of that name as JSON; empty if there is none."""
        nodes: list[dict[str, Any]] = self.ngpu("node", "list").get("nodes", [])
        return next((node for node in nodes if node["name"] == name), {})

    def start_bridge(self, *arguments: str, port: int = 0) -> Program:
        """Start the bridge. Its URL is in `url`."""
        home = self.state / "bridge"
        token = self.state / "controlplane" / "bridge.token"
        program = self.start(
            *("bridge", "--state-dir", str(home), "--controlplane", self.server, "--token-file", str(token)),
            *("--listen", f"127.0.0.1:{port}", *arguments),
        )
        self.url = "http://" + program.await_file(home / "address")
        return program

    def ngpu(self, *arguments: str) -> Any:
        """The answer of `ngpu ARGUMENTS --json`. Raises Failed with the command's own words."""
        command = [str(BIN / "ngpu"), *arguments, "--json"]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Failed(f"ngpu {shlex.join(arguments)}: {done.stderr.strip() or done.stdout.strip()}")
        return json.loads(done.stdout)


def end_process(pid: int) -> None:
    """SIGTERM to a process that is not our child, waiting until it is gone."""
    deadline = time.monotonic() + STOP_LIMIT_S
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
        while time.monotonic() < deadline:
            os.kill(pid, 0)
            time.sleep(0.1)
