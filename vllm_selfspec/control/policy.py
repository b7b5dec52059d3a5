"""How many tokens are drafted in a step. The draft length is decided in this file and nowhere else.

`decide` is a pure function of the engine's state, predicted times, expected acceptance and the controller's memory.
`Controller` owns the state around it: the acceptance estimate, the online correction of the predicted times, probes and
counters. The scheduler owns one Controller.

What a choice costs. Step k runs the target over the drafts of step k-1, then drafts γ_k. Choosing γ therefore costs
γ·T_D now and T_V(γ) in the next step, and yields τ(γ) tokens per request: the policy maximises
``Σ_requests τ(γ) / (γ·T_D + T_V(γ))``. Prefill rows ride in the same forward. What they would cost anyway is not
charged to decoding, but they use up the compute that verification gets for free in a memory-bound step, so drafting
pays less.

A drafter may keep two views, a main one and a light one of fewer bits. They differ in T_D and in τ, and the policy
takes the one whose best draft length has the higher rate.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Protocol

from vllm_selfspec.control.acceptance import AcceptanceEstimator, RejectionRatio
from vllm_selfspec.control.correction import OnlineCorrection
from vllm_selfspec.control.cost_model import CostModel, StepTimes

_VIEW_INTERVALS = 4
"""After so many of `probe_interval` the view that is not in use is due for a look."""
_STALL = 4.0
"""A probe's step is charged for so many times its prediction at most, unless the probe before was as slow."""
_KEPT_EVIDENCE = 0.05
"""The weight of what was seen of a drafter before it followed other weights."""
_SWITCH_DOUBT, _SWITCH_STEPS = 0.25, 32
"""How wrong the other side's predicted rate may be right after a switch, and the steps for which that holds in full."""


class Reason(StrEnum):
    """Why a draft length was chosen."""

    BEST = "best"  # the highest predicted rate
    MARGIN_HOLD = "margin_hold"  # another length is predicted better, by less than the margin
    PROBE = "probe"  # a bounded-cost experiment
    LOAD = "load"  # plain decoding only because of the prefill work in the step
    CAPPED = "capped"  # no request may or can use a draft
    NO_DECODE = "no_decode"  # no request decodes in this step
    FIXED = "fixed"  # mode "fixed"
    OFF_MODE = "off_mode"  # mode "off"


@dataclass(frozen=True, slots=True)
class ControlSettings:
    """Settings of the policy.

    Attributes:
        max_draft_tokens: the most tokens drafted in one step, ≥ 1.
        mode: "adaptive" decides, "fixed" always drafts the maximum, "off" never drafts.
        margin: the fraction by which drafting must be predicted to beat plain decoding to be switched on. Between two
            draft lengths a quarter of it counts. Switching to a shorter draft needs no margin.
        probe_interval: decode steps after which a side (drafting, or not drafting) is due for a look; a sixteenth of it
            where the times are so uncertain that another length may well be better.
        probe_steps: consecutive steps of one probe.
        probe_budget: the fraction of time that probes may lose in the long run.
        acceptance_window, acceptance_prior: see `AcceptanceEstimator`.
        per_request_batch: up to this many decoding requests the acceptance of each request is used, above it the pooled
            estimate; 0 never.
        learn: correct the predicted times from observed step durations.
        light_view: the drafter has a light view to choose.
    """

    max_draft_tokens: int = 7
    mode: str = "adaptive"
    margin: float = 0.02
    probe_interval: int = 256
    probe_steps: int = 2
    probe_budget: float = 0.01
    acceptance_window: float = 512.0
    acceptance_prior: float = 0.8
    per_request_batch: int = 0
    learn: bool = True
    light_view: bool = False

    def __post_init__(self) -> None:
        if self.max_draft_tokens < 1:
            raise ValueError(f"max_draft_tokens is {self.max_draft_tokens}: give at least 1, or mode 'off'.")
        if self.mode not in ("adaptive", "fixed", "off"):
            raise ValueError(f"control.mode is {self.mode!r}: give 'adaptive', 'fixed' or 'off'.")
        if not 0.0 <= self.margin < 1.0:
            raise ValueError(f"control.margin is {self.margin}: give a fraction between 0 and 1.")
        if not 0.0 <= self.probe_budget <= 0.2:
            raise ValueError(f"control.probe_budget is {self.probe_budget}: give a fraction between 0 and 0.2.")
        if self.probe_interval < 1 or self.probe_steps < 1:
            raise ValueError("control.probe_interval and control.probe_steps must be at least 1.")


