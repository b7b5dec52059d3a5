"""vLLM 0.32 on CPU draws one random number per vocabulary entry for every request of a batch, and then another one.

Symptom: at a vocabulary of 150,000 sampling takes 1.5 ms per request and step, and with a speculative config 3.5 ms
more, in steps without drafts, too; verifying 16 requests of three drafts each touches 30,000 new pages in every step.
Cause: tokens are drawn by Gumbel noise on every logit. The rejection sampler adds a recovered token for each draft,
because a GPU cannot know without a synchronisation which drafts are rejected; its noise is drawn even when there is no
draft at all. And glibc gives the tensors of a verification, tens of MiB each, back to the system after every step.
Mend: tokens are drawn by inverting the cumulative distribution (float64) at one uniform number, and recovered tokens
only where a draft was rejected; the large tensors are kept. Where nothing but a temperature shapes a distribution there
are none: `csrc/cpu_sampling.cpp` reads the logits as the model leaves them, a row at a time. The rule is the same
(Leviathan et al., arXiv 2211.17192: accept x with probability min(1, p(x) / q(x)), else draw from max(p - q, 0)), and
so is the distribution; the random numbers are others than vLLM's own. What asks for processed log-probabilities,
drafters without probabilities and synthetic acceptance run vLLM's functions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample import rejection_sampler
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import (
    LogitBiasLogitsProcessor,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler, apply_top_k_top_p
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.sample.sampler import Sampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from vllm_selfspec.drafter.cpu_kernels import own_kernels
from vllm_selfspec.drafter.sampling import (
    Scratch,
    argmax,
    divisors,
    draw,
    inverse_cdf,
    seeds_of,
    softmax,
    uniforms,
)

PLACEHOLDER = -1
"""What vLLM puts behind a request's last token."""


class RejectionScratch:
    """The large tensors of one engine's verification, kept from step to step."""

    def __init__(self) -> None:
        self.gathered, self.raw, self.processed, self.probs = Scratch(), Scratch(), Scratch(), Scratch()


def forward(
    original: Callable[..., SamplerOutput],
    self: RejectionSampler,
    metadata: SpecDecodeMetadata,
    draft_probs: torch.Tensor | None,
    logits: torch.Tensor,
    sampling_metadata: SamplingMetadata,
) -> SamplerOutput:
    """vLLM's `RejectionSampler.forward` for B requests with N drafts in all.

    Args:
        metadata: the drafts, and which rows of `logits` belong to them.
        draft_probs: [N, V] float32, what the drafts were drawn from; None where all requests are greedy.
        logits: [N + B, V] the target's.

    Returns:
        [B, γ + 1] tokens: accepted drafts, then a recovered or the bonus token, then placeholders. Log-probabilities
        where a request wants them.
    """
    scratch: RejectionScratch | None = getattr(self, "selfspec_scratch", None)  # None in vLLM's own engines
    drafts = metadata.draft_token_ids.shape[0]
    if (
        scratch is None
        or (drafts and draft_probs is None and not sampling_metadata.all_greedy)
        or self.synthetic_mode
        or self.is_processed_logprobs_mode
    ):
        return original(self, metadata, draft_probs, logits, sampling_metadata)
    if sampling_metadata.all_greedy:
        draft_probs = None  # some may be left from a step in which others sampled
    wanted = sampling_metadata.max_num_logprobs

    def raw_logits(rows: torch.Tensor) -> torch.Tensor:
        gathered = scratch.gathered.take((len(rows), logits.shape[1]), logits.dtype)
        torch.index_select(logits, 0, rows, out=gathered)
        return scratch.raw.take(gathered.shape, torch.float32).copy_(gathered)

    if own_kernels() and only_temperature(sampling_metadata):
        target: Target = Logits(metadata, logits, sampling_metadata, scratch.probs)
        tokens = rejection_sample(metadata, draft_probs, target, sampling_metadata)
        if wanted is None:
            return SamplerOutput(sampled_token_ids=tokens, logprobs_tensors=None)
        raw, bonus_logits = raw_logits(metadata.target_logits_indices), logits[metadata.bonus_logits_indices]
    else:
        bonus = self.sampler(
            logits=logits[metadata.bonus_logits_indices],
            sampling_metadata=replace(sampling_metadata, max_num_logprobs=None if wanted is None else -1),
            predict_bonus_token=True,
            logprobs_mode_override="raw_logits",
        )
        raw = raw_logits(metadata.target_logits_indices)
        processed = raw if wanted is None else scratch.processed.take(raw.shape, torch.float32).copy_(raw)
        processed = self.apply_logits_processors(processed, sampling_metadata, metadata)
        processed = rejection_sampler.apply_sampling_constraints(
            processed, metadata.cu_num_draft_tokens, sampling_metadata
        )
        target = ProcessedLogits(processed, bonus.sampled_token_ids[:, 0], scratch)
        tokens = rejection_sample(metadata, draft_probs, target, sampling_metadata)
        if wanted is None:
            return SamplerOutput(sampled_token_ids=tokens, logprobs_tensors=None)
        bonus_logits = bonus.logprobs_tensors.logprobs
    logprobs = self._get_logprobs_tensors(wanted, metadata, logits, raw, bonus_logits, tokens)
    return SamplerOutput(sampled_token_ids=tokens, logprobs_tensors=logprobs)


