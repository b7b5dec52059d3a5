"""Temperature, top-k and top-p of speculated tokens on CPU are uninitialised memory in vLLM 0.32.

Symptom: at temperature > 0, CPU speculative decoding accepts almost nothing and samples from a wrong distribution;
with top-k the engine crashes.
Cause: the CPU stand-in of the Triton kernel `expand_kernel` converts its output to int64 and writes into that copy
when the output is a float tensor, so `expand_batch_to_tokens` returns memory that nobody wrote. (Before 0.32 the
stand-in is not there yet when a worker is built, in 0.30 and 0.31 not at all: the function raises TypeError.)
Mend: `expand_batch_to_tokens` by `repeat_interleave`. Goes when vLLM's own function passes `broken()`.
"""

from __future__ import annotations

import torch


def broken() -> bool:
    """True when vLLM's `expand_batch_to_tokens` does not repeat float values on this CPU."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return False
    from vllm.v1.sample import rejection_sampler

    values = torch.tensor([0.5, 0.0, 3.0])
    try:
        got = rejection_sampler.expand_batch_to_tokens(values, torch.tensor([2, 3, 5], dtype=torch.int32), 5, 0, 1)
    except TypeError:
        return True
    return not torch.equal(got, torch.tensor([0.5, 0.5, 1.0, 3.0, 3.0]))


def expand_batch_to_tokens(
    original: object,
    x: torch.Tensor,
    cu_num_tokens: torch.Tensor,
    num_tokens: int,
    replace_from: int = 0,
    replace_to: int = 0,
) -> torch.Tensor:
    """Repeat each request's value for each of its tokens.

    Args:
        original: vLLM's function, which is not called.
        x: [batch_size] values.
        cu_num_tokens: [batch_size] cumulative token counts.
        num_tokens: their total.
        replace_from: value to replace ...
        replace_to: ... by this one.

    Returns:
        [num_tokens] tensor of x's dtype.
    """
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    expanded = torch.repeat_interleave(x, counts, output_size=num_tokens)
    return torch.where(expanded == replace_from, replace_to, expanded).to(x.dtype)
