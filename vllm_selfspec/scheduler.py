"""A thin layer over vLLM's schedulers that asks the controller how many tokens to draft."""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler


class SelfSpecScheduling:
    """Mixed into a vLLM scheduler: sets the draft length of every step."""

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)  # type: ignore[call-arg]  # the scheduler mixed in
        # A per-batch-size table of vLLM's own tells it that draft lengths vary, so that it does not pad new requests
        # to the longest; the value that it looks up is replaced below.
        self.dynamic_sd_lookup = [self.num_spec_tokens] * (self.scheduler_config.max_num_seqs + 1)  # type: ignore[attr-defined]

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        scheduler_output.num_spec_tokens_to_schedule = self._draft_length(scheduler_output)
        super()._update_after_schedule(scheduler_output)  # type: ignore[misc]  # the scheduler mixed in

    def _draft_length(self, scheduler_output: SchedulerOutput) -> int:
        settings = self.vllm_config.speculative_config.selfspec
        if settings.control.mode == "off":
            return 0
        return settings.num_speculative_tokens


class SelfSpecScheduler(SelfSpecScheduling, Scheduler):
    """vLLM's scheduler with controlled draft lengths."""


class SelfSpecAsyncScheduler(SelfSpecScheduling, AsyncScheduler):
    """vLLM's asynchronous scheduler with controlled draft lengths."""


def build_scheduler(vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> Scheduler:
    """The scheduler of an engine with `method: selfspec`; named in `scheduler_config.scheduler_cls`."""
    kind = SelfSpecAsyncScheduler if vllm_config.scheduler_config.async_scheduling else SelfSpecScheduler
    return kind(vllm_config, *args, **kwargs)
