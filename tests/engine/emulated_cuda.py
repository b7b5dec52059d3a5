"""vLLM's CUDA platform on a CPU: vLLM takes itself to be on one Hopper GPU, and every tensor is on the CPU.

What runs is what runs on a GPU: CUDA's defaults and checks, its worker, both of its model runners with asynchronous
scheduling, the metadata of FlashAttention 3, and the Triton kernels of sampler and rejection sampler (interpreted, see
`interpreted_triton.py`). What does not: compiled CUDA kernels, for which PyTorch's operations stand, and streams, on
which everything happens at once. How long it would have taken is told by `CLOCK`, for tests that give work a duration.
"""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

MEMORY = 4 << 30
STUBS = torch.library.Library("_C", "FRAGMENT")
"""Operators that stand for those of compiled extensions; they go when nobody holds it."""


def wanted() -> bool:
    """Whether the tests run on CUDA played by the CPU."""
    return os.environ.get("SELFSPEC_EMULATED_CUDA") == "1"


class Clock:
    """The times at which the host and the device would be if the device worked by itself, in seconds.

    Nothing takes any time but what a test says, and the host waits where it waits for events or for the device.
    """

    def __init__(self) -> None:
        self.host = self.device = 0.0

    def launch(self, seconds: float) -> None:
        """Put work of this duration behind what the device has to do."""
        self.device = max(self.device, self.host) + seconds

    def work(self, seconds: float) -> None:
        """Let the host work for so long."""
        self.host += seconds

    def wait(self, until: float | None = None) -> None:
        """The host waits until then, or until the device has nothing left to do."""
        self.host = max(self.host, self.device if until is None else until)


CLOCK = Clock()


class Stream:
    """Stands in for `torch.cuda.Stream`: what is put on it has run when the call returns."""

    cuda_stream = 0
    device = torch.device("cpu")

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, stream: Stream) -> None:
        pass

    def wait_event(self, event: Event) -> None:
        pass

    def synchronize(self) -> None:
        CLOCK.wait()


class Event:
    """Stands in for `torch.cuda.Event`."""

    recorded = 0.0

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, stream: Stream | None = None) -> None:
        self.recorded = CLOCK.device

    def wait(self, stream: Stream | None = None) -> None:
        pass

    def synchronize(self) -> None:
        CLOCK.wait(self.recorded)


class SharedBuffer:
    """Memory that host and device see, which here are the same."""

    def __init__(self, size: Any, dtype: torch.dtype) -> None:
        self.cpu = self.uva = torch.zeros(size, dtype=dtype)
        self.np = self.cpu.numpy()


