"""Everything to be measured on one CUDA machine, in one command: correctness, component times, rollouts.

    python benchmarks/gpu/run_all.py --out results                        # all stages, all shapes
    python benchmarks/gpu/run_all.py --device cpu --tiny --out /tmp/dry   # the same code on a tiny model, in minutes
    python benchmarks/gpu/run_all.py pack SITE PIECES                     # for a machine without vLLM, see docs/gpu.md

Stages:
    products     quantized products of random weights of real shapes against dense ones: error, time, refresh
    correctness  greedy float32 decoding against plain decoding; acceptance of drafts in bfloat16, as engines serve
    sweep        T_T, T_D and T_V over batch, context and draft length, dummy weights of real shapes, as a CSV that
                 `vllm-selfspec calibrate --from-sweep` reads
    rollout      makespan of long-tailed rollouts with synthetic acceptance: plain, fixed draft lengths, adaptive
    tests        the project's engine tests on this device

Every engine runs in a process of its own. Results are written as they come (`results.json`, `sweep_*.csv`), so a run
that is cut short keeps what it has; what the engines say is in `jobs.log`. The last line on stdout is JSON.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_selfspec.control.policy import StepObservation

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("products", "correctness", "sweep", "rollout", "tests")
COLUMNS = ("model", "batch", "seq", "gamma", "mode", "mean_ms", "median_ms", "std_ms", "min_ms", "max_ms", "n_samples")
ENGINE_TESTS = ("test_following_weights", "test_families", "test_lossless_stress", "test_distribution", "test_kv_slots")
PIECE_MIB = 56
ROWS = (1, 4, 16, 64, 128)
"""Rows of the products that are tried."""
LARGEST_ERROR = {"int4": 0.13, "int8": 0.015, "fp8": 0.04}
"""Of a product with normal weights, relative: what its precision costs, and bfloat16's rounding."""
LEAST_ACCEPTED = {"native": 0.97, "int4": 0.5, "int8": 0.9, "fp8": 0.8}
"""Of drafts for `SMALL` at temperature 1. Wrong products or graphs leave the text right and accept next to nothing.

With stand-ins for the kernels, on a CPU, it is 1.0, 0.69, 0.98 and 0.91.
"""
REPETITIONS = 3
MODES = {"target": "target_decode", "draft": "drafter_decode", "verify": "target_verify"}
PLUGINS = "vllm.general_plugins"

_LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-5, "hidden_act": "silu"}
_QWEN = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "rms_norm_eps": 1e-6, "hidden_act": "silu"}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-7b": _QWEN
    | {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
    },
    "llama-3.1-8b": _LLAMA
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
    },
    "qwen2.5-14b": _QWEN
    | {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "vocab_size": 152064,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
    },
    "qwen3-30b-a3b": {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "rms_norm_eps": 1e-6}
    | {
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "head_dim": 128,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
    },
    "tiny": _LLAMA
    | {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
    },
}

DENSE = ["qwen2.5-7b", "llama-3.1-8b", "qwen2.5-14b"]
EXPERTS = {"cuda": (32, 8, 2048, 768), "cpu": (4, 2, 128, 64)}
"""Of the mixture whose products are tried: experts, those of a row, hidden size and their own width."""

