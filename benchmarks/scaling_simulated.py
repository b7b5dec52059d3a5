"""SIMULATED rollout times of 7B, 14B and 70B models on 8 to 1,024 GPUs: the table of docs/scaling.md.

Usage: python benchmarks/scaling_simulated.py
Minutes on one core. The last line on stdout is JSON.
"""

import json
from pathlib import Path

import numpy as np

from vllm_selfspec.control.cost_model import CostModel
from vllm_selfspec.control.policy import ControlSettings
from vllm_selfspec.control.simulate import (
    Clock,
    ControllerPolicy,
    PlainPolicy,
    Policy,
    ReferencePolicy,
    Workload,
    assumed_acceptance,
    compare,
    rollout_workload,
    sample_lengths,
    scale_cost_model,
)

PROFILE = Path(__file__).parents[1] / "configs" / "profiles" / "a100_qwen2.5-7b.json"
REQUESTS, MAX_NUM_SEQS, MAX_DRAFT_TOKENS = 8192, 128, 11
WEIGHTS_7B, KV_BYTES_7B = 7.07e9, 57344
ALL_REDUCE_SECONDS = 15e-6
MODELS = {  # weights read per step, KV bytes per token, layers, GPUs per replica
    "7B": (WEIGHTS_7B, KV_BYTES_7B, 28, 1),
    "14B": (14.0e9, 196608, 48, 1),
    "70B": (69.5e9, 327680, 80, 8),
}


def cost_model(name: str) -> CostModel:
    """The measured profile for 7B, its roofline scaling for the others."""
    measured = CostModel.from_profile(PROFILE)
    if name == "7B":
        return measured
    weights, kv_bytes, layers, gpus = MODELS[name]
    size = weights / WEIGHTS_7B / gpus
    extra = 2 * layers * ALL_REDUCE_SECONDS if gpus > 1 else 0.0
    return scale_cost_model(
        measured, weights=size, compute=size, context=kv_bytes / KV_BYTES_7B / gpus, extra_seconds=extra, name=name
    )


def main() -> None:
    """Simulate and print."""
    models = {name: cost_model(name) for name in MODELS}
    rows = []
    for gpus in (8, 64, 256, 1024):
        for name, cost in models.items():
            replicas = gpus // MODELS[name][3]
            share = max(1, REQUESTS // replicas)

            def workload(rng: np.random.Generator, share: int = share) -> Workload:
                lengths = sample_lengths(share, rng, median=1000, sigma=1.0, longest=8192)
                return rollout_workload(lengths, rng, acceptance=0.98, max_num_seqs=MAX_NUM_SEQS)

            def policies(clock: Clock, cost: CostModel = cost) -> dict[str, Policy]:
                prior = assumed_acceptance(cost)
                settings = ControlSettings(max_draft_tokens=MAX_DRAFT_TOKENS, acceptance_prior=prior)
                return {
                    "plain": PlainPolicy(),
                    "latch + ladder": ReferencePolicy(cost),
                    "selfspec": ControllerPolicy(settings, cost, MAX_NUM_SEQS),
                }

            distinct = min(replicas, 1 if share > 256 else 4)
            results = compare(cost, workload, policies, max_draft_tokens=MAX_DRAFT_TOKENS, replicas=distinct)
            seconds = {result.name: round(result.rollout_seconds, 1) for result in results}
            rows.append({"gpus": gpus, "model": name, "replicas": replicas, "simulated_replicas": distinct, **seconds})
            print("SIMULATED", rows[-1], flush=True)
    print(json.dumps({"simulated": True, "rows": rows}))


if __name__ == "__main__":
    main()
