"""Every supported model family drafts for itself and keeps its text: tiny random checkpoints against plain decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import emulated_cuda
import pytest
import torch
from engines import Job, drafter_of, drive, engine, greedy, random_lengths, random_prompt, scheduler_of, texts, watch
from tiny_models import FAMILIES, IN_TRANSFORMERS
from vllm import envs
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform

from vllm_selfspec.config import ConfigError
from vllm_selfspec.control.policy import StepState
from vllm_selfspec.drafter.experts import DrafterExpertsMethod
from vllm_selfspec.drafter.quantize import quantize
from vllm_selfspec.drafter.runner import RUNNER_VARIABLE
from vllm_selfspec.drafter.view import DrafterLinearMethod
from vllm_selfspec.plugin import FIRST_WHOLE_VLLM, older_than

VIEWS: dict[str, dict[str, Any]] = {
    "int8": {"weights": "int8", "lm_head": "int8"},
    "exit": {"weights": "native", "lm_head": "native", "exit_layer": 2},
}
ENGINE = {"max_num_batched_tokens": 64, "disable_hybrid_kv_cache_manager": True}
"""One KV-cache group, also for Gemma 2 with its two kinds of layers."""
JOBS = [Job(random_prompt(length, length), greedy(40), arrival=i) for i, length in enumerate((5, 40, 64, 90))]


@pytest.fixture(scope="module")
def plain(tiny: Callable[..., str]) -> Callable[[str], Any]:
    """What plain decoding answers with a family's checkpoint; decoded once per family."""
    answers: dict[str, Any] = {}

    def decode(family: str) -> Any:
        if family not in answers:
            with engine(tiny(family), **ENGINE) as llm:
                answers[family] = texts(drive(llm, JOBS))
        return answers[family]

    return decode


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("view", VIEWS)
def test_family_equals_plain_decoding(
    family: str, view: str, tiny: Callable[..., str], plain: Callable[[str], Any]
) -> None:
    if family in IN_TRANSFORMERS and older_than("0.32"):
        pytest.skip("refused on this vLLM")
    if family == "gemma2" and emulated_cuda.wanted() and older_than("0.27") and not older_than("0.25"):
        pytest.skip("vLLM 0.25 and 0.26 themselves stop where layers with windows are kept whole on CUDA")
    expected = plain(family)
    settings = {"num_speculative_tokens": 6, "drafter": VIEWS[view], "control": {"mode": "fixed"}}
    with engine(tiny(family), settings, **ENGINE) as llm:
        seen = watch(llm, random_lengths(1, 6))
        assert texts(drive(llm, JOBS)) == expected
        assert seen.drafted > 100
        assert seen.acceptance > (0.6 if view == "int8" else 0.1)
        quantized = [
            name
            for name, module in drafter_of(llm).model.named_modules()
            if isinstance(getattr(module, "quant_method", None), DrafterLinearMethod)
        ]
        if view == "exit":
            assert not quantized
        elif family == "qwen3_moe":
            assert sum("qkv_proj" in name for name in quantized) == 4
            experts = [getattr(part, "quant_method", None) for part in drafter_of(llm).model.modules()]
            by_the_kernel = current_platform.is_cpu() and older_than("0.32")  # vLLM chooses experts inside of it
            own = 0 if by_the_kernel else 4
            assert sum(isinstance(method, DrafterExpertsMethod) for method in experts) == own
        else:
            assert sum("gate_up_proj" in name for name in quantized) == 4
            assert sum("qkv_proj" in name for name in quantized) == 4


def test_ranks_that_draft_together_draft_in_every_step(tiny: Callable[..., str], plain: Callable[[str], Any]) -> None:
    """Under data parallelism a rank must not leave out drafts that the layers of the others wait for."""
    settings = {"num_speculative_tokens": 3, "drafter": VIEWS["exit"], "control": {"mode": "fixed"}}
    lengths = []
    with engine(tiny("llama"), settings, **ENGINE) as llm:
        scheduler = scheduler_of(llm)
        scheduler._ranks_draft_together = True
        schedule = scheduler.schedule

        def scheduled(*args: Any) -> Any:
            output = schedule(*args)
            lengths.append(output.num_spec_tokens_to_schedule)
            return output

        scheduler.schedule = scheduled
        assert texts(drive(llm, JOBS)) == plain("llama")
    # Prompts in pieces, and requests near their last token, among them.
    assert len(lengths) > 20 and set(lengths) == {3}


