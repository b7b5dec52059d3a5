"""A discrete-event simulator of rollouts on a profile. Every figure that comes out of here is SIMULATED.

One replica is one engine with continuous batching: it admits requests up to `max_num_seqs`, prefills within a token
budget, and in each step verifies the drafts of the step before, then drafts again. Step times come from a cost model,
acceptances are drawn per token. The policy under test is asked for each step exactly as a scheduler would ask;
`ControllerPolicy` wraps the real Controller. Left out: preemption (KV cache is taken to suffice), host time between
steps, and correlation of acceptance along a text.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_selfspec.config import DrafterConfig
from vllm_selfspec.control.acceptance import USUAL_REJECTION_RATIO
from vllm_selfspec.control.calibrate import acceptance_length
from vllm_selfspec.control.cost_model import CostModel, ModelConstants, Point, Roofline, StepTimes
from vllm_selfspec.control.policy import Controller, ControlSettings, StepObservation, StepState

Array = NDArray[np.float64]
IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Workload:
    """The requests of one replica; all arrays of one length.

    Attributes:
        output_tokens: tokens that each request generates, ≥ 1.
        prompt_tokens: prompt tokens that have to be computed (0 for samples whose prompt is cached).
        context_tokens: prompt tokens that attention sees.
        arrivals: seconds at which requests arrive, 0 for a rollout.
        acceptance: probability that a draft token is accepted, per request.
        rejection_ratio: how many times as often drafts of the light view are rejected, where the drafter has one.
        max_num_seqs: requests that run together at most.
        max_batched_tokens: token budget of one step.
    """

    output_tokens: IntArray
    prompt_tokens: IntArray
    context_tokens: IntArray
    arrivals: Array
    acceptance: Array
    rejection_ratio: float = 1.0
    max_num_seqs: int = 256
    max_batched_tokens: int = 8192

    def __post_init__(self) -> None:
        sizes = {len(value) for value in vars(self).values() if isinstance(value, np.ndarray)}
        if len(sizes) != 1 or 0 in sizes:
            raise ValueError(f"the arrays of a workload have the lengths {sorted(sizes)}: give one entry per request.")
        if (self.output_tokens < 1).any():
            raise ValueError("output_tokens holds a request without tokens: leave it out.")
        if not ((self.acceptance >= 0.0) & (self.acceptance <= 1.0)).all():
            raise ValueError("acceptance must lie between 0 and 1 for every request.")


def sample_lengths(count: int, rng: np.random.Generator, *, median: float, sigma: float, longest: int) -> IntArray:
    """Log-normal output lengths, clipped to 1..longest: the long tail that rollouts are known for."""
    drawn = np.exp(rng.normal(math.log(median), sigma, count))
    return np.clip(np.round(drawn), 1, longest).astype(np.int64)


def rollout_workload(
    output_tokens: Sequence[int] | IntArray,
    rng: np.random.Generator,
    *,
    acceptance: float,
    acceptance_spread: float = 0.0,
    rejection_ratio: float = 1.0,
    prompt_tokens: int = 256,
    samples_per_prompt: int = 8,
    max_num_seqs: int = 256,
    arrival_rate: float | None = None,
) -> Workload:
    """Requests of a rollout (all at once) or, with `arrival_rate` per second, of a server under Poisson load.

    `acceptance_spread` is the standard deviation of acceptance between requests (Beta distributed). The first of each
    `samples_per_prompt` requests pays for the prompt, the others find it cached.
    """
    lengths = np.asarray(output_tokens, dtype=np.int64)
    count = len(lengths)
    rates = np.full(count, acceptance)
    if acceptance_spread > 0.0:
        strength = acceptance * (1.0 - acceptance) / acceptance_spread**2 - 1.0
        if strength <= 0.0:
            raise ValueError(f"acceptance_spread {acceptance_spread} is impossible around acceptance {acceptance}.")
        rates = rng.beta(acceptance * strength, (1.0 - acceptance) * strength, count)
    arrivals = np.zeros(count)
    if arrival_rate is not None:
        arrivals = np.cumsum(rng.exponential(1.0 / arrival_rate, count))
    first = np.arange(count) % max(1, samples_per_prompt) == 0
    return Workload(
        output_tokens=lengths,
        prompt_tokens=np.where(first, prompt_tokens, 0),
        context_tokens=np.full(count, prompt_tokens),
        arrivals=arrivals,
        acceptance=rates,
        rejection_ratio=rejection_ratio,
        max_num_seqs=max_num_seqs,
    )


class Policy(Protocol):
    """What the simulator asks in each step, and tells afterwards."""

    name: str

    def start_rollout(self) -> None:
        """A new rollout begins on the same engine."""
        ...

    def choose(self, state: StepState) -> tuple[int, bool]:
        """γ of the step being scheduled, and whether the light view drafts."""
        ...

    def observe(self, observation: StepObservation, drafted: IntArray, accepted: IntArray, light: bool) -> None:
        """The step is over: its duration, and per decoding request what was verified and accepted.

        Args:
            light: what was verified came from the light view.
        """
        ...


class PlainPolicy:
    """Never drafts."""

    name = "plain"

    def start_rollout(self) -> None:
        """Nothing to reset."""

    def choose(self, state: StepState) -> tuple[int, bool]:
        """Always 0."""
        return 0, False

    def observe(self, observation: StepObservation, drafted: IntArray, accepted: IntArray, light: bool) -> None:
        """Learns nothing."""


class FixedPolicy(PlainPolicy):
    """Always drafts the same number of tokens."""

    def __init__(self, num_draft_tokens: int) -> None:
        self.num_draft_tokens = num_draft_tokens
        self.name = f"fixed γ={num_draft_tokens}"

    def choose(self, state: StepState) -> tuple[int, bool]:
        """The fixed number."""
        return self.num_draft_tokens, False


class StaticTablePolicy(PlainPolicy):
    """vLLM's static batch-size table: γ by number of running requests, made once for one context and acceptance."""

    name = "static table"

    def __init__(self, cost: CostModel, max_draft_tokens: int, max_batch: int, *, seq: int, acceptance: float) -> None:
        gammas = np.arange(max_draft_tokens + 1)
        tau = acceptance_length(gammas, min(acceptance, 1.0 - 1e-9))
        edges = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
        self.table: list[int] = [0] * (max_batch + 1)
        for low, high in zip(edges, [*edges[1:], max_batch + 1], strict=True):
            best = int(np.argmax(tau / np.asarray(cost.cycle_time(math.sqrt(low * max(low, high - 1)), seq, gammas))))
            for batch in range(low, min(high, max_batch + 1)):
                self.table[batch] = best

    def choose(self, state: StepState) -> tuple[int, bool]:
        """The table's entry."""
        return self.table[min(state.num_decode, len(self.table) - 1)], False


