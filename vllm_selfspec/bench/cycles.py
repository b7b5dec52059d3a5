"""Where the time of one decoding step goes, and how fast the memory would allow each part to be.

Runs beside an engine whose scheduler and model live in this very process, so that one clock sees every part. Timers are
put around the methods in `TIMERS` or `TIMERS_V2` for one generation and taken off again. On a GPU the device is waited
for before and after every part: the parts are true, their sum is more than a step takes without timers.

A *cycle* lasts from one call of the scheduler to the next. Only cycles in which the whole batch decodes are counted.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

REST = "rest"
_WARM_UP_TOKENS = 8
_BANDWIDTH_BYTES = 512 * 2**20
_BANDWIDTH_REPETITIONS = 5


@dataclass(frozen=True)
class Timer:
    """One method whose time counts towards a part of the cycle.

    Attributes:
        part: the part's name in results.
        owner: where the method is found: a path below `engine`, `core` or `runner`, or `module:` and a module's name.
        name: of the method or function.
        drafts: exists only where selfspec drafts.
    """

    part: str
    owner: str
    name: str
    drafts: bool = False


# Every place in vLLM and in this package that the profile looks at. No timed method calls another one.
_SCHEDULER = (
    Timer("scheduler", "core.scheduler", "schedule"),
    Timer("scheduler", "core.scheduler", "update_from_output"),
    Timer("scheduler", "core.scheduler", "update_draft_token_ids"),
)
_OUTPUT = Timer("output", "engine.output_processor", "process_outputs")
TIMERS = (
    *_SCHEDULER,
    Timer("draft forward", "runner.drafter.model", "forward", drafts=True),
    Timer("draft head", "runner.drafter.model", "compute_logits", drafts=True),
    Timer("draft sampling", "module:vllm_selfspec.drafter.proposer", "sample_drafts", drafts=True),
    Timer("verify forward", "runner", "_model_forward"),
    Timer("verify head", "runner.model", "compute_logits"),
    Timer("rejection sampling", "runner", "_sample"),
    _OUTPUT,
)
TIMERS_V2 = (
    *_SCHEDULER,
    Timer("drafts", "runner.speculator", "propose", drafts=True),
    Timer("verify forward", "runner", "execute_model"),
    Timer("verify head and sampling", "runner", "sample"),
    _OUTPUT,
)
"""On model runner V2, where one graph holds a whole draft step: forward pass, head and sampling."""


@dataclass
class Cycle:
    """One cycle.

    Attributes:
        start: of the clock, seconds.
        counts: whether the whole batch decoded in it, and nothing else.
        seconds: of each part.
        calls: of each part.
    """

    start: float
    counts: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)


class CycleClock:
    """Collects cycles of a batch of `batch` requests.

    Args:
        batch: requests that a cycle must decode to be counted.
        synchronize: waits for the device.
        clock: seconds.
        table: what `timers` times.
    """

    def __init__(
        self,
        batch: int,
        synchronize: Callable[[], object] = lambda: None,
        clock: Callable[[], float] = time.perf_counter,
        table: tuple[Timer, ...] = TIMERS,
    ) -> None:
        self.table = table
        self.views: set[bool | None] = set()
        """Which views of the drafter drafted: light or not, None where it has one."""
        self._batch, self._synchronize, self._clock = batch, synchronize, clock
        self._cycle: Cycle | None = None
        self._closed: list[tuple[Cycle, float]] = []

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, its time added to `part` of the cycle under way."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self._synchronize()
            start = self._clock()
            result = function(*args, **kwargs)
            self._synchronize()
            if self._cycle is not None:
                self._cycle.seconds[part] = self._cycle.seconds.get(part, 0.0) + self._clock() - start
                self._cycle.calls[part] = self._cycle.calls.get(part, 0) + 1
            return result

        return call

    def schedule(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The scheduler's `schedule`: every call ends a cycle and begins the next."""

        def call(*args: Any, **kwargs: Any) -> Any:
            now = self._clock()
            if self._cycle is not None:
                self._closed.append((self._cycle, now - self._cycle.start))
            self._cycle = cycle = Cycle(now)
            output = function(*args, **kwargs)
            if getattr(output, "num_spec_tokens_to_schedule", 0):
                self.views.add(getattr(output, "selfspec_light", None))
            cycle.counts = not output.scheduled_new_reqs and len(output.num_scheduled_tokens) == self._batch
            return output

        return call

    def split(self) -> dict[str, Any]:
        """The mean cycle: its seconds, the number of cycles, and per part the mean seconds and calls; parts add up."""
        counted = [(cycle, seconds) for cycle, seconds in self._closed if cycle.counts]
        if not counted:
            raise ValueError(
                f"the time split saw no step in which all {self._batch} requests decoded; use a larger --max-tokens"
            )
        cycles = len(counted)
        total = sum(seconds for _, seconds in counted) / cycles
        parts: list[dict[str, Any]] = []
        for name in dict.fromkeys(timer.part for timer in self.table):
            if any(name in cycle.seconds for cycle, _ in counted):
                parts.append(
                    {
                        "name": name,
                        "seconds": sum(cycle.seconds.get(name, 0.0) for cycle, _ in counted) / cycles,
                        "calls": sum(cycle.calls.get(name, 0) for cycle, _ in counted) / cycles,
                    }
                )
        rest = total - sum(part["seconds"] for part in parts)
        parts.append({"name": REST, "seconds": rest, "calls": 1.0})
        return {"seconds": total, "cycles": cycles, "parts": parts}


