"""Training an exit head (`drafter/exit_head.py`) on text that the model writes itself, with plain PyTorch.

The head learns the model's own next-token distribution at temperature 1 by the divergence KL(p || q). What counts is
the overlap, the sum of min(p, q): the probability that rejection sampling accepts a draft (Leviathan et al., arXiv
2211.17192). Everything but the head stays as it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vllm_selfspec.drafter.exit_head import ExitHead
from vllm_selfspec.errors import UsageError

_EVALUATION_ROWS = 512


@dataclass
class Target:
    """A causal language model, and the parts of it that a head needs.

    Attributes:
        model: of `transformers`.
        layers: its decoder layers.
        norm, lm_head: what turns the last layer's output into logits.
    """

    model: Any
    layers: nn.ModuleList
    norm: nn.Module
    lm_head: nn.Module

    @classmethod
    def load(cls, path: str, device: str) -> Target:
        """Load a checkpoint, in float32 on a CPU and in its own dtype elsewhere.

        Raises:
            UsageError: where its logits are not final norm and LM head alone.
        """
        from transformers import AutoModelForCausalLM

        dtype = torch.float32 if device == "cpu" else "auto"
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval().requires_grad_(False)
        inner = model.base_model
        target = None
        if hasattr(inner, "layers") and hasattr(inner, "norm"):
            target = cls(model, inner.layers, inner.norm, model.get_output_embeddings())
        if target is None or not target.is_whole():
            raise UsageError(
                f"--model: {type(model).__name__} does not compute its logits as LM head of final norm, which an exit "
                "head is trained for; draft with quantized weights instead"
            )
        return target

    @torch.no_grad()
    def is_whole(self) -> bool:
        """Whether the model's logits are those of `logits`: some are scaled or capped on the way."""
        kept: list[torch.Tensor] = []
        hook = self.norm.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
        try:
            expected = self.model(torch.arange(4, device=self.model.device)[None]).logits.float()
        finally:
            hook.remove()
        found = self.logits(kept[-1])
        return bool((found - expected).abs().max() <= 0.02 * expected.abs().max())

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [..., V] float32 of the last layer's output [..., hidden_size]."""
        result: torch.Tensor = self.lm_head(self.norm(hidden)).float()
        return result


@dataclass
class Hidden:
    """Hidden states of the same tokens, [N, hidden_size] each: before the exit layer, and of the last layer.

    `prompt` [N] says which prompt's answer each belongs to.
    """

    early: torch.Tensor
    last: torch.Tensor
    prompt: torch.Tensor

    def __len__(self) -> int:
        return len(self.early)

    def rows(self, index: Any) -> Hidden:
        """Some of the tokens."""
        return Hidden(self.early[index], self.last[index], self.prompt[index])

    def split(self, fraction: float) -> tuple[Hidden, Hidden]:
        """Those of most prompts, and those of a fraction of them, at least one.

        Raises:
            UsageError: there is but one prompt.
        """
        prompts = self.prompt.unique()
        if len(prompts) < 2:
            raise UsageError("--prompts: give at least two that are answered, one of which is held out")
        held_out = torch.isin(self.prompt, prompts[-max(1, round(fraction * len(prompts))) :])
        return self.rows(~held_out), self.rows(held_out)


@torch.no_grad()
def collect(
    target: Target,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    exit_layer: int,
    num_tokens: int,
    max_new_tokens: int,
    batch: int,
    progress: Callable[[int], None] = lambda _: None,
) -> Hidden:
    """Let the model answer the prompts at temperature 1, as often as it takes, and keep its hidden states.

    Args:
        prompts: token ids.
        num_tokens: at least so many tokens.
        progress: told the tokens collected so far.
    """
    kept: dict[str, torch.Tensor] = {}

    def keep_early(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kept["early"] = args[0] if args else kwargs["hidden_states"]

    def keep_last(_: nn.Module, args: tuple[Any, ...]) -> None:
        kept["last"] = args[0]

    device = target.model.device
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
    found: list[Hidden] = []
    turn = itertools.cycle(range(len(prompts)))
    while sum(map(len, found)) < num_tokens:
        numbers = [next(turn) for _ in range(batch)]
        chosen = [prompts[number] for number in numbers]
        longest = max(map(len, chosen))
        ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in chosen], device=device)
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in chosen], device=device)
        text = target.model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            repetition_penalty=1.0,
            pad_token_id=pad,
        )
        answer = text[:, longest:]
        ended = torch.zeros_like(answer)
        for eos in _ends(target.model, tokenizer):
            ended |= (answer == eos).long()
        written = ended.cumsum(dim=1) - ended == 0  # up to the end token
        mask = torch.cat([mask, written.long()], dim=1)
        hooks = [
            target.layers[exit_layer].register_forward_pre_hook(keep_early, with_kwargs=True),
            target.norm.register_forward_pre_hook(keep_last),
        ]
        try:
            target.model(text, attention_mask=mask, logits_to_keep=1)
        finally:
            for hook in hooks:
                hook.remove()
        # The hidden state of a token says the next one, so the last token of the prompt counts, the last one does not.
        here = slice(longest - 1, -1)
        of = torch.tensor(numbers, device=device)[:, None].expand_as(written)
        found.append(Hidden(kept["early"][:, here][written], kept["last"][:, here][written], of[written]))
        progress(sum(map(len, found)))
    return Hidden(*(torch.cat([getattr(h, name) for h in found]) for name in ("early", "last", "prompt")))


def _ends(model: Any, tokenizer: Any) -> list[int]:
    """Token ids that end a text."""
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    return ends + ([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [])


def behind(head: ExitHead, early: torch.Tensor) -> torch.Tensor:
    """What the final norm gets behind the head; the head itself stays in float32."""
    wide = early.float()
    return (wide + head.change(wide)).to(early.dtype)


@torch.no_grad()
def overlap(target: Target, head: ExitHead | None, hidden: Hidden) -> float:
    """Mean of the sum of min(p, q), with the head, or without one (None)."""
    total = 0.0
    for start in range(0, len(hidden), _EVALUATION_ROWS):
        part = hidden.rows(slice(start, start + _EVALUATION_ROWS))
        early = part.early if head is None else behind(head, part.early)
        p, q = target.logits(part.last).softmax(-1), target.logits(early).softmax(-1)
        total += float(torch.minimum(p, q).sum())
    return total / len(hidden)


def train(
    target: Target, head: ExitHead, hidden: Hidden, steps: int, rows: int, learning_rate: float
) -> Iterator[float]:
    """Train `head`, which is in float32, in place; yields the loss KL(p || q) of every step.

    Args:
        rows: tokens in a step.
        learning_rate: at the start; it falls to nothing along a cosine.
    """
    optimizer = torch.optim.AdamW(head.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        part = hidden.rows(torch.randint(len(hidden), (rows,), device=hidden.early.device))
        with torch.no_grad():
            p = target.logits(part.last).log_softmax(-1)
        q = target.logits(behind(head, part.early)).log_softmax(-1)
        loss = nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        yield float(loss.detach())
