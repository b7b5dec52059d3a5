"""vLLM 0.32 on CPU draws one random number per vocabulary entry for every request of a batch, and then another one.

Symptom: at a vocabulary of 150,000 sampling takes 1.5 ms per request and step, and with a speculative config 3.5 ms
more, in steps without drafts, too; verifying 16 requests of three drafts each touches 30,000 new pages in every step.
Cause: tokens are drawn by Gumbel noise on every logit. The rejection sampler adds a recovered token for each draft,
because a GPU cannot know without a synchronisation which drafts are rejected; its noise is drawn even when there is no
draft at all. And glibc gives the tensors of a verification, tens of MiB each, back to the system after every step.
Mend: tokens are drawn by inverting the cumulative distribution (float64) at one uniform number, and recovered tokens
only where a draft was rejected; the large tensors are kept. The rule is the same (Leviathan et al., arXiv 2211.17192:
accept x with probability min(1, p(x) / q(x)), else draw from max(p - q, 0)), and so is the distribution; the random
numbers are others than vLLM's own. What asks for processed log-probabilities, drafters without probabilities and
synthetic acceptance run vLLM's functions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from vllm.config.model import PROCESSED_LOGPROBS_MODES
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample import rejection_sampler
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler, apply_top_k_top_p
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from vllm_selfspec.drafter.sampling import Scratch, inverse_cdf, uniforms

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
    bonus = self.sampler(
        logits=logits[metadata.bonus_logits_indices],
        sampling_metadata=replace(sampling_metadata, max_num_logprobs=None if wanted is None else -1),
        predict_bonus_token=True,
        logprobs_mode_override="raw_logits",
    )
    shape = (drafts, logits.shape[1])
    gathered = scratch.gathered.take(shape, logits.dtype)
    torch.index_select(logits, 0, metadata.target_logits_indices, out=gathered)
    raw = scratch.raw.take(shape, torch.float32).copy_(gathered)
    processed = raw if wanted is None else scratch.processed.take(shape, torch.float32).copy_(raw)
    processed = self.apply_logits_processors(processed, sampling_metadata, metadata)
    processed = rejection_sampler.apply_sampling_constraints(processed, metadata.cu_num_draft_tokens, sampling_metadata)
    tokens = rejection_sample(metadata, draft_probs, processed, bonus.sampled_token_ids, sampling_metadata, scratch)
    logprobs = None
    if wanted is not None:
        logprobs = self._get_logprobs_tensors(wanted, metadata, logits, raw, bonus.logprobs_tensors.logprobs, tokens)
    return SamplerOutput(sampled_token_ids=tokens, logprobs_tensors=logprobs)


def rejection_sample(
    metadata: SpecDecodeMetadata,
    draft_probs: torch.Tensor | None,
    target_logits: torch.Tensor,
    bonus_token_ids: torch.Tensor,
    sampling_metadata: SamplingMetadata,
    scratch: RejectionScratch,
) -> torch.Tensor:
    """Accept drafts or replace them.

    Args:
        metadata, draft_probs: as of `forward`.
        target_logits: [N, V] float32, after temperature, top-k and top-p.
        bonus_token_ids: [B, 1] the target's token behind the last draft.

    Returns:
        [B, γ + 1] int32 tokens.
    """
    draft_token_ids, num_draft_tokens = metadata.draft_token_ids, metadata.num_draft_tokens
    if not len(draft_token_ids):
        return bonus_token_ids.int()
    batch_size = len(num_draft_tokens)
    lengths = torch.tensor(num_draft_tokens)
    request = torch.arange(batch_size).repeat_interleave(lengths)  # [N]
    first = lengths.cumsum(0) - lengths  # [B] row of each request's first draft
    step = torch.arange(len(request)) - first[request]  # [N]
    drafts = draft_token_ids.long()

    generators = sampling_metadata.generators
    greedy = None
    if not sampling_metadata.all_random:
        best = target_logits.argmax(dim=-1)  # [N]
    if draft_probs is None:
        accept = drafts == best
    else:
        target_probs = scratch.probs.take(target_logits.shape, torch.float32)
        torch.softmax(target_logits, dim=-1, out=target_probs)  # [N, V]
        p = target_probs.gather(1, drafts[:, None])[:, 0]
        q = draft_probs.gather(1, drafts[:, None])[:, 0]
        u = torch.rand(len(request), dtype=torch.float64)
        for row, generator in generators.items():
            u[request == row] = torch.rand(num_draft_tokens[row], dtype=torch.float64, generator=generator)
        accept = u * q <= p
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

    everything = accepted == lengths
    output[everything, accepted[everything]] = bonus_token_ids[everything, 0].int()
    rejected = (~everything).nonzero()[:, 0]
    if len(rejected):
        rows = first[rejected] + accepted[rejected]
        if draft_probs is None:
            tokens = best[rows]
        else:
            target = target_probs[rows]
            residual = (target - draft_probs[rows]).clamp_(min=0)
            # p = q but for rounding leaves no residual: then p itself is right.
            residual = torch.where(residual.sum(dim=1, keepdim=True) > 0, residual, target)
            seeded = {i: generators[row] for i, row in enumerate(rejected.tolist()) if row in generators}
            tokens = inverse_cdf(residual, uniforms(len(rejected), seeded))
            if greedy is not None:
                tokens = torch.where(greedy[rejected], best[rows], tokens)
        output[rejected, accepted[rejected]] = tokens.int()
    return output


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
    of_selfspec = getattr(self, "selfspec", False)  # another engine in this process samples as vLLM does
    if not of_selfspec or self.logprobs_mode in PROCESSED_LOGPROBS_MODES:
        return original(self, logits, generators, k, p)
    probs = apply_top_k_top_p(logits, k, p).softmax(dim=-1, dtype=torch.float32)
    return inverse_cdf(probs, uniforms(probs.shape[0], generators)), None
