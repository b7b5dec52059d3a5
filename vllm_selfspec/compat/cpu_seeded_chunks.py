"""A request with a seed stops the engine on CPU when its prompt takes more than one step, in vLLM 0.32.

Symptom: "RuntimeError: CPU Generator does not use offset" in the first step of such a prompt; the engine is dead.
Cause: what such a step samples is thrown away, so the runner sets the request's generator back by what CUDA's sampler
takes. torch's generators on CPU know no offset.
Mend: rows whose sample is thrown away sample from a copy of their generator, and the runner finds nothing to set back.
Goes when vLLM serves such a request on CPU, or when torch's generators pass `broken()`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch


def broken() -> bool:
    """True when a generator of this platform cannot be set back."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return False
    generator = torch.Generator()
    try:
        generator.set_offset(generator.get_offset())
    except RuntimeError:
        return True
    return False


def sample(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """`GPUModelRunner._sample`, which leaves the generators of unfinished prompts as they were."""
    generators, kept = self.input_batch.generators, _of_unfinished_prompts(self)
    generators.update({row: generator.clone_state() for row, generator in kept.items()})
    try:
        return original(self, *args, **kwargs)
    finally:
        generators.update(kept)


def bookkeeping_sync(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """`GPUModelRunner._bookkeeping_sync`, without those generators."""
    generators, kept = self.input_batch.generators, _of_unfinished_prompts(self)
    for row in kept:
        del generators[row]
    try:
        return original(self, *args, **kwargs)
    finally:
        generators.update(kept)


def _of_unfinished_prompts(runner: Any) -> dict[int, torch.Generator]:
    batch = runner.input_batch
    if not batch.generators:
        return {}
    rows = np.nonzero(runner.discard_request_mask.np[: batch.num_reqs])[0]
    return {int(row): batch.generators[row] for row in rows if row in batch.generators}
