"""vLLM engines inside the test's own process, requests that come and go while they run, and what they did."""

from __future__ import annotations

import atexit
import gc
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL.Image import Image
from vllm import LLM, RequestOutput, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind

from vllm_selfspec.control.policy import Controller, Decision
from vllm_selfspec.drafter.quantize import QuantizedLinear, usable_precisions
from vllm_selfspec.drafter.quantize_cuda import CudaLinear
from vllm_selfspec.drafter.quantize_cuda import _tensors as tensors_of
from vllm_selfspec.provenance import cpu_fact
from vllm_selfspec.scheduler import SelfSpecScheduling

AVX512_HALF = {"avx512f", "avx512bw", "avx512vl"}
"""What `cpu_half.cpp` needs, as Linux calls it."""
HALF_PRODUCTS = ["rows_linear", *(["avx512_rows_linear"] if set(cpu_fact("flags").split()) >= AVX512_HALF else [])]
"""The operators for a model's own bfloat16 and float16 layers that this CPU can run."""
BLOCK = 32
"""Tokens per KV block: the least that vLLM's CPU attention takes."""


_engines = 0
atexit.register(gc.unfreeze)  # extensions count at the end what is left of them
_freeze, gc.freeze, gc.unfreeze = gc.freeze, lambda: None, lambda: None


@contextmanager
def engine(model: str, selfspec: dict[str, Any] | None = None, **arguments: Any) -> Iterator[LLM]:
    """An in-process float32 engine for `model`, torn down at the end.

    Args:
        model: path of a tiny checkpoint.
        selfspec: the `speculative_config` without its method, None for plain decoding.
        **arguments: of `LLM`, over the defaults here.
    """
    defaults: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "max_model_len": 256,
        "block_size": BLOCK,
        "num_gpu_blocks_override": 256,
        "max_num_seqs": 16,
        "enable_prefix_caching": False,
        "disable_log_stats": False,
        "seed": 0,
    }
    if selfspec is not None:
        defaults["speculative_config"] = {"method": "selfspec", **selfspec}
    with little_garbage():
        llm = LLM(model, **(defaults | arguments))
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
            cleanup_dist_env_and_memory()
            gc.collect()


@contextmanager
def little_garbage() -> Iterator[None]:
    """Set aside what lives before an engine, so that it is not searched for garbage: vLLM does so a dozen times.

    vLLM sets aside things itself, those of an engine that will be gone, too: not here.
    """
    global _engines
    if not _engines:
        gc.collect()
        _freeze()
    _engines += 1
    try:
        yield
    finally:
        _engines -= 1


def skip_without_kernels(drafter: dict[str, Any]) -> None:
    """Skip a test whose drafter has a precision for which this platform has no kernels."""
    usable = usable_precisions(current_platform.device_type)
    for name in ("weights", "lm_head"):
        if drafter[name] not in usable:
            pytest.skip(f"no kernels for drafter.{name} {drafter[name]} on this platform")


