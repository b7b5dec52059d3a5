"""One rollout worker: a queue of samples in front of one vLLM engine.

`Worker` holds everything that does not depend on the engine: what waits, what runs, what is finished. `RolloutWorker`
puts vLLM's `AsyncLLM` behind it, `DummyWorker` nothing: tests and simulations of the pool run the real queueing code.
All methods are coroutines of one event loop; a Ray actor of the class has them as remote methods.
"""

import asyncio
import contextlib
import multiprocessing
import os
import subprocess
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

from vllm_selfspec.rollout.types import (
    CollectReply,
    Failure,
    Finished,
    GenerateRequest,
    InvalidRequestError,
    RolloutError,
    Sample,
    SampleKey,
    WeightUpdateError,
    WorkerDeadError,
    WorkerInfo,
    WorkerStats,
)
from vllm_selfspec.rollout.weights import BACKEND, read_index

_WATCH_S = 0.5  # how often an engine is asked whether it is alive
_COALESCE_S = 0.002  # samples of one engine step finish within this time: collect them in one reply


class _Task(NamedTuple):
    key: SampleKey
    attempt: int
    request: GenerateRequest


class Worker:
    """The queue of one worker. Subclasses make samples in `_begin` and end each with `_end` or `_refuse`."""

    def __init__(self, worker_id: int, capacity: int) -> None:
        self.worker_id = worker_id
        self._capacity = capacity
        self._handed_over = capacity  # samples that are handed to the engine at once
        self._version: int | None = 0
        self._waiting: deque[_Task] = deque()
        self._running: dict[SampleKey, _Task] = {}
        self._finished: list[Finished] = []
        self._failures: list[Failure] = []
        self._wake = asyncio.Event()
        self._fatal: BaseException | None = None
        self._busy_since = 0.0
        self._counters: dict[str, Any] = {
            "finished_samples": 0,
            "prompt_tokens": 0,
            "generated_tokens": 0,
            "drafts": 0,
            "draft_tokens": 0,
            "accepted_tokens": 0,
            "weight_updates": 0,
            "weight_update_seconds": 0.0,
            "engine_seconds": 0.0,
        }
        self._accepted_per_position: list[int] = []
        self._drafted_per_position: list[int] = []

    # -- interface -------------------------------------------------------------------------------------------------
    async def start(self) -> WorkerInfo:
        """Build the engine. Returns what it is."""
        raise NotImplementedError

    async def encode(self, prompts: list[str]) -> list[list[int]]:
        """Token ids of texts, special tokens included, as the engine would tokenize them itself."""
        raise NotImplementedError

    async def submit(self, requests: list[GenerateRequest]) -> None:
        """Queue samples; they are begun in order as places become free."""
        self._check_alive()
        if self._version is None:
            raise WeightUpdateError(
                f"worker {self.worker_id} holds a half-loaded version of the weights; load a whole version first"
            )
        for request in requests:
            for sample_index, attempt in request.samples:
                self._waiting.append(_Task((request.run, request.prompt_index, sample_index), attempt, request))
        self._pump()

    async def collect(self, max_wait_s: float) -> CollectReply:
        """Everything finished since the last call; waits up to `max_wait_s` seconds for the first of it."""
        if not self._wake.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), max_wait_s)
                await asyncio.sleep(_COALESCE_S)
        if not self._finished and not self._failures:
            self._check_alive()
        finished, self._finished = self._finished, []
        failures, self._failures = self._failures, []
        if self._fatal is None:
            self._wake.clear()
        return CollectReply(finished, failures, await self.stats())

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Sample]:
        """Stream one group's samples as they finish: for a worker that is used on its own, without a pool."""
        await self.submit([request])
        left = len(request.samples)
        while left:
            reply = await self.collect(60.0)
            if reply.failures:
                raise InvalidRequestError(reply.failures[0].message)
            for finished in reply.finished:
                left -= 1
                yield finished.sample

    async def reclaim(self, count: int) -> list[SampleKey]:
        """Give back up to `count` samples that have not begun, last in first out."""
        self._check_alive()
        return [self._waiting.pop().key for _ in range(min(count, len(self._waiting)))]

    async def abort(self, keys: list[SampleKey]) -> None:
        """Drop these samples, begun or not; they will not be reported."""
        unwanted = set(keys)
        self._waiting = deque(task for task in self._waiting if task.key not in unwanted)
        for key in unwanted & self._running.keys():
            self._cancel(key)
            self._leave(key)
        self._pump()

    async def prepare_weights(self, path: str) -> None:
        """Check that this worker can read the weights. Changes nothing."""
        self._check_alive()
        await asyncio.to_thread(read_index, path)

    async def load_weights(self, path: str, version: int) -> None:
        """Load a version through the engine's own update protocol. Samples still running are lost: drain first.

        Raises:
            WeightUpdateError: the engine holds a mixture now and accepts samples only after a load that succeeds.
        """
        self._check_alive()
        began = time.monotonic()
        self._version = None
        try:
            await self._load(path, version)
        except WorkerDeadError:
            raise
        except Exception as error:
            self._check_alive()
            raise WeightUpdateError(f"worker {self.worker_id} could not load version {version}: {error}") from error
        self._version = version
        self._counters["weight_updates"] += 1
        self._counters["weight_update_seconds"] += time.monotonic() - began

    async def stats(self) -> WorkerStats:
        """Counters since the engine started."""
        counters = dict(self._counters)
        if self._running:
            counters["engine_seconds"] += time.monotonic() - self._busy_since
        return WorkerStats.model_construct(
            worker_id=self.worker_id,
            weight_version=-1 if self._version is None else self._version,
            running=min(len(self._running), self._capacity),
            waiting=len(self._waiting) + max(0, len(self._running) - self._capacity),
            running_tokens=sum(len(task.request.prompt_token_ids) for task in self._running.values()),
            accepted_per_position=list(self._accepted_per_position),
            drafted_per_position=list(self._drafted_per_position),
            **counters,
        )

    async def health(self) -> None:
        """Raises WorkerDeadError when the engine is gone."""
        self._check_alive()

    async def kill(self) -> None:
        """End at once, without tidying up."""
        self._die(WorkerDeadError(f"worker {self.worker_id} was killed"))

    async def close(self) -> None:
        """End in an orderly way."""
        await self.kill()

    # -- for subclasses --------------------------------------------------------------------------------------------
    def _begin(self, task: _Task) -> None:
        raise NotImplementedError

    def _cancel(self, key: SampleKey) -> None:
        """Stop making a sample."""

    async def _load(self, path: str, version: int) -> None:
        raise NotImplementedError

    def _end(
        self,
        task: _Task,
        token_ids: list[int],
        text: str | None,
        logprobs: list[float] | None,
        finish_reason: str,
        began_with: int | None,
    ) -> None:
        if task.key not in self._running:
            return
        if self._version is None or began_with != self._version:
            self._die(RolloutError(f"worker {self.worker_id} changed its weights under a running sample"))
            return
        sample = Sample.model_construct(
            prompt_index=task.key[1],
            sample_index=task.key[2],
            token_ids=token_ids,
            text=text,
            logprobs=logprobs,
            finish_reason=finish_reason,
            worker_id=self.worker_id,
            weight_version=self._version,
            attempt=task.attempt,
        )
        self._finished.append(Finished(task.key[0], sample))
        self._counters["finished_samples"] += 1
        self._leave(task.key)
        self._wake.set()
        self._pump()

    def _refuse(self, task: _Task, message: str) -> None:
        if task.key in self._running:
            self._failures.append(Failure(task.key, message))
            self._leave(task.key)
            self._wake.set()
            self._pump()

    def _die(self, error: BaseException) -> None:
        if self._fatal is None:
            self._fatal = error
        self._wake.set()

    def _check_alive(self) -> None:
        if self._fatal is not None:
            if isinstance(self._fatal, WorkerDeadError):
                raise self._fatal
            raise WorkerDeadError(f"the engine of worker {self.worker_id} died: {self._fatal}") from self._fatal

    def _leave(self, key: SampleKey) -> None:
        del self._running[key]
        if not self._running:
            self._counters["engine_seconds"] += time.monotonic() - self._busy_since

    def _pump(self) -> None:
        while self._waiting and len(self._running) < self._handed_over and self._fatal is None:
            task = self._waiting.popleft()
            if not self._running:
                self._busy_since = time.monotonic()
            self._running[task.key] = task
            self._begin(task)


