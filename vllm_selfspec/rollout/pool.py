"""A pool of rollout workers: streams samples, follows the weights, survives the loss of workers.

The pool's own work runs on one event loop in a thread of its own, so it is used alike from a script, a notebook and
asyncio code, and a slow consumer does not stop the workers. `Dispatcher` decides who makes what; this file moves
requests and samples, and keeps three promises:

* a sample is delivered once, whatever happens to the worker that was making it;
* every sample was made by one version of the weights, the one it is tagged with;
* an update of the weights takes place on all workers or on none.
"""

import asyncio
import concurrent.futures
import contextlib
import itertools
import logging
import os
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Protocol, Self, TypeVar

from pydantic import ValidationError

from vllm_selfspec.rollout.dispatcher import Dispatcher, Item, Reclaim
from vllm_selfspec.rollout.types import (
    CollectReply,
    GenerateRequest,
    InvalidRequestError,
    PoolFailedError,
    PoolReport,
    RolloutError,
    Sample,
    SampleKey,
    WeightUpdateError,
    WorkerDeadError,
    WorkerInfo,
    WorkerReport,
    WorkerStats,
    explain,
)
from vllm_selfspec.rollout.weights import WeightStore, WeightVersion, check_finite, check_layout, read_index

logger = logging.getLogger(__name__)

Prompt = str | Sequence[int] | Mapping[str, Any]
"""A text, its token ids, or vLLM's dictionaries `{"prompt": text}` and `{"prompt_token_ids": ids}`."""

_COLLECT_WAIT_S = 10.0
_SHUT_DOWN = "the pool was shut down before all samples were finished; read streams to their end inside `with`"
_DEFAULT_MAX_TOKENS = 16  # vLLM's own
_T = TypeVar("_T")


class WorkerHandle(Protocol):
    """What the pool asks of a worker, wherever it runs; `Worker` documents each method."""

    worker_id: int

    async def start(self) -> WorkerInfo: ...
    async def encode(self, prompts: list[str]) -> list[list[int]]: ...
    async def submit(self, requests: list[GenerateRequest]) -> None: ...
    async def collect(self, max_wait_s: float) -> CollectReply: ...
    async def reclaim(self, count: int) -> list[SampleKey]: ...
    async def abort(self, keys: list[SampleKey]) -> None: ...
    async def prepare_weights(self, path: str) -> None: ...
    async def load_weights(self, path: str, version: int) -> None: ...
    async def stats(self) -> WorkerStats: ...
    async def health(self) -> None: ...
    async def kill(self) -> None: ...
    async def close(self) -> None: ...


class SampleStream:
    """The samples of one `generate` call, in the order in which they finish. Iterate with `async for` or `for`.

    Leaving the loop early leaves the rest running; `cancel` ends it. After the last sample, `report` says how it went.
    """

    def __init__(self, cancel: Callable[[], None]) -> None:
        self._cancel = cancel
        self._taken: deque[Sample] = deque()  # the consumer's own: read without the lock
        self._ready: deque[Sample] = deque()
        self._changed = threading.Condition()
        self._waiter: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None
        self._ended = False
        self._error: BaseException | None = None
        self._report: PoolReport | None = None

    @property
    def report(self) -> PoolReport:
        """Available once the last sample has been delivered."""
        if self._report is None:
            raise RolloutError(
                "report: there is none before the last sample, nor after an error; read to the end first"
            )
        return self._report

    def finished_now(self) -> list[Sample]:
        """All samples that are finished and were not yet taken, without waiting: also after an error."""
        with self._changed:
            taken = [*self._taken, *self._ready]
            self._taken.clear()
            self._ready.clear()
        return taken

    def cancel(self) -> None:
        """Stop making the samples that are not finished. Finished ones can still be read."""
        self._cancel()

    def __aiter__(self) -> AsyncIterator[Sample]:
        return self

    async def __anext__(self) -> Sample:
        while not self._taken:
            with self._changed:
                if self._take():
                    break
                if self._ended:
                    raise StopAsyncIteration
                event = asyncio.Event()
                self._waiter = (asyncio.get_running_loop(), event)
            await event.wait()
        return self._taken.popleft()

    def __iter__(self) -> Iterator[Sample]:
        return self

    def __next__(self) -> Sample:
        if not self._taken:
            with self._changed:
                while not self._take():
                    if self._ended:
                        raise StopIteration
                    self._changed.wait()
        return self._taken.popleft()

    def _take(self) -> bool:
        """Take over all that is ready, with the lock held. False: nothing is. Raises the run's error after the last."""
        self._taken, self._ready = self._ready, self._taken
        if not self._taken and self._error is not None:
            raise self._error
        return bool(self._taken)

    def _push(self, samples: list[Sample]) -> None:
        with self._changed:
            self._ready.extend(samples)
            self._notify()

    def _close(self, report: PoolReport | None, error: BaseException | None = None) -> None:
        with self._changed:
            if not self._ended:
                self._report, self._error, self._ended = report, error, True
            self._notify()

    def _notify(self) -> None:
        self._changed.notify_all()
        if self._waiter is not None:
            loop, event = self._waiter
            self._waiter = None
            if not loop.is_closed():
                loop.call_soon_threadsafe(event.set)


