"""Callers who ask a container after a job of theirs: they reach the replica that has it, or its recorded output."""

from msgspec import structs

from controlplane.dispatcher import Dispatcher, NewTask, TaskView
from controlplane.errors import JobLost, NotFound, Unavailable
from controlplane.jobs import Question
from controlplane.model import ENDED, Job, State
from controlplane.slots import Request
from controlplane.store import Store

#: When to ask again after a job that begins anew on another node.
AGAIN_S = 5.0


class Questions:
    """Answers them."""

    def __init__(self, store: Store, dispatcher: Dispatcher) -> None:
        self._store = store
        self._dispatcher = dispatcher

    async def ask(self, new: NewTask, question: Question, *, wait_s: float, cancel_on_hangup: bool) -> TaskView:
        """The task whose job it is, if that is done; else `new`, which asks its replica and no other.

        A job that nobody knows is the container's to speak of, whichever gets the request. Raises as Dispatcher.accept
        and JobLost, or Unavailable if the job begins anew elsewhere.
        """
        job = await self._store.job(new.workspace_uid, question.job_id)
        if job is None:
            return await self._dispatcher.submit(new, wait_s=wait_s, cancel_on_hangup=cancel_on_hangup)
        view = await self._dispatcher.query(job.task_id)
        done = view.state is State.COMPLETED
        if done and not question.partial:
            return view
        if view.state not in ENDED and (view.state, view.attempt) != (State.RUNNING, job.attempt):
            raise _begun_anew(job)
        # A question changes nothing, so that there is no need of a key; and elsewhere it would have no answer.
        pinned = structs.replace(
            new,
            request=_asked_by(question.method, new.request),
            pin=job.replica_id,
            repeatable=False,
            idempotency_key=None,
            request_hash=None,
        )
        try:
            return await self._dispatcher.submit(pinned, wait_s=wait_s, cancel_on_hangup=cancel_on_hangup)
        except (NotFound, Unavailable) as error:
            if done:
                return view
            if not isinstance(error, JobLost):
                raise
            raise _lost(job, view) from None


def _asked_by(method: str, request: Request) -> Request:
    """The question as the container takes it: one that came in an envelope has lost its method."""
    if request.method == method:
        return request
    headers = tuple(header for header in request.headers if header[0].lower() != "content-type")
    return structs.replace(request, method=method, headers=headers, body=b"", size=0)


def _begun_anew(job: Job) -> Unavailable:
    return Unavailable(
        f"The node that worked on job {job.id} is gone; its task {job.task_id} begins anew elsewhere under another id: "
        "ask for that task, or for the job again once it is done.",
        retry_after_s=AGAIN_S,
    )


def _lost(job: Job, view: TaskView) -> JobLost | Unavailable:
    if view.state not in ENDED:
        # Its loss is not yet told to the task.
        return _begun_anew(job)
    why = f": {view.failure.message}" if view.failure is not None else "."
    return JobLost(f"The replica that knew job {job.id} is gone, and its task {job.task_id} was not completed{why}")
