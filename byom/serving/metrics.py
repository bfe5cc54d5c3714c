"""Metrics of a server in the format of Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
ITEMS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counts of one server, in a registry of its own.

    Args:
        waiting: Returns how many items wait.
    """

    def __init__(self, waiting: Callable[[], int]) -> None:
        registry = self.registry = CollectorRegistry()
        self.requests = Counter("byom_requests", "Requests for predictions.", ["task", "status"], registry=registry)
        self.seconds = Histogram(
            "byom_request_seconds",
            "Seconds from a request to its answer.",
            ["task"],
            buckets=SECONDS,
            registry=registry,
        )
        self.batches = Histogram("byom_batch_items", "Items of a forward pass.", buckets=ITEMS, registry=registry)
        self.switches = Counter("byom_switches", "Switches of the model to another task.", registry=registry)
        self.switching = Histogram("byom_switch_seconds", "Seconds of a switch.", buckets=SECONDS, registry=registry)
        Gauge("byom_queue_items", "Items that wait.", registry=registry).set_function(waiting)

    def text(self) -> bytes:
        """Return all of them as text."""
        return generate_latest(self.registry)