def install() -> None:
    """Call before vLLM is imported, and after `interpreted_triton.install()`."""
    os.environ["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
    _play_torch()
    _stand_in_for_extensions()
    _choose_platform()
    _attend()
    _mix()
    _quantize()
    _start_workers_on_the_cpu()


def _play_torch() -> None:
    """The parts of `torch.cuda` and `torch.accelerator` that vLLM asks on one GPU."""

    def nothing() -> Any:
        return lambda *_, **__: None  # one function each: Dynamo keeps a table of them

    stream = Stream()
    properties = SimpleNamespace(
        name="emulated", major=9, minor=0, multi_processor_count=132, total_memory=MEMORY, is_integrated=0
    )
    properties.gcnArchName = ""  # part of the key of Inductor's cache
    answers = {
        torch: {"Event": Event},
        torch.cuda: {
            "Stream": Stream,
            "Event": Event,
            "current_stream": lambda device=None: stream,
            "stream": lambda stream: nullcontext(stream),
            "current_device": lambda: 0,
            "device_count": lambda: 1,
            "get_device_capability": lambda device=None: (9, 0),
            "get_device_name": lambda device=None: "emulated",
            "get_device_properties": lambda device=None: properties,
            "is_current_stream_capturing": lambda: False,
            "_exchange_device": lambda device: 0,
            "_maybe_exchange_device": lambda device: 0,
            "max_memory_allocated": lambda device=None: 0,
            "mem_get_info": lambda device=None: (MEMORY, MEMORY),
        },
        torch.Tensor: {"record_stream": lambda self, stream: None},
        torch.cuda.memory: {"get_allocator_backend": lambda: "emulated"},
        torch.accelerator: {
            "current_device_index": lambda: 0,
            "device_count": lambda: 1,
            "get_memory_info": lambda device=None: (MEMORY, MEMORY),
            "memory_stats": lambda device=None: {},
            "memory_reserved": lambda device=None: 0,
            "memory_allocated": lambda device=None: 0,
            "max_memory_allocated": lambda device=None: 0,
        },
    }
    for module, names in answers.items():
        for name, value in names.items():
            setattr(module, name, value)
    for name in (
        "empty_cache",
        "manual_seed_all",
        "reset_peak_memory_stats",
        "set_device",
        "set_stream",
    ):
        setattr(torch.cuda, name, nothing())
    for name in ("empty_cache", "empty_host_cache", "reset_peak_memory_stats", "set_device_index"):
        setattr(torch.accelerator, name, nothing())
    torch.Tensor.pin_memory = lambda self, device=None: self
    torch.cuda.synchronize = lambda device=None: CLOCK.wait()
    torch.accelerator.synchronize = lambda device=None: CLOCK.wait()


def _stand_in_for_extensions() -> None:
    """Empty modules for CUDA's compiled extensions, and answers to what vLLM asks them on import."""
    flash = "vllm.vllm_flash_attn._vllm_fa"
    for name in ("vllm._C_stable_libtorch", f"{flash}2_C", f"{flash}3_C"):
        sys.modules[name] = ModuleType(name)
    for name in ("fp8", "block_fp8", "fp4"):
        STUBS.define(f"cutlass_scaled_mm_supports_{name}(int capability) -> bool")
        STUBS.impl(f"cutlass_scaled_mm_supports_{name}", lambda capability: False, "CompositeExplicitAutograd")


def _choose_platform() -> None:
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from vllm import platforms
    from vllm.config.kernel import IrOpPriorityConfig
    from vllm.platforms.cpu import CpuPlatform
    from vllm.platforms.cuda import NonNvmlCudaPlatform
    from vllm.platforms.interface import DeviceCapability

    class EmulatedCuda(NonNvmlCudaPlatform):
        """Says of itself what CUDA says, but for where tensors are."""

        device_type = "cpu"
        dispatch_key = "CPU"
        dist_backend = "gloo"
        simple_compile_backend = "eager"

        @staticmethod
        def graph_pool_handle() -> tuple[int, int]:
            return (0, 0)

        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return DeviceCapability(9, 0)

        @classmethod
        def get_device_total_memory(cls, device_id: int = 0) -> int:
            return MEMORY

        @classmethod
        def mem_get_info(cls, device: Any) -> tuple[int, int]:  # asked before vLLM 0.29
            return MEMORY, MEMORY

        @classmethod
        def is_pin_memory_available(cls) -> bool:
            return False

        @classmethod
        def check_and_update_config(cls, vllm_config: Any) -> None:
            super().check_and_update_config(vllm_config)
            vllm_config.compilation_config.custom_ops = ["none"]

        @classmethod
        def get_default_ir_op_priority(cls, vllm_config: Any) -> IrOpPriorityConfig:
            return IrOpPriorityConfig.with_default(["native"])

    target = GPUTarget("cuda", 90, 32)
    driver.set_active(SimpleNamespace(get_current_target=lambda: target))  # type: ignore[arg-type]
    platforms._current_platform = EmulatedCuda()
    platforms.current_platform = platforms._current_platform
    CpuPlatform.import_kernels()  # layers look their operators up even where they use none

    # Names of fused kernels that only CUDA has, which the patterns of the compiler's passes mention on import.
    import vllm.model_executor.models.llama
    from torch._ops import _OpNamespace

    find = _OpNamespace.__getattr__

    class Absent:
        def __getattr__(self, name: str) -> Absent:
            if name.startswith("__"):
                raise AttributeError(name)
            return Absent()

    def find_or_absent(self: Any, name: str) -> Any:
        try:
            return find(self, name)
        except AttributeError:
            if name.startswith("__"):
                raise
            return Absent()

    _OpNamespace.__getattr__ = find_or_absent
    try:
        import vllm.compilation.passes.pass_manager  # noqa: F401
    finally:
        _OpNamespace.__getattr__ = find


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *_: Any,
) -> None:
    """Stands in for `reshape_and_cache_flash`: keys and values [tokens, heads, size] into slots, below 0 nowhere."""
    slots = slot_mapping.clamp(min=0)
    block, offset = slots // key_cache.shape[1], slots % key_cache.shape[1]
    used = (slot_mapping >= 0)[:, None, None]
    for cache, new in ((key_cache, key), (value_cache, value)):
        cache[block, offset] = torch.where(used, new[: len(slots)], cache[block, offset])


