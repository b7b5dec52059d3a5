"""Ray: one actor per worker, with its GPUs or its cores, and the translation of Ray's errors into this package's."""

import asyncio
import contextlib
import itertools
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from vllm_selfspec.engine_env import intel_openmp_library
from vllm_selfspec.rollout.types import (
    CollectReply,
    GenerateRequest,
    InvalidRequestError,
    PoolFailedError,
    RolloutError,
    SampleKey,
    WorkerDeadError,
    WorkerInfo,
    WorkerStats,
)
from vllm_selfspec.rollout.worker import RolloutWorker

_ANSWER_S = 60.0  # a control call takes milliseconds; a worker that is silent for this long is as good as dead
_PLACEMENT_S = 120.0
_FORWARDED = ("VLLM_", "HF_", "PYTHONPATH")

_OWN_RAY_SETTINGS: dict[str, Any] = {
    # Ray would make its workers nicer than everything else on the machine, the driver included.
    "worker_niceness": 0,
    # An actor has a process of its own. A spare one for each core would wake up a hundred times per second.
    "enable_worker_prestart": False,
    "prestart_worker_first_driver": False,
    # Nobody reads these: there is no dashboard.
    "enable_metrics_collection": False,
    "task_events_report_interval_ms": 0,
    # A pool asks Ray for its places once, and keeps nothing in the object store.
    "raylet_report_resources_period_milliseconds": 1000,
    "raylet_check_gc_period_milliseconds": 1000,
}
"""Of a Ray that the pool starts itself. In an idle Ray of two cores they halve what its processes use."""