SMALL: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 6, "vocab_size": 2048} | {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
"""Shape of the random weights that stand in for a checkpoint: every kernel takes it."""
SMALL_MIXTURE: dict[str, Any] = SMALL | {"moe_intermediate_size": 256, "num_experts": 16, "num_experts_per_tok": 4}

LEFT_OUT = (
    "vllm/vllm-rs",
    "vllm/vllm_flash_attn/_vllm_fa2_C.",
    "vllm/third_party/deep_gemm/",
    "vllm/third_party/fmha_sm100/",
    "vllm/_deepselect_C.",
    "vllm/_flashkda_C.",
    "vllm/_flashmla_C.",
    "vllm/_flashmla_extension_C.",
    "vllm/_qutlass_C.",
)
"""Parts of vLLM's wheel that a dense model on a Hopper GPU does without: more than half of its size."""


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--stages", type=_names(STAGES), default=list(STAGES), help=f"of {', '.join(STAGES)}")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and a small grid, to try the script")
    shapes = [name for name in SHAPES if name != "tiny"]
    parser.add_argument("--models", type=_names(shapes), default=DENSE, help=f"of {', '.join(shapes)}")
    parser.add_argument("--batches", type=_numbers, default=[1, 2, 4, 8, 16, 32, 64, 128])
    parser.add_argument("--seqs", type=_numbers, default=[256, 1024, 2048, 4096, 8192])
    parser.add_argument("--gammas", type=_numbers, default=[1, 3, 5, 7, 11, 15])
    parser.add_argument("--weights", default=None, help="drafter.weights, the platform's default when left out")
    parser.add_argument("--lm-head", default=None, help="drafter.lm_head, the platform's default when left out")
    parser.add_argument("--acceptance", type=_rates, default=[0.93, 0.98], help="synthetic, per drafted token")
    parser.add_argument("--requests", type=int, default=128, help="requests of a rollout")
    parser.add_argument("--longest", type=int, default=8192, help="most tokens of a rollout's answer")
    parser.add_argument("--rounds", type=int, default=2, help="rollouts per engine")
    parser.add_argument("--checkpoint", help="small weights for the stage correctness, random ones when left out")
    parser.add_argument("--runner", choices=("v1", "v2"), default="v2", help="vLLM's model runner")
    parser.add_argument("--minutes", type=float, default=60, help="engines still at work after this long are ended")
    parser.add_argument("--site", type=Path, help="folder of vLLM and its requirements, made by `pack`, unpacked here")
    options = parser.parse_args(argv)
    if options.tiny:
        options.models, options.batches, options.seqs, options.gammas = ["tiny"], [1, 2], [32, 64], [1, 3]
        options.requests, options.longest, options.rounds = 4, 48, 1
        options.acceptance = options.acceptance[:1]
    if options.device == "cpu" and not options.tiny:
        parser.error("--device cpu is for trying the script: add --tiny")
    return options


def _names(known: Sequence[str]) -> Any:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
        return names

    return parse


def _numbers(text: str) -> list[int]:
    numbers = sorted({int(part) for part in text.split(",")})
    if not numbers or numbers[0] < 1:
        raise argparse.ArgumentTypeError("give whole numbers from 1 up, like 1,4,16")
    return numbers


def _rates(text: str) -> list[float]:
    rates = [float(part) for part in text.split(",")]
    if not all(0 < rate <= 1 for rate in rates):
        raise argparse.ArgumentTypeError("give rates above 0 and up to 1, like 0.93,0.98")
    return rates


def write_shape(name: str, folder: Path) -> Path:
    """A checkpoint folder with a config and no weights, for vLLM's `load_format: dummy`."""
    path = folder / name
    path.mkdir(parents=True, exist_ok=True)
    config = SHAPES[name] | {"torch_dtype": "bfloat16", "tie_word_embeddings": False, "bos_token_id": 0}
    (path / "config.json").write_text(json.dumps(config | {"eos_token_id": 0}, indent=2))
    return path