def test_requests_have_the_whole_batch_for_their_prompts(tiny: Callable[..., str]) -> None:
    """Drafts are a forward pass of their own: they take nothing of the target's."""
    steps = []
    for settings in (None, {"num_speculative_tokens": 3, "drafter": VIEWS["exit"], "control": {"mode": "fixed"}}):
        with engine(tiny("llama"), settings, **ENGINE) as llm:
            scheduler = scheduler_of(llm)
            schedule, counts = scheduler.schedule, []
            scheduler.schedule = lambda *args, s=schedule, c=counts: c.append(s(*args)) or c[-1]
            drive(llm, [Job(random_prompt(16, number), greedy(1)) for number in range(4)])
            steps.append([output.total_num_scheduled_tokens for output in counts if output.total_num_scheduled_tokens])
    assert steps[0] == steps[1] == [64]


def test_a_request_near_its_end_drafts_no_more_than_it_can_use(tiny: Callable[..., str]) -> None:
    """Twelve tokens: one with the prompt, five and five with accepted drafts, and the last one without any."""
    settings = {"num_speculative_tokens": 4, "drafter": {"weights": "native", "lm_head": "native"}}
    with engine(tiny("llama"), settings, **ENGINE) as llm:
        watch(llm, lambda: 4)
        drive(llm, [Job(random_prompt(8, 0), greedy(128))])  # shows that all drafts are accepted
        scheduler = scheduler_of(llm)
        state_of, limits = scheduler._state, []

        def state(output: Any) -> Any:
            limits.append(state_of(output).draft_caps)
            return state_of(output)

        scheduler._state = state
        drive(llm, [Job(random_prompt(8, 1), greedy(12))])
    assert limits == [[], [], [0], [0]]


@pytest.mark.parametrize("lm_head", ["native", "int8"])
def test_a_head_of_another_dtype(lm_head: str, tiny: Callable[..., str]) -> None:
    """`head_dtype` is for the target's head; a quantized one computes in the model's dtype."""
    settings = {"num_speculative_tokens": 3, "drafter": {"weights": "native", "lm_head": lm_head}}
    float32 = {"dtype": "bfloat16", "hf_overrides": {"head_dtype": "float32"}}
    with engine(tiny("llama"), settings | {"control": {"mode": "fixed"}}, **ENGINE, **float32) as llm:
        seen = watch(llm)
        drive(llm, JOBS)
    assert seen.drafted > 100 and seen.acceptance > 0.8


@pytest.mark.skipif(not current_platform.is_cpu(), reason="on CPU alone")
@pytest.mark.parametrize("weights", ["int4", "int4+int8"])
def test_int4_leaves_the_attention_inputs_at_int8(weights: str, tiny: Callable[..., str]) -> None:
    settings = {"drafter": {"weights": weights, "lm_head": "int4"}, "control": {"mode": "fixed"}}
    with engine(tiny("qwen2"), settings) as llm:
        drafter = drafter_of(llm).model
        states = {
            name: module.quant_method.state
            for name, module in drafter.named_modules()
            if isinstance(getattr(module, "quant_method", None), DrafterLinearMethod)
        }
    eight_bits = type(quantize(torch.zeros(64, 64), "int8"))
    for name, state in states.items():
        assert isinstance(state, eight_bits) == ("qkv_proj" in name), name
    assert sum("qkv_proj" in name for name in states) == 4


