"""How many times as often drafts of the light view are rejected as those of the main one, counted in an engine.

    eval "$(python -m vllm_selfspec.engine_env)"
    python benchmarks/view_rejections.py MODEL [MODEL ...] --out rejections.json

Each view drafts γ tokens in every step for the package's embedded prompts, so many answers of them at once. A draft
counts when all before it were accepted; the ratio of both views' rates is where the controller starts from
(`USUAL_REJECTION_RATIO`), until an engine has seen its own. Nothing is timed. The last line is JSON.
"""

import argparse
import json
import os
from dataclasses import replace
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from result_file import new_out, save
from vllm import LLM, SamplingParams

from vllm_selfspec.control.policy import Controller, ControlSettings, Decision, StepState
from vllm_selfspec.prompts import embedded_prompts
from vllm_selfspec.provenance import provenance


class OneView(Controller):
    """Always drafts γ tokens with one view and counts what becomes of them."""

    def __init__(self, gamma: int, light: bool) -> None:
        super().__init__(ControlSettings(max_draft_tokens=gamma, mode="fixed"))
        self.light = light
        self.tried = self.rejected = 0

    def decide(self, state: StepState) -> Decision:
        """With that view, in a batch of any size."""
        return replace(super().decide(state), light=self.light)

    def observe_acceptance(
        self, num_drafted: int, num_accepted: int, request_id: str | None = None, light: bool = False
    ) -> None:
        """Count the drafts that were looked at."""
        super().observe_acceptance(num_drafted, num_accepted, request_id, light)
        if light == self.light:  # the first drafts may be of the run before
            self.tried += min(num_accepted + 1, num_drafted)
            self.rejected += num_accepted < num_drafted


def measure(model: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rejections of both views for every temperature."""
    settings = {"method": "selfspec", "num_speculative_tokens": args.gamma, "control": {"mode": "fixed"}}
    settings["drafter"] = {"weights": "int4+int8", "lm_head": "int4+int8"}
    llm = LLM(model, speculative_config=settings, max_model_len=1024, max_num_seqs=16, enforce_eager=True)
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    chats = [prompt["messages"] for prompt in embedded_prompts()] * args.answers
    found = []
    for temperature in args.temperatures:
        rates = {}
        for name, light in (("main", False), ("light", True)):
            scheduler._controller = counted = OneView(args.gamma, light)
            params = SamplingParams(temperature=temperature, max_tokens=args.tokens)
            llm.chat(chats, params, use_tqdm=False)
            rates[name] = counted.rejected / counted.tried
            print(f"{model}, temperature {temperature:g}, {name}: {counted.rejected} of {counted.tried} rejected")
        ratio = rates["light"] / rates["main"]
        print(f"    {ratio:.2f} times as often", flush=True)
        found.append({"model": model, "temperature": temperature, "rejected": rates, "ratio": ratio})
    llm.llm_engine.engine_core.shutdown()
    return found


def main() -> None:
    """Measure every model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--gamma", type=int, default=5, help="drafts per step")
    parser.add_argument("--tokens", type=int, default=96, help="most tokens of an answer")
    parser.add_argument("--answers", type=int, default=1, help="answers to each prompt")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--out", default="rejections.json")
    args = parser.parse_args()
    args.out = new_out(parser, args.out)
    origin = provenance()
    results: list[dict[str, Any]] = []
    for model in args.models:
        results += measure(model, args)
        save(args.out, {"results": results, "arguments": vars(args), **origin})
    print(json.dumps(results))


if __name__ == "__main__":
    main()
