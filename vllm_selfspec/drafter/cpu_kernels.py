"""Builds and loads `csrc/cpu_rows.cpp`: matrix products of few rows for x86 CPUs without AVX-512.

On such a CPU oneDNN has no bfloat16 or float16 product and a very slow int8 one, and what vLLM falls back to takes
nearly three times as long for four rows as for one. `docs/cost.md` has the times.
The library is built once per machine, with the compiler that torch.compile needs on CPU anyway.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import subprocess
import tempfile
from pathlib import Path

import torch
from torch.utils import cpp_extension
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_selfspec.models import cache_dir
from vllm_selfspec.provenance import cpu_fact

logger = init_logger("vllm.selfspec")

SOURCE = Path(__file__).parent / "csrc" / "cpu_rows.cpp"
COMPILE = ("-c", "-O3", "-std=c++20", "-march=native", "-fopenmp", "-fPIC")
# No OpenMP runtime is linked: the one that torch uses, or a preloaded one, is in the process already.
LINK = ("-shared", "-lc10", "-ltorch_cpu")
CAPABILITY = "AVX2"
"""What torch calls a CPU that has AVX2 and nothing above it that its kernels use."""


@functools.cache
def rows_kernels() -> bool:
    """True where this CPU is better served by these kernels than by vLLM's; they are loaded then."""
    if not current_platform.is_cpu():
        return False
    if torch.backends.cpu.get_cpu_capability() != CAPABILITY or platform.machine() not in ("x86_64", "AMD64"):
        return False
    try:
        load()
    except (OSError, subprocess.CalledProcessError) as error:
        reason = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else str(error)
        logger.warning(
            "selfspec cannot build its kernels for this CPU, so drafting and verifying stay slow here: install g++, or "
            "name a compiler in CXX. (%s)",
            reason,
        )
        return False
    return True


def library_in_use() -> str:
    """File name of the library whose kernels engines use here; empty where they use vLLM's."""
    return library_path().name if rows_kernels() else ""


@functools.cache
def load() -> None:
    """Register `torch.ops.selfspec_cpu`, building the library if this machine has none yet.

    Raises:
        OSError, subprocess.CalledProcessError: there is no compiler, or it fails.
    """
    path = library_path()
    if not path.exists():
        build(path)
    torch.ops.load_library(str(path))
    for name in ("rows_linear", "int8_linear", "int4_linear"):
        torch.library.register_fake(f"selfspec_cpu::{name}", _fake)


def _fake(x: torch.Tensor, weight: torch.Tensor, *rest: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def library_path() -> Path:
    """Where the library of this source, torch and CPU is kept."""
    parts = (
        SOURCE.read_text(),
        " ".join(COMPILE + LINK),
        torch.__version__,
        _compiler(),
        platform.machine(),
        cpu_fact("flags"),  # what -march=native depends on
    )
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    return cache_dir() / "kernels" / f"cpu_rows-{key}.so"


def build(path: Path) -> None:
    """Compile the library; processes that build it at the same time do not disturb each other."""
    logger.info("selfspec builds its CPU kernels (once per machine).")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        object_file, library = Path(folder) / "cpu_rows.o", Path(folder) / path.name
        includes = [f"-I{include}" for include in cpp_extension.include_paths()]
        libraries = [f"-L{folder}" for folder in cpp_extension.library_paths()]
        for command in (
            [_compiler(), *COMPILE, *includes, str(SOURCE), "-o", str(object_file)],
            [_compiler(), str(object_file), *libraries, *LINK, "-o", str(library)],
        ):
            subprocess.run(command, check=True, capture_output=True, text=True)
        library.replace(path)


def _compiler() -> str:
    return os.environ.get("CXX", "g++")
