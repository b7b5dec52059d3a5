"""Builds and loads `csrc/`: matrix products of few rows for x86 CPUs, at the memory's speed.

On a CPU without AVX-512 oneDNN has no bfloat16 or float16 product and a very slow int8 one, and what vLLM falls back to
takes nearly three times as long for four rows as for one (`cpu_rows.cpp`). Where AVX-512 comes without AVX512_BF16,
oneDNN emulates bfloat16, and four rows take four times as long as one; with it and without AMX, oneDNN takes a tenth to
a third longer than `cpu_half.cpp` up to sixteen rows. With AMX the model's own layers are well served, but ATen's int4
product takes one and a half times as long as reading the weights for one row and ten times as long for sixteen
(`cpu_avx512.cpp`, for VNNI, also uses AMX). `docs/cost.md` has the times.
The library is built once per machine, with the compiler that torch.compile needs on CPU anyway.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils import cpp_extension
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_selfspec.models import cache_dir
from vllm_selfspec.provenance import cpu_fact

logger = init_logger("vllm.selfspec")

SOURCES = Path(__file__).parent / "csrc"
COMPILE = ("-c", "-O3", "-std=c++20", "-march=native", "-fopenmp", "-fPIC")
# No OpenMP runtime is linked: the one that torch uses, or a preloaded one, is in the process already.
LINK = ("-shared", "-lc10", "-ltorch_cpu")
AVX512_FLAGS = {"avx512f", "avx512bw", "avx512vl", "avx512_vnni"}
"""What `cpu_avx512.cpp` needs, as Linux calls it."""

_WITHHELD = (
    ({"AVX512_CORE_FP16", "AVX10_1_512"}, {"amx_tile", "amx_int8", "amx_bf16", "amx_fp16", "amx_complex"}),
    ({"AVX512_CORE_BF16"}, {"avx512_fp16"}),
    ({"AVX512_CORE_VNNI"}, {"avx512_bf16"}),
    ({"AVX512_CORE"}, {"avx512_vnni"}),
    (
        {"AVX2_VNNI", "AVX2_VNNI_2"},
        {"avx512f", "avx512dq", "avx512bw", "avx512vl", "avx512cd", "avx512ifma", "avx512_bitalg"},
    ),
    ({"AVX2"}, {"avx_vnni"}),
)
"""Values of oneDNN's own variable, `ONEDNN_MAX_CPU_ISA`, and what each withholds of a CPU beyond those above it."""

_OUTPUTS: dict[str, Callable[..., int]] = {
    "rows_linear": lambda weight, bias: weight.shape[0],
    "avx512_rows_linear": lambda weight, bias: weight.shape[0],
    "int8_linear": lambda weight, scale, bias: weight.shape[0],
    "int4_linear": lambda weight, scale_and_min, bias: weight.shape[0],
    "views_linear": lambda light, weight8, scale, weight4, scale_and_min, bias: scale.shape[0],
    "avx512_views_linear": lambda light, weight8, scale, weight4, bias: scale.shape[0],
    "avx512_int8_linear": lambda weight, scale, bias: scale.shape[0],
    "avx512_int4_linear": lambda weight, outputs, bias: outputs,
}
"""Outputs of each product, from its arguments after the rows."""


def withheld() -> frozenset[str]:
    """Instructions that this CPU has and that nobody is to use: oneDNN is told so, and these kernels follow it."""
    most = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    found: set[str] = set()
    for values, flags in _WITHHELD:
        found |= flags
        if most in values:
            return frozenset(found & set(cpu_fact("flags").split()))
    return frozenset()


def cpu_flags() -> frozenset[str]:
    """What this CPU can do and is to be used for, by Linux's names."""
    return frozenset(cpu_fact("flags").split()) - withheld()


@functools.cache
def own_kernels() -> Literal["", "avx2", "avx512"]:
    """Which of these kernels serve drafts better than vLLM's and ATen's on this CPU; they are loaded then."""
    if not current_platform.is_cpu() or platform.machine() not in ("x86_64", "AMD64"):
        return ""
    capability = torch.backends.cpu.get_cpu_capability()  # the highest that torch's kernels use
    if "AVX" not in capability:
        return ""
    flags = cpu_flags()
    kind: Literal["avx2", "avx512"] = "avx2"  # also where AVX-512 comes without VNNI
    if capability != "AVX2" and flags >= AVX512_FLAGS:
        kind = "avx512"
    try:
        load()
        if kind == "avx512":
            torch.ops.selfspec_cpu.avx512_int8_linear  # noqa: B018  # the compiler may know no AVX-512
    except (OSError, AttributeError, ValueError, subprocess.CalledProcessError) as error:
        reason = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else str(error)
        logger.warning(
            "selfspec cannot build its kernels for this CPU, so %s slow here: install g++ 11 or newer, or name a "
            "compiler in CXX. (%s)",
            "drafting stays" if "avx512_bf16" in flags else "drafting and verifying stay",
            reason,
        )
        return ""
    return kind


