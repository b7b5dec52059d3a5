"""`vllm-selfspec bench` on real engines: the time split of a cycle, and a pair as the command runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engines import engine

from vllm_selfspec.bench import cycles
from vllm_selfspec.bench.results import BenchRun, Part
from vllm_selfspec.models import DEFAULT_MODEL

PLAIN_PARTS = {"scheduler", "verify forward", "verify head", "rejection sampling", "output", "rest"}
DRAFT_PARTS = {"draft forward", "draft head", "draft sampling"}

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


def test_time_split_of_plain_decoding(tiny: Callable[..., str]):
    found, parts = split(tiny(), None)
    assert parts.keys() == PLAIN_PARTS
    assert found["cycles"] in (30, 31)  # 32 tokens: the prefill gives the first, the last cycle has no end
    assert parts["verify forward"].calls == parts["verify head"].calls == parts["rejection sampling"].calls == 1
    assert parts["verify forward"].bytes_per_call == LAYERS * 4 * (LINEAR + NORMS)
    assert parts["verify head"].bytes_per_call == 4 * HEAD
    assert parts["scheduler"].bytes_per_call is parts["rest"].bytes_per_call is None


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


def test_a_pair_with_a_method_of_vllm(tmp_path: Path):
    """Unmended, vLLM's own methods sample from uninitialised memory on CPU and accept hardly a draft."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "one two three four five six seven eight nine ten, " * 4}) + "\n")
    options = ["--model", DEFAULT_MODEL, "--prompts", str(prompts), "--peers", "ngram@2,suffix", "--no-profile"]
    options += ["--batches", "2", "--temperatures", "0.5", "--rounds", "1", "--max-tokens", "32", "--json"]
    options += ["--enforce-eager", "--max-model-len", "256", "--out", str(tmp_path / "out")]
    process = subprocess.run(
        [sys.executable, "-m", "vllm_selfspec.cli", "bench", *options],
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if not name.startswith("VLLM_")},
    )
    assert process.returncode == 0, process.stderr
    run = BenchRun.load(tmp_path / "out" / "bench.json")
    assert all(item.num_tokens == 2 * 32 for pair in run.pairs for item in pair.rounds)
    (case,) = run.cases()
    row = run.row("ngram@2", case)
    assert row is not None
    assert row.spec.acceptance_per_token is not None
    assert row.spec.acceptance_per_token > 0.3
    try:
        import arctic_inference  # noqa: F401
    except ImportError:
        assert [item.peer for item in run.skipped] == ["suffix"]
