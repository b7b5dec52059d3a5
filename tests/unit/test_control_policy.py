"""Acceptance, decisions, online correction and the controller's behaviour on simulated machines."""

import itertools
import math
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_selfspec.control.acceptance import AcceptanceEstimator, RejectionRatio
from vllm_selfspec.control.correction import OnlineCorrection
from vllm_selfspec.control.cost_model import CostModel, Point, StepTimes
from vllm_selfspec.control.policy import (
    Controller,
    ControlSettings,
    Decision,
    Memory,
    Reason,
    StepObservation,
    StepState,
    decide,
)

# ---------------------------------------------------------------- acceptance


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=200))
@settings(deadline=None)
def test_tau_grows_with_gamma_and_stays_in_range(steps: list[tuple[int, int]]) -> None:
    estimator = AcceptanceEstimator(8)
    for drafted, accepted in steps:
        estimator.observe(drafted, min(drafted, accepted))
    table = estimator.expected_tokens_table()
    assert table[0] == 1.0
    for gamma in range(8):
        assert 0.0 <= table[gamma + 1] - table[gamma] <= 1.0
    assert all(0.0 <= rate <= 1.0 for rate in estimator.rates())


def test_estimates_approach_the_truth_per_position() -> None:
    rng = random.Random(0)
    truth = [0.95, 0.8, 0.5]
    estimator = AcceptanceEstimator(3, window=5000)
    for _ in range(20_000):
        accepted = 0
        while accepted < 3 and rng.random() < truth[accepted]:
            accepted += 1
        estimator.observe(3, accepted)
    assert estimator.rates() == pytest.approx(truth, abs=0.03)
    assert estimator.expected_tokens(3) == pytest.approx(1 + 0.95 + 0.95 * 0.8 + 0.95 * 0.8 * 0.5, abs=0.05)


def test_one_unlucky_step_does_not_end_drafting_and_stretches_without_drafts_change_nothing() -> None:
    estimator = AcceptanceEstimator(4, prior_mean=0.9)
    before = estimator.expected_tokens(4)
    estimator.observe(4, 0)
    assert 0.6 * before < estimator.expected_tokens(4) < before
    kept = list(estimator.expected_tokens_table())
    for _ in range(1000):
        estimator.observe(0, 0)
    assert estimator.expected_tokens_table() == kept


def test_old_evidence_fades() -> None:
    estimator = AcceptanceEstimator(2, window=100, prior_strength=4.0)
    for _ in range(1000):
        estimator.observe(2, 2)
    for _ in range(300):
        estimator.observe(2, 0)
    assert estimator.rates()[0] < 0.1


def test_requests_have_own_estimates_and_are_forgotten() -> None:
    estimator = AcceptanceEstimator(4, per_request=True, max_requests=10)
    for _ in range(100):
        estimator.observe(4, 4, "easy")
        estimator.observe(4, 0, "hard")
    assert estimator.expected_tokens_of(["easy"])[4] > 4.0
    assert estimator.expected_tokens_of(["hard"])[4] < 2.0
    assert estimator.expected_tokens_of(["easy", "hard"])[4] < estimator.expected_tokens_of(["easy"])[4]
    assert estimator.expected_tokens_of(["new"]) == estimator.expected_tokens_table()
    estimator.finish("easy")
    estimator.finish("never seen")
    assert estimator.num_requests == 1
    for number in range(50):
        estimator.observe(1, 1, f"r{number}")
    assert estimator.num_requests == 10


def test_wrong_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="num_accepted is 3 of num_drafted 2"):
        AcceptanceEstimator(4).observe(2, 3)
    with pytest.raises(ValueError, match="prior_mean"):
        AcceptanceEstimator(4, prior_mean=1.0)


def _accepted(rng: random.Random, rate: float, drafted: int) -> int:
    accepted = 0
    while accepted < drafted and rng.random() < rate:
        accepted += 1
    return accepted


def test_drafts_of_the_light_view_tell_the_acceptance_of_the_main_one() -> None:
    rng = random.Random(0)
    estimator = AcceptanceEstimator(4, window=5000, per_request=True)
    for _ in range(10_000):
        estimator.observe(4, _accepted(rng, 0.8, 4), "one", rejection_ratio=2.0)
    assert estimator.rates() == pytest.approx([0.9] * 4, abs=0.02)
    assert estimator.expected_tokens_at(2.0) == pytest.approx(
        [1 + sum(0.8**k for k in range(1, g + 1)) for g in range(5)], abs=0.05
    )
    assert estimator.expected_tokens_of(["one"], 2.0)[1] == pytest.approx(1.8, abs=0.06)
    assert estimator.expected_tokens_at(1.0) == estimator.expected_tokens_table()


