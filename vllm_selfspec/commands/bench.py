"""`vllm-selfspec bench`: plain decoding against each way of speculating, two engines at a time."""

from __future__ import annotations

import contextlib
import json
import random
import re
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_selfspec.bench.peers import DEFAULT_PEERS
from vllm_selfspec.errors import EngineError, UsageError
from vllm_selfspec.models import DEFAULT_MODEL

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from vllm_selfspec.bench.peers import Peer
    from vllm_selfspec.bench.results import BenchRun, Case, Measured, Pair, Side
    from vllm_selfspec.engine_process import EngineProcess

_RESULT, _PLOT = "bench.json", "bench.png"
_SHARED_GPU_FRACTION = 0.45
_WARM_UP_TOKENS = 8
_PROFILE_TOKENS = 64
# Rollouts are sampled: that is what they are for.
_ROLLOUT_TEMPERATURE = 1.0
_SYNTHETIC_PROMPT_TOKENS = 32


class DraftSampleMethod(StrEnum):
    """How vLLM's draft model picks its tokens."""

    greedy = "greedy"
    probabilistic = "probabilistic"


def bench(
    model: Annotated[str, typer.Option(help="Checkpoint folder or hub id.")] = DEFAULT_MODEL,
    peers: Annotated[
        str,
        typer.Option(
            help="What is compared with plain decoding: ngram, suffix, draft_model, draft_model_table, selfspec, "
            "int8, int4, exit, drafter, off. NAME@γ drafts γ tokens in every step; without it selfspec adapts.",
            metavar="LIST",
        ),
    ] = DEFAULT_PEERS,
    draft_model: Annotated[
        str | None, typer.Option(help="Smaller checkpoint that drafts in draft_model and draft_model_table.")
    ] = None,
    draft_sample_method: Annotated[
        DraftSampleMethod, typer.Option(help="How that model picks its tokens.")
    ] = DraftSampleMethod.greedy,
    table: Annotated[
        str | None,
        typer.Option(
            help="Rows of draft_model_table: first and last batch size, draft tokens, such as [[1,2,3],[3,16,0]].",
            metavar="JSON",
        ),
    ] = None,
    exit_layer: Annotated[int | None, typer.Option(min=1, help="Layers that draft in the peer exit.")] = None,
    drafter: Annotated[
        str | None,
        typer.Option(help='The peer drafter, such as {"exit_layer": 20, "weights": "int8"}.', metavar="JSON"),
    ] = None,
    batches: Annotated[str, typer.Option(help="Requests at once; empty for none.", metavar="LIST")] = "1,2,4,8,16",
    temperatures: Annotated[str, typer.Option(help="Sampling temperatures; 0 is greedy.", metavar="LIST")] = "1,0",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each side in each case.")] = 5,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens of every request of a batch.")] = 96,
    prompts: Annotated[
        Path | None,
        typer.Option(help="JSON lines with `prompt` or `messages`; by default 16 embedded questions.", metavar="FILE"),
    ] = None,
    rollout: Annotated[
        bool, typer.Option("--rollout", help="Also a rollout: all prompts x samples, natural lengths, makespan.")
    ] = False,
    rollout_samples: Annotated[int, typer.Option(min=1, help="Samples per prompt of the rollout.")] = 4,
    rollout_batch: Annotated[int, typer.Option(min=1, help="Samples of the rollout generated at once.")] = 16,
    rollout_max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a sample of the rollout.")] = 512,
    rollout_rounds: Annotated[int, typer.Option(min=1, help="Rollouts of each side.")] = 3,
    profile: Annotated[
        bool, typer.Option(help="Also split the time of one cycle of plain and selfspec, in extra rounds.")
    ] = True,
    stock_peers: Annotated[
        bool, typer.Option("--stock-peers", help="Do not mend vLLM's own methods where they are broken on CPU.")
    ] = False,
    synthetic_acceptance: Annotated[
        float | None,
        typer.Option(
            min=0.0, max=1.0, help="Simulate: dummy weights, each draft accepted with this probability. CUDA only."
        ),
    ] = None,
    compile_: Annotated[
        bool, typer.Option("--compile/--enforce-eager", help="Use torch.compile in every engine, or in none.")
    ] = True,
    dtype: Annotated[str, typer.Option(help="Of weights and activations, in every engine: as of vLLM.")] = "auto",
    max_model_len: Annotated[
        int | None, typer.Option(min=2, help="Longest prompt plus sample in tokens; by default what fits in memory.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the engines' random numbers.")] = 0,
    engine_args: Annotated[
        str | None,
        typer.Option(help='Further arguments of every engine, such as {"tensor_parallel_size": 2}.', metavar="JSON"),
    ] = None,
    merge: Annotated[
        list[Path] | None,
        typer.Option(help="Measure nothing; put saved bench.json files (repeat the option) into one.", metavar="FILE"),
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(help="Also write the tables as Markdown into this file.", metavar="FILE.md")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results; by default runs/bench-<time>.", metavar="DIR")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the result as JSON on the last line.")] = False,
) -> None:
    """Compare ways of speculating with plain decoding.

    A plain engine and one peer's at a time run side by side and take turns, so that each ratio is against plain
    decoding of the same minute. Then plain and selfspec run once more with timers inside, each alone.

    A peer that cannot run here is in the result with the reason. Results are saved after every case: Ctrl-C keeps them.
    """
    from rich.console import Console

    from vllm_selfspec.bench import results
    from vllm_selfspec.bench.peers import Choices, choose_peers
    from vllm_selfspec.commands.rollout import _stop_signals, further_engine_args, json_option
    from vllm_selfspec.models import resolve_model
    from vllm_selfspec.prompts import embedded_prompts, load_prompts
    from vllm_selfspec.provenance import provenance

    console = Console(stderr=True)
    if merge:
        _finish(results.merge([results.BenchRun.load(path) for path in merge]), _folder(out), markdown, console, json_)
        return

    def say(message: str) -> None:
        console.print(f"[dim]{message}[/dim]", highlight=False)

    if synthetic_acceptance is not None:
        _check_synthetic(rollout)
    further = further_engine_args(engine_args, "dtype", "load_format", "worker_extension_cls")
    batch_sizes = _numbers("--batches", batches, int, lowest=1)
    heats = _numbers("--temperatures", temperatures, float, lowest=0)
    if batch_sizes and not heats:
        raise UsageError("--temperatures: names none; name some, such as 1,0")
    cases = [results.Case(kind="batch", batch=b, temperature=t) for t in heats for b in batch_sizes]
    if rollout and max(batch_sizes, default=0) > rollout_batch:
        # All samples are handed over at once, and the engine runs as many of them as the largest case.
        raise UsageError(
            f"--rollout-batch: is {rollout_batch}, but engines that run the {max(batch_sizes)} of --batches would run "
            "as many samples of the rollout; give at least that, or measure the rollout by itself with --batches ''"
        )
    if rollout:
        cases.append(results.Case(kind="rollout", batch=rollout_batch, temperature=_ROLLOUT_TEMPERATURE))
    if not cases:
        raise UsageError("--batches: names no batch size; name some, or add --rollout")
    ranks = [name for name in ("tensor_parallel_size", "pipeline_parallel_size") if further.get(name, 1) != 1]
    if profile and batch_sizes and ranks:
        raise UsageError(
            f"--engine-args: {' and '.join(ranks)} needs several processes, but the time split the whole model in one; "
            "add --no-profile"
        )
    choices = Choices(
        draft_model=None if draft_model is None else _resolve_draft_model(draft_model),
        draft_sample_method=draft_sample_method.value,
        table=None if table is None else json_option("--table", table, list),
        exit_layer=exit_layer,
        drafter=None if drafter is None else json_option("--drafter", drafter, dict),
        synthetic_acceptance=synthetic_acceptance,
    )
    chosen = choose_peers(peers, choices)
    prompt_list = embedded_prompts() if prompts is None else load_prompts(prompts)
    model_path = resolve_model(model, say)
    arguments: dict[str, Any] = {
        "model": model_path,
        "max_num_seqs": max(case.batch for case in cases),
        "max_model_len": -1 if max_model_len is None else max_model_len,
        "seed": seed,
        "dtype": dtype,
        "enforce_eager": not compile_,
        "disable_log_stats": False,  # the acceptance counters come from these statistics
    }
    if synthetic_acceptance is not None:
        arguments |= {"load_format": "dummy", "skip_tokenizer_init": True}
        prompt_list = _random_prompts(len(prompt_list), seed)
    run = results.BenchRun(
        simulated=synthetic_acceptance is not None,
        provenance=[provenance()],
        settings={
            "model": model,
            "peers": [peer.name for peer in chosen],
            "draft_model": draft_model,
            "batches": batch_sizes,
            "temperatures": heats,
            "rounds": rounds,
            "max_tokens": max_tokens,
            "prompts": "random" if synthetic_acceptance is not None else str(prompts or "embedded"),
            "num_prompts": len(prompt_list),
            "rollout": rollout,
            "rollout_samples": rollout_samples,
            "rollout_max_tokens": rollout_max_tokens,
            "profile": profile,
            "synthetic_acceptance": synthetic_acceptance,
            "stock_peers": stock_peers,
            "compile": compile_,
            "dtype": dtype,
            "max_model_len": max_model_len,
            "seed": seed,
            "engine_args": further,
        },
    )
    folder = _folder(out)
    bench_ = _Bench(
        run=run,
        folder=folder,
        console=console,
        engine_args=arguments | further,
        prompts=prompt_list,
        max_tokens=max_tokens,
        rounds={"batch": rounds, "rollout": rollout_rounds},
        rollout_samples=rollout_samples,
        rollout_max_tokens=rollout_max_tokens,
        mend_peers=not stock_peers,
        synthetic_acceptance=synthetic_acceptance,
    )
    try:
        with _stop_signals():
            bench_.measure(chosen, cases)
            if profile and batch_sizes:
                bench_.profile(chosen, [case for case in cases if case.kind == "batch"])
    except KeyboardInterrupt:
        run.interrupted = True
        console.print(f"Interrupted: what was measured is in {folder / _RESULT}", highlight=False, soft_wrap=True)
        sys.exit(130)
    finally:
        run.save(folder / _RESULT)
    _finish(run, folder, markdown, console, json_)
    if failed := dict.fromkeys(item.peer for item in run.skipped if item.failed):
        raise EngineError(f"{', '.join(failed)} could not be measured to the end; the rest is in {folder}")


