"""Seams on toy targets: wrapped once, checked, never half applied."""

from __future__ import annotations

import sys
import types

import pytest

from vllm_selfspec.config import ENV_VAR, ConfigError
from vllm_selfspec.plugin import (
    EVERYWHERE,
    IN_CPU_WORKERS,
    IN_V2_WORKERS,
    IN_WORKERS,
    MENDS,
    Seam,
    SeamError,
    register,
    supports,
)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module `toy` with a class to wrap, and a wrapper that adds one to what it returns."""
    module = types.ModuleType("toy")

    class Engine:
        def step(self, tokens: int) -> int:
            return tokens

    module.Engine = Engine
    module.add_one = lambda original, self, tokens: original(self, tokens) + 1
    monkeypatch.setitem(sys.modules, "toy", module)
    return module


def test_a_seam_wraps_once_however_often_it_is_applied(toy: types.ModuleType):
    seam = Seam("toy:Engine.step", "test", ("self", "tokens"), "toy:add_one")
    for _ in range(3):
        seam.apply()
    assert toy.Engine().step(4) == 5
    assert toy.Engine.step.__name__ == "step"


@pytest.mark.parametrize("needed", [True, False])
def test_a_mend_is_applied_only_where_it_is_needed(toy: types.ModuleType, needed: bool):
    toy.broken = lambda: needed
    Seam("toy:Engine.step", "test", ("self", "tokens"), "toy:add_one", needed="toy:broken").apply()
    assert toy.Engine().step(4) == 4 + needed


@pytest.mark.parametrize(
    ("installed", "since", "before", "applied"),
    [
        ("0.31.2", "0.32", "", False),
        ("0.32.0+cpu", "0.32", "", True),
        ("0.31.2", "", "0.32", True),
        ("0.32.0", "", "0.32", False),
        ("0.29.0", "", "", True),
    ],
)
def test_a_seam_is_applied_in_the_versions_that_have_it(
    toy: types.ModuleType, monkeypatch: pytest.MonkeyPatch, installed: str, since: str, before: str, applied: bool
):
    vllm = types.ModuleType("vllm")
    vllm.__version__ = installed
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    Seam("toy:Engine.step", "test", ("self", "tokens"), "toy:add_one", since=since, before=before).apply()
    assert toy.Engine().step(4) == 4 + applied
    if not applied:  # nor looked for
        Seam("toy:Engine.gone", "test", (), "toy:add_one", since=since, before=before).apply()


def test_a_missing_target_is_named(toy: types.ModuleType):
    with pytest.raises(SeamError, match=r"toy:Engine\.gone"):
        Seam("toy:Engine.gone", "test", (), "toy:add_one").apply()


def test_another_signature_is_refused_and_left_alone(toy: types.ModuleType):
    before = toy.Engine.step
    with pytest.raises(SeamError, match="num_drafts"):
        Seam("toy:Engine.step", "test", ("self", "num_drafts"), "toy:add_one").apply()
    assert toy.Engine.step is before


def test_the_table_says_what_each_seam_is_for():
    seams = (*EVERYWHERE, *IN_WORKERS, *IN_CPU_WORKERS, *IN_V2_WORKERS, *MENDS)
    targets = [seam.target for seam in seams]
    assert len(targets) == len(set(targets)) > 8
    assert all(seam.why and seam.wrapper.startswith("vllm_selfspec.") for seam in seams)


def test_whatever_ends_an_update_of_the_weights_tells_the_drafter():
    worker = "vllm.v1.worker.gpu_worker:Worker."
    ends = {
        seam.target: seam.since for seam in IN_WORKERS if seam.wrapper == "vllm_selfspec.drafter.refresh:update_ends"
    }
    assert ends == {
        worker + "finish_weight_update": "",
        worker + "reload_weights": "",
        worker + "wake_up": "",
        worker + "reset_weights": "0.32",
    }


@pytest.mark.parametrize(
    ("version", "supported"),
    [("0.24.0", True), ("0.33.1+cpu", True), ("0.23.1", False), ("0.34.0rc1", False), ("0.330.0", False)],
)
def test_only_versions_that_the_engine_tests_ran_on_are_touched(version: str, supported: bool):
    assert supports(version) is supported


@pytest.mark.parametrize(("version", "supported"), [("0.28.1", False), ("0.29.0", True), ("0.34.0", False)])
def test_cpus_came_later(version: str, supported: bool):
    assert supports(version, cpu=True) is supported


@pytest.fixture
def newer_vllm(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A vLLM of the future, whose engine arguments know a speculative config and nothing of selfspec."""

    class EngineArgs:
        def __init__(self, speculative_config: dict | None = None) -> None:
            self.speculative_config = speculative_config

        def create_speculative_config(self, model: str) -> tuple[dict | None, str]:
            return self.speculative_config, model

    vllm = types.ModuleType("vllm")
    vllm.__version__ = "0.99.0"
    arg_utils = types.ModuleType("vllm.engine.arg_utils")
    arg_utils.EngineArgs = EngineArgs
    for module in (vllm, types.ModuleType("vllm.engine"), arg_utils):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delenv(ENV_VAR, raising=False)
    return arg_utils


def test_another_version_refuses_the_flag_in_one_sentence(
    newer_vllm: types.ModuleType, monkeypatch: pytest.MonkeyPatch
):
    register()
    register()
    with pytest.raises(ConfigError, match=r"runs on vllm 0\.24 to 0\.33, and this is 0\.99\.0: install one of them"):
        newer_vllm.EngineArgs({"method": "selfspec"}).create_speculative_config("model")
    monkeypatch.setenv(ENV_VAR, "1")
    with pytest.raises(ConfigError, match=ENV_VAR):
        newer_vllm.EngineArgs().create_speculative_config("model")


@pytest.mark.parametrize("settings", [None, {"method": "ngram"}])
def test_another_version_is_else_left_alone(newer_vllm: types.ModuleType, settings: dict | None):
    register()
    assert newer_vllm.EngineArgs(settings).create_speculative_config("model") == (settings, "model")


def test_another_version_that_is_asked_for_another_method_does_not_look_at_the_variable(
    newer_vllm: types.ModuleType, monkeypatch: pytest.MonkeyPatch
):
    register()
    monkeypatch.setenv(ENV_VAR, "1")
    arguments = newer_vllm.EngineArgs()
    arguments.spec_method = "ngram"
    assert arguments.create_speculative_config("model") == (None, "model")


def test_a_version_that_is_built_another_way_is_left_alone(newer_vllm: types.ModuleType):
    del newer_vllm.EngineArgs.create_speculative_config
    register()
    assert not hasattr(newer_vllm.EngineArgs, "create_speculative_config")
