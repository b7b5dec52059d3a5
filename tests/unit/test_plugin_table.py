"""Seams on toy targets: wrapped once, checked, never half applied."""

from __future__ import annotations

import sys
import types

import pytest

from vllm_selfspec.plugin import EVERYWHERE, IN_CPU_WORKERS, IN_V2_WORKERS, IN_WORKERS, MENDS, Seam, SeamError


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