@dataclass
class _Bench:
    """One run: what is measured, and where it goes."""

    run: BenchRun
    folder: Path
    console: Console
    engine_args: dict[str, Any]
    prompts: list[dict[str, Any]]
    max_tokens: int
    rounds: dict[str, int]
    rollout_samples: int
    rollout_max_tokens: int
    mend_peers: bool
    synthetic_acceptance: float | None

    def measure(self, peers: list[Peer], cases: list[Case]) -> None:
        """Run every peer beside one plain engine; peers that cannot run are noted with the reason."""
        runnable = [peer for peer in peers if peer.skip is None]
        for peer in peers:
            if peer.skip is not None:
                self._skip(peer.name, peer.skip, failed=False)
        if not runnable:
            return
        with _progress(self.console) as progress:
            total = sum(2 * self.rounds[case.kind] for case in cases) * len(runnable)
            task = progress.add_task("starting the plain engine", total=total)
            with self._start(None, shared=True) as plain:
                plain_startup = plain.wait_ready()
                for peer in runnable:
                    try:
                        self._measure_pair(peer, plain, plain_startup, cases, progress, task)
                    except _PeerError as error:
                        self._skip(peer.name, str(error), failed=error.failed)
                    self.run.save(self.folder / _RESULT)

    def _measure_pair(
        self,
        peer: Peer,
        plain: EngineProcess,
        plain_startup: float,
        cases: list[Case],
        progress: Progress,
        task: Any,
    ) -> None:
        from vllm_selfspec.bench.results import Pair

        mended = self.mend_peers and not peer.is_selfspec
        startup = {"plain": plain_startup}
        pair = Pair(peer=peer.name, speculative_config=peer.speculative_config, mended=mended, startup_seconds=startup)
        progress.update(task, description=f"{peer.name}: starting its engine")
        with contextlib.ExitStack() as stack:
            with _errors_of_peer(started=False):
                engine = stack.enter_context(self._start(peer, shared=True))
                startup["peer"] = engine.wait_ready()
            if mended:
                with _errors_of_peer(started=True):
                    engine.call("vllm_selfspec.bench.engine_side:mend")
            engines: dict[Side, EngineProcess] = {"plain": plain, "peer": engine}
            self.run.pairs.append(pair)
            for case in cases:
                self._measure_case(pair, case, engines, progress, task)
                self.run.save(self.folder / _RESULT)

    def _measure_case(
        self, pair: Pair, case: Case, engines: dict[Side, EngineProcess], progress: Progress, task: Any
    ) -> None:
        sides: list[Side] = ["plain", "peer"]
        for side in sides:  # first touch of this batch size: untimed
            with _errors_of_peer(started=True) if side == "peer" else contextlib.nullcontext():
                warm_up = self._sampling(case) | {"max_tokens": _WARM_UP_TOKENS, "ignore_eos": True}
                list(engines[side].generate(self._requests(case, 0)[: case.batch], warm_up))
        count = self.rounds[case.kind]
        for index in range(count):
            # Alternating who goes first: a steady drift of the machine favours neither.
            for side in sides if index % 2 == 0 else sides[::-1]:
                progress.update(task, description=f"{pair.peer}: {_case_text(case)}, round {index + 1}/{count} {side}")
                with _errors_of_peer(started=True) if side == "peer" else contextlib.nullcontext():
                    pair.rounds.append(self._one_round(engines[side], side, index, case))
                progress.advance(task)
        self.console.print(
            f"{pair.peer}: {_case_text(case)}: {self._figures(pair.peer, case)}", highlight=False, soft_wrap=True
        )

    def _one_round(self, engine: EngineProcess, side: Side, index: int, case: Case) -> Measured:
        from vllm_selfspec.bench.results import Measured
        from vllm_selfspec.results import SpecCounts

        requests = self._requests(case, index)
        *samples, done = engine.generate(requests, self._sampling(case))
        return Measured(
            side=side,
            index=index,
            case=case,
            seconds=done["seconds"],
            num_samples=len(samples),
            num_tokens=sum(len(sample["token_ids"]) for sample in samples),
            latency_seconds=statistics.fmean(sample["seconds"] / len(sample["token_ids"]) for sample in samples),
            spec=SpecCounts.model_validate(done["counters"]) if side == "peer" else None,
        )

    def _requests(self, case: Case, index: int) -> list[dict[str, Any]]:
        """Requests of one round: the same for both sides; batches take the next prompts each round."""
        if case.kind == "rollout":
            return [
                prompt | {"id": f"{number}-{sample}"}
                for number, prompt in enumerate(self.prompts)
                for sample in range(self.rollout_samples)
            ]
        numbers = [(index * case.batch + row) % len(self.prompts) for row in range(case.batch)]
        return [self.prompts[number] | {"id": f"{number}-{row}"} for row, number in enumerate(numbers)]

    def _sampling(self, case: Case) -> dict[str, Any]:
        if case.kind == "rollout":
            return {"temperature": case.temperature, "max_tokens": self.rollout_max_tokens}
        return {"temperature": case.temperature, "max_tokens": self.max_tokens, "ignore_eos": True}

    def profile(self, peers: list[Peer], cases: list[Case]) -> None:
        """Split the time of a cycle of plain decoding and of every selfspec peer that was measured.

        Where that fails, the reason is noted and the next one has its turn.
        """
        measured = set(self.run.peers())
        engines: list[Peer | None] = [None, *(p for p in peers if p.is_selfspec and p.name in measured)]
        for peer in engines:
            name = "plain" if peer is None else peer.name
            try:
                self._split(peer, name, cases)
            except (UsageError, EngineError) as error:
                self._skip(name, f"time split: {error}", failed=True)

    def _split(self, peer: Peer | None, name: str, cases: list[Case]) -> None:
        from vllm_selfspec.bench.results import Split

        with (
            self.console.status(f"time split of {name}"),
            self._start(peer, shared=False) as engine,
        ):
            engine.wait_ready()
            bandwidth = engine.call("vllm_selfspec.bench.cycles:memory_bandwidth")
            for case in cases:
                sampling = self._sampling(case) | {"max_tokens": min(self.max_tokens, _PROFILE_TOKENS)}
                requests = self._requests(case, 0)
                found = engine.call("vllm_selfspec.bench.cycles:profile", requests=requests, sampling=sampling)
                split = Split.model_validate(found | {"name": name, "case": case, "bandwidth": bandwidth})
                self.run.splits.append(split)
        self.console.print(
            f"time split of {name}: {len(cases)} cases, memory {bandwidth / 1e9:.1f} GB/s", highlight=False
        )

    def _start(self, peer: Peer | None, *, shared: bool) -> EngineProcess:
        """Start an engine: beside another one and in vLLM's own processes (shared), or alone and in one process."""
        from vllm_selfspec.bench.engine_side import WORKER_EXTENSION
        from vllm_selfspec.engine_env import is_cpu_platform
        from vllm_selfspec.engine_process import EngineProcess

        prepare = None
        fraction = {"gpu_memory_utilization": _SHARED_GPU_FRACTION} if shared and not is_cpu_platform() else {}
        arguments = fraction | self.engine_args
        if peer is not None:
            arguments["speculative_config"] = peer.speculative_config
            if not peer.is_selfspec:
                arguments["worker_extension_cls"] = WORKER_EXTENSION
            elif self.synthetic_acceptance is not None:
                function = "vllm_selfspec.bench.engine_side:use_synthetic_acceptance"
                prepare = (function, {"rate": self.synthetic_acceptance})
        name = "plain" if peer is None else peer.name
        kind = "" if shared else "-profile"
        log_path = self.folder / f"engine-{re.sub(r'[^a-z0-9_]+', '-', name)}{kind}.log"
        return EngineProcess(name, arguments, log_path, prepare=prepare, one_process=not shared)

    def _skip(self, peer: str, reason: str, *, failed: bool) -> None:
        from vllm_selfspec.bench.results import Skipped

        self.run.skipped.append(Skipped(peer=peer, reason=reason, failed=failed))
        self.console.print(f"{peer}: {'failed' if failed else 'skipped'}: {reason}", highlight=False, soft_wrap=True)

    def _figures(self, peer: str, case: Case) -> str:
        row = self.run.row(peer, case)
        assert row is not None
        unit = "tokens/s" if case.kind == "batch" else "s"
        spread = f"{row.ratio:.2f}x ({min(row.ratios):.2f}-{max(row.ratios):.2f})"
        accepted = row.spec.acceptance_per_token
        acceptance = "" if accepted is None else f", {accepted:.3f} of the drafts accepted"
        return f"plain {row.plain:.1f}, peer {row.peer:.1f} {unit}, {spread}{acceptance}"