@dataclass
class _Run:
    """One `generate` call."""

    run: int
    stream: SampleStream
    prompts: list[list[int]]
    sampling_params: dict[str, Any]
    began: float
    base: dict[int, WorkerStats]
    samples: int = 0
    tokens: int = 0
    per_worker: dict[int, list[int]] = field(default_factory=dict)  # samples, tokens
    busy0: dict[int, float] = field(default_factory=dict)
    area0: dict[int, float] = field(default_factory=dict)
    restarts0: dict[int, int] = field(default_factory=dict)
    last: dict[int, float] = field(default_factory=dict)


@dataclass
class _Slot:
    """One place in the pool; its worker is replaced when it is lost."""

    worker_id: int
    handle: WorkerHandle
    info: WorkerInfo | None = None
    alive: bool = False
    given_up: bool = False
    version: int = 0
    restarts: int = 0
    fruitless: int = 0  # losses in a row without a finished sample between them
    stats: WorkerStats | None = None
    before: list[WorkerStats] = field(default_factory=list)  # at most one: the sum over lost workers of this place
    task: asyncio.Task[None] | None = None
    busy: float = 0.0
    area: float = 0.0
    seen: float = 0.0

    def account(self, now: float, sent: int) -> None:
        """Add the time since the last call, in which `sent` samples were in flight."""
        if sent and self.info is not None:
            self.busy += now - self.seen
            self.area += (now - self.seen) * min(sent, self.info.capacity) / self.info.capacity
        self.seen = now

    def totals(self) -> WorkerStats:
        """Counters over all workers that this place has had."""
        parts = self.before + ([self.stats] if self.stats is not None else [])
        return _sum_stats(self.worker_id, parts)


