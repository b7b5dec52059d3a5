"""What the weights' pages of memory are worth: engines that move them to huge pages, and engines that do not, in turns.

    eval "$(python -m vllm_selfspec.engine_env)"
    python benchmarks/huge_pages.py MODEL --out huge_pages.json

Each engine runs alone in a process of its own and drafts three tokens in every step; a round is one of either kind.
Milliseconds per forward are medians over all forwards of an engine, tokens/s over its repetitions; below them stand the
medians of the rounds' ratios, small pages over huge ones. How slow small pages are depends on where the machine's
memory lies free, which changes from start to start: compare rounds. The last line is JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from result_file import new_out, save

BATCHES, DRAFT_TOKENS, TOKENS, REPETITIONS = (1, 4, 16), 3, 32, 5


def measure(model: str, huge: bool, eager: bool) -> dict[str, float]:
    """Start an engine here: milliseconds and tokens/s by name."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    from vllm_selfspec.drafter import huge_pages
    from vllm_selfspec.prompts import embedded_prompts

    if not huge:
        huge_pages.WORTH_IT = sys.maxsize
    spec = {"method": "selfspec", "num_speculative_tokens": DRAFT_TOKENS, "control": {"mode": "fixed"}}
    llm = LLM(model, max_model_len=1024, max_num_seqs=max(BATCHES), enforce_eager=eager, speculative_config=spec)
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    seconds: dict[str, list[float]] = {"draft": [], "verify": []}
    for name, part in (("draft", runner.drafter.model), ("verify", runner.model)):
        part.forward = timed(part.forward, seconds[name])

    prompts = [prompt["messages"] for prompt in embedded_prompts()] * max(BATCHES)

    def tokens_per_second(batch: int, tokens: int) -> float:
        params = SamplingParams(max_tokens=tokens, temperature=1.0, ignore_eos=True)
        start = time.perf_counter()
        llm.chat(prompts[:batch], params, use_tqdm=False)
        return batch * tokens / (time.perf_counter() - start)

    found: dict[str, float] = {}
    for batch in BATCHES:
        tokens_per_second(batch, 2 * DRAFT_TOKENS)
        for times in seconds.values():
            times.clear()
        speeds = [tokens_per_second(batch, TOKENS) for _ in range(REPETITIONS)]
        for name, times in seconds.items():
            found[f"{name}, B = {batch}, ms"] = 1e3 * statistics.median(times)
        found[f"B = {batch}, tokens/s"] = statistics.median(speeds)
    return found


def timed(function: Any, seconds: list[float]) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = function(*args, **kwargs)
        seconds.append(time.perf_counter() - start)
        return result

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--pages", choices=("small", "huge"), help="measure one engine in this process")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.pages is not None:
        print(json.dumps(measure(args.model, args.pages == "huge", args.enforce_eager)))
        return

    from vllm_selfspec.provenance import provenance

    out = new_out(parser, args.out)
    result: dict[str, Any] = {"provenance": provenance()}
    rounds: list[dict[str, dict[str, float]]] = []
    for number in range(args.rounds):
        found = {}
        for pages in ("small", "huge") if number % 2 == 0 else ("huge", "small"):
            command = [sys.executable, __file__, args.model, "--pages", pages]
            command += ["--enforce-eager"] if args.enforce_eager else []
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            found[pages] = json.loads(output.splitlines()[-1])
            print(pages, {name: round(value, 1) for name, value in found[pages].items()}, flush=True)
        rounds.append(found)
        ratios = {
            name: statistics.median(found["small"][name] / found["huge"][name] for found in rounds)
            for name in rounds[0]["small"]
        }
        result |= {"rounds": rounds, "small_over_huge": ratios}
        save(out, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