class _PeerError(Exception):
    """A peer's engine died (`failed`), or refused to start because it cannot run here."""

    def __init__(self, message: str, failed: bool) -> None:
        super().__init__(message)
        self.failed = failed


@contextlib.contextmanager
def _errors_of_peer(*, started: bool) -> Iterator[None]:
    try:
        yield
    except (UsageError, EngineError) as error:
        raise _PeerError(str(error), failed=started or isinstance(error, EngineError)) from error


def _check_synthetic(rollout: bool) -> None:
    from vllm_selfspec.engine_env import is_cpu_platform

    if is_cpu_platform():
        raise UsageError(
            "--synthetic-acceptance: vLLM's synthetic rejection sampler has no CPU kernels; leave the option out, or "
            "run on a CUDA machine"
        )
    if rollout:
        raise UsageError("--rollout: dummy weights end no sample; leave it out with --synthetic-acceptance")


def _random_prompts(count: int, seed: int) -> list[dict[str, Any]]:
    dice = random.Random(seed)
    # Small ids are in every vocabulary.
    return [
        {"prompt_token_ids": [dice.randrange(1, 1000) for _ in range(_SYNTHETIC_PROMPT_TOKENS)]} for _ in range(count)
    ]


def _resolve_draft_model(name: str) -> str:
    from vllm_selfspec.models import resolve_model

    try:
        return resolve_model(name)
    except UsageError as error:
        raise UsageError(str(error).replace("--model", "--draft-model")) from None


