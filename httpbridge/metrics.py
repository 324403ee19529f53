"""What the bridge counts, for Prometheus. No label says whose: /metrics may be open where the API is."""

from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

#: Seconds. From a call that found a slot free to one at the limits of a workspace's tasks.
BUCKETS: Final = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Metrics(Collector):
    """Counted in plain numbers on the hot path, dressed up for Prometheus only when it asks.

    `gauges` and `counters` are read at that moment: name to (help, value).
    """

    def __init__(self) -> None:
        self.in_flight = 0
        self.gauges: dict[str, tuple[str, Callable[[], float]]] = {
            "ngpu_bridge_requests_in_flight": ("Requests being answered.", lambda: self.in_flight)
        }
        self.counters: dict[str, tuple[str, Callable[[], float]]] = {}
        self._replies: dict[tuple[str, int], int] = {}
        #: Per operation: a count for each bucket and one past the last, and the sum of seconds.
        self._seconds: dict[str, tuple[list[int], list[float]]] = {}
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def observe(self, operation: str, status: int, seconds: float) -> None:
        """An answer."""
        key = (operation, status)
        self._replies[key] = self._replies.get(key, 0) + 1
        found = self._seconds.get(operation)
        if found is None:
            found = self._seconds[operation] = ([0] * (len(BUCKETS) + 1), [0.0])
        counts, total = found
        counts[bisect_left(BUCKETS, seconds)] += 1
        total[0] += seconds

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Called by the registry."""
        for name, (meaning, value) in self.gauges.items():
            yield GaugeMetricFamily(name, meaning, value=value())
        for name, (meaning, value) in self.counters.items():
            yield CounterMetricFamily(name, meaning, value=value())
        replies = CounterMetricFamily(
            "ngpu_bridge_replies",
            "Answers by operation and HTTP status; 499: the caller went first.",
            labels=["operation", "status"],
        )
        for (operation, status), count in self._replies.items():
            replies.add_metric([operation, str(status)], count)
        yield replies
        latency = HistogramMetricFamily(
            "ngpu_bridge_reply_seconds", "From a request's head to its answer's, by operation.", labels=["operation"]
        )
        for operation, (counts, total) in self._seconds.items():
            rows: list[tuple[str, float]] = []
            below = 0
            for bound, count in zip((*map(str, BUCKETS), "+Inf"), counts, strict=True):
                below += count
                rows.append((bound, below))
            latency.add_metric([operation], rows, sum_value=total[0])
        yield latency