class ReferencePolicy:
    """The latch and ladder of EfficientRollout (arXiv 2606.18967), from its description.

    Off at the start of each rollout. Once more than `ramp` requests have run, it fires when the predicted speedup at
    the ladder's γ reaches 1 + margin, with an acceptance length frozen from the rollout before (γ itself at first and
    after a change), and stays on until the next rollout. Between rollouts γ moves one rung up after two rollouts in a
    row with acceptance ≥ `up`, one down after two with ≤ `down`. It is given the same cost model as everybody else, not
    the published six-parameter fit.
    """

    name = "latch + ladder"

    def __init__(
        self,
        cost: CostModel,
        *,
        ladder: Sequence[int] = (5, 7, 9, 11),
        margin: float = 0.05,
        ramp: int = 32,
        up: float = 0.94,
        down: float = 0.85,
        persistence: int = 2,
    ) -> None:
        self.cost, self.ladder, self.margin, self.ramp = cost, tuple(ladder), margin, ramp
        self.up, self.down, self.persistence = up, down, persistence
        self._rung = 0
        self._crossings = 0
        self._acceptance_length = float(self.ladder[0])
        self._drafts = self._accepted = 0
        self._fired = self._seen_full = False

    def start_rollout(self) -> None:
        """Move on the ladder, freeze the acceptance length, switch off."""
        if self._drafts:
            gamma = self.ladder[self._rung]
            rate = self._accepted / (self._drafts * gamma)
            self._acceptance_length = 1.0 + self._accepted / self._drafts
            step = 1 if rate >= self.up else -1 if rate <= self.down else 0
            self._crossings = self._crossings + step if step and self._crossings * step >= 0 else step
            if abs(self._crossings) >= self.persistence:
                self._crossings = 0
                moved = min(len(self.ladder) - 1, max(0, self._rung + step))
                if moved != self._rung:
                    self._rung = moved
                    self._acceptance_length = float(self.ladder[moved])
        self._drafts = self._accepted = 0
        self._fired = self._seen_full = False

    def choose(self, state: StepState) -> tuple[int, bool]:
        """0 until the latch has fired, then the ladder's γ."""
        gamma = self.ladder[self._rung]
        if not self._fired:
            if not self._seen_full:
                self._seen_full = state.num_decode > self.ramp
                return 0, False
            if state.num_decode == 0:
                return 0, False
            speedup = self.cost.speedup(state.num_decode, state.mean_context, gamma, self._acceptance_length)
            self._fired = bool(speedup >= 1.0 + self.margin)
        return gamma if self._fired else 0, False

    def observe(self, observation: StepObservation, drafted: IntArray, accepted: IntArray, light: bool) -> None:
        """Count drafts and acceptances of the rollout."""
        verified = drafted > 0
        self._drafts += int(verified.sum())
        self._accepted += int(accepted[verified].sum())


