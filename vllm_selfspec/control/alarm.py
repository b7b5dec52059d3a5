"""An alarm for acceptance that collapses, as it does when a quantized drafter was left behind by a weight update."""

from __future__ import annotations


class AcceptanceAlarm:
    """Compares the acceptance of the last few hundred drafts with that of the last tens of thousands.

    Args:
        fast: drafted tokens over which the recent acceptance is averaged.
        slow: drafted tokens over which the usual acceptance is averaged.
        ratio: the alarm is raised where recent acceptance falls below this fraction of the usual one.

    Attributes:
        raised: how often it was raised; once per collapse.
    """

    def __init__(self, fast: float = 500.0, slow: float = 20_000.0, ratio: float = 0.5) -> None:
        self._fast, self._slow, self._ratio = fast, slow, ratio
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
        collapsed = self._seen > 2 * self._fast and self._recent < self._ratio * self._usual
        alarm = collapsed and not self._in_collapse
        self._in_collapse = collapsed
        self.raised += alarm
        return alarm