@pytest.mark.parametrize("light_in_use", [False, True])
@pytest.mark.parametrize(("rejection", "ratio"), [(0.05, 2.2), (0.2, 1.3), (0.02, 3.0)])
def test_the_rejection_ratio_is_found_while_the_texts_change(
    light_in_use: bool, rejection: float, ratio: float
) -> None:
    """The other view drafts in two of sixteen steps, and how hard the texts are wanders by a factor of four."""
    misses = []
    for seed in range(12):
        rng, level, estimate = random.Random(seed), 0.0, RejectionRatio()
        estimate.use(light_in_use)
        for step in range(1500):
            level = 0.995 * level + 0.05 * rng.gauss(0.0, 1.0)
            light = (step % 16 < 2) != light_in_use
            rate = 1.0 - min(0.9, rejection * math.exp(level) * (ratio if light else 1.0))
            accepted = _accepted(rng, rate, 5)
            estimate.observe(light, min(accepted + 1, 5), accepted < 5)
        misses.append(math.log(estimate.ratio / ratio) / estimate.doubt)
    assert abs(sum(misses)) / len(misses) < 0.8
    assert 0.3 < math.sqrt(sum(miss * miss for miss in misses) / len(misses)) < 1.7


def test_the_rejection_ratio_outlives_a_change_of_the_view_in_use() -> None:
    rng, estimate = random.Random(0), RejectionRatio()
    for step in range(3000):
        estimate.use(step >= 1500)
        light = (step % 16 < 2) != estimate.light_in_use
        accepted = _accepted(rng, 0.8 if light else 0.9, 5)
        estimate.observe(light, min(accepted + 1, 5), accepted < 5)
    assert estimate.ratio == pytest.approx(2.0, rel=0.25)


# ---------------------------------------------------------------- decisions


class FixedTimes:
    """Times that do not depend on the operating point."""

    def __init__(self, verify: list[float], draft: float, per_row: float = 1e-5, light: float | None = None) -> None:
        self.times = StepTimes(tuple(verify), draft, per_row, draft if light is None else light)

    def step_times(self, batch: float, seq: float, max_draft_tokens: int) -> StepTimes:
        return self.times


CHEAP = FixedTimes([0.010] * 5, 0.002)
DEAR = FixedTimes([0.010] * 5, 0.020)
FOUR = ControlSettings(max_draft_tokens=4)
TAU = [1.0, 1.9, 2.7, 3.4, 4.0]


def test_the_best_rate_wins_and_is_explained() -> None:
    decision = decide(StepState(num_decode=2), CHEAP, TAU, FOUR)
    assert (decision.num_draft_tokens, decision.reason) == (4, Reason.BEST)
    assert decision.times == pytest.approx([0.010, 0.012, 0.014, 0.016, 0.018])
    assert decision.tokens == pytest.approx([2 * tau for tau in TAU])
    assert decision.predicted_speedup == pytest.approx(4.0 * 0.010 / 0.018)
    assert decide(StepState(num_decode=2), DEAR, TAU, FOUR).num_draft_tokens == 0


LIGHTER = FixedTimes([0.010] * 5, 0.004, light=0.002)
LIGHT_TAU = [1.0, 1.8, 2.5, 3.1, 3.6]


def test_the_view_with_the_better_rate_drafts() -> None:
    state = StepState(num_decode=2)
    light = decide(state, LIGHTER, TAU, FOUR, light_tokens=LIGHT_TAU)
    assert (light.num_draft_tokens, light.light, light.reason) == (4, True, Reason.BEST)
    assert light.times == pytest.approx([0.010, 0.012, 0.014, 0.016, 0.018])
    assert light.tokens == pytest.approx([2 * tau for tau in LIGHT_TAU])
    main = decide(state, LIGHTER, TAU, FOUR, light_tokens=[1.0, 1.5, 1.7, 1.8, 1.85])
    assert (main.num_draft_tokens, main.light) == (3, False)
    assert main.times == pytest.approx([0.010, 0.014, 0.018, 0.022, 0.026])
    assert decide(state, LIGHTER, TAU, FOUR).light is False  # there is no light view
    assert decide(state, LIGHTER, TAU, ControlSettings(max_draft_tokens=4, mode="fixed")).light is None