def _numbers(option: str, text: str, kind: Any, lowest: float) -> list[Any]:
    try:
        numbers = [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise UsageError(f"{option}: needs numbers with commas between them, not {text}") from None
    if any(not lowest <= number < float("inf") for number in numbers) or len(set(numbers)) < len(numbers):
        raise UsageError(f"{option}: needs different numbers from {lowest:g} on, not {text}")
    return numbers


def _case_text(case: Case) -> str:
    if case.kind == "rollout":
        return f"rollout, {case.batch} at once"
    return f"B = {case.batch}, temperature {case.temperature:g}"


def _progress(console: Console) -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _folder(out: Path | None) -> Path:
    folder = out or Path("runs") / time.strftime("bench-%Y%m%d-%H%M%S")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out: the folder {folder} cannot be made ({error.strerror})") from None
    if (folder / _RESULT).exists():
        raise UsageError(f"--out: {folder} already holds {_RESULT}; name another folder")
    return folder


def _finish(run: BenchRun, folder: Path, markdown_path: Path | None, console: Console, json_: bool) -> None:
    """Save, draw and print a result."""
    from vllm_selfspec.bench.report import markdown, plot

    run.save(folder / _RESULT)
    text = markdown(run)
    print(text)
    written = [str(folder / _RESULT)]
    if run.rows() or run.splits:
        plot(run, folder / _PLOT)
        written.append(str(folder / _PLOT))
    if markdown_path is not None:
        try:
            markdown_path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UsageError(f"--markdown: {markdown_path} cannot be written ({error.strerror})") from None
        written.append(str(markdown_path))
    console.print(f"Written: {', '.join(written)}", highlight=False, soft_wrap=True)
    if json_:
        print(json.dumps(run.summary() | {"folder": str(folder)}))
