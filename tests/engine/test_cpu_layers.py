"""The drafter's attention operator on CPU computes what vLLM's layers compute, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from engines import Job, drafter_of, drive, engine, greedy, random_lengths, random_prompt, runner_of, texts, watch
from vllm import LLM, SamplingParams

from vllm_selfspec.drafter import cpu_layers, proposer, view
from vllm_selfspec.drafter.cpu_kernels import own_kernels

pytestmark = pytest.mark.skipif(not own_kernels(), reason="no kernels of the package for this CPU")

WINDOW = 40
SETTINGS = {"num_speculative_tokens": 5, "control": {"mode": "fixed"}}
JOBS = [
    Job(random_prompt(length, length), greedy(50) if i % 2 else SamplingParams(max_tokens=50, seed=i), arrival=3 * i)
    for i, length in enumerate((5, 90, 64, 31))
]


def draft_logits(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Logits of every draft of a workload of chunked prefill, block boundaries and changing batches."""
    seen: list[torch.Tensor] = []
    sample_drafts = proposer.sample_drafts

    def recorded(logits: torch.Tensor, *args: Any) -> Any:
        seen.append(logits.clone())
        return sample_drafts(logits, *args)

    with monkeypatch.context() as patch:
        patch.setattr(proposer, "sample_drafts", recorded)
        torch.manual_seed(0)
        watch(llm, random_lengths(2, 5))
        drive(llm, JOBS)
    return seen


@pytest.mark.parametrize(
    ("family", "shape", "drafter"),
    [
        ("llama", {}, {"weights": "int8", "lm_head": "int8"}),
        ("llama", {"num_key_value_heads": 4}, {"weights": "native", "lm_head": "native", "exit_layer": 2}),
        ("qwen3", {}, {"weights": "native", "lm_head": "native", "skip_layers": [1]}),
        ("mistral", {"sliding_window": WINDOW}, {"weights": "int8", "lm_head": "int8"}),
        ("gemma2", {"sliding_window": WINDOW}, {"weights": "int8", "lm_head": "int8"}),
    ],
)
def test_drafts_are_those_of_vllms_layers(
    family: str,
    shape: dict[str, Any],
    drafter: dict[str, Any],
    tiny: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = {"max_num_batched_tokens": 64, "disable_hybrid_kv_cache_manager": True}
    with engine(tiny(family, **shape), SETTINGS | {"drafter": drafter}, **arguments) as llm:
        assert isinstance(drafter_of(llm).model.draft_layers, cpu_layers.DraftLayers)
        by_operator = draft_logits(llm, monkeypatch)
    monkeypatch.setattr(view, "usable_for", lambda layers: False)
    with engine(tiny(family, **shape), SETTINGS | {"drafter": drafter}, **arguments) as llm:
        assert drafter_of(llm).model.draft_layers is None
        by_layers = draft_logits(llm, monkeypatch)
    assert len(by_operator) == len(by_layers) > 50
    assert all(map(torch.equal, by_operator, by_layers))


def test_new_caches_are_noticed(tiny: Callable[..., str]) -> None:
    """The drafter goes on in the KV cache that its target's layers have now, not in the one that it first saw."""
    settings = SETTINGS | {"drafter": {"weights": "native", "lm_head": "native", "exit_layer": 2}}
    job = [Job(random_prompt(40, 1), greedy(40))]
    with engine(tiny(), settings) as llm:
        expected, seen = texts(drive(llm, job)), watch(llm)
        assert texts(drive(llm, job)) == expected
        accepted = seen.accepted
        runner = runner_of(llm)
        for index, cache in enumerate(runner.kv_caches):
            runner.kv_caches[index] = cache.clone()
        for attention in drafter_of(llm).model.draft_layers._copies:
            attention.kv_cache = next(
                new for new in runner.kv_caches if torch.equal(new, attention.kv_cache) and new.shape
            )
        seen = watch(llm)
        assert texts(drive(llm, job)) == expected
        assert seen.accepted == accepted > 0
