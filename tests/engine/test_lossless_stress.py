"""Greedy decoding in float32 with selfspec is token for token plain decoding, whatever happens around it.

One workload mixes what changes the batch under the drafter's feet: chunked prefill, shared prefixes, prompts that end
on block boundaries, requests that arrive, finish, stop, are aborted or reach `max_model_len` while others draft, and a
KV cache so small that requests are preempted and resumed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import interpreted_triton
import pytest
from engines import (
    BLOCK,
    Job,
    drafter_of,
    drive,
    engine,
    greedy,
    random_lengths,
    random_prompt,
    random_views,
    skip_without_kernels,
    texts,
    watch,
)
from vllm import RequestOutput, SamplingParams
from vllm.platforms import current_platform

from vllm_selfspec.compat import cpu_sampling
from vllm_selfspec.drafter import cpu_layers, quantize, sampling

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
    "int4_and_int8": {"weights": "int4+int8", "lm_head": "int4+int8"},
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


def with_stops(jobs: Sequence[Job], plain: Sequence[RequestOutput | None]) -> list[Job]:
    """The jobs, the longer ones stopped by a token in the middle of what plain decoding wrote."""
    stopped = []
    for number, (job, output) in enumerate(zip(jobs, plain, strict=True)):
        params = job.params
        if output is not None and len(output.outputs[0].token_ids) > 12 and number % 2:
            params = greedy(params.max_tokens, stop_token_ids=[output.outputs[0].token_ids[6 + number % 5]])
        stopped.append(Job(job.prompt, params, job.arrival, job.abort))
    return stopped


def shaped() -> list[Job]:
    """Greedy requests whose logits are shaped by what was sampled so far."""
    shapes: list[dict[str, Any]] = [
        {"repetition_penalty": 1.5},
        {"presence_penalty": 1.0, "frequency_penalty": 0.5},
        {"frequency_penalty": 2.0},
        {"allowed_token_ids": list(range(3, 60))},
        *({"stop_token_ids": list(range(128)), "min_tokens": minimum} for minimum in (3, 5, 9, 12, 17)),
        {},
    ]
    jobs = [Job(random_prompt(9 + i, 600 + i), greedy(24, **shape), arrival=i) for i, shape in enumerate(shapes)]
    # What bad_words becomes; the tiny checkpoints have no tokenizer. Every token may follow about half of the others.
    # Runner V2 takes 128 of them, so that there the text has 16 tokens only.
    tokens = range(3, 19) if interpreted_triton.on_runner_v2() else range(256)
    jobs[-1].params.allowed_token_ids = list(tokens)
    jobs[-1].params._bad_words_token_ids = [[a, b] for a in tokens for b in tokens if (a * b + b) % 2]
    return jobs


def several() -> list[Job]:
    """Requests with n > 1 through the sampler's random path: with top_k = 1 only the target's best token is left."""
    return [
        Job(random_prompt(length, 700 + length), SamplingParams(n=n, top_k=1, max_tokens=25), arrival=i)
        for i, (length, n) in enumerate([(BLOCK, 3), (50, 2), (7, 4)])
    ]


WORKLOADS: dict[str, Callable[[], list[Job]]] = {"greedy": workload, "shaped": shaped, "several": several}


@pytest.fixture(scope="module")
def plain(tiny: Callable[..., str]) -> dict[str, tuple[list[Job], list[RequestOutput | None]]]:
    """Every workload and what plain decoding answers."""
    with engine(tiny("llama"), None, **ROOMY) as llm:
        runs = {name: (jobs := make(), drive(llm, jobs)) for name, make in WORKLOADS.items()}
        stops = with_stops(*runs["greedy"])
        runs["stops"] = (stops, drive(llm, stops))
    return runs


def test_plain_workload_is_what_it_says(plain: dict[str, tuple[list[Job], list[RequestOutput | None]]]) -> None:
    """The workload reaches max_model_len and stop tokens, aborts in mid-flight, and its text is no mere repetition."""
    jobs, outputs = plain["greedy"]
    lengths = [len(job.prompt) + len(out.outputs[0].token_ids) for job, out in zip(jobs, outputs, strict=True) if out]
    assert lengths.count(MAX_MODEL_LEN) >= 3
    assert outputs.count(None) == 2
    assert sum(len(set(out.outputs[0].token_ids)) for out in outputs if out) > 200
    reasons = [out.outputs[0].finish_reason for out in plain["stops"][1] if out]
    assert reasons.count("stop") >= 5


@pytest.mark.parametrize(
    ("drafter", "prefix_caching"),
    [(drafter, bool(number % 2)) for number, drafter in enumerate(DRAFTERS)] + [("native", True), ("int8", False)],
)
def test_equals_plain_decoding(
    drafter: str,
    prefix_caching: bool,
    plain: dict[str, tuple[list[Job], list[RequestOutput | None]]],
    tiny: Callable[..., str],
) -> None:
    skip_without_kernels(DRAFTERS[drafter])
    with engine(tiny("llama"), selfspec(drafter), enable_prefix_caching=prefix_caching, **TIGHT) as llm:
        for number, (name, (jobs, expected)) in enumerate(plain.items()):
            seen = watch(llm, random_lengths(number, LONGEST), random_views(number))
            got = drive(llm, jobs)
            assert texts(got) == texts(expected), name
            assert set(range(LONGEST + 1)) >= set(seen.lengths) and len(set(seen.lengths)) > 5
            assert seen.drafted > 100
            if drafter == "native" and name in ("greedy", "stops"):
                assert seen.acceptance == 1.0
            elif name == "greedy":
                assert 0.05 < seen.acceptance < 1.0
            if name == "greedy":
                assert seen.preemptions > 0
                cached = sum(output.num_cached_tokens for output in got if output)
                assert (cached > 0) == prefix_caching


# The random lengths above mix all of them for every drafter; here each stays, for one drafter of each kind.
@pytest.mark.parametrize("drafter", ["int8", "exit", "exit_skip_int4"])
def test_equals_plain_decoding_at_every_length(
    drafter: str, plain: dict[str, tuple[list[Job], list[RequestOutput | None]]], tiny: Callable[..., str]
) -> None:
    jobs, expected = plain["greedy"]
    with engine(tiny("llama"), selfspec(drafter), **TIGHT) as llm:
        for gamma in range(1, LONGEST + 1):
            seen = watch(llm, lambda: gamma)  # noqa: B023  # called before the next round
            assert texts(drive(llm, jobs)) == texts(expected), f"{gamma} drafts"
            assert set(seen.lengths) == {gamma}
            assert seen.drafted > 100


@pytest.mark.skipif(not current_platform.is_cpu(), reason="on CPU alone")
def test_equals_plain_decoding_without_the_packages_kernels(
    plain: dict[str, tuple[list[Job], list[RequestOutput | None]]],
    tiny: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On CPUs that they are not for, and where no compiler is. Requests of "several" draw and verify at random."""
    for module in (quantize, sampling, cpu_sampling, cpu_layers):
        monkeypatch.setattr(module, "own_kernels", lambda: "")
    with engine(tiny("llama"), selfspec("int8"), **TIGHT) as llm:
        assert {type(state) for state in drafter_of(llm)._tap._states.values()} == {quantize.CpuInt8Linear}
        for number, name in enumerate(("greedy", "several")):
            jobs, expected = plain[name]
            seen = watch(llm, random_lengths(number, LONGEST))
            assert texts(drive(llm, jobs)) == texts(expected), name
            assert seen.drafted > 100 and 0.05 < seen.acceptance < 1.0, name
