"""`vllm-selfspec rollout`: the same prompts by plain and by self-speculative decoding, in alternating rounds."""

import contextlib
import io
import json
import signal
import sys
import time
from collections.abc import Generator, Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer

from vllm_selfspec.errors import EngineError, UsageError
from vllm_selfspec.models import DEFAULT_MODEL

if TYPE_CHECKING:
    from rich.console import Console

    from vllm_selfspec.engine_pool import EnginePool
    from vllm_selfspec.engine_process import EngineProcess
    from vllm_selfspec.results import Mode, RolloutRun, Round

_Json = TypeVar("_Json", dict, list)

_SAMPLES, _RUN, _PLOT, _WORKERS = "samples.jsonl", "rollout.json", "rollout.png", "workers.jsonl"
# Engine arguments that follow from other options, or that the command needs as they are.
_SET_ELSEWHERE = frozenset(
    ("model", "max_num_seqs", "max_model_len", "seed", "enforce_eager", "disable_log_stats", "speculative_config")
)
# Two engines share one GPU: a little less than half of its memory each.
_SHARED_GPU_FRACTION = 0.45


class Only(StrEnum):
    """Which engines run."""

    both = "both"
    plain = "plain"
    selfspec = "selfspec"


def rollout(
    model: Annotated[str, typer.Option(help="Checkpoint folder or hub id.")] = DEFAULT_MODEL,
    prompts: Annotated[
        Path | None,
        typer.Option(help="JSON lines with `prompt` or `messages`; by default 16 embedded questions.", metavar="FILE"),
    ] = None,
    n: Annotated[int, typer.Option("--n", "-n", min=1, help="Samples per prompt.")] = 2,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of one sample.")] = 128,
    batch: Annotated[int, typer.Option(min=1, help="Most samples generated at the same time (max_num_seqs).")] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="Passes over all prompts and samples in each mode.")] = 3,
    temperature: Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0 is greedy.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the engines' random numbers.")] = 0,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Generate --max-tokens tokens always.")] = False,
    num_speculative_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most tokens drafted in one step; by default selfspec's own.")
    ] = None,
    drafter: Annotated[
        str | None,
        typer.Option(help='The drafter, such as {"weights": "int8"}; by default selfspec chooses.', metavar="JSON"),
    ] = None,
    control: Annotated[
        str | None,
        typer.Option(help='The draft length control, such as {"mode": "fixed"}.', metavar="JSON"),
    ] = None,
    only: Annotated[Only, typer.Option(help="Run both engines in alternation, or one of them.")] = Only.both,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Ray workers of each mode, in place of one engine process: an engine with --batch samples at a time "
            "each. On a CPU they share the cores, on GPUs each takes one.",
        ),
    ] = None,
    compile_: Annotated[
        bool, typer.Option("--compile/--enforce-eager", help="Use torch.compile in both engines, or in neither.")
    ] = True,
    max_model_len: Annotated[
        int | None, typer.Option(min=2, help="Longest prompt plus sample in tokens; by default what fits in memory.")
    ] = None,
    engine_args: Annotated[
        str | None,
        typer.Option(help='Further arguments of both engines, such as {"tensor_parallel_size": 2}.', metavar="JSON"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results; by default runs/rollout-<time>.", metavar="DIR")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the result as JSON on the last line.")] = False,
) -> None:
    """Generate prompts x samples with plain and with self-speculative decoding, and compare them.

    Both engines are up at the same time and take turns, round by round, so that a machine whose speed drifts treats
    them alike. On a GPU each gets 45 % of the memory: where that is too little, run --only plain and --only selfspec
    one after the other and compare the two results with `vllm-selfspec report`.

    With --workers N each mode is a pool of N Ray workers; their draft lengths, acceptance, utilisation and idle tails
    are printed after each round and written to workers.jsonl. Their prefix caches are off unless --engine-args says
    otherwise: nothing clears them between rounds.

    Every finished sample goes to samples.jsonl at once: Ctrl-C loses none of them.
    """
    from rich.console import Console

    from vllm_selfspec.commands.report import plot_runs, print_run
    from vllm_selfspec.models import resolve_model
    from vllm_selfspec.prompts import embedded_prompts, load_prompts
    from vllm_selfspec.provenance import provenance
    from vllm_selfspec.results import RolloutRun

    speculative_config = build_speculative_config(num_speculative_tokens, drafter, control)
    further = further_engine_args(engine_args)
    prompt_list = embedded_prompts() if prompts is None else load_prompts(prompts)
    console = Console(stderr=True)
    model_path = resolve_model(model, lambda message: console.print(f"[dim]{message}[/dim]"))
    folder = _make_folder(out)

    modes: list[Mode] = ["plain", "selfspec"] if only is Only.both else [only.value]  # type: ignore[list-item]  # StrEnum
    arguments: dict[str, Any] = {
        "model": model_path,
        "max_num_seqs": batch,
        "max_model_len": -1 if max_model_len is None else max_model_len,
        "seed": seed,
        "enforce_eager": not compile_,
        "disable_log_stats": False,  # the acceptance counters come from these statistics
    }
    if only is Only.both and workers is None and not _is_cpu():
        arguments["gpu_memory_utilization"] = _SHARED_GPU_FRACTION
    arguments |= further
    run = RolloutRun(
        provenance=provenance(),
        settings={
            "model": model,
            "prompts": "embedded" if prompts is None else str(prompts),
            "num_prompts": len(prompt_list),
            "n": n,
            "max_tokens": max_tokens,
            "batch": batch,
            "temperature": temperature,
            "seed": seed,
            "ignore_eos": ignore_eos,
            "compile": compile_,
            "workers": workers,
            "engine_args": further,
            "speculative_config": speculative_config,
        },
        startup_seconds={},
        rounds=[],
    )
    per_mode: dict[Mode, dict[str, Any]] = {
        mode: arguments | ({"speculative_config": speculative_config} if mode == "selfspec" else {}) for mode in modes
    }
    requests = [prompt | {"id": f"{p}-{s}"} for p, prompt in enumerate(prompt_list) for s in range(n)]
    sampling = {"temperature": temperature, "max_tokens": max_tokens, "ignore_eos": ignore_eos}
    samples_path = folder / _SAMPLES
    num_saved = 0
    try:
        with (
            _stop_signals(),
            _open_samples(samples_path) as samples,
            contextlib.closing(
                run_rounds(run, per_mode, requests, sampling, rounds, folder, console, workers)
            ) as finished,
        ):
            for sample in finished:
                _append(samples, sample)
                num_saved += 1
    except KeyboardInterrupt:
        run.interrupted = True
        _leave_interrupted(console, samples_path, num_saved)
    finally:
        if run.rounds:
            run.save(folder / _RUN)
    plot_runs([run], folder / _PLOT)
    print_run(run)
    console.print(
        f"Written to {folder}: {_RUN}, {_PLOT}, {_SAMPLES} ({num_saved} samples)", highlight=False, soft_wrap=True
    )
    if json_:
        print(json.dumps(run.summary() | {"folder": str(folder)}))


