"""How the cost of self-speculation grows with batch, context, draft length and vocabulary (dummy weights).

    eval "$(python -m vllm_selfspec.engine_env)"
    python benchmarks/scaling.py --out scaling.json --plot scaling.png

Times and bytes do not depend on what the weights say, so the models are small Llama shapes with dummy weights, written
on the spot; nothing here says how many drafts a real model accepts. One engine per vocabulary, one after the other, in
this process, without torch.compile. Its scheduler is told step by step what to draft, so that three times come apart:
a plain step, one draft forward (the drafting step minus the plain step right before it, over γ), and the step that
verifies γ drafts. Every axis holds the other three at their base values. Rounds go through all points in turn, so a
machine whose speed drifts treats all points of an engine alike; figures are medians.

Memory is counted, not modelled: the drafter's own weights, the KV cache per token beside what the target alone would
need, the draft distributions q as they lie in memory after a step, and the peak of torch's allocations in each kind of
step.

The idle plugin, installed but not asked for: what an interpreter has imported when it starts, the seconds that the
plugin takes once in a process that has imported vLLM, and the only wrapper that vLLM then calls in every step.

`--draw scaling.json` measures nothing and draws a saved result again. The last line on stdout is JSON.
"""

import argparse
import gc
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from result_file import new_out, save

from vllm_selfspec.provenance import provenance

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

SHAPE = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 4,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
LONGEST_DRAFT, MAX_MODEL_LEN, BLOCK = 8, 2048, 32
KINDS = ("plain", "draft", "verify")

AT_START = """
import json, sys
print(json.dumps([name for name in sys.modules if name.partition(".")[0] in ("vllm_selfspec", "vllm", "torch")]))
"""

IDLE = """
import json, sys, time
from vllm import LLM

def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start

def load():
    from vllm_selfspec.plugin import register
    register()

before = set(sys.modules)
told = {"register": seconds(load), "register_again": seconds(load)}
told["modules"] = sorted(set(sys.modules) - before)
from vllm_selfspec import plugin
# vLLM's calls reach a wrapper once per process (the first calls import it), but for that of the statistics.
told["first_calls"] = seconds(lambda: [plugin._function(seam.wrapper) for seam in plugin.EVERYWHERE])
from vllm.v1.metrics.stats import SchedulerStats
seam = next(seam for seam in plugin.EVERYWHERE if "record" in seam.target)
stats, calls = SchedulerStats(), 20000
def bare(*args, **kwargs): pass
wrapped = plugin._wrapped(bare, seam)
def many(call):
    for _ in range(calls):
        call(None, stats, None)
told["per_step"] = (seconds(lambda: many(wrapped)) - seconds(lambda: many(bare))) / calls
print(json.dumps(told))
"""


@dataclass(frozen=True)
class Setting:
    """One point of the four axes."""

    batch: int
    context: int
    num_draft_tokens: int
    vocabulary: int


