"""Top-k on CPU raises in every step that verifies no drafts, in vLLM 0.32.

Symptom: with a speculative config, a request with top_k and without top_p stops the engine at its prompt:
"max(): Expected reduction dim to be specified for input.numel() == 0".
Cause: the rejection sampler also runs in steps without drafts, and `apply_top_k_only`, which only CPU uses, takes the
largest k of no rows.
Mend: no rows are left as they are. Goes when vLLM's own function passes `broken()`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


def broken() -> bool:
    """True when vLLM's rejection sampler cannot apply top-k to no rows on this CPU."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return False
    from vllm.v1.sample import rejection_sampler

    try:
        rejection_sampler.apply_top_k_top_p(torch.empty(0, 4), torch.empty(0, dtype=torch.int32), None)
    except RuntimeError:
        return True
    return False


def apply_top_k_top_p(
    original: Callable[..., torch.Tensor], logits: torch.Tensor, k: torch.Tensor | None, p: torch.Tensor | None
) -> torch.Tensor:
    """vLLM's function for logits [N, V], which it never sees with N = 0."""
    return original(logits, k, p) if logits.shape[0] else logits
