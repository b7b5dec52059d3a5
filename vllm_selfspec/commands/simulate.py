"""`vllm-selfspec simulate`: rollouts on a profile, policies side by side. All figures are simulated."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_selfspec.control.acceptance import USUAL_REJECTION_RATIO
from vllm_selfspec.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from rich.console import Console

    from vllm_selfspec.control.cost_model import CostModel
    from vllm_selfspec.control.simulate import PolicyResult, Workload

_MOST_DISTINCT = 16


def simulate(
    profile: Annotated[Path, typer.Option(help="Profile of the machine.", metavar="PROFILE.json")],
    requests: Annotated[int, typer.Option(min=1, help="Requests per replica and rollout.")] = 128,
    lengths: Annotated[
        str,
        typer.Option(
            help="Output lengths: `longtail:MEDIAN,SIGMA,LONGEST` (log-normal, clipped), `fixed:N`, or a JSON file "
            "with a list of lengths (or an object with output_lengths) to draw from."
        ),
    ] = "longtail:1000,1.0,8192",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 256,
    n: Annotated[int, typer.Option("--n", min=1, help="Samples per prompt.")] = 8,
    acceptance: Annotated[float, typer.Option(min=0, max=1, help="Acceptance per drafted token.")] = 0.98,
    acceptance_spread: Annotated[float, typer.Option(min=0, help="Its standard deviation between requests.")] = 0.0,
    rejection_ratio: Annotated[
        float,
        typer.Option(
            min=1, help="How many times as often the light view is rejected, on a profile of a drafter that has one."
        ),
    ] = USUAL_REJECTION_RATIO,
    max_draft_tokens: Annotated[int, typer.Option(min=1, max=32, help="Most tokens drafted in a step.")] = 11,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Requests that run together.")] = 256,
    arrival_rate: Annotated[
        float | None, typer.Option(help="Requests per second of a server; default: a rollout, all at once.")
    ] = None,
    replicas: Annotated[int, typer.Option(min=1, help="Engines of the fleet.")] = 1,
    rollouts: Annotated[int, typer.Option(min=1, help="Rollouts in a row on the same engines.")] = 4,
    noise: Annotated[float, typer.Option(min=0, max=1, help="Relative noise of step durations.")] = 0.02,
    seed: Annotated[int, typer.Option(help="Seed of all chance.")] = 0,
    recording: Annotated[
        Path | None,
        typer.Option(help="Predict this recorded rollout instead, see docs/control.md.", metavar="ROLLOUT.json"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write results.json and plot.png here.", metavar="DIR")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the figures as JSON on the last line.")] = False,
) -> None:
    """Simulate rollouts on a profile and compare policies for the draft length."""
    from rich.console import Console

    from vllm_selfspec.control.cost_model import CostModel
    from vllm_selfspec.control.simulate import predict_recorded
    from vllm_selfspec.results import new_file

    console = Console(stderr=json_)
    if arrival_rate is not None and not 0 < arrival_rate < math.inf:
        raise UsageError(f"--arrival-rate: is {arrival_rate:g}; give requests per second above 0, or leave it out")
    if out is not None:
        new_file(out / "results.json")
    try:
        cost = CostModel.from_profile(profile)
        if recording is not None:
            prediction = predict_recorded(_read_json(recording), cost, seed=seed)
            for name, value in prediction.items():
                console.print(f"{name}: {value}", highlight=False)
            _write(out, "results.json", json.dumps(prediction, indent=2) + "\n", console)
            if json_:
                print(json.dumps(prediction))
            return
        draw = _length_sampler(lengths)
    except ValueError as error:
        raise UsageError(str(error)) from None

    from vllm_selfspec.control.simulate import rollout_workload

    def workload(rng: "np.random.Generator") -> "Workload":
        return rollout_workload(
            draw(requests, rng),
            rng,
            acceptance=acceptance,
            acceptance_spread=acceptance_spread,
            rejection_ratio=rejection_ratio,
            prompt_tokens=prompt_tokens,
            samples_per_prompt=n,
            max_num_seqs=max_num_seqs,
            arrival_rate=arrival_rate,
        )

    settings = {
        "profile": str(profile),
        "model": cost.meta.get("model"),
        "hardware": cost.meta.get("hardware"),
        "requests": requests,
        "lengths": lengths,
        "acceptance": acceptance,
        "acceptance_spread": acceptance_spread,
        "rejection_ratio": rejection_ratio if cost.has_light_view else None,
        "max_draft_tokens": max_draft_tokens,
        "max_num_seqs": max_num_seqs,
        "arrival_rate": arrival_rate,
        "replicas": replicas,
        "distinct_replicas": min(replicas, _MOST_DISTINCT),
        "rollouts": rollouts,
        "noise": noise,
        "seed": seed,
    }
    try:
        results = _run(cost, workload, settings, console)
    except ValueError as error:
        raise UsageError(str(error)) from None
    _print_results(results, settings, console)
    document = {"simulated": True, "settings": settings, "policies": [result.to_dict() for result in results]}
    _write(out, "results.json", json.dumps(document, indent=2) + "\n", console)
    if out is not None:
        _plot(results, settings, out / "plot.png")
        console.print(f"Written: {out / 'plot.png'}", highlight=False)
    if json_:
        for policy in document["policies"]:  # type: ignore[attr-defined]  # a list of dicts
            policy.pop("timeline")
        print(json.dumps(document))


def _run(cost: "CostModel", workload: Any, settings: dict[str, Any], console: "Console") -> "list[PolicyResult]":
    from rich.progress import Progress

    from vllm_selfspec.control.simulate import compare, standard_policies

    longest = settings["max_draft_tokens"]
    fixed = sorted({gamma for gamma in (3, 7, longest) if gamma <= longest})
    build = standard_policies(
        cost,
        max_draft_tokens=longest,
        fixed=fixed,
        acceptance=settings["acceptance"],
        max_batch=settings["max_num_seqs"],
        rejection_ratio=settings["rejection_ratio"] or 1.0,
    )
    distinct, rollouts = settings["distinct_replicas"], settings["rollouts"]
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("simulating", total=distinct * rollouts * (5 + len(fixed)))
        return compare(
            cost,
            workload,
            build,
            max_draft_tokens=longest,
            replicas=distinct,
            rollouts=rollouts,
            noise=settings["noise"],
            seed=settings["seed"],
            progress=lambda: progress.advance(task),
        )


def _length_sampler(spec: str) -> Any:
    """A function (count, rng) -> lengths for the `--lengths` option."""
    import numpy as np

    from vllm_selfspec.control.simulate import sample_lengths

    kind, _, rest = spec.partition(":")
    try:
        if kind == "longtail":
            median, sigma, longest = (float(part) for part in rest.split(","))
            if median < 1 or sigma < 0 or longest < 1 or not math.isfinite(median + sigma + longest):
                raise ValueError(rest)
            return lambda count, rng: sample_lengths(count, rng, median=median, sigma=sigma, longest=int(longest))
        if kind == "fixed":
            tokens = int(rest)
            if tokens < 1:
                raise ValueError(rest)
            return lambda count, rng: np.full(count, tokens)
    except ValueError:
        raise ValueError(f"--lengths is {spec!r}: write longtail:MEDIAN,SIGMA,LONGEST or fixed:N.") from None
    raw = _read_json(Path(spec))
    values = np.asarray(raw.get("output_lengths", []) if isinstance(raw, dict) else raw)
    if values.ndim != 1 or not len(values) or not np.issubdtype(values.dtype, np.integer) or (values < 1).any():
        raise ValueError(f"--lengths: {spec} holds no list of whole output lengths ≥ 1.")
    return lambda count, rng: rng.choice(values, count)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error}).") from error


def _write(folder: Path | None, name: str, text: str, console: "Console") -> None:
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    except OSError as error:
        raise UsageError(f"--out: {folder} cannot be written ({error})") from None
    console.print(f"Written: {folder / name}", highlight=False)


def _print_results(results: "Sequence[PolicyResult]", settings: dict[str, Any], console: "Console") -> None:
    from rich.table import Table

    from vllm_selfspec.control.simulate import table_rows

    table = Table(
        title=f"SIMULATED on {settings['hardware']} / {settings['model']}: "
        f"{settings['requests']} requests per replica, {settings['replicas']} replicas "
        f"({settings['distinct_replicas']} simulated), {settings['rollouts']} rollouts, "
        f"acceptance {settings['acceptance']:g}"
    )
    table.add_column("policy")
    for column in ("rollout (s, simulated)", "less than plain", "tokens/s per replica (simulated)"):
        table.add_column(column, justify="right")
    table.add_column("share of steps by γ")
    for name, seconds, reduction, rate, used in table_rows(results):
        table.add_row(name, f"{seconds:.2f}", f"{100 * reduction:.1f} %", f"{rate:.0f}", used)
    console.print(table)


def _plot(results: "Sequence[PolicyResult]", settings: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (bars, lines) = plt.subplots(1, 2, figsize=(12, 4.5))
    names = [result.name for result in results]
    bars.barh(names[::-1], [result.rollout_seconds for result in results][::-1], color="#1f77b4")
    bars.set_xlabel("rollout time (s, simulated)")
    ours = next(result for result in results if result.name == "selfspec")
    seconds, batch, gamma = zip(*ours.timeline, strict=True)
    lines.plot(seconds, batch, color="#7f7f7f", label="decoding requests")
    lines.set_xlabel("time in the last rollout (s, simulated)")
    lines.set_ylabel("decoding requests")
    right = lines.twinx()
    right.step(seconds, gamma, color="#1f77b4", where="post", label="draft length γ")
    right.set_ylabel("draft length γ (selfspec)")
    right.set_ylim(0, settings["max_draft_tokens"] + 1)
    figure.suptitle(f"SIMULATED: {settings['requests']} requests per replica, acceptance {settings['acceptance']:g}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
