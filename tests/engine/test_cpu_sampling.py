"""Sampling kernels for CPUs against float64, and the verification that is made of them against vLLM's tensors."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.sample.logits_processor.builtin import MinTokensLogitsProcessor
from vllm.v1.sample.logits_processor.state import LogitsProcessors
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

from vllm_selfspec.compat import cpu_sampling
from vllm_selfspec.drafter import sampling
from vllm_selfspec.drafter.cpu_kernels import own_kernels

pytestmark = pytest.mark.skipif(not own_kernels(), reason="no kernels of the package for this CPU")

SHAPES = [(1, 7), (3, 512), (2, 513), (5, 5000)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def logits_of(rows: int, tokens: int, dtype: torch.dtype) -> torch.Tensor:
    """[rows, tokens] with great, small and forbidden entries, rows of a wider tensor as a padded vocabulary gives."""
    generator = torch.Generator().manual_seed(rows * tokens)
    wide = 8 * torch.randn(rows, tokens + 5, generator=generator)
    wide[:, 1::7] = float("-inf")
    wide[0, 0], wide[-1, 2] = 60.0, -1e4
    wide[:, tokens:] = 1e4
    return wide.to(dtype)[:, :tokens]


def temperatures(rows: int) -> torch.Tensor:
    return torch.linspace(0.3, 2.0, rows)


@pytest.mark.parametrize(("rows", "tokens"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax(rows: int, tokens: int, dtype: torch.dtype) -> None:
    logits, temperature = logits_of(rows, tokens, dtype), temperatures(rows)
    out = torch.full((rows, 3, tokens), -1.0)
    sampling.softmax(logits, temperature, out[:, 1])
    exact = (logits.double() / temperature.double()[:, None]).softmax(dim=-1)
    torch.testing.assert_close(out[:, 1].double(), exact, rtol=1e-5, atol=1e-37)
    assert (out[:, 1][logits == float("-inf")] == 0).all()
    assert (out[:, 0] == -1).all() and (out[:, 2] == -1).all()
    for row in range(rows):  # the others do not matter, to the bit
        alone = torch.empty(1, tokens)
        sampling.softmax(logits[row : row + 1], temperature[row : row + 1], alone)
        assert torch.equal(alone[0], out[row, 1])


@pytest.mark.parametrize(("rows", "tokens"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_token_probs_are_those_of_softmax(rows: int, tokens: int, dtype: torch.dtype) -> None:
    logits = logits_of(rows, tokens, dtype)
    which = torch.arange(rows).repeat(2).flip(0)
    drafts = torch.arange(2 * rows) * 31 % tokens
    temperature = temperatures(2 * rows)
    found = torch.ops.selfspec_cpu.token_probs(logits, which, drafts, temperature)
    out = torch.empty(2 * rows, tokens)
    sampling.softmax(logits[which], temperature, out)
    torch.testing.assert_close(found, out.gather(1, drafts[:, None])[:, 0], rtol=1e-6, atol=0)


@pytest.mark.parametrize(("rows", "tokens"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_argmax_is_the_first_of_the_greatest(rows: int, tokens: int, dtype: torch.dtype) -> None:
    logits = logits_of(rows, tokens, dtype)
    logits[:, tokens // 2] = logits[:, -1] = 100.0
    logits[-1, 0] = 100.0
    which = torch.arange(rows).flip(0)
    expected = torch.full((rows,), tokens // 2)
    expected[0] = 0
    assert torch.equal(torch.ops.selfspec_cpu.argmax_rows(logits, which), expected)
    assert torch.equal(sampling.argmax(logits), expected.flip(0))


def test_threads_do_not_matter() -> None:
    logits, before = logits_of(1, 5000, torch.bfloat16), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(torch.empty(1, 5000))
            sampling.softmax(logits, torch.ones(1), found[-1])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_what_is_not_there_is_refused() -> None:
    logits, one = torch.zeros(2, 8), torch.ones(1)
    for row, token in ((2, 0), (-1, 0), (0, 8), (0, -1)):
        with pytest.raises(RuntimeError, match="no such row, token"):
            torch.ops.selfspec_cpu.token_probs(logits, torch.tensor([row]), torch.tensor([token]), one)
    with pytest.raises(RuntimeError, match="no such row"):
        torch.ops.selfspec_cpu.argmax_rows(logits, torch.tensor([2]))
    with pytest.raises(RuntimeError, match="temperature must be"):
        torch.ops.selfspec_cpu.softmax(logits, one, torch.empty(2, 8))
    with pytest.raises(RuntimeError, match="of the shape of logits"):
        torch.ops.selfspec_cpu.softmax(logits, torch.ones(2), torch.empty(2, 9))


@pytest.mark.parametrize("rows", [1, 3])
def test_what_is_no_number_has_no_probability(rows: int) -> None:
    """It must not hide the greatest logit of those beside it either."""
    logits = torch.zeros(rows, 2000)
    logits[:, 8], logits[:, 16], logits[:, 24] = 200.0, float("nan"), 3.0  # one after another in one lane
    probs = torch.empty_like(logits)
    torch.ops.selfspec_cpu.softmax(logits, torch.ones(rows), probs)
    assert torch.equal(probs, torch.nn.functional.one_hot(torch.full((rows,), 8), 2000).float())


def test_weights_that_are_no_numbers_give_a_token_of_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """One past it, as once without the package's kernels, ends the engine."""
    weights, u = torch.full((2, 8), float("nan")), torch.tensor([0.0, 0.9], dtype=torch.float64)
    assert (sampling.inverse_cdf(weights, u) < 8).all()
    monkeypatch.setattr(sampling, "own_kernels", lambda: "")
    assert (sampling.inverse_cdf(weights, u) < 8).all()


