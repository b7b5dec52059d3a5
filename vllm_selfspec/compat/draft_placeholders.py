"""Placeholders of drafts reach the embedding as tokens, in vLLM 0.24, model runner V1.

Symptom: "index out of range" in an embedding, on a GPU a device assertion, that ends the engine.
Cause: asynchronous scheduling puts -1 where a draft will be, and not every place gets one.
Mend: such rows, whose results nobody takes, are run as token 0, as vLLM does since 0.25. Goes with support for 0.24.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def preprocess(
    original: Callable[..., Any], self: Any, scheduler_output: Any, num_input_tokens: int, *args: Any, **kwargs: Any
) -> Any:
    """`GPUModelRunner._preprocess`, of tokens that are all in the vocabulary."""
    if self.speculative_config is not None:
        self.input_ids.gpu[:num_input_tokens].clamp_(min=0)
    return original(self, scheduler_output, num_input_tokens, *args, **kwargs)