def only_temperature(metadata: SamplingMetadata) -> bool:
    """True where nothing but its temperature stands between a request's logits and its distribution."""
    holder = metadata.thinking_budget_state_holder
    processors = metadata.logitsprocs
    return (
        metadata.top_k is None
        and metadata.top_p is None
        and metadata.no_penalties
        and not metadata.bad_words_token_ids
        and metadata.allowed_token_ids_mask is None
        and not (holder is not None and holder.has_tracked_requests())
        and all(map(_idle, (*processors.argmax_invariant, *processors.non_argmax_invariant)))
    )


def _idle(processor: LogitsProcessor) -> bool:
    """True where no request asks for this processor."""
    if isinstance(processor, MinTokensLogitsProcessor):
        return not processor.min_toks
    if isinstance(processor, LogitBiasLogitsProcessor):
        return not processor.biases
    return isinstance(processor, MinPLogitsProcessor) and not processor.min_p_count


class Target(ABC):
    """The target's distributions behind N drafts of B requests, and behind the last draft of each."""

    @abstractmethod
    def best(self) -> torch.Tensor:
        """[N] int64 the likeliest tokens."""

    @abstractmethod
    def prob(self, drafts: torch.Tensor) -> torch.Tensor:
        """[N] float32 probabilities of the drafts [N]; not asked for where all requests are greedy."""

    @abstractmethod
    def probs(self, rows: torch.Tensor) -> torch.Tensor:
        """[R, V] float32 the distributions in the place of drafts `rows` [R]; asked for after `prob`."""

    @abstractmethod
    def bonus(self, requests: torch.Tensor) -> torch.Tensor:
        """[R] tokens behind the last draft of `requests` [R]."""


class ProcessedLogits(Target):
    """From logits [N, V] float32 after temperature, top-k and top-p, and the bonus tokens [B]."""

    def __init__(self, logits: torch.Tensor, bonus_token_ids: torch.Tensor, scratch: RejectionScratch) -> None:
        self._logits, self._bonus, self._scratch = logits, bonus_token_ids, scratch

    def best(self) -> torch.Tensor:
        return self._logits.argmax(dim=-1)

    def prob(self, drafts: torch.Tensor) -> torch.Tensor:
        self._probs = self._scratch.probs.take(self._logits.shape, torch.float32)
        torch.softmax(self._logits, dim=-1, out=self._probs)
        return self._probs.gather(1, drafts[:, None])[:, 0]

    def probs(self, rows: torch.Tensor) -> torch.Tensor:
        return self._probs[rows]

    def bonus(self, requests: torch.Tensor) -> torch.Tensor:
        return self._bonus[requests]


class Logits(Target):
    """From the model's own logits [N + B, V], of which each is read once and few are written anywhere."""

    def __init__(
        self, metadata: SpecDecodeMetadata, logits: torch.Tensor, sampling: SamplingMetadata, scratch: Scratch
    ) -> None:
        self._logits, self._sampling, self._scratch = logits, sampling, scratch
        self._rows, self._bonus_rows = metadata.target_logits_indices.long(), metadata.bonus_logits_indices.long()
        if not sampling.all_greedy:
            assert sampling.temperature is not None
            lengths = torch.tensor(metadata.num_draft_tokens)
            self._temperature = divisors(sampling.temperature).repeat_interleave(lengths)

    def best(self) -> torch.Tensor:
        return argmax(self._logits, self._rows)

    def prob(self, drafts: torch.Tensor) -> torch.Tensor:
        return torch.ops.selfspec_cpu.token_probs(self._logits, self._rows, drafts, self._temperature)

    def probs(self, rows: torch.Tensor) -> torch.Tensor:
        out = self._scratch.take((len(rows), self._logits.shape[1]), torch.float32)
        softmax(self._logits[self._rows[rows]], self._temperature[rows], out)
        return out

    def bonus(self, requests: torch.Tensor) -> torch.Tensor:
        return sample_requests(self._logits[self._bonus_rows[requests]], requests, self._sampling, self._scratch)


def sample_requests(
    logits: torch.Tensor, requests: torch.Tensor, sampling: SamplingMetadata, scratch: Scratch
) -> torch.Tensor:
    """[R] int64 tokens of `requests` [R] out of B, from what their logits [R, V] are at their temperatures."""
    if sampling.all_greedy:
        return argmax(logits)
    assert sampling.temperature is not None
    probs = scratch.take(tuple(logits.shape), torch.float32)
    seeded = seeds_of(requests, sampling.generators)
    return draw(logits, sampling.temperature[requests], sampling.all_random, seeded, probs)


