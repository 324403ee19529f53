"""Callers of the REST API who write down what they were told, and when: the first of the three accounts.

Four kinds: `async` leaves a task with an idempotency key and calls again until it is accepted; `plain` leaves one
without a key and never repeats the call; `sync` waits for its answer, with a key; `once` leaves a task with a workspace
whose tasks must not run twice, without a key.
"""

import concurrent.futures
import http.client
import json
import random
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

Kind = Literal["async", "plain", "sync", "once"]

#: Calls under way at once; past it no new one is begun.
OUTSTANDING: Final = 250
#: The longest that one HTTP call may take.
CALL_LIMIT_S: Final = 60.0
#: One query holds for so long.
WAIT_S: Final = 5
#: Between two tries to leave a task, at first and at most.
PAUSE_S: Final = 0.25
LONGEST_PAUSE_S: Final = 2.0
MIX: Final[Mapping[Kind, int]] = {"async": 8, "plain": 4, "sync": 5, "once": 3}


@dataclass
class Call:
    """One piece of work as its caller sees it. Times are seconds since 1970; 0: not yet."""

    token: str
    kind: Kind
    begin: float
    #: When the platform said that it has the task; from then on it may not be lost.
    acknowledged: float = 0.0
    task_id: str = ""
    end: float = 0.0
    #: result_code of the end, and its words.
    code: int = 0
    words: str = ""
    data: str = ""
    #: What came instead of an acknowledgement, in order.
    refusals: list[str] = field(default_factory=list)


class Api:
    """One workspace over HTTP and JSON."""

    def __init__(self, url: str, bearer: str) -> None:
        self.url = url
        self.bearer = bearer

    def call(
        self, method: str, path: str, body: bytes | None = None, *, key: str = "", limit_s: float = CALL_LIMIT_S
    ) -> dict[str, Any]:
        """The answer's JSON with `status` put in. Raises OSError or http.client.HTTPException if there is none."""
        headers = {"Authorization": f"Bearer {self.bearer}", "Content-Type": "application/json"}
        if key:
            headers["Idempotency-Key"] = key
        request = urllib.request.Request(self.url + path, body, headers, method=method)  # noqa: S310
        try:
            with urllib.request.urlopen(request, timeout=limit_s) as response:  # noqa: S310
                status, said = response.status, response.read()
        except urllib.error.HTTPError as error:
            with error:
                status, said = error.code, error.read()
        answer: dict[str, Any] = json.loads(said)
        return {**answer, "status": status}

    def submit(self, work: Mapping[str, Any], *, key: str = "") -> dict[str, Any]:
        """Leave a task."""
        return self.call("POST", "/user/schedulingTask?paramUrl=work", json.dumps(work).encode(), key=key)

    def query(self, task_id: str, wait_s: float = 0) -> dict[str, Any]:
        """Ask after a task."""
        return self.call("GET", f"/user/queryTask?taskID={task_id}&wait={wait_s}")

    def run(self, do: str = "", *, limit_s: float = CALL_LIMIT_S, **work: Any) -> dict[str, Any]:
        """One task, from its submission to its end; its answer has its `token` and `task_id`."""
        token = uuid.uuid4().hex
        body = {"token": token, **work, **({"do": do} if do else {})}
        answer = self.submit(body)
        if answer["status"] != 200:
            return {**answer, "token": token, "task_id": ""}
        deadline = time.monotonic() + limit_s
        while (told := self.query(answer["taskID"], WAIT_S))["result_code"] in (100, 101):
            if time.monotonic() > deadline:
                raise TimeoutError(f"task {answer['taskID']} has not ended after {limit_s:g} s: {told}")
        return {**told, "token": token, "task_id": answer["taskID"]}


