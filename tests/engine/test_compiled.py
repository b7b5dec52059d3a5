"""torch.compile on both sides: greedy text is that of plain decoding, and the next start loads the graphs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engines import Job, greedy, random_prompt

SETTINGS = {
    "num_speculative_tokens": 5,
    "drafter": {"weights": "int4+int8", "lm_head": "int8"},
    "control": {"mode": "fixed"},
}
JOBS = [Job(random_prompt(length, length), greedy(40), arrival=i) for i, length in enumerate((5, 40, 64, 90))]

START = """
import json, sys
sys.path.insert(0, {folder!r})
from vllm.compilation.counter import compilation_counter as counter
from test_compiled import JOBS
from engines import drive, engine, random_lengths, texts, watch
with engine({model!r}, {settings!r}, enforce_eager=False) as llm:
    seen = watch(llm, random_lengths(1, 5))
    answers = texts(drive(llm, JOBS))
    counts = [counter.num_aot_compiles, counter.num_aot_artifacts_loaded, seen.drafted, seen.accepted]
    print(">", json.dumps([answers, counts]))
"""


def test_compiled_equals_plain_decoding_and_the_next_start_loads_the_graphs(
    tiny: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph that came from the cache must draft from this engine's weights, not from those it was traced with."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    model = tiny("llama", num_hidden_layers=1)

    def start(settings: dict[str, Any] | None) -> tuple[list[object], list[int]]:
        program = START.format(folder=str(Path(__file__).parent), model=model, settings=settings)
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("> ")]
        return json.loads(line[2:])

    plain, (compiled, *_) = start(None)
    assert compiled == 1
    answers, (compiled, loaded, drafted, accepted) = start(SETTINGS)
    assert answers == plain
    assert (compiled, loaded) == (2, 0)  # the target, and both views of the drafter
    assert drafted > 100
    assert accepted > drafted // 2
    assert start(SETTINGS) == [plain, [0, 2, drafted, accepted]]