@pytest.fixture
def told(tiny: Callable[..., str]) -> Iterator[Callable[[Callable[[], int], list[Job]], list[StepState]]]:
    """`told(draft_length, jobs)`: what the policy hears of each step while an engine runs the jobs."""
    settings = {"num_speculative_tokens": 4, "drafter": {"weights": "native", "lm_head": "native"}}
    with engine(tiny("llama"), settings | {"control": {"per_request_batch": 1}}, **ENGINE) as llm:
        scheduler, states = scheduler_of(llm), []
        state_of = scheduler._state

        def state(output: Any) -> StepState:
            states.append(state_of(output))
            return states[-1]

        def run(draft_length: Callable[[], int], jobs: list[Job]) -> list[StepState]:
            states.clear()
            watch(llm, draft_length)
            drive(llm, jobs)
            return list(states)

        scheduler._state = state
        yield run


def test_the_policy_knows_of_prompts_that_are_not_through(told: Callable[..., list[StepState]]) -> None:
    """Drafts that are made now would be verified beside them. Steps have 64 tokens."""
    decoding, prompt, waiting = (
        Job(random_prompt(8, 0), greedy(20)),
        Job(random_prompt(150, 1), greedy(2), arrival=4),
        Job(random_prompt(60, 2), greedy(2), arrival=4),
    )
    steps = told(lambda: 0, [decoding, prompt])[4:7]
    assert [(step.num_decode, step.prefill_tokens) for step in steps] == [(1, 63), (1, 63), (2, 23)]
    assert [step.pending_prefill_tokens for step in steps] == [64, 24, 0]
    assert [len(step.request_ids) for step in steps] == [1, 1, 0]  # told up to `per_request_batch`
    steps = told(lambda: 0, [decoding, prompt, waiting])[4:8]
    assert [step.num_waiting for step in steps] == [1, 1, 0, 0]
    assert [step.pending_prefill_tokens for step in steps] == [64, 64, 21, 0]


def test_a_request_near_the_models_last_position_drafts_no_more_than_it_can_use(
    told: Callable[..., list[StepState]],
) -> None:
    """As with the request's own last token above, behind a prompt in four parts; all drafts are accepted."""
    steps = told(lambda: 4, [Job(random_prompt(256 - 12, 1), greedy(100))])
    assert [step.draft_caps for step in steps] == [[], [], [], [], [], [0], [0]]


@pytest.mark.skipif(not emulated_cuda.wanted(), reason="on CUDA's platform alone")
def test_the_flag_leaves_scheduling_asynchronous(tiny: Callable[..., str]) -> None:
    """As it is without; before vLLM 0.28 draft models were an exception."""
    arguments = EngineArgs(model=tiny(), dtype="float32", skip_tokenizer_init=True)
    for speculative in (None, {"method": "selfspec"}, {"method": "selfspec"}, None):
        arguments.speculative_config = speculative
        assert arguments.create_engine_config().scheduler_config.async_scheduling
    assert arguments.async_scheduling is None
    arguments.speculative_config, arguments.async_scheduling = {"method": "selfspec"}, False
    assert not arguments.create_engine_config().scheduler_config.async_scheduling


@pytest.mark.skipif(not older_than(FIRST_WHOLE_VLLM), reason="not refused")
def test_a_vllm_before_the_first_whole_one_wants_a_gpu_and_runner_v1(
    tiny: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def build() -> None:
        with engine(tiny(), {}):
            pass

    # Not in the environment, of which vLLM keeps what an engine before has read.
    monkeypatch.setitem(vars(envs), RUNNER_VARIABLE, True)
    with pytest.raises(ConfigError, match=f"remove {RUNNER_VARIABLE}"):
        build()
    monkeypatch.delitem(vars(envs), RUNNER_VARIABLE)
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: True)
    with pytest.raises(ConfigError, match="on CPU from vLLM"):
        build()


@pytest.mark.skipif(not older_than("0.32"), reason="attention is in the layers since")
def test_the_transformers_backend_of_an_old_vllm_is_refused(tiny: Callable[..., str]) -> None:
    refused = pytest.raises(ConfigError, match="attention is outside of its layers")
    with refused, engine(tiny("smollm3"), {"drafter": VIEWS["exit"]}, **ENGINE):
        pass