class Callers:
    """Calls at a pace until `stop`, each in a thread of its own until its work has ended.

    `apis`: of the workspaces for repeatable work and for work that must not run twice. `seconds`: how long one piece of
    work takes, from .. to.
    """

    def __init__(
        self,
        work: Api,
        once: Api,
        *,
        rate: float = 15.0,
        seconds: tuple[float, float] = (0.05, 0.6),
        chance: random.Random | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._apis: dict[Kind, Api] = {"async": work, "plain": work, "sync": work, "once": once}
        self._rate = rate
        self._seconds = seconds
        self._chance = chance or random.Random()  # noqa: S311
        self._clock = clock
        self._pool = concurrent.futures.ThreadPoolExecutor(OUTSTANDING, thread_name_prefix="caller")
        self._outstanding = threading.Semaphore(OUTSTANDING)
        self._futures: list[concurrent.futures.Future[None]] = []
        self._stop = threading.Event()
        self._given_up = threading.Event()
        self.calls: list[Call] = []
        self._pacer = threading.Thread(target=self._pace, name="caller pace")
        self._pacer.start()

    def stop(self, limit_s: float) -> None:
        """Begin no more, and wait for the ends of what has begun; what has none then is left without."""
        self._stop.set()
        self._pacer.join()
        _, late = concurrent.futures.wait(self._futures, timeout=limit_s)
        self._given_up.set()
        self._pool.shutdown(wait=not late, cancel_futures=True)
        for future in self._futures:
            if future not in late:
                future.result()

    def leave(self, seconds: float) -> Call:
        """One more repeatable piece of work beside the pace, which takes so long."""
        self._outstanding.acquire()
        return self._begin("async", seconds)

    def open_before(self, moment: float) -> int:
        """How many pieces of work begun before that moment have not ended."""
        return sum(1 for call in list(self.calls) if call.begin < moment and not call.end)

    def _pace(self) -> None:
        kinds, weights = list(MIX), list(MIX.values())
        due = time.monotonic()
        while not self._stop.is_set():
            due = max(due + 1 / self._rate, time.monotonic() - 1)
            self._stop.wait(max(0.0, due - time.monotonic()))
            if self._stop.is_set() or not self._outstanding.acquire(blocking=False):
                continue
            kind = self._chance.choices(kinds, weights)[0]
            self._begin(kind, self._chance.uniform(*self._seconds))

    def _begin(self, kind: Kind, seconds: float) -> Call:
        call = Call(uuid.uuid4().hex, kind, self._clock())
        self.calls.append(call)
        self._futures.append(self._pool.submit(self._run, call, seconds))
        return call

    def _run(self, call: Call, seconds: float) -> None:
        try:
            api = self._apis[call.kind]
            work = json.dumps({"token": call.token, "seconds": round(seconds, 3)}).encode()
            path = "/user/work" if call.kind == "sync" else "/user/schedulingTask?paramUrl=work"
            key = call.token if call.kind in ("async", "sync") else ""
            pause_s = PAUSE_S
            while not (call.acknowledged or self._given_up.is_set()):
                self._try(call, api, path, work, key)
                if not key:
                    break
                if not call.acknowledged:
                    self._given_up.wait(pause_s)
                    pause_s = min(LONGEST_PAUSE_S, pause_s * 1.5)
            if call.acknowledged:
                self._await_end(call, api)
            elif not self._given_up.is_set():
                call.end = self._clock()
        finally:
            self._outstanding.release()

    def _try(self, call: Call, api: Api, path: str, work: bytes, key: str) -> None:
        try:
            answer = api.call("POST", path, work, key=key)
        except (OSError, http.client.HTTPException, ValueError) as fault:
            call.refusals.append(f"{type(fault).__name__}: {fault}")
            return
        task_id = answer.get("taskID") or ""
        told = f"{answer['status']} {answer.get('result_code')} {answer.get('msg')}"
        if not task_id or answer["status"] in (503, 504):
            call.refusals.append(told)
            return
        call.acknowledged, call.task_id = self._clock(), task_id
        if call.kind == "sync" and answer["result_code"] not in (100, 101):
            self._ended(call, answer)

    def _await_end(self, call: Call, api: Api) -> None:
        while not (call.end or self._given_up.is_set()):
            try:
                answer = api.query(call.task_id, WAIT_S)
            except (OSError, http.client.HTTPException, ValueError):
                self._given_up.wait(PAUSE_S)
                continue
            if answer["status"] != 200:
                # A task that was acknowledged is unknown now, say: the audit will find it missing.
                call.words = f"{answer['status']} {answer.get('msg')}"
                self._given_up.wait(PAUSE_S)
            elif answer["result_code"] not in (100, 101):
                self._ended(call, answer)

    def _ended(self, call: Call, answer: Mapping[str, Any]) -> None:
        call.code, call.words, call.data = answer["result_code"], answer.get("msg", ""), answer.get("data", "")
        call.end = self._clock()
