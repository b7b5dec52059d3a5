"""The simulator: bookkeeping that must hold exactly, the reference's rules, and the ranking of policies."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from vllm_selfspec.commands.calibrate import calibrate
from vllm_selfspec.commands.simulate import simulate
from vllm_selfspec.config import DrafterConfig
from vllm_selfspec.control.cost_model import CostModel, Point
from vllm_selfspec.control.policy import StepObservation, StepState
from vllm_selfspec.control.simulate import (
    Clock,
    FixedPolicy,
    PlainPolicy,
    Policy,
    ReferencePolicy,
    Workload,
    compare,
    predict_recorded,
    rollout_workload,
    sample_lengths,
    scale_cost_model,
    simulate_rollout,
    standard_policies,
)
from vllm_selfspec.errors import UsageError

PROFILE = Path(__file__).parents[2] / "configs" / "profiles" / "a100_qwen2.5-7b.json"


@pytest.fixture(scope="module")
def a100() -> CostModel:
    return CostModel.from_profile(PROFILE)


@pytest.mark.parametrize("policy", [PlainPolicy(), FixedPolicy(3)], ids=["plain", "fixed"])
def test_every_token_is_generated_once(a100: CostModel, policy: Policy) -> None:
    rng = np.random.default_rng(0)
    lengths = sample_lengths(50, rng, median=60, sigma=1.0, longest=300)
    work = rollout_workload(lengths, rng, acceptance=0.8, max_num_seqs=16, arrival_rate=200.0)
    outcome = simulate_rollout(work, policy, Clock(a100, 7, 0.0, rng), rng)
    assert outcome.tokens == lengths.sum()
    assert sum(outcome.draft_lengths.values()) == outcome.steps
    assert max(batch for _, batch, _ in outcome.timeline) <= 16
    assert outcome.makespan >= work.arrivals[-1]


def test_plain_decoding_takes_one_step_per_token_of_its_true_time(a100: CostModel) -> None:
    rng = np.random.default_rng(0)
    work = rollout_workload([100], rng, acceptance=0.5, prompt_tokens=1024)
    clock = Clock(a100, 3, 0.0, rng)
    outcome = simulate_rollout(work, PlainPolicy(), clock, rng)
    assert outcome.steps == 100  # the prefill step samples the first token
    assert outcome.makespan == pytest.approx(99 * a100.target_time(1, 1060), rel=0.05 + 2 / 100)


def test_accepted_drafts_follow_the_acceptance(a100: CostModel) -> None:
    rng = np.random.default_rng(0)
    work = rollout_workload([4000] * 4, rng, acceptance=0.7)
    outcome = simulate_rollout(work, FixedPolicy(2), Clock(a100, 3, 0.0, rng), rng)
    assert outcome.accepted / outcome.drafted == pytest.approx((0.7 + 0.49) / 2, abs=0.02)


def _two_views(draft: float, light: float) -> CostModel:
    points = [Point(kind, b, 512, 0, s) for kind, s in (("draft", draft), ("light", light)) for b in (1, 4, 16)]
    points += [Point("verify" if g else "target", b, 512, g, 0.010) for b in (1, 4, 16) for g in (0, 1, 3, 7)]
    return CostModel.fit(points)


def test_the_light_view_is_faster_and_rejected_more_often() -> None:
    class Light(FixedPolicy):
        def choose(self, state: StepState) -> tuple[int, bool]:
            return self.num_draft_tokens, True

    rng = np.random.default_rng(0)
    cost = _two_views(0.006, 0.003)
    work = rollout_workload([4000] * 4, rng, acceptance=0.9, rejection_ratio=3.0)
    main, light = (simulate_rollout(work, policy(2), Clock(cost, 3, 0.0, rng), rng) for policy in (FixedPolicy, Light))
    assert main.accepted / main.drafted == pytest.approx((0.9 + 0.81) / 2, abs=0.02)
    assert light.accepted / light.drafted == pytest.approx((0.7 + 0.49) / 2, abs=0.02)
    assert main.makespan / main.steps == pytest.approx(0.022, rel=0.05)
    assert light.makespan / light.steps == pytest.approx(0.016, rel=0.05)


@pytest.mark.parametrize("rejection_ratio", [1.2, 5.0])
def test_ours_finds_the_better_view(rejection_ratio: float) -> None:
    cost = _two_views(0.006, 0.004)

    def workload(rng: np.random.Generator) -> Workload:
        return rollout_workload([2000] * 4, rng, acceptance=0.92, rejection_ratio=rejection_ratio)

    policies = standard_policies(cost, max_draft_tokens=7, acceptance=0.92, rejection_ratio=rejection_ratio)
    results = {r.name: r.rollout_seconds for r in compare(cost, workload, policies, max_draft_tokens=7, rollouts=2)}
    assert results["selfspec"] < 1.04 * results["oracle"]


def test_the_reference_latches_late_and_never_lets_go(a100: CostModel) -> None:
    reference = ReferencePolicy(a100)
    reference.start_rollout()
    assert reference.choose(StepState(num_decode=1, mean_context=1000))[0] == 0  # never saw more than 32
    assert reference.choose(StepState(num_decode=128, mean_context=1000))[0] == 0
    assert reference.choose(StepState(num_decode=64, mean_context=1000))[0] == 0
    assert reference.choose(StepState(num_decode=4, mean_context=1000))[0] == 5
    assert reference.choose(StepState(num_decode=128, mean_context=1000))[0] == 5  # under load too
    reference.start_rollout()
    assert reference.choose(StepState(num_decode=4, mean_context=1000))[0] == 0


def test_the_reference_climbs_after_two_good_rollouts_and_steps_down_after_two_bad_ones(a100: CostModel) -> None:
    reference = ReferencePolicy(a100)
    seen = StepObservation(0.01, 4, 1000, 5, 5)

    def rollout(share: float) -> int:
        reference.start_rollout()
        reference.choose(StepState(num_decode=64))
        gamma, _ = reference.choose(StepState(num_decode=1, mean_context=500))
        drafted = np.full(100, gamma)
        reference.observe(seen, drafted, np.round(share * drafted).astype(np.int64), False)
        return gamma

    assert [rollout(1.0) for _ in range(5)] == [5, 5, 7, 7, 9]
    assert [rollout(0.8) for _ in range(4)] == [9, 9, 7, 7]


def test_ours_beats_the_reference_and_stays_near_the_oracle(a100: CostModel) -> None:
    """Simulated, at the paper's setting: 128 requests, long tail to 8k, acceptance 0.98."""

    def work(rng: np.random.Generator) -> object:
        return rollout_workload(sample_lengths(128, rng, median=1000, sigma=1.0, longest=8192), rng, acceptance=0.98)

    results = compare(a100, work, standard_policies(a100), max_draft_tokens=11, rollouts=2)  # type: ignore[arg-type]
    seconds = {result.name: result.rollout_seconds for result in results}
    assert seconds["selfspec"] < seconds["latch + ladder"]
    assert seconds["selfspec"] < 0.82 * seconds["plain"]
    assert seconds["selfspec"] < 1.03 * seconds["oracle"]
    assert seconds["selfspec"] < min(value for name, value in seconds.items() if name.startswith("fixed"))


