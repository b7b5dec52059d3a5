"""torch.compile on both sides: greedy text is that of plain decoding, and the next start loads the graphs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from engines import Job, drive, engine, greedy, random_prompt, texts

SETTINGS = {
    "num_speculative_tokens": 5,
    "drafter": {"weights": "int8", "lm_head": "int8"},
    "control": {"mode": "fixed"},
}
JOBS = [Job(random_prompt(length, length), greedy(40), arrival=i) for i, length in enumerate((5, 40, 64, 90))]

START = """
import json, sys
sys.path.insert(0, {folder!r})
from vllm.compilation.counter import compilation_counter as counter
from test_compiled import JOBS, SETTINGS
from engines import drive, engine, random_lengths, texts, watch
with engine({model!r}, SETTINGS, enforce_eager=False) as llm:
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
    model = tiny("llama", num_hidden_layers=2)
    with engine(model, enforce_eager=False) as llm:
        expected = texts(drive(llm, JOBS))

    def start() -> tuple[list[object], list[int]]:
        program = START.format(folder=str(Path(__file__).parent), model=model)
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("> ")]
        return json.loads(line[2:])

    plain = json.loads(json.dumps(expected))
    answers, (compiled, loaded, drafted, accepted) = start()
    assert answers == plain
    assert (compiled, loaded) == (2, 0)
    assert drafted > 100
    assert accepted > drafted // 2
    assert start() == [plain, [0, 2, drafted, accepted]]