def write_metadata(folder: Path) -> Path:
    """Metadata by which vLLM finds the plugin in every process although only its source is on the path."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    info = folder / "vllm_selfspec-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    plugins = project["entry-points"][PLUGINS]
    info.joinpath("METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0\n")
    info.joinpath("entry_points.txt").write_text(
        "\n".join([f"[{PLUGINS}]", *(f"{name} = {target}" for name, target in plugins.items())]) + "\n"
    )
    return folder


def parameter_bytes(shape: dict[str, Any], bytes_per_weight: float = 2) -> float:
    """Bytes of the linear layers and the LM head, all experts of a mixture among them: a dense model reads them all."""
    hidden, heads, kv_heads = shape["hidden_size"], shape["num_attention_heads"], shape["num_key_value_heads"]
    attention = hidden * shape.get("head_dim", hidden // heads) * (2 * heads + 2 * kv_heads)
    experts, inner = shape.get("num_experts", 1), shape.get("moe_intermediate_size", shape["intermediate_size"])
    router = hidden * experts if experts > 1 else 0
    layer = attention + router + 3 * experts * hidden * inner
    return bytes_per_weight * (shape["num_hidden_layers"] * layer + hidden * shape["vocab_size"])


def answer_lengths(count: int, longest: int, seed: int = 0) -> list[int]:
    """Long-tailed answer lengths: log-normal with a median at an eighth of `longest`, cut there."""
    dice = random.Random(seed)
    return [max(1, min(longest, round(dice.lognormvariate(math.log(longest / 8), 1.0)))) for _ in range(count)]


def summarize(seconds: Sequence[float]) -> dict[str, float]:
    """The time columns of one row of the sweep."""
    milliseconds = [1e3 * value for value in seconds]
    return {
        "mean_ms": statistics.fmean(milliseconds),
        "median_ms": statistics.median(milliseconds),
        "std_ms": statistics.pstdev(milliseconds),
        "min_ms": min(milliseconds),
        "max_ms": max(milliseconds),
        "n_samples": len(milliseconds),
    }


def sweep_rows(model: str, batch: int, steps: Sequence[StepObservation]) -> list[dict[str, Any]]:
    """Rows of the sweep from the steps of one batch and context length that decoded the whole batch, in order."""
    from vllm_selfspec.live_profile import components_of

    seconds = components_of(steps)
    if ("target", 0) not in seconds:
        return []
    place = {"model": model, "batch": batch, "seq": round(statistics.fmean(step.mean_context for step in steps))}
    return [
        place | {"gamma": gamma, "mode": MODES[component]} | summarize([max(0.0, value) for value in values])
        for (component, gamma), values in sorted(seconds.items())
    ]


def first_difference(plain: dict[str, Any], other: dict[str, Any]) -> dict[str, Any] | None:
    """Where two greedy outputs part, and how near the plain engine's two best tokens were there.

    Args:
        plain: `tokens`, and `gaps`: difference of the two best log-probabilities at each of them.
        other: `tokens`.
    """
    for place, (one, two) in enumerate(zip(plain["tokens"], other["tokens"], strict=False)):
        if one != two:
            return {"place": place, "plain": one, "other": two, "gap": plain["gaps"][place]}
    return None


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """The sweep so far, whole, in place of what was there."""
    from vllm_selfspec.errors import write_whole

    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, COLUMNS)
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, file.getvalue())


class Run:
    """One run of the script: its options, its results so far, and its engines."""

    def __init__(self, options: argparse.Namespace) -> None:
        sys.path.insert(0, str(ROOT))
        if options.site is not None:
            options.site = options.site.resolve()
            sys.path.insert(1, str(options.site))
        from vllm_selfspec.provenance import provenance

        self.options = options
        self.deadline = time.monotonic() + 60 * options.minutes
        options.out.mkdir(parents=True, exist_ok=True)
        self.scratch = Path(tempfile.mkdtemp(prefix="selfspec-gpu-"))
        self.results: dict[str, Any] = {
            "provenance": provenance() | {"command": " ".join(sys.argv)},
            "options": {name: str(value) for name, value in vars(options).items()},
            "jobs": [],
        }

    def save(self) -> None:
        from vllm_selfspec.errors import write_whole

        write_whole(self.options.out / "results.json", json.dumps(self.results, indent=1))

    def job(self, kind: str, **arguments: Any) -> dict[str, Any]:
        """Run one engine in a process of its own; what it answered is recorded, and why there is no more."""
        name = " ".join([kind, *(f"{key}={value}" for key, value in arguments.items())])
        left = self.deadline - time.monotonic()
        if left <= 0:
            result: dict[str, Any] = {"error": "not run: --minutes are over"}
        else:
            print(f"[{time.strftime('%H:%M:%S')}] {name[:160]}", file=sys.stderr, flush=True)
            answer = self.scratch / f"{len(self.results['jobs'])}.json"
            request = {"kind": kind, "answer": str(answer), "options": self._plain_options(), **arguments}
            start = time.monotonic()
            error, said = self._run(request, name, left)
            result = {"took_seconds": time.monotonic() - start}
            if answer.exists():
                result |= json.loads(answer.read_text())
            if error is not None:
                result |= {"error": error, "log": said[-3000:]}
        self.results["jobs"].append({"kind": kind, "name": name, **result})
        self.save()
        if "error" in result:
            print(f"    {result['error']}", file=sys.stderr, flush=True)
        return result

    def _run(self, request: dict[str, Any], name: str, seconds: float) -> tuple[str | None, str]:
        """The job in a process of its own, ended after so long: what went wrong, if something did, and its output."""
        with (self.options.out / "jobs.log").open("a+b") as log:
            log.write(f"\n===== {name}\n".encode())
            log.flush()
            begin = log.tell()
            process = subprocess.Popen(
                [sys.executable, "-P", str(Path(__file__).resolve()), "job", json.dumps(request)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment(),
                start_new_session=True,
            )
            try:
                code = process.wait(seconds)
                error = None if code == 0 else f"exit code {code}"
            except subprocess.TimeoutExpired:
                error = "ended: --minutes are over"
            with suppress(ProcessLookupError):  # also what it has started
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            log.seek(begin)
            return error, log.read().decode(errors="replace")

    def _plain_options(self) -> dict[str, Any]:
        return {name: str(value) if isinstance(value, Path) else value for name, value in vars(self.options).items()}

    def _environment(self) -> dict[str, str]:
        environment = dict(os.environ)
        paths = [str(ROOT), environment.get("PYTHONPATH", "")]
        if not entry_points(group=PLUGINS, name="selfspec"):  # the source is here, but it was never installed
            paths.append(str(write_metadata(self.scratch / "metadata")))
        if self.options.site is not None:
            paths.insert(0, str(self.options.site))
            environment["VLLM_USE_FLASHINFER_SAMPLER"] = "0"  # FlashInfer does not travel
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the sweep dictates draft lengths to the scheduler
        environment["HF_HUB_OFFLINE"] = "1"
        environment["PYTHONUNBUFFERED"] = "1"
        environment["TRITON_F32_DEFAULT"] = "ieee"  # float32 attention by Triton would be TF32, exact to three digits
        if self.options.device == "cuda":
            environment["VLLM_USE_V2_MODEL_RUNNER"] = "1" if self.options.runner == "v2" else "0"
            return environment
        from vllm_selfspec.engine_env import engine_environment

        return environment | engine_environment(environment) | {"VLLM_CPU_KVCACHE_SPACE": "1"}

    def products(self) -> None:
        self.job("products", shape=self.options.models[0])

    def correctness(self) -> None:
        model = self.options.checkpoint
        if model is None:
            sys.path.insert(0, str(ROOT / "tests" / "engine"))
            from tiny_models import write_checkpoint

            model = str(write_checkpoint(self.scratch / "small", "llama", **SMALL))
        for weights in LEAST_ACCEPTED:
            self.job("drafts", model=model, drafter={"weights": weights, "lm_head": weights})
        if self.options.checkpoint is None:
            mixture = str(write_checkpoint(self.scratch / "mixture", "qwen3_moe", **SMALL_MIXTURE))
            for weights in LEAST_ACCEPTED:
                self.job("drafts", model=mixture, drafter=dict.fromkeys(("weights", "lm_head", "experts"), weights))
        plain = self.job("greedy", model=model, drafter=None)
        for weights in LEAST_ACCEPTED:
            drafter = {"weights": weights, "lm_head": "native"} | ({"skip_layers": [1]} if weights == "native" else {})
            other = self.job("greedy", model=model, drafter=drafter)
            if "outputs" not in plain or "outputs" not in other:
                continue
            pairs = zip(plain["outputs"], other["outputs"], strict=True)
            differences = [first_difference(one, two) for one, two in pairs]
            found = [difference for difference in differences if difference is not None]
            # On a GPU another batch shape rounds differently, so near-ties may fall either way.
            unexplained = [difference for difference in found if difference["gap"] > 1e-3]
            verdict = {"drafter": drafter, "compared": len(differences), "differ": found, "unexplained": unexplained}
            self.results.setdefault("greedy", []).append(verdict)
            self.save()

    def tests(self) -> None:
        for name in ENGINE_TESTS[-1:] if self.options.tiny else ENGINE_TESTS:
            self.job("tests", name=name)

    def sweep(self) -> None:
        for model in self.options.models:
            rows: list[dict[str, Any]] = []
            for gamma in self.options.gammas:
                rows += self.job("sweep", shape=model, gamma=gamma).get("rows", [])
                write_csv(self.options.out / f"sweep_{model}.csv", rows)

    def rollout(self) -> None:
        shape = self.options.models[0]
        plain = self.job("rollout", shape=shape, selfspec=None, acceptance=None)
        for acceptance in self.options.acceptance:
            for control in ({"mode": "adaptive"}, *({"mode": "fixed", "gamma": g} for g in self.options.gammas)):
                gamma = control.pop("gamma", max(self.options.gammas))
                selfspec = {"num_speculative_tokens": gamma, "control": control}
                result = self.job("rollout", shape=shape, selfspec=selfspec, acceptance=acceptance)
                if "median_seconds" in plain and "median_seconds" in result:
                    ratio = plain["median_seconds"] / result["median_seconds"]
                    entry = {"acceptance": acceptance, "gamma": gamma, "control": control, "speedup": ratio}
                    self.results.setdefault("rollout", []).append(entry)
                    self.save()


# What follows runs in the engine's process.


def build_engine(options: dict[str, Any], model: str, selfspec: dict[str, Any] | None, **arguments: Any) -> Any:
    """An in-process `LLM`, with the drafter that the options name."""
    from vllm import LLM

    defaults: dict[str, Any] = {"skip_tokenizer_init": True, "generation_config": "vllm", "disable_log_stats": False}
    if options["device"] == "cpu":
        defaults |= {"block_size": 32, "enforce_eager": True}
    if selfspec is not None:
        drafter = {"weights": options["weights"], "lm_head": options["lm_head"]} | selfspec.get("drafter", {})
        defaults["speculative_config"] = {"method": "selfspec"} | selfspec | {"drafter": drafter}
    return LLM(model, **(defaults | arguments))


def use_synthetic_acceptance(rate: float) -> None:
    """From here on engines accept each drafted token with probability `rate`, whatever the model says."""
    from vllm_selfspec import speculative_config

    build = speculative_config.build

    def synthetic(*args: Any, **kwargs: Any) -> Any:
        config = build(*args, **kwargs)
        config.rejection_sample_method = "synthetic"
        config.synthetic_acceptance_rates = [rate ** (place + 1) for place in range(config.num_speculative_tokens)]
        return config

    speculative_config.build = synthetic


def keep(request: dict[str, Any], answer: dict[str, Any]) -> None:
    """What a job has so far, for when it is ended."""
    from vllm_selfspec.errors import write_whole

    write_whole(Path(request["answer"]), json.dumps(answer))


def shape_folder(name: str) -> str:
    """Where a shape's config lies: always in the same place, which is part of the key of vLLM's compiled graphs."""
    return str(write_shape(name, Path(tempfile.gettempdir()) / "selfspec-gpu-shapes"))


def products_job(request: dict[str, Any]) -> dict[str, Any]:
    """Every precision's product and refresh for every linear layer of a shape, and for experts; random weights."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.fused_moe import fused_experts

    from vllm_selfspec.drafter.quantize import experts_precisions, quantize, quantize_experts, usable_precisions

    options, config = request["options"], SHAPES[request["shape"]]
    device = options["device"]
    # Nothing is asked of this engine: vLLM's parameters want the process groups that one makes.
    blocks = {"num_gpu_blocks_override": 16, "max_model_len": 256}
    engine = build_engine(options, shape_folder("tiny"), None, load_format="dummy", enforce_eager=True, **blocks)
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)

    def relative_error(result: torch.Tensor, dense: torch.Tensor) -> float:
        return float((result.float() - dense.float()).norm() / dense.float().norm())

    entries: list[dict[str, Any]] = []
    wrong: list[str] = []

    def compare(
        layer: str, x: Any, weights: list[Any], others: list[Any], dense: Any, quantized: Any, usable: list[str]
    ) -> None:
        """`dense(rows, *weights)` and the same of `quantized(*weights, precision)`; `others` come with a refresh."""
        times = {rows: milliseconds(partial(dense, x[:rows], *weights), device) for rows in ROWS}
        size = sum(weight.nbytes for weight in weights)
        entries.append({"layer": layer, "precision": "native", "bytes": size, "ms": times})
        for precision in LARGEST_ERROR:
            if precision not in usable:
                continue
            try:
                state, product = quantized(*weights, precision)
                errors = [relative_error(product(x[:rows]), dense(x[:rows], *weights)) for rows in ROWS]
                times = {rows: milliseconds(partial(product, x[:rows]), device) for rows in ROWS}
                refresh = milliseconds(partial(state.refresh, *others), device)
                errors.append(relative_error(product(x), dense(x, *others)))
            except Exception as error:  # the other kernels' results are worth having
                wrong.append(f"{precision} {layer}: {error!r}")
                continue
            entry = {"layer": layer, "precision": precision, "bytes": state.nbytes, "ms": times}
            entries.append(entry | {"refresh_ms": refresh, "largest_error": max(errors)})
            # One may be no number; through an expert's two products errors add up.
            if not all(error < (2 if len(weights) > 1 else 1) * LARGEST_ERROR[precision] for error in errors):
                wrong.append(f"{precision} {layer}: errors {errors}")
            keep(request, {"products": entries, "wrong": wrong})

    def linear(weight: Any, precision: Any) -> Any:
        state = quantize(weight, precision)
        return state, lambda x: state.apply(x, None)

    experts, each, hidden, width = EXPERTS[device]
    ids = torch.rand(max(ROWS), experts, generator=generator, device=device).argsort(dim=1)[:, :each].int()
    chosen = torch.full(ids.shape, 1 / each, device=device)

    def mixture(up: Any, down: Any, precision: Any) -> Any:
        state = quantize_experts(up, down, precision)
        return state, lambda x: state.apply(x, chosen[: len(x)], ids[: len(x)], None)

    def dense_mixture(x: Any, up: Any, down: Any) -> Any:
        if device == "cuda":
            return fused_experts(x, up, down, chosen[: len(x)], ids[: len(x)])
        gates, values = torch.einsum("th,tknh->tkn", x, up[ids[: len(x)].long()]).chunk(2, dim=-1)
        inner = torch.nn.functional.silu(gates) * values
        return torch.einsum("tkn,tkhn->th", inner, down[ids[: len(x)].long()]) / each

    with torch.inference_mode(), set_current_vllm_config(engine.llm_engine.vllm_config):
        for layer, (outputs, inputs) in linear_layers(config).items():
            weights = [[normal(outputs, inputs)] for _ in range(2)]
            x = normal(max(ROWS), inputs)
            compare(layer, x, *weights, torch.nn.functional.linear, linear, usable_precisions(device))
        shapes = ((experts, 2 * width, hidden), (experts, hidden, width))
        weights = [[normal(*shape) * shape[-1] ** -0.5 for shape in shapes] for _ in range(2)]
        x = normal(max(ROWS), hidden)
        compare("experts", x, *weights, dense_mixture, mixture, experts_precisions(device))
    engine.llm_engine.engine_core.shutdown()
    return {"products": entries, "wrong": wrong}