def test_a_recorded_rollout_is_predicted(a100: CostModel) -> None:
    recording = {"output_lengths": [200, 100], "mode": "plain", "makespan": 4.0}
    found = predict_recorded(recording, a100)
    assert found["simulated"] is True
    assert found["predicted_steps"] == 200
    assert found["error"] == pytest.approx(found["predicted_makespan"] / 4.0 - 1.0)
    fixed = predict_recorded({**recording, "mode": "fixed", "num_speculative_tokens": 3, "acceptance": 0.95}, a100)
    assert fixed["predicted_makespan"] < found["predicted_makespan"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"output_lengths": None}, "output_lengths of the recording is wrong"),
        ({"output_lengths": []}, "output_lengths of the recording is wrong"),
        ({"output_lengths": 5}, "output_lengths of the recording is wrong"),
        ({"output_lengths": [1, 2.5]}, "output_lengths.1 of the recording is wrong"),
        ({"output_lengths": [0]}, "output_lengths.0 of the recording is wrong"),
        ({"prompt_lengths": [3, 4, 5]}, "prompt_lengths of the recording has 3 entries and output_lengths 2"),
        ({"max_num_seqs": 0}, "max_num_seqs of the recording is wrong"),
        ({"acceptance": [0.9, 0.8]}, "acceptance of the recording is wrong"),
        ({"makespan": 0}, "makespan of the recording is wrong"),
        ({"mode": "magic"}, "mode of the recording is wrong: input should be 'plain', 'fixed' or 'adaptive'"),
    ],
)
def test_a_damaged_recording_is_one_sentence(change: dict, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "recording.json"
    path.write_text(json.dumps({"output_lengths": [20, 10], "makespan": 4.0, **change}))
    with pytest.raises(UsageError, match=sentence):
        simulate(profile=PROFILE, recording=path)


def test_a_recording_that_is_no_object_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "recording.json").write_text("[200, 100]")
    with pytest.raises(UsageError, match="the recording is a list: give an object with output_lengths"):
        simulate(profile=PROFILE, recording=tmp_path / "recording.json")


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan")])
def test_an_impossible_arrival_rate_is_one_sentence(rate: float) -> None:
    with pytest.raises(UsageError, match=r"--arrival-rate: is .*; give requests per second above 0"):
        simulate(profile=PROFILE, arrival_rate=rate, rollouts=1, requests=2)


