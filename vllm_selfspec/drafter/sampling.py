"""Draft tokens drawn exactly from the drafter's distribution.

The rejection sampler is exact only if each draft was drawn from the very q that it is handed (Leviathan et al., arXiv
2211.17192). Drafts are drawn by inverting the cumulative distribution in float64, with one random number per request
instead of one per vocabulary entry; q stays float32.
"""

from __future__ import annotations

import math

import torch
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import _SAMPLING_EPS

from vllm_selfspec.drafter.cpu_kernels import own_kernels


class Scratch:
    """Memory that is used again in every step.

    The C library gives tensors of tens of MiB back to the system when they are freed. At sixteen requests and a
    vocabulary of 150,000 touching their pages anew made verifying three times as long.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def take(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
        """An uninitialised contiguous tensor, which stays valid until the next call."""
        size = math.prod(shape) * dtype.itemsize
        if self._memory.device != torch.device(device) or self._memory.nbytes < size:
            self._memory = torch.empty(0)  # before the next is allocated
            self._memory = torch.empty(size, dtype=torch.uint8, device=device)
        return self._memory[:size].view(dtype).view(shape)


def sample_drafts(
    logits: torch.Tensor,
    metadata: SamplingMetadata,
    generators: dict[int, torch.Generator],
    probs: torch.Tensor | None,
) -> torch.Tensor:
    """Sample one draft per request.

    Args:
        logits: [B, V] the drafter's.
        metadata: the batch's sampling parameters. Only the temperature shapes q: top-k, top-p and penalties act on
            the target alone, which keeps the result exact.
        generators: of the rows that have seeds and use their drafts; each gives one number.
        probs: [B, V] float32, which becomes q; None when every request is greedy.

    Returns:
        [B] int64 tokens.
    """
    if probs is None:
        return argmax(logits)
    assert metadata.temperature is not None
    return draw(logits, metadata.temperature, metadata.all_random, generators, probs)


def draw(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    all_random: bool,
    generators: dict[int, torch.Generator],
    probs: torch.Tensor,
) -> torch.Tensor:
    """Sample one token per row.

    Args:
        logits: [B, V].
        temperature: [B], 0 for greedy rows.
        all_random: no row is greedy.
        generators: of the rows that have seeds; each gives one number.
        probs: [B, V] float32, which becomes what the tokens of the other rows are drawn from.

    Returns:
        [B] int64 tokens.
    """
    softmax(logits, temperature if all_random else divisors(temperature), probs)
    tokens = inverse_cdf(probs, uniforms(probs.shape[0], generators, probs.device))
    return tokens if all_random else torch.where(temperature < _SAMPLING_EPS, argmax(logits), tokens)


def divisors(temperature: torch.Tensor) -> torch.Tensor:
    """Temperatures with 1 for greedy requests, whose own is no divisor."""
    return torch.where(temperature < _SAMPLING_EPS, 1.0, temperature)


def seeds_of(requests: torch.Tensor, generators: dict[int, torch.Generator]) -> dict[int, torch.Generator]:
    """The generators of those of `requests` [R] that have one, by their place in it."""
    return {i: generators[row] for i, row in enumerate(requests.tolist()) if row in generators}


def argmax(logits: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
    """[R] int64: the first of the greatest of logits [B, V], of `rows` [R] or of all."""
    if logits.device.type == "cpu" and own_kernels():
        rows = torch.arange(logits.shape[0]) if rows is None else rows
        return torch.ops.selfspec_cpu.argmax_rows(logits, rows)
    return (logits if rows is None else logits[rows]).argmax(dim=-1)


def softmax(logits: torch.Tensor, temperature: torch.Tensor, out: torch.Tensor) -> None:
    """Probabilities at a temperature per row.

    Args:
        logits: [B, V].
        temperature: [B] float32, positive.
        out: [B, V] float32, overwritten.
    """
    if logits.device.type == "cpu" and own_kernels():
        torch.ops.selfspec_cpu.softmax(logits, temperature, out)
    else:
        torch.softmax(logits.float() / temperature.unsqueeze(1), dim=-1, out=out)


def uniforms(rows: int, generators: dict[int, torch.Generator], device: torch.device | str = "cpu") -> torch.Tensor:
    """[rows] float64 in [0, 1); rows of seeded requests come from their own generators."""
    u = torch.rand(rows, dtype=torch.float64, device=device)
    for row, generator in generators.items():
        u[row] = torch.rand((), dtype=torch.float64, device=device, generator=generator)
    return u


def inverse_cdf(q: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Smallest token whose cumulative probability exceeds u.

    Args:
        q: [B, V] float32, non-negative weights.
        u: [B] float64 in [0, 1).

    Returns:
        [B] int64 tokens; never one of weight 0.
    """
    if q.device.type == "cpu" and own_kernels():
        return torch.ops.selfspec_cpu.inverse_cdf(q, u)
    cdf = q.cumsum(dim=-1, dtype=torch.float64)
    # A product that rounds up to the total would point past the last token of positive weight.
    below_total = torch.nextafter(cdf[:, -1], torch.zeros_like(u))
    threshold = torch.minimum(u * cdf[:, -1], below_total)
    # Of weights that are no numbers the last: one row that is spoilt must not end the engine.
    return torch.searchsorted(cdf, threshold.unsqueeze(1), right=True).squeeze(1).clamp_(max=q.shape[1] - 1)
