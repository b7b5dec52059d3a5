"""GRPO on a CPU, in one file: SmolLM2-135M learns to work out a sum in the form of one example.

    pip install 'vllm-selfspec[ray]'
    python examples/grpo_arithmetic.py --compare

Ray workers roll out with self-speculative decoding, a plain PyTorch loop computes the GRPO loss (group-normalised
advantages, clipped ratio to the log probabilities that came with the samples) and takes one AdamW step, and the new
weights go back to every worker through vLLM's start / update / finish protocol. The reward is a rule: half for the form
"8+6=14, so it is 14.", a quarter for each of its two numbers that is right.

`--compare` has plain workers follow the same weights and answer the same questions in every step, with the same seeds.
Their answers are scored and timed but not trained on: two separate trainings drift apart by chance within a few steps,
whatever samples them, and would have to be repeated many times to be compared. This way the rewards of each step come
from one policy with and without selfspec, and a sign-flip test over all samples says whether they differ.

Everything finished is on disk after each step (`grpo.json`, `grpo.png`, `samples-*.jsonl`), also after Ctrl-C.
"""

import argparse
import contextlib
import json
import os
import random
import re
import time
from pathlib import Path
from typing import Any

# The trainer and the workers take turns on the same cores: whoever is idle must not spin. Read when torch is imported.
os.environ.setdefault("KMP_BLOCKTIME", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_selfspec.models import demo_checkpoint
from vllm_selfspec.rollout import PoolReport, RolloutPool, Sample, SampleWriter

SPECULATIVE = '{"method": "selfspec"}'
CLIP = 0.2
MICRO_BATCH = 16  # samples per forward pass of the trainer; one optimizer step takes them all


def reward(answer: str, a: int, b: int) -> float:
    """The verifiable reward of one answer."""
    found = re.fullmatch(rf"{a}\+{b}=(\d+), so it is (\d+)\.", answer.strip())
    return 0.5 + 0.25 * sum(int(number) == a + b for number in found.groups()) if found else 0.0


def problems(step: int, count: int, seed: int) -> list[tuple[int, int]]:
    """The sums of one step: the same for every run with this seed."""
    rng = random.Random(f"{seed}-{step}")
    return [(rng.randint(1, 9), rng.randint(1, 9)) for _ in range(count)]


def advantages(rewards: np.ndarray) -> np.ndarray:
    """Rewards [prompts, n], normalised within each prompt's group."""
    return (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, keepdims=True) + 1e-4)


def log_probabilities(model: Any, prompts: list[list[int]], answers: list[list[int]]) -> list[torch.Tensor]:
    """Per sample, the model's log probability of each answer token. The LM head sees answer positions only."""
    rows = [torch.tensor(prompt + answer) for prompt, answer in zip(prompts, answers, strict=True)]
    # Padded on the right under causal attention: no real token looks at padding, so no mask is needed.
    hidden = model.model(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)).last_hidden_state
    lengths = [len(answer) for answer in answers]
    # Position t predicts token t + 1.
    spans = [hidden[i, len(prompts[i]) - 1 : len(prompts[i]) - 1 + lengths[i]] for i in range(len(rows))]
    logits = model.lm_head(torch.cat(spans)).float()  # [answer tokens of all samples, vocabulary]
    chosen = torch.tensor([token for answer in answers for token in answer])[:, None]
    return list(logits.log_softmax(-1).gather(1, chosen)[:, 0].split(lengths))


def rollout(
    pool: RolloutPool, prompts: list[list[int]], args: argparse.Namespace, stop: list[int], writer: SampleWriter
) -> tuple[list[Sample], PoolReport]:
    """`args.n` samples of each prompt, in order, each written as it finishes."""
    # Stop tokens, not a stop string: a draft brings several tokens at once, and those after a string would stay.
    sampling = {"temperature": 1.0, "max_tokens": args.max_tokens, "stop_token_ids": stop, "logprobs": 0}
    stream = pool.generate(prompts, args.n, sampling)
    samples: list[Sample] = []
    for sample in stream:
        writer.write(sample)
        samples.append(sample)
    return sorted(samples, key=lambda sample: (sample.prompt_index, sample.sample_index)), stream.report


