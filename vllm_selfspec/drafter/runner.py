"""Which of vLLM's two model runners a selfspec engine uses, and what each needs to know beforehand."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm_selfspec.config import ConfigError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

RUNNER_VARIABLE = "VLLM_USE_V2_MODEL_RUNNER"


def choose_runner(lora: bool) -> None:
    """Use a runner on which selfspec drafts, unless the user has chosen one; called before vLLM builds its config.

    On CUDA that is vLLM's own choice, V2 for all that it supports: with V2 a whole draft step is one CUDA graph, and so
    is the verification of every draft length. V1 has graphs of pieces only, but drafts with adapters. (Before vLLM 0.29
    V1 is its choice for all draft models.) On CPU vLLM would take V2 where a Triton that compiles for CPU is installed,
    and the faster sampling (`compat/cpu_sampling.py`) is V1's. V1 is chosen through vLLM's environment variable, which
    worker processes inherit, so it also holds for engines that this process builds later.

    Args:
        lora: the engine serves adapters.

    Raises:
        ConfigError: selfspec does not run on this platform, or on the runner that the user has chosen, in this vLLM.
    """
    from vllm import envs
    from vllm.logger import init_logger
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    from vllm_selfspec.plugin import FIRST_WHOLE_VLLM, older_than

    if older_than(FIRST_WHOLE_VLLM):
        if current_platform.is_cpu():
            raise ConfigError(f"method selfspec runs on CPU from vLLM {FIRST_WHOLE_VLLM} on: install a newer one.")
        if envs.VLLM_USE_V2_MODEL_RUNNER:
            raise ConfigError(
                f"method selfspec runs on model runner V2 from vLLM {FIRST_WHOLE_VLLM} on: remove {RUNNER_VARIABLE}, "
                "or install a newer one."
            )
    cuda = current_platform.is_cuda()
    if envs.VLLM_USE_V2_MODEL_RUNNER is not None or not (current_platform.is_cpu() or (cuda and lora)):
        return
    os.environ[RUNNER_VARIABLE] = "0"
    if HAS_TRITON:  # else vLLM has no V2 to try
        reason = "which can draft with adapters" if cuda else "whose sampling is the faster one on CPU"
        init_logger("vllm.selfspec").info_once("selfspec uses model runner V1, %s.", reason)


def unsupported_on_v2(original: Callable[[Any], list[str]], self: Any) -> list[str]:
    """What a `VllmConfig` asks for that runner V2 does not have, before vLLM 0.31: it had no draft models."""
    missing = original(self)
    if hasattr(self.speculative_config, "selfspec"):
        missing = [feature for feature in missing if feature != "speculative method 'draft_model'"]
    return missing


def every_draft_length(num_speculative_tokens: int) -> list[tuple[int, int, int]]:
    """A table of vLLM's form (first batch size, last batch size, draft length) with every length from the most to 0.

    vLLM sizes and captures its verification graphs for the lengths in this table. Which length a step uses is not read
    from it: selfspec's scheduler decides that.
    """
    return [(row + 1, row + 1, num_speculative_tokens - row) for row in range(num_speculative_tokens + 1)]


def drafts_follow_the_result(config: VllmConfig) -> bool:
    """Whether a step's result reaches the scheduler before the step's drafts are computed.

    On V2 the host waits for the sampled tokens alone: the device drafts while the next step is scheduled, and does so
    without asynchronous scheduling, too. So from one result to the next it computes the drafts of the step before and
    the forward pass of this one. On V1 the copy of the sampled tokens is queued behind the drafts, and on CPU every
    call returns when its work is done.
    """
    from vllm.platforms import current_platform

    return config.use_v2_model_runner and not current_platform.is_cpu()
