"""Which of vLLM's two model runners a selfspec engine uses, and what each needs to know beforehand."""

from __future__ import annotations

import os

RUNNER_VARIABLE = "VLLM_USE_V2_MODEL_RUNNER"


def choose_runner() -> None:
    """Use runner V1 on CUDA and CPU unless the user has chosen; called before vLLM builds its config.

    vLLM's own default on CUDA is V2, whose speculator (`speculator.py`) has not run on a GPU. On CPU it is V2 where a
    Triton that compiles for CPU is installed, and the faster sampling (`compat/cpu_sampling.py`) is V1's. The choice is
    made through vLLM's environment variable, which worker processes inherit, so it also holds for engines that this
    process builds later.
    """
    from vllm import envs
    from vllm.logger import init_logger
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    cuda = current_platform.is_cuda()
    if not (cuda or current_platform.is_cpu()):
        return
    logger = init_logger("vllm.selfspec")
    if envs.VLLM_USE_V2_MODEL_RUNNER is None:
        os.environ[RUNNER_VARIABLE] = "0"
        if HAS_TRITON:  # else vLLM has no V2 to try
            logger.info_once("selfspec uses model runner V1: set %s=1 to try V2.", RUNNER_VARIABLE)
    elif envs.VLLM_USE_V2_MODEL_RUNNER and cuda:
        logger.warning_once(
            "selfspec on model runner V2 has not yet run on a GPU: set %s=0 if it misbehaves.", RUNNER_VARIABLE
        )


def every_draft_length(num_speculative_tokens: int) -> list[tuple[int, int, int]]:
    """A table of vLLM's form (first batch size, last batch size, draft length) with every length from the most to 0.

    vLLM sizes and captures its verification graphs for the lengths in this table. Which length a step uses is not read
    from it: selfspec's scheduler decides that.
    """
    return [(row + 1, row + 1, num_speculative_tokens - row) for row in range(num_speculative_tokens + 1)]
