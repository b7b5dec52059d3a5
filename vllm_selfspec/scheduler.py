"""A thin layer over vLLM's schedulers that asks the controller how many tokens to draft.

`schedule()` itself is vLLM's. The draft length goes into the finished `SchedulerOutput`, right before vLLM books the
step, so that asynchronous scheduling reserves as many placeholders as will be drafted.
"""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from vllm.config import ParallelConfig, VllmConfig
from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request

from vllm_selfspec.config import SelfSpecConfig
from vllm_selfspec.control.alarm import AcceptanceAlarm
from vllm_selfspec.control.cost_model import CostModel
from vllm_selfspec.control.policy import Controller, ControlSettings, Decision, Reason, StepObservation, StepState
from vllm_selfspec.drafter.refresh import RefreshCost
from vllm_selfspec.drafter.runner import drafts_follow_the_result
from vllm_selfspec.metrics import STATS_KEY, StepStats
from vllm_selfspec.plugin import older_than
from vllm_selfspec.speculative_config import draft_together, one_scheduler_per_rank, request_cap

logger = init_logger("vllm.selfspec")


def control_settings(settings: SelfSpecConfig, parallel: ParallelConfig) -> ControlSettings:
    """The controller's settings of a selfspec config.

    Ranks that schedule for themselves see the same requests and tokens, but each its own step times: they do not learn
    from those, and so decide alike.
    """
    return ControlSettings(
        max_draft_tokens=settings.num_speculative_tokens,
        learn=not one_scheduler_per_rank(parallel),
        **settings.control.model_dump(exclude={"profile"}, exclude_none=True),
    )


@dataclass(frozen=True)
class Dictate:
    """What calibration wants of a step.

    Attributes:
        num_draft_tokens: how many tokens it drafts.
        light: the view that drafts, where the drafter has two.
        verified: whether the next step verifies these drafts.
    """

    num_draft_tokens: int
    light: bool | None = None
    verified: bool = True


@dataclass
class InFlightStep:
    """What is remembered of a scheduled step until its result arrives."""

    output: SchedulerOutput
    decision: Decision
    num_verified: int
    verified_light: bool
    """The drafts that it verifies came from the light view: that of the step before, in all but rare cases."""