def linear_layers(shape: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of a layer's matrices as vLLM merges them, experts aside, and of the LM head."""
    hidden, heads, kv_heads = shape["hidden_size"], shape["num_attention_heads"], shape["num_key_value_heads"]
    head_dim, inner = shape.get("head_dim", hidden // heads), shape["intermediate_size"]
    layers = {
        "qkv": ((heads + 2 * kv_heads) * head_dim, hidden),
        "o": (hidden, heads * head_dim),
        "gate_up": (2 * inner, hidden),
        "down": (hidden, inner),
        "lm_head": (shape["vocab_size"], hidden),
    }
    return layers if "num_experts" not in shape else {name: layers[name] for name in ("qkv", "o", "lm_head")}


def milliseconds(function: Callable[[], object], device: str) -> float:
    """Median time of a call, on a GPU the device's own and with an empty L2 cache."""
    if device == "cuda":
        from triton.testing import do_bench

        return float(do_bench(function, warmup=5, rep=20, return_mode="median"))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds)


def drafts_job(request: dict[str, Any]) -> dict[str, Any]:
    """How many drafts are accepted in bfloat16, with graphs and the attention that an engine has by default."""
    from vllm import SamplingParams

    from vllm_selfspec.config import ConfigError

    weights = request["drafter"]["weights"]
    selfspec = {"num_speculative_tokens": 4, "control": {"mode": "fixed"}, "drafter": request["drafter"]}
    try:
        engine = build_engine(
            request["options"], request["model"], selfspec, dtype="bfloat16", max_model_len=512, max_num_seqs=16
        )
    except ConfigError as error:
        return {"refused": str(error)}
    tokens = 32 if request["options"]["tiny"] else 128
    result: dict[str, Any] = {"wrong": []}
    before = Counter[str]()
    for temperature in (0.0, 1.0):
        params = SamplingParams(temperature=temperature, max_tokens=tokens, ignore_eos=True, detokenize=False)
        engine.generate(random_prompts(engine), params, use_tqdm=False)
        counts = Counter({metric.name: metric.value for metric in engine.get_metrics() if hasattr(metric, "value")})
        drafted, accepted = (
            counts[name] - before[name]
            for name in ("vllm:spec_decode_num_draft_tokens", "vllm:spec_decode_num_accepted_tokens")
        )
        before = counts
        result[f"temperature {temperature:g}"] = {"drafted": drafted, "accepted": accepted / drafted}
        if temperature and accepted / drafted < LEAST_ACCEPTED[weights]:
            result["wrong"].append(f"{accepted / drafted:.3f} of the {weights} drafts accepted")
    return result


def random_prompts(engine: Any) -> list[dict[str, Any]]:
    """Sixteen prompts of random tokens, of different lengths."""
    dice = random.Random(0)
    vocabulary = engine.llm_engine.model_config.get_vocab_size()
    return [{"prompt_token_ids": [dice.randrange(1, vocabulary) for _ in range(8 + 5 * row)]} for row in range(16)]


def tests_job(request: dict[str, Any]) -> dict[str, Any]:
    """One file of the project's engine tests, on this machine's device."""
    file = ROOT / "tests" / "engine" / f"{request['name']}.py"
    report = Path(request["answer"]).with_suffix(".xml")
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", f"--junitxml={report}", str(file)]
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    from xml.etree import ElementTree

    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return {**counts, "wrong": failed, "exit_code": code}


def greedy_job(request: dict[str, Any]) -> dict[str, Any]:
    """Greedy continuations in float32 of random token prompts, all at once."""
    from vllm import SamplingParams

    from vllm_selfspec.config import ConfigError

    drafter = request["drafter"]
    try:
        engine = build_engine(
            request["options"],
            request["model"],
            None if drafter is None else {"drafter": drafter},
            dtype="float32",
            max_model_len=512,
            max_num_seqs=16,
            enforce_eager=True,
        )
    except ConfigError as error:
        return {"refused": str(error)}
    tokens = 32 if request["options"]["tiny"] else 128
    logprobs = None if drafter else 2
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=logprobs, detokenize=False)
    outputs = []
    for output in engine.generate(random_prompts(engine), params, use_tqdm=False):
        best = output.outputs[0]
        entry: dict[str, Any] = {"tokens": list(best.token_ids)}
        if best.logprobs is not None:
            ranked = [sorted((entry.logprob for entry in place.values()), reverse=True) for place in best.logprobs]
            entry["gaps"] = [values[0] - values[1] for values in ranked]
        outputs.append(entry)
    return {"outputs": outputs}


