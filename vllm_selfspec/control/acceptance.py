"""What fraction of the drafts is accepted: decayed estimates per draft position.

Rejection sampling verifies drafts left to right and stops at the first rejection, so a request that drafted ``d``
tokens and had ``a`` accepted is ``min(a + 1, d)`` Bernoulli trials: positions 1..a succeeded and, when a < d, position
a + 1 failed. Position k therefore has a *conditional* acceptance a_k (given that positions 1..k-1 were accepted), and
a cycle of γ drafts yields τ(γ) = Σ_{k=0..γ} Π_{i≤k} a_i tokens (Leviathan et al., arXiv 2211.17192). Pooling the
trials of all requests keeps τ exact for a mixture of easy and hard requests: the later positions are only tried by the
survivors.

A drafter with two views has one such estimate, in terms of its main view, and one number more: how many times as often
the light view's drafts are rejected (`RejectionRatio`). Texts that are hard to draft are hard for both views, so what
one of them sees today holds for the other, which may not have drafted for a while.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

USUAL_REJECTION_RATIO = 2.5
"""How many times as often a light view is rejected as the main one, where nothing is known of it.

The median of what `benchmarks/view_rejections.py` counted: docs/measurements.md.
"""


class AcceptanceEstimator:
    """Decayed acceptance per draft position, with a prior, and optionally per request.

    Args:
        max_draft_tokens: the largest γ that will be asked for, ≥ 1.
        window: trials after which old evidence has lost 63 % of its weight. Counted per position and per trial, never
            by the clock, so the estimates survive stretches without drafting unchanged.
        prior_mean: acceptance assumed before any draft was verified, in (0, 1).
        prior_strength: weight of a position's prior, in trials. Position k's prior is the estimate of position k-1:
            deep positions, which are seldom reached, start from what their neighbour has learnt.
        per_request: also keep one acceptance number per request (`expected_tokens_of`). It costs a dict look-up for
            each observation and pays off where few, unlike requests run together.
        max_requests: requests remembered at most; the least recently seen is dropped first.
    """

    def __init__(
        self,
        max_draft_tokens: int,
        *,
        window: float = 512.0,
        prior_mean: float = 0.8,
        prior_strength: float = 16.0,
        per_request: bool = False,
        max_requests: int = 4096,
    ) -> None:
        if max_draft_tokens < 1:
            raise ValueError(f"max_draft_tokens is {max_draft_tokens}: an acceptance estimate needs at least 1.")
        if not 0.0 < prior_mean < 1.0:
            raise ValueError(f"prior_mean is {prior_mean}: give an acceptance between 0 and 1, both excluded.")
        if window <= 1.0 or prior_strength <= 0.0:
            raise ValueError(f"window ({window}) must exceed 1 and prior_strength ({prior_strength}) must exceed 0.")
        self.max_draft_tokens = max_draft_tokens
        self.per_request = per_request
        self._keep = 1.0 - 1.0 / window
        self._prior_mean = prior_mean
        self._prior_strength = prior_strength
        self._max_requests = max_requests
        self._accepted = [0.0] * max_draft_tokens
        self._tried = [0.0] * max_draft_tokens
        self._requests: OrderedDict[str, list[float]] = OrderedDict()
        self._rates: list[float] = []
        self._tokens: list[float] = []
        self._stale = True
        self.total_drafted = 0
        self.total_accepted = 0

    def observe(
        self, num_drafted: int, num_accepted: int, request_id: str | None = None, rejection_ratio: float = 1.0
    ) -> None:
        """Count one verified request-step: `num_accepted` of `num_drafted` drafts were accepted, left to right.

        Args:
            rejection_ratio: how many times as often the view that drafted is rejected as the main one, ≥ 1. Its
                rejections count for less, so that the estimate stays unbiased.
        """
        if num_drafted <= 0:
            return
        if not 0 <= num_accepted <= num_drafted:
            raise ValueError(
                f"num_accepted is {num_accepted} of num_drafted {num_drafted}: it must lie between 0 and it."
            )
        self.total_drafted += num_drafted
        self.total_accepted += num_accepted
        if num_drafted > self.max_draft_tokens:
            num_drafted = self.max_draft_tokens
            num_accepted = min(num_accepted, num_drafted)
        keep, accepted, tried = self._keep, self._accepted, self._tried
        for k in range(num_accepted):
            accepted[k] = keep * accepted[k] + 1.0
            tried[k] = keep * tried[k] + 1.0
        if num_accepted < num_drafted:
            accepted[num_accepted] = keep * accepted[num_accepted] + 1.0 - 1.0 / rejection_ratio
            tried[num_accepted] = keep * tried[num_accepted] + 1.0
        self._stale = True
        if self.per_request and request_id is not None:
            self._observe_request(request_id, num_drafted, num_accepted, rejection_ratio)

    def fade(self, kept: float) -> None:
        """Let what was seen so far weigh this fraction of what it did."""
        for counts in (self._accepted, self._tried, *self._requests.values()):
            counts[:] = [kept * count for count in counts]
        self._stale = True

    def _observe_request(self, request_id: str, num_drafted: int, num_accepted: int, rejection_ratio: float) -> None:
        counts = self._requests.get(request_id)
        if counts is None:
            counts = self._requests[request_id] = [0.0, 0.0]
            if len(self._requests) > self._max_requests:
                self._requests.popitem(last=False)
        else:
            self._requests.move_to_end(request_id)
        # A request's own window is short: it has to follow its text (prose, code, a table) within tens of steps.
        keep = 0.97
        trials = min(num_accepted + 1, num_drafted)
        counts[0] = keep * counts[0] + trials - (trials - num_accepted) / rejection_ratio
        counts[1] = keep * counts[1] + trials

    def finish(self, request_id: str) -> None:
        """Forget a request. Unknown ids are fine: most requests were never drafted for."""
        self._requests.pop(request_id, None)

    @property
    def num_requests(self) -> int:
        """Requests with an own estimate."""
        return len(self._requests)

    def trials(self, position: int = 1) -> float:
        """Decayed number of trials behind the estimate of draft position 1..max_draft_tokens."""
        return self._tried[position - 1]

    def _refresh(self) -> None:
        rates, tokens = [], [1.0]
        mean, strength, survival = self._prior_mean, self._prior_strength, 1.0
        for accepted, tried in zip(self._accepted, self._tried, strict=True):
            mean = (accepted + strength * mean) / (tried + strength)
            rates.append(mean)
            survival *= mean
            tokens.append(tokens[-1] + survival)
        self._rates, self._tokens, self._stale = rates, tokens, False

    def rates(self) -> list[float]:
        """Conditional acceptance a_1..a_max of each draft position."""
        if self._stale:
            self._refresh()
        return self._rates

    def expected_tokens_table(self) -> list[float]:
        """τ(0..max_draft_tokens): tokens per request and cycle, the target's own token included. Do not modify."""
        if self._stale:
            self._refresh()
        return self._tokens

    def expected_tokens(self, num_draft_tokens: int) -> float:
        """τ(γ) for one γ in 0..max_draft_tokens."""
        return self.expected_tokens_table()[num_draft_tokens]

    def expected_tokens_at(self, rejection_ratio: float) -> list[float]:
        """τ(0..max_draft_tokens) of a view whose drafts are rejected so many times as often as the estimated one's.

        Do not modify.
        """
        if rejection_ratio == 1.0:
            return self.expected_tokens_table()
        survival, tokens = 1.0, [1.0]
        for rate in self.rates():
            survival *= min(1.0, max(0.0, 1.0 - rejection_ratio * (1.0 - rate)))
            tokens.append(tokens[-1] + survival)
        return tokens

    def expected_tokens_of(self, request_ids: Sequence[str], rejection_ratio: float = 1.0) -> list[float]:
        """τ(0..max) averaged over these very requests (O(len(request_ids) · max): for small batches).

        A request's conditional acceptances are the pooled ones moved by a common log-odds-free factor on the rejection
        rate, shrunk towards the pooled estimate while the request has few trials.

        Args:
            rejection_ratio: as of `expected_tokens_at`.
        """
        pooled = self.rates()
        if not request_ids or not self._requests:
            return self.expected_tokens_at(rejection_ratio)
        total = [0.0] * (self.max_draft_tokens + 1)
        mean_rate = sum(pooled) / len(pooled)
        for request_id in request_ids:
            counts = self._requests.get(request_id)
            factor = rejection_ratio
            if counts is not None:
                shrunk = (counts[0] + 16.0 * mean_rate) / (counts[1] + 16.0)
                factor *= (1.0 - shrunk) / max(1e-6, 1.0 - mean_rate)
            own = self.expected_tokens_at(factor)
            for k, tokens in enumerate(own):
                total[k] += tokens
        return [tokens / len(request_ids) for tokens in total]