def test_a_view_is_kept_within_a_quarter_of_the_margin() -> None:
    times = FixedTimes([0.010, 0.010], 0.002, light=0.00195)
    state, tau, one = StepState(num_decode=1), [1.0, 1.9], ControlSettings(max_draft_tokens=1, margin=0.04)
    for light in (False, True):
        in_use = Memory(num_draft_tokens=1, light=light)
        assert decide(state, times, tau, one, in_use, light_tokens=tau).light == light
    narrow = ControlSettings(max_draft_tokens=1, margin=0.01)
    assert decide(state, times, tau, narrow, Memory(num_draft_tokens=1), light_tokens=tau).light is True


def test_the_other_view_is_tried_where_it_may_be_better_and_after_a_while_anyway() -> None:
    state = StepState(num_decode=1)
    in_use = Memory(num_draft_tokens=4, light=True, probe_credit=1.0)

    def choice(memory: Memory, hopes: list[float] | None) -> tuple[int, bool | None, bool]:
        made = decide(state, LIGHTER, TAU, FOUR, memory, None, LIGHT_TAU, hopes)
        return made.num_draft_tokens, made.light, made.reason is Reason.PROBE

    assert choice(in_use, None) == (4, True, False)
    assert choice(in_use, [1.0] * 5) == (4, True, False)
    assert choice(in_use, [1.4] * 5) == (3, False, True)
    poor = Memory(num_draft_tokens=4, light=True)
    assert choice(poor, [1.4] * 5) == (4, True, False)
    due = Memory(num_draft_tokens=4, light=True, probe_credit=1.0, steps_since_other=4 * FOUR.probe_interval)
    assert choice(due, None) == (3, False, True)
    going_on = Memory(num_draft_tokens=4, light=True, probe_draft_tokens=2, probe_light=False, probe_steps_left=1)
    assert choice(going_on, None) == (2, False, True)


def test_three_rejected_steps_do_not_end_drafting() -> None:
    """The times are those of Qwen2.5-Coder-1.5B on a CPU, which decoded a whole answer without drafts."""
    verify = [0.1381, 0.1378, 0.1413, 0.1446, 0.1478, 0.1500, 0.1524, 0.1547]
    estimator = AcceptanceEstimator(7)
    for _ in range(3):
        estimator.observe(3, 0)
    settings = ControlSettings(max_draft_tokens=7)
    state, times = StepState(num_decode=1), FixedTimes(verify, 0.064)
    assert decide(state, times, estimator.expected_tokens_table(), settings).num_draft_tokens > 0
    for _ in range(20):
        estimator.observe(3, 0)
    assert decide(state, times, estimator.expected_tokens_table(), settings).num_draft_tokens == 0


def test_modes() -> None:
    state = StepState(num_decode=3)
    off = decide(state, CHEAP, TAU, ControlSettings(max_draft_tokens=4, mode="off"))
    assert (off.num_draft_tokens, off.reason) == (0, Reason.OFF_MODE)
    fixed = decide(state, DEAR, TAU, ControlSettings(max_draft_tokens=4, mode="fixed"))
    assert (fixed.num_draft_tokens, fixed.reason) == (4, Reason.FIXED)
    idle = decide(StepState(num_decode=0), CHEAP, TAU, FOUR)
    assert (idle.num_draft_tokens, idle.reason) == (0, Reason.NO_DECODE)


def test_switching_on_needs_the_margin_and_switching_off_does_not() -> None:
    slight = FixedTimes([0.010, 0.0117], 0.0071)  # 1.9 / 0.0188: 1.1 % better than plain
    settings_ = ControlSettings(max_draft_tokens=1, margin=0.02)
    state = StepState(num_decode=1)
    held = decide(state, slight, [1.0, 1.9], settings_, Memory(num_draft_tokens=0))
    assert (held.num_draft_tokens, held.reason) == (0, Reason.MARGIN_HOLD)
    assert decide(state, slight, [1.0, 1.9], settings_, Memory(num_draft_tokens=1)).num_draft_tokens == 1
    worse = FixedTimes([0.010, 0.0117], 0.0074)
    assert decide(state, worse, [1.0, 1.9], settings_, Memory(num_draft_tokens=1)).num_draft_tokens == 0


def test_prefill_takes_the_free_compute_away() -> None:
    """Alone, verification hides in the weight read; beside a large prefill every verified row costs compute."""
    times = FixedTimes([0.010, 0.0101, 0.0102, 0.0103, 0.0104], 0.004, per_row=2e-5)
    alone = decide(StepState(num_decode=32), times, TAU, FOUR)
    assert alone.num_draft_tokens > 0
    loaded = decide(StepState(num_decode=32, pending_prefill_tokens=4096), times, TAU, FOUR)
    assert (loaded.num_draft_tokens, loaded.reason) == (0, Reason.LOAD)


