"""Durations that the scheduler sees on a device that works by itself, as a GPU does: to which drafts they belong.

The device is the played CUDA, on which a forward pass, a draft and a refresh take as long as it says here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import emulated_cuda
import pytest
from emulated_cuda import CLOCK
from engines import (
    Job,
    drafter_of,
    drafts_wanted,
    drive,
    engine,
    generate,
    greedy,
    random_lengths,
    random_prompt,
    runner_of,
    scheduler_of,
    watch,
)
from vllm import LLM
from vllm.v1.metrics.reader import Histogram

from vllm_selfspec import live_profile, scheduler
from vllm_selfspec.control.cost_model import CostModel, Point
from vllm_selfspec.control.policy import Decision, StepObservation
from vllm_selfspec.drafter import refresh
from vllm_selfspec.drafter.quantize_cuda import CudaLinear
from vllm_selfspec.live_profile import measure, points_of, profile_identity, run_batch
from vllm_selfspec.metrics import PREFIX

FORWARD, ROW, DRAFT = 0.010, 0.0005, 0.002
"""Seconds of a forward pass, of each of its rows, and of a draft."""
REFRESH = 0.003
NATIVE = {"weights": "native", "lm_head": "native"}

pytestmark = pytest.mark.skipif(not emulated_cuda.wanted(), reason="needs the played CUDA")


@contextmanager
def timed(
    model: str,
    monkeypatch: pytest.MonkeyPatch,
    drafter: dict[str, Any],
    asynchronous: bool,
    per_request: float = 0.0,
    work: Callable[[float], None] = CLOCK.launch,
) -> Iterator[LLM]:
    """An engine whose work takes the time that it says here.

    Args:
        per_request: seconds that a draft takes more for each request.
        work: lets so many seconds of it pass; on the device if not said otherwise.
    """
    selfspec = {"drafter": drafter, "control": {"mode": "fixed"}}
    with engine(model, selfspec, async_scheduling=asynchronous, max_num_seqs=4) as llm:
        runner, drafting = runner_of(llm), drafter_of(llm)
        execute, propose = runner.execute_model, drafting.propose
        requests = 0

        def timed_execute(output: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal requests
            if output.total_num_scheduled_tokens:
                work(FORWARD + ROW * output.total_num_scheduled_tokens)
                requests = len(output.num_scheduled_tokens)
            return execute(output, *args, **kwargs)

        def timed_propose(*args: Any, **kwargs: Any) -> Any:
            work(drafts_wanted(drafting, kwargs) * (DRAFT + per_request * requests))
            return propose(*args, **kwargs)

        monkeypatch.setattr(runner, "execute_model", timed_execute)
        monkeypatch.setattr(drafting, "propose", timed_propose)
        if not asynchronous and hasattr(runner, "_bookkeeping_sync"):  # V1 copies the sampled tokens out there
            bookkeep = runner._bookkeeping_sync

            def timed_bookkeeping(*args: Any, **kwargs: Any) -> Any:
                CLOCK.wait()
                return bookkeep(*args, **kwargs)

            monkeypatch.setattr(runner, "_bookkeeping_sync", timed_bookkeeping)
        for module in (scheduler, live_profile, refresh):
            clock = SimpleNamespace(perf_counter=lambda: CLOCK.host, time=lambda: 0.0, monotonic=lambda: 0.0)
            monkeypatch.setattr(module, "time", clock)
        yield llm


@pytest.mark.parametrize("asynchronous", [True, False], ids=["async", "sync"])
def test_a_duration_is_of_the_drafts_that_it_is_learnt_from(
    tiny: Callable[..., str], monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    """On V2 a step's tokens arrive before its drafts are made: they seemed to take no time, and verifying all of it."""
    seen: list[StepObservation] = []
    with timed(tiny(), monkeypatch, NATIVE, asynchronous) as llm:
        watch(llm, random_lengths(0, longest=7))
        monkeypatch.setattr(scheduler_of(llm)._controller, "observe_step", seen.append)
        drive(llm, [Job(random_prompt(7 + n, n), greedy(24 + 5 * n), arrival=4 * n) for n in range(4)])
    assert len({step.num_drafted for step in seen}) > 5 and max(step.num_decode for step in seen) > 1
    for step in seen:
        rows = step.num_decode * (1 + step.num_verified) + step.prefill_tokens
        assert step.seconds == pytest.approx(FORWARD + ROW * rows + DRAFT * step.num_drafted), step


@pytest.mark.parametrize("work", [CLOCK.launch, CLOCK.work], ids=["device", "host"])
@pytest.mark.parametrize("asynchronous", [True, False], ids=["async", "sync"])
def test_a_profile_tells_drafting_and_verifying_apart(
    tiny: Callable[..., str],
    script: Any,
    monkeypatch: pytest.MonkeyPatch,
    asynchronous: bool,
    work: Callable[[float], None],
) -> None:
    """Where the device is what takes long, and where the host is, as without graphs."""
    batch, gamma = 2, 3
    with timed(tiny(), monkeypatch, NATIVE, asynchronous, work=work) as llm:
        core = llm.llm_engine.engine_core.engine_core
        points = points_of([run_batch(core, batch, [1, gamma])], batch)
        rows = script.sweep_rows("tiny", batch, script.measure_steps(core, batch, 64, gamma))

    def verify(length: int) -> float:
        return FORWARD + ROW * batch * (length + 1)

    found = {(p.component, p.num_draft_tokens): p.seconds for p in points if p.component != "prefill"}
    assert found == pytest.approx(
        {
            ("target", 0): verify(0),
            ("verify", 1): verify(1),
            ("verify", gamma): verify(gamma),
            ("draft", gamma): DRAFT,
        }
    )
    assert {(row["mode"], row["gamma"]): row["median_ms"] for row in rows} == pytest.approx(
        {
            ("target_decode", 0): 1e3 * verify(0),
            ("target_verify", gamma): 1e3 * verify(gamma),
            ("drafter_decode", gamma): 1e3 * DRAFT,
        }
    )
    assert all(row["n_samples"] > script.REPETITIONS for row in rows)