class SelfSpecScheduling(Scheduler):
    """Mixed in before a vLLM scheduler: sets the draft length of every step and learns from its result."""

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        settings: SelfSpecConfig = vllm_config.speculative_config.selfspec
        self._controller = Controller(
            control_settings(settings, vllm_config.parallel_config), max_batch=self.scheduler_config.max_num_seqs
        )
        self._alarm = AcceptanceAlarm()
        self._alarms_reported = 0
        self._refresh_cost = self._refresh_reported = RefreshCost(0, 0.0)
        self._in_flight: deque[InFlightStep] = deque()
        self._busy_since: float | None = None
        self._caps: dict[str, int] = {}
        self._step_stats: list[StepStats] = []
        self._light_drafts = False
        self._num_drafts = self.num_spec_tokens
        """How many tokens the step scheduled last drafts."""
        self._ranks_draft_together = draft_together(vllm_config.model_config, vllm_config.parallel_config)
        """All ranks draft as many tokens in every step, whatever their own requests could use."""
        self._drafts_follow_the_result = drafts_follow_the_result(vllm_config)
        """A step's duration holds the drafts of the step before instead of its own."""
        self._last_decision: Decision | None = None
        self._dictated: Dictate | None = None
        self._observations: list[StepObservation] | None = None
        # A per-batch-size table of vLLM's own tells it that draft lengths vary, so that it does not pad new requests
        # to the longest; the value that it looks up is replaced in _update_after_schedule.
        self.dynamic_sd_lookup = [self.num_spec_tokens] * (self.scheduler_config.max_num_seqs + 1)

    def start_controller(self, model: CostModel | None, light_view: bool) -> None:
        """Start the controller from measured times, if there are any.

        Args:
            light_view: the drafter has a light view to choose.
        """
        settings = replace(self._controller.settings, light_view=light_view)
        asked: SelfSpecConfig = self.vllm_config.speculative_config.selfspec
        if asked.control.acceptance_prior is None:
            settings = replace(settings, acceptance_prior=asked.drafter.usual_acceptance(light_view))
        self._controller = Controller(settings, model, max_batch=self.scheduler_config.max_num_seqs)

    @contextmanager
    def dictated(self, observations: list[StepObservation]) -> Iterator[Callable[[Dictate], None]]:
        """For calibration: yields a function that says what the steps to come draft.

        Every step is appended to `observations`; the controller and the metrics see none of them.
        """

        def dictate(wanted: Dictate) -> None:
            self._dictated = wanted
            self._caps = {} if wanted.verified else dict.fromkeys(self.requests, 0)

        self._observations = observations
        self._forget_steps()
        try:
            yield dictate
        finally:
            self._dictated, self._observations = None, None
            self._step_stats.clear()

    def add_request(self, request: Request) -> None:
        params = request.sampling_params
        if params is not None and (cap := request_cap(params.extra_args)) is not None:
            self._caps[request.request_id] = cap
        super().add_request(request)

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        if scheduler_output.total_num_scheduled_tokens > 0:
            state = self._state(scheduler_output)
            if self._ranks_draft_together:
                decision = Decision(self.num_spec_tokens, Reason.FIXED, state)
            elif self._dictated is None:
                decision = self._controller.decide(state)
            else:
                wanted = self._dictated
                decision = Decision(wanted.num_draft_tokens, Reason.FIXED, state, light=wanted.light)
            scheduler_output.num_spec_tokens_to_schedule = self._num_drafts = decision.num_draft_tokens
            scheduler_output.selfspec_light = decision.light
            verified = sum(map(len, scheduler_output.scheduled_spec_decode_tokens.values()))
            self._in_flight.append(InFlightStep(scheduler_output, decision, verified, self._light_drafts))
            if decision.num_draft_tokens:
                self._light_drafts = bool(decision.light)
            if self._busy_since is None:
                self._busy_since = time.perf_counter()
        super()._update_after_schedule(scheduler_output)
        if self._caps:
            for request_id in scheduler_output.num_scheduled_tokens.keys() & self._caps.keys():
                request = self.requests[request_id]
                request.spec_token_ids = request.spec_token_ids[: self._caps[request_id]]

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        for request_id, drafts in zip(draft_token_ids.req_ids, draft_token_ids.draft_token_ids, strict=True):
            # Before vLLM 0.32 runner V2 hands over as many as can be drafted, however many were.
            del drafts[min(self._num_drafts, self._caps.get(request_id, self.num_spec_tokens)) :]
        super().update_draft_token_ids(draft_token_ids)

    def _state(self, output: SchedulerOutput) -> StepState:
        """What the policy needs to know of the step just scheduled."""
        longest = self.num_spec_tokens
        adaptive = self._controller.settings.mode == "adaptive"
        rejections = self._controller.rejection_ratio.ratio if self._light_drafts else 1.0
        expected = self._controller.acceptance.expected_tokens_at(rejections)  # of the drafts that are verified
        num_decode = prefill = unfinished_prefill = context = 0
        caps: list[int] = []
        decoding: list[str] = []
        for request_id, num_tokens in output.num_scheduled_tokens.items():
            request = self.requests[request_id]
            computed = request.num_computed_tokens + num_tokens
            behind = request.num_tokens + request.num_output_placeholders - computed
            if behind > 0:
                prefill += num_tokens
                unfinished_prefill += behind
                continue
            num_decode += 1
            decoding.append(request_id)
            context += computed
            drafts = output.scheduled_spec_decode_tokens.get(request_id)
            prefill += num_tokens - 1 - (len(drafts) if drafts else 0)
            left = min(request.max_tokens - request.num_output_tokens, self.max_model_len - request.num_tokens) - 2
            if adaptive and left < 3 * longest:  # less what steps in flight will yield, this one's drafts among it
                verified = min(len(drafts), len(expected) - 1) if drafts else 0
                left -= request.num_output_placeholders + round(expected[verified]) - 1
            cap = min(left, self._caps.get(request_id, longest))
            if cap < longest:
                caps.append(max(0, cap))
        budget = self.max_num_scheduled_tokens
        if self.waiting and output.total_num_scheduled_tokens >= budget:
            unfinished_prefill = budget  # prompts are waiting for nothing but this step's token budget
        return StepState(
            num_decode=num_decode,
            mean_context=context / max(1, num_decode),
            num_waiting=len(self.waiting),
            prefill_tokens=prefill,
            pending_prefill_tokens=min(unfinished_prefill, budget),
            draft_caps=caps,
            request_ids=decoding if num_decode <= self._controller.settings.per_request_batch else (),
        )

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput) -> Any:
        if self._in_flight and self._in_flight[0].output is scheduler_output:
            self._observe(self._in_flight.popleft(), model_runner_output)
        result = super().update_from_output(scheduler_output, model_runner_output)
        if self.has_unfinished_requests():
            self._busy_since = time.perf_counter()
        else:
            self._busy_since = None
            self._forget_steps()
        return result

    def _forget_steps(self) -> None:
        """Steps in flight are of requests that are done: what follows says nothing of them, nor of earlier drafts."""
        self._in_flight.clear()
        self._last_decision = None

    def _observe(self, step: InFlightStep, result: ModelRunnerOutput) -> None:
        """Acceptance and duration of a finished step."""
        state, decision = step.decision.state, step.decision
        drafting = self._last_decision if self._drafts_follow_the_result else decision
        self._last_decision = decision
        observation = None
        # How long images take to encode says nothing of the steps to come.
        if self._busy_since is not None and state.num_decode > 0 and not step.output.scheduled_encoder_inputs:
            observation = StepObservation(
                seconds=time.perf_counter() - self._busy_since,
                num_decode=state.num_decode,
                mean_context=state.mean_context,
                num_verified=step.num_verified / state.num_decode,
                num_drafted=drafting.num_draft_tokens if drafting else 0,
                prefill_tokens=state.prefill_tokens,
                probe=drafting is not None and drafting.reason is Reason.PROBE,
                light=drafting is not None and bool(drafting.light),
            )
        if self._observations is not None:
            if observation is not None:
                self._observations.append(observation)
            return
        cost = getattr(result, "selfspec_refresh_cost", self._refresh_cost)
        if cost.layers > self._refresh_cost.layers:
            self._controller.drafter_has_changed()
        self._refresh_cost = cost
        sampled, rows = result.sampled_token_ids, result.req_id_to_index
        for request_id, drafts in step.output.scheduled_spec_decode_tokens.items():
            row = rows.get(request_id)
            if row is not None and sampled[row]:
                accepted = len(sampled[row]) - 1
                self._controller.observe_acceptance(len(drafts), accepted, request_id, step.verified_light)
                if self._alarm.observe(len(drafts), accepted):
                    logger.warning(
                        "selfspec: acceptance collapsed. If the weights were changed past vLLM, "
                        'collective_rpc("selfspec_refresh") makes the drafter follow.'
                    )
        speedup = None
        if observation is not None:
            self._controller.observe_step(observation)
            if decision.times and state.prefill_tokens == 0:
                emitted = sum(map(len, sampled))
                speedup = emitted / state.num_decode * decision.times[0] / observation.seconds
        if self.log_stats:
            self._step_stats.append(
                StepStats(
                    num_draft_tokens=decision.num_draft_tokens,
                    reason=decision.reason.value,
                    num_decode=state.num_decode,
                    predicted_speedup=decision.predicted_speedup,
                    achieved_speedup=speedup,
                    light=bool(decision.light) and decision.num_draft_tokens > 0,
                )
            )

    def get_grammar_bitmask(self, scheduler_output: SchedulerOutput) -> GrammarOutput | None:
        """vLLM's, with the first draft that breaks the grammar left to the rejection sampler of runner V2.

        The grammar gives that draft no probability, so it is rejected, and the token in its place comes from the
        residual max(p - q, 0). vLLM would cut the drafts off before it and draw that token from p, which together with
        the drafts accepted there is not p.
        """
        output = super().get_grammar_bitmask(scheduler_output)
        if output is not None and not older_than("0.32"):
            drafts = scheduler_output.scheduled_spec_decode_tokens
            output.num_acceptable_drafts = [
                min(allowed + 1, len(drafts.get(request_id, ())))
                for request_id, allowed in zip(
                    output.structured_output_request_ids, output.num_acceptable_drafts, strict=True
                )
            ]
        return output

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        stats = super().make_stats(*args, **kwargs)
        if stats is not None and self._step_stats:
            # The only free-form field that vLLM carries to the front end; metrics.record takes it out again there.
            mine = {
                "model_name": self.vllm_config.model_config.served_model_name,
                "max_draft_tokens": self.num_spec_tokens,
                "acceptance_alarms": self._alarm.raised - self._alarms_reported,
                "refreshed_layers": self._refresh_cost.layers - self._refresh_reported.layers,
                "refresh_seconds": self._refresh_cost.seconds - self._refresh_reported.seconds,
                "steps": [step.as_list() for step in self._step_stats],
            }
            stats.kv_connector_stats = {**(stats.kv_connector_stats or {}), STATS_KEY: mine}
            self._step_stats = []
            self._alarms_reported = self._alarm.raised
            self._refresh_reported = self._refresh_cost
        return stats

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        self._caps.pop(request.request_id, None)
        self._controller.finish_request(request.request_id)
        return super()._free_request(request, *args, **kwargs)


