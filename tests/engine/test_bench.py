"""What `vllm-selfspec bench` does inside engines: the time split of a cycle, and the mends of vLLM's own methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import interpreted_triton
import pytest
import torch
from engines import engine
from vllm.platforms import current_platform
from vllm.v1.sample import rejection_sampler

from vllm_selfspec.bench import cycles, engine_side
from vllm_selfspec.bench.results import Part
from vllm_selfspec.compat import cpu_expand

PLAIN_PARTS = {"scheduler", "verify forward", "verify head", "rejection sampling", "output", "rest"}
DRAFT_PARTS = {"draft forward", "draft head", "draft sampling"}
PLAIN_PARTS_V2 = {"scheduler", "verify forward", "verify head and sampling", "output", "rest"}

# Of the tiny checkpoints: weights of one layer's linear modules, their output rows, two norms; and of the LM head.
LAYERS, LINEAR, ROWS, NORMS = (
    4,
    (128 + 2 * 64) * 128 + 128 * 128 + 3 * 192 * 128,
    128 + 2 * 64 + 128 + 2 * 192 + 128,
    256,
)
HEAD_ROWS, HEAD = 256, 256 * 128


def split(model: str, selfspec: dict[str, Any] | None) -> tuple[dict[str, Any], dict[str, Part]]:
    """The time split of three requests, and its parts by name."""
    requests = [{"id": str(row), "prompt_token_ids": [row + 1] * 5} for row in range(3)]
    with engine(model, selfspec) as llm:
        found = cycles.profile(llm, requests, {"temperature": 1.0, "max_tokens": 32, "ignore_eos": True})
        assert not vars(llm.llm_engine.engine_core.engine_core.scheduler).keys() & {"schedule", "update_from_output"}
        assert 1e8 < cycles.memory_bandwidth(llm) < 1e14
    parts = {part["name"]: Part.model_validate(part) for part in found["parts"]}
    assert sum(part.seconds for part in parts.values()) == pytest.approx(found["seconds"])
    assert all(part.seconds > 0 for part in parts.values())
    return found, parts


on_v1 = pytest.mark.skipif(interpreted_triton.on_runner_v2(), reason="the parts are those of runner V1")


@on_v1
def test_time_split_of_plain_decoding(tiny: Callable[..., str]):
    found, parts = split(tiny(), None)
    assert parts.keys() == PLAIN_PARTS
    assert found["cycles"] in (30, 31)  # 32 tokens: the prefill gives the first, the last cycle has no end
    assert parts["verify forward"].calls == parts["verify head"].calls == parts["rejection sampling"].calls == 1
    assert parts["verify forward"].bytes_per_call == LAYERS * 4 * (LINEAR + NORMS)
    assert parts["verify head"].bytes_per_call == 4 * HEAD
    assert parts["scheduler"].bytes_per_call is parts["rest"].bytes_per_call is None


@on_v1
def test_time_split_of_selfspec(tiny: Callable[..., str]):
    drafter = {"weights": "int8", "lm_head": "int8", "skip_layers": [2]}
    selfspec = {"num_speculative_tokens": 2, "drafter": drafter, "control": {"mode": "fixed"}}
    _, parts = split(tiny(), selfspec)
    assert parts.keys() == PLAIN_PARTS | DRAFT_PARTS
    assert {parts[name].calls for name in DRAFT_PARTS} == {2}
    # int8 weights have a float32 scale per output row; the norms stay as they are.
    assert parts["draft forward"].bytes_per_call == (LAYERS - 1) * (LINEAR + 4 * ROWS + 4 * NORMS)
    assert parts["draft head"].bytes_per_call == HEAD + 4 * HEAD_ROWS
    assert parts["verify forward"].bytes_per_call == LAYERS * 4 * (LINEAR + NORMS)


@pytest.mark.skipif(not interpreted_triton.on_runner_v2(), reason="needs VLLM_USE_V2_MODEL_RUNNER=1 and no GPU")
def test_time_split_on_runner_v2(tiny: Callable[..., str]):
    _, plain = split(tiny(), None)
    assert plain.keys() == PLAIN_PARTS_V2
    selfspec = {"num_speculative_tokens": 2, "drafter": {"weights": "int8"}, "control": {"mode": "fixed"}}
    _, parts = split(tiny(), selfspec)
    assert parts.keys() == PLAIN_PARTS_V2 | {"drafts"}
    for side in (plain, parts):
        assert side["verify forward"].bytes_per_call == LAYERS * 4 * (LINEAR + NORMS)
        assert all(part.calls == 1 for name, part in side.items() if name != "scheduler")


@pytest.mark.skipif(not current_platform.is_cpu(), reason="the fault is one of the CPU backend")
def test_methods_of_vllm_are_mended(tiny: Callable[..., str], monkeypatch: pytest.MonkeyPatch):
    """The bench's extension gets into a worker without selfspec, and its mend reaches vLLM's functions there."""
    monkeypatch.setattr(rejection_sampler, "expand_batch_to_tokens", forgets_values)
    # Not an ngram engine: it imports llvmlite, over which vLLM stumbles when this process builds its next engine.
    with engine(tiny(), worker_extension_cls=engine_side.WORKER_EXTENSION) as llm:
        assert cpu_expand.broken()
        engine_side.mend(llm)
        assert not cpu_expand.broken()


def forgets_values(
    x: torch.Tensor, cu_num_tokens: torch.Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
) -> torch.Tensor:
    """What vLLM's function does on CPU, without the luck of finding the right values in fresh memory."""
    return torch.full((num_tokens,), -1.0, dtype=x.dtype)
