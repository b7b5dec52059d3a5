"""The CUDA graphs of the target's decoding steps on model runner V2, for every draft length.

vLLM rounds its capture sizes, which are numbers of tokens, up to each draft length and looks a batch up by its number
of tokens alone. With eight lengths that makes 375 graphs of whole passes by default, and of plain decoding's batches
one in two finds none and runs in pieces, where vLLM without speculation has a graph for each. Here every length has
graphs by number of requests: without drafts those of plain decoding, with drafts a coarser set.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor

from vllm_selfspec.speculative_config import SelfSpecSpeculativeConfig

WITH_DRAFTS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 48, 64, 96, 128)
"""Numbers of requests with graphs that verify drafts."""
MOST_TOKENS = 256
"""Past so many tokens a GPU computes for longer than it reads weights: padding would cost more than pieces do."""


def decode_batches(capture_sizes: list[int], max_num_reqs: int, max_draft_tokens: int) -> dict[int, list[int]]:
    """Numbers of requests to capture, ascending, by tokens per request: 1 to `max_draft_tokens` + 1.

    Args:
        capture_sizes: vLLM's, in tokens.
        max_num_reqs: most requests of a step.
        max_draft_tokens: γ at its most.
    """
    batches = {1: sorted({size for size in capture_sizes if size <= max_num_reqs})}
    most = min(MOST_TOKENS, max(capture_sizes))
    for query_len in range(2, max_draft_tokens + 2):
        fitting = min(max_num_reqs, most // query_len)
        batches[query_len] = [count for count in WITH_DRAFTS if count <= fitting]
        if fitting == max_num_reqs and fitting not in batches[query_len]:
            batches[query_len].append(fitting)
    return batches


def init_candidates(original: Callable[..., None], self: Any) -> None:
    """`CudaGraphManager._init_candidates`, with the graphs of `decode_batches` for whole passes of the target."""
    original(self)
    config = self.vllm_config.speculative_config
    if (
        not isinstance(config, SelfSpecSpeculativeConfig)
        or not config.uses_dynamic_speculative_decoding()
        or self.decode_query_len != config.num_speculative_tokens + 1  # the drafter's own graphs
        or self.cudagraph_mode.decode_mode() != CUDAGraphMode.FULL
        or not self.cudagraph_mode.separate_routine()
        or getattr(self, "ubatch_runner", None) is not None  # since vLLM 0.30
        or not self._capture_descs
    ):
        return
    batches = decode_batches(
        self.compilation_config.cudagraph_capture_sizes, self.max_num_reqs, config.num_speculative_tokens
    )
    graphs = {
        query_len: [
            BatchExecutionDescriptor(
                cg_mode=CUDAGraphMode.FULL,
                num_tokens=query_len * count,
                num_reqs=count,
                uniform_token_count=query_len,
            )
            for count in counts
        ]
        for query_len, counts in batches.items()
    }
    whole = [graph for fitting in graphs.values() for graph in fitting]
    self._capture_descs[CUDAGraphMode.FULL] = sorted(whole, key=lambda graph: graph.num_tokens, reverse=True)
    for num_tokens in range(1, self.compilation_config.max_cudagraph_capture_size + 1):
        key = (num_tokens, 0)  # no adapters: the drafter has none on this runner
        fitting = [
            next((graph for graph in graphs[query_len] if graph.num_tokens >= num_tokens), None)
            for query_len in batches
            if num_tokens % query_len == 0
        ]
        pieces = [graph for graph in self._candidates.get(key, ()) if graph.cg_mode != CUDAGraphMode.FULL]
        self._candidates[key] = [graph for graph in fitting if graph is not None] + pieces