def test_a_draft_that_the_target_rules_out_is_never_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even at a random number of 0, which comes up once in 2^53."""
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.zeros(*shape, dtype=torch.float64))
    logits = torch.tensor([[0.0, -torch.inf], [0.0, -torch.inf]])
    metadata: Any = SimpleNamespace(
        draft_token_ids=torch.tensor([1]),
        num_draft_tokens=[1],
        max_spec_len=1,
    )
    settings = sampling_metadata(temperature=torch.ones(1), all_random=True)
    target = cpu_sampling.ProcessedLogits(logits[:1], torch.zeros(1), cpu_sampling.RejectionScratch())
    q = torch.tensor([[0.5, 0.5]])
    assert cpu_sampling.rejection_sample(metadata, q, target, settings).tolist() == [[0, -1]]


def sampling_metadata(**fields: Any) -> SamplingMetadata:
    """Three requests, of which the last is greedy, with nothing but temperatures unless `fields` say more."""
    none = torch.empty(0)
    plain: dict[str, Any] = {
        "temperature": torch.tensor([0.7, 1.0, 0.0]),
        "all_greedy": False,
        "all_random": False,
        "top_p": None,
        "top_k": None,
        "generators": {},
        "max_num_logprobs": None,
        "no_penalties": True,
        "prompt_token_ids": None,
        "frequency_penalties": none,
        "presence_penalties": none,
        "repetition_penalties": none,
        "output_token_ids": [[], [], []],
        "allowed_token_ids_mask": None,
        "bad_words_token_ids": {},
        "logitsprocs": LogitsProcessors([]),
    }
    return SamplingMetadata(**(plain | fields))


def test_logits_are_read_as_vllms_tensors_would_be() -> None:
    logits = logits_of(8, 600, torch.bfloat16)
    counts, target_rows, bonus_rows = [2, 0, 3], torch.tensor([0, 1, 4, 5, 6]), torch.tensor([2, 3, 7])
    drafts = torch.tensor([3, 500, 0, 14, 599])
    metadata: Any = SimpleNamespace(
        target_logits_indices=target_rows.int(), bonus_logits_indices=bonus_rows.int(), num_draft_tokens=counts
    )
    settings = sampling_metadata()
    found = cpu_sampling.Logits(metadata, logits, settings, sampling.Scratch())
    divisors = torch.tensor([0.7, 0.7, 1.0, 1.0, 1.0])
    processed = logits[target_rows].float() / divisors[:, None]
    expected = cpu_sampling.ProcessedLogits(processed, torch.zeros(3), cpu_sampling.RejectionScratch())
    assert torch.equal(found.best(), expected.best())
    torch.testing.assert_close(found.prob(drafts), expected.prob(drafts), rtol=1e-5, atol=1e-37)
    some = torch.tensor([4, 1])
    torch.testing.assert_close(found.probs(some), expected.probs(some), rtol=1e-5, atol=1e-37)
    assert found.bonus(torch.tensor([2]))[0] == logits[7].float().argmax()
    drawn = torch.stack([found.bonus(torch.tensor([0, 1])) for _ in range(300)])
    for request, row, temperature in ((0, 2, 0.7), (1, 3, 1.0)):
        probs = (logits[row].double() / temperature).softmax(dim=-1)
        assert (probs[drawn[:, request]] > 1e-6).all()
        likeliest = probs.argmax()
        share = (drawn[:, request] == likeliest).double().mean()
        assert abs(share - probs[likeliest]) < 4 * (0.25 / 300) ** 0.5


def min_tokens(active: bool) -> LogitsProcessors:
    processor = MinTokensLogitsProcessor(None, torch.device("cpu"), False)
    processor.min_toks = {0: (3, [7], {1}, False)} if active else {}
    return LogitsProcessors([processor])


@pytest.mark.parametrize(
    "fields",
    [
        {"top_p": torch.ones(3)},
        {"top_k": torch.ones(3, dtype=torch.int32)},
        {"no_penalties": False},
        {"allowed_token_ids_mask": torch.zeros(3, 8, dtype=torch.bool)},
        {"bad_words_token_ids": {0: [[1]]}},
        {"logitsprocs": min_tokens(True)},
        {"thinking_budget_state_holder": SimpleNamespace(has_tracked_requests=lambda: True)},
    ],
)
def test_what_shapes_a_distribution_goes_the_long_way(fields: dict[str, Any]) -> None:
    assert cpu_sampling.only_temperature(sampling_metadata())
    assert cpu_sampling.only_temperature(sampling_metadata(logitsprocs=min_tokens(False)))
    assert not cpu_sampling.only_temperature(sampling_metadata(**fields))


def test_plain_steps_draw_from_the_logits_as_they_are() -> None:
    """In an engine of selfspec, and where nothing else is asked for."""
    sampler, logits = Sampler(), logits_of(3, 600, torch.bfloat16)
    asked: list[SamplingMetadata] = []

    def original(self: Sampler, logits: torch.Tensor, metadata: SamplingMetadata) -> str:
        asked.append(metadata)
        return "vLLM's"

    def forward(metadata: SamplingMetadata) -> Any:
        return cpu_sampling.sampler_forward(original, sampler, logits, metadata)

    assert forward(sampling_metadata()) == "vLLM's"
    sampler.topk_topp_sampler.selfspec_scratch = sampling.Scratch()
    for fields in ({"max_num_logprobs": 0}, {"logprob_token_ids": {0: [1]}}, {"top_k": torch.ones(3)}):
        assert forward(sampling_metadata(**fields)) == "vLLM's"
    assert len(asked) == 4
    drawn = torch.stack([forward(sampling_metadata()).sampled_token_ids for _ in range(400)])
    assert drawn.shape == (400, 3, 1) and drawn.dtype == torch.int32
    assert (drawn[:, 2] == logits[2].float().argmax()).all()
    for row, temperature in ((0, 0.7), (1, 1.0)):
        probs = (logits[row].double() / temperature).softmax(dim=-1)
        seen = drawn[:, row, 0].bincount(minlength=600).double() / 400
        assert (seen - probs).abs().max() < 4 * (0.25 / 400) ** 0.5
    assert len(drawn[:, 1].unique()) > 5
    seeded = [forward(sampling_metadata(generators={1: torch.Generator().manual_seed(7)})) for _ in range(5)]
    assert len({int(output.sampled_token_ids[1, 0]) for output in seeded}) == 1