def build_speculative_config(
    num_speculative_tokens: int | None, drafter: str | None, control: str | None
) -> dict[str, Any]:
    """Return the `speculative_config` that the options stand for, checked as far as can be without a model.

    Raises:
        UsageError: for text that is no JSON object, and for what selfspec refuses.
    """
    from vllm_selfspec.config import ConfigError, SelfSpecConfig

    config: dict[str, Any] = {"method": "selfspec"}
    if num_speculative_tokens is not None:
        config["num_speculative_tokens"] = num_speculative_tokens
    for name, text in (("drafter", drafter), ("control", control)):
        if text is not None:
            config[name] = json_option(f"--{name}", text, dict)
    try:
        SelfSpecConfig.parse(config)
    except ConfigError as error:
        raise UsageError(str(error)) from None
    return config


def further_engine_args(text: str | None, *taken: str) -> dict[str, Any]:
    """The engine arguments of --engine-args.

    Args:
        taken: arguments that another option of the command sets, beside those of `rollout`.

    Raises:
        UsageError: it is no JSON object, or names what another option sets.
    """
    if text is None:
        return {}
    arguments = {name.replace("-", "_"): value for name, value in json_option("--engine-args", text, dict).items()}
    if refused := sorted(arguments.keys() & _SET_ELSEWHERE.union(taken)):
        raise UsageError(f"--engine-args: {', '.join(refused)} cannot be given there, the command sets it")
    return arguments