def test_the_controller_starts_from_what_an_engine_assumes(a100: CostModel) -> None:
    """It once started from 0.8 whatever drafts."""

    def priors(cost: CostModel) -> list[float]:
        policies = standard_policies(cost, max_draft_tokens=3)(Clock(cost, 3, 0.0, np.random.default_rng(0)))
        return policies["selfspec"].controller.acceptance.rates()  # type: ignore[attr-defined]

    assert priors(a100) == pytest.approx([0.9] * 3)  # a drafter of four bits, in words
    assert priors(_two_views(0.006, 0.003)) == pytest.approx([0.95] * 3)
    for drafter, prior in ({"weights": "int8"}, 0.95), ({"weights": "int4"}, 0.9), ({"exit_layer": 3}, 0.8):
        config = DrafterConfig.model_validate(drafter)
        named = CostModel.fit(a100.points[:60], meta={"drafter": f"{config.model_dump_json()} up to 7"})
        assert priors(named) == pytest.approx([prior] * 3)


def test_a_recorded_controller_goes_on_from_what_it_had_learned(a100: CostModel) -> None:
    recording = {"output_lengths": [6] * 16, "mode": "adaptive", "num_speculative_tokens": 3, "acceptance": 0.99}
    hopeless, hopeful = (predict_recorded({**recording, "acceptance_prior": prior}, a100) for prior in (0.01, 0.99))
    assert hopeful["predicted_steps"] < hopeless["predicted_steps"] == 6


def test_scaling_follows_the_roofline(a100: CostModel) -> None:
    double = scale_cost_model(a100, weights=2.0, compute=2.0, context=2.0)
    assert double.target_time(1, 512) == pytest.approx(2 * a100.target_time(1, 512), rel=0.1)
    assert double.verify_time(64, 512, 15) == pytest.approx(2 * a100.verify_time(64, 512, 15), rel=0.1)
    slower = scale_cost_model(a100, weights=1.0, compute=1.0, context=1.0, extra_seconds=0.003)
    assert slower.draft_time(1, 512) == pytest.approx(a100.draft_time(1, 512) + 0.003, rel=0.05)
    assert "SCALED" in slower.meta["source"]


def _app() -> typer.Typer:
    app = typer.Typer()
    app.command()(calibrate)
    app.command()(simulate)
    return app


def test_the_commands_write_what_they_say(tmp_path: Path) -> None:
    rows = ["model,batch,seq,gamma,mode,mean_ms,median_ms,std_ms"]
    for batch in (1, 4, 16):
        for seq in (256, 1024):
            rows.append(f"toy,{batch},{seq},0,target_decode,10,{10 + 0.1 * batch},0.1")
            for gamma in (1, 3):
                verify = 10 + 0.1 * batch * (gamma + 1)
                rows.append(f"toy,{batch},{seq},{gamma},target_verify,10,{verify},0.1")
                rows.append(f"toy,{batch},{seq},{gamma},drafter_decode,4,{4 + 0.05 * batch},0.1")
    (tmp_path / "sweep.csv").write_text("\n".join(rows) + "\n")
    profile = tmp_path / "profile.json"
    arguments = ["calibrate", "--from-sweep", str(tmp_path / "sweep.csv"), "--out", str(profile), "--cross-validate"]
    result = CliRunner().invoke(_app(), [*arguments, "--hardware", "box", "--json"])
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout.splitlines()[-1])
    assert figures["cross_validation"]["leave one γ out"]["cycle_mape"] < 0.1
    assert CostModel.from_profile(profile).meta["hardware"] == "box"

    out = tmp_path / "out"
    arguments = ["simulate", "--profile", str(profile), "--requests", "8", "--lengths", "longtail:30,1,100"]
    result = CliRunner().invoke(_app(), [*arguments, "--rollouts", "1", "--out", str(out), "--json"])
    assert result.exit_code == 0, result.output
    document: Mapping[str, object] = json.loads(result.stdout.splitlines()[-1])
    assert document["simulated"] is True
    saved = json.loads((out / "results.json").read_text())
    assert {"plain", "latch + ladder", "static table", "selfspec", "oracle"} <= {p["name"] for p in saved["policies"]}
    assert (out / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_results_are_never_overwritten(tmp_path: Path) -> None:
    for name, command in (("results.json", "simulate"), ("profile.json", "calibrate")):
        (tmp_path / name).write_text("precious")
        out = tmp_path if command == "simulate" else tmp_path / name
        short = ["--requests", "1", "--rollouts", "1"] if command == "simulate" else []
        result = CliRunner().invoke(_app(), [command, "--profile", str(PROFILE), "--out", str(out), *short])
        assert str(result.exception) == f"--out: {tmp_path / name} already exists; name another"
        assert (tmp_path / name).read_text() == "precious"


def test_wrong_options_are_refused(tmp_path: Path) -> None:
    assert CliRunner().invoke(_app(), ["calibrate"]).exit_code != 0
    wrong = ["simulate", "--profile", str(PROFILE), "--lengths", "longtail:oops"]
    result = CliRunner().invoke(_app(), wrong)
    assert result.exit_code != 0
    assert "--lengths" in str(result.exception)
