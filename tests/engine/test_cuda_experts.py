"""Experts of a mixture on CUDA's platform played by the CPU: vLLM's Triton kernels for them, interpreted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import emulated_cuda
import interpreted_triton
import numpy as np
import pytest
import torch
from engines import Job, drafter_of, drive, engine, greedy, random_prompt, watch
from torch.nn.functional import silu
from vllm import SamplingParams
from vllm.inputs import TokensPrompt

from vllm_selfspec.drafter.quantize_cuda import CudaExperts, usable_experts_precisions
from vllm_selfspec.plugin import older_than

pytestmark = pytest.mark.skipif(not emulated_cuda.wanted(), reason="on CUDA's platform alone")

EXPERTS, WIDTH, HIDDEN = 4, 64, 128
ERROR = {"int4": 0.2, "int8": 0.03, "fp8": 0.08}
"""Largest relative error with normal weights: that of two products."""


def experts_of(seed: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((EXPERTS, 2 * WIDTH, HIDDEN), (EXPERTS, HIDDEN, WIDTH))
    up, down = (torch.randn(shape, generator=generator) * shape[-1] ** -0.5 for shape in shapes)
    return up.to(dtype), down.to(dtype)


def rows_of(count: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, and the weights and ids of two experts of each."""
    generator = torch.Generator().manual_seed(count)
    ids = torch.rand(count, EXPERTS, generator=generator).argsort(dim=1)[:, :2].int()
    return torch.randn(count, HIDDEN, generator=generator).to(dtype), torch.rand(count, 2, generator=generator), ids


def error(experts: CudaExperts, weights: tuple[torch.Tensor, torch.Tensor], count: int, dtype: torch.dtype) -> float:
    x, chosen, ids = rows_of(count, dtype)
    up, down = (weight.float() for weight in weights)
    dense = torch.zeros(count, HIDDEN)
    for row in range(count):
        for weight, expert in zip(chosen[row], ids[row], strict=True):
            gate, value = (up[expert] @ x[row].float()).chunk(2)
            dense[row] += weight * (down[expert] @ (silu(gate) * value))
    out = experts.apply(x, chosen, ids, None)
    assert out.dtype == dtype and out.shape == dense.shape
    return float((out.float() - dense).norm() / dense.norm())


@pytest.mark.parametrize("precision", ERROR)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_experts_are_the_dense_ones_within_quantization_error(precision: Any, dtype: torch.dtype) -> None:
    """With few rows an expert and with many, for which vLLM has other kernels; and after a refresh in place."""
    assert precision in usable_experts_precisions()
    before, after = experts_of(1, dtype), experts_of(2, dtype)
    experts = CudaExperts(*before, precision)
    places = [tensor.data_ptr() for tensors in experts._weights for tensor in tensors]
    for weights in (before, after):
        if weights is after:
            with torch.inference_mode():
                experts.refresh(*after)
        for count in (1, 3, 40):
            assert 1e-4 < error(experts, weights, count, dtype) < ERROR[precision]
    assert error(experts, before, 3, dtype) > 1
    assert places == [tensor.data_ptr() for tensors in experts._weights for tensor in tensors]
    numbers = sum(weight.numel() for weight in before)
    bits = 4 if precision == "int4" else 8
    assert numbers * bits / 8 < experts.nbytes < numbers * bits / 8 * 1.2


@pytest.mark.skipif(interpreted_triton.on_runner_v2() == older_than("0.32"), reason="vLLM has it on the other runner")
@pytest.mark.parametrize("asynchronous", [False, True])
def test_experts_for_router_replay_are_the_targets(asynchronous: bool, tiny: Callable[..., str]) -> None:
    """They are read where the routers left them, after the drafts have run through these, too."""

    def experts(settings: dict[str, Any] | None) -> list[np.ndarray]:
        arguments = {"enable_return_routed_experts": True, "async_scheduling": asynchronous}
        with engine(tiny("qwen3_moe"), settings, enable_prefix_caching=True, **arguments) as llm:
            prompts = [TokensPrompt(prompt_token_ids=random_prompt(length, length)) for length in (5, 40)]
            outputs = llm.generate(prompts, greedy(14, ignore_eos=True))
            return [output.outputs[0].routed_experts for output in outputs]

    drafter = {"weights": "native", "lm_head": "native", "exit_layer": 2}
    drafting = experts({"num_speculative_tokens": 4, "drafter": drafter, "control": {"mode": "fixed"}})
    for ours, plain in zip(drafting, experts(None), strict=True):
        assert len(plain) > 14 and plain.any()
        np.testing.assert_array_equal(ours, plain)


@pytest.mark.parametrize("weights", ["int4", "fp8"])
def test_a_mixture_drafts_with_experts_of_its_own(weights: str, tiny: Callable[..., str]) -> None:
    settings = {"num_speculative_tokens": 4, "drafter": {"weights": weights}, "control": {"mode": "fixed"}}
    with engine(tiny("qwen3_moe"), settings) as llm:
        states = drafter_of(llm)._tap._states.values()
        assert sum(isinstance(state, CudaExperts) for state in states) == 4
        seen = watch(llm)
        params = SamplingParams(temperature=0.7, max_tokens=16)
        drive(llm, [Job(random_prompt(length, length), params, arrival=i) for i, length in enumerate((5, 40))])
    assert seen.drafted > 20 and seen.acceptance > 0.5