class RolloutPool:
    """Rollout workers behind one `generate`.

    Args:
        model: checkpoint folder (or a name that vLLM resolves) for all workers.
        num_workers: engines, one Ray actor each.
        engine_args: further fields of vLLM's `EngineArgs` (`max_model_len`, `max_num_seqs`, ...).
        speculative_config: vLLM's, e.g. `{"method": "selfspec"}`; None is plain decoding.
        gpus_per_worker: GPUs of each worker (its tensor parallel size unless `engine_args` says otherwise); None is 1
            if the Ray cluster has GPUs, else 0: CPU engines, each pinned to its own share of the cores.
        env: further environment variables of the workers.
        lookahead: samples that a worker holds beyond those it decodes; None is as many again.
        max_restarts: losses in a row, without a finished sample between them, after which a worker is given up.
        weight_folder: where state dicts given to `update_weights` are written; None is shared memory or a temporary
            folder. Workers on other hosts must see it too.
        make_handle: makes worker `i`; the default makes Ray actors. Tests and simulations pass `DummyWorker`.

    The methods that return coroutines have plain twins for notebooks: `with RolloutPool(...) as pool:`,
    `generate_all`, `set_weights`.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        num_workers: int = 1,
        *,
        engine_args: Mapping[str, Any] | None = None,
        speculative_config: Mapping[str, Any] | None = None,
        gpus_per_worker: int | None = None,
        env: Mapping[str, str] | None = None,
        lookahead: int | None = None,
        max_restarts: int = 3,
        weight_folder: str | os.PathLike[str] | None = None,
        make_handle: Callable[[int], WorkerHandle] | None = None,
    ) -> None:
        if num_workers < 1:
            raise InvalidRequestError(f"num_workers: {num_workers} is less than 1; a pool needs a worker")
        if lookahead is not None and lookahead < 0:
            raise InvalidRequestError(f"lookahead: {lookahead} is negative; pass 0 or more")
        if max_restarts < 0:
            raise InvalidRequestError(f"max_restarts: {max_restarts} is negative; pass 0 or more")
        self._cluster: Any = None
        if make_handle is None:
            if model is None:
                raise InvalidRequestError("model: nothing to serve; pass a checkpoint folder")
            from vllm_selfspec.rollout.actors import RayCluster

            arguments = dict(engine_args or {})
            if speculative_config is not None:
                arguments["speculative_config"] = dict(speculative_config)
            self._cluster = RayCluster(os.fspath(model), num_workers, arguments, gpus_per_worker, dict(env or {}))
            make_handle = self._cluster.make_handle
        self._make_handle = make_handle
        self._num_workers = num_workers
        self._lookahead = lookahead
        self._max_restarts = max_restarts
        self._dispatcher = Dispatcher()
        self._slots: dict[int, _Slot] = {}
        self._runs: dict[int, _Run] = {}
        self._run_ids = itertools.count()
        self._version = self._base = WeightVersion(0, None)
        """What the workers have, and what a new one starts with."""
        self._store = WeightStore(weight_folder)
        self._paused = False
        self._closing = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="selfspec-rollout-pool", daemon=True)
        self._started = False

    # -- life ------------------------------------------------------------------------------------------------------
    async def start(self) -> None:
        """Start all workers, in parallel. Must be called (or `async with` used) before anything else."""
        self._start_thread()
        await self._on_loop(self._start())

    async def shutdown(self) -> None:
        """End all runs and workers. The pool cannot be started again."""
        if self._started and not self._closing:
            await self._on_loop(self._shutdown())
            self._stop_thread()

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.shutdown()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.shutdown()

    def __enter__(self) -> Self:
        self._start_thread()
        try:
            self._wait(self._start())
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._started and not self._closing:
            self._wait(self._shutdown())
            self._stop_thread()

    @property
    def weight_version(self) -> int:
        """The version that every worker holds."""
        return self._version.version

    @property
    def workers(self) -> list[WorkerInfo]:
        """The workers that are alive: process ids, capacities."""
        return [slot.info for slot in self._slots.values() if slot.alive and slot.info is not None]

    # -- samples ---------------------------------------------------------------------------------------------------
    def generate(
        self, prompts: Sequence[Prompt], n: int = 1, sampling_params: Mapping[str, Any] | Any | None = None
    ) -> SampleStream:
        """Begin `n` samples of each prompt; iterate over the result to get them as they finish.

        Args:
            prompts: texts or token ids. A prompt's samples are made by one worker, except in the tail.
            n: samples per prompt (a GRPO group).
            sampling_params: vLLM's `SamplingParams` or their fields as a dict. `logprobs` defaults to 0, the log
                probability of the sampled token; `{"logprobs": None}` does without.

        Raises:
            InvalidRequestError: nothing to do or contradictory settings. Prompts that do not fit the model are
                reported by the first step of the iteration, before anything is generated.
        """
        if not self._started or self._closing:
            raise RolloutError("generate: the pool is not running; use it inside `with` or after start()")
        params = _normalise_params(sampling_params)
        if isinstance(prompts, str) or not isinstance(prompts, Sequence):
            raise InvalidRequestError("prompts: pass a list of prompts, not a single one")
        if not prompts:
            raise InvalidRequestError("prompts: the list is empty; pass at least one prompt")
        if n < 1:
            raise InvalidRequestError(f"n: {n} samples per prompt; pass 1 or more")
        run_id = next(self._run_ids)
        stream = SampleStream(lambda: self._from_outside(self._cancel, run_id, stream))
        self._from_outside(self._spawn, self._open(run_id, stream, list(prompts), n, params))
        return stream

    def generate_all(
        self, prompts: Sequence[Prompt], n: int = 1, sampling_params: Mapping[str, Any] | Any | None = None
    ) -> list[Sample]:
        """`generate`, waited for: all samples ordered by prompt and sample index. Blocks; meant for notebooks."""
        samples = list(self.generate(prompts, n, sampling_params))
        return sorted(samples, key=lambda sample: (sample.prompt_index, sample.sample_index))

    # -- weights ---------------------------------------------------------------------------------------------------
    async def update_weights(
        self,
        weights: str | os.PathLike[str] | Mapping[str, Any],
        version: int,
        running: Literal["wait", "restart"] = "wait",
    ) -> None:
        """Bring all workers to new weights, or leave all at the present ones.

        Args:
            weights: safetensors file or folder in checkpoint format, or a state dict of torch tensors. Files must stay
                as they are until the next update has succeeded: a worker that is restarted loads them again.
            version: number that samples made with these weights are tagged with; any but the present one.
            running: samples in flight finish on the old weights first ("wait") or begin again on the new ones
                ("restart"). Samples not yet in flight always use the new ones.

        Raises:
            WeightUpdateError: the weights do not fit the model or are not finite, or a worker failed to load them.
                All workers hold the version that they held before, and go on.
        """
        await self._on_loop(self._update(weights, version, running))

    def set_weights(
        self,
        weights: str | os.PathLike[str] | Mapping[str, Any],
        version: int,
        running: Literal["wait", "restart"] = "wait",
    ) -> None:
        """`update_weights`, waited for. Blocks; meant for notebooks."""
        self._wait(self._update(weights, version, running))

    async def stats(self) -> list[WorkerStats]:
        """Counters of every worker since the pool started, restarts included."""
        return await self._on_loop(self._stats())

    # -- threads ---------------------------------------------------------------------------------------------------
    def _start_thread(self) -> None:
        if self._started:
            raise RolloutError("start: the pool was started already; make a new one")
        self._started = True
        self._thread.start()

    def _stop_thread(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _from_outside(self, function: Callable[..., None], *args: Any) -> None:
        self._loop.call_soon_threadsafe(function, *args)

    def _submit_to_loop(self, work: Coroutine[Any, Any, _T]) -> "concurrent.futures.Future[_T]":
        if not self._thread.is_alive():
            work.close()
            raise RolloutError("the pool is not running; use it inside `with` or after start()")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _on_loop(self, work: Coroutine[Any, Any, _T]) -> _T:
        return await asyncio.wrap_future(self._submit_to_loop(work))

    def _wait(self, work: Coroutine[Any, Any, _T]) -> _T:
        return self._submit_to_loop(work).result()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- everything below runs on the pool's loop ------------------------------------------------------------------
    async def _start(self) -> None:
        self._update_lock = asyncio.Lock()
        self._drained = asyncio.Event()
        if self._cluster is not None:
            await self._cluster.start()
        for worker_id in range(self._num_workers):
            self._slots[worker_id] = _Slot(worker_id, self._make_handle(worker_id))
        results = await asyncio.gather(*(slot.handle.start() for slot in self._slots.values()), return_exceptions=True)
        for slot, result in zip(self._slots.values(), results, strict=True):
            if isinstance(result, BaseException):
                raise PoolFailedError(f"the pool did not start: {result}") from result
            self._welcome(slot, result)
        base = next((slot.info.base_weights for slot in self._slots.values() if slot.info is not None), None)
        if base is not None:
            self._version = self._base = WeightVersion.from_path(0, base)
        for slot in self._slots.values():
            slot.task = self._loop.create_task(self._serve_or_fail(slot))

    async def _shutdown(self) -> None:
        self._closing = True
        for run_id in list(self._runs):
            self._fail(run_id, RolloutError(_SHUT_DOWN))
        tasks = [slot.task for slot in self._slots.values() if slot.task is not None] + list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(slot.handle.close() for slot in self._slots.values()), return_exceptions=True)
        if self._cluster is not None:
            self._cluster.close()
        self._store.close()

    def _welcome(self, slot: _Slot, info: WorkerInfo) -> None:
        """A worker is ready and holds the present version."""
        slot.info, slot.alive, slot.version, slot.seen = info, True, self._version.version, self._loop.time()
        lookahead = info.capacity if self._lookahead is None else self._lookahead
        self._dispatcher.add_worker(slot.worker_id, info.capacity, lookahead)

    async def _serve_or_fail(self, slot: _Slot) -> None:
        """A fault of the pool itself ends its runs; without anybody who collects they would wait for ever."""
        try:
            await self._serve(slot)
        except Exception as error:
            logger.exception("worker %d: the pool stopped collecting", slot.worker_id)
            self._retire(slot)
            for run_id in list(self._runs):
                self._fail(run_id, PoolFailedError(f"worker {slot.worker_id}: the pool stopped collecting: {error!r}"))
            await self._give_up(slot, error)
            self._flush()

    async def _serve(self, slot: _Slot) -> None:
        """Collect from one worker for ever; replace it when it is lost."""
        while not slot.given_up:
            try:
                reply = await slot.handle.collect(_COLLECT_WAIT_S)
            except WorkerDeadError as error:
                await self._replace(slot, error)
            except Exception as error:
                logger.exception("worker %d: collecting failed", slot.worker_id)
                await self._replace(slot, error)
            else:
                self._deliver(slot, reply)

    def _deliver(self, slot: _Slot, reply: CollectReply) -> None:
        slot.stats = reply.stats
        if not reply.finished and not reply.failures:
            return
        now = self._loop.time()
        slot.account(now, self._dispatcher.sent(slot.worker_id))
        ready: dict[int, list[Sample]] = {}
        for run_id, sample in reply.finished:
            if self._dispatcher.finish(slot.worker_id, (run_id, sample.prompt_index, sample.sample_index)):
                ready.setdefault(run_id, []).append(sample)
        for run_id, samples in ready.items():
            slot.fruitless = 0
            run = self._runs[run_id]
            tokens = sum(len(sample.token_ids) for sample in samples)
            run.samples += len(samples)
            run.tokens += tokens
            share = run.per_worker.setdefault(slot.worker_id, [0, 0])
            share[0] += len(samples)
            share[1] += tokens
            run.last[slot.worker_id] = now
            run.stream._push(samples)
            if not self._dispatcher.unfinished(run_id):
                del self._runs[run_id]
                run.stream._close(self._report(run))
                self._dispatcher.forget(run_id)
        for key, message in reply.failures:
            if self._dispatcher.finish(slot.worker_id, key):
                self._fail(key[0], InvalidRequestError(message))
        self._flush()

    def _flush(self) -> None:
        """Carry out what the dispatcher decides."""
        if self._dispatcher.in_flight() == 0:
            self._drained.set()
        if self._paused or self._closing:
            return
        now = self._loop.time()
        for worker_id, items in self._dispatcher.assign().items():
            slot = self._slots[worker_id]
            slot.account(now, self._dispatcher.sent(worker_id) - len(items))
            self._spawn(self._send(slot, slot.handle, self._requests(items)))
        for reclaim in self._dispatcher.reclaims():
            self._spawn(self._reclaim(self._slots[reclaim.worker_id], reclaim))

    def _requests(self, items: list[Item]) -> list[GenerateRequest]:
        groups: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for key, _, attempt in items:
            groups.setdefault(key[:2], []).append((key[2], attempt))
        return [
            GenerateRequest.model_construct(
                run=run_id,
                prompt_index=prompt_index,
                prompt_token_ids=self._runs[run_id].prompts[prompt_index],
                samples=samples,
                sampling_params=self._runs[run_id].sampling_params,
            )
            for (run_id, prompt_index), samples in groups.items()
        ]

    async def _send(self, slot: _Slot, handle: WorkerHandle, requests: list[GenerateRequest]) -> None:
        try:
            await handle.submit(requests)
        except WorkerDeadError:
            pass  # its `collect` reports the same, and `_replace` gives these samples to others
        except Exception as error:
            for run_id in {request.run for request in requests}:
                self._fail(run_id, error)

    async def _reclaim(self, slot: _Slot, reclaim: Reclaim) -> None:
        await self._take_back(slot, reclaim.at_most)
        self._flush()

    async def _take_back(self, slot: _Slot, at_most: int) -> None:
        """Put samples that a worker holds but has not begun back into the queue."""
        handle = slot.handle
        try:
            keys = await handle.reclaim(at_most)
        except WorkerDeadError:
            return  # as in `_send`
        if slot.handle is handle and slot.alive:
            slot.account(self._loop.time(), self._dispatcher.sent(slot.worker_id))
            self._dispatcher.give_back(slot.worker_id, keys, begun=False, moved=not self._paused)

    async def _open(
        self, run_id: int, stream: SampleStream, prompts: list[Prompt], n: int, params: dict[str, Any]
    ) -> None:
        """Tokenize, check and queue a run."""
        try:
            tokens = await self._tokenize(prompts)
        except asyncio.CancelledError:
            stream._close(None, RolloutError(_SHUT_DOWN))
            raise
        except Exception as error:
            stream._close(None, error)
            return
        if stream._ended:  # cancelled meanwhile
            return
        if all(slot.given_up for slot in self._slots.values()):
            stream._close(None, PoolFailedError("no worker is left; see the log for why each of them was given up"))
            return
        now = self._loop.time()
        run = _Run(run_id, stream, tokens, params, now, {})
        for worker_id, slot in self._slots.items():
            slot.account(now, self._dispatcher.sent(worker_id) if slot.alive else 0)
            run.base[worker_id] = slot.totals()
            run.busy0[worker_id], run.area0[worker_id] = slot.busy, slot.area
            run.restarts0[worker_id] = slot.restarts
        self._runs[run_id] = run
        sample_tokens = params.get("max_tokens") or _DEFAULT_MAX_TOKENS
        for prompt_index, ids in enumerate(tokens):
            self._dispatcher.add_group(run_id, prompt_index, n, len(ids), sample_tokens)
        self._flush()

    async def _tokenize(self, prompts: list[Prompt]) -> list[list[int]]:
        texts: dict[int, str] = {}
        tokens: dict[int, list[int]] = {}
        for index, prompt in enumerate(prompts):
            if isinstance(prompt, Mapping):
                if unknown := sorted(set(prompt) - {"prompt", "prompt_token_ids"}):
                    raise InvalidRequestError(
                        f"prompts: prompt {index} has {', '.join(unknown)}, which the pool does not pass on; give its "
                        "text as prompt or its tokens as prompt_token_ids"
                    )
                prompt = prompt["prompt_token_ids"] if "prompt_token_ids" in prompt else prompt.get("prompt", "")
            if isinstance(prompt, str):
                texts[index] = prompt
            elif all(isinstance(token, int) and token >= 0 for token in prompt):
                tokens[index] = list(prompt)
            else:
                raise InvalidRequestError(f"prompts: prompt {index} is neither a text nor a list of token ids")
        if texts:
            while True:
                slot = await self._any_alive()
                try:
                    encoded = await slot.handle.encode(list(texts.values()))
                    break
                except WorkerDeadError:
                    await asyncio.sleep(0.05)  # another one, or this one's successor
            tokens.update(zip(texts, encoded, strict=True))
        limit = min((info.max_model_len for info in self.workers), default=None)
        for index in range(len(prompts)):
            length = len(tokens[index])
            if length == 0:
                raise InvalidRequestError(f"prompts: prompt {index} is empty; pass at least one token")
            if limit is not None and length >= limit:
                raise InvalidRequestError(
                    f"prompts: prompt {index} has {length} tokens but the model takes {limit} (max_model_len) with at "
                    "least one for the answer; shorten it or raise max_model_len"
                )
        return [tokens[index] for index in range(len(prompts))]

    async def _any_alive(self) -> _Slot:
        while True:
            if all(slot.given_up for slot in self._slots.values()):
                raise PoolFailedError("no worker is left; see the log for why each of them was given up")
            for slot in self._slots.values():
                if slot.alive:
                    return slot
            await asyncio.sleep(0.05)

    def _cancel(self, run_id: int, stream: SampleStream) -> None:
        """Forget a run; its stream ends after what is finished."""
        run = self._runs.pop(run_id, None)
        if run is None:
            stream._close(None)
            return
        for worker_id, keys in self._dispatcher.cancel(run_id).items():
            self._spawn(self._abort(self._slots[worker_id], keys))
        run.stream._close(self._report(run))
        self._dispatcher.forget(run_id)
        self._flush()

    def _fail(self, run_id: int, error: BaseException) -> None:
        """End a run with an error; what is finished can still be read first."""
        run = self._runs.get(run_id)
        if run is not None:
            run.stream._close(None, error)
            self._cancel(run_id, run.stream)

    async def _abort(self, slot: _Slot, keys: list[SampleKey]) -> None:
        try:
            await slot.handle.abort(keys)
        except WorkerDeadError:
            return  # as in `_send`

    # -- faults ----------------------------------------------------------------------------------------------------
    async def _replace(self, slot: _Slot, error: BaseException) -> None:
        """A worker is lost: give its unfinished samples to the others, build a new one, bring it to the weights."""
        lost = self._retire(slot)
        logger.warning("worker %d is lost, %d samples begin again: %s", slot.worker_id, len(lost), error)
        self._flush()
        while True:
            slot.fruitless += 1
            if slot.fruitless > self._max_restarts:
                await self._give_up(slot, error)
                return
            slot.restarts += 1
            try:
                await slot.handle.kill()
                slot.handle = self._make_handle(slot.worker_id)
                info = await slot.handle.start()
                async with self._update_lock:
                    self._version.check_unchanged()
                    if self._version is not self._base:
                        assert self._version.path is not None
                        await slot.handle.load_weights(self._version.path, self._version.version)
                    self._welcome(slot, info)
            except Exception as another:
                logger.warning("worker %d did not come back: %s", slot.worker_id, another)
                error = another
            else:
                self._flush()
                return

    def _retire(self, slot: _Slot) -> list[SampleKey]:
        """Take a worker's work and counters over. Nothing to do when that was done before."""
        if not slot.alive:
            return []
        slot.alive = False
        slot.account(self._loop.time(), self._dispatcher.sent(slot.worker_id))
        if slot.stats is not None:
            slot.before = [slot.totals()]
            slot.stats = None
        return self._dispatcher.remove_worker(slot.worker_id)

    async def _give_up(self, slot: _Slot, error: BaseException) -> None:
        with contextlib.suppress(Exception):  # what is left of it keeps its memory no longer
            await slot.handle.kill()
        slot.given_up = True
        logger.error("worker %d is given up after %d losses in a row: %s", slot.worker_id, slot.fruitless, error)
        if all(other.given_up for other in self._slots.values()):
            for run_id in list(self._runs):
                self._fail(run_id, PoolFailedError(f"no worker is left; the last one was lost because: {error}"))

    # -- weights ---------------------------------------------------------------------------------------------------
    async def _update(
        self,
        weights: str | os.PathLike[str] | Mapping[str, Any],
        version: int,
        running: Literal["wait", "restart"],
    ) -> None:
        if running not in ("wait", "restart"):
            raise InvalidRequestError(f"running: {running!r} is unknown; pass 'wait' or 'restart'")
        # So that a shutdown ends it: nobody may be waiting for it any more (Ctrl-C in `set_weights`).
        this = asyncio.current_task()
        assert this is not None
        self._tasks.add(this)
        this.add_done_callback(self._tasks.discard)
        async with self._update_lock:
            previous = self._version
            if version == previous.version or version < 0:
                raise WeightUpdateError(
                    f"version: {version} is negative or the present one; number the new weights differently"
                )
            stored = None
            if isinstance(weights, Mapping):
                stored = await asyncio.to_thread(self._store.put, weights, version)
            path = stored if stored is not None else weights
            try:
                assert not isinstance(path, Mapping)
                target = await asyncio.to_thread(_checked, path, version, previous)
                self._paused = True
                await self._drain(running)
                await self._load_everywhere(target, previous)
            except BaseException:
                if stored is not None:
                    self._store.drop(stored)
                raise
            finally:
                self._paused = False
                self._flush()
            if stored is not None:
                self._store.keep(stored)

    async def _drain(self, running: str) -> None:
        """Until no sample is in flight; `_paused` keeps new ones from being sent."""
        await asyncio.sleep(0)  # what was decided before goes out first
        alive = [slot for slot in self._slots.values() if slot.alive]
        await asyncio.gather(*(self._take_back(slot, self._dispatcher.sent(slot.worker_id)) for slot in alive))
        if running == "restart":
            for slot in [slot for slot in alive if slot.alive]:
                keys = self._dispatcher.sent_keys(slot.worker_id)
                await self._abort(slot, keys)
                if slot.alive:
                    slot.account(self._loop.time(), self._dispatcher.sent(slot.worker_id))
                    self._dispatcher.give_back(slot.worker_id, keys, begun=True)
        while self._dispatcher.in_flight():
            self._drained.clear()
            await self._drained.wait()

    async def _load_everywhere(self, target: WeightVersion, previous: WeightVersion) -> None:
        """Two phases: every worker says that it can read the weights, then all load them; else all go back."""
        assert target.path is not None
        path = target.path
        members = [(slot, slot.handle) for slot in self._slots.values() if slot.alive]
        if not members:
            raise WeightUpdateError(f"version {target.version}: no worker is alive to load it; try again later")
        answers = await asyncio.gather(*(handle.prepare_weights(path) for _, handle in members), return_exceptions=True)
        for (slot, _), answer in zip(members, answers, strict=True):
            if isinstance(answer, BaseException):
                raise WeightUpdateError(
                    f"version {target.version}: worker {slot.worker_id} cannot take it ({answer}); "
                    f"no worker was changed, all hold version {previous.version}"
                ) from answer
        answers = await asyncio.gather(
            *(handle.load_weights(path, target.version) for _, handle in members), return_exceptions=True
        )
        failed = [(slot, answer) for (slot, _), answer in zip(members, answers, strict=True) if answer is not None]
        if not failed:
            self._version = target
            for slot, _ in members:
                slot.version = target.version
            return
        await asyncio.gather(*(self._roll_back(slot, handle, previous) for slot, handle in members))
        slot, cause = failed[0]
        raise WeightUpdateError(
            f"version {target.version}: worker {slot.worker_id} failed to load it ({cause}); "
            f"all workers hold version {previous.version} again"
        ) from cause

    async def _roll_back(self, slot: _Slot, handle: WorkerHandle, previous: WeightVersion) -> None:
        """Load the version before, or end the worker: the one that replaces it starts from that version."""
        try:
            if previous.path is None:
                raise WeightUpdateError("version 0 has no folder to be loaded from")
            previous.check_unchanged()
            await handle.load_weights(previous.path, previous.version)
        except Exception as error:
            if slot.handle is handle:
                logger.warning(
                    "worker %d is started again to return to version %d: %s", slot.worker_id, previous.version, error
                )
                # At once, not when `_serve` notices: nothing may be sent to a worker with a mixture of weights.
                self._retire(slot)
                await handle.kill()

    # -- figures ---------------------------------------------------------------------------------------------------
    async def _stats(self) -> list[WorkerStats]:
        for slot in self._slots.values():
            if slot.alive:
                handle = slot.handle
                try:
                    stats = await handle.stats()
                except WorkerDeadError:
                    continue
                if slot.alive and slot.handle is handle:
                    slot.stats = stats
        return [slot.totals() for slot in self._slots.values()]

    def _report(self, run: _Run) -> PoolReport:
        now = self._loop.time()
        makespan = max(now - run.began, 1e-9)
        workers = []
        for worker_id, slot in self._slots.items():
            slot.account(now, self._dispatcher.sent(worker_id) if slot.alive else 0)
            part = _minus(slot.totals(), run.base[worker_id])
            samples, tokens = run.per_worker.get(worker_id, (0, 0))
            busy = slot.busy - run.busy0[worker_id]
            workers.append(
                WorkerReport(
                    worker_id=worker_id,
                    samples=samples,
                    generated_tokens=tokens,
                    busy_s=busy,
                    utilisation=busy / makespan,
                    occupancy=(slot.area - run.area0[worker_id]) / makespan,
                    idle_tail_s=now - run.last.get(worker_id, run.began),
                    draft_length=part.mean_draft_length,
                    acceptance=part.acceptance,
                    acceptance_length=part.acceptance_length,
                    restarts=slot.restarts - run.restarts0[worker_id],
                    weight_version=slot.version,
                )
            )
        tail = max(worker.idle_tail_s for worker in workers)
        return PoolReport(
            samples=run.samples,
            generated_tokens=run.tokens,
            makespan_s=makespan,
            tokens_per_s=run.tokens / makespan,
            tail_s=tail,
            tail_fraction=tail / makespan,
            moved_samples=self._dispatcher.moved.get(run.run, 0),
            regenerated_samples=self._dispatcher.repeated.get(run.run, 0),
            restarts=sum(worker.restarts for worker in workers),
            workers=workers,
        )