@dataclass(frozen=True, slots=True)
class StepState:
    """What the scheduler knows when it chooses the draft length of a step.

    Attributes:
        num_decode: requests that sample in this step and could draft after it.
        mean_context: their mean context length in tokens.
        num_waiting: requests not yet admitted.
        prefill_tokens: prompt tokens computed in this step.
        pending_prefill_tokens: prompt tokens expected in the next step, the one that verifies these drafts (the rest of
            partly computed prompts and the waiting ones that fit); 0 when unknown.
        draft_caps: for each request that can use fewer than the maximum (switched off: 0; r tokens left: r - 1), how
            many. Requests without a cap are left out.
        request_ids: ids of the decoding requests; only read when `ControlSettings.per_request_batch` covers them.
    """

    num_decode: int
    mean_context: float = 1.0
    num_waiting: int = 0
    prefill_tokens: int = 0
    pending_prefill_tokens: int = 0
    draft_caps: Sequence[int] = ()
    request_ids: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Memory:
    """What the controller remembers between steps.

    `steps_since_switch` counts from the last time that drafting began or ended, probes aside; `light` says which view
    is in use, `steps_since_other` counts the drafting steps since the other one drafted.
    """

    num_draft_tokens: int = 0
    light: bool = False
    steps_since_draft: int = 0
    steps_since_plain: int = 0
    steps_since_other: int = 0
    steps_since_probe: int = 0
    steps_since_switch: int = 1 << 20
    probe_credit: float = 0.0
    probe_draft_tokens: int = 0
    probe_light: bool = False
    probe_steps_left: int = 0


@dataclass(frozen=True, slots=True)
class Decision:
    """One decision with everything that led to it. Times in seconds, indexed by γ in 0..max; empty when none were
    needed.

    `times[γ]` is what a cycle of γ drafts is charged, `tokens[γ]` what it yields over all decoding requests, with the
    view that drafts. `light` says which one that is; None leaves it to the drafter.
    """

    num_draft_tokens: int
    reason: Reason
    state: StepState
    times: Sequence[float] = ()
    tokens: Sequence[float] = ()
    probe_cost: float = 0.0
    light: bool | None = None

    @property
    def predicted_speedup(self) -> float:
        """Predicted token rate of the choice relative to plain decoding; 1.0 when nothing was predicted."""
        if not self.times:
            return 1.0
        chosen = self.num_draft_tokens
        return self.tokens[chosen] / self.times[chosen] * self.times[0] / self.tokens[0]


@dataclass(frozen=True, slots=True)
class StepObservation:
    """A finished step, as the scheduler saw it.

    `seconds` from the result of the previous step to that of this one. `num_verified` and `num_drafted` are draft
    tokens per decoding request that were verified and made in this time (means where requests differ); on some devices
    the drafts are those of the step before. `probe` says that their number was an experiment, `light` that the light
    view made them. Leave steps out whose duration means nothing (the engine was idle).
    """

    seconds: float
    num_decode: int
    mean_context: float
    num_verified: float
    num_drafted: int
    prefill_tokens: int = 0
    probe: bool = False
    light: bool = False

    @property
    def work(self) -> tuple[int, float, float, int, int, bool]:
        """What the step did, as `OnlineCorrection` takes it."""
        return (
            self.num_decode,
            self.mean_context,
            self.num_verified,
            self.num_drafted,
            self.prefill_tokens,
            self.light,
        )