def test_nothing_is_drafted_that_nobody_can_use() -> None:
    capped = decide(StepState(num_decode=2, draft_caps=(0, 0)), CHEAP, TAU, FOUR)
    assert (capped.num_draft_tokens, capped.reason) == (0, Reason.CAPPED)
    assert decide(StepState(num_decode=2, draft_caps=(1, 2)), CHEAP, TAU, FOUR).num_draft_tokens <= 2
    mostly_off = StepState(num_decode=10, draft_caps=(0,) * 9)
    assert decide(mostly_off, CHEAP, TAU, FOUR).num_draft_tokens == 0


@given(
    num_decode=st.integers(0, 300),
    caps=st.lists(st.integers(0, 6), max_size=300),
    verify=st.lists(st.floats(1e-4, 1.0), min_size=5, max_size=5),
    draft=st.floats(1e-5, 1.0),
    prefill=st.integers(0, 10_000),
    memory=st.builds(
        Memory,
        num_draft_tokens=st.integers(0, 4),
        steps_since_draft=st.integers(0, 1000),
        steps_since_plain=st.integers(0, 1000),
        steps_since_probe=st.integers(0, 1000),
        probe_credit=st.floats(-1.0, 1.0),
        light=st.booleans(),
        steps_since_other=st.integers(0, 3000),
        probe_draft_tokens=st.integers(0, 4),
        probe_light=st.booleans(),
        probe_steps_left=st.integers(0, 2),
    ),
    mode=st.sampled_from(["adaptive", "fixed", "off"]),
    doubts=st.none() | st.lists(st.floats(0.0, 2.0), min_size=5, max_size=5),
    light=st.none() | st.floats(1e-5, 1.0),
    hopes=st.none() | st.lists(st.floats(1.0, 3.0), min_size=5, max_size=5),
)
@settings(deadline=None, max_examples=300)
def test_a_decision_never_leaves_its_bounds(
    num_decode: int,
    caps: list[int],
    verify: list[float],
    draft: float,
    prefill: int,
    memory: Memory,
    mode: str,
    doubts: list[float] | None,
    light: float | None,
    hopes: list[float] | None,
) -> None:
    caps = caps[:num_decode]
    memory = memory if light is not None else replace(memory, light=False, probe_light=False)
    state = StepState(num_decode=num_decode, pending_prefill_tokens=prefill, draft_caps=tuple(caps))
    times, settings_ = FixedTimes(verify, draft, light=light), ControlSettings(max_draft_tokens=4, mode=mode)
    light_tokens = None if light is None else LIGHT_TAU
    decision = decide(state, times, TAU, settings_, memory, doubts, light_tokens, hopes)
    table = LIGHT_TAU if decision.light else TAU
    assert not (decision.light and light is None)
    chosen = decision.num_draft_tokens
    assert 0 <= chosen <= 4
    free = num_decode - len(caps)
    for gamma, tokens in enumerate(decision.tokens):
        assert tokens == pytest.approx(free * table[gamma] + sum(table[min(cap, gamma)] for cap in caps))
    if mode == "off" or num_decode == 0:
        assert chosen == 0
    if caps and len(caps) == num_decode:
        assert chosen <= max(caps)


def test_a_probe_waits_for_its_interval_and_its_credit() -> None:
    state = StepState(num_decode=1)
    due = Memory(steps_since_draft=FOUR.probe_interval, probe_credit=1.0)
    assert decide(state, DEAR, TAU, FOUR, due).reason is Reason.PROBE
    assert decide(state, DEAR, TAU, FOUR, due).num_draft_tokens > 0
    early = Memory(steps_since_draft=FOUR.probe_interval - 1, probe_credit=1.0)
    assert decide(state, DEAR, TAU, FOUR, early).num_draft_tokens == 0
    broke = Memory(steps_since_draft=FOUR.probe_interval, probe_credit=0.001)
    assert decide(state, DEAR, TAU, FOUR, broke).num_draft_tokens == 0
    plain_due = Memory(num_draft_tokens=4, steps_since_plain=FOUR.probe_interval, probe_credit=1.0)
    probe = decide(state, CHEAP, TAU, FOUR, plain_due)
    assert (probe.num_draft_tokens, probe.reason) == (0, Reason.PROBE)


