"""A rig and the faults that it is to suffer, one after the other, in a thread of its own; then the audit.

So several rigs can suffer at once: most of a fault's time is waiting.
"""

import concurrent.futures
import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

from scripts.fault_suite.audit import Findings
from scripts.fault_suite.faults import FAULTS, suffer
from scripts.fault_suite.rig import Recovery, Rig

#: One starts after the other: five programs each, all at once, would take longer than a start may.
_starting = threading.Lock()


class Skipped(Exception):
    """This machine or this rig has not what the fault needs; the message says what."""


class Run:
    """`recovery(name)` and `findings()` wait until it is known, and raise what went wrong."""

    def __init__(self, make: Callable[[], AbstractContextManager[Rig]], names: Sequence[str]) -> None:
        self._make = make
        self._names = names
        self._recoveries = {name: concurrent.futures.Future[Recovery]() for name in names}
        self._findings = concurrent.futures.Future[Findings]()
        self._stopping = threading.Event()
        self.recoveries: list[Recovery] = []

    def recovery(self, name: str) -> Recovery:
        """What that fault has cost."""
        return self._recoveries[name].result()

    def findings(self) -> Findings:
        """Of all faults together."""
        return self._findings.result()

    def stop(self) -> None:
        """Nobody waits for what has not begun."""
        self._stopping.set()

    def __call__(self) -> None:
        """Do it; raises nothing."""
        try:
            with contextlib.ExitStack() as stack:
                with _starting:
                    rig = stack.enter_context(self._make())
                rig.begin()
                for name in self._names:
                    if not self._stopping.is_set():
                        self._suffer(rig, name)
                self.recoveries = rig.recoveries
                self._findings.set_result(rig.finish())
        except BaseException as fault:
            futures: list[concurrent.futures.Future[Any]] = [*self._recoveries.values(), self._findings]
            for future in futures:
                if not future.done():
                    future.set_exception(fault)

    def _suffer(self, rig: Rig, name: str) -> None:
        if why := FAULTS[name].why_not(rig):
            self._recoveries[name].set_exception(Skipped(why))
            return
        try:
            self._recoveries[name].set_result(suffer(rig, name))
        except Exception as fault:
            self._recoveries[name].set_exception(fault)


@contextlib.contextmanager
def running(runs: Sequence[Run]) -> Iterator[None]:
    """All of them at once, to their ends."""
    with concurrent.futures.ThreadPoolExecutor(max(1, len(runs)), thread_name_prefix="run") as pool:
        for run in runs:
            pool.submit(run)
        try:
            yield
        finally:
            for run in runs:
                run.stop()