class RolloutWorker(Worker):
    """One vLLM engine (`AsyncLLM`) in this process and those it starts.

    Args:
        worker_id: position in the pool.
        engine_args: fields of vLLM's `AsyncEngineArgs`; `model` at least. Weight transfer is enabled through the
            backend of this package unless `weight_transfer_config` says otherwise.
        own_processes: kill every process that the engine has started when this process dies, however it dies
            (vLLM's engine process would go on holding memory). Moves this process to a process group of its own.
    """

    def __init__(self, worker_id: int, engine_args: dict[str, Any], own_processes: bool = False) -> None:
        super().__init__(worker_id, capacity=1)
        self._engine_args = dict(engine_args)
        self._engine: Any = None
        self._tasks: dict[SampleKey, asyncio.Task[None]] = {}
        self._watch: asyncio.Task[None] | None = None
        self._logs_stats = True
        self._dead = asyncio.Event()
        if own_processes:
            self._guard = _kill_group_with_parent()

    async def start(self) -> WorkerInfo:
        """Build the engine; blocks this process's event loop while it loads.

        Raises:
            InvalidRequestError: vLLM refused the engine arguments or could not start; nothing is worth a retry.
        """
        from vllm.config import WeightTransferConfig
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        from vllm_selfspec.plugin import FIRST_WHOLE_VLLM, older_than

        if older_than(FIRST_WHOLE_VLLM):
            raise InvalidRequestError(f"rollout pools need vLLM {FIRST_WHOLE_VLLM} or newer: install one")
        arguments = {"disable_log_stats": True, **self._engine_args}
        arguments.setdefault("weight_transfer_config", WeightTransferConfig(backend=BACKEND))
        try:
            config = AsyncEngineArgs(**arguments).create_engine_config(UsageContext.ENGINE_CONTEXT)
            # Statistics cost time in every step, and a plain engine has none that its samples do not tell.
            self._logs_stats = config.speculative_config is not None or not arguments["disable_log_stats"]
            self._engine = AsyncLLM.from_vllm_config(
                config,
                stat_loggers=[self._stat_logger_factory()] if self._logs_stats else None,
                enable_log_requests=arguments.get("enable_log_requests", False),
                disable_log_stats=arguments["disable_log_stats"],
            )
        except Exception as error:
            raise InvalidRequestError(f"worker {self.worker_id}: the engine did not start: {error}") from error
        self._watch = asyncio.get_running_loop().create_task(self._watch_engine())
        self._capacity = config.scheduler_config.max_num_seqs
        # The engine fills a freed place in its next step only from its own queue: from here it takes a step more, and
        # when many samples end at once, the first of their successors would be decoded without the others.
        self._handed_over = 2 * self._capacity
        await self._or_death(self._engine.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": {}}))
        model = Path(config.model_config.model)
        return WorkerInfo(
            worker_id=self.worker_id,
            capacity=self._capacity,
            max_model_len=config.model_config.max_model_len,
            pid=os.getpid(),
            engine_pids=[child.pid for child in multiprocessing.active_children() if child.pid is not None],
            base_weights=str(model) if any(model.glob("*.safetensors")) else None,
        )

    async def encode(self, prompts: list[str]) -> list[list[int]]:
        tokenizer = self._engine.get_tokenizer() if not self._engine.model_config.skip_tokenizer_init else None
        if tokenizer is None:
            raise InvalidRequestError("prompts: the engine has no tokenizer; pass token ids")
        # In a thread: thousands of long texts take a minute, for which the samples of this worker would wait, too.
        return await asyncio.to_thread(lambda: [tokenizer.encode(prompt) for prompt in prompts])

    async def health(self) -> None:
        await super().health()
        await self._engine.check_health()

    async def close(self) -> None:
        await super().close()
        for task in [*self._tasks.values(), *([self._watch] if self._watch is not None else [])]:
            task.cancel()
        if self._engine is not None:
            self._engine.shutdown(timeout=5)

    async def reclaim(self, count: int) -> list[SampleKey]:
        """As `Worker.reclaim`; after what waits here also what waits in the engine.

        The engine begins samples in the order in which it got them and decodes at most `capacity`, so the last ones
        beyond these have not begun. One that begins in this very step loses that step.
        """
        keys = await super().reclaim(count)
        queued = max(0, len(self._running) - self._capacity)
        for key in list(islice(reversed(self._running), min(count - len(keys), queued))):
            self._cancel(key)
            self._leave(key)
            keys.append(key)
        return keys

    def _begin(self, task: _Task) -> None:
        self._tasks[task.key] = asyncio.get_running_loop().create_task(self._make(task))

    def _cancel(self, key: SampleKey) -> None:
        self._tasks.pop(key).cancel()

    async def _make(self, task: _Task) -> None:
        key, began_with = task.key, self._version
        try:
            params = _sampling_params(task)
            request_id = "-".join(map(str, (*key, task.attempt)))
            prompt = {"prompt_token_ids": task.request.prompt_token_ids}
            # FINAL_ONLY: the generator yields once.
            (output,) = [output async for output in self._engine.generate(prompt, params, request_id)]
            (completion,) = output.outputs
            logprobs = None
            if completion.logprobs is not None:
                pairs = zip(completion.token_ids, completion.logprobs, strict=True)
                logprobs = [entry[token].logprob for token, entry in pairs]
            text = None if self._engine.model_config.skip_tokenizer_init else completion.text
            reason = completion.finish_reason or "unknown"
            if not self._logs_stats:
                self._counters["prompt_tokens"] += len(task.request.prompt_token_ids)
                self._counters["generated_tokens"] += len(completion.token_ids)
            self._end(task, list(completion.token_ids), text, logprobs, reason, began_with)
        except Exception as error:
            # vLLM wraps what it did not expect; the cause says what happened.
            reason = error.__cause__ or error
            if self._engine.errored:
                self._die(reason)
            else:
                self._refuse(task, f"sampling_params or prompt {key[1]}: vLLM refuses the request: {reason}")
        finally:
            # A cancelled sample may be back under the same key by now.
            if self._tasks.get(key) is asyncio.current_task():
                del self._tasks[key]

    async def _load(self, path: str, version: int) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        engine = self._engine
        await self._or_death(engine.pause_generation(mode="abort"))
        try:
            await self._or_death(engine.start_weight_update())
            await self._or_death(engine.update_weights(WeightTransferUpdateRequest(update_info={"path": path})))
            await self._or_death(engine.finish_weight_update(str(version)))
            await self._or_death(engine.reset_prefix_cache())
        finally:
            if self._fatal is None:
                await self._or_death(engine.resume_generation())

    async def _watch_engine(self) -> None:
        """Notice a dead engine also when nothing is running on it."""
        while not self._engine.errored:
            await asyncio.sleep(_WATCH_S)
        self._die(self._engine.dead_error)

    def _die(self, error: BaseException) -> None:
        super()._die(error)
        self._dead.set()

    async def _or_death(self, call: Coroutine[Any, Any, Any]) -> None:
        """Await a control call; vLLM never answers one that its engine was working on when it died."""
        work, death = asyncio.ensure_future(call), asyncio.ensure_future(self._dead.wait())
        try:
            await asyncio.wait({work, death}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                self._check_alive()
            await work
        finally:
            work.cancel()
            death.cancel()

    def _stat_logger_factory(self) -> Callable[..., Any]:
        from vllm.v1.metrics.loggers import StatLoggerBase

        counters, worker = self._counters, self

        class Counters(StatLoggerBase):
            """Adds up what this package reports; vLLM calls `record` once per engine step."""

            def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
                pass

            def record(
                self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
            ) -> None:
                if iteration_stats is not None:
                    counters["generated_tokens"] += iteration_stats.num_generation_tokens
                    counters["prompt_tokens"] += iteration_stats.num_prompt_tokens
                spec = scheduler_stats.spec_decoding_stats if scheduler_stats is not None else None
                if spec is not None:
                    counters["drafts"] += spec.num_drafts
                    counters["draft_tokens"] += spec.num_draft_tokens
                    counters["accepted_tokens"] += spec.num_accepted_tokens
                    _add(worker._accepted_per_position, spec.num_accepted_tokens_per_pos)
                    _add(worker._drafted_per_position, spec.num_draft_tokens_per_pos)

            def log_engine_initialized(self) -> None:
                pass

        return Counters


def _add(totals: list[int], values: Sequence[int]) -> None:
    totals.extend([0] * (len(values) - len(totals)))
    for position, value in enumerate(values):
        totals[position] += value


def _sampling_params(task: _Task) -> Any:
    """vLLM `SamplingParams` of one sample: final output only, a seed of its own if there is one."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    params = SamplingParams(**task.request.sampling_params)
    params.output_kind = RequestOutputKind.FINAL_ONLY
    if params.seed is not None:
        params.seed += task.key[2]
    return params


def _kill_group_with_parent() -> IO[bytes]:
    """Put this process and its future children in a process group that is killed when this process ends.

    The guard outlives a SIGKILL of this process: it waits for the end of a pipe that only this process holds open (the
    returned end). It is nobody's child, since Ray kills the children of an actor, the guard before those it guards.
    """
    with contextlib.suppress(PermissionError):  # a session leader leads its group already
        os.setpgid(0, 0)
    # A shell takes the standard input away from what it runs in the background, hence descriptor 3.
    script = 'exec 3<&0; (read _ <&3; kill -s KILL -- "-$0") >/dev/null 2>&1 &'
    guard = subprocess.Popen(
        ["/bin/sh", "-c", script, str(os.getpgid(0))], stdin=subprocess.PIPE, start_new_session=True
    )
    guard.wait()
    assert guard.stdin is not None
    return guard.stdin


class DummyWorker(Worker):
    """A worker without an engine: sample lengths and times are given, tokens are a function of key and version.

    Args:
        worker_id: position in the pool.
        capacity: samples decoded at once.
        length: tokens of a sample, from its key; at most its `max_tokens`.
        seconds_per_token: how long a token takes; 0 finishes samples as soon as they are begun.
        max_model_len: as of an engine.
        refuse_versions: weight versions whose load fails.
    """

    def __init__(
        self,
        worker_id: int,
        capacity: int = 8,
        length: Callable[[SampleKey], int] = lambda key: 16,
        seconds_per_token: float = 0.0,
        max_model_len: int = 4096,
        refuse_versions: Sequence[int] = (),
    ) -> None:
        super().__init__(worker_id, capacity)
        self._length = length
        self._seconds_per_token = seconds_per_token
        self._max_model_len = max_model_len
        self._refuse_versions = set(refuse_versions)
        self._timers: dict[SampleKey, asyncio.TimerHandle] = {}
        self._at_once: list[_Task] = []
        self.loaded: list[tuple[str, int]] = []

    async def start(self) -> WorkerInfo:
        return WorkerInfo(
            worker_id=self.worker_id,
            capacity=self._capacity,
            max_model_len=self._max_model_len,
            pid=os.getpid(),
            engine_pids=[],
            base_weights=None,
        )

    async def encode(self, prompts: list[str]) -> list[list[int]]:
        return [list(prompt.encode()) for prompt in prompts]

    async def kill(self) -> None:
        await super().kill()
        for timer in self._timers.values():
            timer.cancel()
        self._running.clear()
        self._waiting.clear()

    def _begin(self, task: _Task) -> None:
        loop, delay = asyncio.get_running_loop(), self._length(task.key) * self._seconds_per_token
        if delay:
            self._timers[task.key] = loop.call_later(delay, self._emit, task)
            return
        if not self._at_once:
            loop.call_soon(self._emit_at_once)
        self._at_once.append(task)

    def _emit_at_once(self) -> None:
        tasks, self._at_once = self._at_once, []
        for task in tasks:
            self._emit(task)

    def _cancel(self, key: SampleKey) -> None:
        timer = self._timers.pop(key, None)
        if timer is not None:
            timer.cancel()

    async def _load(self, path: str, version: int) -> None:
        await asyncio.sleep(0)
        if version in self._refuse_versions:
            raise OSError(f"cannot read {path}")
        self.loaded.append((path, version))

    def _emit(self, task: _Task) -> None:
        if task.key not in self._running:
            return
        self._timers.pop(task.key, None)
        count = min(self._length(task.key), task.request.sampling_params.get("max_tokens", 16))
        self._counters["generated_tokens"] += count
        tokens = [(task.key[1] * 7919 + task.key[2] * 104729 + (self._version or 0)) % 32000] * count
        self._end(task, tokens, None, None, "length", self._version)