@pytest.mark.parametrize(
    "bad", [{"max_draft_tokens": 0}, {"mode": "on"}, {"margin": -0.1}, {"probe_budget": 0.5}, {"probe_interval": 0}]
)
def test_impossible_settings_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        ControlSettings(**bad)  # type: ignore[arg-type]


# ---------------------------------------------------------------- online correction


def _model(target: float, per_row: float, draft: float, light: float | None = None) -> CostModel:
    points = []
    for batch in (1, 4, 16, 64):
        points.append(Point("draft", batch, 512, 0, draft + 0.3 * per_row * batch))
        if light is not None:
            points.append(Point("light", batch, 512, 0, light + 0.3 * per_row * batch))
        for gamma in (0, 1, 3, 7):
            seconds = target + per_row * batch * (gamma + 1)
            points.append(Point("verify" if gamma else "target", batch, 512, gamma, seconds))
    return CostModel.fit(points)


def test_a_wrong_scale_is_corrected_everywhere_after_a_few_steps() -> None:
    model = _model(0.010, 1e-4, 0.004)
    correction = OnlineCorrection(model, 7)
    for _ in range(12):
        correction.observe(3.0 * model.target_time(4, 512), 4, 512, 0, 0)
    assert correction.step_times(4, 512, 7).verify[0] == pytest.approx(3.0 * model.target_time(4, 512), rel=0.05)
    assert correction.step_times(32, 512, 7).draft == pytest.approx(3.0 * model.draft_time(32, 512), rel=0.6)
    assert correction.step_times(32, 512, 7).draft > 1.5 * model.draft_time(32, 512)


def test_draft_and_verification_are_told_apart() -> None:
    """Only the sum is seen, but steps that draft and steps that do not draft have different sums."""
    model = _model(0.010, 1e-4, 0.004)
    correction = OnlineCorrection(model, 7)
    verify, draft = model.step_times(4, 512, 7).verify, 0.012
    for step in range(300):
        verified, drafted = ((0, 3), (3, 0), (0, 0))[step % 3]
        correction.observe(verify[verified] + drafted * draft, 4, 512, verified, drafted)
    times = correction.step_times(4, 512, 7)
    assert times.draft == pytest.approx(draft, rel=0.1)
    assert times.verify[0] == pytest.approx(verify[0], rel=0.1)


def test_the_draft_times_of_the_two_views_are_told_apart() -> None:
    model = _model(0.010, 1e-4, 0.004, 0.003)
    correction = OnlineCorrection(model, 7)
    verify = model.step_times(4, 512, 7).verify
    for step in range(400):
        verified, drafted, light = ((0, 3, False), (3, 0, False), (0, 3, True), (3, 0, False))[step % 4]
        seconds = verify[verified] + drafted * (0.008 if light else 0.005)
        correction.observe(seconds, 4, 512, verified, drafted, light=light)
    times = correction.step_times(4, 512, 7)
    assert (times.draft, times.light) == pytest.approx((0.005, 0.008), rel=0.1)
    assert correction.predict(4, 512, 0, 3, light=True) == pytest.approx(verify[0] + 0.024, rel=0.1)


def test_an_outlier_is_ignored_and_a_change_is_followed() -> None:
    model = _model(0.010, 1e-4, 0.004)
    correction = OnlineCorrection(model, 7)
    usual = model.target_time(4, 512)
    for _ in range(50):
        correction.observe(usual, 4, 512, 0, 0)
    before = correction.step_times(4, 512, 7).verify[0]
    assert not correction.observe(40.0 * usual, 4, 512, 0, 0)
    assert correction.step_times(4, 512, 7).verify[0] == before
    assert correction.ignored == 1
    for _ in range(60):
        correction.observe(2.0 * usual, 4, 512, 0, 0)
    assert correction.step_times(4, 512, 7).verify[0] == pytest.approx(2.0 * usual, rel=0.1)


def test_a_slow_machine_says_little_about_the_draft_that_it_slows() -> None:
    model = _model(0.010, 1e-4, 0.004)
    correction = OnlineCorrection(model, 7)
    plain, draft = model.target_time(4, 512), model.draft_time(4, 512)
    for _ in range(20):
        correction.observe(plain, 4, 512, 0, 0)
        correction.observe(plain + 3 * draft, 4, 512, 0, 3)
    for _ in range(100):
        correction.observe(plain, 4, 512, 0, 0)
    for _ in range(20):
        correction.observe(1.3 * (plain + 3 * draft), 4, 512, 0, 3)
    times = correction.step_times(4, 512, 7)
    assert times.draft == pytest.approx(1.3 * draft, rel=0.1)
    assert times.draft / times.verify[0] == pytest.approx(draft / plain, rel=0.1)