class ControllerPolicy:
    """The product's own Controller."""

    name = "selfspec"

    def __init__(self, settings: ControlSettings, cost: CostModel | None, max_batch: int) -> None:
        self.controller = Controller(settings, cost, max_batch=max_batch)

    def start_rollout(self) -> None:
        """The controller needs no reset between rollouts."""

    def choose(self, state: StepState) -> tuple[int, bool]:
        """The controller's decision."""
        decision = self.controller.decide(state)
        return decision.num_draft_tokens, bool(decision.light)

    def observe(self, observation: StepObservation, drafted: IntArray, accepted: IntArray, light: bool) -> None:
        """Pass everything on, as the scheduler does."""
        self.controller.observe_step(observation)
        for num_drafted, num_accepted in zip(drafted.tolist(), accepted.tolist(), strict=True):
            if num_drafted:
                self.controller.observe_acceptance(num_drafted, num_accepted, light=light)


class OraclePolicy(PlainPolicy):
    """Knows true times and true mean acceptance and takes the best rate in every step."""

    name = "oracle"

    def __init__(self, clock: Clock, max_draft_tokens: int, acceptance: float, rejection_ratio: float = 1.0) -> None:
        self.clock = clock
        views = {False: 1.0, True: rejection_ratio} if clock.cost.has_light_view else {False: 1.0}
        self.tokens = {light: self._tokens(max_draft_tokens, acceptance, ratio) for light, ratio in views.items()}

    @staticmethod
    def _tokens(max_draft_tokens: int, acceptance: float, rejection_ratio: float) -> list[float]:
        rate = 1.0 - max(1e-9, min(1.0, rejection_ratio * (1.0 - acceptance)))
        tokens: list[float] = acceptance_length(np.arange(max_draft_tokens + 1), rate).tolist()
        return tokens

    def choose(self, state: StepState) -> tuple[int, bool]:
        """The γ and the view with the highest true rate."""
        if state.num_decode <= 0:
            return 0, False
        times = self.clock.times(state.num_decode, state.mean_context)
        rates = {
            (gamma, light): gained / (gamma * times.of_draft(light) + times.verify[gamma])
            for light, tokens in self.tokens.items()
            for gamma, gained in enumerate(tokens)
        }
        return max(rates, key=rates.__getitem__)


class Clock:
    """True step durations: a cost model, cached, times log-normal noise."""

    def __init__(self, cost: CostModel, max_draft_tokens: int, noise: float, rng: np.random.Generator) -> None:
        self.cost, self.max_draft_tokens, self.noise, self._rng = cost, max_draft_tokens, noise, rng
        self._cache: dict[tuple[int, int], StepTimes] = {}

    def times(self, batch: int, seq: float) -> StepTimes:
        """Noise-free times of one operating point (context rounded to 1/8 octave)."""
        key = batch, round(8.0 * math.log2(max(1.0, seq)))
        found = self._cache.get(key)
        if found is None:
            found = self._cache[key] = self.cost.step_times(batch, 2.0 ** (key[1] / 8.0), self.max_draft_tokens)
        return found

    def seconds(
        self, batch: int, seq: float, verified: float, drafted: int, prefill: int, light: bool = False
    ) -> float:
        """One step: forward over verified + 1 rows for each of `batch` requests and `prefill` rows, then drafts."""
        noise = math.exp(self.noise * self._rng.standard_normal()) if self.noise else 1.0
        if batch == 0:
            lone = self.times(1, max(1.0, seq))
            return noise * max(lone.verify[0], prefill * lone.per_row)
        times = self.times(batch, seq)
        low = min(int(verified), self.max_draft_tokens)
        high = min(low + 1, self.max_draft_tokens)
        forward = times.verify[low] + (verified - low) * (times.verify[high] - times.verify[low])
        if prefill:
            forward = max(forward, (batch * (verified + 1.0) + prefill) * times.per_row)
        return noise * (forward + drafted * times.of_draft(light))


