"""The drafter's CUDA graphs on runner V2, recorded and replayed on CPU: a replay drafts what the step itself drafts.

With a native view and all layers the drafter is the target, so that every draft is accepted, unless a graph holds on to
something that should have changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import interpreted_triton
import pytest
import torch
from engines import Job, drive, engine, greedy, random_lengths, random_prompt, texts, watch
from vllm import LLM, SamplingParams

if not interpreted_triton.on_runner_v2():
    pytest.skip("needs VLLM_USE_V2_MODEL_RUNNER=1 and no GPU", allow_module_level=True)

from recorded_graph import RecordedGraph, capture, recorded_graphs

from vllm_selfspec.drafter.speculator import SelfDraftSpeculator

SERVING: dict[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": 64}
NATIVE = {"weights": "native", "lm_head": "native"}


def jobs(params: SamplingParams) -> list[Job]:
    return [Job(random_prompt(length, length), params, arrival=3 * i) for i, length in enumerate((5, 30, 20, 40))]


def settings(drafter: dict[str, Any]) -> dict[str, Any]:
    return {"num_speculative_tokens": 6, "drafter": drafter, "control": {"mode": "fixed"}}


@pytest.fixture(scope="module")
def expected(tiny: Callable[..., str]) -> Any:
    with engine(tiny("llama", num_hidden_layers=2), **SERVING) as llm:
        return texts(drive(llm, jobs(greedy(32))))


@pytest.fixture(autouse=True)
def graphs() -> Iterator[None]:
    with recorded_graphs():
        yield


@pytest.fixture
def native(expected: Any, tiny: Callable[..., str]) -> Iterator[LLM]:
    """An engine whose drafter is the target; asks for `expected`, as two engines cannot live in one process."""
    with engine(tiny("llama", num_hidden_layers=2), settings(NATIVE), **SERVING) as llm:
        yield llm


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_draft_of_the_target_itself_is_accepted(temperature: float, native: LLM, expected: Any) -> None:
    capture(native)
    seen = watch(native, random_lengths(3, 6))
    params = SamplingParams(temperature=temperature, max_tokens=32, seed=7 if temperature else None)
    outputs = drive(native, jobs(params))
    assert seen.acceptance == 1.0
    assert seen.drafted > 60 and RecordedGraph.replays > 30
    if temperature == 0:
        assert texts(outputs) == expected


def test_text_of_a_quantized_drafter(tiny: Callable[..., str], expected: Any) -> None:
    with engine(tiny("llama", num_hidden_layers=2), settings({"weights": "int8", "lm_head": "int8"}), **SERVING) as llm:
        capture(llm)
        seen = watch(llm, random_lengths(3, 6))
        assert texts(drive(llm, jobs(greedy(32)))) == expected
        assert 0.6 < seen.acceptance < 1
        assert RecordedGraph.replays > 30


def test_graphs_follow_new_weights(tiny: Callable[..., str], expected: Any) -> None:
    """A refresh writes into the buffers that the graphs read."""
    other = tiny("llama", num_hidden_layers=2, seed=5)
    with engine(other, settings({"weights": "int8", "lm_head": "int8"}), **SERVING) as llm:
        capture(llm)
        assert texts(drive(llm, jobs(greedy(32)))) != expected
        llm.collective_rpc("reload_weights", kwargs={"weights_path": tiny("llama", num_hidden_layers=2)})
        seen = watch(llm, random_lengths(3, 6))
        assert texts(drive(llm, jobs(greedy(32)))) == expected
        assert seen.acceptance > 0.6


def test_a_number_frozen_in_the_capture_is_seen(native: LLM, expected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the step's number held on the host all γ drafts run at the first one's position."""
    place = SelfDraftSpeculator._place

    def frozen(self: SelfDraftSpeculator, num_reqs: int) -> None:
        step, self._step = self._step, torch.zeros((), dtype=torch.int64)
        place(self, num_reqs)
        self._step = step

    monkeypatch.setattr(SelfDraftSpeculator, "_place", frozen)
    capture(native)
    seen = watch(native, random_lengths(3, 6))
    assert texts(drive(native, jobs(greedy(32)))) == expected
    assert seen.acceptance < 0.9


def test_a_read_in_the_capture_is_refused(native: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    place = SelfDraftSpeculator._place

    def reading(self: SelfDraftSpeculator, num_reqs: int) -> None:
        place(self, num_reqs + 0 * int(self._step))

    monkeypatch.setattr(SelfDraftSpeculator, "_place", reading)
    with pytest.raises(RuntimeError, match="reads a tensor on the host"):
        capture(native)
