"""Mends for upstream faults: one file each, detected by behaviour, applied only where the fault is present."""

from __future__ import annotations

from vllm_selfspec.compat import cpu_empty_top_k, cpu_expand, min_tokens_bonus, tied_lm_head


def apply() -> None:
    """Apply every mend that this vLLM needs, in this process; re-entrant."""
    cpu_empty_top_k.apply()
    cpu_expand.apply()
    min_tokens_bonus.apply()
    tied_lm_head.apply()