class Times(Protocol):
    """Where `decide` takes its predictions from."""

    def step_times(self, batch: float, seq: float, max_draft_tokens: int) -> StepTimes:
        """Seconds of verification for each γ and of one draft forward."""
        ...


@dataclass(slots=True)
class _Rated:
    """What one view promises, for γ in 0..longest: seconds charged to a cycle, tokens that it yields, their ratio."""

    light: bool
    cycle: list[float]
    tokens: list[float]
    rates: list[float]


def _rated(light: bool, draft: float, forward: Sequence[float], able: Sequence[int], tau: Sequence[float]) -> _Rated:
    """The promise of a view.

    Args:
        light: which one it is.
        draft: seconds of one of its draft forwards.
        forward: see `_forward_times`.
        able: see `_able`.
        tau: its τ(0..max) per request.
    """
    cycle, tokens = [forward[0]], [able[0] * tau[0]]
    for gamma in range(1, len(forward)):
        cycle.append(gamma * draft + forward[gamma])
        tokens.append(tokens[-1] + able[gamma] * (tau[gamma] - tau[gamma - 1]))
    return _Rated(light, cycle, tokens, [gained / seconds for gained, seconds in zip(tokens, cycle, strict=True)])


def _forward_times(state: StepState, times: StepTimes, prefill_tokens: int, longest: int) -> Sequence[float]:
    """Seconds of the target's forward charged to decoding for a cycle of γ drafts, γ in 0..longest."""
    verify = times.verify[: longest + 1]
    if prefill_tokens <= 0:
        return verify
    prefill, row = prefill_tokens * times.per_row, state.num_decode * times.per_row
    return [max(seconds - prefill, (gamma + 1) * row) for gamma, seconds in enumerate(verify)]


def _able(state: StepState, longest: int) -> list[int]:
    """For γ in 0..longest, how many requests can use the γ-th draft; a capped one gains nothing past its cap."""
    able = [state.num_decode]
    ending = Counter(state.draft_caps)
    for gamma in range(1, longest + 1):
        able.append(able[-1] - ending[gamma - 1])
    return able