def sweep_job(request: dict[str, Any]) -> dict[str, Any]:
    """Times of every batch and context of the grid that fits, at one draft length."""
    from vllm_selfspec.live_profile import profile_identity

    options, gamma = request["options"], request["gamma"]
    # Both the same for every draft length: they are part of the key of vLLM's compiled graphs.
    longest = max(options["seqs"]) + longest_answer(max(options["gammas"]))
    tokens = {batch * (1 + verified) for batch in options["batches"] for verified in (0, *options["gammas"])}
    sizes = sorted({256, *(count for count in tokens if count <= 512)})
    control = {"mode": "off"}  # lengths are dictated; with "fixed" there would be no whole graphs without drafts
    capture_only_what_is_measured(options["batches"], gamma)
    engine = build_engine(
        options,
        shape_folder(request["shape"]),
        {"num_speculative_tokens": gamma, "control": control},
        load_format="dummy",
        max_model_len=longest,
        max_num_seqs=max(options["batches"]),
        enable_prefix_caching=False,
        compilation_config={"cudagraph_capture_sizes": sizes},
    )
    core = engine.llm_engine.engine_core.engine_core
    config = core.vllm_config
    capacity = config.cache_config.num_gpu_blocks * config.cache_config.block_size
    identity = vars(profile_identity(config, config.speculative_config.selfspec))
    result: dict[str, Any] = {"rows": [], "skipped_for_memory": [], "identity": identity}
    for batch in options["batches"]:
        for seq in options["seqs"]:
            if batch * (longest - max(options["seqs"]) + seq) > capacity:
                result["skipped_for_memory"].append([batch, seq])
                continue
            result["rows"] += sweep_rows(request["shape"], batch, measure_steps(core, batch, seq, gamma))
            keep(request, result)
    return result


