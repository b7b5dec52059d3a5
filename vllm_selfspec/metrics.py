"""Every decision counted, under Prometheus names beside vLLM's own.

The scheduler lives in the engine process, the metrics in the front end. Each step's numbers travel with vLLM's
scheduler statistics and are taken out again where the front end records them, for `vllm serve` and `LLM` alike, so
they show up at `/metrics` and in `LLM.get_metrics()` (which need `disable_log_stats=False`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass
from typing import Any

from prometheus_client import REGISTRY, Counter, Histogram

STATS_KEY = "selfspec"
PREFIX = "vllm:selfspec_"


@dataclass(frozen=True, slots=True)
class StepStats:
    """One step of the engine.

    Attributes:
        num_draft_tokens: the draft length chosen.
        reason: why, see `control.policy.Reason`.
        num_decode: requests that decoded.
        predicted_speedup: predicted token rate relative to plain decoding.
        achieved_speedup: tokens emitted over the step's duration, relative to the predicted rate of plain decoding;
            None where the duration says nothing (first step after idling, prefill in the step).
        light: the light view drafted.
    """

    num_draft_tokens: int
    reason: str
    num_decode: int
    predicted_speedup: float
    achieved_speedup: float | None
    light: bool

    def as_list(self) -> list[Any]:
        """The fields in order, as they travel between processes."""
        return list(astuple(self))


class Metrics:
    """The Prometheus metrics of one front end.

    Args:
        model_name: label `model_name`, as on vLLM's own metrics.
        max_draft_tokens: the longest draft, for the histogram's buckets.
    """

    def __init__(self, model_name: str, max_draft_tokens: int) -> None:
        for collector in list(REGISTRY._collector_to_names):
            if getattr(collector, "_name", "").startswith(PREFIX):
                REGISTRY.unregister(collector)
        self._labels = {"model_name": model_name}
        labels = ["model_name", "engine"]
        speedups = (0.5, 0.7, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2, 1.3, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0)
        self.steps = Counter(
            PREFIX + "steps", "Engine steps by draft length and reason.", [*labels, "num_draft_tokens", "reason"]
        )
        self.light_steps = Counter(
            PREFIX + "light_steps", "Engine steps in which the drafter's light view drafted.", labels
        )
        self.acceptance_alarms = Counter(
            PREFIX + "acceptance_alarms", "Collapses of acceptance, as after an update the drafter missed.", labels
        )
        self.refreshed_layers = Counter(
            PREFIX + "refreshed_layers", "Layers of the drafter quantized again after weight updates.", labels
        )
        self.refresh_seconds = Histogram(
            PREFIX + "refresh_seconds",
            "Time that following a weight update took the drafter, for each update between two steps.",
            labels,
            buckets=(0.01, 0.03, 0.1, 0.3, 1.0, 2.0, 5.0, 10.0, 30.0),
        )
        self.draft_length = Histogram(
            PREFIX + "draft_length", "Draft length of each step.", labels, buckets=range(max_draft_tokens + 1)
        )
        self.predicted_speedup = Histogram(
            PREFIX + "predicted_speedup", "Predicted token rate relative to plain decoding.", labels, buckets=speedups
        )
        self.achieved_speedup = Histogram(
            PREFIX + "achieved_speedup", "Token rate relative to predicted plain decoding.", labels, buckets=speedups
        )

    def record(
        self,
        steps: Iterable[StepStats],
        acceptance_alarms: int,
        refreshed_layers: int,
        refresh_seconds: float,
        engine: int,
    ) -> None:
        """Count steps, alarms and refreshes of one engine since the last call."""
        labels = {**self._labels, "engine": str(engine)}
        self.acceptance_alarms.labels(**labels).inc(acceptance_alarms)
        if refreshed_layers:
            self.refreshed_layers.labels(**labels).inc(refreshed_layers)
            self.refresh_seconds.labels(**labels).observe(refresh_seconds)
        for step in steps:
            self.steps.labels(**labels, num_draft_tokens=str(step.num_draft_tokens), reason=step.reason).inc()
            self.light_steps.labels(**labels).inc(step.light)
            self.draft_length.labels(**labels).observe(step.num_draft_tokens)
            self.predicted_speedup.labels(**labels).observe(step.predicted_speedup)
            if step.achieved_speedup is not None:
                self.achieved_speedup.labels(**labels).observe(step.achieved_speedup)


def draft_length_counts(metrics: Iterable[Any]) -> dict[tuple[int, str], int]:
    """Steps by (draft length, reason), from the result of `LLM.get_metrics()`."""
    counts: dict[tuple[int, str], int] = {}
    for metric in metrics:
        if metric.name == PREFIX + "steps":
            key = (int(metric.labels["num_draft_tokens"]), metric.labels["reason"])
            counts[key] = counts.get(key, 0) + metric.value
    return counts


_metrics: weakref.WeakKeyDictionary[Any, Metrics] = weakref.WeakKeyDictionary()


def record(original: Callable[..., None], self: Any, scheduler_stats: Any, *args: Any, **kwargs: Any) -> None:
    """Wraps vLLM's `StatLoggerManager.record`: takes selfspec's numbers out of the statistics and counts them."""
    payload = getattr(scheduler_stats, "kv_connector_stats", None)
    if payload and STATS_KEY in payload:
        mine = payload[STATS_KEY]
        scheduler_stats.kv_connector_stats = {k: v for k, v in payload.items() if k != STATS_KEY} or None
        if self not in _metrics:
            _metrics[self] = Metrics(mine["model_name"], mine["max_draft_tokens"])
        steps = (StepStats(*fields) for fields in mine["steps"])
        _metrics[self].record(
            steps,
            mine["acceptance_alarms"],
            mine["refreshed_layers"],
            mine["refresh_seconds"],
            kwargs.get("engine_idx") or 0,
        )
    original(self, scheduler_stats, *args, **kwargs)