@functools.cache
def badly_served() -> frozenset[torch.dtype]:
    """Those of bfloat16 and float16 whose layers in the model itself are better served by these kernels than by vLLM's.

    oneDNN wants AVX512_BF16 and AVX512_FP16 for them, and for bfloat16 it is the faster one with AMX only.
    """
    kind = own_kernels()
    if not kind:
        return frozenset()
    needed = {torch.bfloat16: "amx_bf16" if kind == "avx512" else "avx512_bf16", torch.float16: "avx512_fp16"}
    flags = cpu_flags()
    return frozenset(dtype for dtype, flag in needed.items() if flag not in flags)


def half_product() -> Literal["rows_linear", "avx512_rows_linear"]:
    """The operator for such layers."""
    return "avx512_rows_linear" if hasattr(torch.ops.selfspec_cpu, "avx512_rows_linear") else "rows_linear"


def library_in_use() -> str:
    """File name of the library whose kernels engines use here; empty where they use vLLM's."""
    return library_path().name if own_kernels() else ""


@functools.cache
def load() -> None:
    """Register `torch.ops.selfspec_cpu`, building the library if this machine has none yet.

    Raises:
        OSError, subprocess.CalledProcessError: there is no compiler, or it fails.
    """
    path = library_path()
    if not path.exists():
        build(path)
    try:
        torch.ops.load_library(str(path))
    except OSError:  # made in another container with this home, for one, by newer tools than those in here
        build(path)
        torch.ops.load_library(str(path))
    for name, outputs in _OUTPUTS.items():
        if hasattr(torch.ops.selfspec_cpu, name):
            torch.library.register_fake(f"selfspec_cpu::{name}", functools.partial(_fake, outputs))
    torch.library.register_fake("selfspec_cpu::experts", lambda x, *rest: torch.empty_like(x))
    torch.library.register_fake("selfspec_cpu::draft_attention", lambda query, *rest: query.new_empty(query.shape))
    torch.library.register_fake(
        "selfspec_cpu::draft_layers", lambda hidden, *rest: (torch.empty_like(hidden), torch.empty_like(hidden))
    )


def _fake(outputs: Callable[..., int], x: torch.Tensor, *rest: Any) -> torch.Tensor:
    # x.shape[0], not len(x), which would fix the number of rows of a compiled graph.
    return x.new_empty(x.shape[0], outputs(*rest))


def library_path() -> Path:
    """Where the library of this source, torch and CPU is kept."""
    parts = (
        *(path.read_text() for path in sorted(SOURCES.iterdir())),
        " ".join((*COMPILE, *_without_withheld(), *LINK)),
        torch.__version__,
        shlex.join(_compiler()),
        platform.machine(),
        cpu_fact("flags"),  # what -march=native depends on
    )
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    return cache_dir() / "kernels" / f"cpu_rows-{key}.so"


def build(path: Path) -> None:
    """Compile the library; processes that build it at the same time do not disturb each other."""
    logger.info("selfspec builds its CPU kernels (once per machine).")
    path.parent.mkdir(parents=True, exist_ok=True)
    includes = [f"-I{include}" for include in cpp_extension.include_paths()]
    libraries = [f"-L{folder}" for folder in cpp_extension.library_paths()]
    compiler, options = _compiler(), [*COMPILE, *_without_withheld()]
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        library = Path(folder) / path.name
        objects = []
        for source in sorted(SOURCES.glob("*.cpp")):
            objects.append(f"{folder}/{source.stem}.o")
            _run([*compiler, *options, *includes, str(source), "-o", objects[-1]])
        _run([*compiler, *objects, *libraries, *LINK, "-o", str(library)])
        library.replace(path)


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX") or "g++")


def _without_withheld() -> list[str]:
    """The compiler's options against what is withheld, by its names: `avx512_bf16` is `avx512bf16` there."""
    options = [f"-mno-{flag.replace('_', '-' if flag.startswith('amx') else '')}" for flag in sorted(withheld())]
    return [option for option in options if _is_known(tuple(_compiler()), option)]


@functools.cache
def _is_known(compiler: tuple[str, ...], option: str) -> bool:
    """Whether a compiler knows an option; one that does not cannot use the instructions either."""
    check = [*compiler, option, "-E", "-x", "c++", os.devnull]
    try:
        return subprocess.run(check, capture_output=True, check=False).returncode == 0
    except OSError:
        return False
