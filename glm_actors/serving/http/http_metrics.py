"""Metrics: what /metrics shows, in Prometheus' text form.

Owns the names. Label values are names of models and routes, never anything that a client wrote.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

LATENCIES = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
STALE_S = 60.0  # a replica that has not been heard of for this long is gone
ENGINE_GAUGES = {
    "waiting": "Sequences that wait for room in the engine.",
    "running": "Sequences that the engine works on.",
    "free_blocks": "Blocks of the KV cache that no sequence holds.",
    "blocks": "Blocks of the KV cache.",
}


class Metrics:
    """Counts of one HTTP process since it began, and the last that was heard of each replica."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        model = ["model"]
        self.requests = Counter(
            "glm_requests", "Requests by outcome.", ["model", "route", "status"], registry=registry
        )
        self.ignored = Counter(
            "glm_ignored_fields", "Hints that were not used.", ["field"], registry=registry
        )
        self.in_flight = Gauge(
            "glm_requests_in_flight", "Requests being answered.", model, registry=registry
        )
        self.first_token = Histogram(
            "glm_time_to_first_token_seconds", "From a request to its first chunk.", model,
            buckets=LATENCIES, registry=registry,
        )  # fmt: skip
        self.between_tokens = Histogram(
            "glm_inter_token_seconds", "Between the chunks of a stream, by token.", model,
            buckets=LATENCIES, registry=registry,
        )  # fmt: skip
        self.seconds = Histogram(
            "glm_request_seconds", "From a request to the end of its answer.", ["model", "route"],
            buckets=LATENCIES, registry=registry,
        )  # fmt: skip
        self._tokens = {
            field: Counter(name, text, model, registry=registry)
            for field, name, text in (
                ("prompt_tokens", "glm_prompt_tokens", "Tokens of prompts."),
                (
                    "cached_tokens",
                    "glm_cached_prompt_tokens",
                    "Those of them that were in the cache.",
                ),
                ("completion_tokens", "glm_output_tokens", "Tokens that were written."),
            )
        }
        self._engine = {
            name: Gauge(f"glm_engine_{name}", text, ["model", "replica"], registry=registry)
            for name, text in ENGINE_GAUGES.items()
        }
        self._heard: dict[tuple[str, str], float] = {}

    def count_usage(self, model: str, usage: Mapping[str, Any]) -> None:
        """Adds OpenAI's usage object."""
        found = {**usage, **usage.get("prompt_tokens_details", {})}
        for field, counter in self._tokens.items():
            counter.labels(model).inc(found.get(field, 0))

    def text(self, replicas: Mapping[str, Sequence[Mapping[str, Any]]]) -> bytes:
        """Everything, after the replicas of each model have told their numbers of this moment."""
        now = time.monotonic()
        for model, found in replicas.items():
            for numbers in found:
                key = (model, str(numbers["replica"]))
                self._heard[key] = now
                for name, gauge in self._engine.items():
                    if name in numbers:
                        gauge.labels(*key).set(numbers[name])
        for key in [key for key, heard in self._heard.items() if now - heard > STALE_S]:
            del self._heard[key]
            for gauge in self._engine.values():
                gauge.remove(*key)
        return generate_latest(self._registry)