@contextmanager
def timers(clock: CycleClock, roots: dict[str, Any], drafts: bool) -> Iterator[None]:
    """Put the clock's timers in place, and take them off at the end.

    Args:
        roots: the objects that `Timer.owner` begins with, by name.
        drafts: whether selfspec drafts in this engine.

    Raises:
        ValueError: when a method is not where it is looked for.
    """
    undo: list[Callable[[], None]] = []
    try:
        for timer in clock.table:
            if timer.drafts and not drafts:
                continue
            owner = _owner(timer, roots)
            original = getattr(owner, timer.name)
            wrapped = clock.timed(timer.part, original)
            undo.append(_replace(owner, timer.name, clock.schedule(wrapped) if timer.name == "schedule" else wrapped))
        yield
    finally:
        for restore in reversed(undo):
            restore()


def _owner(timer: Timer, roots: dict[str, Any]) -> Any:
    kind, _, module = timer.owner.partition(":")
    owner: Any
    if kind == "module":
        owner = importlib.import_module(module)
    else:
        root, *path = timer.owner.split(".")
        owner = roots[root]
        for name in path:
            owner = getattr(owner, name, None)
    if not callable(getattr(owner, timer.name, None)):
        raise ValueError(
            f"the time split looks for {timer.owner}.{timer.name}, which this version does not have; use --no-profile"
        )
    return owner


def _replace(owner: Any, name: str, value: Any) -> Callable[[], None]:
    """Set an attribute of an object, and return what undoes it."""
    if name in vars(owner):
        original = vars(owner)[name]
        setattr(owner, name, value)
        return lambda: setattr(owner, name, original)
    setattr(owner, name, value)
    return lambda: delattr(owner, name)


# --- called in the engine's process -----------------------------------------------------------------------------------


def profile(llm: Any, requests: list[dict[str, Any]], sampling: dict[str, Any]) -> dict[str, Any]:
    """Generate with timers in place.

    Args:
        llm: a `vllm.LLM` with everything in this process.
        requests: as of `EngineProcess.generate`.
        sampling: keyword arguments of `vllm.SamplingParams`.

    Returns:
        `CycleClock.split`, with `bytes_per_call` of the weights that a part reads (None where it reads none, a part of
        them only, or now those of one view and now those of the other).
    """
    import torch
    from vllm.platforms import current_platform

    parts = _engine_parts(llm)
    drafts = hasattr(llm.llm_engine.vllm_config.speculative_config, "selfspec")
    synchronize = (lambda: None) if current_platform.is_cpu() else torch.accelerator.synchronize
    _generate(llm, requests, sampling | {"max_tokens": _WARM_UP_TOKENS})
    clock = CycleClock(len(requests), synchronize, table=TIMERS_V2 if _is_v2(parts.runner) else TIMERS)
    with timers(clock, vars(parts), drafts):
        _generate(llm, requests, sampling)
    split = clock.split()
    sizes = _weight_bytes(parts.runner, drafts and len(clock.views) == 1)
    for part in split["parts"]:
        part["bytes_per_call"] = sizes.get(part["name"])
    return split


