"""Top-k on CPU raises in every step that verifies no drafts, in vLLM 0.32.

Symptom: with a speculative config, a request with top_k and without top_p stops the engine at its prompt:
"max(): Expected reduction dim to be specified for input.numel() == 0".
Cause: the rejection sampler also runs in steps without drafts, and `apply_top_k_only`, which only CPU uses, takes the
largest k of no rows.
Mend: no rows are left as they are. Goes when vLLM's own function passes `broken()`.
"""

from __future__ import annotations

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


def apply() -> None:
    """Wrap vLLM's function where it is broken."""
    if not broken():
        return
    from vllm.v1.sample import rejection_sampler

    original = rejection_sampler.apply_top_k_top_p

    def apply_top_k_top_p(logits: torch.Tensor, k: torch.Tensor | None, p: torch.Tensor | None) -> torch.Tensor:
        return original(logits, k, p) if logits.shape[0] else logits

    rejection_sampler.apply_top_k_top_p = apply_top_k_top_p
