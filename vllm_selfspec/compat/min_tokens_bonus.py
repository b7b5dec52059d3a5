"""`min_tokens` also forbids the stop tokens to a bonus token that comes after them, in vLLM 0.32.

Symptom: with speculative decoding on model runner V1, a request with `min_tokens` and stop tokens runs on although its
target stops: the text is not that of plain decoding.
Cause: the token after the last accepted draft is censored by the number of tokens before the drafts, not after them.
(The drafts themselves are counted right.)
Mend: while the bonus token is sampled, requests whose drafts reach `min_tokens` are left out of the processor's mask.
Goes when vLLM's own sampler passes `broken()`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def broken() -> bool:
    """True when a bonus token behind enough drafts may not be a stop token."""
    from vllm.v1.sample.logits_processor.builtin import MinTokensLogitsProcessor
    from vllm.v1.sample.logits_processor.state import LogitsProcessors
    from vllm.v1.sample.metadata import SamplingMetadata
    from vllm.v1.sample.sampler import Sampler

    stop, none = 1, torch.empty(0)
    processor = MinTokensLogitsProcessor(None, torch.device("cpu"), False)
    processor.min_toks = {0: (3, [7], {stop}, False)}
    processor.logits_slice = (torch.tensor([0]), torch.tensor([stop]))
    metadata = SamplingMetadata(
        temperature=None,
        all_greedy=True,
        all_random=False,
        top_p=None,
        top_k=None,
        generators={},
        max_num_logprobs=None,
        no_penalties=True,
        prompt_token_ids=None,
        frequency_penalties=none,
        presence_penalties=none,
        repetition_penalties=none,
        output_token_ids=[[7]],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors([processor]),
        spec_token_ids=[[5, 6]],
    )
    logits = Sampler().apply_logits_processors(torch.zeros(1, 4), metadata, predict_bonus_token=True)
    return bool(torch.isneginf(logits[0, stop]))


def apply_logits_processors(
    original: Callable[..., torch.Tensor],
    self: Any,
    logits: torch.Tensor,
    sampling_metadata: Any,
    predict_bonus_token: bool,
) -> torch.Tensor:
    """vLLM's sampler method, with the mask of `min_tokens` as it stands behind the drafts."""
    from vllm.v1.sample.logits_processor.builtin import MinTokensLogitsProcessor

    drafts = sampling_metadata.spec_token_ids
    if not predict_bonus_token or not drafts:
        return original(self, logits, sampling_metadata, predict_bonus_token)
    masks = []
    for processor in sampling_metadata.logitsprocs.non_argmax_invariant:
        if isinstance(processor, MinTokensLogitsProcessor) and processor.min_toks:
            masks.append((processor, processor.logits_slice, processor.restore_logits_slice))
            reached = [
                row
                for row, (min_tokens, output, *_) in processor.min_toks.items()
                if len(output) + len(drafts[row]) >= min_tokens
            ]
            processor.logits_slice = _without(processor.logits_slice, reached)
            processor.restore_logits_slice = _without(processor.restore_logits_slice, reached)
    try:
        return original(self, logits, sampling_metadata, predict_bonus_token)
    finally:
        for processor, mask, restored in masks:
            processor.logits_slice, processor.restore_logits_slice = mask, restored


def _without(mask: tuple[torch.Tensor, torch.Tensor], rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """A mask of (row, token) pairs less those of some rows."""
    kept = ~torch.isin(mask[0], torch.tensor(rows, dtype=mask[0].dtype, device=mask[0].device))
    return mask[0][kept], mask[1][kept]
