"""Learning step times online, from the durations that a scheduler sees anyway.

The predicted times of a cost model are multiplied by exp(x), one x for each (batch octave, verified draft length) and
for each batch octave of the draft forward of either view, and by one more for the machine's speed of the moment. All x
together
are one Gaussian state with a prior covariance that says what is likely wrong: everything by a common factor (another
machine), one kind of forward, one region. Each observed step is one noisy, linearised equation for the few x that it
involves (an extended Kalman filter), so three steps correct a wrong scale everywhere while a kernel's odd spot is
learnt where it is. Old evidence fades; a single outlier is ignored.

The speed wanders from step to step, because others use the machine. So two ways of drafting are compared by steps that
are near each other in time: that drafts took long while the machine was slow says nothing against drafting.
"""

from __future__ import annotations

import math

import numpy as np

from vllm_selfspec.control.cost_model import CostModel, StepTimes

_COMMON_SD, _KIND_SD, _LOCAL_SD = 1.0, 0.35, 0.20
_PRIOR_COMMON_SD, _PRIOR_KIND_SD = 3.0, 0.7
_NOISE_SD = 0.06
_PREFILL_SD = 1.0
"""Of a step with few rows of prompts; with as many as decoding has, their variance is twice that."""
_SPEED_SD, _SPEED_STEPS = 0.5, 256.0
"""Spread of the logarithm of the machine's speed, and the steps after which it has forgotten 63 % of itself."""
_JUMP_SD = 0.5
"""How far that may have moved at once where two steps in a row surprise to the same side."""
_SURPRISE = 4.0
_FADE_EVERY = 32