def test_prompts_say_little_about_decoding() -> None:
    """The first step of a request is mostly its prompt: what that takes beyond its prediction is the prompt's."""
    model = _model(0.010, 1e-4, 0.004)
    correction = OnlineCorrection(model, 7)
    seconds = correction.predict(1, 64, 0, 0, prefill_tokens=64)
    correction.observe(1.5 * seconds, 1, 64, 0, 0, prefill_tokens=64)
    assert correction.step_times(1, 64, 7).verify[0] < 1.05 * model.target_time(1, 64)


def test_doubts_are_those_of_the_ratio_of_two_cycles() -> None:
    """Against corrections drawn from the state's own distribution."""
    model = _model(0.010, 1e-4, 0.004)
    correction = OnlineCorrection(model, 4)
    rng = np.random.default_rng(0)
    for step in range(60):
        seconds = 0.02 * float(rng.lognormal(0.0, 0.05))
        correction.observe(seconds, 4, 512, step % 3, step % 5, light=step % 7 == 0)
    times = correction.step_times(4, 512, 4)
    start = correction._octave(4) * correction._width
    own = slice(start, start + correction._width)
    drawn = np.exp(1e-3 * rng.multivariate_normal(np.zeros(correction._width), correction._cov[own, own], size=20_000))
    cycles = {
        light: drawn[:, :5] * times.verify + np.outer(drawn[:, 5 + light], np.arange(5)) * times.of_draft(light)
        for light in (False, True)
    }
    for current, own, light in itertools.product(range(5), (False, True), (False, True)):
        spread = 1e3 * np.log(cycles[light] / cycles[own][:, [current]]).std(axis=0)
        assert correction.doubts(4, 512, current, own, light) == pytest.approx(spread.tolist(), rel=0.03, abs=1e-7)


def test_a_duration_must_be_positive() -> None:
    with pytest.raises(ValueError, match="positive"):
        OnlineCorrection(CostModel.prior(), 4).observe(0.0, 1, 100, 0, 0)


# ---------------------------------------------------------------- the whole controller


class Machine:
    """A toy engine that runs a Controller at a constant batch and reports what happens."""

    def __init__(self, truth: CostModel, acceptance: float, batch: int, seed: int = 0) -> None:
        self.truth, self.acceptance, self.batch = truth, acceptance, batch
        self.rng = random.Random(seed)
        self.verified = 0
        self.verified_light = False
        self.light_rejections = 1.0  # how many times as often the light view is rejected
        self.seconds = 0.0
        self.tokens = 0
        self.hidden = 0.0  # seconds that every step takes in addition in which drafting begins
        self.jumps = 0.0  # probability that a step finds the machine faster or slower than before, by `slow`
        self.slow = 1.4
        self.speed = 1.0
        self.prompts_every = 0  # steps from one that sees a prompt come to the next
        self.stall = 0.0  # seconds that the first step of a probe stands still

    def run(self, controller: Controller, steps: int) -> list[Decision]:
        decisions = []
        for number in range(steps):
            waiting = 1000 if self.prompts_every and number % self.prompts_every == 0 else 0
            decision = controller.decide(StepState(self.batch, 512, pending_prefill_tokens=waiting))
            decisions.append(decision)
            drafted = decision.num_draft_tokens
            times = self.truth.step_times(self.batch, 512, 7)
            seconds = times.verify[self.verified] + drafted * times.of_draft(bool(decision.light))
            if self.rng.random() < self.jumps:
                self.speed = self.slow if self.speed == 1.0 else 1.0
            seconds *= self.speed * math.exp(self.rng.gauss(0.0, 0.03))
            if drafted and not self.verified:
                seconds += self.hidden
            rate = 1.0 - (1.0 - self.acceptance) * (self.light_rejections if self.verified_light else 1.0)
            for _ in range(self.batch):
                accepted = _accepted(self.rng, rate, self.verified)
                self.tokens += accepted + 1
                if self.verified:
                    controller.observe_acceptance(self.verified, accepted, light=self.verified_light)
            probe, light = decision.reason is Reason.PROBE, bool(decision.light)
            if probe:
                seconds, self.stall = seconds + self.stall, 0.0
            controller.observe_step(
                StepObservation(seconds, self.batch, 512, self.verified, drafted, probe=probe, light=light)
            )
            self.seconds += seconds
            self.verified, self.verified_light = drafted, light
        return decisions