def capture_only_what_is_measured(batches: Sequence[int], gamma: int) -> None:
    """From here on engines on runner V2 capture whole passes for `batches`, without drafts and with `gamma` only.

    An engine that serves has graphs for every length between; capturing those would take most of a sweep's time.
    """
    from vllm_selfspec.drafter import verify_graphs

    every = verify_graphs.decode_batches

    def measured(*arguments: Any) -> dict[int, list[int]]:
        kept = {queries: counts for queries, counts in every(*arguments).items() if queries in (1, gamma + 1)}
        return {queries: [count for count in counts if count in batches] for queries, counts in kept.items()}

    verify_graphs.decode_batches = measured


def longest_answer(gamma: int) -> int:
    """More tokens than a request gets in `measure_steps`."""
    return 3 + gamma + 3 * REPETITIONS * (3 + gamma)


def measure_steps(core: Any, batch: int, seq: int, gamma: int) -> list[StepObservation]:
    """Steps of `batch` requests with contexts of about `seq` tokens: plain, drafting, verifying, in turn.

    The contexts are not computed, which would take most of the sweep's time and change no step's.
    """
    from vllm_selfspec.live_profile import plan_for, synthetic_requests
    from vllm_selfspec.scheduler import Dictate

    plan = [Dictate(0), Dictate(0), *plan_for([Dictate(gamma)], REPETITIONS)]
    with synthetic_requests(core, batch, seq, longest_answer(gamma), computed=True) as (step, observations):
        for wanted in plan:
            step(wanted)
    whole = [seen for seen in observations if seen.num_decode == batch and seen.prefill_tokens == 0]
    return [seen for seen in whole if seen.num_verified == int(seen.num_verified)][2:]


