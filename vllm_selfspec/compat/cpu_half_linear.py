"""bfloat16 and float16 layers run several times below the memory's speed on x86 CPUs without AVX-512 in vLLM 0.32.

Symptom: the warning "Failed to create oneDNN linear, fallback to torch linear"; each further row costs more than half
of what the first did, so that verifying four tokens takes nearly three steps' time and drafts hardly pay.
Cause: oneDNN's matrix products of these types want AVX-512, and torch's fallback widens the weights anew for each row.
Mend: layers that fell back compute with `rows_linear` of `drafter/csrc/cpu_rows.cpp`, which reads the same weights and
sums in float32, too. Layers for which vLLM found a kernel stay as they are. Goes when vLLM has one for such CPUs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


def dispatch(original: Callable[..., None], layer: torch.nn.Module, remove_weight: bool) -> None:
    """vLLM's `dispatch_cpu_unquantized_gemm`, which sets `layer.cpu_linear`."""
    original(layer, remove_weight)
    weight = layer.weight
    if weight.is_meta or weight.ndim != 2 or weight.dtype not in (torch.bfloat16, torch.float16):
        return
    # Where vLLM found a kernel it packed the weight, and these CPUs have none to pack for.
    if weight.numel():
        layer.cpu_linear = linear


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [..., K] times the transpose of weight [N, K], plus bias [N]."""
    out = torch.ops.selfspec_cpu.rows_linear(x.reshape(-1, x.shape[-1]), weight, bias)
    return out.reshape(*x.shape[:-1], weight.shape[0])
