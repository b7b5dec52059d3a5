"""Ray workers in place of one engine process: `RolloutPool` behind the calls of `EngineProcess`.

`vllm-selfspec rollout --workers N` drives either through the same rounds.
"""

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

from vllm_selfspec.engine_env import engine_environment, is_cpu_platform
from vllm_selfspec.errors import EngineError, UsageError
from vllm_selfspec.prompts import encode_prompt
from vllm_selfspec.results import Moment, SpecCounts
from vllm_selfspec.rollout.pool import RolloutPool, WorkerHandle
from vllm_selfspec.rollout.types import InvalidRequestError, RolloutError, WorkerStats

_KV_SPACE = "VLLM_CPU_KVCACHE_SPACE"
_LOOK_SECONDS = 0.5


class EnginePool:
    """The interface of `EngineProcess` over `num_workers` engines. A context manager."""

    def __init__(
        self,
        name: str,
        engine_args: dict[str, Any],
        num_workers: int,
        make_handle: Callable[[int], WorkerHandle] | None = None,
    ) -> None:
        """Prepare the pool; `wait_ready` starts it.

        Args:
            name: what the user knows these engines by, for messages.
            engine_args: keyword arguments of `vllm.LLM`, for every worker.
            num_workers: engines, one Ray actor each.
            make_handle: as of `RolloutPool`.
        """
        self.name = name
        self._num_workers = num_workers
        # A pool does not clear its workers' prefix caches between rounds: with them all rounds but the first would find
        # their prompts computed.
        arguments = {"enable_prefix_caching": False} | engine_args
        speculative_config = arguments.pop("speculative_config", None)
        self._model: str = arguments.pop("model")
        self._tokenizer: Any = None
        self._pool = RolloutPool(
            self._model,
            num_workers,
            engine_args=arguments,
            speculative_config=speculative_config,
            env=_environment(num_workers),
            make_handle=make_handle,
        )
        self._running = False

    def __enter__(self) -> "EnginePool":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._running:
            self._pool.__exit__(None, None, None)

    def wait_ready(self) -> float:
        """Start the workers and have their first, slower steps behind them. Returns the seconds that took.

        Raises:
            UsageError: when there are more workers than the machine has places for.
            EngineError: when they fail to start.
        """
        started = time.monotonic()
        with _errors(self.name):
            self._pool.__enter__()
            self._running = True
            prompts = [[token] * 8 for token in range(1, 4 * self._num_workers + 1)]
            self._pool.generate_all(prompts, 1, {"max_tokens": 8, "temperature": 1.0, "ignore_eos": True})
        return time.monotonic() - started

    def generate(self, requests: list[dict[str, Any]], sampling: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Run all requests at once; requests of one prompt (`id`s "prompt-sample") must follow each other.

        Yields:
            The events of `EngineProcess.generate`; `done` also has `report`, a `PoolReport` as a dict. Its counters are
            per request and step, where those of an engine process are per engine step.

        Raises:
            UsageError: when a request does not fit the engines.
            EngineError: when no worker is left.
        """
        groups = [list(group) for _, group in itertools.groupby(requests, lambda r: r["id"].partition("-")[0])]
        with _errors(self.name):
            prompts = [self._prompt(group[0]) for group in groups]
            before = self._counters()
            started = time.monotonic()
            moments: list[Moment] = []
            stream = self._pool.generate(prompts, len(groups[0]), sampling | {"logprobs": None})
            for sample in stream:
                seconds = time.monotonic() - started
                if not moments or seconds > moments[-1].seconds + _LOOK_SECONDS:
                    running = sum(stats.running for stats in self._stats())
                    moments.append(Moment(seconds=round(seconds, 3), running=running))
                yield {
                    "event": "sample",
                    "id": groups[sample.prompt_index][sample.sample_index]["id"],
                    "token_ids": sample.token_ids,
                    "text": sample.text,
                    "finish_reason": sample.finish_reason,
                    "seconds": seconds,
                }
            report = stream.report
            moments.append(Moment(seconds=round(report.makespan_s, 3), running=0))
            yield {
                "event": "done",
                "seconds": report.makespan_s,
                "counters": self._counters().minus(before).model_dump(),
                "timeline": [moment.model_dump() for moment in moments],
                "report": report.model_dump(mode="json"),
            }

    def _prompt(self, request: dict[str, Any]) -> str | list[int]:
        """A text, or the token ids of a conversation."""
        if "prompt" in request:
            return str(request["prompt"])
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            self._tokenizer = AutoTokenizer.from_pretrained(self._model)
        return encode_prompt(self._tokenizer, request)

    def _stats(self) -> list[WorkerStats]:
        return asyncio.run(self._pool.stats())

    def _counters(self) -> SpecCounts:
        total = SpecCounts()
        for stats in self._stats():
            total = total.plus(spec_counts(stats))
        return total


def spec_counts(stats: WorkerStats) -> SpecCounts:
    """A worker's counters as the speculation counters of a round.

    `draft_lengths` counts requests' steps: a draft has a token at position i exactly if it is longer than i.
    """
    at_least = [stats.drafts, *stats.drafted_per_position[1:], 0]
    lengths = {length: now - after for length, (now, after) in enumerate(itertools.pairwise(at_least), start=1)}
    return SpecCounts(
        num_drafts=stats.drafts,
        num_draft_tokens=stats.draft_tokens,
        num_accepted_tokens=stats.accepted_tokens,
        accepted_per_position=stats.accepted_per_position,
        draft_lengths={length: count for length, count in {0: stats.steps - stats.drafts, **lengths}.items() if count},
    )


def _environment(num_workers: int) -> dict[str, str]:
    """What workers need beyond what the pool sets: as `EngineProcess`, the memory shared by all of them."""
    env = {"VLLM_SELFSPEC": "0"}  # the arguments alone say which engines these are; plain ones stay plain
    if is_cpu_platform():
        env["KMP_BLOCKTIME"] = "1"  # idle threads of one engine must not spin on the cores of another
        space = engine_environment().get(_KV_SPACE)
        if space is not None:
            env[_KV_SPACE] = str(max(1, int(space) // num_workers))
    return env


@contextlib.contextmanager
def _errors(name: str) -> Iterator[None]:
    """Turn the pool's errors into those that a person at the command line reads."""
    try:
        yield
    except InvalidRequestError as error:
        raise UsageError(str(error)) from error
    except RolloutError as error:
        raise EngineError(f"the {name} workers failed: {error}") from error
