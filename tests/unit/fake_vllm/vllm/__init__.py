"""Stands in for vLLM in an engine process: answers every request with the same few tokens, or misbehaves on order.

`model` in the engine's arguments says what happens: `ok`, `refuse` (a ValueError at start), `crash` (another error at
start), `die` (the process ends in the middle of the second generation), `slow` (a sample takes 50 ms), `child` (leaves
a process of its own behind). A draft model of such a name makes the engine that speculates with it behave so.
"""

import os
import subprocess
import sys
import time
from types import SimpleNamespace


class SamplingParams:
    def __init__(self, max_tokens=16, **options):
        self.max_tokens = max_tokens


class LLM:
    def __init__(self, model, speculative_config=None, **options):
        draft_model = (speculative_config or {}).get("model")
        self.behaviour = (draft_model or model).rpartition("/")[2]
        print("engine output that must not reach the caller", flush=True)
        print(f"engine arguments: {options}", flush=True)
        if self.behaviour == "refuse":
            raise ValueError("drafter.exit_layer is 99, but the model has 4 layers: set it between 1 and 3.")
        if self.behaviour == "crash":
            raise RuntimeError("the fake device is gone")
        if self.behaviour == "child":
            process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            print(f"left behind: {process.pid}", flush=True)
        self.model_config = SimpleNamespace(max_model_len=300)
        self.llm_engine = self
        self.speculates = speculative_config is not None
        self.waiting = []
        self.drafts = 0
        self.generations = 0

    def generate(self, prompts, params, use_tqdm):
        """The warm-up."""

    def collective_rpc(self, method):
        """A worker's method, which leaves a word in the log."""
        print(f"worker method: {method}", flush=True)

    def reset_prefix_cache(self):
        self.generations += 1

    def get_tokenizer(self):
        return SimpleNamespace(
            chat_template="{{ messages }}",
            encode=lambda text, add_special_tokens=True: [ord(letter) for letter in text],
            apply_chat_template=lambda messages, **_: " ".join(message["content"] for message in messages),
        )

    def add_request(self, request_id, prompt, params):
        assert prompt["prompt_token_ids"]
        self.waiting.append((request_id, params))

    def has_unfinished_requests(self):
        return bool(self.waiting)

    def step(self):
        request_id, params = self.waiting.pop(0)
        if self.behaviour == "die" and self.generations == 2:
            print("MemoryError: the fake engine ran out of memory", flush=True)
            os._exit(7)
        if self.behaviour == "slow":
            time.sleep(0.05)
        self.drafts += self.speculates
        completion = SimpleNamespace(token_ids=list(range(params.max_tokens)), text="tokens", finish_reason="length")
        return [SimpleNamespace(request_id=request_id, outputs=[completion])]

    def get_metrics(self):
        running = SimpleNamespace(name="vllm:num_requests_running", value=len(self.waiting))
        if not self.speculates:
            return [running]
        steps = {"num_draft_tokens": "3", "reason": "best"}
        return [
            running,
            SimpleNamespace(name="vllm:selfspec_steps", value=self.drafts, labels=steps),
            SimpleNamespace(name="vllm:spec_decode_num_drafts", value=self.drafts),
            SimpleNamespace(name="vllm:spec_decode_num_draft_tokens", value=3 * self.drafts),
            SimpleNamespace(name="vllm:spec_decode_num_accepted_tokens", value=2 * self.drafts),
            SimpleNamespace(name="vllm:spec_decode_num_accepted_tokens_per_pos", values=[self.drafts, self.drafts, 0]),
        ]