class OnlineCorrection:
    """Corrected step times on top of a cost model.

    Args:
        cost_model: the predictions to correct. `CostModel.prior` gets wider doubts than a measured one.
        max_draft_tokens: the largest γ that occurs.
        max_batch: batches above share the last octave.
        memory_steps: steps after which unrefreshed knowledge has lost 63 % of its weight.
    """

    def __init__(
        self,
        cost_model: CostModel,
        max_draft_tokens: int,
        *,
        max_batch: int = 1024,
        memory_steps: float = 16384.0,
    ) -> None:
        self.cost_model = cost_model
        self.max_draft_tokens = max_draft_tokens
        self._octaves = round(math.log2(max(1, max_batch))) + 1
        self._draft = max_draft_tokens + 1  # of an octave: verify 0..max, then draft, then light
        self._width = max_draft_tokens + 3
        self._fade = _FADE_EVERY / memory_steps
        kinds = self._prior_covariance(cost_model.is_prior)
        self._speed = len(kinds)  # its place in the state, the last one
        self._prior = np.zeros((self._speed + 1, self._speed + 1))
        self._prior[:-1, :-1] = kinds
        self._prior[-1, -1] = _SPEED_SD**2
        self._cov = self._prior.copy()
        self._mean = np.zeros(len(self._prior))
        self._updates = 0
        self._surprises = 0
        self.ignored = 0
        self._base: dict[tuple[int, int], StepTimes] = {}
        self._corrected: dict[tuple[int, int], tuple[int, StepTimes]] = {}

    def _prior_covariance(self, unmeasured: bool) -> np.ndarray:
        common, kind = (_PRIOR_COMMON_SD, _PRIOR_KIND_SD) if unmeasured else (_COMMON_SD, _KIND_SD)
        octave = np.repeat(np.arange(self._octaves), self._width).astype(float)
        slot = np.tile(np.arange(self._width), self._octaves)
        is_draft = slot >= self._draft
        near = np.exp(-0.5 * ((octave[:, None] - octave[None, :]) / 1.5) ** 2)
        same = is_draft[:, None] == is_draft[None, :]
        # the two views share what is around their linear layers: as near to each other as draft lengths two apart
        length = np.where(is_draft, 2 * (slot - self._draft), slot)
        close = np.exp(-np.abs(length[:, None] - length[None, :]) / 2.0)
        depth = length / max(1, self.max_draft_tokens)
        slope = np.where(is_draft[:, None] | is_draft[None, :], 0.0, depth[:, None] * depth[None, :])
        return np.asarray(
            common**2 + same * (kind**2 + _LOCAL_SD**2 * near * close) + kind**2 * near * (0.25 * same + slope)
        )

    def _octave(self, batch: float) -> int:
        return min(self._octaves - 1, round(math.log2(batch)) if batch > 1 else 0)

    def _key(self, batch: float, seq: float) -> tuple[int, int]:
        count = round(batch)
        if count > 32:
            count = round(count / (count.bit_length() - 4)) * (count.bit_length() - 4)
        return max(1, count), round(4.0 * math.log2(max(1.0, seq)))

    def _base_times(self, key: tuple[int, int]) -> StepTimes:
        times = self._base.get(key)
        if times is None:
            times = self._base[key] = self.cost_model.step_times(key[0], 2.0 ** (key[1] / 4.0), self.max_draft_tokens)
        return times

    def step_times(self, batch: float, seq: float, max_draft_tokens: int) -> StepTimes:
        """Corrected times for γ in 0..max_draft_tokens (≤ the maximum of the constructor)."""
        return self._times(self._key(batch, seq))

    def _times(self, key: tuple[int, int]) -> StepTimes:
        cached = self._corrected.get(key)
        if cached is not None and cached[0] == self._updates:
            return cached[1]
        base = self._base_times(key)
        start = self._octave(key[0]) * self._width
        factors = np.exp(self._mean[start : start + self._width] + self._mean[self._speed]).tolist()
        times = StepTimes(
            verify=tuple(t * f for t, f in zip(base.verify, factors[: self._draft], strict=True)),
            draft=base.draft * factors[self._draft],
            light=base.light * factors[self._draft + 1],
            per_row=base.per_row * factors[self.max_draft_tokens],
        )
        self._corrected[key] = (self._updates, times)
        return times

    def doubts(
        self, batch: float, seq: float, current: int, current_light: bool = False, light: bool = False
    ) -> list[float]:
        """How little is known of cycle times at this point, relative to the current choice's.

        Args:
            current: γ of the current choice.
            current_light: whether it drafts with the light view.
            light: whether the others do.

        Returns:
            for each γ, the standard deviation of log(its cycle time / that of `current`).
        """
        key = self._key(batch, seq)
        times = self._times(key)
        start = self._octave(key[0]) * self._width
        cov = self._cov[start : start + self._width, start : start + self._width].tolist()
        own_draft, draft = self._draft + current_light, self._draft + light
        own = times.verify[current] / (times.verify[current] + current * times.of_draft(current_light))
        seconds = times.of_draft(light)
        # the ratio's logarithm, in corrections: share · verify[γ] + (1 - share) · draft, less the same of the current
        own_rest = 1.0 - own
        known = own * own * cov[current][current] + own_rest * own_rest * cov[own_draft][own_draft]
        known += 2.0 * own * own_rest * cov[current][own_draft]
        of_own, of_own_draft, of_draft = cov[current], cov[own_draft], cov[draft]
        result = []
        for gamma, verify in enumerate(times.verify):
            share = verify / (verify + gamma * seconds)
            rest = 1.0 - share
            variance = known + share * share * cov[gamma][gamma] + rest * rest * of_draft[draft]
            variance += 2.0 * share * rest * of_draft[gamma]
            variance -= 2.0 * share * (own * of_own[gamma] + own_rest * of_own_draft[gamma])
            variance -= 2.0 * rest * (own * of_own[draft] + own_rest * of_own_draft[draft])
            result.append(math.sqrt(max(0.0, variance)))
        return result

    def predict(
        self,
        batch: float,
        seq: float,
        num_verified: float,
        num_drafted: int,
        prefill_tokens: int = 0,
        light: bool = False,
    ) -> float:
        """Seconds of one step that verifies `num_verified` and then drafts `num_drafted` tokens per request."""
        return sum(self._parts(batch, seq, num_verified, num_drafted, prefill_tokens, light)[0])

    def _parts(
        self, batch: float, seq: float, num_verified: float, num_drafted: int, prefill_tokens: int, light: bool
    ) -> tuple[tuple[float, float], int, int]:
        times = self.step_times(batch, seq, self.max_draft_tokens)
        verified = min(self.max_draft_tokens, max(0, round(num_verified)))
        rows = batch * (verified + 1) + prefill_tokens
        forward = max(times.verify[verified], rows * times.per_row if prefill_tokens else 0.0)
        start = self._octave(self._key(batch, seq)[0]) * self._width
        return (forward, num_drafted * times.of_draft(light)), start + verified, start + self._draft + light

    def _wander(self) -> None:
        """By the next step the machine may have changed its speed a little."""
        kept = 1.0 - 1.0 / _SPEED_STEPS
        self._mean[self._speed] *= kept
        self._cov[self._speed] *= kept
        self._cov[:, self._speed] *= kept
        self._cov[self._speed, self._speed] += _SPEED_SD**2 * (1.0 - kept * kept)

    def observe(
        self,
        seconds: float,
        batch: float,
        seq: float,
        num_verified: float,
        num_drafted: int,
        prefill_tokens: int = 0,
        light: bool = False,
    ) -> bool:
        """Learn from one step's duration. Returns False when it was set aside as an outlier.

        Args:
            light: the drafts came from the light view.
        """
        if not (seconds > 0.0 and math.isfinite(seconds)):
            raise ValueError(f"a step took {seconds} seconds: durations must be positive.")
        (forward, draft), verify_index, draft_index = self._parts(
            batch, seq, num_verified, num_drafted, prefill_tokens, light
        )
        predicted = forward + draft
        innovation = math.log(seconds / predicted)
        share = forward / predicted
        column = share * self._cov[verify_index] + (1.0 - share) * self._cov[draft_index] + self._cov[self._speed]
        noise = _NOISE_SD**2
        if prefill_tokens:
            # the cost of prompts is known roughly: the more of them, the less the step says of decoding
            noise += _PREFILL_SD**2 * (1.0 + prefill_tokens / (batch * (num_verified + 1.0)))
        variance = float(share * column[verify_index] + (1.0 - share) * column[draft_index] + column[self._speed])
        variance += noise
        if innovation * innovation > _SURPRISE**2 * variance:
            sign = 1 if innovation > 0 else -1
            self._surprises = self._surprises + sign if self._surprises * sign >= 0 else sign
            if abs(self._surprises) < 2:
                self.ignored += 1
                return False
            # the second surprise to the same side is a change, not an outlier: of the machine's speed, or, where that
            # does not explain it, of anything
            if abs(self._surprises) == 2:
                self._cov[self._speed, self._speed] += _JUMP_SD**2
            else:
                self._cov = 0.5 * (self._cov + self._prior)
                self._surprises = 0
            return self.observe(seconds, batch, seq, num_verified, num_drafted, prefill_tokens, light)
        self._surprises = 0
        limit = 2.0 * math.sqrt(variance)
        gain = column / variance
        self._mean += gain * min(limit, max(-limit, innovation))
        self._cov -= np.multiply.outer(gain, column)
        self._wander()
        self._updates += 1
        if self._updates % _FADE_EVERY == 0:
            self._cov += self._fade * (self._prior - self._cov)
        return True
