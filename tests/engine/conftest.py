"""Fixtures of the engine tests: tiny checkpoints, and vLLM engines inside this process."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

# Read when vLLM is imported.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import emulated_cuda
import interpreted_triton

if interpreted_triton.wanted():
    interpreted_triton.install()
if emulated_cuda.wanted():
    emulated_cuda.install()

import pytest
from tiny_models import write_checkpoint


@pytest.fixture(scope="session")
def script() -> ModuleType:
    """`benchmarks/gpu/run_all.py` as a module."""
    path = Path(__file__).parents[2] / "benchmarks" / "gpu" / "run_all.py"
    spec = importlib.util.spec_from_file_location("gpu_run_all", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session", autouse=True)
def profiles(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Profiles that engines of this process measure are neither found in the user's cache nor left there.

    A test that names a cache of its own gets it.
    """
    from vllm_selfspec import live_profile, models

    folder, usual = tmp_path_factory.mktemp("cache"), os.environ.get("XDG_CACHE_HOME")

    def cache_dir() -> Path:
        return folder if os.environ.get("XDG_CACHE_HOME") == usual else models.cache_dir()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(live_profile, "cache_dir", cache_dir)
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """`tiny(family, **arguments)`: path of a tiny random checkpoint, see `write_checkpoint`; made once per session."""
    made: dict[tuple[Any, ...], Path] = {}

    def checkpoint(family: str = "llama", **arguments: Any) -> str:
        key = (family, *sorted(arguments.items()))
        if key not in made:
            made[key] = write_checkpoint(tmp_path_factory.mktemp(family), family, **arguments)
        return str(made[key])

    return checkpoint