def rejection_sample(
    metadata: SpecDecodeMetadata,
    draft_probs: torch.Tensor | None,
    target: Target,
    sampling_metadata: SamplingMetadata,
) -> torch.Tensor:
    """Accept drafts or replace them.

    Args:
        metadata, draft_probs: as of `forward`.

    Returns:
        [B, γ + 1] int32 tokens.
    """
    draft_token_ids, num_draft_tokens = metadata.draft_token_ids, metadata.num_draft_tokens
    batch_size = len(num_draft_tokens)
    if not len(draft_token_ids):
        return target.bonus(torch.arange(batch_size)).int()[:, None]
    lengths = torch.tensor(num_draft_tokens)
    request = torch.arange(batch_size).repeat_interleave(lengths)  # [N]
    first = lengths.cumsum(0) - lengths  # [B] row of each request's first draft
    step = torch.arange(len(request)) - first[request]  # [N]
    drafts = draft_token_ids.long()

    generators = sampling_metadata.generators
    greedy = None
    if not sampling_metadata.all_random:
        best = target.best()  # [N]
    if draft_probs is None:
        accept = drafts == best
    else:
        p = target.prob(drafts)
        q = draft_probs.gather(1, drafts[:, None])[:, 0]
        u = torch.rand(len(request), dtype=torch.float64)
        for row, generator in generators.items():
            u[request == row] = torch.rand(num_draft_tokens[row], dtype=torch.float64, generator=generator)
        accept = u * q < p  # not where p is 0; where p = q always, as u < 1
        if not sampling_metadata.all_random:
            assert sampling_metadata.temperature is not None
            greedy = sampling_metadata.temperature == 0
            accept = torch.where(greedy[request], drafts == best, accept)

    table = torch.zeros(batch_size, metadata.max_spec_len, dtype=torch.int64)
    table[request, step] = accept.long()
    accepted = table.cumprod(dim=1).sum(dim=1)  # [B] drafts accepted before the first rejection
    output = torch.full((batch_size, metadata.max_spec_len + 1), PLACEHOLDER, dtype=torch.int32)
    kept = step < accepted[request]
    output[request[kept], step[kept]] = draft_token_ids[kept].int()

    whole = accepted == lengths
    complete, rejected = whole.nonzero()[:, 0], (~whole).nonzero()[:, 0]
    if len(complete):
        output[complete, accepted[complete]] = target.bonus(complete).int()
    if len(rejected):
        rows = first[rejected] + accepted[rejected]
        if draft_probs is None:
            tokens = best[rows]
        else:
            probs = target.probs(rows)
            residual = (probs - draft_probs[rows]).clamp_(min=0)
            # p = q but for rounding leaves no residual: then p itself is right.
            residual = torch.where(residual.sum(dim=1, keepdim=True) > 0, residual, probs)
            tokens = inverse_cdf(residual, uniforms(len(rejected), seeds_of(rejected, generators)))
            if greedy is not None:
                tokens = torch.where(greedy[rejected], best[rows], tokens)
        output[rejected, accepted[rejected]] = tokens.int()
    return output


def sampler_forward(
    original: Callable[..., SamplerOutput],
    self: Sampler,
    logits: torch.Tensor,
    sampling_metadata: SamplingMetadata,
    *args: Any,
    **kwargs: Any,
) -> SamplerOutput:
    """vLLM's `Sampler.forward`: one token for each of B requests, from logits [B, V]."""
    scratch: Scratch | None = getattr(self.topk_topp_sampler, "selfspec_scratch", None)
    if (
        scratch is None
        or not own_kernels()
        or sampling_metadata.max_num_logprobs is not None
        or sampling_metadata.logprob_token_ids
        or not only_temperature(sampling_metadata)
    ):
        return original(self, logits, sampling_metadata, *args, **kwargs)
    tokens = sample_requests(logits, torch.arange(logits.shape[0]), sampling_metadata, scratch)
    return SamplerOutput(sampled_token_ids=tokens.int()[:, None], logprobs_tensors=None)


def sample(
    original: Callable[..., tuple[torch.Tensor, torch.Tensor | None]],
    self: TopKTopPSampler,
    logits: torch.Tensor,
    generators: dict[int, torch.Generator],
    k: torch.Tensor | None,
    p: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """vLLM's `TopKTopPSampler.forward_cpu`: one token per row.

    Args:
        logits: [B, V] after temperature.
        generators: of the rows that have seeds.
        k, p: [B] top-k and top-p, None where no row has one.

    Returns:
        [B] int64 tokens; and None.
    """
    of_selfspec = hasattr(self, "selfspec_scratch")  # another engine in this process samples as vLLM does
    if not of_selfspec or self.logprobs_mode.startswith("processed"):
        return original(self, logits, generators, k, p)
    probs = apply_top_k_top_p(logits, k, p).softmax(dim=-1, dtype=torch.float32)
    return inverse_cdf(probs, uniforms(probs.shape[0], generators)), None
