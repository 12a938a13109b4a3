"""The metrics of /metrics."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from dparallel_ext import Completion, Engine

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120)
GAUGES = {
    "waiting": "Requests that wait for a lane.",
    "active": "Requests under decoding.",
    "pages": "Pages of keys and values.",
    "pages_used": "Pages of requests under decoding.",
    "pages_kept": "Pages kept for later requests.",
    "page_bytes": "Memory of a page.",
    "closed": "1 where no more requests are taken, else 0.",
}
COUNTERS = {
    "completed": "Requests that were answered.",
    "failed": "Requests that ended in an error.",
    "cancelled": "Requests that were cancelled: the client left, or a stop string had come.",
    "forwards": "Forward passes.",
    "sequence_passes": "Forward passes, counted once for each sequence in them.",
    "tokens": "Tokens of finished blocks.",
    "draft_forwards": "Calls of the drafter, or of the verifier.",
    "drafted_tokens": "Tokens that the drafter has guessed, or that the verifier has judged.",
    "accepted_tokens": "Of those, the ones that were kept.",
    "prompt_tokens": "Tokens of prompts.",
    "reused_tokens": "Tokens of prompts whose keys and values came from another request.",
}


class Metrics:
    """The server's own metrics, and the engines' counts, read at each scrape. Metrics of a model have its
    name as a label."""

    def __init__(self) -> None:
        self.models: dict[str, ModelMetrics] = {}
        self.registry = CollectorRegistry()
        self.registry.register(self)
        ProcessCollector(registry=self.registry)
        self.http = Counter(
            "dparallel_http_requests",
            "HTTP requests by path and status; 499: the client left.",
            ["path", "status"],
            registry=self.registry,
        )
        self.first_block = self._histogram(
            "first_block_seconds", "From request to first finished block, or first token."
        )
        self.whole = self._histogram("request_seconds", "From request to its last token, per choice.")
        self.waiting = self._histogram("waiting_seconds", "From request to its first pass, per choice.")
        self.rate = self._histogram(
            "tokens_per_pass", "Tokens of a response per forward pass.", (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
        )

    def add(self, name: str, engine: Engine) -> ModelMetrics:
        self.models[name] = metrics = ModelMetrics(self, name, engine)
        return metrics

    def wait(self) -> int:
        """Seconds after which a request refused now may find a place, whatever its model."""
        return max((model.wait() for model in self.models.values()), default=1)

    def _histogram(self, name: str, description: str, buckets: Sequence[float] = SECONDS) -> Histogram:
        return Histogram(f"dparallel_{name}", description, ["model"], buckets=buckets, registry=self.registry)

    def collect(self) -> Iterator[Metric]:
        stats = {name: model.engine.stats for name, model in self.models.items()}
        for kind, families in ((GaugeMetricFamily, GAUGES), (CounterMetricFamily, COUNTERS)):
            for name, description in families.items():
                family = kind(f"dparallel_{name}", description, labels=["model"])
                for model, counts in stats.items():
                    family.add_metric([model], getattr(counts, name))
                yield family


class ModelMetrics:
    """The metrics of one model."""

    def __init__(self, shared: Metrics, name: str, engine: Engine) -> None:
        self.engine = engine
        self.first_block, self.whole = shared.first_block.labels(name), shared.whole.labels(name)
        self.waiting, self.rate = shared.waiting.labels(name), shared.rate.labels(name)
        self.mean = 1.0
        """Mean seconds of a request in its lane, over about the last sixteen."""

    def finished(self, completion: Completion, tokens: int) -> None:
        self.whole.observe(completion.seconds)
        self.waiting.observe(completion.seconds_waiting)
        if completion.nfe:
            self.rate.observe(tokens / completion.nfe)
        self.mean += (completion.seconds - completion.seconds_waiting - self.mean) / 16

    def wait(self) -> int:
        """Seconds after which a request refused now may find a place."""
        stats = self.engine.stats
        return min(60, math.ceil(1 + self.mean * stats.waiting / max(1, stats.active)))
