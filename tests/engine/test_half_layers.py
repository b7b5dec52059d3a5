"""The model's own bfloat16 and float16 layers by this package's products, as on CPUs that do not multiply these types.

The seam is laid by hand here, so that CPUs on which it is not needed run it, too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from engines import HALF_PRODUCTS, engine, greedy, random_prompt, runner_of
from vllm import LLM, SamplingParams
from vllm.model_executor.layers import utils

from vllm_selfspec.compat import cpu_half_linear
from vllm_selfspec.drafter.cpu_kernels import own_kernels

pytestmark = pytest.mark.skipif(not own_kernels(), reason="no kernels of the package for this CPU")

ROUNDING = 0.1
"""Of the log-probabilities of tiny models by bfloat16; the two models' own differ by more than one."""
PROMPTS = [random_prompt(20 + 9 * number, 70 + number) for number in range(3)]


@pytest.fixture(params=HALF_PRODUCTS)
def mended(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The mend, by one of the products."""
    dispatch = functools.partial(cpu_half_linear.dispatch, utils.dispatch_cpu_unquantized_gemm)
    monkeypatch.setattr(utils, "dispatch_cpu_unquantized_gemm", dispatch)
    monkeypatch.setattr(cpu_half_linear, "badly_served", lambda: {torch.bfloat16, torch.float16})
    monkeypatch.setattr(cpu_half_linear, "half_product", lambda: request.param)
    # On this CPU vLLM may have kernels for which it packs weights. `rows_linear` would leave those layers to them.
    monkeypatch.setattr("vllm._custom_ops._supports_onednn", False)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: False)
    return request.param


def prompt_logprobs(llm: LLM) -> torch.Tensor:
    """Log-probability of every token of the prompts but their first."""
    params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], params, use_tqdm=False)
    return torch.tensor(
        [
            found[token].logprob
            for output, prompt in zip(outputs, PROMPTS, strict=True)
            for found, token in zip(output.prompt_logprobs[1:], prompt[1:], strict=True)
        ]
    )


def answers(llm: LLM) -> list[list[int]]:
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], greedy(24), use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_model_is_the_same_and_follows_its_weights(mended: str, dtype: str, tiny: Callable[..., str]) -> None:
    first, second = tiny("llama", seed=5), tiny("llama", seed=6)
    expected = {}
    for model in (first, second):
        with engine(model) as llm:  # float32, vLLM's own products
            expected[model] = prompt_logprobs(llm)
    assert (expected[first] - expected[second]).abs().max() > 1
    fixed = {"num_speculative_tokens": 3, "control": {"mode": "fixed"}}
    with engine(second, fixed, dtype=dtype) as llm:
        wanted = answers(llm)
    with engine(first, fixed, dtype=dtype) as llm:
        layer = runner_of(llm).model.model.layers[0].mlp.down_proj
        assert layer.cpu_linear is cpu_half_linear.linear_by(mended) and layer.weight.numel()
        assert (prompt_logprobs(llm) - expected[first]).abs().max() < ROUNDING
        assert answers(llm) != wanted
        llm.collective_rpc("reload_weights", kwargs={"weights_path": second})
        assert (prompt_logprobs(llm) - expected[second]).abs().max() < ROUNDING
        assert answers(llm) == wanted
        metrics = {metric.name: metric for metric in llm.get_metrics()}
        assert metrics["vllm:spec_decode_num_accepted_tokens"].value > 0  # type: ignore[union-attr]