def test_the_controller_knows_when_drafting_pays(tiny: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """From a profile that the engine measures: one request is drafted for, four are not.

    What was learnt on the way is still true, after prompts and after steps of requests that were done: asynchronous
    scheduling leaves such a step in flight, and its result once came with the time of the next requests' first step.
    """
    per_request = 0.003
    monkeypatch.setattr(live_profile, "ROUNDS", 1)
    with timed(tiny(), monkeypatch, NATIVE, True, per_request) as llm:
        core = llm.llm_engine.engine_core.engine_core
        settings = core.vllm_config.speculative_config.selfspec
        profile = measure(core, settings, profile_identity(core.vllm_config, settings))
        core.scheduler._controller.settings = replace(core.scheduler._controller.settings, mode="adaptive")
        core.scheduler.start_controller(profile, light_view=False)
        controller, lengths = core.scheduler._controller, {}
        for requests in (1, 4):
            seen = watch(llm)
            generate(llm, [random_prompt(8, n) for n in range(requests)], greedy(80 if requests == 1 else 40))
            lengths[requests] = seen.lengths
        learnt = {requests: controller.times.step_times(requests, 32, 7) for requests in (1, 4)}
    assert sum(length > 1 for length in lengths[1]) > 0.8 * len(lengths[1])
    assert sum(length > 0 for length in lengths[4]) <= 4
    for requests, times in learnt.items():
        forward = [FORWARD + ROW * requests * (length + 1) for length in range(8)]
        assert times.verify == pytest.approx(forward, rel=0.04)
        assert times.draft == pytest.approx(DRAFT + per_request * requests, rel=0.04)


def histograms(llm: LLM) -> dict[str, tuple[int, float]]:
    """Count and sum of selfspec's histograms."""
    mine = [metric for metric in llm.get_metrics() if metric.name.startswith(PREFIX) and isinstance(metric, Histogram)]
    return {metric.name.removeprefix(PREFIX): (metric.count, metric.sum) for metric in mine}


def test_what_steps_brought_is_told_beside_what_was_predicted(
    tiny: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One request whose drafts are all accepted, so that a step yields what it verified and one token."""

    def forward(batch: int, drafts: int) -> float:
        return FORWARD + ROW * batch * (1 + drafts)

    points = [
        point
        for batch in (1, 4)
        for drafts in (1, 3, 7)
        for point in (
            Point("target", batch, 32, 0, forward(batch, 0)),
            Point("verify", batch, 32, drafts, forward(batch, drafts)),
            Point("draft", batch, 32, drafts, DRAFT),
        )
    ]
    steps: list[StepObservation] = []
    decisions: list[Decision] = []
    with timed(tiny(), monkeypatch, NATIVE, True) as llm:
        scheduler = scheduler_of(llm)
        scheduler._controller.settings = replace(scheduler._controller.settings, mode="adaptive")
        scheduler.start_controller(CostModel.fit(points), light_view=False)
        controller, seen = scheduler._controller, watch(llm)
        observe, decide = controller.observe_step, controller.decide
        monkeypatch.setattr(controller, "observe_step", lambda step: (steps.append(step), observe(step)))
        monkeypatch.setattr(controller, "decide", lambda state: decisions.append(decide(state)) or decisions[-1])
        generate(llm, [random_prompt(8, 0)], greedy(150))
        told = histograms(llm)
    assert seen.acceptance == 1.0 and seen.lengths.count(7) > 15

    count, total = told["draft_length"]
    assert len(seen.lengths) - count in (0, 1)  # asynchronous scheduling leaves a step that nobody waits for
    assert total == sum(seen.lengths[:count])

    decoding = [step for step in steps if step.prefill_tokens == 0][:-1]  # at the last token nothing is predicted
    count, total = told["achieved_speedup"]
    assert count == len(decoding) > 15
    brought = [(1 + step.num_verified) * forward(1, 0) / step.seconds for step in decoding]
    assert total == pytest.approx(sum(brought), rel=0.02)

    count, total = told["predicted_speedup"]
    predicted = [decision.predicted_speedup for decision in decisions[:count]]
    assert count == told["draft_length"][0] and total == pytest.approx(sum(predicted))
    assert max(predicted) == pytest.approx(8 * forward(1, 0) / (forward(1, 7) + 7 * DRAFT), rel=0.1)


def test_a_refresh_counts_the_devices_time(tiny: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the device still had to do is not counted, what the refresh gave it is."""
    quantize = CudaLinear.refresh

    def timed_refresh(self: CudaLinear, weight: Any) -> None:
        CLOCK.launch(REFRESH)
        quantize(self, weight)

    monkeypatch.setattr(CudaLinear, "refresh", timed_refresh)
    with timed(tiny(), monkeypatch, {"weights": "int4", "lm_head": "native"}, True) as llm:
        CLOCK.launch(1.0)
        cost = llm.collective_rpc("selfspec_refresh")[0]
    assert cost["layers"] > 0 and cost["total_seconds"] == pytest.approx(REFRESH * cost["layers"])