def decide(
    state: StepState,
    times: Times,
    expected_tokens: Sequence[float],
    settings: ControlSettings,
    memory: Memory = Memory(),
    doubts: Sequence[float] | None = None,
    light_tokens: Sequence[float] | None = None,
    other_hopes: Sequence[float] | None = None,
) -> Decision:
    """Choose the draft length of one step, and the view that drafts.

    Args:
        state: the engine's state.
        times: predicted times, see `CostModel.step_times`.
        expected_tokens: τ(0..max) per request, see `AcceptanceEstimator.expected_tokens_table`.
        settings: limits, margin, probes.
        memory: the current draft length and view, and the probes' accounts.
        doubts: for each γ, the standard deviation of the logarithm of its time relative to the current choice's; None
            when nothing is known about it.
        light_tokens: τ(0..max) of the light view; None where the drafter has none.
        other_hopes: for each γ, the factor by which the view that is not in use may be better than predicted; None
            when it is not time to ask.
    """
    longest = settings.max_draft_tokens
    if settings.mode == "off":
        return Decision(0, Reason.OFF_MODE, state)
    if state.num_decode <= 0:
        return Decision(0, Reason.NO_DECODE, state)
    if state.draft_caps and len(state.draft_caps) >= state.num_decode:
        longest = min(longest, max(0, *state.draft_caps))
        if longest == 0:
            return Decision(0, Reason.CAPPED, state)
    if settings.mode == "fixed":
        return Decision(longest, Reason.FIXED, state)

    predicted = times.step_times(state.num_decode, state.mean_context, settings.max_draft_tokens)
    prefill = state.pending_prefill_tokens
    forward, able = _forward_times(state, predicted, prefill, longest), _able(state, longest)
    used = _rated(False, predicted.draft, forward, able, expected_tokens)
    other = None
    if light_tokens is not None:
        other = _rated(True, predicted.light, forward, able, light_tokens)
        if memory.light:
            used, other = other, used
    if memory.probe_steps_left > 0 and memory.probe_draft_tokens <= longest:
        if other is not None and memory.probe_light != used.light:
            used = other
        return _chosen(memory.probe_draft_tokens, Reason.PROBE, state, used)
    # between two views a wrong choice costs little, and a switch nothing: a quarter of the margin is enough
    if other is not None and max(other.rates) > (1.0 + 0.25 * settings.margin) * max(used.rates):
        used, other, doubts, other_hopes = other, used, None, None  # which were about the view that was in use
    rates = used.rates
    best = max(range(longest + 1), key=rates.__getitem__)
    current = min(memory.num_draft_tokens, longest)
    chosen, reason = best, Reason.BEST
    # between two draft lengths a wrong choice costs little and a switch nothing: a quarter of the margin is enough
    margin = settings.margin if current == 0 else 0.25 * settings.margin
    if best > current and rates[best] < (1.0 + margin) * rates[current]:
        chosen, reason = current, Reason.MARGIN_HOLD
    if chosen == 0 and prefill > 0:
        tau = light_tokens if used.light and light_tokens is not None else expected_tokens
        alone = _rated(used.light, predicted.of_draft(used.light), predicted.verify[: longest + 1], able, tau)
        if max(alone.rates[1:]) > alone.rates[0]:
            reason = Reason.LOAD

    probe = _probe_candidate(used, other, chosen, settings, memory, doubts, other_hopes) if prefill == 0 else None
    if probe is not None:
        view, gamma = probe
        # What the probe is predicted to lose against the choice. A profile may be wrong about just that, so no more
        # than two plain steps are asked for in advance; what it really lost is charged when its duration is known.
        loss = settings.probe_steps * max(0.0, view.cycle[gamma] - view.tokens[gamma] / rates[chosen])
        if memory.probe_credit >= min(loss, 2.0 * view.cycle[0]):
            return _chosen(gamma, Reason.PROBE, state, view, loss)
    return _chosen(chosen, reason, state, used)


def _chosen(num_draft_tokens: int, reason: Reason, state: StepState, view: _Rated, loss: float = 0.0) -> Decision:
    return Decision(num_draft_tokens, reason, state, view.cycle, view.tokens, probe_cost=loss, light=view.light)


def _probe_candidate(
    used: _Rated,
    other: _Rated | None,
    chosen: int,
    settings: ControlSettings,
    memory: Memory,
    doubts: Sequence[float] | None,
    other_hopes: Sequence[float] | None,
) -> tuple[_Rated, int] | None:
    """The view and the draft length that are worth an experiment now, if any.

    Args:
        used, other: the view in use and the other one, if there is one.
        chosen: the draft length without an experiment.
        doubts, other_hopes: as of `decide`.
    """
    rates = used.rates
    others = [gamma for gamma in range(len(rates)) if gamma != chosen]
    hoped: list[tuple[float, _Rated, int]] = []
    if doubts is not None and memory.steps_since_probe * 16 >= settings.probe_interval:
        hoped += [(rates[gamma] * (1.0 + doubts[gamma]), used, gamma) for gamma in others]
    if chosen == 0:
        other = None
    elif other is not None and other_hopes is not None:
        hoped += [(other.rates[gamma] * other_hopes[gamma], other, gamma) for gamma in range(1, len(rates))]
    if hoped:
        rate, view, gamma = max(hoped, key=lambda candidate: candidate[0])
        if rate > (1.0 + settings.margin) * rates[chosen]:
            return view, gamma
    if chosen == 0 and memory.steps_since_draft >= settings.probe_interval:
        return used, max(others, key=rates.__getitem__)
    if chosen > 0 and memory.steps_since_plain >= settings.probe_interval:
        return used, 0
    if other is not None and memory.steps_since_other >= _VIEW_INTERVALS * settings.probe_interval:
        return other, max(range(1, len(rates)), key=other.rates.__getitem__)
    return None


