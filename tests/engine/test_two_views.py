"""A drafter with two views: the scheduler says which one drafts, and learns from each for itself."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from engines import (
    drafter_of,
    engine,
    generate,
    greedy,
    random_lengths,
    random_prompt,
    random_views,
    scheduler_of,
    watch,
)
from vllm import LLM, SamplingParams
from vllm.v1.core.sched.output import SchedulerOutput

from vllm_selfspec.control.policy import Controller, Decision
from vllm_selfspec.drafter.cpu_kernels import own_kernels
from vllm_selfspec.drafter.quantize import FEW_ROWS
from vllm_selfspec.drafter.quantize_rows import TwoViewsLinear
from vllm_selfspec.metrics import PREFIX

pytestmark = pytest.mark.skipif(not own_kernels(), reason="int4 and int8 side by side need the package's kernels")

PROMPTS = [random_prompt(6 + number, 40 + number) for number in range(3)]


@pytest.fixture(scope="module")
def plain(tiny: Callable[..., str]) -> list[list[int]]:
    """What plain decoding answers to the prompts."""
    with engine(tiny("llama")) as llm:
        return generate(llm, PROMPTS, greedy(40))


@pytest.fixture(scope="module")
def adaptive(plain: list[list[int]], tiny: Callable[..., str]) -> Iterator[LLM]:
    """An engine with nothing but the flag."""
    with engine(tiny("llama"), {"num_speculative_tokens": 3}, max_num_seqs=4) as llm:
        yield llm


def runs_of(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """Rows and view of every draft forward from now on."""
    model, seen = drafter_of(llm).model, []
    backbone = model.backbone.forward

    def forward(input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        seen.append((len(input_ids), bool(model._light_runs)))
        return backbone(input_ids, positions)

    monkeypatch.setattr(model.backbone, "forward", forward)
    return seen


def test_the_flag_alone_keeps_both_views_and_times_them(adaptive: LLM) -> None:
    controller = scheduler_of(adaptive)._controller
    assert controller.settings.light_view
    assert controller.times.cost_model.has_light_view
    methods = [getattr(module, "quant_method", None) for module in drafter_of(adaptive).model.modules()]
    kept = [isinstance(getattr(method, "state", None), TwoViewsLinear) for method in methods]
    assert sum(kept) == 4 * 3  # all of four layers but the attention's inputs


def test_each_step_drafts_with_its_view_and_each_view_learns_its_own_acceptance(
    adaptive: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    controller, dice, light = scheduler_of(adaptive)._controller, random.Random(0), random_views(1)
    decided: list[tuple[int, bool]] = []
    observed: list[tuple[int, bool]] = []

    def decide(state: Any) -> Decision:
        choice = {"num_draft_tokens": dice.randint(0, 3), "light": light()}
        decision = replace(Controller.decide(controller, state), times=(), tokens=(), **choice)
        decided.append((decision.num_draft_tokens, bool(decision.light)))
        return decision

    def observe(num_drafted: int, num_accepted: int, request_id: str, light: bool) -> None:
        observed.append((num_drafted, light))
        Controller.observe_acceptance(controller, num_drafted, num_accepted, request_id, light)

    monkeypatch.setattr(controller, "decide", decide)
    monkeypatch.setattr(controller, "observe_acceptance", observe)
    runs = runs_of(adaptive, monkeypatch)
    generate(adaptive, PROMPTS[:1], SamplingParams(temperature=1.0, max_tokens=60, ignore_eos=True))
    assert [view for _, view in runs] == [view for gamma, view in decided for _ in range(gamma)]
    assert len({view for _, view in runs}) == 2
    # what a step verifies was drafted by the step before
    drafts = [(gamma, view) for gamma, view in decided[:-1] if gamma]
    assert len(observed) >= 10
    assert observed == drafts[: len(observed)] and len(drafts) - len(observed) <= 1


def test_the_text_is_that_of_plain_decoding(adaptive: LLM, plain: list[list[int]]) -> None:
    for seed in range(3):
        watch(adaptive, random_lengths(seed, 3), random_views(seed))
        assert generate(adaptive, PROMPTS, greedy(40)) == plain


def test_steps_of_the_light_view_are_counted(adaptive: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def counted() -> float:
        return sum(metric.value for metric in adaptive.get_metrics() if metric.name == PREFIX + "light_steps")

    before, controller = counted(), scheduler_of(adaptive)._controller
    choices: list[bool] = []

    def decide(state: Any) -> Decision:
        choices.append(len(choices) % 3 == 0)
        choice = {"num_draft_tokens": 2, "light": choices[-1]}
        return replace(Controller.decide(controller, state), times=(), tokens=(), **choice)

    monkeypatch.setattr(controller, "decide", decide)
    generate(adaptive, PROMPTS[:1], greedy(30))
    assert sum(choices) - 1 <= counted() - before <= sum(choices)
    assert sum(choices) >= 3


def test_without_a_controller_few_rows_draft_with_the_light_view(
    tiny: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"num_speculative_tokens": 2, "control": {"mode": "fixed"}}
    with engine(tiny("llama"), settings) as llm:
        runs = runs_of(llm, monkeypatch)
        generate(llm, [random_prompt(5, seed) for seed in range(FEW_ROWS + 2)], greedy(8))
        generate(llm, PROMPTS[:1], greedy(8))
    assert {rows for rows, _ in runs} >= {1, FEW_ROWS + 2}
    assert all(light == (rows <= FEW_ROWS) for rows, light in runs)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_one_precision_is_one_view(weights: str, tiny: Callable[..., str]) -> None:
    settings = {"num_speculative_tokens": 3, "drafter": {"weights": weights, "lm_head": weights}}
    with engine(tiny("llama"), settings, max_num_seqs=2) as llm:
        controller = scheduler_of(llm)._controller
        assert not controller.settings.light_view
        assert not controller.times.cost_model.has_light_view


def test_the_choice_travels_with_the_step_to_other_processes() -> None:
    """Workers of their own get vLLM's `SchedulerOutput` pickled, with the field that it does not declare."""
    output = SchedulerOutput.make_empty()
    output.selfspec_light = True
    assert pickle.loads(pickle.dumps(output)).selfspec_light is True
