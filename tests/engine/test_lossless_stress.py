"""Greedy decoding in float32 with selfspec is token for token plain decoding, whatever happens around it.

One workload mixes what changes the batch under the drafter's feet: chunked prefill, shared prefixes, prompts that end
on block boundaries, requests that arrive, finish, are aborted or reach `max_model_len` while others draft, and a
KV cache so small that requests are preempted and resumed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from engines import BLOCK, Job, drive, engine, greedy, random_lengths, random_prompt, texts, watch
from vllm import RequestOutput

MAX_MODEL_LEN = 5 * BLOCK
LONGEST = 8

SERVING: dict[str, Any] = {"max_model_len": MAX_MODEL_LEN, "max_num_seqs": 6, "max_num_batched_tokens": 64}
ROOMY = SERVING | {"num_gpu_blocks_override": 128}
TIGHT = SERVING | {"num_gpu_blocks_override": 13}

NATIVE = {"weights": "native", "lm_head": "native"}
DRAFTERS: dict[str, dict[str, Any]] = {
    "native": NATIVE,
    "int8": {"weights": "int8", "lm_head": "int8"},
    "int8_native_head": {"weights": "int8", "lm_head": "native"},
    "int8_head_only": {"weights": "native", "lm_head": "int8"},
    "int4": {"weights": "int4", "lm_head": "int4"},
    "exit": NATIVE | {"exit_layer": 2},
    "skip": NATIVE | {"skip_layers": [1, 2]},
    "exit_int8": {"weights": "int8", "lm_head": "int8", "exit_layer": 3},
    "exit_skip_int4": {"weights": "int4", "lm_head": "int8", "exit_layer": 3, "skip_layers": [1]},
}


def selfspec(drafter: str) -> dict[str, Any]:
    """The speculative config of a drafter whose draft lengths the test picks."""
    return {"num_speculative_tokens": LONGEST, "drafter": DRAFTERS[drafter], "control": {"mode": "fixed"}}


SHARED_PREFIX = random_prompt(2 * BLOCK, 1000)


def workload() -> list[Job]:
    """Greedy requests with everything that the module's docstring names."""
    jobs = [
        # Prompts that end right before, on and right after a block boundary; single tokens; several prefill chunks.
        *(Job(random_prompt(length, 100 + length), greedy(20 + length % 5), arrival=length // 16) for length in
          (1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 3 * BLOCK - 1, 3 * BLOCK, 90)),
        # Short answers: max_tokens is hit in mid-draft, or before anything is drafted.
        *(Job(random_prompt(5 + count, 200 + count), greedy(count), arrival=3 * count) for count in (1, 2, 3, 7)),
        # max_model_len is hit: the first ends there with its prompt's block, the others in mid-draft.
        *(Job(random_prompt(length, 300 + length), greedy(500), arrival=4) for length in (MAX_MODEL_LEN - 1, 150, 120)),
        *(Job([*SHARED_PREFIX, *random_prompt(extra, 400 + extra)], greedy(30), arrival=2 + 5 * extra)
          for extra in (0, 1, 7)),
        Job(random_prompt(40, 500), greedy(100), arrival=6, abort=11),
        Job(random_prompt(100, 501), greedy(50), arrival=7, abort=8),
    ]  # fmt: skip
    return jobs


@pytest.fixture(scope="module")
def plain(tiny: Callable[..., str]) -> list[RequestOutput | None]:
    """What plain decoding answers to the workload."""
    with engine(tiny("llama"), None, **ROOMY) as llm:
        return drive(llm, workload())


def test_plain_workload_is_what_it_says(plain: list[RequestOutput | None]) -> None:
    """The workload reaches max_model_len, aborts in mid-flight, and its text is no mere repetition."""
    answered = [(job, output) for job, output in zip(workload(), plain, strict=True) if output]
    lengths = [len(job.prompt) + len(output.outputs[0].token_ids) for job, output in answered]
    assert lengths.count(MAX_MODEL_LEN) >= 3
    assert plain.count(None) == 2
    assert sum(len(set(output.outputs[0].token_ids)) for _, output in answered) > 200


@pytest.mark.parametrize(
    ("drafter", "prefix_caching"),
    [(drafter, bool(number % 2)) for number, drafter in enumerate(DRAFTERS)] + [("native", True), ("int8", False)],
)
def test_equals_plain_decoding(
    drafter: str, prefix_caching: bool, plain: list[RequestOutput | None], tiny: Callable[..., str]
) -> None:
    with engine(tiny("llama"), selfspec(drafter), enable_prefix_caching=prefix_caching, **TIGHT) as llm:
        seen = watch(llm, random_lengths(0, LONGEST))
        got = drive(llm, workload())
    assert texts(got) == texts(plain)
    assert set(range(LONGEST + 1)) >= set(seen.lengths) and len(set(seen.lengths)) > 5
    assert seen.drafted > 100
    assert seen.acceptance == 1.0 if drafter == "native" else 0.05 < seen.acceptance < 1.0
    assert seen.preemptions > 0
    cached = sum(output.num_cached_tokens for output in got if output)
    assert (cached > 0) == prefix_caching
