"""bfloat16 and float16 layers run below the memory's speed on x86 CPUs without AMX in vLLM 0.32.

Symptom: each further row of a batch costs more than half of what the first did, or all of it, so that verifying four
tokens takes three to four steps' time and drafts hardly pay. For bfloat16 without AVX-512 and for float16 there is the
warning "Failed to create oneDNN linear, fallback to torch linear".
With AVX512_BF16 (Zen 4 and later) one row takes twice as long as reading the weights.
Cause: oneDNN's matrix products of these types want AVX512_BF16 and AVX512_FP16. With AVX-512 alone it emulates
bfloat16; otherwise it has none, and torch's fallback widens the weights anew for each row.
Mend: such layers compute with `rows_linear` of `drafter/csrc/cpu_rows.cpp`, or with AVX-512 `avx512_rows_linear` of
`cpu_half.cpp`, which read the same weights and sum in float32, too. Layers for which vLLM found another kernel stay as
they are. Goes when vLLM has one for such CPUs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from vllm.platforms import current_platform

from vllm_selfspec.drafter.cpu_kernels import badly_served, half_product


def dispatch(original: Callable[..., None], layer: torch.nn.Module, remove_weight: bool) -> None:
    """vLLM's `dispatch_cpu_unquantized_gemm`, which sets `layer.cpu_linear`."""
    weight = layer.weight
    if weight.is_meta or weight.ndim != 2 or weight.dtype not in badly_served() or _zentorch_serves():
        original(layer, remove_weight)
        return
    product = half_product()
    if product == "rows_linear":  # with AVX-512 vLLM would pack the weight for oneDNN's emulation
        original(layer, remove_weight)
        if not layer.weight.numel():  # packed for a kernel that vLLM found
            return
    layer.cpu_linear = linear_by(product)


def _zentorch_serves() -> bool:
    """True where AMD's extension, which vLLM prefers, is installed."""
    return current_platform.is_zen_cpu() and hasattr(torch.ops.zentorch, "zentorch_linear_unary")


@functools.cache
def linear_by(product: str) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]:
    """x [..., K] times the transpose of weight [N, K], plus bias [N], by an operator of `drafter/csrc`."""
    operator = getattr(torch.ops.selfspec_cpu, product)

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        out = operator(x.reshape(-1, x.shape[-1]), weight, bias)
        return out.reshape(*x.shape[:-1], weight.shape[0])

    return linear
