"""Adapters: the drafter applies each request's own, and needs no refresh when another one is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from engines import engine, random_lengths, random_prompt, watch
from safetensors.torch import save_file
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

from vllm_selfspec.drafter.exit_head import ExitHead, ExitHeadInfo, save

HIDDEN, INTERMEDIATE, HEADS, KV, LAYERS, VOCABULARY, RANK = 128, 192, 128, 64, 4, 256, 8
SHAPES = {
    "self_attn.q_proj": (HEADS, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
PROMPTS = [random_prompt(5 + 3 * number, number) for number in range(6)]


def write_adapter(folder: Path, seed: int) -> str:
    """A random adapter in PEFT's format, for every linear layer and the LM head of the tiny Llama."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    shapes = {f"model.layers.{n}.{name}": shape for n in range(LAYERS) for name, shape in SHAPES.items()}
    weights = {}
    for name, (outputs, inputs) in (shapes | {"lm_head": (VOCABULARY, HIDDEN)}).items():
        a, b = torch.randn(RANK, inputs, generator=generator), torch.randn(outputs, RANK, generator=generator)
        weights[f"base_model.model.{name}.lora_A.weight"] = a / inputs**0.5
        weights[f"base_model.model.{name}.lora_B.weight"] = 0.5 * b / RANK**0.5
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "bias": "none"}
    targets = [name.split(".")[1] for name in SHAPES] + ["lm_head"]
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": targets}))
    return str(folder)


def answers(llm: LLM, adapters: Sequence[LoRARequest | None]) -> list[tuple[int, ...]]:
    """Greedy answers to `PROMPTS`, each with its adapter, all in one batch."""
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    outputs = llm.generate(
        prompts, SamplingParams(temperature=0.0, max_tokens=40), lora_request=adapters, use_tqdm=False
    )
    return [tuple(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_each_request_drafts_with_its_own_adapter(weights: str, tiny: Callable[..., str], tmp_path: Path) -> None:
    first, second, third = (
        LoRARequest(f"adapter {number}", number, write_adapter(tmp_path / str(number), number)) for number in (1, 2, 3)
    )
    # In this order: vLLM's CPU kernels give a request without an adapter that of the last slot, if there is one.
    rounds = [[None] * 6, [first, second, second, first, second, first], [third] * 6]
    lora = {"enable_lora": True, "max_loras": 2, "max_lora_rank": RANK}
    with engine(tiny("llama"), **lora) as llm:
        plain = [answers(llm, adapters) for adapters in rounds]
    assert len({texts[0] for texts in plain}) == 3, "an adapter changes nothing"
    drafter = {"num_speculative_tokens": 5, "drafter": {"weights": weights, "lm_head": weights}}
    with engine(tiny("llama"), drafter | {"control": {"mode": "fixed"}}, **lora) as llm:
        for adapters, expected in zip(rounds, plain, strict=True):
            seen = watch(llm, random_lengths(1, 5))
            assert answers(llm, adapters) == expected
            # Without its adapter, or with another's, a draft is hardly ever right.
            assert seen.acceptance > (0.8 if weights == "int8" else 0.4)
            assert seen.drafted > 50


def test_an_exit_head_beside_adapters(tiny: Callable[..., str], tmp_path: Path) -> None:
    """It is tried out when the view is built, before there are any adapters that an embedding could ask for."""
    head = tmp_path / "head.safetensors"
    save(ExitHead(HIDDEN, 64), ExitHeadInfo("tiny", 2, HIDDEN, 64), head)  # the identity
    drafter = {"weights": "native", "lm_head": "native", "exit_layer": 2, "exit_head": str(head)}
    settings = {"num_speculative_tokens": 3, "drafter": drafter, "control": {"mode": "fixed"}}
    with engine(tiny("llama"), settings, enable_lora=True, max_lora_rank=RANK) as llm:
        seen = watch(llm)
        answers(llm, [None] * 6)
    assert seen.drafted > 50 and seen.acceptance > 0.1