def train(
    model: Any, optimizer: torch.optim.Optimizer, prompts: list[list[int]], samples: list[Sample], advantage: np.ndarray
) -> float:
    """One optimizer step of GRPO on all samples.

    Returns:
        Mean |trainer's - worker's| log probability per token before the step. It stays at rounding noise only if
        the workers sample from the very weights that are trained here.
    """
    gaps: list[torch.Tensor] = []
    for first in range(0, len(samples), MICRO_BATCH):
        batch = slice(first, first + MICRO_BATCH)
        asked = [prompts[sample.prompt_index] for sample in samples[batch]]
        log_probs = log_probabilities(model, asked, [sample.token_ids for sample in samples[batch]])
        loss = torch.zeros(())
        for new, sample, a in zip(log_probs, samples[batch], advantage[batch], strict=True):
            old = torch.tensor(sample.logprobs)
            ratio = (new - old).exp()
            loss = loss - torch.minimum(ratio * a, ratio.clamp(1 - CLIP, 1 + CLIP) * a).mean() / len(samples)
            gaps.append((new.detach() - old).abs())
        loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return float(torch.cat(gaps).mean())


def speculation(report: PoolReport) -> tuple[float | None, float]:
    """Accepted per drafted token (None without drafts), and drafted tokens per request and step, over all workers."""
    steps = np.array([worker.generated_tokens / worker.acceptance_length for worker in report.workers])
    drafted = steps * [worker.draft_length for worker in report.workers]
    accepted = drafted @ [worker.acceptance or 0.0 for worker in report.workers]
    return (float(accepted / drafted.sum()) if drafted.any() else None), float(drafted.sum() / steps.sum())


def print_row(figures: dict[str, Any]) -> None:
    """One line, under a heading if it is the first."""
    cells = {name: "-" if value is None else value for name, value in figures.items() if name != "rewards"}
    if figures["step"] == 0 and figures["workers"] == "selfspec":
        print("  ".join(f"{name:>8}" for name in cells))
    texts = (f"{value:.3f}" if isinstance(value, float) else str(value) for value in cells.values())
    print("  ".join(text.rjust(max(8, len(name))) for name, text in zip(cells, texts, strict=True)), flush=True)


def compare(runs: dict[str, list[dict[str, Any]]], seed: int) -> dict[str, Any]:
    """Whether the rewards of two runs agree: a two-sided test that flips the signs of their differences 20,000 times.

    Both sample from the same weights in every step, so each difference is as likely to be negative as positive.
    """
    runs = {name: steps[: len(runs["plain"])] for name, steps in runs.items()}
    rewards = {name: np.array([step["rewards"] for step in steps]).ravel() for name, steps in runs.items()}
    seconds = {name: np.array([step["rollout_s"] for step in steps]) for name, steps in runs.items()}
    differences = rewards["selfspec"] - rewards["plain"]
    flips = np.random.default_rng(seed).choice([-1.0, 1.0], (20_000, differences.size))
    as_large = np.abs(flips @ differences) >= abs(differences.sum()) - 1e-9
    p = float((1 + as_large.sum()) / (1 + len(flips)))
    return {
        "samples_each": differences.size,
        "mean_reward": {name: float(values.mean()) for name, values in rewards.items()},
        "p": p,
        "verdict": "the rewards differ (p < 0.01)" if p < 0.01 else "no difference between the rewards (p >= 0.01)",
        "rollout_s": {name: float(values.sum()) for name, values in seconds.items()},
        "rollout_speedup_median": float(np.median(seconds["plain"] / seconds["selfspec"])),
    }


