"""`vllm-selfspec rollout` as a person runs it: the embedded model, real engines in processes of their own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from vllm_selfspec.models import DEFAULT_MODEL, demo_checkpoint
from vllm_selfspec.results import RolloutRun


def start(*options: str) -> "subprocess.Popen[str]":
    """Start the command in its own session, in an environment like a user's shell."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    cores = os.sched_getaffinity(0)

    def prepare() -> None:
        # A shell's background jobs, among which a test run may be, ignore SIGINT.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        # Intel's OpenMP in this process pins what is forked from it to one core.
        os.sched_setaffinity(0, cores)

    return subprocess.Popen(
        [sys.executable, "-m", "vllm_selfspec.cli", "rollout", "--enforce-eager", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
        preexec_fn=prepare,
    )


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def test_converted_model_reads_english():
    """A wrong tensor order anywhere (rotary rows first of all) makes this loss 7 and more."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    checkpoint = demo_checkpoint()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    text = (
        "The sun rises in the east and sets in the west. Water boils at one hundred degrees Celsius, "
        "and the capital of France is Paris. To be or not to be, that is the question."
    )
    token_ids = torch.tensor([tokenizer.encode(text)])
    with torch.no_grad():
        assert model(token_ids, labels=token_ids).loss < 2.5


def test_both_engines_side_by_side(out: Path, tmp_path: Path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        '{"messages": [{"role": "user", "content": "Count from one to ten."}]}\n'
        '{"prompt": "The capital of France is"}\n'
    )
    options = ["--prompts", str(prompts), "--n", "2", "--batch", "4", "--rounds", "1", "--max-tokens", "24"]
    speculation = [
        "--num-speculative-tokens",
        "3",
        "--control",
        '{"mode": "fixed"}',
        "--drafter",
        '{"weights": "int8"}',
    ]
    process = start("--model", DEFAULT_MODEL, *options, *speculation, "--ignore-eos", "--out", str(out), "--json")
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert "tokens/s" in stdout

    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    keys = {(sample["mode"], sample["prompt"], sample["sample"]) for sample in samples}
    assert keys == {(mode, p, s) for mode in ("plain", "selfspec") for p in (0, 1) for s in (0, 1)}
    assert len(samples) == len(keys)
    assert all(len(sample["token_ids"]) == 24 and sample["finish_reason"] == "length" for sample in samples)
    assert all(sample["text"].strip() for sample in samples)

    plain, selfspec = RolloutRun.load(out / "rollout.json").rounds
    assert plain.spec is None
    assert selfspec.spec is not None
    # An int8 drafter of this model agrees with it on nearly every token; 24 tokens need at least 6 drafts of 3.
    assert selfspec.spec.num_drafts >= 4 * 6
    assert selfspec.spec.acceptance_per_token > 0.5
    assert selfspec.spec.draft_lengths[3] > 0
    assert json.loads(stdout.splitlines()[-1])["acceptance_length"] == selfspec.spec.acceptance_length


def test_two_ray_workers(out: Path, tmp_path: Path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        '{"messages": [{"role": "user", "content": "Count from one to ten."}]}\n'
        '{"prompt": "The capital of France is"}\n'
    )
    options = ["--workers", "2", "--only", "selfspec", "--prompts", str(prompts), "--n", "4", "--batch", "2"]
    speculation = [
        "--num-speculative-tokens",
        "3",
        "--control",
        '{"mode": "fixed"}',
        "--drafter",
        '{"weights": "int8", "lm_head": "int8"}',
    ]
    process = start(*options, *speculation, "--rounds", "1", "--max-tokens", "16", "--ignore-eos", "--out", str(out))
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert "tokens/s" in stdout

    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert sorted((s["prompt"], s["sample"]) for s in samples) == [(p, s) for p in (0, 1) for s in range(4)]
    assert all(len(sample["token_ids"]) == 16 and sample["text"].strip() for sample in samples)
    (report,) = map(json.loads, (out / "workers.jsonl").read_text().splitlines())
    # Four each, unless one is so much slower that what it has not begun goes to the other.
    assert sum(worker["samples"] for worker in report["workers"]) == 8
    for worker in report["workers"]:
        done = worker["samples"]
        assert done >= 2 and 0 < worker["utilisation"] <= 1
        assert worker["acceptance"] > 0.5 and 1 < worker["draft_length"] < 3
        told = f"{done} samples, {16 * done} tokens, γ {worker['draft_length']:.2f}"
        assert f"worker {worker['worker_id']}: {told}" in stderr

    (spec,) = (item.spec for item in RolloutRun.load(out / "rollout.json").rounds)
    assert spec is not None
    assert set(spec.draft_lengths) <= {0, 1, 2, 3}
    assert spec.draft_lengths[0] >= 8  # the step of each prompt
    assert sum(length * count for length, count in spec.draft_lengths.items()) == spec.num_draft_tokens


def test_interrupting_real_engines(out: Path):
    options = ["--only", "selfspec", "--n", "4", "--batch", "2", "--max-tokens", "16", "--control", '{"mode": "fixed"}']
    process = start(*options, "--out", str(out))
    samples = out / "samples.jsonl"
    while not samples.exists() or samples.read_bytes().count(b"\n") < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    descendants = psutil.Process(process.pid).children(recursive=True)
    assert descendants
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    assert process.returncode == 130
    records = [json.loads(line) for line in samples.read_text().splitlines()]
    assert f"Interrupted: {len(records)} finished samples are in {samples}" in stderr
    _, alive = psutil.wait_procs(descendants, timeout=10)
    assert not alive


def test_a_layer_that_the_model_does_not_have(out: Path):
    process = start("--only", "selfspec", "--drafter", '{"exit_layer": 30}', "--out", str(out))
    _, stderr = process.communicate()
    assert process.returncode == 2
    assert stderr.splitlines()[-1].startswith("vllm-selfspec: drafter.exit_layer is 30, but the model has 30 layers")
