"""Compiled engines on CUDA's platform, whose CUDA graphs are recorded and replayed: how a GPU runs selfspec by default.

On runner V1 these are the pieces between attention layers. On V2 whole passes of the target, for every draft length,
and whole draft steps are graphs too. With a native view and all layers the drafter is the target, so that every draft
is accepted, unless a graph holds on to something that should have changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import emulated_cuda
import interpreted_triton
import pytest
from engines import Job, drafter_of, drive, engine, greedy, random_lengths, random_prompt, runner_of, texts, watch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs

if not emulated_cuda.wanted():
    pytest.skip("needs SELFSPEC_EMULATED_CUDA=1", allow_module_level=True)

from recorded_graph import RecordedGraph, graphs_on_cuda

from vllm_selfspec.drafter import verify_graphs
from vllm_selfspec.drafter.runner import every_draft_length
from vllm_selfspec.plugin import register

SERVING: dict[str, Any] = {
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,
    "enforce_eager": False,
    # As on a GPU, but for Inductor and the fusions whose kernels a CPU lacks.
    "compilation_config": {
        "backend": "eager",
        "cudagraph_capture_sizes": [1, 2, 4, 8, 16],
        "pass_config": {
            "enable_qk_norm_rope_fusion": False,
            "fuse_act_quant": False,
            "fuse_attn_quant": False,
            "fuse_norm_quant": False,
        },
    },
}
NATIVE = {"weights": "native", "lm_head": "native"}


def jobs(params: SamplingParams) -> list[Job]:
    return [Job(random_prompt(length, length), params, arrival=3 * i) for i, length in enumerate((5, 30, 20, 40))]


@pytest.fixture(scope="module")
def model(tiny: Callable[..., str]) -> str:
    return tiny("llama", num_hidden_layers=2)


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("VLLM_DISABLE_COMPILE_CACHE", "1")
    monkeypatch.setattr(verify_graphs, "WITH_DRAFTS", (1, 4))  # so that two and three requests are padded
    with graphs_on_cuda():
        yield


@pytest.fixture(scope="module")
def expected(model: str) -> Any:
    with engine(model, max_num_seqs=4, max_num_batched_tokens=64) as llm:
        return texts(drive(llm, jobs(greedy(32))))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_draft_of_the_target_itself_is_accepted(temperature: float, model: str, expected: Any) -> None:
    settings = {"num_speculative_tokens": 6, "drafter": NATIVE, "control": {"mode": "off"}}  # but for `watch`
    with engine(model, settings, **SERVING) as llm:
        seen = watch(llm, random_lengths(3, 6))
        outputs = drive(llm, jobs(SamplingParams(temperature=temperature, max_tokens=32)))
        if interpreted_triton.on_runner_v2():
            target = runner_of(llm).cudagraph_manager.graphs
            drafter = drafter_of(llm)._manager.graphs
            verified = {desc.uniform_token_count for desc, graph in target.items() if graph.replayed}
            assert len(verified) > 3, "few draft lengths were verified in a graph of the whole target"
            assert sum(graph.replayed for graph in drafter.values()) > 50
        else:  # three pieces for each forward pass, of which most are drafts of one to four requests
            assert RecordedGraph.replays > 90
    assert seen.acceptance == 1.0 and seen.drafted > 60
    if temperature == 0:
        assert texts(outputs) == expected


@pytest.mark.skipif(not interpreted_triton.on_runner_v2(), reason="on V1 attention is in no graph")
def test_a_plan_that_is_not_renewed_is_seen(model: str, expected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without FlashAttention's plan for each draft's context the drafts are wrong, and the text is right."""
    monkeypatch.setattr("vllm_selfspec.drafter.speculator.SelfDraftSpeculator._update_metadata", lambda *_: None)
    settings = {"num_speculative_tokens": 6, "drafter": NATIVE, "control": {"mode": "fixed"}}
    with engine(model, settings, **SERVING) as llm:
        seen = watch(llm)
        assert texts(drive(llm, jobs(greedy(32)))) == expected
    assert seen.acceptance < 0.5


def test_the_flag_alone(model: str, expected: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measures its profile with graphs of every batch size, one request among them, and adapts."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # no profile of an earlier run
    with engine(model, {}, **SERVING) as llm:
        measured = RecordedGraph.replays
        assert texts(drive(llm, jobs(greedy(32)))) == expected
    assert measured > 50 and RecordedGraph.replays > measured + 30


def test_ranks_of_data_parallelism_verify_every_draft_length(model: str) -> None:
    """vLLM has no draft lengths that vary under data parallelism; a rank of a dense model is an engine of its own."""
    register()
    arguments = EngineArgs(model=model, speculative_config={"method": "selfspec"}, data_parallel_size=2)
    config = arguments.create_engine_config()
    assert config.speculative_config.num_speculative_tokens_per_batch_size == every_draft_length(7)
    assert config.compilation_config.cudagraph_capture_sizes


def test_graphs_follow_new_weights(tiny: Callable[..., str], model: str, expected: Any) -> None:
    """A refresh writes into the buffers that the graphs read."""
    settings = {"num_speculative_tokens": 6, "drafter": {"weights": "int8", "lm_head": "int8"}}
    with engine(
        tiny("llama", num_hidden_layers=2, seed=5), settings | {"control": {"mode": "fixed"}}, **SERVING
    ) as llm:
        drive(llm, jobs(greedy(32)))
        llm.collective_rpc("reload_weights", kwargs={"weights_path": model})
        seen = watch(llm)
        assert texts(drive(llm, jobs(greedy(32)))) == expected
    assert seen.acceptance > 0.6