def _normalise_params(params: Mapping[str, Any] | Any | None) -> dict[str, Any]:
    """A dict of `SamplingParams` fields, `n` taken out, `logprobs` filled in."""
    if params is None:
        fields: dict[str, Any] = {}
    elif isinstance(params, Mapping):
        fields = dict(params)
    else:
        try:
            defaults = type(params)()
            names = [name for name in params.__struct_fields__ if not name.startswith("_")]
        except (AttributeError, TypeError) as error:
            raise InvalidRequestError(
                f"sampling_params: {type(params).__name__} is neither a dict nor vLLM's SamplingParams"
            ) from error
        fields = {name: getattr(params, name) for name in names if getattr(params, name) != getattr(defaults, name)}
    if fields.pop("n", 1) != 1:
        raise InvalidRequestError("sampling_params: n belongs to generate(prompts, n, ...), not to sampling_params")
    fields.setdefault("logprobs", 0)
    try:
        GenerateRequest(run=0, prompt_index=0, prompt_token_ids=[0], samples=[(0, 1)], sampling_params=fields)
    except ValidationError as error:
        raise InvalidRequestError(f"sampling_params: {explain(error)}") from error
    return fields


def _checked(path: str | os.PathLike[str], version: int, previous: WeightVersion) -> WeightVersion:
    """Refuse weights that the workers could not use, before any worker is touched."""
    index = read_index(path)
    if previous.path is not None:
        check_layout(index, read_index(previous.path))
    check_finite(index)
    return WeightVersion.from_path(version, path)


_COUNTERS = (
    "finished_samples",
    "prompt_tokens",
    "generated_tokens",
    "drafts",
    "draft_tokens",
    "accepted_tokens",
    "weight_updates",
    "weight_update_seconds",
    "engine_seconds",
)


def _sum_stats(worker_id: int, parts: Sequence[WorkerStats]) -> WorkerStats:
    """Counters added; gauges (running, waiting, version) of the last part."""
    fields: dict[str, Any] = {name: sum(getattr(part, name) for part in parts) for name in _COUNTERS}
    for name in ("accepted_per_position", "drafted_per_position"):
        columns = itertools.zip_longest(*(getattr(part, name) for part in parts), fillvalue=0)
        fields[name] = [sum(column) for column in columns]
    if parts:
        fields.update({name: getattr(parts[-1], name) for name in ("weight_version", "running", "waiting")})
        fields["running_tokens"] = parts[-1].running_tokens
    return WorkerStats.model_construct(worker_id=worker_id, **fields)


def _minus(now: WorkerStats, before: WorkerStats) -> WorkerStats:
    fields = {name: getattr(now, name) - getattr(before, name) for name in _COUNTERS}
    return WorkerStats.model_construct(worker_id=now.worker_id, **fields)