def main() -> None:
    """Measure every engine, then the idle plugin; write JSON and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--contexts", type=int, nargs="+", default=[64, 256, 512, 1024, 1900], help="prompt tokens")
    parser.add_argument("--draft-lengths", type=int, nargs="+", default=[1, 2, 4, 6, 8], help="at most 8")
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[8192, 32768, 65536, 151936])
    parser.add_argument(
        "--base",
        type=int,
        nargs=4,
        default=[4, 256, 4, 32768],
        metavar=("BATCH", "CONTEXT", "DRAFT", "VOCABULARY"),
        help="what the axes hold fixed",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repetitions", type=int, default=6, help="of plain, draft, verify at each point of a round")
    parser.add_argument("--processes", type=int, default=3, help="in which the idle plugin is timed; each imports vLLM")
    parser.add_argument("--out", type=Path, default=Path("scaling.json"))
    parser.add_argument("--plot", type=Path, default=Path("scaling.png"))
    parser.add_argument("--draw", type=Path, help="draw this saved result and measure nothing")
    args = parser.parse_args()
    if args.draw:
        draw(json.loads(args.draw.read_text()), args.plot)
        return
    for path in (args.out, args.plot):
        new_out(parser, path)

    base = Setting(*args.base)
    axes = {
        "batch": [replace(base, batch=batch) for batch in args.batches],
        "context": [replace(base, context=context) for context in args.contexts],
        "num_draft_tokens": [replace(base, num_draft_tokens=length) for length in args.draft_lengths],
        "vocabulary": [replace(base, vocabulary=size) for size in args.vocabularies],
    }
    by_vocabulary: dict[int, list[Setting]] = defaultdict(list)
    for setting in dict.fromkeys(setting for axis in axes.values() for setting in axis):
        by_vocabulary[setting.vocabulary].append(setting)
    points: dict[Setting, dict[str, Any]] = {}
    models: list[dict[str, Any]] = []
    record = {
        "weights": "dummy weights",
        "shape": SHAPE,
        "dtype": "bfloat16",
        "drafter": "all layers, int8, LM head int8",
        "enforce_eager": True,
        "temperature": 1.0,
        "base": asdict(base),
        "models": models,
        "rounds": args.rounds,
        "repetitions": args.repetitions,
        **provenance(),
    }
    for vocabulary in sorted(by_vocabulary):
        model, measured = measure_engine(vocabulary, by_vocabulary[vocabulary], args.rounds, args.repetitions)
        models.append(model)
        points.update(measured)
        record["axes"] = {axis: [asdict(s) | points[s] for s in on if s in points] for axis, on in axes.items()}
        save(args.out, record)
    idle = measure_idle(args.processes)
    print("idle plugin", json.dumps(idle), flush=True)

    record["idle_plugin"] = idle
    record["lines"] = {axis: lines(axis, rows) for axis, rows in record["axes"].items() if len(rows) > 1}
    save(args.out, record)
    draw(record, args.plot)
    print(json.dumps({"weights": "dummy weights", "lines": record["lines"], "idle_plugin": idle}))


# --- one engine -------------------------------------------------------------------------------------------------------


@contextmanager
def engine(vocabulary: int, max_num_seqs: int) -> Iterator[Any]:
    """The engine core of a Llama shape with dummy weights, torn down at the end."""
    from transformers import LlamaConfig
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    shape = LlamaConfig(**SHAPE, vocab_size=vocabulary, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    shape.architectures, shape.dtype = ["LlamaForCausalLM"], "bfloat16"
    with tempfile.TemporaryDirectory() as folder:
        shape.save_pretrained(folder)
        llm = LLM(
            folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            enforce_eager=True,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=max_num_seqs,
            block_size=BLOCK,
            num_gpu_blocks_override=max_num_seqs * MAX_MODEL_LEN // BLOCK,
            enable_prefix_caching=False,
            speculative_config={
                "method": "selfspec",
                "num_speculative_tokens": LONGEST_DRAFT,
                "drafter": {"weights": "int8", "lm_head": "int8"},
                "control": {"mode": "fixed"},
            },
        )
        try:
            yield llm.llm_engine.engine_core.engine_core
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
            cleanup_dist_env_and_memory()
            gc.collect()


def measure_engine(
    vocabulary: int, settings: list[Setting], rounds: int, repetitions: int
) -> tuple[dict[str, Any], dict[Setting, dict[str, Any]]]:
    """All points of one vocabulary, and the weights and KV cache of its model."""
    from vllm_selfspec.live_profile import points_of

    measured: dict[Setting, dict[str, Any]] = {}
    with engine(vocabulary, max(setting.batch for setting in settings)) as core:
        model = {"vocabulary": vocabulary, **static_memory(core)}
        print("dummy weights:", json.dumps(model), flush=True)
        for setting in settings:  # warm up: first use of a shape
            measured[setting] = {"memory": run_point(core, setting, 1)[1]}
        runs: dict[Setting, list[Any]] = defaultdict(list)
        for _ in range(rounds):
            for setting in settings:
                runs[setting].append(run_point(core, setting, repetitions)[0])
        for setting, made in runs.items():
            point = {point.component: point for point in points_of(made, setting.batch)}
            target, draft, verify = (point[component] for component in ("target", "draft", "verify"))
            cycle = setting.num_draft_tokens * draft.seconds + verify.seconds
            measured[setting] |= {
                "mean_context": target.seq,
                "seconds": {"plain": target.seconds, "draft": draft.seconds, "verify": verify.seconds},
                "relative_error": {"plain": target.noise, "draft": draft.noise, "verify": verify.noise},
                "cycle_over_plain": cycle / target.seconds,
            }
            times = ", ".join(f"{k} {1e3 * s:.2f} ms" for k, s in measured[setting]["seconds"].items())
            print(f"dummy weights: {setting}: {times}; {measured[setting]['memory']}", flush=True)
    return model, measured


def run_point(core: Any, setting: Setting, repetitions: int) -> tuple[list[Any], dict[str, Any]]:
    """The steps of `repetitions` times plain, draft, verify, and the memory of one more cycle of them."""
    from vllm_selfspec.live_profile import synthetic_requests
    from vllm_selfspec.scheduler import Dictate

    cycle = (0, setting.num_draft_tokens, 0)
    requests = synthetic_requests(core, setting.batch, setting.context, MAX_MODEL_LEN - setting.context)
    with requests as (step, observations):
        while not observations or observations[-1].num_decode < setting.batch:  # long prompts come in several steps
            step(Dictate(0))
        for length in cycle * repetitions:
            step(Dictate(length))
        timed = list(observations)
        memory: dict[str, Any] = {"peak_bytes": {}}
        for kind, length in zip(KINDS, cycle, strict=True):
            memory["peak_bytes"][kind] = peak_of(partial(step, Dictate(length)))
            if kind == "draft":
                memory["q_bytes"] = runner_of(core).drafter.take_last_draft_probs().nbytes
    return timed, memory


def runner_of(core: Any) -> Any:
    """The engine's model runner."""
    return core.model_executor.driver_worker.worker.model_runner


