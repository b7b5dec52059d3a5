"""Model runner V2, whose kernels run in Triton's interpreter: drafts are sampled and verified there by other code.

Run with VLLM_USE_V2_MODEL_RUNNER=1. Steps of large batches are slow so, hence fewer and shorter answers than in
`test_distribution.py`, which is for runner V1.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch
from engines import drafter_of, engine, generate, watch
from test_distribution import CERTAINTY, CHECKPOINT, DRAFTERS, PROMPT, SIGNIFICANCE, exact, p_value
from transformers import AutoModelForCausalLM, PreTrainedModel
from vllm import LLM, SamplingParams

from vllm_selfspec.drafter.speculator import SelfDraftSpeculator

pytestmark = pytest.mark.skipif(os.environ.get("VLLM_USE_V2_MODEL_RUNNER") != "1", reason="needs runner V2")

LENGTH = 3
COUNT = 768


@pytest.fixture(scope="module")
def checkpoint(tiny: Callable[..., str]) -> str:
    return tiny("llama", **CHECKPOINT)


@pytest.fixture(scope="module")
def target(checkpoint: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


@pytest.fixture
def drafting(checkpoint: str) -> Iterator[LLM]:
    settings = {"num_speculative_tokens": 2, "drafter": DRAFTERS["exit"], "control": {"mode": "fixed"}}
    with engine(checkpoint, settings, max_num_seqs=64, max_model_len=32) as llm:
        assert isinstance(drafter_of(llm), SelfDraftSpeculator)
        yield llm


def test_distribution(drafting: LLM, target: PreTrainedModel) -> None:
    seen = watch(drafting, lambda: LENGTH - 1)
    params = SamplingParams(n=COUNT // 16, max_tokens=LENGTH, temperature=1.0)
    answers = [answer for group in generate(drafting, [PROMPT] * 16, params) for answer in group]
    assert p_value(answers, exact(target, {"temperature": 1.0}, length=LENGTH)) > SIGNIFICANCE
    assert 0.2 < seen.acceptance < 0.9


def test_so_few_answers_tell_the_drafter_from_the_target(target: PreTrainedModel, checkpoint: str) -> None:
    early = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    early.model.layers = early.model.layers[:1]
    setting = {"temperature": 1.0}
    wrong, joint = exact(early, setting, length=LENGTH), exact(target, setting, length=LENGTH)
    picked = torch.multinomial(wrong.flatten(), COUNT, True, generator=torch.Generator().manual_seed(0))
    answers = [tuple(int(i) for i in torch.unravel_index(number, joint.shape)) for number in picked]
    assert p_value(answers, joint) < CERTAINTY
