"""`vllm-selfspec calibrate`: from measured step times to a profile, with its cross-validation."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_selfspec.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from vllm_selfspec.control.calibrate import Validation
    from vllm_selfspec.control.cost_model import CostModel


def calibrate(
    from_sweep: Annotated[
        Path | None, typer.Option("--from-sweep", help="Sweep of component times to fit.", metavar="SWEEP.csv")
    ] = None,
    model_config: Annotated[
        Path | None,
        typer.Option(help="Constants file, or a Hugging Face config.json.", metavar="CONSTANTS.json"),
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(help="Instead of a sweep: validate this profile again.", metavar="PROFILE.json")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where to write the profile.", metavar="PROFILE.json")] = None,
    model: Annotated[str | None, typer.Option(help="Model that was measured; default from the sweep.")] = None,
    hardware: Annotated[str | None, typer.Option(help="Machine that was measured.")] = None,
    drafter: Annotated[str | None, typer.Option(help="Drafter that was measured.")] = None,
    source: Annotated[str | None, typer.Option(help="Where the measurements come from.")] = None,
    cross_validate: Annotated[
        bool, typer.Option("--cross-validate", help="Fit again without each γ and each batch size, and compare.")
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the figures as JSON on the last line.")] = False,
) -> None:
    """Turn measured step times into a profile for `control.profile`, and say how far it can be trusted."""
    from rich.console import Console

    from vllm_selfspec.control.calibrate import profile_from_sweep
    from vllm_selfspec.control.cost_model import CostModel
    from vllm_selfspec.results import new_file

    if (from_sweep is None) == (profile is None):
        raise UsageError("give either --from-sweep SWEEP.csv or --profile PROFILE.json")
    if out is not None:
        new_file(out)
    console = Console(stderr=json_)
    identity = {"model": model, "hardware": hardware, "drafter": drafter, "source": source}
    try:
        if from_sweep is not None:
            created = datetime.now(UTC).date().isoformat()
            with console.status("Fitting the cost model"):
                cost = profile_from_sweep(from_sweep, model_config, meta={**identity, "created": created})
        else:
            cost = CostModel.from_profile(str(profile))
    except ValueError as error:
        raise UsageError(str(error)) from None
    _print_profile(cost, console)
    validations: list[Validation] = []
    if cross_validate:
        validations = _validate(cost, console)
        _print_validations(validations, console)
    if out is not None:
        if validations:
            cost.meta["cross_validation"] = {item.name: _figures(item) for item in validations}
        try:
            cost.save(out)
        except OSError as error:
            raise UsageError(f"--out: {out} cannot be written ({error})") from None
        console.print(f"Written: {out}", highlight=False)
    if json_:
        print(json.dumps({"meta": cost.meta, "cross_validation": {v.name: v.to_dict() for v in validations}}))


def _figures(item: "Validation") -> dict[str, Any]:
    names = ("num_points", "sign_accuracy", "cycle_mape", "regret")
    return {name: round(getattr(item, name), 5) for name in names}


def _validate(cost: "CostModel", console: "Console") -> "list[Validation]":
    from rich.progress import Progress

    from vllm_selfspec.control.calibrate import cross_validate

    results = []
    with Progress(console=console, transient=True) as progress:
        for leave_out in ("nothing", "gamma", "batch"):
            task = progress.add_task(f"leave out {leave_out}", total=None)

            def tick(done: int, total: int, task: Any = task) -> None:
                progress.update(task, completed=done, total=total)

            try:
                results.append(cross_validate(cost.points, cost.constants, leave_out=leave_out, progress=tick))
            except ValueError as error:
                raise UsageError(f"--cross-validate: {error}") from None
    return results


def _print_profile(cost: "CostModel", console: "Console") -> None:
    from rich.table import Table

    table = Table(
        title="Cost model: " + ", ".join(f"{k} {cost.meta[k]}" for k in ("model", "hardware") if cost.meta.get(k))
    )
    table.add_column("batch", justify="right")
    light = ["T_D light (ms)"] if cost.has_light_view else []
    for column in ("T_T (ms)", "T_D (ms)", *light, "T_V γ=3 (ms)", "T_V γ=7 (ms)"):
        table.add_column(column, justify="right")
    seq = sorted(p.seq for p in cost.points)[len(cost.points) // 2]
    for batch in (1, 4, 16, 64):
        times = (
            cost.target_time(batch, seq),
            cost.draft_time(batch, seq),
            *([cost.light_time(batch, seq)] if light else []),
            cost.verify_time(batch, seq, 3),
            cost.verify_time(batch, seq, 7),
        )
        table.add_row(str(batch), *(f"{1e3 * seconds:.2f}" for seconds in times))
    table.caption = f"context {seq} tokens, {len(cost.points)} measured points"
    console.print(table)


def _print_validations(results: "Sequence[Validation]", console: "Console") -> None:
    from rich.table import Table

    table = Table(title="Cross-validation (errors on points that the fit did not see, except in sample)")
    table.add_column("")
    for column in ("points", "sign right", "cycle MAPE", "regret", "T_T MAPE", "T_V MAPE", "T_D MAPE"):
        table.add_column(column, justify="right")
    for item in results:
        figures = (
            item.sign_accuracy,
            item.cycle_mape,
            item.regret,
            item.target_mape,
            item.verify_mape,
            item.draft_mape,
        )
        table.add_row(item.name, str(item.num_points), *(f"{100 * figure:.2f} %" for figure in figures))
    console.print(table)
    by = Table(title="Sign right / regret, by acceptance per token")
    by.add_column("")
    for alpha in results[0].sign_by_acceptance:
        by.add_column(f"{alpha:g}", justify="right")
    for item in results:
        signs, regrets = item.sign_by_acceptance, item.regret_by_acceptance
        by.add_row(item.name, *(f"{100 * signs[a]:.1f} / {100 * regrets[a]:.2f} %" for a in signs))
    console.print(by)