GOOD = _model(0.010, 2e-5, 0.003)  # drafting pays
BAD = _model(0.010, 2e-3, 0.009)  # it does not at a batch of 8
DEAR = _model(0.010, 2e-5, 0.012)  # nowhere


def _share_drafting(decisions: list[Decision]) -> float:
    return sum(d.num_draft_tokens > 0 for d in decisions) / len(decisions)


@pytest.mark.parametrize("profile", [GOOD, None], ids=["true profile", "no profile"])
def test_it_drafts_where_drafting_pays(profile: CostModel | None) -> None:
    controller = Controller(ControlSettings(), profile)
    machine = Machine(GOOD, 0.95, 2)
    machine.run(controller, 300)
    assert _share_drafting(machine.run(controller, 200)) > 0.9


@pytest.mark.parametrize(("per_request_batch", "differ"), [(2, True), (1, True), (0, False)])
def test_few_requests_are_judged_by_what_they_have_shown_themselves(per_request_batch: int, differ: bool) -> None:
    controller = Controller(ControlSettings(per_request_batch=per_request_batch, learn=False), GOOD)
    for _ in range(200):
        controller.observe_acceptance(7, 7, "easy")
        controller.observe_acceptance(7, 0, "hard")
    chosen = {
        request: controller.decide(StepState(1, 512, request_ids=[request])).num_draft_tokens
        for request in ("easy", "hard")
    }
    assert (chosen["easy"] > chosen["hard"]) == differ
    if not differ:
        assert chosen["easy"] == chosen["hard"]


@pytest.mark.parametrize("profile", [BAD, None], ids=["true profile", "no profile"])
def test_it_stays_off_where_drafting_costs(profile: CostModel | None) -> None:
    controller = Controller(ControlSettings(), profile)
    machine = Machine(BAD, 0.95, 8)
    machine.run(controller, 300)
    assert _share_drafting(machine.run(controller, 400)) < 0.05


def test_a_profile_that_says_never_is_found_out() -> None:
    controller = Controller(ControlSettings(), BAD)
    machine = Machine(GOOD, 0.95, 8)
    assert machine.run(controller, 1)[0].num_draft_tokens == 0
    machine.run(controller, 500)
    assert _share_drafting(machine.run(controller, 200)) > 0.9


def test_a_profile_that_says_always_is_found_out() -> None:
    controller = Controller(ControlSettings(), GOOD)
    machine = Machine(BAD, 0.95, 8)
    assert machine.run(controller, 1)[0].num_draft_tokens > 0
    machine.run(controller, 300)
    assert _share_drafting(machine.run(controller, 400)) < 0.1


def test_a_profile_that_says_never_is_found_out_beside_prompts() -> None:
    """Of a step before a prompt decoding has little; probes are paid from the time of whole steps."""
    controller = Controller(ControlSettings(), DEAR)
    machine = Machine(GOOD, 0.95, 8)
    machine.prompts_every = 50
    machine.run(controller, 1500)
    assert _share_drafting(machine.run(controller, 200)) > 0.9


def test_a_profile_that_says_never_is_found_out_though_the_machine_stood_still() -> None:
    """It takes more than the one probe in which that happened."""
    controller = Controller(ControlSettings(), _model(0.010, 2e-5, 0.020))
    machine = Machine(_model(0.010, 2e-5, 0.006), 0.8, 4)
    machine.stall = 30.0
    machine.run(controller, 3000)
    assert _share_drafting(machine.run(controller, 200)) > 0.9


def test_a_drafter_that_follows_new_weights_is_tried_again() -> None:
    controller = Controller(ControlSettings(), GOOD)
    machine = Machine(GOOD, 0.05, 4)
    machine.run(controller, 400)
    assert _share_drafting(machine.run(controller, 100)) < 0.1
    machine.acceptance = 0.98
    controller.drafter_has_changed()
    machine.run(controller, 300)
    assert _share_drafting(machine.run(controller, 200)) > 0.9


def test_collapsed_acceptance_stops_drafting_and_recovery_restarts_it() -> None:
    controller = Controller(ControlSettings(acceptance_window=200), GOOD)
    machine = Machine(GOOD, 0.95, 4)
    machine.run(controller, 200)
    machine.acceptance = 0.05
    machine.run(controller, 400)
    assert _share_drafting(machine.run(controller, 200)) < 0.1
    machine.acceptance = 0.98
    machine.run(controller, 6000)
    assert _share_drafting(machine.run(controller, 200)) > 0.9


