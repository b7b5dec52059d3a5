"""The large tensors of sampling: kept from step to step, and the same as vLLM's own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines import Job, drive, engine, greedy, random_prompt, runner_of, texts, watch
from vllm import SamplingParams
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_selfspec.compat import cpu_sampling
from vllm_selfspec.drafter.cpu_kernels import own_kernels
from vllm_selfspec.drafter.proposer import verified_draft_probs
from vllm_selfspec.drafter.sampling import Scratch

DRAFTER = {"weights": "native", "lm_head": "native", "exit_layer": 1}


def test_scratch_is_used_again_and_grows() -> None:
    scratch = Scratch()
    first = scratch.take((3, 5), torch.float32)
    place = first.data_ptr()
    assert first.shape == (3, 5) and first.is_contiguous()
    smaller = scratch.take((2, 7), torch.bfloat16)
    assert smaller.dtype == torch.bfloat16 and smaller.shape == (2, 7) and smaller.data_ptr() == place
    larger = scratch.take((4, 5), torch.float32).fill_(2.0)
    assert larger.sum() == 40
    assert scratch.take((0, 5), torch.float32).shape == (0, 5)


@pytest.mark.parametrize(
    ("req_ids", "num_draft_tokens", "copied"),
    [
        (["a", "b"], [3, 3], False),
        (["b", "a"], [3, 3], True),
        (["a", "b"], [3, 2], True),
        (["a", "b"], [0, 3], True),
        (["b"], [3], True),
        (["c", "a"], [0, 1], True),
    ],
)
def test_draft_probs_are_copied_only_out_of_order(
    req_ids: list[str], num_draft_tokens: list[int], copied: bool
) -> None:
    """The request that each row belongs to may have gone, moved or lost drafts since they were made."""
    probs = torch.rand(2, 3, 11)
    runner: Any = SimpleNamespace(
        _draft_probs=probs, _draft_prob_req_ids=["a", "b"], input_batch=SimpleNamespace(req_ids=req_ids)
    )
    original = inspect.unwrap(GPUModelRunner._get_spec_decode_draft_probs)
    metadata: Any = SimpleNamespace(num_draft_tokens=num_draft_tokens)
    expected, got = original(runner, metadata), verified_draft_probs(original, runner, metadata)
    assert expected is not None and got is not None
    assert torch.equal(got, expected)
    assert (got.data_ptr() != probs.data_ptr()) == copied


def test_no_draft_probs_stay_none() -> None:
    runner: Any = SimpleNamespace(
        _draft_probs=None, _draft_prob_req_ids=None, input_batch=SimpleNamespace(req_ids=["a"])
    )
    original = inspect.unwrap(GPUModelRunner._get_spec_decode_draft_probs)
    assert verified_draft_probs(original, runner, SimpleNamespace(num_draft_tokens=[3])) is None


@pytest.mark.parametrize("top_p", [1.0, 0.9])
@pytest.mark.parametrize("logprobs", [None, 2])
def test_verification_keeps_its_memory(logprobs: int | None, top_p: float, tiny: Callable[..., str]) -> None:
    settings = {"num_speculative_tokens": 3, "drafter": DRAFTER, "control": {"mode": "fixed"}}
    sampling = SamplingParams(temperature=1.0, top_p=top_p, max_tokens=20, ignore_eos=True, logprobs=logprobs)
    with engine(tiny("llama"), settings) as llm:
        seen = watch(llm)
        runner = runner_of(llm)

        def places() -> list[int]:
            scratch = runner.rejection_sampler.selfspec_scratch
            kept = [scratch.gathered, scratch.raw, scratch.processed, scratch.probs, runner.drafter._scratch]
            return [each._memory.data_ptr() for each in kept]

        jobs = [Job(random_prompt(9, number), sampling) for number in range(4)]
        drive(llm, jobs)
        before, drafted = places(), seen.drafted
        drive(llm, jobs)
        assert seen.drafted > drafted > 0
        assert places() == before
        # Kernels read the logits as they are where only a temperature shapes them; else they are copied and processed.
        # The unprocessed ones are kept apart only for those who ask for log-probabilities.
        processed, wanted = top_p < 1.0 or not own_kernels(), logprobs is not None
        copied = processed or wanted
        assert [bool(place) for place in before] == [copied, copied, processed and wanted, True, True]


def test_a_greedy_request_outlives_a_sampled_one(tiny: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its drafts were made beside the other's, with probabilities, and are verified in a batch that is all greedy."""
    checkpoint = tiny("llama")
    jobs = [
        Job(random_prompt(9, 1), greedy(40)),
        Job(random_prompt(9, 2), SamplingParams(temperature=1.0, max_tokens=7)),
    ]
    with engine(checkpoint) as llm:
        (expected,) = texts(drive(llm, jobs[:1]))
    settings = {"num_speculative_tokens": 3, "drafter": DRAFTER, "control": {"mode": "fixed"}}
    greedy_steps = []

    def counted(metadata: Any, draft_probs: torch.Tensor | None, *rest: Any) -> torch.Tensor:
        greedy_steps.append(draft_probs is None)
        return rejection_sample(metadata, draft_probs, *rest)

    rejection_sample = cpu_sampling.rejection_sample
    monkeypatch.setattr(cpu_sampling, "rejection_sample", counted)
    with engine(checkpoint, settings) as llm:
        seen = watch(llm)
        assert texts(drive(llm, jobs))[0] == expected
        assert 0 < seen.accepted < seen.drafted
        assert True in greedy_steps and False in greedy_steps
