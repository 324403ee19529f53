"""300 B of work as a Dramatiq actor with Redis for broker and results; REDIS_URL says where. Run: see pace.py.

The work is the container's; see container.py.
"""

# mypy: disable-error-code="import-not-found,import-untyped,untyped-decorator"

import os
from typing import Any

import container
import dramatiq
from dramatiq.brokers.redis import RedisBroker
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend

URL = os.environ["REDIS_URL"]
broker = RedisBroker(url=URL)
broker.add_middleware(Results(backend=RedisBackend(url=URL)))
dramatiq.set_broker(broker)


@dramatiq.actor(store_results=True)
def work(data: str) -> str:
    """What the container answers; without one what came, back."""
    return container.call("/w1", data.encode()).decode() if container.URL else data


def submit(data: str) -> Any:
    return work.send(data)


def result(handle: Any) -> str:
    answer: str = handle.get_result(block=True, timeout=60_000)
    return answer


if __name__ == "__main__":
    import pace

    pace.main(submit, result)