def rollout_job(request: dict[str, Any]) -> dict[str, Any]:
    """Makespan of a rollout whose answers have given, long-tailed lengths."""
    from vllm import SamplingParams

    options = request["options"]
    synthetic = request["acceptance"] is not None and options["device"] == "cuda"
    if synthetic:  # vLLM has no synthetic sampler on CPU
        use_synthetic_acceptance(request["acceptance"])
    shape = SHAPES[request["shape"]]
    lengths = answer_lengths(options["requests"], options["longest"])
    prompt = 16 if options["tiny"] else 256
    engine = build_engine(
        options,
        shape_folder(request["shape"]),
        request["selfspec"],
        load_format="dummy",
        max_model_len=prompt + options["longest"] + 64,
        max_num_seqs=options["requests"],
        enable_prefix_caching=False,
    )
    dice = random.Random(1)
    vocabulary = engine.llm_engine.model_config.get_vocab_size()
    prompts = [{"prompt_token_ids": [dice.randrange(1, vocabulary) for _ in range(prompt)]} for _ in lengths]

    def rollout(tokens: Sequence[int]) -> float:
        params = [SamplingParams(temperature=1, max_tokens=n, ignore_eos=True, detokenize=False) for n in tokens]
        start = time.perf_counter()
        outputs = engine.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        got = [len(output.outputs[0].token_ids) for output in outputs]
        assert got == list(tokens), "an answer has another length than asked for"
        return seconds

    rollout([min(16, length) for length in lengths])  # warm-up
    result: dict[str, Any] = {
        "synthetic_acceptance": request["acceptance"] if synthetic else None,
        "tokens": sum(lengths),
        "target_bytes_per_step": None if "num_experts" in shape else parameter_bytes(shape),
        "seconds": [],
    }
    for _ in range(options["rounds"]):
        result["seconds"].append(rollout(lengths))
        median = statistics.median(result["seconds"])
        result |= {"median_seconds": median, "tokens_per_second": sum(lengths) / median}
        keep(request, result)
    return result


