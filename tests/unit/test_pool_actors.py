"""How a pool sets up the processes of its workers, without starting any."""

from pathlib import Path

import pytest

pytest.importorskip("ray")

from vllm_selfspec.rollout.actors import core_shares, preloads

INTEL = Path("/venv/lib/libiomp5.so")


@pytest.mark.parametrize(
    "present, expected",
    [
        ("", "/venv/lib/libiomp5.so"),
        ("/lib/other.so", "/venv/lib/libiomp5.so:/lib/other.so"),
        ("/site/torch/lib/libgomp-6a29c32d.so.1.0.0:/x/libtcmalloc.so", "/venv/lib/libiomp5.so:/x/libtcmalloc.so"),
        ("/site/torch.libs/libgomp.so.1", "/venv/lib/libiomp5.so"),
        ("/venv/lib/libiomp5.so", "/venv/lib/libiomp5.so"),
        ("/usr/lib/libgomp.so.1", "/usr/lib/libgomp.so.1"),
    ],
)
def test_a_worker_preloads_one_openmp_library(present: str, expected: str) -> None:
    """A pool once did not start after a bare engine: vLLM had put PyTorch's OpenMP into the environment."""
    assert preloads(present, INTEL) == expected
    assert preloads(present, None) == present


def test_cores_are_shared_out_evenly() -> None:
    assert core_shares([0, 1, 4, 5, 6], 2) == [[0, 1], [4, 5]]
