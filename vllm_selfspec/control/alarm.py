"""An alarm for acceptance that collapses, as it does when a quantized drafter was left behind by a weight update."""

from __future__ import annotations


class AcceptanceAlarm:
    """Compares the acceptance of the last few hundred drafts with that of the last tens of thousands.

    Args:
        fast: drafted tokens over which the recent acceptance is averaged.
        slow: drafted tokens over which the usual acceptance is averaged.
        ratio: the alarm is raised where recent acceptance falls below this fraction of the usual one ...
        gap: ... and by at least this much, so that the noise of a drafter that was always poor raises none.

    Attributes:
        raised: how often it was raised; once per collapse.
    """

    def __init__(self, fast: float = 500.0, slow: float = 20_000.0, ratio: float = 0.5, gap: float = 0.1) -> None:
        self._fast, self._slow, self._ratio, self._gap = fast, slow, ratio, gap
        self._recent = self._usual = 0.0
        self._seen = 0
        self._in_collapse = False
        self.raised = 0

    def observe(self, num_drafted: int, num_accepted: int) -> bool:
        """Count one request's verified drafts; True when they raise the alarm."""
        if num_drafted <= 0:
            return False
        self._seen += num_drafted
        rate = num_accepted / num_drafted
        self._recent += min(1.0, num_drafted / min(self._fast, self._seen)) * (rate - self._recent)
        self._usual += min(1.0, num_drafted / min(self._slow, self._seen)) * (rate - self._usual)
        limit = min(self._ratio * self._usual, self._usual - self._gap)
        collapsed = self._seen > 2 * self._fast and self._recent < limit
        alarm = collapsed and not self._in_collapse
        self._in_collapse = collapsed
        self.raised += alarm
        return alarm