def json_option(option: str, text: str, kind: type[_Json]) -> _Json:
    """The JSON text of an option.

    Raises:
        UsageError: it is no JSON, or not of that kind, `dict` or `list`.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"{option}: not valid JSON ({error.msg} at column {error.colno}): {text}") from None
    if not isinstance(value, kind):
        wanted = "object in braces" if kind is dict else "array in brackets"
        raise UsageError(f"{option}: needs a JSON {wanted}, not {text}")
    return value


def run_rounds(
    run: "RolloutRun",
    engines_args: "dict[Mode, dict[str, Any]]",
    requests: list[dict[str, Any]],
    sampling: dict[str, Any],
    rounds: int,
    folder: Path,
    console: "Console",
    workers: int | None = None,
) -> "Generator[dict[str, Any], None, None]":
    """Start an engine (or a pool of `workers`) per mode, alternate, and add each finished round to `run`.

    Yields:
        Every sample as it finishes, as a record of the samples file.
    """
    from vllm_selfspec.engine_process import EngineProcess

    with contextlib.ExitStack() as stack:
        engines: dict[Mode, EngineProcess | EnginePool] = {}
        for mode, engine_args in engines_args.items():
            log_path = folder / f"engine-{mode}.log"
            compiling = "" if engine_args["enforce_eager"] else "the first start compiles for minutes; "
            what = (
                f"engine ({compiling}log: {log_path})" if workers is None else f"workers ({compiling}{workers} on Ray)"
            )
            starting = f"starting the {mode} {what}"
            if not console.is_terminal:
                console.print(starting, highlight=False, soft_wrap=True)
            with console.status(starting):
                # One after the other: start-up is when a CPU engine measures its memory and compiles.
                engine: EngineProcess | EnginePool
                if workers is None:
                    engine = EngineProcess(mode, engine_args, log_path)
                else:
                    engine = _make_pool(mode, engine_args, workers)
                stack.enter_context(engine)
                run.startup_seconds[mode] = engine.wait_ready()
            console.print(f"[dim]{mode} engine ready in {run.startup_seconds[mode]:.1f} s[/dim]", highlight=False)
            engines[mode] = engine
        for index in range(rounds):
            # Alternating who goes first: a steady drift of the machine favours neither.
            for mode, engine in list(engines.items())[:: 1 if index % 2 == 0 else -1]:
                title = f"round {index + 1}/{rounds} {mode}"
                finished, report = yield from _one_round(title, mode, index, engine, requests, sampling, console)
                run.rounds.append(finished)
                console.print(
                    f"{title}: {finished.num_samples} samples, {finished.num_tokens} tokens in "
                    f"{finished.seconds:.1f} s = {finished.tokens_per_second:.1f} tokens/s",
                    highlight=False,
                    soft_wrap=True,
                )
                if report is not None:
                    _print_workers(report, console)
                    with (folder / _WORKERS).open("a", encoding="utf-8") as lines:
                        lines.write(json.dumps({"mode": mode, "round": index, **report}) + "\n")


def _one_round(
    title: str,
    mode: "Mode",
    index: int,
    engine: "EngineProcess | EnginePool",
    requests: list[dict[str, Any]],
    sampling: dict[str, Any],
    console: "Console",
) -> "Generator[dict[str, Any], None, tuple[Round, dict[str, Any] | None]]":
    """Yields sample records; returns the round, and the pool's report where a pool made it."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from vllm_selfspec.results import Moment, Round, SpecCounts

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    num_tokens = 0
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=len(requests))
        for event in engine.generate(requests, sampling):
            if event["event"] == "done":
                break
            num_tokens += len(event["token_ids"])
            progress.advance(task)
            prompt_index, _, sample_index = event["id"].partition("-")
            yield {
                "mode": mode,
                "round": index,
                "prompt": int(prompt_index),
                "sample": int(sample_index),
                "finish_reason": event["finish_reason"],
                "seconds": round(event["seconds"], 4),
                "text": event["text"],
                "token_ids": event["token_ids"],
            }
    finished = Round(
        mode=mode,
        index=index,
        seconds=event["seconds"],
        num_samples=len(requests),
        num_tokens=num_tokens,
        spec=SpecCounts.model_validate(event["counters"]) if mode == "selfspec" else None,
        timeline=[Moment.model_validate(moment) for moment in event["timeline"]],
    )
    return finished, event.get("report")


