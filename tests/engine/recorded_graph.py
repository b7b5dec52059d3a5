"""CUDA graphs on CPU: what runs inside a capture is recorded operation by operation, and a replay runs just that again.

As on a GPU, a replay knows only what was on the tape: the tensors at their addresses, and every number that was on the
host in the capture, frozen. Recorded are PyTorch's operations and the launches of interpreted Triton kernels; Python
between them is not run again. A value read from a tensor while recording is an error, as it is in a CUDA capture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from engines import drafter_of, runner_of
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor
from vllm import LLM
from vllm.compilation import cuda_graph
from vllm.config.compilation import CUDAGraphMode
from vllm.model_executor.layers.attention import attention
from vllm.platforms import current_platform
from vllm.v1.attention import selector
from vllm.v1.attention.backends import triton_attn
from vllm.v1.worker.gpu import cudagraph_utils

from vllm_selfspec.plugin import older_than

READS = {torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}
"""Operations whose result decides on the host."""
OPAQUE = {
    torch.ops.vllm.unified_kv_cache_update.default: attention.unified_kv_cache_update,
    torch.ops.vllm.unified_attention_with_output.default: attention.unified_attention_with_output,
}
"""vLLM's attention as compiled code calls it."""
BATCH_SIZES = [2, 3]
"""Captured: one request is padded to two rows, and four draft without a graph."""
LAUNCH = GridExecutor.__call__


class RecordedGraph(TorchDispatchMode):
    """Stands in for `torch.cuda.CUDAGraph`.

    Attributes:
        replays: times that any graph was replayed, since the last `recorded_graphs()` or `graphs_on_cuda()`.
        recording: the graph being captured.
        replayed: times that this one was.
    """

    replays = 0
    recording: RecordedGraph | None = None

    def __init__(self) -> None:
        super().__init__()
        self._tape: list[Callable[[], None]] = []
        self.replayed = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS:
            raise RuntimeError(f"{func} reads a tensor on the host, which a captured graph cannot do.")
        kwargs = kwargs or {}
        if func in OPAQUE:  # PyTorch sees one operation, a GPU those inside
            with self:
                return OPAQUE[func](*args, **kwargs)
        results = func(*args, **kwargs)

        def again() -> None:
            for old, new in zip(tree_leaves(results), tree_leaves(func(*args, **kwargs)), strict=True):
                # Views and what was changed in place are where they were.
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

        self._tape.append(again)
        return results

    def launch(self, kernel: GridExecutor, *args: Any, **kwargs: Any) -> None:
        """Launch an interpreted Triton kernel, and put it on the tape."""
        with _disable_current_modes():
            LAUNCH(kernel, *args, **kwargs)
        self._tape.append(lambda: LAUNCH(kernel, *args, **kwargs))

    def replay(self) -> None:
        """Run what was recorded."""
        RecordedGraph.replays += 1
        self.replayed += 1
        for operation in self._tape:
            operation()


@contextmanager
def capturing(graph: RecordedGraph, *_: Any, **__: Any) -> Iterator[None]:
    """Stands in for `torch.cuda.graph`."""
    RecordedGraph.recording = graph
    try:
        with graph:
            yield
    finally:
        RecordedGraph.recording = None


def launch(kernel: GridExecutor, *args: Any, **kwargs: Any) -> None:
    """Stands in for the launch of an interpreted Triton kernel, and puts it on the tape of a capture."""
    graph = RecordedGraph.recording
    (LAUNCH if graph is None else graph.launch)(kernel, *args, **kwargs)


def record(patch: pytest.MonkeyPatch) -> None:
    """Let vLLM's captures make `RecordedGraph`s."""
    RecordedGraph.replays = 0
    patch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    patch.setattr(torch.cuda, "graph", capturing)
    patch.setattr(GridExecutor, "__call__", launch)
    patch.setattr(cudagraph_utils, "graph_capture", lambda device: nullcontext())
    if older_than("0.32"):
        patch.setattr(cudagraph_utils, "set_graph_pool_id", lambda pool: None, raising=False)
        patch.setattr(type(current_platform), "graph_pool_handle", lambda *_: None, raising=False)
    else:
        patch.setattr(cudagraph_utils, "capture_pool", lambda pool, config: nullcontext())


@contextmanager
def recorded_graphs() -> Iterator[None]:
    """Within it, engines on runner V2 attend with vLLM's Triton kernels, and graphs are `RecordedGraph`s.

    vLLM's attention for CPU plans its work on the host, anew for every step, so no graph could hold it.
    """
    backend = f"{triton_attn.__name__}.{triton_attn.TritonAttentionBackend.__qualname__}"
    with pytest.MonkeyPatch.context() as patch:
        record(patch)
        # Of its two attention kernels the one that launches fewer programs: they run one after the other.
        patch.setattr(triton_attn, "MIN_LAUNCH_GRID_SIZE_2D", 0)
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        platform = type(current_platform)
        patch.setattr(platform, "get_attn_backend_cls", classmethod(lambda *_, **__: backend))
        # Memory pools and streams, which a CPU does not have.
        patch.setattr(platform, "get_global_graph_pool", lambda self: None)
        patch.setattr(cudagraph_utils, "current_stream", lambda: None)
        selector._cached_get_attn_backend.cache_clear()
        yield
    selector._cached_get_attn_backend.cache_clear()


@contextmanager
def graphs_on_cuda() -> Iterator[None]:
    """Within it, compiled engines on CUDA's platform record and replay every graph that they would capture there."""
    with pytest.MonkeyPatch.context() as patch:
        record(patch)
        patch.setattr(cuda_graph, "weak_ref_tensors", lambda tensors: tensors)
        yield


def capture(llm: LLM) -> None:
    """Capture the drafter's graphs for `BATCH_SIZES`, as the runner does on a GPU."""
    runner, drafter = runner_of(llm), drafter_of(llm)
    compilation = runner.compilation_config
    for layer in compilation.static_forward_context.values():
        layer.use_direct_call = True  # what an opaque operation does inside would not be recorded
    compilation.cudagraph_capture_sizes = BATCH_SIZES
    compilation.max_cudagraph_capture_size = max(BATCH_SIZES)
    drafter.init_cudagraph_manager(CUDAGraphMode.FULL_DECODE_ONLY)
    drafter.capture()
