"""The adaptive controller against every fixed draft length and against no drafting, on one real engine.

    eval "$(python -m vllm_selfspec.engine_env)"
    python benchmarks/controller.py MODEL --out controller.json

One engine in this process; before each round its controller is exchanged: never draft, always draft γ (with the main
view), adaptive, and, where the drafter has a light view, adaptive without it. The rounds alternate, each beginning with
another mode, so a machine whose speed drifts treats all alike; figures are medians of the round-by-round ratios to
"never draft". That is plain decoding with the plugin loaded: `vllm-selfspec rollout --control '{"mode": "off"}'`
measures how far it is from vLLM without the flag.

The rounds are also predicted by the simulator, from the lengths that came out, a profile and the acceptance that was
seen: predicted over measured makespan, median of the rounds. Beside it, the same for the very steps that were taken,
one by one: what the profile alone is wrong by. The profile is the one that the engine measured at its start, and, where
the machine has changed since, says more about that than about the simulator; `--interleave` takes turns with the
calibration, too, and predicts from the profile that comes out of these turns.
"""

import argparse
import json
import math
import os
import random
import statistics
import time
from dataclasses import replace
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import numpy as np
from result_file import new_out, save
from vllm import LLM, SamplingParams

from vllm_selfspec.control.cost_model import CostModel
from vllm_selfspec.control.policy import Controller, ControlSettings, Decision, StepObservation, StepState
from vllm_selfspec.control.simulate import Clock, predict_recorded
from vllm_selfspec.live_profile import points_of, run_batch
from vllm_selfspec.prompts import embedded_prompts
from vllm_selfspec.provenance import provenance


def error_of_steps(steps: list[StepObservation], profile: CostModel) -> float:
    """Predicted over measured seconds of all steps together, minus 1."""
    clock = Clock(profile, max(step.num_drafted for step in steps) or 1, 0.0, np.random.default_rng(0))
    return math.fsum(clock.seconds(*step.work) for step in steps) / math.fsum(step.seconds for step in steps) - 1.0


def error_of_makespan(recording: dict[str, Any], profile: CostModel) -> float:
    """Simulated over measured makespan, minus 1; the mean over 20 draws of which drafts are accepted."""
    return statistics.fmean(predict_recorded(recording, profile, seed=seed)["error"] for seed in range(20))


class MainView(Controller):
    """Leaves the light view out of a drafter that has one."""

    def decide(self, state: StepState) -> Decision:
        """With the main view, whatever the draft length."""
        return replace(super().decide(state), light=False)


def long_tailed_rollout(most: int) -> tuple[str, int, list[SamplingParams]]:
    """Label, batch and parameters of 16 requests of the same long-tailed lengths every time.

    The same for every mode, because the end of a rollout is one request, and a longer one takes longer.
    """
    dice = random.Random(0)
    lengths = [min(most, round(dice.lognormvariate(math.log(most / 4), 0.8))) for _ in range(16)]
    params = [SamplingParams(temperature=1.0, max_tokens=length, ignore_eos=True) for length in lengths]
    return f"rollout of 16, {min(lengths)} to {max(lengths)} tokens", 16, params