def static_memory(core: Any) -> dict[str, int]:
    """Bytes of the weights and, per token, of the KV cache; the drafter's share of both."""
    runner = runner_of(core)
    blocks = core.vllm_config.cache_config.num_gpu_blocks
    cache = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in runner.kv_caches}
    per_token = sum(cache.values()) / (blocks * BLOCK)
    heads = SHAPE["num_key_value_heads"] * SHAPE["hidden_size"] // SHAPE["num_attention_heads"]
    target_alone = 2 * SHAPE["num_hidden_layers"] * heads * 2  # keys and values, bfloat16
    hidden, intermediate = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    layer = hidden * (2 * hidden + 2 * heads + 3 * intermediate)
    vocabulary = core.vllm_config.model_config.get_vocab_size()
    return {
        "target_linear_weights_bytes": 2 * (SHAPE["num_hidden_layers"] * layer + vocabulary * hidden),
        "drafter_own_weights_bytes": core.collective_rpc("selfspec_refresh")[0]["bytes"],
        "kv_bytes_per_token": round(per_token),
        "drafter_own_kv_bytes_per_token": round(per_token) - target_alone,
    }


def peak_of(step: Callable[[], None]) -> int:
    """Most bytes that torch's CPU allocator held at once during one step, over what it held before."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return int(max(0, held.max()))


# --- the plugin that nobody asked for ---------------------------------------------------------------------------------


def measure_idle(processes: int) -> dict[str, Any]:
    """What the installed plugin costs a process that does not use it.

    Raises:
        RuntimeError: it is not installed, or is imported when an interpreter starts.
    """
    if not importlib.metadata.entry_points(group="vllm.general_plugins", name="selfspec"):
        raise RuntimeError("vllm-selfspec is not installed, so vLLM would not find it: pip install it first.")
    at_start = child(AT_START)
    if at_start:
        raise RuntimeError(f"an interpreter imports {at_start} when it starts: the plugin must not.")
    told = [child(IDLE) for _ in range(processes)]
    foreign = sorted({name for one in told for name in one["modules"] if not name.startswith("vllm_selfspec")})
    return {
        "modules_at_interpreter_start": at_start,
        "processes": processes,
        **{
            f"{key}_seconds": {
                "median": statistics.median(one[key] for one in told),
                "all": [one[key] for one in told],
            }
            for key in ("register", "register_again", "first_calls", "per_step")
        },
        "own_modules_of_register": [name for name in told[0]["modules"] if name.startswith("vllm_selfspec")],
        "other_modules_of_register": foreign,
    }


def child(program: str) -> Any:
    """The JSON in the last line that `program` prints in an interpreter of its own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_SELFSPEC")}
    environment["VLLM_LOGGING_LEVEL"] = "ERROR"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