def test_probes_stay_within_their_budget() -> None:
    """On a machine where drafting never pays the controller is at most a little slower than plain decoding."""
    controller = Controller(ControlSettings(probe_budget=0.01), BAD)
    machine = Machine(BAD, 0.9, 8)
    machine.run(controller, 5000)
    plain = 5000 * BAD.target_time(8, 512)
    per_token = machine.seconds / machine.tokens
    assert controller.probes > 0
    assert per_token < 1.03 * plain / (5000 * 8)


def test_probes_pay_for_what_nothing_predicts() -> None:
    """Beginning to draft takes twenty steps' time, as where a drafter follows new weights; drafting gains little."""
    truth = _model(0.010, 9e-4, 0.0065)
    controller = Controller(ControlSettings(probe_budget=0.01, probe_interval=64), truth)
    machine = Machine(truth, 0.9, 8)
    machine.hidden = 20 * truth.target_time(8, 512)
    machine.run(controller, 5000)
    assert controller.probes > 0
    assert machine.seconds / machine.tokens < 1.03 * truth.target_time(8, 512) / 8


@pytest.mark.parametrize("seed", [5, 12, 14, 42])
def test_a_machine_that_changes_its_speed_does_not_look_like_drafts_that_pay(seed: int) -> None:
    """Others use the machine, now more, now less; some of the changes fall into a probe."""
    truth = _model(0.045, 2e-3, 0.036)
    machine = Machine(truth, 0.65, 4, seed)
    machine.jumps = 1 / 25
    controller = Controller(ControlSettings(), truth)
    assert _share_drafting(machine.run(controller, 400)) < 0.3


def test_batch_changes_turn_drafting_off_and_on_again() -> None:
    """Concurrency 1 → 64 → 1."""
    truth = _model(0.010, 5e-4, 0.004)
    controller = Controller(ControlSettings(), truth)
    machine = Machine(truth, 0.95, 1)
    assert _share_drafting(machine.run(controller, 100)) > 0.9
    machine.batch = 64
    assert _share_drafting(machine.run(controller, 100)) < 0.15
    machine.batch = 1
    assert _share_drafting(machine.run(controller, 100)) > 0.85


TWO_VIEWS = ControlSettings(light_view=True)


def _share_light(decisions: list[Decision]) -> float:
    return sum(bool(d.light) for d in decisions) / len(decisions)


@pytest.mark.parametrize("known", [True, False], ids=["true profile", "no profile"])
@pytest.mark.parametrize(("rejections", "light"), [(1.2, True), (4.0, False)])
def test_the_better_view_is_found(rejections: float, light: bool, known: bool) -> None:
    """The light view drafts in two thirds of the time; whether that pays depends on how often it is rejected."""
    truth = _model(0.010, 2e-5, 0.006, 0.004)
    controller = Controller(TWO_VIEWS, truth if known else None)
    machine = Machine(truth, 0.92, 2)
    machine.light_rejections = rejections
    machine.run(controller, 600)
    share = _share_light(machine.run(controller, 400))
    assert share > 0.85 if light else share < 0.15


def test_a_view_that_becomes_the_better_one_is_found_out() -> None:
    """As where an update of the weights leaves the light view with more of them."""
    truth = _model(0.010, 2e-5, 0.006, 0.004)
    controller = Controller(TWO_VIEWS, truth)
    machine = Machine(truth, 0.92, 4)
    machine.light_rejections = 5.0
    machine.run(controller, 1500)
    assert _share_light(machine.run(controller, 200)) < 0.15
    machine.light_rejections = 1.1
    machine.run(controller, 12_000)
    assert _share_light(machine.run(controller, 200)) > 0.85


def test_looking_at_the_other_view_costs_little() -> None:
    truth = _model(0.010, 2e-5, 0.006, 0.005)
    costs = []
    for settings_ in (TWO_VIEWS, ControlSettings()):
        machine = Machine(truth, 0.92, 4, seed=1)
        machine.light_rejections = 3.0
        machine.run(Controller(settings_, truth), 4000)
        costs.append(machine.seconds / machine.tokens)
    assert costs[0] < 1.02 * costs[1]


def test_everything_is_counted() -> None:
    controller = Controller(ControlSettings(max_draft_tokens=7), GOOD)
    decisions = Machine(GOOD, 0.9, 2).run(controller, 50)
    assert controller.decisions == Counter(d.reason for d in decisions)
    assert controller.draft_lengths == Counter(d.num_draft_tokens for d in decisions)
    assert controller.steps == 50