def schedule_attention(*_: Any, cache_seqlens: torch.Tensor, **__: Any) -> torch.Tensor:
    """Stands in for FlashAttention 3's plan of a step: the contexts that it was made for, and one more."""
    return torch.cat([cache_seqlens, cache_seqlens.new_ones(1)]).to(torch.int32)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seqused_k: torch.Tensor,
    block_table: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    window_size: list[int] | None = None,
    softcap: float = 0.0,
    scheduler_metadata: torch.Tensor | None = None,
    **_: Any,
) -> torch.Tensor:
    """Stands in for `flash_attn_varlen_func` over a paged cache; a plan that was made for other contexts gives NaN.

    As on a GPU, nothing is read on the host, and the rows of `out` past the last request stay as they are.

    Args:
        q: [tokens, query heads, size]; `out` alike.
        k, v: [blocks, block size, heads, size].
        cu_seqlens_q: [requests + 1], where each one's tokens begin.
        seqused_k: [requests], context with the step's own tokens.
        block_table: [requests, blocks].
    """
    token = torch.arange(len(q))
    row = torch.searchsorted(cu_seqlens_q[1:].contiguous(), token, right=True)
    padding = row == len(seqused_k)
    row = row.clamp(max=len(seqused_k) - 1)
    context = seqused_k[row][:, None].long()
    own = context - (cu_seqlens_q[row + 1] - token)[:, None]
    blocks = block_table[row].long()  # [tokens, blocks]
    place = torch.arange(blocks.shape[1] * k.shape[1])
    hidden = place >= context
    if causal:
        hidden = hidden | (place > own)
    if window_size is not None and window_size[0] >= 0:
        hidden = hidden | (place < own - window_size[0])
    keys, values = (cache[blocks].flatten(1, 2).float() for cache in (k, v))  # [tokens, places, heads, size]
    values = values.masked_fill(hidden[:, :, None, None], 0.0)  # what is there may be no number
    queries = q.float().unflatten(1, (keys.shape[2], -1))  # [tokens, heads, queries per head, size]
    scores = torch.einsum("thgd,tkhd->thgk", queries, keys) * softmax_scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(hidden[:, None, None], -torch.inf).softmax(dim=-1)
    result = torch.einsum("thgk,tkhd->thgd", weights, values).flatten(1, 2)
    nothing = hidden.all(dim=1)[:, None, None]
    result = result.masked_fill(nothing, 0.0)
    if scheduler_metadata is not None:
        result = result.masked_fill((scheduler_metadata[row, None] != context)[:, :, None], torch.nan)
    out.copy_(torch.where(padding[:, None, None], out, result.to(out.dtype)))
    return out


def _attend() -> None:
    from vllm.v1.attention.backends import flash_attn

    flash_attn.reshape_and_cache_flash = write_kv
    flash_attn.get_scheduler_metadata = schedule_attention
    flash_attn.flash_attn_varlen_func = attend
    # Compiled, it has no float32, in which alone greedy texts are the same to the token.
    flash_attn.FlashAttentionBackend.supported_dtypes = [torch.float32, torch.bfloat16]


def choose_experts(
    weights: torch.Tensor,
    ids: torch.Tensor,
    _: torch.Tensor,
    logits: torch.Tensor,
    renormalize: bool,
    *__: Any,
    **___: Any,
) -> None:
    """Stands in for `topk_softmax`: weights and ids [T, k] of the likeliest experts, of logits [T, E]."""
    best, which = logits.float().softmax(dim=-1).topk(weights.shape[1])
    weights.copy_(best / best.sum(dim=-1, keepdim=True) if renormalize else best)
    ids.copy_(which)


