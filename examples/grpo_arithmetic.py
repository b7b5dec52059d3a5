"""GRPO on a CPU, in one file: SmolLM2-135M learns to work out a sum in the form of one example.

    pip install 'vllm-selfspec[ray]'
    python examples/grpo_arithmetic.py --compare

Ray workers roll out with self-speculative decoding, a plain PyTorch loop computes the GRPO loss (group-normalised
advantages, clipped ratio to the log probabilities that came with the samples) and takes one AdamW step, and the new
weights go back to every worker through vLLM's start / update / finish protocol. The reward is a rule: half for the form
"8+6=14, so it is 14.", a quarter for each of its two numbers that is right.

`--compare` trains a second policy with the same seeds and data whose workers decode plainly. The two take turns step by
step, so a machine whose speed drifts treats them alike. Two sign-flip tests ask whether their rewards differ:

* first step: both policies still have the same weights, so the signs of the differences between their samples are
  arbitrary and flipping them is an exact test;
* all steps: signs are flipped per (step, prompt). The two policies drift apart by chance from step 1 on, which this
  test does not know about: a small p value here alone is no proof of a difference.

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

SPECULATIVE = '{"method": "selfspec", "num_speculative_tokens": 3, "control": {"mode": "fixed"}}'
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


class Policy:
    """One training run: a pool of workers, the weights that are trained, and what was measured."""

    def __init__(self, name: str, pool: RolloutPool, checkpoint: Path, args: argparse.Namespace) -> None:
        self.name, self.pool, self.args = name, pool, args
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self.model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=args.lr, weight_decay=0.0)
        self.writer = SampleWriter(args.out / f"samples-{name}.jsonl")
        self.steps: list[dict[str, Any]] = []

    def step(self, index: int) -> None:
        """Roll out, train, send the weights; print and keep the figures of it."""
        args = self.args
        sums = problems(index, args.prompts, args.seed)
        prompts = [self.tokenizer.encode(f"4+3: 4+3=7, so it is 7.\n{a}+{b}:") for a, b in sums]
        # A stop token, not a stop string: a draft brings several tokens at once, and those after a string would stay.
        stop = self.tokenizer.encode("\n")
        sampling = {"temperature": 1.0, "max_tokens": args.max_tokens, "stop_token_ids": stop, "logprobs": 0}
        stream = self.pool.generate(prompts, args.n, sampling)
        samples: list[Sample] = []
        for sample in stream:
            self.writer.write(sample)
            samples.append(sample)
        report = stream.report
        samples.sort(key=lambda sample: (sample.prompt_index, sample.sample_index))
        rewards = np.array([reward(sample.text or "", *sums[sample.prompt_index]) for sample in samples])
        rewards = rewards.reshape(args.prompts, args.n)

        began = time.perf_counter()
        gap = self.train([prompts[sample.prompt_index] for sample in samples], samples, advantages(rewards).flatten())
        train_seconds = time.perf_counter() - began
        began = time.perf_counter()
        # `named_parameters` lists the tied LM head once, as the embedding.
        self.pool.set_weights(dict(self.model.named_parameters()), version=index + 1)
        acceptance, draft_length = speculation(report)
        self.steps.append(
            {
                "step": index,
                "policy": self.name,
                "weights": samples[0].weight_version,
                "reward": float(rewards.mean()),
                "right": float((rewards == 1.0).mean()),
                "rollout_s": report.makespan_s,
                "tokens": report.generated_tokens,
                "draft_length": draft_length,
                "acceptance": acceptance,
                "train_s": train_seconds,
                "update_s": time.perf_counter() - began,
                "logprob_gap": gap,
                "rewards": rewards.tolist(),
            }
        )
        print_row(self.steps[-1])

    def train(self, prompts: list[list[int]], samples: list[Sample], advantage: np.ndarray) -> float:
        """One optimizer step of GRPO on all samples.

        Returns:
            Mean |trainer's - worker's| log probability per token before the step. It stays at rounding noise only if
            the workers sample from the very weights that are trained here.
        """
        gaps: list[torch.Tensor] = []
        for first in range(0, len(samples), MICRO_BATCH):
            batch = slice(first, first + MICRO_BATCH)
            answers = [sample.token_ids for sample in samples[batch]]
            log_probs = log_probabilities(self.model, prompts[batch], answers)
            loss = torch.zeros(())
            for new, sample, a in zip(log_probs, samples[batch], advantage[batch], strict=True):
                old = torch.tensor(sample.logprobs)
                ratio = (new - old).exp()
                loss = loss - torch.minimum(ratio * a, ratio.clamp(1 - CLIP, 1 + CLIP) * a).mean() / len(samples)
                gaps.append((new.detach() - old).abs())
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
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
    if figures["step"] == 0 and figures["policy"] == "selfspec":
        print("  ".join(f"{name:>8}" for name in cells))
    texts = (f"{value:.3f}" if isinstance(value, float) else str(value) for value in cells.values())
    print("  ".join(text.rjust(max(8, len(name))) for name, text in zip(cells, texts, strict=True)), flush=True)


def sign_flip_p(differences: np.ndarray, seed: int) -> float:
    """Two-sided p value of paired differences whose signs are arbitrary if both sides are alike (20,000 flips)."""
    flips = np.random.default_rng(seed).choice([-1.0, 1.0], (20_000, differences.size))
    as_large = np.abs(flips @ differences) >= abs(differences.sum()) - 1e-9
    return float((1 + as_large.sum()) / (1 + len(flips)))


def compare(policies: list[Policy], seed: int) -> dict[str, Any]:
    """Whether two runs' rewards agree; the module's docstring says what each test assumes."""
    count = min(len(policy.steps) for policy in policies)
    steps = [policy.steps[:count] for policy in policies]
    first, second = (np.array([step["rewards"] for step in run]) for run in steps)  # [steps, prompts, n] each
    seconds = np.array([[step["rollout_s"] for step in run] for run in steps])
    names = [policy.name for policy in policies]
    return {
        "steps": count,
        "samples_each": first.size,
        "mean_reward": dict(zip(names, (float(first.mean()), float(second.mean())), strict=True)),
        "p_first_step": sign_flip_p((first[0] - second[0]).ravel(), seed),
        "p_all_steps": sign_flip_p((first - second).mean(2).ravel(), seed),
        "rollout_s": dict(zip(names, seconds.sum(1).tolist(), strict=True)),
        "rollout_speedup_median": float(np.median(seconds[1] / seconds[0])),
    }


def save(policies: list[Policy], args: argparse.Namespace) -> None:
    """Write the figures, and draw them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    data: dict[str, Any] = {"arguments": {**vars(args), "out": str(args.out)}}
    data["runs"] = {policy.name: policy.steps for policy in policies}
    if len(policies) == 2 and all(policy.steps for policy in policies):
        data["comparison"] = compare(policies, args.seed)
    (args.out / "grpo.json").write_text(json.dumps(data, indent=1) + "\n")

    figure, panels = pyplot.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for policy, color in zip(policies, ("#1f77b4", "#7f7f7f"), strict=False):
        for panel, key in zip(panels, ("reward", "rollout_s", "acceptance"), strict=True):
            points = [(step["step"], step[key]) for step in policy.steps if step[key] is not None]
            if points:
                panel.plot(*zip(*points, strict=True), "o-", color=color, label=policy.name)
    for panel, title in zip(panels, ("mean reward", "rollout (s)", "accepted per drafted token"), strict=True):
        panel.set(title=title, xlabel="step")
        panel.set_ylim(0, 1.02 if "(s)" not in title else None)
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
    parser.add_argument("--compare", action="store_true", help="train a second policy without selfspec beside it")
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
    policies: list[Policy] = []
    with contextlib.ExitStack() as stack:
        for name, config in modes.items():
            print(f"starting {args.workers} {name} workers", flush=True)
            pool = RolloutPool(
                checkpoint,
                args.workers,
                engine_args=engine,
                speculative_config=config,
                # The argument alone says whether to speculate. On a CPU the cache of each worker is 1 GiB.
                env={"KMP_BLOCKTIME": "1", "VLLM_SELFSPEC": "0", "VLLM_CPU_KVCACHE_SPACE": "1"},
            )
            policies.append(Policy(name, stack.enter_context(pool), checkpoint, args))
        try:
            for index in range(args.steps):
                for policy in policies:
                    policy.step(index)
                save(policies, args)
        except KeyboardInterrupt:
            print(f"interrupted: what is finished is in {args.out}")
    if len(policies) == 2 and all(policy.steps for policy in policies):
        result = compare(policies, args.seed)
        verdict = "agree" if min(result["p_first_step"], result["p_all_steps"]) >= 0.01 else "differ"
        print(
            json.dumps(result, indent=1) + f"\nThe rewards with and without selfspec {verdict} (p < 0.01 would differ)."
        )
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