def memory_bandwidth(llm: Any) -> float:
    """Bytes per second that the engine's device moves at best: the fastest of a few sums, dots and copies."""
    import torch

    device = _engine_parts(llm).runner.device
    source = torch.ones(_BANDWIDTH_BYTES // 4, dtype=torch.float32, device=device)
    target = torch.zeros_like(source)
    best = 0.0
    kinds: tuple[tuple[Callable[[], object], int], ...] = (
        (source.sum, 1),
        (lambda: torch.dot(source, target), 2),
        (lambda: target.copy_(source), 2),
    )
    for function, passes in kinds:
        for _ in range(_BANDWIDTH_REPETITIONS):
            _wait(device)
            start = time.perf_counter()
            function()
            _wait(device)
            best = max(best, passes * source.nbytes / (time.perf_counter() - start))
    return best


def _wait(device: Any) -> None:
    import torch

    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _engine_parts(llm: Any) -> SimpleNamespace:
    core = getattr(llm.llm_engine.engine_core, "engine_core", None)
    if core is None:
        raise ValueError("the time split needs an engine with everything in one process; use --no-profile")
    worker = getattr(core.model_executor, "driver_worker", None)  # UniProcExecutor's
    if worker is None:
        raise ValueError("the time split needs the model in the scheduler's process; use --no-profile")
    return SimpleNamespace(engine=llm.llm_engine, core=core, runner=worker.worker.model_runner)


def _generate(llm: Any, requests: list[dict[str, Any]], sampling: dict[str, Any]) -> None:
    from vllm import SamplingParams

    from vllm_selfspec.engine_process import prompt_token_ids

    llm.reset_prefix_cache()
    params = SamplingParams(**sampling)
    for request in requests:
        llm.llm_engine.add_request(request["id"], {"prompt_token_ids": prompt_token_ids(llm, request)}, params)
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()


def _is_v2(runner: Any) -> bool:
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    return isinstance(runner, GPUModelRunner)


def _weight_bytes(runner: Any, one_view_drafts: bool) -> dict[str, int | None]:
    from vllm_selfspec.drafter.refresh import language_model
    from vllm_selfspec.drafter.view import lm_head_path

    top = language_model(runner.get_model())
    sizes = {
        "verify forward": stack_bytes(top.model.layers),
        "verify head": linear_bytes(top.get_submodule(lm_head_path(top))),
    }
    if one_view_drafts and not _is_v2(runner):  # a layer with two views says what the last draft has read
        draft_model = runner.drafter.model
        sizes["draft forward"] = stack_bytes(draft_model.backbone.decoder.layers)
        sizes["draft head"] = linear_bytes(draft_model._head[0].get_submodule(lm_head_path(top)))
    return sizes


def stack_bytes(layers: Any) -> int | None:
    """Bytes of the weights of decoder layers; None for mixtures of experts, of which a step reads a part."""
    modules = [module for layer in layers for module in layer.modules()]
    if any(parameter.ndim == 3 for module in modules for parameter in module.parameters(recurse=False)):
        return None
    return sum(linear_bytes(module) for module in modules)


def linear_bytes(module: Any) -> int:
    """Bytes of one module's own weights that a product reads, packed or quantized ones included."""
    state = getattr(getattr(module, "quant_method", None), "state", None)
    if state is not None:  # selfspec's: stands where vLLM's quantization method would
        return int(state.nbytes_read)
    parameters = list(module.parameters(recurse=False))
    size = sum(parameter.nbytes for parameter in parameters)
    # vLLM's CPU kernels keep a packed copy and leave an empty parameter behind.
    if any(parameter.numel() == 0 for parameter in parameters):
        size += module.input_size_per_partition * module.output_size_per_partition * module.params_dtype.itemsize
    return size