# --- what came out ----------------------------------------------------------------------------------------------------

VALUE = {
    "batch": "batch",
    "context": "mean_context",
    "num_draft_tokens": "num_draft_tokens",
    "vocabulary": "vocabulary",
}


def lines(axis: str, rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Straight lines through the times of one axis: seconds at 0, seconds per unit, and R²."""
    x = np.array([row[VALUE[axis]] for row in rows], dtype=float)
    fits = {}
    for kind in KINDS:
        y = np.array([row["seconds"][kind] for row in rows])
        slope, intercept = np.polyfit(x, y, 1)
        rest = float(((y - intercept - slope * x) ** 2).sum())
        spread = float(((y - y.mean()) ** 2).sum())
        fits[kind] = {"at_zero": float(intercept), "per_unit": float(slope), "r2": 1 - rest / spread}
    return fits


def draw(record: dict[str, Any], path: Path) -> None:
    """Four panels, one per axis: milliseconds of the three kinds of step, and megabytes of q."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels = {
        "batch": ("requests at once, B", 1),
        "context": ("tokens of context", 1),
        "num_draft_tokens": ("drafted tokens, γ", 1),
        "vocabulary": ("vocabulary, thousands", 1000),
    }
    looks = {
        "plain": ("plain step", "#555555", "o"),
        "draft": ("one draft forward", "#1b7fbd", "s"),
        "verify": ("step that verifies γ", "#d1661f", "^"),
    }
    base = record["base"]
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7.6), layout="constrained")
    for panel, (axis, (label, unit)) in zip(axes.flat, labels.items(), strict=True):
        rows = record["axes"][axis]
        x = [row[VALUE[axis]] / unit for row in rows]
        for kind, (name, colour, marker) in looks.items():
            panel.plot(x, [1e3 * row["seconds"][kind] for row in rows], color=colour, marker=marker, label=name)
        panel.set(xlabel=label, ylabel="ms", ylim=(0, None), xlim=(0, None))
        panel.grid(alpha=0.25)
        right = panel.twinx()
        q = [row["memory"]["q_bytes"] / 1e6 for row in rows]
        right.plot(x, q, color="#3a9a5b", linestyle=":", marker="x", label="q, B × γ × V float32 (right)")
        right.set(ylabel="MB", ylim=(0, 1.15 * max(q)))
        names = {"batch": "B", "context": "context", "num_draft_tokens": "γ", "vocabulary": "V"}
        fixed = ", ".join(f"{name} = {base[key]:,}" for key, name in names.items() if key != axis)
        panel.set_title(fixed, fontsize=10)
        if axis == "batch":
            handles = [*panel.get_legend_handles_labels()[0], *right.get_legend_handles_labels()[0]]
            figure.legend(handles=handles, loc="outside lower center", ncols=4)
    shape = record["shape"]
    figure.suptitle(
        f"Dummy weights: Llama shape, hidden {shape['hidden_size']}, {shape['num_hidden_layers']} layers, bfloat16, "
        f"drafter int8, no torch.compile\n{record['hardware']['cpu']}, {record['hardware']['cores']} cores",
        fontsize=11,
    )
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