def _make_pool(mode: "Mode", engine_args: dict[str, Any], workers: int) -> "EnginePool":
    try:
        import ray  # noqa: F401  # Ray is an optional dependency
    except ModuleNotFoundError:
        raise UsageError("--workers: needs Ray; run `pip install 'vllm-selfspec[ray]'`, or leave it out") from None
    from vllm_selfspec.engine_pool import EnginePool

    return EnginePool(mode, engine_args, workers)


def _print_workers(report: dict[str, Any], console: "Console") -> None:
    """Print a pool's report of one round, a line per worker."""
    for worker in report["workers"]:
        acceptance = "-" if worker["acceptance"] is None else f"{worker['acceptance']:.3f}"
        console.print(
            f"  worker {worker['worker_id']}: {worker['samples']} samples, {worker['generated_tokens']} tokens, "
            f"γ {worker['draft_length']:.2f}, acceptance {acceptance}, utilisation {worker['utilisation']:.0%} "
            f"(places filled {worker['occupancy']:.0%}), idle at the end {worker['idle_tail_s']:.2f} s",
            highlight=False,
            soft_wrap=True,
        )
    console.print(
        f"  tail {report['tail_s']:.2f} s ({report['tail_fraction']:.0%} of the round), {report['moved_samples']} "
        f"samples moved to idle workers, {report['restarts']} restarts",
        highlight=False,
        soft_wrap=True,
    )


def _make_folder(out: Path | None) -> Path:
    folder = out or Path("runs") / time.strftime("rollout-%Y%m%d-%H%M%S")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out: the folder {folder} cannot be made ({error.strerror})") from None
    if (folder / _SAMPLES).exists():
        raise UsageError(f"--out: {folder} already holds {_SAMPLES}; name another folder")
    return folder


def _open_samples(path: Path) -> io.FileIO:
    try:
        return io.FileIO(path, "w")
    except OSError as error:
        raise UsageError(f"--out: {path} cannot be written ({error.strerror})") from None


def _append(samples: io.FileIO, record: dict[str, Any]) -> None:
    """Write one line, unbuffered: a line that does not fit on the disk is taken back whole."""
    line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
    position = samples.tell()
    try:
        while line:
            line = line[samples.write(line) :]
    except OSError as error:
        with contextlib.suppress(OSError):
            samples.truncate(position)
        raise EngineError(
            f"{samples.name} cannot be written ({error.strerror}); the samples finished before are in it"
        ) from None


@contextlib.contextmanager
def _stop_signals() -> Iterator[None]:
    """Have a SIGTERM end the run in the same orderly way as Ctrl-C."""

    def interrupt(signum: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _leave_interrupted(console: "Console", samples_path: Path, num_saved: int) -> NoReturn:
    console.print(f"Interrupted: {num_saved} finished samples are in {samples_path}", highlight=False, soft_wrap=True)
    sys.exit(130)


def _is_cpu() -> bool:
    from vllm_selfspec.engine_env import is_cpu_platform

    return is_cpu_platform()