def save(runs: dict[str, list[dict[str, Any]]], args: argparse.Namespace) -> None:
    """Write the figures, and draw them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    data: dict[str, Any] = {"arguments": {**vars(args), "out": str(args.out)}, "runs": runs}
    if args.compare:
        data["comparison"] = compare(runs, args.seed)
    (args.out / "grpo.json").write_text(json.dumps(data, indent=1) + "\n")

    figure, panels = pyplot.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    titles = {"reward": "mean reward", "rollout_s": "rollout (s)", "acceptance": "accepted per drafted token"}
    for panel, (key, title) in zip(panels, titles.items(), strict=True):
        for name, color in zip(runs, ("#1f77b4", "#7f7f7f"), strict=False):
            points = [(step["step"], step[key]) for step in runs[name] if step[key] is not None]
            if points:
                panel.plot(*zip(*points, strict=True), "o-", color=color, label=name)
        panel.set(title=title, xlabel="step")
        panel.set_ylim(0, None if key == "rollout_s" else 1.02)
    panels[0].legend()
    figure.savefig(args.out / "grpo.png", dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--prompts", type=int, default=2, help="sums per step")
    parser.add_argument("--n", type=int, default=8, help="samples per sum (the group)")
    parser.add_argument("--max-tokens", type=int, default=20)
    parser.add_argument("--lr", type=float, default=2e-5, help="of AdamW, constant")
    parser.add_argument("--workers", type=int, default=1, help="vLLM engines; on a CPU they share the cores")
    parser.add_argument("--batch", type=int, default=8, help="samples that one worker decodes at once (max_num_seqs)")
    parser.add_argument("--speculative-config", type=json.loads, default=SPECULATIVE, metavar="JSON", help="vLLM's")
    parser.add_argument("--compare", action="store_true", help="have plain workers sample from the same weights too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs") / time.strftime("grpo-%Y%m%d-%H%M%S"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)

    checkpoint = demo_checkpoint(print)
    engine = {
        "max_model_len": 256,
        "max_num_seqs": args.batch,
        # As the trainer: rounded to bfloat16, steps this small are lost and the workers stay where they were.
        "dtype": "float32",
        "enforce_eager": True,  # a compiled engine is faster, but its first start takes minutes
        "seed": args.seed,
    }
    modes = {"selfspec": args.speculative_config} | ({"plain": None} if args.compare else {})
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in modes}
    with contextlib.ExitStack() as stack:
        pools: dict[str, RolloutPool] = {}
        writers = {name: stack.enter_context(SampleWriter(args.out / f"samples-{name}.jsonl")) for name in modes}
        for name, config in modes.items():
            print(f"starting {args.workers} {name} worker(s)", flush=True)
            # The argument alone says whether to speculate. On a CPU the cache of each worker is 1 GiB.
            env = {"KMP_BLOCKTIME": "1", "VLLM_SELFSPEC": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
            pool = RolloutPool(checkpoint, args.workers, engine_args=engine, speculative_config=config, env=env)
            pools[name] = stack.enter_context(pool)
        try:
            for index in range(args.steps):
                sums = problems(index, args.prompts, args.seed)
                prompts = [tokenizer.encode(f"4+3: 4+3=7, so it is 7.\n{a}+{b}:") for a, b in sums]
                made = {
                    n: rollout(pool, prompts, args, tokenizer.encode("\n"), writers[n]) for n, pool in pools.items()
                }
                rewards = {
                    name: np.array([reward(s.text or "", *sums[s.prompt_index]) for s in samples]).reshape(-1, args.n)
                    for name, (samples, _) in made.items()
                }
                began = time.perf_counter()
                gap = train(model, optimizer, prompts, made["selfspec"][0], advantages(rewards["selfspec"]).ravel())
                train_s = time.perf_counter() - began
                began = time.perf_counter()
                for pool in pools.values():
                    # `named_parameters` lists the tied LM head once, as the embedding.
                    pool.set_weights(dict(model.named_parameters()), version=index + 1)
                update_s = (time.perf_counter() - began) / len(pools)
                for name, (samples, report) in made.items():
                    acceptance, draft_length = speculation(report)
                    figures = {
                        "step": index,
                        "workers": name,
                        "weights": samples[0].weight_version,
                        "reward": float(rewards[name].mean()),
                        "right": float((rewards[name] == 1.0).mean()),
                        "rollout_s": report.makespan_s,
                        "tokens": report.generated_tokens,
                        "draft_length": draft_length,
                        "acceptance": acceptance,
                        "train_s": train_s,
                        "update_s": update_s,
                        "logprob_gap": gap,
                        "rewards": rewards[name].tolist(),
                    }
                    runs[name].append(figures)
                    print_row(figures)
                save(runs, args)
        except KeyboardInterrupt:
            print("interrupted")
    if args.compare and runs["plain"]:
        print(json.dumps(compare(runs, args.seed), indent=1))
    print(f"what is finished is in {args.out}")


if __name__ == "__main__":
    main()