def align_blocks(
    ids: torch.Tensor,
    experts: int,
    size: int,
    places: torch.Tensor,
    block_experts: torch.Tensor,
    count: torch.Tensor,
    expert_map: torch.Tensor | None = None,
    *_: Any,
) -> None:
    """Stands in for `moe_align_block_size`: places in `ids` [T, k] sorted by expert, each filled up to whole blocks."""
    assert expert_map is None
    places.fill_(ids.numel())
    block_experts.fill_(0)
    done = 0
    for expert in range(experts):
        chosen = (ids.flatten() == expert).nonzero().flatten()
        blocks = -(-len(chosen) // size)
        places[done * size : done * size + len(chosen)] = chosen.to(places.dtype)
        block_experts[done : done + blocks] = expert
        done += blocks
    count.fill_(done * size)


def multiply_int4_experts(
    x: torch.Tensor,
    out: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    weights: torch.Tensor | None,
    places: torch.Tensor,
    block_experts: torch.Tensor,
    count: torch.Tensor,
    each: int,
    size: int,
    *blocks: int,
) -> None:
    """Stands in for `moe_wna16_gemm`: rows `places / each` of x [T, K] times their experts' weights.

    Args:
        out: [T, k, N].
        packed: uint8 [E, N, K / 2], the lower half of a byte first.
        scales: [E, N, groups]; a value is (q - 8) * scale.
        weights: [T, k] by which results are multiplied, or None.
        blocks: outputs and inputs of a block and bits; the kernel takes one, two, four or eight groups of inputs.
    """
    group = 2 * packed.shape[2] // scales.shape[2]
    assert zeros is None and blocks[1] % group == 0 and blocks[1] // group in (1, 2, 4, 8) and blocks[2] == 4
    assert x.dtype == out.dtype == scales.dtype and x.dtype in (torch.bfloat16, torch.float16)
    assert x.shape[1] % blocks[1] == 0
    results = out.view(-1, packed.shape[1])
    for block in range(int(count) // size):
        expert = block_experts[block]
        halves = torch.stack((packed[expert] & 15, packed[expert] >> 4), dim=-1).flatten(1).float() - 8
        weight = halves * scales[expert].float().repeat_interleave(group, dim=1)
        for place in places[block * size : block * size + size].tolist():
            if place < results.shape[0]:
                factor = 1.0 if weights is None else weights.flatten()[place]
                results[place] = (weight @ x[place // each].float() * factor).to(out.dtype)


def _mix() -> None:
    """The experts of a mixture: what surrounds vLLM's Triton kernels for them, and the one in CUDA for four bits."""
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.fused_moe import utils

    def scaled(x: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, ...]:
        return (*quantize_per_channel(x, torch.int8), None)

    def scaled_fp8(x: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, ...]:
        return quantize_per_channel(x, torch.float8_e4m3fn)

    from vllm_selfspec.drafter.quantize_cuda import quantize_per_channel

    ops.topk_softmax = choose_experts
    ops.moe_align_block_size = align_blocks
    ops.moe_wna16_gemm = multiply_int4_experts
    ops.moe_sum = lambda x, out, *_: out.copy_(x.sum(dim=1))
    ops.scaled_int8_quant, ops.scaled_fp8_quant = scaled, scaled_fp8
    utils.per_token_quant_int8 = lambda x: scaled(x)[:2]  # a Triton kernel with a function of the device's library


def _quantize() -> None:
    """The drafter's products for CUDA, with stand-ins for vLLM's kernels."""
    import plain_kernels
    from vllm.model_executor.kernels import linear

    from vllm_selfspec.drafter import quantize, quantize_cuda

    for name, function in plain_kernels.CHOOSERS.items():
        setattr(linear, name, function)
    # They ask where a tensor is, which says nothing here.
    quantize.default_precision = lambda device_type: quantize_cuda.default_cuda_precision()
    quantize.usable_precisions = lambda device_type: quantize_cuda.usable_cuda_precisions()
    quantize.experts_precisions = lambda device_type: quantize_cuda.usable_experts_precisions()
    quantize.quantize = lambda weight, precision, light=None: quantize_cuda.CudaLinear(weight, precision)
    quantize.quantize_experts = lambda up, down, precision, light=None: quantize_cuda.CudaExperts(up, down, precision)


def _start_workers_on_the_cpu() -> None:
    from vllm.distributed import parallel_state
    from vllm.utils.mem_utils import MemorySnapshot
    from vllm.v1.sample.ops import topk_topp_sampler
    from vllm.v1.worker import gpu_worker, workspace
    from vllm.v1.worker.gpu import buffer_utils

    def init_device(self: Any) -> None:
        self.device = torch.device("cpu")
        # Before vLLM 0.29 a dense model makes no group for experts, and another engine in its process none either.
        if parallel_state.model_parallel_is_initialized() and parallel_state._EP is None:
            parallel_state.destroy_model_parallel()
        gpu_worker.init_worker_distributed_environment(
            self.vllm_config, self.rank, self.distributed_init_method, self.local_rank, "gloo"
        )
        gpu_worker.set_random_seed(self.model_config.seed)
        self.init_snapshot = MemorySnapshot(device=self.device)
        self.requested_memory = int(MEMORY * self.cache_config.gpu_memory_utilization)
        if hasattr(self, "_init_workspace_and_model_runner"):
            self._init_workspace_and_model_runner()
            return
        # Before vLLM 0.32.
        workspace.init_workspace_manager(self.device, 1)
        package = "gpu.model_runner" if self.use_v2_model_runner else "gpu_model_runner"
        runner = import_module(f"vllm.v1.worker.{package}").GPUModelRunner
        self.model_runner = runner(self.vllm_config, self.device)

    if not hasattr(buffer_utils, "NonUvaBuffer"):  # before vLLM 0.30 there was no other buffer than shared memory
        buffer_utils.UvaBuffer = SharedBuffer
    gpu_worker.Worker.init_device = init_device
    # No memory is given back: as on a GPU between two tags of a wake-up, what is written there is there.
    gpu_worker.Worker.sleep = lambda self, level=1: None
    gpu_worker.Worker.wake_up = lambda self, tags=None: None
    gpu_worker.kernel_warmup = lambda *_, **__: None
    topk_topp_sampler.HAS_TRITON = False  # the interpreter cannot run that kernel