def main() -> None:
    """Measure constant batches, then a rollout whose requests end one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 2, 4, 8, 16])
    parser.add_argument("--fixed", type=int, nargs="+", default=[1, 3, 5, 7])
    parser.add_argument("--max-draft-tokens", type=int, help="for the adaptive mode; by default the longest fixed")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each request in the constant batches")
    parser.add_argument("--rollout-tokens", type=int, default=256, help="most tokens of a request in it; 0: no rollout")
    parser.add_argument("--interleave", action="store_true", help="calibrate again in every round, to predict from")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--drafter", type=json.loads, default={}, help='such as {"weights": "int8"}')
    parser.add_argument("--out", default="controller.json")
    args = parser.parse_args()
    args.out = new_out(parser, args.out)
    origin = provenance()

    longest = args.max_draft_tokens or max(args.fixed)
    spec = {"method": "selfspec", "num_speculative_tokens": longest, "drafter": args.drafter}
    llm = LLM(args.model, speculative_config=spec, max_model_len=2048, max_num_seqs=16)
    core = llm.llm_engine.engine_core.engine_core
    scheduler = core.scheduler
    adaptive = scheduler._controller
    modes = {"off": Controller(ControlSettings(mode="off"))}
    for gamma in args.fixed:
        modes[f"fixed {gamma}"] = MainView(ControlSettings(max_draft_tokens=gamma, mode="fixed"))
    modes["adaptive"] = adaptive
    profile = adaptive.times.cost_model
    if adaptive.settings.light_view:
        alone = replace(adaptive.settings, light_view=False)
        modes["adaptive main"] = MainView(alone, profile, max_batch=scheduler.max_num_running_reqs)
    prompts = embedded_prompts()

    def run(mode: str, batch: int, params: SamplingParams | list[SamplingParams]) -> dict[str, Any]:
        scheduler._controller = controller = modes[mode]
        steps: list[StepObservation] = []
        learned = statistics.fmean(controller.acceptance.rates())
        observe = controller.observe_step

        def record_step(observation: StepObservation) -> None:
            steps.append(observation)
            observe(observation)

        controller.observe_step = record_step  # type: ignore[method-assign]
        chosen = [prompts[i % len(prompts)]["messages"] for i in range(batch)]
        llm.reset_prefix_cache()
        start = time.perf_counter()
        outputs = llm.chat(chosen, params, use_tqdm=False)
        makespan = time.perf_counter() - start
        del controller.observe_step  # type: ignore[misc]
        return {
            "mode": mode.split()[0].replace("off", "plain"),
            "makespan": makespan,
            "steps": steps,
            "output_lengths": [len(output.outputs[0].token_ids) for output in outputs],
            "prompt_lengths": [len(output.prompt_token_ids) for output in outputs],
            "num_speculative_tokens": modes[mode].settings.max_draft_tokens,
            "max_num_seqs": batch,
            "acceptance_prior": learned,
            "light_view": controller.settings.light_view,
            "rejection_ratio": adaptive.rejection_ratio.ratio,
        }

    def tokens_per_second(recording: dict[str, Any]) -> float:
        return sum(recording["output_lengths"]) / recording["makespan"]

    def compare(label: str, batch: int, params: SamplingParams | list[SamplingParams]) -> dict[str, Any]:
        for mode in modes:  # warm up: first use of a shape
            run(mode, batch, SamplingParams(temperature=1.0, max_tokens=12, ignore_eos=True))
        fixed = modes[f"fixed {max(args.fixed)}"].acceptance
        drafted, accepted = fixed.total_drafted, fixed.total_accepted
        recordings: dict[str, list[dict[str, Any]]] = {mode: [] for mode in modes}
        # in a rollout requests end one after the other
        sizes = [1, 2, 4, 8, 16] if isinstance(params, list) else [batch]
        calibrations: dict[int, list[list[StepObservation]]] = {size: [] for size in sizes}
        order = list(modes)
        for _ in range(args.rounds):
            for mode in order:
                recordings[mode].append(run(mode, batch, params))
            order.append(order.pop(0))
            if args.interleave:
                for size in sizes:
                    lengths, light_view = sorted({1, *args.fixed, longest}), adaptive.settings.light_view
                    calibrations[size].append(run_batch(core, size, lengths, light_view=light_view))
        points = [point for size, made in calibrations.items() for point in points_of(made, size)]
        profiles = {"at the start": profile}
        if points:
            profiles["between the rounds"] = CostModel.fit(points)
        rates = {mode: [tokens_per_second(recording) for recording in made] for mode, made in recordings.items()}
        ratios = {m: statistics.median(a / b for a, b in zip(r, rates["off"], strict=True)) for m, r in rates.items()}
        text = {m: f"{statistics.median(rates[m]):.1f} tok/s {ratio:.2f}x" for m, ratio in ratios.items()}
        acceptance = statistics.mean(fixed.rates())  # of a draft, given those before it: what the simulator draws from
        accepted_share = (fixed.total_accepted - accepted) / max(1, fixed.total_drafted - drafted)
        light = [step.light for recording in recordings["adaptive"] for step in recording["steps"] if step.num_drafted]
        share, ratio = statistics.fmean(light or [0]), adaptive.rejection_ratio.ratio
        print(
            label,
            text,
            f"{accepted_share:.3f} of the drafts of γ = {max(args.fixed)} accepted, light {share:.0%}, rejected "
            f"{ratio:.2f}x as often",
            flush=True,
        )
        errors: dict[str, dict[str, dict[str, float]]] = {}
        for name, times in profiles.items():
            errors[name] = {"makespan": {}, "steps": {}}
            for mode, made in recordings.items():
                makespans = [error_of_makespan({**r, "acceptance": acceptance}, times) for r in made]
                errors[name]["makespan"][mode] = statistics.median(makespans)
                errors[name]["steps"][mode] = statistics.median(error_of_steps(r["steps"], times) for r in made)
            for what, by_mode in errors[name].items():
                said = ", ".join(f"{mode} {error:+.1%}" for mode, error in by_mode.items())
                print(f"  predicted by the profile measured {name}, {what}: {said}", flush=True)
        return {
            "label": label,
            "batch": batch,
            "tokens_per_second": rates,
            "ratio_to_off": ratios,
            "acceptance": acceptance,
            "accepted_share": accepted_share,
            "light_share": share,
            "rejection_ratio": ratio,
            "errors": errors,
        }

    params = SamplingParams(temperature=1.0, max_tokens=args.tokens, ignore_eos=True)
    cases = [(f"B={batch}", batch, params) for batch in args.batches]
    if args.rollout_tokens:
        cases.append(long_tailed_rollout(args.rollout_tokens))
    results = []
    for case in cases:
        results.append(compare(*case))
        chosen = {str(k): v for k, v in sorted(adaptive.draft_lengths.items())}
        save(args.out, {"results": results, "adaptive_draft_lengths": chosen, "arguments": vars(args), **origin})
    print(json.dumps({r["label"]: r["ratio_to_off"] for r in results}))


if __name__ == "__main__":
    main()
