"""The mends of upstream CPU faults: found where they are, left out where they are not."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from engines import Job, drive, engine, greedy, random_prompt, texts
from vllm import SamplingParams
from vllm.v1.sample.logits_processor.builtin import MinTokensLogitsProcessor

from vllm_selfspec.compat import cpu_expand, min_tokens


def run_fresh(program: str) -> list[str]:
    """Run a program in a fresh interpreter and return the lines that it printed."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [line.removeprefix("> ") for line in done.stdout.splitlines() if line.startswith("> ")]


# What a CPU worker does before it is built, since vLLM 0.32.
STAND_INS = """
from vllm.platforms import current_platform
from vllm_selfspec.plugin import older_than
if not older_than("0.32"):
    current_platform.register_triton_kernel_overrides()
from vllm.v1.sample import rejection_sampler
from vllm_selfspec.compat import cpu_expand
from vllm_selfspec.plugin import MENDS

def mend():
    for seam in MENDS:
        seam.apply()
"""


def test_fault_is_found_and_mended() -> None:
    printed = run_fresh(
        STAND_INS
        + """
print(">", cpu_expand.broken())
mend()
mended = rejection_sampler.expand_batch_to_tokens
print(">", cpu_expand.broken())
mend()
print(">", rejection_sampler.expand_batch_to_tokens is mended)
"""
    )
    assert printed == ["True", "False", "True"]


def test_sound_function_is_left_alone() -> None:
    printed = run_fresh(
        STAND_INS
        + """
import torch
def sound(x, cu_num_tokens, num_tokens, replace_from=0, replace_to=0):
    out = x.new_empty(num_tokens)
    start = 0
    for value, end in zip(x.tolist(), cu_num_tokens.tolist()):
        out[start:end] = replace_to if value == replace_from else value
        start = end
    return out
rejection_sampler.expand_batch_to_tokens = sound
print(">", cpu_expand.broken())
mend()
print(">", rejection_sampler.expand_batch_to_tokens is sound)
"""
    )
    assert printed == ["False", "True"]


def test_empty_top_k_is_found_and_mended() -> None:
    printed = run_fresh(
        STAND_INS
        + """
import torch
from vllm_selfspec.compat import cpu_empty_top_k
print(">", cpu_empty_top_k.broken())
mend()
mended = rejection_sampler.apply_top_k_top_p
print(">", cpu_empty_top_k.broken())
mend()
print(">", rejection_sampler.apply_top_k_top_p is mended)
logits = torch.tensor([[0.0, 3.0, 2.0, 1.0]])
print(">", mended(logits.clone(), torch.tensor([2], dtype=torch.int32), None).tolist())
"""
    )
    assert printed == ["True", "False", "True", "[[-inf, 3.0, 2.0, -inf]]"]


def test_wrong_counts_of_min_tokens_are_found_and_mended() -> None:
    printed = run_fresh(
        STAND_INS
        + """
from vllm.v1.sample.logits_processor.builtin import MinTokensLogitsProcessor
from vllm.v1.sample.sampler import Sampler
from vllm.v1.worker.gpu_input_batch import InputBatch
from vllm_selfspec.compat import min_tokens
def methods():
    return (
        Sampler.apply_logits_processors, MinTokensLogitsProcessor.update_state, InputBatch._make_sampling_metadata
    )
originals = methods()
print(">", min_tokens._miscounts_bonus_tokens(), min_tokens._counts_placeholders())
mend()
mended = methods()
print(">", not set(mended) & set(originals), min_tokens._miscounts_bonus_tokens(), min_tokens._counts_placeholders())
mend()
print(">", methods() == mended)
"""
    )
    assert printed == ["True True", "True False False", "True"]


def test_min_tokens_waits_for_tokens_that_are_known() -> None:
    """Under asynchronous scheduling drafts stand as placeholders in the output until they are verified."""
    update = functools.partial(min_tokens.update_state, MinTokensLogitsProcessor.update_state)
    processor = MinTokensLogitsProcessor(None, torch.device("cpu"), False)  # type: ignore[arg-type]
    output = [5, 6]
    entry = processor.add_request(SamplingParams(min_tokens=4, stop_token_ids=[1]), None, output)
    assert entry is not None
    processor.min_toks = {0: entry}
    output += [-1, -1, -1]
    update(processor, None)
    assert processor.min_toks[0][1] is output
    output[2:] = [7]  # both drafts were rejected
    update(processor, None)
    assert processor.min_toks[0][1] is output
    output += [8, -1]
    update(processor, None)
    assert not processor.min_toks


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.int64])
def test_expand_batch_to_tokens(dtype: torch.dtype) -> None:
    x = torch.tensor([5, 0, 2, 9], dtype=dtype)
    ends = torch.tensor([3, 3, 4, 6], dtype=torch.int32)
    expanded = cpu_expand.expand_batch_to_tokens(None, x, ends, 6)
    assert expanded.dtype == dtype
    assert expanded.tolist() == [5, 5, 5, 2, 9, 9]


def test_expand_batch_to_tokens_replaces() -> None:
    x = torch.tensor([0.0, 0.7, 0.0])
    ends = torch.tensor([2, 3, 4], dtype=torch.int32)
    expanded = cpu_expand.expand_batch_to_tokens(None, x, ends, 4, replace_from=0, replace_to=1)
    torch.testing.assert_close(expanded, torch.tensor([1.0, 1.0, 0.7, 1.0]))


def test_how_a_prompt_is_chunked_does_not_change_a_seeded_text(tiny: Callable[..., str]) -> None:
    """A seeded request whose prompt took several steps stopped the engine: "CPU Generator does not use offset"."""
    jobs = [
        Job(random_prompt(20, 1), greedy(60)),
        Job(random_prompt(150, 2), SamplingParams(max_tokens=40, seed=3), arrival=2),
        Job(random_prompt(90, 4), SamplingParams(max_tokens=40, seed=5, top_k=20), arrival=3),
    ]
    settings = {"num_speculative_tokens": 3, "control": {"mode": "fixed"}}
    found = []
    for chunk in (32, 256):
        with engine(tiny(), settings, max_num_batched_tokens=chunk) as llm:
            found.append(texts(drive(llm, jobs)))
    assert found[0] == found[1]
