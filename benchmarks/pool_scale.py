"""How many samples per second the pool's own bookkeeping can schedule, and how much memory that takes.

Simulated workers without engines, behind the real interface, in this process: everything but vLLM and Ray is the code
of a real rollout. Two figures: the dispatcher alone, and the whole pool (queues, tasks, streams, sample objects).

    python benchmarks/pool_scale.py --workers 1024 --samples 100000

The last line is JSON.
"""

import argparse
import gc
import json
import time
import tracemalloc
from collections import deque
from typing import Any

from vllm_selfspec.rollout import Dispatcher, DummyWorker, RolloutPool
from vllm_selfspec.rollout.types import SampleKey

CAPACITY, GROUP = 16, 8


def dispatch(workers: int, samples: int) -> None:
    """Every sample through `Dispatcher`, finishing first come first served."""
    dispatcher = Dispatcher()
    for worker_id in range(workers):
        dispatcher.add_worker(worker_id, CAPACITY, CAPACITY // 4)
    for prompt in range(samples // GROUP):
        dispatcher.add_group(0, prompt, GROUP, prompt_tokens=100 + prompt % 400, sample_tokens=512)
    in_flight: deque[tuple[int, SampleKey]] = deque()
    done = 0
    while dispatcher.unfinished(0):
        for worker_id, items in dispatcher.assign().items():
            in_flight.extend((worker_id, item.key) for item in items)
        for worker_id, _ in dispatcher.reclaims():
            dispatcher.give_back(worker_id, [], begun=False)
        done += dispatcher.finish(*in_flight.popleft())
    assert done == samples // GROUP * GROUP


def rollout(workers: int, samples: int, runs: int) -> list[dict[str, float]]:
    """`samples` through a `RolloutPool` of dummy workers, `runs` times; one dict of figures per run."""
    figures = []
    prompts = [[1] * 8] * (samples // GROUP)
    with RolloutPool(num_workers=workers, make_handle=lambda i: DummyWorker(i, CAPACITY)) as pool:
        for _ in range(runs):
            gc.collect()
            began = time.perf_counter()
            count = sum(1 for _ in pool.generate(prompts, GROUP, {"max_tokens": 16}))
            seconds = time.perf_counter() - began
            assert count == samples // GROUP * GROUP
            figures.append({"samples_per_s": count / seconds, "seconds": seconds})
    return figures


def retained(workers: int, samples: int) -> list[float]:
    """MiB of Python objects that are still held after each of three runs in one pool, under tracemalloc."""
    held = []
    prompts = [[1] * 8] * (samples // GROUP)
    with RolloutPool(num_workers=workers, make_handle=lambda i: DummyWorker(i, CAPACITY)) as pool:
        tracemalloc.start()
        for _ in range(3):
            deque(pool.generate(prompts, GROUP, {"max_tokens": 16}), maxlen=0)
            gc.collect()
            held.append(tracemalloc.get_traced_memory()[0] / 2**20)
        tracemalloc.stop()
    return held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    result: dict[str, Any] = {"workers": args.workers, "samples": args.samples}

    rates = []
    for _ in range(args.runs):
        began = time.perf_counter()
        dispatch(args.workers, args.samples)
        rates.append(args.samples / (time.perf_counter() - began))
    result["dispatcher_samples_per_s"] = sorted(rates)[len(rates) // 2]
    print(f"dispatcher alone: {result['dispatcher_samples_per_s']:,.0f} samples/s")

    figures = rollout(args.workers, args.samples, args.runs)
    rates = sorted(figure["samples_per_s"] for figure in figures)
    result["pool_samples_per_s"] = rates[len(rates) // 2]
    print(
        f"whole pool:       {result['pool_samples_per_s']:,.0f} samples/s (runs: {[f'{rate:,.0f}' for rate in rates]})"
    )

    result["scaling"] = {}
    for workers in (1, 16, 128, 1024, 4096):
        result["scaling"][workers] = rollout(workers, args.samples, 1)[0]["samples_per_s"]
        print(f"  {workers:5} workers: {result['scaling'][workers]:,.0f} samples/s")

    result["retained_mib_after_runs"] = retained(args.workers, args.samples)
    print(f"held after each of three runs: {[f'{mib:.1f} MiB' for mib in result['retained_mib_after_runs']]}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
