"""How a pool sets up the processes of its workers, without starting any."""

from pathlib import Path

import pytest

pytest.importorskip("ray")

from vllm_selfspec.rollout import actors
from vllm_selfspec.rollout.actors import RayCluster, core_shares, preloads

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


@pytest.mark.parametrize("users_own", [False, True])
async def test_the_last_pool_ends_the_ray_that_the_first_one_started(
    users_own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closing one of two pools once took Ray away from the other."""
    running = [users_own]
    monkeypatch.setattr(actors.ray, "is_initialized", lambda: running[0])
    monkeypatch.setattr(actors.ray, "init", lambda **_: running.__setitem__(0, True))
    monkeypatch.setattr(actors.ray, "shutdown", lambda: running.__setitem__(0, False))
    pools = [RayCluster("model", 1, {}, gpus_per_worker=0, env={}) for _ in range(2)]
    for pool in pools:
        await pool.start()
        assert running[0]
    pools[0].close()
    pools[0].close()
    assert running[0]
    pools[1].close()
    assert running[0] == users_own
