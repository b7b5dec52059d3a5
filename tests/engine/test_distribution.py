"""Sampling with selfspec has the target's distribution: chi-square against the exact one, computed with transformers.

A model of 16 tokens answers one short prompt thousands of times. The probability of every answer is known exactly, so
the counts of whole answers are compared, not only those of single tokens: an error that depends on what was accepted
before shows as well. The drafters are bad ones, so that rejections are common.
"""

from __future__ import annotations

import inspect
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import interpreted_triton
import pytest
import torch
from engines import drafter_of, engine, random_lengths, random_views, runner_of, skip_without_kernels, watch
from scipy import stats
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from vllm import LLM, SamplingParams
from vllm.platforms import current_platform
from vllm.sampling_params import StructuredOutputsParams

from vllm_selfspec.compat import cpu_sampling
from vllm_selfspec.drafter import proposer, sampling
from vllm_selfspec.drafter.proposer import SelfDraftProposer

VOCABULARY = 16
LENGTH = 4
GPU_LENGTH, GPU_COUNT = 3, 800
PROMPT = (3, 1, 4)
CHECKPOINT: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 64} | {
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
    "gain": 0.7,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "temperature 0.7": {"temperature": 0.7},
    "temperature 1": {"temperature": 1.0},
    "temperature 1.3": {"temperature": 1.3},
    "top-k": {"temperature": 1.0, "top_k": 5},
    "top-p": {"temperature": 1.3, "top_p": 0.8},
    "top-k and top-p": {"temperature": 0.7, "top_k": 9, "top_p": 0.9},
}
DRAFTERS: dict[str, dict[str, Any]] = {
    "exit": {"weights": "native", "lm_head": "native", "exit_layer": 1},
    "int4": {"weights": "int4", "lm_head": "int4"},
    "two views": {"weights": "int4+int8", "lm_head": "int4+int8", "exit_layer": 1},
}
# A test of a true hypothesis fails with this probability; all draws are seeded, so it either does or does not.
SIGNIFICANCE = 1e-3
CERTAINTY = 1e-9


@pytest.fixture(scope="module")
def checkpoint(tiny: Callable[..., str]) -> str:
    return tiny("llama", **CHECKPOINT)


@pytest.fixture(scope="module")
def target(checkpoint: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


@pytest.fixture(scope="module", params=list(DRAFTERS))
def drafting(checkpoint: str, request: pytest.FixtureRequest) -> Iterator[LLM]:
    skip_without_kernels(DRAFTERS[request.param])
    settings = {"num_speculative_tokens": 5, "drafter": DRAFTERS[request.param], "control": {"mode": "fixed"}}
    with engine(checkpoint, settings, max_num_seqs=256, max_model_len=32, num_gpu_blocks_override=600) as llm:
        yield llm


@torch.inference_mode()
def shaped(logits: torch.Tensor, temperature: float, top_k: int = VOCABULARY, top_p: float = 1.0) -> torch.Tensor:
    """[..., V] probabilities after temperature, then top-k, then top-p, in float64."""
    logits = logits.double() / temperature
    kth = logits.topk(top_k, dim=-1).values[..., -1:]
    probs = torch.softmax(logits.masked_fill(logits < kth, -torch.inf), dim=-1)
    ranked, order = probs.sort(dim=-1, descending=True)
    # A token stays while those before it have not reached top_p.
    kept = ranked * (ranked.cumsum(-1) - ranked < top_p)
    probs = torch.zeros_like(probs).scatter(-1, order, kept)
    return probs / probs.sum(-1, keepdim=True)


@torch.inference_mode()
def exact(
    model: PreTrainedModel, setting: dict[str, Any], allowed: Sequence[Sequence[int]] = (), length: int = LENGTH
) -> torch.Tensor:
    """[V] * length probability of every answer, with a token of those that are `allowed` at each place."""
    prefixes = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=length - 1)))
    inputs = torch.cat([torch.tensor(PROMPT).expand(len(prefixes), -1), prefixes], dim=1)
    logits = model(inputs).logits[:, len(PROMPT) - 1 :]
    for place, tokens in enumerate(allowed):
        forbidden = [token for token in range(VOCABULARY) if token not in tokens]
        logits[:, place, forbidden] = -torch.inf
    step = shaped(logits, **setting)  # [V**(length - 1), length, V]
    joint = step[:, length - 1]
    for position in range(length - 1):
        joint = joint * step[:, position].gather(1, prefixes[:, position : position + 1])
    joint = joint.reshape((VOCABULARY,) * length)
    assert abs(float(joint.sum()) - 1) < 1e-9
    return joint


