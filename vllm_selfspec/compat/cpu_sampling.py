"""vLLM 0.32 on CPU draws one random number per vocabulary entry for every request of a batch, and then another one.

Symptom: at a vocabulary of 150,000 sampling takes 1.5 ms per request and step, and with a speculative config 3.5 ms
more, in steps without drafts, too.
Cause: tokens are drawn by Gumbel noise on every logit. The rejection sampler adds a recovered token for each draft,
because a GPU cannot know without a synchronisation which drafts are rejected; its noise is drawn even when there is no
draft at all.
Mend: tokens are drawn by inverting the cumulative distribution (float64) at one uniform number, and recovered tokens
only where a draft was rejected. The rule is the same (Leviathan et al., arXiv 2211.17192: accept x with probability
min(1, p(x) / q(x)), else draw from max(p - q, 0)), and so is the distribution; the random numbers are others than
vLLM's own. What asks for processed log-probabilities, drafters without probabilities and synthetic acceptance run
vLLM's functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from vllm.config.model import PROCESSED_LOGPROBS_MODES
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler, apply_top_k_top_p

from vllm_selfspec.drafter.sampling import inverse_cdf, uniforms

PLACEHOLDER = -1
"""What vLLM puts behind a request's last token."""


def rejection_sample(
    original: Callable[..., torch.Tensor],
    draft_token_ids: torch.Tensor,
    num_draft_tokens: list[int],
    max_spec_len: int,
    cu_num_draft_tokens: torch.Tensor,
    draft_probs: torch.Tensor | None,
    target_logits: torch.Tensor,
    bonus_token_ids: torch.Tensor,
    sampling_metadata: SamplingMetadata,
    synthetic_mode: bool = False,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    """vLLM's `rejection_sample` for B requests with N drafts in all.

    Args:
        draft_token_ids: [N] integers, the drafts of all requests in a row.
        num_draft_tokens: drafts of each request, N in all.
        max_spec_len: γ, the most of them.
        draft_probs: [N, V] float32, what the drafts were drawn from.
        target_logits: [N, V] float32, after temperature, top-k and top-p.
        bonus_token_ids: [B, 1] the target's token behind the last draft.

    Returns:
        [B, γ + 1] int32: accepted drafts, then a recovered or the bonus token, then placeholders.
    """
    if not len(draft_token_ids):
        return bonus_token_ids.int()
    if synthetic_mode or draft_probs is None or sampling_metadata.all_greedy:
        return original(
            draft_token_ids,
            num_draft_tokens,
            max_spec_len,
            cu_num_draft_tokens,
            draft_probs,
            target_logits,
            bonus_token_ids,
            sampling_metadata,
            synthetic_mode,
            *args,
            **kwargs,
        )
    batch_size = len(num_draft_tokens)
    lengths = torch.tensor(num_draft_tokens)
    request = torch.arange(batch_size).repeat_interleave(lengths)  # [N]
    first = lengths.cumsum(0) - lengths  # [B] row of each request's first draft
    step = torch.arange(len(request)) - first[request]  # [N]
    drafts = draft_token_ids.long()

    target_probs = target_logits.softmax(dim=-1)  # [N, V]
    p = target_probs.gather(1, drafts[:, None])[:, 0]
    q = draft_probs.gather(1, drafts[:, None])[:, 0]
    generators = sampling_metadata.generators
    u = torch.rand(len(request), dtype=torch.float64)
    for row, generator in generators.items():
        u[request == row] = torch.rand(num_draft_tokens[row], dtype=torch.float64, generator=generator)
    accept = u * q <= p
    greedy = None
    if not sampling_metadata.all_random:
        assert sampling_metadata.temperature is not None
        greedy = sampling_metadata.temperature == 0
        accept = torch.where(greedy[request], drafts == target_logits.argmax(dim=-1), accept)

    table = torch.zeros(batch_size, max_spec_len, dtype=torch.int64)
    table[request, step] = accept.long()
    accepted = table.cumprod(dim=1).sum(dim=1)  # [B] drafts accepted before the first rejection
    output = torch.full((batch_size, max_spec_len + 1), PLACEHOLDER, dtype=torch.int32)
    kept = step < accepted[request]
    output[request[kept], step[kept]] = draft_token_ids[kept].int()

    everything = accepted == lengths
    output[everything, accepted[everything]] = bonus_token_ids[everything, 0].int()
    rejected = (~everything).nonzero()[:, 0]
    if len(rejected):
        rows = first[rejected] + accepted[rejected]
        target = target_probs[rows]
        residual = (target - draft_probs[rows]).clamp_(min=0)
        # p = q but for rounding leaves no residual: then p itself is right.
        residual = torch.where(residual.sum(dim=1, keepdim=True) > 0, residual, target)
        seeded = {i: generators[row] for i, row in enumerate(rejected.tolist()) if row in generators}
        tokens = inverse_cdf(residual, uniforms(len(rejected), seeded))
        if greedy is not None:
            tokens = torch.where(greedy[rejected], target.argmax(dim=1), tokens)
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
