"""TRL's own GRPOTrainer with selfspec, and not a line of TRL changed: the environment variable alone turns it on.

    pip install vllm-selfspec trl datasets accelerate
    eval "$(python -m vllm_selfspec.engine_env)"    # on a CPU: the libraries and the threads that vLLM wants
    python examples/trl_grpo.py

TRL's colocated mode builds the engine in the trainer's process with fixed arguments, none of them speculative, and
after each optimizer step hands every parameter to the model's `load_weights`. On GPUs this needs `VLLM_SELFSPEC` and
nothing else. TRL does not know CPU engines, so on a CPU `cpu_shims` below does four things in the open. TRL 1.16 warns
that it has not been tried with vLLM after 0.31; selfspec supports 0.29 to 0.33.
"""

import argparse
import functools
import os
import re

# Read by vLLM when it is imported, and by selfspec when TRL builds the engine.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # TRL wants the model in its own process
os.environ.setdefault(
    "VLLM_SELFSPEC",
    '{"num_speculative_tokens": 3, "drafter": {"weights": "int8", "lm_head": "int8"}, "control": {"mode": "fixed"}}',
)

from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import GRPOConfig, GRPOTrainer
from trl.generation import vllm_generation
from vllm import LLM

from vllm_selfspec.engine_env import is_cpu_platform
from vllm_selfspec.models import DEFAULT_MODEL, resolve_model


def cpu_shims() -> dict[str, bool]:
    """What TRL on a CPU engine needs. Returns arguments for GRPOConfig."""
    from vllm import _custom_ops
    from vllm.model_executor.layers import utils

    # 1. vLLM packs weights for its CPU kernels and drops the originals, so `load_weights` would have nothing to write
    #    to. Without these kernels the weights stay where they are (and the target runs on PyTorch's own, slower ones).
    _custom_ops._supports_onednn = False
    utils.check_cpu_sgl_kernel = lambda *_: False
    # 2. TRL does not pass `enforce_eager`; compiling for a CPU takes minutes. Nor does it pass a dtype, and in bfloat16
    #    the engine would round small optimizer steps away. The counters are for the lines printed below.
    vllm_generation.LLM = functools.partial(LLM, enforce_eager=True, dtype="float32", disable_log_stats=False)
    # 3. A CPU engine takes its cache from what this says, not from a share of a GPU's memory (GiB).
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    # 4. The trainer looks for an accelerator unless it is told not to, and bfloat16 is its default.
    return {"use_cpu": True, "bf16": False}


def reward(completions: list[str], a: list[int], b: list[int], **_: object) -> list[float]:
    """Half for the form "8+6=14, so it is 14.", a quarter for each of its two numbers that is right."""
    rewards = []
    for answer, x, y in zip(completions, a, b, strict=True):
        found = re.fullmatch(rf"{x}\+{y}=(\d+), so it is (\d+)\.", answer.strip())
        rewards.append(0.5 + 0.25 * sum(int(number) == x + y for number in found.groups()) if found else 0.0)
    return rewards


def sums() -> Dataset:
    """All sums of two one-digit numbers, each after an example of the form."""
    numbers = range(1, 10)
    rows = [{"prompt": f"4+3: 4+3=7, so it is 7.\n{a}+{b}:", "a": a, "b": b} for a in numbers for b in numbers]
    return Dataset.from_list(rows)


class Acceptance(TrainerCallback):
    """Prints each step's reward, and how well the policy drafted for itself in it."""

    def __init__(self) -> None:
        self.llm: LLM | None = None
        self.before = (0, 0)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: object,
    ) -> None:
        """Called by TRL after each step (`logging_steps=1`)."""
        if self.llm is None or logs is None or "reward" not in logs:
            return
        counters = {metric.name: getattr(metric, "value", 0) for metric in self.llm.get_metrics()}
        names = ("vllm:spec_decode_num_draft_tokens", "vllm:spec_decode_num_accepted_tokens")
        now = (int(counters[names[0]]), int(counters[names[1]]))
        drafted, accepted = now[0] - self.before[0], now[1] - self.before[1]
        self.before = now
        print(
            f"step {state.global_step}: reward {logs['reward']:.3f}, {accepted} of {drafted} drafted tokens accepted "
            f"({accepted / max(drafted, 1):.2f}), trainer and engine differ by "
            f"{logs['sampling/sampling_logp_difference/mean']:.4f} in log probability per token",
            flush=True,
        )


def main() -> None:
    """A few steps of GRPO on one-digit sums."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=DEFAULT_MODEL, help="checkpoint folder or hub id")
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()

    model = resolve_model(args.model, print)
    config = GRPOConfig(
        output_dir="runs/trl",
        max_steps=args.steps,
        learning_rate=2e-5,
        lr_scheduler_type="constant",
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        num_generations=8,
        max_completion_length=20,
        generation_kwargs={"stop_token_ids": AutoTokenizer.from_pretrained(model).encode("\n")},
        use_vllm=True,
        vllm_mode="colocate",
        vllm_max_model_length=256,
        vllm_gpu_memory_utilization=0.3,
        model_init_kwargs={"dtype": "float32"},
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        **(cpu_shims() if is_cpu_platform() else {}),
    )
    callback = Acceptance()
    trainer = GRPOTrainer(model, reward, config, train_dataset=sums(), callbacks=[callback])
    callback.llm = trainer.vllm_generation.llm
    trainer.train()


if __name__ == "__main__":
    main()