class RejectionRatio:
    """How many times as often drafts of the light view are rejected as drafts of the main view.

    Whenever the view that is not in use drafts, its rejections are counted beside those that the view in use would have
    had on the same trials, by its rate of late. So a change of texts is not mistaken for a difference of the views.

    Args:
        ratio: what is expected before anything was seen.
        strength: the weight of that, in rejections.
        window: trials over which the rate of the view in use is averaged.
        memory: trials of the other view after which what they told has lost 63 % of its weight.
    """

    def __init__(
        self,
        ratio: float = USUAL_REJECTION_RATIO,
        *,
        strength: float = 4.0,
        window: float = 150.0,
        memory: float = 4096.0,
    ) -> None:
        self.light_in_use = False
        self._window, self._memory = window, memory
        self._rejected, self._trials = 0.0, 0.0  # of the view in use, of late
        self._counted = strength  # rejections that were seen, not reckoned
        self._light, self._main = strength * math.sqrt(ratio), strength / math.sqrt(ratio)
        self.ratio = ratio
        """The estimate, ≥ 1: fewer bits are not accepted more often."""

    @property
    def doubt(self) -> float:
        """Standard deviation of the estimate's logarithm."""
        return 1.0 / math.sqrt(self._counted)

    def use(self, light: bool) -> None:
        """From here on this view is in use."""
        if light != self.light_in_use:
            self._rejected *= self.ratio if light else 1.0 / self.ratio
            self.light_in_use = light

    def observe(self, light: bool, trials: float, rejected: float) -> None:
        """Learn from the drafts of one view that one step has verified."""
        if light == self.light_in_use:
            keep = math.exp(-trials / self._window)
            self._rejected = keep * self._rejected + rejected
            self._trials = keep * self._trials + trials
        elif self._trials > 0.5 * self._window:  # before that one rejection would count as many
            keep = math.exp(-trials / self._memory)
            reckoned = trials * self._rejected / self._trials
            self._counted = keep * self._counted + rejected
            self._light = keep * self._light + (rejected if light else reckoned)
            self._main = keep * self._main + (reckoned if light else rejected)
            self.ratio = max(1.0, self._light / self._main)
