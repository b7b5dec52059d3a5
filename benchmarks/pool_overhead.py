"""What the pool costs, and what a second CPU worker brings: alternating rounds over the same prompts.

    eval "$(python -m vllm_selfspec.engine_env)"           # else the bare engine lacks what the pool gives its workers
    python benchmarks/pool_overhead.py --compare bare      # pool of one worker against LLM.generate
    python benchmarks/pool_overhead.py --compare engine    # that pool against its own engine, asked directly
    python benchmarks/pool_overhead.py --compare workers   # pool of two workers (half of the cores each) against one
    python benchmarks/pool_overhead.py --compare control   # LLM.generate against LLM.generate: what chance does

Both sides are alive all the time and take turns, in changing order; the figure is the median of the ratios of the
rounds. Same prompts, seeds and sampling parameters on both sides. Two engines that are alike need not be equally fast
(where their weights lie in memory, which core the engine's scheduler spins on): `--compare control` says how much of a
difference that makes on the machine, and `--swap` starts the sides in the other order. `--compare engine` has one and
the same engine on both sides: what differs is the pool's queues, its bookkeeping and Ray's calls. Its cost in seconds
does not depend on the model, so `--layers 2` (that many layers, random weights) shows it in short rounds, of which the
machine allows many. Without AVX-512 use `--dtype float32`. The last line is JSON.
"""

import argparse
import asyncio
import contextlib
import functools
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

# Before vLLM is imported. Two engines are alive at once: an idle one must not spin on the cores of the other.
os.environ.setdefault("KMP_BLOCKTIME", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import ray

from vllm_selfspec.rollout import RolloutPool, RolloutWorker, actors

QUESTIONS = (
    "Explain why the sky is blue.",
    "Write a Python function that reverses a linked list.",
    "What is the sum of the first hundred integers?",
    "Describe how a refrigerator works.",
    "Give three reasons to learn Latin.",
    "Who wrote The Old Man and the Sea?",
    "How do vaccines work?",
    "Tell a short story about a lighthouse.",
)


class DirectWorker(RolloutWorker):
    """A worker whose engine can be asked past its queue."""

    async def generate_directly(self, prompts: list[str], n: int, params: dict[str, Any]) -> int:
        """All samples with one request for each prompt, as `LLM.generate` makes them. Returns the number of tokens."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        async def one(number: int, prompt: str) -> int:
            sampling = SamplingParams(n=n, output_kind=RequestOutputKind.FINAL_ONLY, **params)
            tokens = 0
            async for output in self._engine.generate(prompt, sampling, f"direct-{number}"):
                tokens += sum(len(completion.token_ids) for completion in output.outputs)
            return tokens

        return sum(await asyncio.gather(*(one(*numbered) for numbered in enumerate(prompts))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="checkpoint folder")
    parser.add_argument("--compare", choices=("bare", "engine", "workers", "control"), default="bare")
    parser.add_argument("--swap", action="store_true", help="start the sides in the other order")
    parser.add_argument("--pause", type=float, default=1.5, help="seconds between two turns, for idle engines to sleep")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--n", type=int, default=4, help="samples per prompt")
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--natural", action="store_true", help="stop at the end of the answer, not at --max-tokens")
    parser.add_argument("--batch", type=int, default=16, help="max_num_seqs of all engines of one side together")
    parser.add_argument("--compile", action="store_true", help="torch.compile on both sides (slower start)")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--layers", type=int, help="random weights and that many layers only: shorter steps")
    args = parser.parse_args()
    actors.RolloutWorker = DirectWorker

    engine: dict[str, Any] = {
        "max_model_len": 1024,
        "dtype": args.dtype,
        "enforce_eager": not args.compile,
        "max_num_seqs": args.batch,
        "kv_cache_memory_bytes": 1 << 29,
    }
    if args.layers:
        engine |= {"load_format": "dummy", "hf_overrides": {"num_hidden_layers": args.layers}}
    params = {
        "temperature": 1.0,
        "seed": 1,
        "max_tokens": args.max_tokens,
        "ignore_eos": not args.natural,
        "logprobs": 0,
    }
    prompts = list(QUESTIONS)

    def bare(stack: contextlib.ExitStack) -> Callable[[], int]:
        from vllm import LLM, SamplingParams

        llm = LLM(model=args.model, **engine)
        sampling = SamplingParams(n=args.n, **params)

        def generate() -> int:
            outputs = llm.generate(prompts, sampling, use_tqdm=False)
            return sum(len(completion.token_ids) for output in outputs for completion in output.outputs)

        return generate

    @functools.cache
    def started(stack: contextlib.ExitStack, num_workers: int) -> RolloutPool:
        share = {**engine, "max_num_seqs": max(1, args.batch // num_workers)}
        return stack.enter_context(RolloutPool(args.model, num_workers, engine_args=share))

    def pool(stack: contextlib.ExitStack, num_workers: int = 1) -> Callable[[], int]:
        workers = started(stack, num_workers)
        return lambda: sum(len(sample.token_ids) for sample in workers.generate(prompts, args.n, params))

    def engine_of_pool(stack: contextlib.ExitStack) -> Callable[[], int]:
        actor = started(stack, 1)._slots[0].handle.actor
        return lambda: ray.get(actor.generate_directly.remote(prompts, args.n, params))

    # The measured side over the base.
    other, base = {
        "bare": ("one worker", "bare LLM.generate"),
        "engine": ("one worker", "its engine"),
        "workers": ("two workers", "one worker"),
        "control": ("another LLM.generate", "bare LLM.generate"),
    }[args.compare]
    makers = {
        "one worker": pool,
        "its engine": engine_of_pool,
        "two workers": lambda stack: pool(stack, 2),
        "bare LLM.generate": bare,
        "another LLM.generate": bare,
    }
    with contextlib.ExitStack() as stack:
        order = (base, other) if args.swap else (other, base)
        sides = {name: makers[name](stack) for name in order}
        first, second = sides
        for name in sides:
            sides[name]()  # warm up
        rates: dict[str, list[float]] = {name: [] for name in sides}
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(args.rounds):
            for name in (first, second) if number % 2 == 0 else (second, first):
                time.sleep(args.pause)  # vLLM's idle processes poll for a second
                began = time.perf_counter()
                tokens = sides[name]()
                seconds[name].append(time.perf_counter() - began)
                rates[name].append(tokens / seconds[name][-1])
            print(
                f"round {number + 1:2}: " + ", ".join(f"{name} {rates[name][-1]:.1f} tok/s" for name in sides),
                flush=True,
            )

    ratios = [b / a for a, b in zip(rates[base], rates[other], strict=True)]
    more = [b - a for a, b in zip(seconds[base], seconds[other], strict=True)]
    result = {
        "compare": f"{other} / {base}",
        "ratio_median": statistics.median(ratios),
        "ratios": sorted(round(ratio, 4) for ratio in ratios),
        "seconds_more_median": statistics.median(more),
        "seconds_median": {name: statistics.median(values) for name, values in seconds.items()},
        "tokens_per_s": {name: statistics.median(values) for name, values in rates.items()},
        "arguments": vars(args),
    }
    print(
        f"{result['compare']}: {result['ratio_median']:.3f} of the tokens/s, {1e3 * statistics.median(more):+.1f} ms "
        f"per round (medians of {len(ratios)} rounds)"
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
