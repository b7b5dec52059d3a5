"""The benchmark scripts: where a result comes from is noted first, and nothing measured is lost or written over."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from vllm_selfspec import provenance
from vllm_selfspec.errors import EngineError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    """Return a function that imports a script by its name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def load(name: str) -> ModuleType:
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name)

    return load


@pytest.mark.parametrize("earlier", [True, False])
def test_a_result_is_never_overwritten_and_its_folder_is_made_first(earlier: bool, tmp_path: Path):
    out = tmp_path / ("out" if earlier else "file") / "huge_pages.json"
    (out.parent if earlier else out.parent.parent).mkdir(exist_ok=True)
    (out if earlier else out.parent).write_text("precious")
    # Without a round nothing is started even where the file is not looked at.
    command = [sys.executable, str(BENCHMARKS / "huge_pages.py"), "/no/such/model", "--rounds", "0", "--out", str(out)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 2
    assert process.stderr.splitlines()[-1].startswith("huge_pages.py: error: --out: ")
    assert (f"{out} already exists" if earlier else f"the folder {out.parent} cannot be made") in process.stderr
    assert (out if earlier else out.parent).read_text() == "precious"


def test_an_interrupted_benchmark_keeps_its_rounds_and_the_commit_of_its_start(
    script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Each engine that runs moves the checkout on; the third one is interrupted."""
    engines: list[list[str]] = []

    def run(command: list[str], **_: object) -> SimpleNamespace:
        if len(engines) == 3:
            raise KeyboardInterrupt
        engines.append(command)
        return SimpleNamespace(stdout=json.dumps({"draft": float(len(engines))}))

    huge_pages = script("huge_pages")
    monkeypatch.setattr(huge_pages.subprocess, "run", run)
    monkeypatch.setattr(provenance, "provenance", lambda: {"commit": f"after {len(engines)} engines"})
    out = tmp_path / "new" / "huge_pages.json"
    monkeypatch.setattr(sys, "argv", ["huge_pages.py", "MODEL", "--rounds", "3", "--out", str(out)])
    with pytest.raises(KeyboardInterrupt):
        huge_pages.main()
    assert json.loads(out.read_text()) == {
        "provenance": {"commit": "after 0 engines"},
        "rounds": [{"small": {"draft": 1.0}, "huge": {"draft": 2.0}}],
        "small_over_huge": {"draft": 0.5},
    }


def test_a_result_that_cannot_be_written_is_named(script, tmp_path: Path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(EngineError, match="folder cannot be written"):
        script("result_file").save(tmp_path / "folder", {})
    script("result_file").save(None, {})


# --- where a result comes from ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "called"),
    [(BENCHMARKS.parent, "benchmarks/controller.py"), (BENCHMARKS, "controller.py"), (BENCHMARKS, "./controller.py")],
)
def test_a_script_is_called_by_its_name_wherever_it_was_started(
    folder: Path, called: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [called, "MODEL"])
    assert provenance.provenance()["command"] == "python benchmarks/controller.py MODEL"


def test_the_command_is_called_by_its_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/vllm-selfspec", "bench"])
    assert provenance.provenance()["command"] == "vllm-selfspec bench"


def test_the_hardware_names_the_cpu_and_what_onednn_is_held_at(monkeypatch: pytest.MonkeyPatch):
    told = "processor: 0\ncpu family\t: 6\nmodel name\t: Some CPU\nmodel\t\t: 207\n\nmodel\t\t: 208\n"
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda self, **k: told if str(self) == "/proc/cpuinfo" else read(self, **k))
    monkeypatch.setattr(Path, "exists", lambda self: str(self) == "/proc/cpuinfo" or os.path.exists(self))
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")
    hardware = provenance.provenance()["hardware"]
    assert (hardware["cpu"], hardware["cpu_family"], hardware["cpu_model"]) == ("Some CPU", "6", "207")
    assert hardware["onednn_max_cpu_isa"] == "AVX512_CORE"
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    assert provenance.provenance()["hardware"]["onednn_max_cpu_isa"] is None