class Controller:
    """The scheduler's controller: `decide` before a step's drafts, `observe_*` when results arrive.

    Args:
        settings: see `ControlSettings`.
        cost_model: a measured profile, or None to start from a prior and learn from step durations alone.
        max_batch: the engine's max_num_seqs.
    """

    def __init__(
        self, settings: ControlSettings, cost_model: CostModel | None = None, *, max_batch: int = 1024
    ) -> None:
        self.settings = settings
        self.acceptance = AcceptanceEstimator(
            settings.max_draft_tokens,
            window=settings.acceptance_window,
            prior_mean=settings.acceptance_prior,
            per_request=settings.per_request_batch > 0,
        )
        self.rejection_ratio = RejectionRatio()
        self._trials = {False: [0.0, 0.0], True: [0.0, 0.0]}  # of either view since the last decision, and rejections
        self.times = OnlineCorrection(
            cost_model if cost_model is not None else CostModel.prior(), settings.max_draft_tokens, max_batch=max_batch
        )
        self.memory = Memory()
        self.decisions: Counter[Reason] = Counter()
        self.draft_lengths: Counter[int] = Counter()
        self.probes = 0
        self.probe_seconds = 0.0
        self.steps = 0
        self._stalled_probe = -1  # the last one, by its number

    def decide(self, state: StepState) -> Decision:
        """The draft length of the step being scheduled."""
        settings, memory = self.settings, self.memory
        expected = self._expected_tokens(state, 1.0)
        light_tokens = None
        if settings.light_view:
            self._learn_ratio()
            light_tokens = self._expected_tokens(state, self.rejection_ratio.ratio)
        doubts = other_hopes = None
        if settings.learn and state.num_decode > 0 and memory.steps_since_probe * 16 >= settings.probe_interval:
            doubts = self.times.doubts(state.num_decode, state.mean_context, memory.num_draft_tokens, memory.light)
            if light_tokens is not None:
                other_hopes = self._other_hopes(state, expected if memory.light else light_tokens)
            # The reason of a switch may have been a machine that changed its speed in that moment: look again soon.
            recent = _SWITCH_DOUBT * min(1.0, _SWITCH_STEPS / (memory.steps_since_switch + 1))
            drafting = memory.num_draft_tokens > 0
            doubts = [doubt + recent * ((gamma > 0) != drafting) for gamma, doubt in enumerate(doubts)]
        decision = decide(state, self.times, expected, settings, memory, doubts, light_tokens, other_hopes)
        self._remember(decision)
        return decision

    def _expected_tokens(self, state: StepState, rejection_ratio: float) -> Sequence[float]:
        """τ(0..max) of a view that is rejected so many times as often as the main one."""
        if state.num_decode <= self.settings.per_request_batch and state.request_ids:
            return self.acceptance.expected_tokens_of(state.request_ids, rejection_ratio)
        return self.acceptance.expected_tokens_at(rejection_ratio)

    def _learn_ratio(self) -> None:
        self.rejection_ratio.use(self.memory.light)
        for light, counts in self._trials.items():
            if counts[0]:
                self.rejection_ratio.observe(light, *counts)
                counts[:] = 0.0, 0.0

    def _other_hopes(self, state: StepState, expected: Sequence[float]) -> list[float]:
        """For each γ, how much better than expected the view not in use may be: its acceptance, and its times."""
        memory, ratio = self.memory, self.rejection_ratio
        batch, seq = state.num_decode, state.mean_context
        doubts = self.times.doubts(batch, seq, memory.num_draft_tokens, memory.light, not memory.light)
        hoped = (1.0 if memory.light else ratio.ratio) * math.exp(-ratio.doubt)
        tokens = self._expected_tokens(state, hoped)
        return [(1.0 + doubt) * best / usual for doubt, best, usual in zip(doubts, tokens, expected, strict=True)]

    def _remember(self, decision: Decision) -> None:
        memory, chosen = self.memory, decision.num_draft_tokens
        self.decisions[decision.reason] += 1
        self.draft_lengths[chosen] += 1
        if decision.state.num_decode <= 0:
            return
        probing = decision.reason is Reason.PROBE
        steps_left = 0
        credit = memory.probe_credit
        resume = chosen
        if probing:
            resume = memory.num_draft_tokens
            if memory.probe_steps_left > 0:
                steps_left = memory.probe_steps_left - 1
            else:
                steps_left = self.settings.probe_steps - 1
                self.probes += 1
                self.probe_seconds += decision.probe_cost
                credit -= decision.probe_cost
        if decision.times:
            # credit is a fraction of the time spent; at most a few steps' worth is saved up
            plain = decision.times[0]
            state = decision.state
            if state.pending_prefill_tokens > 0:  # of that step decoding has only what the prompts leave
                times = self.times.step_times(state.num_decode, state.mean_context, self.settings.max_draft_tokens)
                plain = float(times.verify[0])
            if not self.probes and credit == 0.0:
                credit = 2.0 * plain
            credit = min(credit + self.settings.probe_budget * plain, 4.0 * plain)
        switched = (resume > 0) != (memory.num_draft_tokens > 0)
        # a view is in use from its first step that is no probe
        light = memory.light if probing or decision.light is None or chosen == 0 else decision.light
        other_drafts = chosen > 0 and decision.light is not None and decision.light != memory.light
        self.memory = Memory(
            num_draft_tokens=resume,
            light=light,
            steps_since_other=0 if other_drafts else memory.steps_since_other + (chosen > 0),
            steps_since_draft=0 if chosen > 0 else memory.steps_since_draft + 1,
            steps_since_plain=0 if chosen == 0 else memory.steps_since_plain + 1,
            steps_since_probe=0 if probing else memory.steps_since_probe + 1,
            steps_since_switch=0 if switched else memory.steps_since_switch + 1,
            probe_credit=credit,
            probe_draft_tokens=chosen if probing else 0,
            probe_light=bool(decision.light) if probing else False,
            probe_steps_left=steps_left,
        )

    def observe_step(self, observation: StepObservation) -> None:
        """Learn from a finished step's duration."""
        self.steps += 1
        if not self.settings.learn or observation.num_decode <= 0:
            return
        if observation.probe:
            self._charge_probe(observation)
        self.times.observe(observation.seconds, *observation.work)

    def _charge_probe(self, observation: StepObservation) -> None:
        """Pay for what a probe's step took beyond its prediction, such as a drafter that had to follow new weights."""
        expected = self.times.predict(*observation.work)
        excess = max(0.0, observation.seconds - expected)
        if excess > _STALL * expected:
            # It met a pause, such as a machine that stood still, unless the probe before did, too.
            if self._stalled_probe != self.probes - 1:
                excess = _STALL * expected
            self._stalled_probe = self.probes
        self.probe_seconds += excess
        self.memory = replace(self.memory, probe_credit=self.memory.probe_credit - excess)

    def observe_acceptance(
        self, num_drafted: int, num_accepted: int, request_id: str | None = None, light: bool = False
    ) -> None:
        """Count one request's verified drafts, which came from the light view or from the main one."""
        self.acceptance.observe(num_drafted, num_accepted, request_id, self.rejection_ratio.ratio if light else 1.0)
        if self.settings.light_view:
            counts = self._trials[light]
            counts[0] += min(num_accepted + 1, num_drafted)
            counts[1] += num_accepted < num_drafted

    def drafter_has_changed(self) -> None:
        """The drafter follows other weights: while it is not in use, what was seen of it before says little."""
        if self.memory.num_draft_tokens == 0:
            self.acceptance.fade(_KEPT_EVIDENCE)

    def finish_request(self, request_id: str) -> None:
        """Forget a finished request."""
        self.acceptance.finish(request_id)
