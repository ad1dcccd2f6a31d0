"""Counts of the server under vLLM's names, so that vLLM's dashboards show them."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from zili.serving.generate.engine import Engine

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)


class Metrics:
    """What is counted of one engine."""

    def __init__(self, engine: Engine, model: str) -> None:
        self._registry, self._model = CollectorRegistry(), model
        running = self._gauge("num_requests_running", "Sequences in a slot.")
        running.set_function(lambda: engine.load[0])
        waiting = self._gauge("num_requests_waiting", "Sequences that wait for a slot.")
        waiting.set_function(lambda: engine.load[1])
        self._gauge("kv_cache_usage_perc", "Share of the slots' room that is in use.").set_function(
            lambda: engine.usage
        )
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts.")
        self._said = self._counter("generation_tokens", "Tokens of answers.")
        self._asked = self._counter("prefix_cache_queries", "Tokens of prompts that might have been there already.")
        self._reused = self._counter("prefix_cache_hits", "Tokens of prompts that were.")
        self._ended = Counter(
            "vllm:request_success",
            "Answers by how they ended.",
            ("model_name", "finished_reason"),
            registry=self._registry,
        )
        self._first = self._histogram("time_to_first_token_seconds", "From asking to the first token.")
        self._between = self._histogram("inter_token_latency_seconds", "Between two tokens of an answer.")
        self._whole = self._histogram("e2e_request_latency_seconds", "From asking to the end.")

    def text(self) -> bytes:
        """In Prometheus' format."""
        return generate_latest(self._registry)

    def began(self, prompt: int) -> Watch:
        """An answer to a prompt of so many tokens is asked for now."""
        self._prompt.inc(prompt)
        self._asked.inc(prompt)
        return Watch(self)

    def _gauge(self, name: str, what: str) -> Gauge:
        return Gauge(f"vllm:{name}", what, ("model_name",), registry=self._registry).labels(self._model)

    def _counter(self, name: str, what: str) -> Counter:
        return Counter(f"vllm:{name}", what, ("model_name",), registry=self._registry).labels(self._model)

    def _histogram(self, name: str, what: str) -> Histogram:
        histogram = Histogram(f"vllm:{name}", what, ("model_name",), buckets=_SECONDS, registry=self._registry)
        return histogram.labels(self._model)


class Watch:
    """What is counted of one answer."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._started = self._last = time.perf_counter()
        self._tokens = 0

    def said(self, tokens: int) -> None:
        """So many more tokens have come, together."""
        if not tokens:
            return
        now, metrics = time.perf_counter(), self._metrics
        if self._tokens == 0:
            metrics._first.observe(now - self._started)
            tokens_between = tokens - 1
        else:
            tokens_between = tokens
        for _ in range(tokens_between):
            metrics._between.observe((now - self._last) / tokens)
        self._last = now
        self._tokens += tokens
        metrics._said.inc(tokens)

    def ended(self, reason: str, reused: int) -> None:
        """No more will come."""
        self._metrics._reused.inc(reused)
        self._metrics._ended.labels(self._metrics._model, reason).inc()
        self._metrics._whole.observe(time.perf_counter() - self._started)