def free_port() -> int:
    """A port of this host that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def server(model: str, log: Path, *flags: str) -> Iterator[str]:
    """vLLM's OpenAI-compatible server of a tiny checkpoint in a process of its own; yields its address."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    usual = f"--port {port} --skip-tokenizer-init --enforce-eager --dtype float32 --max-model-len 128 --block-size 32"
    usual += " --kv-cache-memory-bytes 67108864 --served-model-name tiny"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, *usual.split(), *flags]
    # Some routes, those of a weight update among them, belong to vLLM's development mode.
    env = {**os.environ, "VLLM_SERVER_DEV_MODE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT)
    try:
        while True:
            assert process.poll() is None, log.read_text()[-4000:]
            with suppress(httpx.TransportError):
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait()


def scheduler_of(llm: LLM) -> Any:
    """The engine's scheduler."""
    return llm.llm_engine.engine_core.engine_core.scheduler


def runner_of(llm: LLM) -> Any:
    """The engine's model runner."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def drafter_of(llm: LLM) -> Any:
    """The engine's drafter, by whichever name its model runner knows it."""
    return drafter_in(runner_of(llm))


def drafter_in(runner: Any) -> Any:
    """The drafter of a model runner, V1's or V2's."""
    return getattr(runner, "drafter", None) or runner.speculator


def drafts_wanted(drafter: Any, arguments: Mapping[str, Any]) -> int:
    """γ of a call of the drafter's `propose` with these arguments."""
    gamma: int = arguments.get("num_speculative_tokens")
    return drafter.scheduled_drafts if gamma is None else gamma  # before vLLM 0.32 runner V2 says it beforehand


@dataclass
class Watch:
    """What an engine did since it was watched.

    Attributes:
        drafted, accepted: draft tokens verified and accepted.
        lengths: the draft length of every step.
        preemptions: requests thrown out of the KV cache.
    """

    drafted: int = 0
    accepted: int = 0
    lengths: list[int] = field(default_factory=list)
    preemptions: int = 0

    @property
    def acceptance(self) -> float:
        """Fraction of the drafts accepted."""
        return self.accepted / self.drafted


def watch(llm: LLM, draft_length: Callable[[], int] | None = None, light: Callable[[], bool] | None = None) -> Watch:
    """Count what the engine does from now on.

    Args:
        llm: an in-process engine.
        draft_length: if given, called in every step for the number of tokens to draft.
        light: if given, called in every step for the view that drafts, where the drafter has two.
    """
    seen = Watch()
    scheduler = scheduler_of(llm)
    # Only the class's own methods: watching twice replaces the first watch.
    kind = type(scheduler)

    def make_spec_decoding_stats(stats: Any, num_draft_tokens: int, num_accepted_tokens: int, **rest: Any) -> Any:
        seen.drafted += num_draft_tokens
        seen.accepted += num_accepted_tokens
        return kind.make_spec_decoding_stats(scheduler, stats, num_draft_tokens, num_accepted_tokens, **rest)

    def preempt(*args: Any, **kwargs: Any) -> None:
        seen.preemptions += 1
        kind._preempt_request(scheduler, *args, **kwargs)

    def decide(state: Any) -> Decision:
        decision = Controller.decide(controller, state)
        if draft_length is not None:
            decision = replace(decision, num_draft_tokens=draft_length(), times=(), tokens=())
        if light is not None:
            decision = replace(decision, light=light())
        seen.lengths.append(decision.num_draft_tokens)
        return decision

    scheduler.make_spec_decoding_stats = make_spec_decoding_stats
    scheduler._preempt_request = preempt
    if isinstance(scheduler, SelfSpecScheduling):
        controller = scheduler._controller
        controller.decide = decide
    return seen


def random_lengths(seed: int, longest: int = 8) -> Callable[[], int]:
    """Draft lengths 0..longest in random order, always the same for the same seed."""
    generator = random.Random(seed)
    return lambda: generator.randint(0, longest)


def random_views(seed: int) -> Callable[[], bool]:
    """The light view or not, at random, always the same for the same seed."""
    generator = random.Random(seed)
    return lambda: generator.random() < 0.5


@dataclass(frozen=True)
class Job:
    """One request of a workload.

    Attributes:
        prompt: token ids.
        params: sampling parameters.
        arrival: engine step before which it is added.
        abort: engine step before which it is aborted, if it is still running.
        images: each for one image token of the prompt.
    """

    prompt: Sequence[int]
    params: SamplingParams
    arrival: int = 0
    abort: int | None = None
    images: Sequence[Image] = ()


def greedy(max_tokens: int, **params: Any) -> SamplingParams:
    """Greedy sampling of `max_tokens` tokens."""
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, **params)


def drive(llm: LLM, jobs: Sequence[Job]) -> list[RequestOutput | None]:
    """Run the jobs, each added and aborted at its own step; None for those aborted before they finished."""
    engine = llm.llm_engine
    finished: dict[int, RequestOutput] = {}
    aborted: set[int] = set()
    step = added = 0
    while added < len(jobs) or engine.has_unfinished_requests():
        for number, job in enumerate(jobs):
            if job.arrival == step:
                params = job.params.clone()
                params.output_kind = RequestOutputKind.FINAL_ONLY
                prompt: dict[str, Any] = {"prompt_token_ids": list(job.prompt)}
                if job.images:
                    prompt["multi_modal_data"] = {"image": list(job.images)}
                engine.add_request(str(number), prompt, params)
                added += 1
            if job.abort == step and number not in finished:
                engine.abort_request([str(number)])
                aborted.add(number)
        for output in engine.step():
            if output.finished and int(output.request_id) not in aborted:
                finished[int(output.request_id)] = output
        step += 1
        assert step < 5000, "the engine does not finish"
    return [finished.get(number) for number in range(len(jobs))]


def texts(outputs: Sequence[RequestOutput | None]) -> list[list[tuple[tuple[int, ...], Any, Any]] | None]:
    """For each request, None or the (token ids, finish reason, stop reason) of its samples."""
    return [
        output and [(tuple(sample.token_ids), sample.finish_reason, sample.stop_reason) for sample in output.outputs]
        for output in outputs
    ]


def random_prompt(length: int, seed: int, vocabulary: int = 256) -> list[int]:
    """A prompt of random tokens."""
    generator = random.Random(seed)
    return [generator.randrange(vocabulary) for _ in range(length)]


def generate(llm: LLM, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[list[tuple[int, ...]]]:
    """The token ids of every prompt's samples, all prompts added at once."""
    outputs = llm.generate([{"prompt_token_ids": list(p)} for p in prompts], params, use_tqdm=False)
    return [[tuple(sample.token_ids) for sample in output.outputs] for output in outputs]


def addresses(state: QuantizedLinear) -> list[int]:
    """Where the buffers of a drafter's int8 weight lie."""
    if isinstance(state, CudaLinear):
        return [tensor.data_ptr() for tensor in tensors_of(state._layer).values()]
    tensors = getattr(state, "tensors", None) or (state._handler.handler_tensor,)
    return [tensor.data_ptr() for tensor in tensors]
