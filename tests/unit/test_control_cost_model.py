"""The cost model: shape, extrapolation, few points, profiles, and cross-validation of the shipped sweep."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_selfspec.control.calibrate import cross_validate, profile_from_sweep, read_constants, read_sweep
from vllm_selfspec.control.cost_model import CostModel, Point, check_profile

PROFILE = Path(__file__).parents[2] / "configs" / "profiles" / "a100_qwen2.5-7b.json"


@pytest.fixture(scope="module")
def a100() -> CostModel:
    return CostModel.from_profile(PROFILE)


def _cpu_seconds(component: str, batch: int, gamma: int) -> float:
    """A machine whose linear layers scale with rows and switch kernel above 4 rows."""
    rows = batch * (gamma + 1) if component != "draft" else batch
    per_row = 0.8 if rows > 4 else 1.0
    scale = 0.55 if component == "draft" else 1.0
    return scale * (0.030 + 0.004 * rows * per_row)


def _cpu_points() -> list[Point]:
    points = [Point("draft", batch, 128, 0, _cpu_seconds("draft", batch, 0)) for batch in (1, 4, 16)]
    for batch in (1, 4, 16):
        for gamma in (0, 1, 3):
            kind = "verify" if gamma else "target"
            points.append(Point(kind, batch, 128, gamma, _cpu_seconds(kind, batch, gamma)))
    return points


@given(
    batches=st.tuples(st.integers(1, 5000), st.integers(1, 5000)),
    seq=st.integers(1, 300_000),
    gamma=st.integers(0, 40),
)
@settings(deadline=None, max_examples=150)
def test_times_are_positive_and_never_fall_with_the_batch(
    a100: CostModel, batches: tuple[int, int], seq: int, gamma: int
) -> None:
    few, many = min(batches), max(batches)
    for time in (a100.target_time, a100.draft_time, lambda b, s: a100.verify_time(b, s, gamma)):
        assert 0.0 < time(few, seq) <= time(many, seq) * (1 + 1e-12)


@given(gammas=st.tuples(st.integers(1, 60), st.integers(1, 60)), batch=st.integers(1, 512), seq=st.integers(64, 9000))
@settings(deadline=None, max_examples=100)
def test_verification_never_gets_cheaper_by_more_drafts(
    a100: CostModel, gammas: tuple[int, int], batch: int, seq: int
) -> None:
    assert a100.verify_time(batch, seq, min(gammas)) <= a100.verify_time(batch, seq, max(gammas)) * (1 + 1e-12)


def test_scalars_arrays_and_broadcasting_agree(a100: CostModel) -> None:
    batch, seq, gamma = np.array([1, 5, 64]), np.array([100, 1000, 3000]), np.array([[0], [3]])
    grid = a100.cycle_time(batch, seq, gamma)
    assert grid.shape == (2, 3)
    for column in range(3):
        for row in range(2):
            one = a100.cycle_time(int(batch[column]), int(seq[column]), int(gamma[row, 0]))
            assert isinstance(one, float)
            assert one == pytest.approx(grid[row, column])
    times = a100.step_times(5, 1000, 7)
    assert times.verify[3] == pytest.approx(a100.verify_time(5, 1000, 3))
    assert times.verify[0] == pytest.approx(a100.target_time(5, 1000))
    assert times.draft == pytest.approx(a100.draft_time(5, 1000))


def test_speedup_is_tau_times_plain_over_cycle(a100: CostModel) -> None:
    plain, draft, verify = a100.target_time(2, 500), a100.draft_time(2, 500, 3), a100.verify_time(2, 500, 3)
    assert a100.speedup(2, 500, 3, 3.5) == pytest.approx(3.5 * plain / (3 * draft + verify))


def test_far_outside_the_grid_the_roofline_extrapolates(a100: CostModel) -> None:
    """Four times the rows cost about four times as much once compute-bound, and KV reads keep growing with context."""
    assert 2.5 < a100.verify_time(256, 1024, 15) / a100.verify_time(64, 1024, 15) < 5.0
    assert a100.target_time(64, 64_000) > 1.5 * a100.target_time(64, 4096)


def test_twelve_live_points_are_reproduced_and_interpolated() -> None:
    model = CostModel.fit(_cpu_points())
    for point in model.points:
        assert model.verify_time(point.batch, 128, point.num_draft_tokens) > 0
    for batch, gamma in ((1, 0), (1, 3), (4, 1), (16, 0), (16, 3)):
        kind = "verify" if gamma else "target"
        assert model.verify_time(batch, 128, gamma) == pytest.approx(_cpu_seconds(kind, batch, gamma), rel=0.06)
    for batch, gamma in ((2, 1), (8, 1), (8, 3), (2, 2)):
        assert model.verify_time(batch, 128, gamma) == pytest.approx(_cpu_seconds("verify", batch, gamma), rel=0.25)


def test_a_measured_prefill_sets_the_cost_of_prompt_rows() -> None:
    points = _cpu_points()
    prefills = [Point("prefill", 1, 32, 0, 0.05), Point("prefill", 4, 32, 0, 0.128)]
    plain, model = CostModel.fit(points), CostModel.fit(points + prefills)
    assert model.prefill_time(100) == pytest.approx(0.1)  # the largest counts
    assert model.step_times(1, 128, 3).per_row == pytest.approx(0.001)
    assert CostModel.from_dict(model.to_dict()).prefill_time(100) == pytest.approx(0.1)
    assert model.verify_time(4, 128, 3) == pytest.approx(plain.verify_time(4, 128, 3), rel=0.002)


def test_prompts_say_what_many_rows_cost_where_few_were_measured() -> None:
    """A start whose time was up after two requests, on the CPU with AMX: all that it measured waits for memory."""
    points = [Point("draft", batch, 128, 4, 0.012) for batch in (1, 2)]
    for batch, plain, verify, prompts in (
        (1, 0.063, {1: 0.065, 3: 0.069, 7: 0.074}, 0.100),
        (2, 0.064, {1: 0.067, 3: 0.073, 7: 0.086}, 0.150),
    ):
        points += [Point("target", batch, 128, 0, plain), Point("prefill", batch, 32, 0, prompts)]
        points += [Point("verify", batch, 128, drafts, seconds) for drafts, seconds in verify.items()]
    whole = {(8, 3): 0.103, (16, 0): 0.083, (16, 3): 0.139}  # what a profile says that was measured up to sixteen
    for model in (CostModel.fit(points), CostModel.from_dict(CostModel.fit(points).to_dict())):
        for (batch, drafts), seconds in whole.items():
            assert model.verify_time(batch, 128, drafts) == pytest.approx(seconds, rel=0.4)


def test_a_missing_component_is_refused() -> None:
    with pytest.raises(ValueError, match="no draft time"):
        CostModel.fit([Point("target", 1, 128, 0, 0.01)])


@pytest.mark.parametrize(
    "bad",
    [{"component": "warm-up"}, {"batch": 0}, {"seq": 0}, {"seconds": 0.0}, {"seconds": float("nan")}],
)
def test_impossible_points_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="point"):
        replace(Point("target", 1, 128, 0, 0.01), **bad)  # type: ignore[arg-type]


def test_a_profile_survives_saving(tmp_path: Path) -> None:
    model = CostModel.fit(_cpu_points(), meta={"model": "toy"})
    model.save(tmp_path / "sub" / "profile.json")
    again = CostModel.from_profile(tmp_path / "sub" / "profile.json")
    assert again.meta == {"model": "toy"}
    assert again.points == model.points
    assert again.cycle_time(7, 300, 2) == pytest.approx(model.cycle_time(7, 300, 2), rel=1e-9)


def test_unusable_profiles_are_errors(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    with pytest.raises(ValueError, match=r"p\.json cannot be read"):
        CostModel.from_profile(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        CostModel.from_profile(path)
    profile = CostModel.fit(_cpu_points()).to_dict()
    path.write_text(json.dumps({**profile, "schema_version": 99}))
    with pytest.raises(ValueError, match="schema_version"):
        CostModel.from_profile(path)
    del profile["model"]
    path.write_text(json.dumps(profile))
    with pytest.raises(ValueError, match="not one of ours"):
        CostModel.from_profile(path)


@pytest.mark.parametrize("text", ["[1, 2]", "7", "null", '"a text"'])
def test_a_profile_that_is_no_object_is_one_sentence(text: str, tmp_path: Path) -> None:
    (tmp_path / "profile.json").write_text(text)
    with pytest.raises(ValueError, match=r"control.profile .*profile.json: the profile is a \w+ and no object"):
        CostModel.from_profile(tmp_path / "profile.json")


def test_a_profile_in_another_encoding_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "profile.json").write_bytes(b'{"model": "caf\xe9"}')
    with pytest.raises(ValueError, match=r"control.profile .*profile.json cannot be read"):
        CostModel.from_profile(tmp_path / "profile.json")


def test_profiles_of_another_engine_are_refused() -> None:
    meta = {"model": "A", "hardware": "X", "drafter": "int8"}
    check_profile(meta, {"model": "A", "hardware": "X", "drafter": None})
    for name in meta:
        with pytest.raises(ValueError, match=f"control.profile was measured for {name}"):
            check_profile(meta, {name: "other"})


def test_the_shipped_profile_predicts_a_draft_length_that_it_did_not_see(a100: CostModel) -> None:
    """Refitted from the points inside the profile."""
    left_out = cross_validate(a100.points, a100.constants, leave_out="gamma")
    assert left_out.num_points == 178
    assert left_out.cycle_mape <= 0.025
    assert left_out.regret <= 0.004
    assert left_out.sign_accuracy >= 0.98


def test_the_shipped_profile_predicts_a_batch_size_that_it_did_not_see(a100: CostModel) -> None:
    """Sign accuracy is held at what is reached, not at its target of 98 %: see docs/control.md."""
    left_out = cross_validate(a100.points, a100.constants, leave_out="batch")
    assert left_out.cycle_mape <= 0.035
    assert left_out.regret <= 0.005
    assert left_out.sign_accuracy >= 0.975


def test_cross_validation_sees_a_broken_model(a100: CostModel) -> None:
    """A model that doubles draft times must look bad, or the figures above prove nothing."""

    def broken(points: list[Point]) -> CostModel:
        return CostModel.fit([replace(p, seconds=2 * p.seconds) if p.component == "draft" else p for p in points])

    found = cross_validate(a100.points, leave_out="nothing", fit=broken)
    assert found.draft_mape > 0.8
    assert found.sign_accuracy < 0.9
    assert found.regret > 0.02


def _gpu_seconds(component: str, batch: int, seq: int, gamma: int, tile: int, *, padded: bool) -> float:
    """A GPU whose GEMMs compute whole tiles of rows, with attention after them."""
    if component == "draft":
        rows = math.ceil(batch / (gamma + 1)) * (gamma + 1) if padded else batch
        return 4e-3 + 1.2e-4 * tile * math.ceil(rows / tile) + 2e-8 * batch * seq
    rows = batch * (gamma + 1)
    attention = max(1.2e-8 * batch, 6e-7 if gamma else 0.0) * seq
    return max(9e-3, 6e-5 * tile * math.ceil(rows / tile)) + attention


def _gpu_points(tile: int, *, padded: bool = True) -> list[Point]:
    batches, seqs, gammas = (1, 2, 4, 8, 16, 24, 32, 48, 64), (256, 1024, 4096), (3, 5, 8)
    where = [("target", b, s, 0) for b in batches for s in seqs]
    where += [(kind, b, s, g) for b in batches for s in seqs for g in gammas for kind in ("verify", "draft")]
    draft_tile = min(tile, 16)
    return [
        Point(kind, b, s, g, _gpu_seconds(kind, b, s, g, draft_tile if kind == "draft" else tile, padded=padded), 0.005)
        for kind, b, s, g in where
    ]


@pytest.mark.parametrize("tile", [64, 128])
def test_times_jump_where_another_tile_of_rows_begins(tile: int) -> None:
    """At row counts that were not measured, right before and right after a boundary."""
    model = CostModel.fit(_gpu_points(tile))
    for batch, gamma in ((64, 3), (20, 15), (24, 15), (24, 12), (40, 11)):
        expected = _gpu_seconds("verify", batch, 1024, gamma, tile, padded=True)
        assert model.verify_time(batch, 1024, gamma) == pytest.approx(expected, rel=0.08)
    # 32 rows more than 256 begin one more tile
    within = model.verify_time(48, 1024, 5) / model.verify_time(64, 1024, 3)
    assert within == pytest.approx(math.ceil(288 / tile) / math.ceil(256 / tile), rel=0.08)


@pytest.mark.parametrize("padded", [False, True])
def test_padded_drafts_are_recognised(padded: bool) -> None:
    model = CostModel.fit(_gpu_points(64, padded=padded))
    assert model.to_dict()["model"]["draft"]["padded_to_cycle"] == padded
    # 16 requests fill 18 rows of a cycle of 9, another tile
    ratio = model.draft_time(16, 256, 8) / model.draft_time(16, 256, 3)
    assert ratio == pytest.approx(1.32 if padded else 1.0, abs=0.05)


def test_points_that_contradict_all_others_are_not_followed() -> None:
    """Sweeps hold medians of steps in which half of the requests had not arrived yet."""
    true = _gpu_points(64)
    late = [
        replace(p, seconds=0.6 * p.seconds) if p.component == "draft" and p.batch * p.seq >= 196608 and n % 3 else p
        for n, p in enumerate(true)
    ]
    wrong = [was for was, now in zip(true, late, strict=True) if was != now]
    assert len(wrong) >= 4
    model = CostModel.fit(late)
    for point in wrong:
        predicted = model.draft_time(point.batch, point.seq, point.num_draft_tokens)
        assert predicted == pytest.approx(point.seconds, rel=0.12)
        assert predicted > 1.3 * 0.6 * point.seconds


def test_row_counts_that_say_nothing_of_tiles_assume_none() -> None:
    """Batch sizes of powers of two fit any tile: three requests must not be taken for four."""
    points = _cpu_points()
    model = CostModel.fit(points)
    for part in model.to_dict()["model"].values():
        assert [one["tile"] for one in part["tiles"]] == [1]


def test_a_light_view_has_times_of_its_own_and_keeps_them_in_the_profile() -> None:
    points = _cpu_points()
    alone = CostModel.fit(points)
    assert not alone.has_light_view
    assert alone.step_times(4, 64, 3).light == alone.step_times(4, 64, 3).draft
    lights = [replace(p, component="light", seconds=0.6 * p.seconds) for p in points if p.component == "draft"]
    model = CostModel.fit([*points, *lights])
    for again in (model, CostModel.from_dict(json.loads(json.dumps(model.to_dict())))):
        assert again.has_light_view
        assert again.light_time(4, 64) == pytest.approx(0.6 * again.draft_time(4, 64), rel=0.02)
        assert again.step_times(4, 64, 3).of_draft(True) == again.light_time(4, 64)
        assert again.step_times(4, 64, 3).of_draft(False) == again.draft_time(4, 64)


def test_longer_contexts_than_measured_cost_no_less(a100: CostModel) -> None:
    for batch in (1, 16, 64, 256):
        for time in (a100.target_time, a100.draft_time, lambda b, s: a100.verify_time(b, s, 7)):
            assert time(batch, 4096) <= time(batch, 16384) <= time(batch, 65536)


def test_a_profile_of_the_first_version_is_fitted_again() -> None:
    model = CostModel.fit(_cpu_points(), meta={"model": "toy"})
    profile = model.to_dict()
    first = {**profile, "schema_version": 1, "model": {"forward": {}, "draft": {}}}
    again = CostModel.from_dict(first)
    assert again.meta == {"model": "toy"}
    assert again.cycle_time(7, 300, 2) == pytest.approx(model.cycle_time(7, 300, 2), rel=1e-6)
    assert again.to_dict()["schema_version"] != 1


SWEEP = """model,batch,seq,gamma,mode,mean_ms,median_ms,std_ms
m,0,0,0,target_decode,9,9,0
m,1,256,0,target_decode,10,10,0.1
m,1,256,3,target_decode_sd,11,11,0.1
m,1,256,3,target_verify,12,12,0.1
m,1,256,3,drafter_decode,5,5,0.1
"""


def test_a_sweep_becomes_points_without_start_up_rows_and_foreign_modes(tmp_path: Path) -> None:
    path = tmp_path / "sweep.csv"
    path.write_text(SWEEP)
    points, model = read_sweep(path)
    assert model == "m"
    assert [(p.component, p.num_draft_tokens, p.seconds) for p in points] == [
        ("target", 0, 0.010),
        ("verify", 3, 0.012),
        ("draft", 3, 0.005),
    ]
    cost = profile_from_sweep(path, meta={"hardware": "box"})
    assert cost.meta["model"] == "m"
    assert cost.meta["hardware"] == "box"
    path.write_text(SWEEP.replace("median_ms", "median"))
    with pytest.raises(ValueError, match="no column 'median_ms'"):
        read_sweep(path)
    path.write_text(SWEEP.replace("12,12", "12,twelve"))
    with pytest.raises(ValueError, match="line 5"):
        read_sweep(path)


def test_constants_come_from_a_fit_or_a_config(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"hardware": {"gpu": "G", "BW_peak": 2e12}, "model": {"name": "m", "W_t": 1.5e10}}))
    constants, facts = read_constants(path)
    assert (constants.weight_bytes, constants.bandwidth) == (1.5e10, 2e12)
    assert facts == {"model": "m", "hardware": "G"}
    config = {
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "vocab_size": 152064,
    }
    path.write_text(json.dumps(config))
    constants, _ = read_constants(path)
    assert constants.weight_bytes == pytest.approx(14.1e9, rel=0.02)  # Qwen2.5-7B: 7.6e9 weights less the embedding
    assert constants.kv_bytes_per_token == 57344
    path.write_text("{}")
    with pytest.raises(ValueError, match="neither"):
        read_constants(path)


def test_a_live_profile_does_not_invent_a_price_of_context() -> None:
    # All contexts of a live calibration are within a few tokens; those of real requests are not.
    points = []
    for batch, context, plain, verify, draft, prefill in [
        (1, 48, 0.0788, {1: 0.0874, 4: 0.1167, 7: 0.1354}, 0.0310, 0.301),
        (2, 49, 0.0871, {1: 0.0910, 4: 0.1643, 7: 0.2399}, 0.0375, 0.559),
        (4, 48, 0.0918, {1: 0.1393, 4: 0.2623, 7: 0.3917}, 0.0510, 1.104),
        (8, 50, 0.1230, {1: 0.2148, 4: 0.4727, 7: 0.7129}, 0.0820, 2.047),
    ]:
        points += [Point("target", batch, context, 0, plain), Point("draft", batch, context, 4, draft)]
        points += [Point("verify", batch, context, k, seconds) for k, seconds in verify.items()]
        points += [Point("prefill", batch, 32, 0, prefill)]
    model = CostModel.fit(points)
    for batch in (1, 8):
        measured = float(model.target_time(batch, 49))
        assert float(model.target_time(batch, 1000)) < 1.2 * measured
        assert float(model.verify_time(batch, 1000, 4)) < 1.2 * float(model.verify_time(batch, 49, 4))
    assert float(model.target_time(1, 100)) == pytest.approx(0.0788, rel=0.1)


def test_long_contexts_in_which_every_row_reads_the_cache_again() -> None:
    """As attention on CPU: the fit once took it for one sequence's critical path, and the rest 60 % off with it."""

    def forward(batch: int, context: int, drafts: int) -> float:
        rows = batch * (drafts + 1)
        return 0.033 + 0.0029 * rows + context * (2.4e-6 * batch + 2.1e-6 * rows)

    points, asked = [], [(b, s, k) for b in (1, 2, 4) for s in (48, 4107) for k in (0, 1, 4, 7)]
    for batch, context, drafts in asked:
        points.append(
            Point("verify" if drafts else "target", batch, context, drafts, forward(batch, context, drafts), 0.05)
        )
        if drafts:
            points.append(
                Point("draft", batch, context, drafts, 0.018 + 0.0017 * batch + 4.7e-6 * context * batch, 0.05)
            )
    model = CostModel.fit(points)
    errors = [abs(float(model.verify_time(b, s, k)) / forward(b, s, k) - 1.0) for b, s, k in asked]
    assert max(errors) < 0.25 and float(np.mean(errors)) < 0.08