JOBS = {
    "products": products_job,
    "drafts": drafts_job,
    "greedy": greedy_job,
    "sweep": sweep_job,
    "rollout": rollout_job,
    "tests": tests_job,
}


def pack(site_packages: Path, pieces: Path, piece_mib: float = PIECE_MIB) -> list[Path]:
    """vLLM, its compiled kernels for Hopper and its requirements as one zip, cut into pieces that can be sent.

    `cat PIECES/site.zip.* >site.zip && python -m zipfile -e site.zip SITE` puts them together again.
    """
    pieces.mkdir(parents=True, exist_ok=True)
    if not (site_packages / "vllm").is_dir() or not list(site_packages.glob("vllm-*.dist-info")):
        raise SystemExit(f"{site_packages} holds no vllm with its dist-info: fill it with pip install --target first.")
    whole = pieces / "site.zip"
    with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(site_packages.rglob("*")):
            name = path.relative_to(site_packages)
            if path.is_file() and "__pycache__" not in path.parts and not name.as_posix().startswith(LEFT_OUT):
                archive.write(path, name)
    size = int(piece_mib * 2**20)
    parts = []
    with whole.open("rb") as file:
        while content := file.read(size):
            parts.append(pieces / f"site.zip.{len(parts):02d}")
            parts[-1].write_bytes(content)
    whole.unlink()
    return parts


def main(argv: Sequence[str]) -> int:
    if argv[:1] == ["job"]:
        sys.path.insert(0, str(ROOT))
        request = json.loads(argv[1])
        keep(request, JOBS[request["kind"]](request))
        return 0
    if argv[:1] == ["pack"]:
        if len(argv) != 3:
            raise SystemExit("usage: run_all.py pack SITE PIECES")
        print(json.dumps([str(part) for part in pack(Path(argv[1]), Path(argv[2]))]))
        return 0
    run = Run(parse_arguments(argv))
    for stage in run.options.stages:
        getattr(run, stage)()
    run.save()
    failed = [job["name"] for job in run.results["jobs"] if "error" in job or job.get("exit_code") or job.get("wrong")]
    failed += [f"greedy {verdict['drafter']}" for verdict in run.results.get("greedy", []) if verdict["unexplained"]]
    summary = {"jobs": len(run.results["jobs"]), "failed": failed, "results": str(run.options.out / "results.json")}
    print(json.dumps(summary | {"rollout": run.results.get("rollout", [])}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
