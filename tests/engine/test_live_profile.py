"""From the steps of a timed engine to points of the cost model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from engines import BLOCK, engine, generate, greedy, random_prompt, scheduler_of

from vllm_selfspec import live_profile
from vllm_selfspec.config import ConfigError, SelfSpecConfig
from vllm_selfspec.control.cost_model import CostModel, Point, ProfileIdentity
from vllm_selfspec.control.policy import Controller, StepObservation
from vllm_selfspec.live_profile import measure, points_of, run_batch
from vllm_selfspec.scheduler import SelfSpecScheduling, control_settings

PLAIN, DRAFT, VERIFY = 0.05, 0.01, {1: 0.06, 4: 0.08}


def step(seconds: float, num_verified: float = 0, num_drafted: int = 0, **other: int) -> StepObservation:
    fields = {"num_decode": 2, "prefill_tokens": 0} | other
    return StepObservation(seconds, mean_context=100.0, num_verified=num_verified, num_drafted=num_drafted, **fields)


def run(slowness: float) -> list[StepObservation]:
    """Plain, draft, verify for each length, on a machine that is slower by this factor."""
    steps = []
    for length, seconds in VERIFY.items():
        steps += [step(PLAIN), step(PLAIN + length * DRAFT, num_drafted=length), step(seconds, num_verified=length)]
    return [replace(s, seconds=s.seconds * slowness) for s in steps]


def test_points_are_the_times_that_were_measured() -> None:
    # One of three runs was disturbed; drafts beside prefill, another batch and a fraction say nothing.
    runs = [
        run(1.0),
        [*run(3.0), step(9.0, num_drafted=1, prefill_tokens=7), step(9.0, num_decode=1), step(9.0, 0.5)],
        run(1.0),
    ]
    points = {(p.component, p.num_draft_tokens): p for p in points_of(runs, batch=2)}
    assert {key: p.seconds for key, p in points.items()} == pytest.approx(
        {
            ("target", 0): PLAIN,
            ("verify", 1): VERIFY[1],
            ("verify", 4): VERIFY[4],
            ("draft", 1): DRAFT,
            ("draft", 4): DRAFT,
        }
    )
    assert all(p.batch == 2 and p.seq == 100 for p in points.values())


def test_points_of_a_device_that_works_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several steps of a kind, of which the first one and the last two may hold a neighbour's work."""
    monkeypatch.setattr(live_profile, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    seconds = VERIFY[4]
    kinds = [
        step(9.0, num_verified=1, num_drafted=1),  # no draft of this run was timed yet
        step(PLAIN),
        step(PLAIN + 4 * DRAFT, num_drafted=4),
        step(seconds + 4 * DRAFT, num_verified=4, num_drafted=4),
    ]
    steps = [replace(kind, seconds=9.0 if place in (0, 3, 4) else kind.seconds) for kind in kinds for place in range(5)]
    points = {(p.component, p.num_draft_tokens): p.seconds for p in points_of([steps], batch=2)}
    assert points == pytest.approx({("target", 0): PLAIN, ("draft", 4): DRAFT, ("verify", 4): seconds})


def test_a_step_that_computes_all_prompts_is_a_prefill_point() -> None:
    # Two requests of 32 tokens: the last token of each counts as decoding.
    points = points_of([[step(0.3, prefill_tokens=62), step(PLAIN)]], batch=2)
    assert [(p.component, p.batch, p.seq, p.seconds) for p in points if p.component == "prefill"] == [
        ("prefill", 2, 32, 0.3)
    ]


def test_points_are_as_uncertain_as_the_steps_scatter() -> None:
    def error(times: list[float]) -> float:
        (point,) = points_of([[step(seconds) for seconds in times]], batch=2)
        return point.noise

    calm = [0.050, 0.051, 0.049, 0.050, 0.051, 0.049, 0.050, 0.051]
    assert error([0.050, 0.090, 0.030, 0.060, 0.120, 0.045, 0.050, 0.100]) > 5 * error(calm)
    assert error(calm[:2]) > error(calm)


def test_no_points_without_a_plain_step() -> None:
    assert points_of([[step(0.06, num_verified=1)]], batch=2) == []


def test_a_cached_profile_belongs_to_the_kernels_and_the_runner_it_was_measured_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = SimpleNamespace(model="m", dtype="bfloat16", enforce_eager=False, compute_hash=lambda: "0" * 16)
    config = SimpleNamespace(
        model_config=model,
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
        scheduler_config=SimpleNamespace(max_num_seqs=16),
        lora_config=None,
        cache_config=SimpleNamespace(cache_dtype="auto"),
        compilation_config=SimpleNamespace(mode=3, cudagraph_mode=0),
    )

    def path() -> Path:
        return live_profile.cache_path(live_profile.profile_identity(config, settings), config)

    settings = SelfSpecConfig.parse({"method": "selfspec"})
    paths = set()
    for library in ("cpu_rows-1.so", "cpu_rows-2.so"):
        monkeypatch.setattr(live_profile, "library_in_use", lambda library=library: library)
        for v2 in (False, True):
            config.use_v2_model_runner = v2
            paths.add(path())
    assert len(paths) == 4
    config.scheduler_config.max_num_seqs = 64  # whose larger batches the other engine has not measured
    paths.add(path())
    config.parallel_config.tensor_parallel_size = 2
    paths.add(path())
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0")
    paths.add(path())
    assert len(paths) == 7


@pytest.mark.parametrize("kind", ["its own", "missing", "no profile", "model", "drafter"])
def test_a_named_profile_is_this_engines_or_an_error(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = ProfileIdentity(model="m", hardware="h", drafter="d", versions={"vllm": "0"})
    monkeypatch.setattr(live_profile, "profile_identity", lambda *_: own)
    core, path = SimpleNamespace(vllm_config=None), tmp_path / "profile.json"
    settings = SelfSpecConfig.parse({"method": "selfspec", "control": {"profile": str(path)}})
    points = [
        Point(component, batch, 32, drafts, seconds)
        for batch in (1, 8)
        for component, drafts, seconds in (("target", 0, PLAIN), ("draft", 4, DRAFT), ("verify", 4, VERIFY[4]))
    ]
    other = {kind: "another"} if kind in ("model", "drafter") else {}
    if kind == "no profile":
        path.write_text("{}")
    elif kind != "missing":
        CostModel.fit(points, meta=asdict(replace(own, **other))).save(path)
    if kind == "its own":
        assert live_profile.cost_model(core, settings, False).points == tuple(points)
        return
    with pytest.raises(ConfigError, match=r"control\.profile") as caught:
        live_profile.cost_model(core, settings, False)
    if other:
        assert f"measured for {kind} 'another', this engine has '{kind[0]}'" in str(caught.value)


def test_a_cache_that_cannot_be_used_does_not_keep_an_engine_from_starting(
    tiny: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with engine(tiny(), {}, max_num_seqs=2) as llm:
        assert scheduler_of(llm)._controller.times.cost_model is not None
        generate(llm, [random_prompt(8, 0)], greedy(4))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with engine(tiny(), {}, max_num_seqs=2):
        (kept,) = tmp_path.glob("vllm-selfspec/profiles/*")
    kept.write_text("{")
    with engine(tiny(), {}, max_num_seqs=2):
        CostModel.from_profile(kept)


def test_long_contexts_are_measured_without_computing_them(tiny: Callable[..., str]) -> None:
    """Once nothing but 50 tokens of context was measured, and its price was a guess."""
    room, blocks = 512, 40
    prompts = [random_prompt(3 * BLOCK, seed) for seed in range(2)]
    arguments = {"max_model_len": room, "num_gpu_blocks_override": blocks, "max_num_seqs": 4}
    with engine(tiny(), {"control": {"mode": "fixed"}}, enable_prefix_caching=True, **arguments) as llm:
        core = llm.llm_engine.engine_core.engine_core
        before = generate(llm, prompts, greedy(20))

        for batch, least in ((1, 300), (4, 130)):  # the model's limit; what four requests can have of the KV cache
            steps = run_batch(core, batch, [1, 3], far=True)
            assert len(steps) >= 12
            assert all(step.num_decode == batch and step.prefill_tokens == 0 for step in steps)
            assert all(least < step.mean_context < room for step in steps)
            assert {step.num_drafted for step in steps} == {0, 1, 3}

        settings = core.vllm_config.speculative_config.selfspec
        model = measure(core, settings, live_profile.profile_identity(core.vllm_config, settings))
        assert model is not None
        contexts = {
            batch: [p.seq for p in model.points if p.batch == batch and p.component == "target"] for batch in (1, 2, 4)
        }
        assert all(2 * min(seen) < max(seen) for seen in contexts.values())

        # What was pretended is not taken for a prefix of these prompts, and no block is lost.
        assert core.scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == blocks - 1
        assert generate(llm, prompts, greedy(20)) == before


def test_no_long_contexts_where_there_is_no_room(tiny: Callable[..., str]) -> None:
    with engine(tiny(), {"control": {"mode": "fixed"}}, max_model_len=128) as llm:
        core = llm.llm_engine.engine_core.engine_core
        assert run_batch(core, 1, [1], far=True) == []
        assert len(run_batch(core, 1, [1])) >= 6


@pytest.mark.parametrize(("asked", "given"), [({"acceptance_prior": 0.5}, 0.5), ({}, 0.95)])
def test_acceptance_is_expected_as_asked_or_as_usual(asked: dict[str, float], given: float) -> None:
    settings = SelfSpecConfig.parse({"method": "selfspec", "drafter": {"weights": "int8"}, "control": asked})
    parallel = SimpleNamespace(distributed_executor_backend="mp", world_size=1)
    scheduler = SimpleNamespace(
        _controller=Controller(control_settings(settings, parallel)),
        vllm_config=SimpleNamespace(speculative_config=SimpleNamespace(selfspec=settings)),
        scheduler_config=SimpleNamespace(max_num_seqs=4),
    )
    SelfSpecScheduling.start_controller(scheduler, None, light_view=False)
    assert scheduler._controller.settings.acceptance_prior == given
    assert scheduler._controller.acceptance.rates()[0] == pytest.approx(given)