class SelfSpecScheduler(SelfSpecScheduling):
    """vLLM's scheduler with controlled draft lengths.

    vLLM drops a draft that breaks a request's grammar before it is verified. The token in its place would then be drawn
    from p, where that of a rejected draft comes from the residual max(p - q, 0): only so is p what comes out. So the
    first such draft is kept here, as under asynchronous scheduling, and rejected by the rejection sampler: the grammar
    gives it no probability.
    """

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        super().update_draft_token_ids(draft_token_ids)
        for request_id, drafts in zip(draft_token_ids.req_ids, draft_token_ids.draft_token_ids, strict=True):
            request = self.requests.get(request_id)
            if request is not None and request.use_structured_output and not request.is_prefill_chunk:
                request.spec_token_ids = drafts[: len(request.spec_token_ids) + 1]

    def get_grammar_bitmask(self, scheduler_output: SchedulerOutput) -> GrammarOutput | None:
        if scheduler_output.has_structured_output_requests:
            # Masks end with the first draft that breaks the grammar: -1 says so.
            scheduler_output = copy.copy(scheduler_output)
            scheduler_output.scheduled_spec_decode_tokens = {
                request_id: self._within_grammar(request_id, drafts)
                for request_id, drafts in scheduler_output.scheduled_spec_decode_tokens.items()
            }
        return super().get_grammar_bitmask(scheduler_output)

    def _within_grammar(self, request_id: str, drafts: list[int]) -> list[int]:
        """The drafts that the request's grammar allows, then -1."""
        request = self.requests[request_id]
        if not older_than("0.30"):
            allowed = self.structured_output_manager.validate_tokens(request, drafts)
        elif self.structured_output_manager.should_advance(request):
            allowed = request.structured_output_request.grammar.validate_tokens(drafts)
        else:
            allowed = drafts
        return allowed + [-1] * (len(drafts) - len(allowed))


class SelfSpecAsyncScheduler(SelfSpecScheduling, AsyncScheduler):
    """vLLM's asynchronous scheduler with controlled draft lengths."""


def build_scheduler(vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> Scheduler:
    """The scheduler of an engine with `method: selfspec`; named in `scheduler_config.scheduler_cls`."""
    kind = SelfSpecAsyncScheduler if vllm_config.scheduler_config.async_scheduling else SelfSpecScheduler
    return kind(vllm_config, *args, **kwargs)