class _OwnRay:
    """A Ray that a pool started because there was none. All pools of the process use it, and the last one ends it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0

    def join(self) -> bool:
        """Make sure that there is a Ray. True: it is our own, and `leave` is to be called."""
        with self._lock:
            if not ray.is_initialized():
                # The dashboard and its agents would take cores from the engines.
                ray.init(include_dashboard=False, log_to_driver=False, _system_config=_OWN_RAY_SETTINGS)
            elif not self._users:
                return False
            self._users += 1
            return True

    def leave(self) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                ray.shutdown()


_own_ray = _OwnRay()


class RayCluster:
    """Where a pool's actors run.

    GPU workers get a placement group of one bundle each (all GPUs of a worker on one node), reserved together or not at
    all. CPU workers get the machine's cores in equal, disjoint shares.
    """

    def __init__(
        self,
        model: str,
        num_workers: int,
        engine_args: dict[str, Any],
        gpus_per_worker: int | None,
        env: dict[str, str],
    ) -> None:
        if gpus_per_worker is not None and gpus_per_worker < 0:
            raise InvalidRequestError(f"gpus_per_worker: {gpus_per_worker} is negative; pass 0 for CPU workers")
        self._num_workers = num_workers
        self._engine_args = {"model": model, **engine_args}
        self._gpus = gpus_per_worker
        self._env = env
        self._made = itertools.count()
        self._group: PlacementGroup | None = None
        self._on_own_ray = False

    async def start(self) -> None:
        """Connect to Ray (a local one if there is none) and reserve what the workers need."""
        self._on_own_ray = await asyncio.to_thread(_own_ray.join)
        if self._gpus is None:
            self._gpus = 1 if ray.cluster_resources().get("GPU", 0) >= self._num_workers else 0
        if self._gpus == 0:
            cores = sorted(os.sched_getaffinity(0))
            if len(cores) < self._num_workers:
                raise InvalidRequestError(
                    f"num_workers: {self._num_workers} CPU workers on {len(cores)} cores; take at most one per core"
                )
            return
        self._group = placement_group([{"GPU": self._gpus, "CPU": 1}] * self._num_workers, strategy="PACK")
        try:
            await asyncio.wait_for(_answer(self._group.ready()), _PLACEMENT_S)
        except TimeoutError:
            remove_placement_group(self._group)
            raise PoolFailedError(
                f"gpus_per_worker: {self._num_workers} workers with {self._gpus} GPUs each got no place within "
                f"{_PLACEMENT_S:.0f} s; free GPUs or take fewer workers (a worker's GPUs must be on one node)"
            ) from None

    def make_handle(self, worker_id: int) -> "RayHandle":
        """A new actor for place `worker_id`."""
        arguments = dict(self._engine_args)
        # Engines with one seed draw the same noise: the same prompt on two workers would give the same sample twice.
        arguments["seed"] = (arguments.get("seed") or 0) + next(self._made)
        options: dict[str, Any] = {"max_restarts": 0, "max_task_retries": 0}
        env = {name: value for name, value in os.environ.items() if name.startswith(_FORWARDED)}
        if self._gpus:
            assert self._group is not None
            options["num_gpus"] = self._gpus
            options["num_cpus"] = 1
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(self._group, worker_id)
            arguments.setdefault("tensor_parallel_size", self._gpus)
            if self._gpus > 1:
                arguments.setdefault("distributed_executor_backend", "mp")  # the actor's own GPUs, no further actors
        else:
            cores = core_shares(sorted(os.sched_getaffinity(0)), self._num_workers)[worker_id]
            options["num_cpus"] = 0  # the pinning below is what counts; Ray's cores may be claimed by others already
            env["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
            env["LD_PRELOAD"] = preloads(os.environ.get("LD_PRELOAD", ""), intel_openmp_library())
            arguments.setdefault("distributed_executor_backend", "mp")  # vLLM's Ray executor refuses the CPU
        options["runtime_env"] = {"env_vars": {**env, **self._env}}
        actor = ray.remote(RolloutWorker).options(**options)
        return RayHandle(worker_id, lambda: actor.remote(worker_id, arguments, own_processes=True))

    def close(self) -> None:
        """Give the reservation back; end Ray if it was started here and no other pool uses it."""
        try:
            if self._group is not None:
                remove_placement_group(self._group)
        finally:
            if self._on_own_ray:
                self._on_own_ray = False
                _own_ray.leave()


def core_shares(cores: list[int], num_workers: int) -> list[list[int]]:
    """Equal, disjoint, contiguous shares; cores that do not divide evenly stay idle so that all workers are alike."""
    each = len(cores) // num_workers
    return [cores[i * each : (i + 1) * each] for i in range(num_workers)]


def preloads(present: str, openmp: Path | None) -> str:
    """LD_PRELOAD of a CPU worker: `present` with Intel's OpenMP runtime, which vLLM wants on x86 and installs.

    A bare engine that ran in this process has left PyTorch's OpenMP in `present`; with both, vLLM refuses to start. An
    OpenMP library that the user chose stays.
    """
    if openmp is None:
        return present
    kept = [path for path in present.split(":") if path and not re.search(r"/torch(/lib|\.libs)/libgomp[^/]*$", path)]
    if not any(name in path for path in kept for name in ("libiomp", "libomp", "libgomp")):
        kept.insert(0, str(openmp))
    return ":".join(kept)


class RayHandle:
    """A worker in an actor. Methods as of `Worker`; a lost actor becomes `WorkerDeadError`."""

    def __init__(self, worker_id: int, make_actor: Callable[[], Any]) -> None:
        self.worker_id = worker_id
        self._make_actor = make_actor
        self.actor: Any = None

    async def start(self) -> WorkerInfo:
        self.actor = self._make_actor()
        return await self._call("start", timeout=None)

    async def encode(self, prompts: list[str]) -> list[list[int]]:
        return await self._call("encode", prompts, timeout=None)

    async def submit(self, requests: list[GenerateRequest]) -> None:
        await self._call("submit", requests)

    async def collect(self, max_wait_s: float) -> CollectReply:
        return await self._call("collect", max_wait_s, timeout=_ANSWER_S + max_wait_s)

    async def reclaim(self, count: int) -> list[SampleKey]:
        return await self._call("reclaim", count)

    async def abort(self, keys: list[SampleKey]) -> None:
        await self._call("abort", keys)

    async def prepare_weights(self, path: str) -> None:
        await self._call("prepare_weights", path)

    async def load_weights(self, path: str, version: int) -> None:
        await self._call("load_weights", path, version, timeout=None)

    async def stats(self) -> WorkerStats:
        return await self._call("stats")

    async def health(self) -> None:
        await self._call("health")

    async def kill(self) -> None:
        if self.actor is not None:
            ray.kill(self.actor)

    async def close(self) -> None:
        with contextlib.suppress(RolloutError):  # it is gone already, or will be in the next line
            await self._call("close")
        await self.kill()

    async def _call(self, method: str, *args: Any, timeout: float | None = _ANSWER_S) -> Any:
        if self.actor is None:
            raise WorkerDeadError(f"worker {self.worker_id} was not started")
        try:
            return await asyncio.wait_for(_answer(getattr(self.actor, method).remote(*args)), timeout)
        except RayTaskError as error:
            if isinstance(error.cause, RolloutError):
                raise error.cause from None
            raise
        except RayActorError as error:
            raise WorkerDeadError(f"worker {self.worker_id}: its process ended ({_first_line(error)})") from error
        except TimeoutError:
            raise WorkerDeadError(f"worker {self.worker_id} did not answer {method!r} within {timeout:.0f} s") from None
        except RayError as error:
            raise WorkerDeadError(f"worker {self.worker_id}: Ray lost it ({_first_line(error)})") from error


async def _answer(reference: Any) -> Any:
    return await reference


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
