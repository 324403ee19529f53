"""300 B of work as a Celery task with Redis for broker and results; REDIS_URL says where. Run: see pace.py.

The work is the container's; see container.py.
"""

# mypy: disable-error-code="import-not-found,import-untyped,untyped-decorator"

import os
from typing import Any

import container
from celery import Celery

URL = os.environ["REDIS_URL"]
app = Celery("bench", broker=URL, backend=URL)


@app.task
def work(data: str) -> str:
    """What the container answers; without one what came, back."""
    return container.call("/w1", data.encode()).decode() if container.URL else data


def submit(data: str) -> Any:
    return work.delay(data)


def result(handle: Any) -> str:
    answer: str = handle.get(timeout=60)
    return answer


if __name__ == "__main__":
    import celery_tasks
    import pace

    # The task's name must be the worker's, which knows this file as a module.
    pace.main(celery_tasks.submit, celery_tasks.result)
