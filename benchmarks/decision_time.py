"""How long one decision takes, and one observation: microseconds of the scheduler's time per step.

Usage: python benchmarks/decision_time.py [--requests 256] [--max-draft-tokens 7] [--views 2]
The last line on stdout is JSON.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from vllm_selfspec.control.cost_model import CostModel
from vllm_selfspec.control.policy import Controller, ControlSettings, StepObservation, StepState

PROFILE = Path(__file__).parents[1] / "configs" / "profiles" / "a100_qwen2.5-7b.json"


def microseconds(call: Callable[[int], object], repeats: int = 4000) -> tuple[float, float]:
    """Median and 99th percentile of one call."""
    taken = []
    for number in range(repeats):
        start = time.perf_counter()
        call(number)
        taken.append(1e6 * (time.perf_counter() - start))
    return statistics.median(taken), statistics.quantiles(taken, n=100)[98]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--max-draft-tokens", type=int, default=7)
    parser.add_argument("--views", type=int, choices=(1, 2), default=2, help="of the drafter")
    arguments = parser.parse_args()
    batch = arguments.requests
    settings = ControlSettings(max_draft_tokens=arguments.max_draft_tokens, light_view=arguments.views == 2)
    controller = Controller(settings, CostModel.from_profile(PROFILE), max_batch=batch)
    caps = (0, 1, 2, 3) * (batch // 32)

    def decide(number: int) -> object:
        return controller.decide(StepState(batch, 2000.0 + 0.25 * number, draft_caps=caps))

    def learn(number: int) -> object:
        controller.observe_step(StepObservation(0.02, batch, 2000.0, 0, 0))
        return None

    def both(number: int) -> object:
        learn(number)
        return decide(number)

    def accept(number: int) -> object:
        controller.observe_acceptance(7, number % 8, light=arguments.views == 2 and number % 2 == 0)
        return None

    figures = {}
    for name, call in (("decision", decide), ("observe_step", learn), ("both", both), ("observe_acceptance", accept)):
        median, slow = microseconds(call)
        figures[name] = {"median_us": round(median, 2), "p99_us": round(slow, 2)}
        print(f"{name:20s} median {median:7.2f} us   99 % {slow:7.2f} us")
    print(json.dumps({**vars(arguments), **figures}))


if __name__ == "__main__":
    main()