@dataclass
class RolloutResult:
    """One simulated rollout of one replica."""

    makespan: float
    tokens: int
    steps: int
    draft_lengths: dict[int, int]
    mean_latency: float
    drafted: int
    accepted: int
    timeline: list[tuple[float, int, int]] = field(default_factory=list)
    """(seconds, decoding requests, γ), thinned to a few hundred entries."""


def simulate_rollout(workload: Workload, policy: Policy, clock: Clock, rng: np.random.Generator) -> RolloutResult:
    """Run one replica until its last request is done."""
    policy.start_rollout()
    order = np.argsort(workload.arrivals, kind="stable")
    total = len(order)
    admitted = finished = 0
    now = latency = 0.0
    remaining = np.empty(0, dtype=np.int64)
    context = np.empty(0, dtype=np.int64)
    prefill_left = np.empty(0, dtype=np.int64)
    drafts = np.empty(0, dtype=np.int64)
    drafts_light = False
    rates = np.empty(0)
    arrived = np.empty(0)
    lengths: Counter[int] = Counter()
    timeline: list[tuple[float, int, int]] = []
    steps = num_drafted = num_accepted = tokens = 0
    arrivals = workload.arrivals[order]
    while finished < total:
        if not len(remaining) and arrivals[admitted] > now:
            now = float(arrivals[admitted])
        due = int(np.searchsorted(arrivals, now, side="right"))
        room = min(workload.max_num_seqs - len(remaining), due - admitted)
        if room > 0:
            chosen = order[admitted : admitted + room]
            remaining = np.append(remaining, workload.output_tokens[chosen])
            context = np.append(context, workload.context_tokens[chosen])
            # the last prompt token is computed even when the rest is cached
            prefill_left = np.append(prefill_left, np.maximum(1, workload.prompt_tokens[chosen]))
            drafts = np.append(drafts, np.zeros(room, dtype=np.int64))
            rates = np.append(rates, workload.acceptance[chosen])
            arrived = np.append(arrived, arrivals[admitted : admitted + room])
            admitted += room
        decoding = prefill_left == 0
        batch = int(decoding.sum())
        prefill, sampled = 0, decoding
        if batch < len(remaining):
            budget = max(0, workload.max_batched_tokens - int(drafts.sum()) - batch)
            waiting = np.cumsum(prefill_left)
            prefill = min(budget, int(waiting[-1]))
            prefill_left = np.clip(waiting - prefill, 0, prefill_left)
            sampled = prefill_left == 0
        can_draft = int(sampled.sum())
        mean_context = float(context[sampled].mean()) if can_draft else float(context.mean())
        caps = remaining[sampled] - 2 - drafts[sampled]
        short = caps[caps < clock.max_draft_tokens]
        state = StepState(
            num_decode=can_draft,
            mean_context=mean_context,
            num_waiting=due - admitted,
            prefill_tokens=prefill,
            pending_prefill_tokens=min(workload.max_batched_tokens, int(prefill_left.sum())),
            draft_caps=tuple(np.maximum(0, short).tolist()),
        )
        gamma, light = policy.choose(state) if can_draft else (0, False)
        gamma = min(gamma, clock.max_draft_tokens)
        verified = float(drafts[decoding].mean()) if batch else 0.0
        draft_batch = can_draft if gamma else batch
        seconds = clock.seconds(batch, mean_context, verified, 0, prefill)
        if gamma:
            seconds += gamma * clock.times(draft_batch, mean_context).of_draft(light)
        now += seconds
        steps += 1
        lengths[gamma] += 1
        timeline.append((now, can_draft, gamma))
        # leading successes of Bernoulli trials: a geometric number, cut at the drafts there were
        accepted = np.zeros(len(remaining), dtype=np.int64)
        live = drafts > 0
        if live.any():
            ratio = workload.rejection_ratio if drafts_light else 1.0
            failures = np.clip(ratio * (1.0 - rates[live]), 1e-12, 1.0)
            accepted[live] = np.minimum(rng.geometric(failures) - 1, drafts[live])
        produced = np.where(sampled, np.minimum(accepted + 1, remaining), 0)
        policy.observe(
            StepObservation(seconds, batch, mean_context, verified, gamma, prefill, light=light),
            drafts[decoding],
            accepted[decoding],
            drafts_light,
        )
        drafts_light = light if gamma else drafts_light
        num_drafted += int(drafts.sum())
        num_accepted += int(accepted.sum())
        tokens += int(produced.sum())
        remaining = remaining - produced
        context = context + produced
        drafts = np.where(sampled, np.minimum(gamma, np.maximum(0, remaining - 1)), 0)
        done = remaining == 0
        if done.any():
            latency += float((now - arrived[done]).sum())
            finished += int(done.sum())
            keep = ~done
            remaining, context, prefill_left = remaining[keep], context[keep], prefill_left[keep]
            drafts, rates, arrived = drafts[keep], rates[keep], arrived[keep]
    thin = max(1, len(timeline) // 400)
    return RolloutResult(
        makespan=now,
        tokens=tokens,
        steps=steps,
        draft_lengths=dict(sorted(lengths.items())),
        mean_latency=latency / total,
        drafted=num_drafted,
        accepted=num_accepted,
        timeline=timeline[::thin],
    )


@dataclass
class PolicyResult:
    """One policy over all simulated rollouts. Seconds; `makespans[rollout][replica]`."""

    name: str
    makespans: list[list[float]]
    tokens_per_second: float
    mean_latency: float
    draft_lengths: dict[int, int]
    timeline: list[tuple[float, int, int]]

    @property
    def rollout_seconds(self) -> float:
        """Mean over rollouts of the slowest replica: what a synchronous trainer waits for."""
        return sum(max(replicas) for replicas in self.makespans) / len(self.makespans)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {"simulated": True, "rollout_seconds": self.rollout_seconds, **asdict(self)}


def compare(
    cost: CostModel,
    workloads: Callable[[np.random.Generator], Workload],
    policies: Callable[[Clock], Mapping[str, Policy]],
    *,
    max_draft_tokens: int,
    replicas: int = 1,
    rollouts: int = 1,
    noise: float = 0.02,
    seed: int = 0,
    progress: Callable[[], None] | None = None,
) -> list[PolicyResult]:
    """Simulate every policy on the same requests.

    Args:
        cost: the true times.
        workloads: draws one replica's requests of one rollout.
        policies: makes fresh policies, one set per replica, given the replica's clock (for the oracle).
        max_draft_tokens: the largest γ of any policy.
        replicas: distinct replicas to simulate. Large fleets are sampled: pass some tens.
        rollouts: rollouts in a row on living engines; what a policy learns is kept.
        noise: standard deviation of the logarithm of step durations.
        seed: makes everything reproducible.
        progress: called after each simulated rollout of a policy.
    """
    results: dict[str, PolicyResult] = {}
    tokens: Counter[str] = Counter()
    busy: Counter[str] = Counter()
    latency: Counter[str] = Counter()
    lengths: dict[str, Counter[int]] = {}
    for replica in range(replicas):
        # every policy gets its own stream of chance; the requests are drawn once and shared
        clocks = Clock(cost, max_draft_tokens, noise, np.random.default_rng([seed, replica, 1]))
        team = policies(clocks)
        for rollout in range(rollouts):
            workload = workloads(np.random.default_rng([seed, replica, rollout, 2]))
            for name, policy in team.items():
                outcome = simulate_rollout(workload, policy, clocks, np.random.default_rng([seed, replica, rollout, 3]))
                entry = results.setdefault(name, PolicyResult(name, [], 0.0, 0.0, {}, []))
                if len(entry.makespans) <= rollout:
                    entry.makespans.append([])
                entry.makespans[rollout].append(outcome.makespan)
                if replica == 0:
                    entry.timeline = outcome.timeline
                tokens[name] += outcome.tokens
                busy[name] += outcome.makespan  # type: ignore[assignment]  # seconds, not a count
                latency[name] += outcome.mean_latency  # type: ignore[assignment]
                lengths.setdefault(name, Counter()).update(outcome.draft_lengths)
                if progress is not None:
                    progress()
    for name, entry in results.items():
        entry.tokens_per_second = tokens[name] / busy[name]
        entry.mean_latency = latency[name] / (replicas * rollouts)
        entry.draft_lengths = dict(sorted(lengths[name].items()))
    return list(results.values())


def standard_policies(
    cost: CostModel,
    *,
    max_draft_tokens: int = 11,
    fixed: Sequence[int] = (3, 7),
    acceptance: float = 0.98,
    max_batch: int = 256,
    mean_context: int = 2048,
    rejection_ratio: float = 1.0,
    settings: ControlSettings | None = None,
) -> Callable[[Clock], dict[str, Policy]]:
    """The comparison of the docs: plain, fixed lengths, static table, the reference's controller, ours, an oracle.

    On a profile of a drafter with two views, ours and the oracle choose between them.
    """
    chosen = settings or ControlSettings(
        max_draft_tokens=max_draft_tokens,
        light_view=cost.has_light_view,
        acceptance_prior=assumed_acceptance(cost),
    )

    def build(clock: Clock) -> dict[str, Policy]:
        team: list[Policy] = [PlainPolicy(), *(FixedPolicy(gamma) for gamma in fixed)]
        team.append(StaticTablePolicy(cost, max_draft_tokens, max_batch, seq=mean_context, acceptance=acceptance))
        team.append(ReferencePolicy(cost))
        team.append(ControllerPolicy(chosen, cost, max_batch))
        team.append(OraclePolicy(clock, max_draft_tokens, acceptance, rejection_ratio))
        return {policy.name: policy for policy in team}

    return build


def assumed_acceptance(cost: CostModel) -> float:
    """What an engine's controller assumes before any draft was verified, for the drafter that the profile names."""
    try:  # as an engine writes it: its JSON, then how many tokens it may draft
        named, _ = json.JSONDecoder().raw_decode(str(cost.meta.get("drafter")))
        drafter = DrafterConfig.model_validate(named)
    except ValueError:  # in words, as of a sweep
        drafter = DrafterConfig.model_validate({})
    return drafter.usual_acceptance(cost.has_light_view)


_Count = Annotated[int, Field(ge=1, strict=True)]
_Tokens = Annotated[int, Field(ge=0, strict=True)]
_Seconds = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


class Recording(BaseModel):
    """A recorded rollout: docs/control.md. What else the object holds is not read."""

    model_config = ConfigDict(frozen=True)

    output_lengths: list[_Count] = Field(min_length=1)
    """Tokens per request."""
    prompt_lengths: list[_Tokens] = []
    """One per request; none: 64 each."""
    max_num_seqs: _Count | None = None
    """None: all at once."""
    mode: Literal["plain", "fixed", "adaptive"] = "plain"
    num_speculative_tokens: int = Field(7, ge=1, le=32)
    acceptance: float = Field(0.97, ge=0.0, le=1.0)
    """Per drafted token, given that those before it were accepted."""
    acceptance_prior: float | None = Field(None, gt=0.0, lt=1.0)
    """What the controller took it for at the start; None: that of a new engine."""
    light_view: bool | None = None
    """Whether the controller may choose it; None: where the profile has it."""
    rejection_ratio: float = Field(USUAL_REJECTION_RATIO, ge=1.0, allow_inf_nan=False)
    makespan: _Seconds | None = None
    step_seconds: list[_Seconds] = []

    @classmethod
    def parse(cls, recording: object) -> Recording:
        """Check a recording. ValueError: one sentence about the first field that is wrong."""
        if not isinstance(recording, Mapping):
            raise ValueError(f"the recording is a {type(recording).__name__}: give an object with output_lengths.")
        try:
            found = cls.model_validate(recording)
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"]))
            raise ValueError(f"{where} of the recording is wrong: {problem['msg'].lower()}.") from None
        if found.prompt_lengths and len(found.prompt_lengths) != len(found.output_lengths):
            raise ValueError(
                f"prompt_lengths of the recording has {len(found.prompt_lengths)} entries and output_lengths "
                f"{len(found.output_lengths)}: give one per request, or leave it out."
            )
        return found

    def measured_seconds(self) -> float | None:
        """The makespan, or all steps together; None where neither was recorded."""
        return math.fsum(self.step_seconds) if self.makespan is None and self.step_seconds else self.makespan


def predict_recorded(recording: Mapping[str, Any], cost: CostModel, *, seed: int = 0) -> dict[str, Any]:
    """Predict the makespan of a recorded rollout.

    Args:
        recording: the fields of `Recording`.
        cost: the profile of the machine it ran on.
        seed: of the acceptance draws.

    Returns:
        `predicted_makespan`, `predicted_steps`, and where measured ones are given `measured_makespan` and `error`
        (predicted / measured - 1). `simulated` is True.

    Raises:
        ValueError: a field is missing or impossible.
    """
    told = Recording.parse(recording)
    lengths = np.asarray(told.output_lengths, dtype=np.int64)
    prompts = np.asarray(told.prompt_lengths or [64] * len(lengths), dtype=np.int64)
    gamma = told.num_speculative_tokens
    batch = told.max_num_seqs or len(lengths)
    workload = Workload(
        output_tokens=lengths,
        prompt_tokens=prompts,
        context_tokens=prompts,
        arrivals=np.zeros(len(lengths)),
        acceptance=np.full(len(lengths), told.acceptance),
        rejection_ratio=told.rejection_ratio,
        max_num_seqs=batch,
    )
    settings = ControlSettings(
        max_draft_tokens=gamma,
        light_view=cost.has_light_view if told.light_view is None else told.light_view,
        acceptance_prior=told.acceptance_prior or assumed_acceptance(cost),
    )
    policies: dict[str, Callable[[], Policy]] = {
        "plain": PlainPolicy,
        "fixed": lambda: FixedPolicy(gamma),
        "adaptive": lambda: ControllerPolicy(settings, cost, batch),
    }
    rng = np.random.default_rng(seed)
    outcome = simulate_rollout(workload, policies[told.mode](), Clock(cost, gamma, 0.0, rng), rng)
    result: dict[str, Any] = {
        "simulated": True,
        "mode": told.mode,
        "predicted_makespan": outcome.makespan,
        "predicted_steps": outcome.steps,
    }
    if (measured := told.measured_seconds()) is not None:
        result |= {"measured_makespan": measured, "error": outcome.makespan / measured - 1.0}
    return result


def scale_cost_model(
    cost: CostModel,
    *,
    weights: float,
    compute: float,
    context: float,
    extra_seconds: float = 0.0,
    name: str = "scaled",
) -> CostModel:
    """A cost model of a larger model on the same kind of machine, by the roofline: extrapolated, not measured.

    Args:
        cost: what was measured.
        weights: ratio of weight bytes read per GPU (target and drafter alike).
        compute: ratio of FLOP per row and GPU.
        context: ratio of KV bytes per token and GPU.
        extra_seconds: added to every forward, for instance tensor-parallel all-reduces.
        name: of the new model, for its meta data.

    Each measured point is multiplied by scaled / original roofline, so kernel effects are carried over as they are.
    """

    def scaled(line: Roofline) -> Roofline:
        return replace(
            line,
            weights=line.weights * weights,
            context=line.context * context,
            span=line.span * context,
            row=line.row * compute,
            row_context=line.row_context * compute,
        )

    points: list[Point] = []
    for point in cost.points:
        line = cost.draft_roofline if point.component in ("draft", "light") else cost.target_roofline
        each = {"draft": 1, "light": 1, "prefill": point.seq}
        rows = point.batch * each.get(point.component, point.num_draft_tokens + 1)
        at = np.array(float(point.batch)), np.array(float(point.seq)), np.array(float(rows))
        ratio = float(scaled(line).time(*at) / line.time(*at))
        points.append(replace(point, seconds=point.seconds * ratio + extra_seconds))
    meta = {**cost.meta, "model": name, "source": f"SCALED from {cost.meta.get('model')}: no measurement"}
    return CostModel.fit(points, ModelConstants(), meta)


def table_rows(results: Sequence[PolicyResult]) -> Iterator[tuple[str, float, float, float, str]]:
    """Per policy: name, rollout seconds, reduction against plain, tokens/s per replica, most used draft lengths."""
    plain = next((result for result in results if result.name == "plain"), None)
    for result in results:
        reduction = 1.0 - result.rollout_seconds / plain.rollout_seconds if plain is not None else math.nan
        total = sum(result.draft_lengths.values())
        common = sorted(result.draft_lengths.items(), key=lambda item: -item[1])[:4]
        used = " ".join(f"{gamma}:{100 * count / total:.0f}%" for gamma, count in sorted(common))
        yield result.name, result.rollout_seconds, reduction, result.tokens_per_second, used