def p_value(answers: Sequence[tuple[int, ...]], joint: torch.Tensor) -> float:
    """Probability of counts at least as far from `joint` as these answers'; rare answers are counted together."""
    counts = torch.zeros_like(joint)
    for answer, count in Counter(answers).items():
        counts[answer] = count
    assert float(counts[joint == 0].sum()) == 0, "an impossible answer"
    expected = joint * len(answers)
    often = expected >= 5
    rest = ~often & (joint > 0)
    observed, wanted = counts[often].tolist(), expected[often].tolist()
    assert len(observed) > 20
    if float(expected[rest].sum()) >= 5:
        observed.append(float(counts[rest].sum()))
        wanted.append(float(expected[rest].sum()))
    else:
        scale = sum(observed) / sum(wanted)
        wanted = [value * scale for value in wanted]
    return float(stats.chisquare(observed, wanted).pvalue)


def sample(
    llm: LLM, settings: Sequence[dict[str, Any]], count: int, length: int = LENGTH
) -> list[list[tuple[int, ...]]]:
    """`count` answers for each of the settings, drawn in one mixed batch."""
    torch.manual_seed(0)
    per_request = 50
    params = [
        SamplingParams(n=per_request, max_tokens=length, **setting)
        for _ in range(count // per_request)
        for setting in settings
    ]
    prompts = [{"prompt_token_ids": list(PROMPT)}] * len(params)
    answers: list[list[tuple[int, ...]]] = [[] for _ in settings]
    for number, output in enumerate(llm.generate(prompts, params, use_tqdm=False)):
        answers[number % len(settings)] += [tuple(sample.token_ids) for sample in output.outputs]
    return answers


@pytest.mark.parametrize("setting", ["temperature 1", "top-k"])
def test_distribution(setting: str, drafting: LLM, target: PreTrainedModel) -> None:
    """All requests alike, the same number of drafts in every step."""
    seen = watch(drafting, lambda: LENGTH - 1, random_views(2))
    (answers,) = sample(drafting, [SETTINGS[setting]], 12_000)
    assert p_value(answers, exact(target, SETTINGS[setting])) > SIGNIFICANCE
    assert 0.2 < seen.acceptance < 0.9


@pytest.mark.skipif(not interpreted_triton.wanted(), reason="needs runner V2 or CUDA's platform, and no GPU")
def test_distribution_on_runners_for_gpus(checkpoint: str, target: PreTrainedModel) -> None:
    """Other code draws and verifies drafts there. Interpreted, a sample takes 0.2 s: fewer and shorter answers."""
    settings = {"num_speculative_tokens": 2, "drafter": DRAFTERS["exit"], "control": {"mode": "fixed"}}
    with engine(checkpoint, settings, max_num_seqs=64, max_model_len=32) as llm:
        assert isinstance(drafter_of(llm), SelfDraftProposer) != interpreted_triton.on_runner_v2()
        seen = watch(llm, lambda: GPU_LENGTH - 1)
        (answers,) = sample(llm, [SETTINGS["temperature 1"]], GPU_COUNT, GPU_LENGTH)
    assert p_value(answers, exact(target, SETTINGS["temperature 1"], length=GPU_LENGTH)) > SIGNIFICANCE
    assert 0.2 < seen.acceptance < 0.9


def test_distribution_of_mixed_batches(drafting: LLM, target: PreTrainedModel) -> None:
    """All settings and greedy requests in one batch, with changing draft lengths."""
    seen = watch(drafting, random_lengths(3, 5), random_views(3))
    *answers, greedy = sample(drafting, [*SETTINGS.values(), {"temperature": 1.0, "top_k": 1}], 4_000)
    for (name, setting), mine in zip(SETTINGS.items(), answers, strict=True):
        assert p_value(mine, exact(target, setting)) > SIGNIFICANCE, name
    assert len(set(greedy)) == 1
    assert 0.1 < seen.acceptance < 0.9
    assert len(set(seen.lengths)) == 6


@pytest.mark.skipif(interpreted_triton.wanted(), reason="of runner V1 on CPU; interpreted, a sample takes 0.2 s")
def test_distribution_of_drafts_older_than_the_last_proposal(checkpoint: str, target: PreTrainedModel) -> None:
    """Steps too small for all requests: some wait with their drafts, of which the probabilities are gone by then."""
    settings = {"num_speculative_tokens": 3, "drafter": DRAFTERS["exit"], "control": {"mode": "fixed"}}
    small = {"max_num_seqs": 4, "max_num_batched_tokens": 8, "max_model_len": 32}
    with engine(checkpoint, settings, **small) as llm:
        sampler, old = runner_of(llm).rejection_sampler, []
        verify = sampler.forward

        def forward(metadata: Any, draft_probs: torch.Tensor | None, *rest: Any) -> Any:
            old.append(draft_probs is None and sum(metadata.num_draft_tokens) > 0)
            return verify(metadata, draft_probs, *rest)

        sampler.forward = forward
        seen = watch(llm, random_lengths(3, 3))
        (answers,) = sample(llm, [SETTINGS["temperature 1"]], 1_500)
    assert sum(old) > 50
    assert p_value(answers, exact(target, SETTINGS["temperature 1"])) > SIGNIFICANCE
    assert 0.1 < seen.acceptance < 0.9


@pytest.mark.skipif(not current_platform.is_cpu(), reason="on CPU alone")
def test_distribution_without_the_packages_kernels(
    drafting: LLM, target: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawn and verified by PyTorch's operations, as where the kernels cannot be built."""
    for module in (sampling, cpu_sampling):
        monkeypatch.setattr(module, "own_kernels", lambda: "")
    watch(drafting, random_lengths(5, 5), random_views(5))
    name = "temperature 0.7"
    answers, _greedy = sample(drafting, [SETTINGS[name], {"temperature": 1.0, "top_k": 1}], 3_000)
    assert p_value(answers, exact(target, SETTINGS[name])) > SIGNIFICANCE


def test_distribution_of_seeded_requests(drafting: LLM, target: PreTrainedModel) -> None:
    """Every request draws from a generator of its own, drafts included."""
    watch(drafting, lambda: LENGTH - 1)
    settings = [{"temperature": 1.0, "seed": 1000 * number} for number in range(120)]
    answers = [answer for answers in sample(drafting, settings, 50) for answer in answers]
    assert len(answers) == 6_000
    assert p_value(answers, exact(target, SETTINGS["temperature 1"])) > SIGNIFICANCE


def test_seeds_repeat(drafting: LLM) -> None:
    """The same seed gives the same answer in a repeated run, another seed another one."""
    watch(drafting)

    def run(seed: int) -> list[tuple[int, ...]]:
        params = SamplingParams(n=20, temperature=1.0, max_tokens=20, seed=seed)
        (output,) = drafting.generate([{"prompt_token_ids": list(PROMPT)}], params, use_tqdm=False)
        return [tuple(sample.token_ids) for sample in output.outputs]

    first = run(5)
    torch.manual_seed(123)
    assert run(5) == first
    assert len(set(first)) == 20
    assert not set(first) & set(run(6000))


def test_distribution_under_a_grammar(checkpoint: str, target: PreTrainedModel, tmp_path: Path) -> None:
    """The drafter knows no grammar: where a draft breaks it, the token there comes from the residual, not from p."""
    length, count = (GPU_LENGTH, GPU_COUNT) if interpreted_triton.wanted() else (LENGTH, 12_000)
    letters = "abcdefghijklmnop"
    backend = Tokenizer(models.WordLevel({letter: token for token, letter in enumerate(letters)}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="p").save_pretrained(tmp_path)
    pattern, allowed = "", []
    for place in range(length):
        allowed.append([token for token in range(VOCABULARY - 1) if (token + place) % 3])
        pattern += "[" + "".join(letters[token] for token in allowed[-1]) + "]"
    drafter = {"num_speculative_tokens": 5, "drafter": DRAFTERS["exit"], "control": {"mode": "fixed"}}
    sizes = {"max_num_seqs": 256, "max_model_len": 32, "num_gpu_blocks_override": 600}
    tokenizer = {"skip_tokenizer_init": False, "tokenizer": str(tmp_path)}
    with engine(checkpoint, drafter, **sizes, **tokenizer) as llm:
        seen = watch(llm, lambda: length - 1)
        grammar = {"structured_outputs": StructuredOutputsParams(regex=pattern)}
        (answers,) = sample(llm, [SETTINGS["temperature 1"] | grammar], count, length)
    assert p_value(answers, exact(target, SETTINGS["temperature 1"], allowed, length)) > SIGNIFICANCE
    assert 0.2 < seen.acceptance < 0.9


def test_logprobs_are_the_targets(drafting: LLM, target: PreTrainedModel) -> None:
    """Logprobs of accepted, corrected and bonus tokens alike."""
    seen = watch(drafting, random_lengths(4, 5))
    params = SamplingParams(n=60, temperature=1.0, max_tokens=20, seed=0, logprobs=3)
    (output,) = drafting.generate([{"prompt_token_ids": list(PROMPT)}], params, use_tqdm=False)
    for answer in output.outputs:
        tokens = [*PROMPT, *answer.token_ids]
        with torch.inference_mode():
            expected = torch.log_softmax(target(torch.tensor([tokens])).logits[0].double(), dim=-1)
        assert len(answer.logprobs) == len(answer.token_ids)
        for position, logprobs in enumerate(answer.logprobs):
            row = expected[len(PROMPT) + position - 1]
            assert answer.token_ids[position] in logprobs
            assert set(row.topk(3).indices.tolist()) <= logprobs.keys()
            for token, logprob in logprobs.items():
                assert logprob.logprob == pytest.approx(float(row[token]), abs=1e-4)
    assert 0.1 < seen.acceptance < 0.9


def test_chi_square_tells_the_drafter_from_the_target(target: PreTrainedModel, checkpoint: str) -> None:
    early = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    early.model.layers = early.model.layers[:1]
    setting = SETTINGS["temperature 1"]
    generator = torch.Generator().manual_seed(0)

    def draw(joint: torch.Tensor, count: int = 6_000) -> list[tuple[int, ...]]:
        picked = torch.multinomial(joint.flatten(), count, replacement=True, generator=generator)
        return [tuple(int(i) for i in torch.unravel_index(number, joint.shape)) for number in picked]

    joint = exact(target, setting)
    assert p_value(draw(joint), joint) > SIGNIFICANCE
    assert p_value(draw(exact(early, setting)), joint) < CERTAINTY
    # A temperature that is 5 % off is no longer the target's distribution either.
    assert p_value(draw(exact(target, {"temperature": 1.05})), joint) < SIGNIFICANCE
    # The few that runners for GPUs are judged by are enough for that, too.
    short = exact(early, setting, length=GPU_LENGTH)
    assert p_value(draw(short, GPU_COUNT), exact(target, setting, length=GPU_LENGTH)) < CERTAINTY


def test_chi_square_sees_a_drafter_that_misreports_its_distribution(
    drafting: LLM, target: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drafts that are not drawn from the q that the rejection sampler gets."""
    drafter = drafter_of(drafting)
    if not isinstance(drafter, SelfDraftProposer):
        misreport_on_v2(drafter, monkeypatch)
    else:
        misreport_on_v1(monkeypatch)
    watch(drafting, lambda: LENGTH - 1)
    (answers,) = sample(drafting, [SETTINGS["temperature 1"]], 12_000)
    assert p_value(answers, exact(target, SETTINGS["temperature 1"])) < CERTAINTY


SHARPER = 1.5
"""What logits are multiplied with to draw drafts, and are not when their distribution is told."""


def misreport_on_v1(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = proposer.sample_drafts

    def sharper(logits: torch.Tensor, *rest: Any) -> torch.Tensor:
        tokens = honest(logits * SHARPER, *rest)
        honest(logits, *rest)  # leaves its own probabilities
        return tokens

    monkeypatch.setattr(proposer, "sample_drafts", sharper)


def misreport_on_v2(drafter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    logits_of, honest = drafter.compute_draft_logits, drafter.sample_draft
    inputs = list(inspect.signature(honest).parameters)

    def sharper(*arguments: Any) -> torch.Tensor:
        tokens = honest(*arguments)
        given = dict(zip(inputs, arguments, strict=False))
        rows = given["idx_mapping"][given["idx_mapping"] >= 0]
        given["draft_logits"][rows, given["draft_step"]] /= SHARPER  # as if they were those drawn from
        return tokens

    monkeypatch.setattr(drafter, "compute_draft_logits", lambda *arguments: logits_of(*arguments) * SHARPER)
    monkeypatch.setattr(drafter, "sample_draft", sharper)
