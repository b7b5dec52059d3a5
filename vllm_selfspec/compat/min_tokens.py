"""`min_tokens` is counted wrongly under speculative decoding, in vLLM 0.32 and 0.33, model runner V1.

Symptom: a request with `min_tokens` and stop tokens ends before that many tokens, or runs on although its target stops:
the text is not that of plain decoding.
Causes: (1) The token after the last accepted draft is censored by the number of tokens before the drafts, not after
them. (The drafts themselves are counted right.) (2) Asynchronous scheduling counts every draft as accepted until it
knows better, and a request that seems to have reached `min_tokens` is struck off the list for good. (3) It learns
better only in batches that also have penalties or bad words.
Mend: (1) while tokens are sampled, requests that reach `min_tokens` are left out of the processor's mask; (2) only
tokens that are known strike a request off; (3) batches with `min_tokens` ask for the known tokens, too.
Goes when vLLM's own sampler and processor pass `broken()`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

PLACEHOLDER = -1
"""Where asynchronous scheduling does not know yet which token was sampled, or whether one was."""
MASKS = ("logits_slice", "restore_logits_slice")
"""A processor's attributes that hold the (row, token) pairs to mask; the second is there since vLLM 0.29."""


def broken() -> bool:
    """True when a bonus token behind enough drafts may not be a stop token, or drafts that may fail count."""
    return _miscounts_bonus_tokens() or _counts_placeholders()


def _wanting_three(output: list[int], stop: int) -> Any:
    """A processor whose one request wants three tokens before `stop`."""
    from vllm import SamplingParams
    from vllm.v1.sample.logits_processor.builtin import MinTokensLogitsProcessor

    processor = MinTokensLogitsProcessor(None, torch.device("cpu"), False)
    processor.min_toks = {0: processor.add_request(SamplingParams(min_tokens=3, stop_token_ids=[stop]), None, output)}
    return processor


def _counts_placeholders() -> bool:
    output = [7]
    processor = _wanting_three(output, stop=1)
    output.extend([PLACEHOLDER, PLACEHOLDER])
    processor.update_state(None)
    return not processor.min_toks


def _miscounts_bonus_tokens() -> bool:
    from vllm.v1.sample.logits_processor.state import LogitsProcessors
    from vllm.v1.sample.metadata import SamplingMetadata
    from vllm.v1.sample.sampler import Sampler

    stop, none = 1, torch.empty(0)
    processor = _wanting_three([7], stop)
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
    """vLLM's sampler method, with the mask of `min_tokens` as it stands before the token that is sampled."""
    drafts = sampling_metadata.spec_token_ids if predict_bonus_token else None
    masks: list[tuple[Any, str, tuple[torch.Tensor, torch.Tensor]]] = []
    for processor in _processors(sampling_metadata.logitsprocs):
        reached = [
            row
            for row, (min_tokens, output, *_) in processor.min_toks.items()
            if len(output) + (len(drafts[row]) if drafts else 0) >= min_tokens
        ]
        if reached:  # seldom; on a GPU the host waits for the masks' sizes
            for name in MASKS:
                if hasattr(processor, name):
                    masks.append((processor, name, getattr(processor, name)))
                    setattr(processor, name, _without(getattr(processor, name), reached))
    try:
        return original(self, logits, sampling_metadata, predict_bonus_token)
    finally:
        for processor, name, mask in masks:
            setattr(processor, name, mask)


def _without(mask: tuple[torch.Tensor, torch.Tensor], rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """A mask of (row, token) pairs less those of some rows."""
    kept = ~torch.isin(mask[0], torch.tensor(rows, dtype=mask[0].dtype, device=mask[0].device))
    return mask[0][kept], mask[1][kept]


def update_state(original: Callable[..., None], self: Any, batch_update: Any) -> None:
    """vLLM's method of the processor, which sees only the output that is known."""
    outputs = {}
    for row, (min_tokens, output, *rest) in self.min_toks.items():
        known = len(output)
        while known and output[known - 1] == PLACEHOLDER:
            known -= 1
        seen = range(known)  # something of that length
        outputs[id(seen)] = seen, output
        self.min_toks[row] = (min_tokens, seen, *rest)
    original(self, batch_update)
    for row, (min_tokens, seen, *rest) in self.min_toks.items():
        if id(seen) in outputs:  # else the request is new
            self.min_toks[row] = (min_tokens, outputs[id(seen)][1], *rest)


def make_sampling_metadata(original: Callable[..., Any], self: Any) -> Any:
    """vLLM's method of the input batch, which asks for known tokens when a request has `min_tokens` before it."""
    needed = self.logitsprocs_need_output_token_ids
    self.logitsprocs_need_output_token_ids = needed or any(
        processor.min_toks for processor in _processors(self.logitsprocs)
    )
    try:
        return original(self)
    finally:
        self.logitsprocs_need_output_token_ids = needed


def _processors(logitsprocs: Any) -> list[Any]:
    """Those of `min_tokens` among a batch's logits processors."""
    from vllm.v1.sample.logits_processor.builtin import MinTokensLogitsProcessor

    return [one for one in logitsprocs.non_argmax_invariant if isinstance(one, MinTokensLogitsProcessor)]
