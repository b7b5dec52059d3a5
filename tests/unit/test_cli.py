"""The command line: quick to answer, and every mistake named in one sentence with exit code 2."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_selfspec import __version__
from vllm_selfspec.cli import COMMANDS, main

HEAVY = {"torch", "vllm", "transformers", "ray"}


def run(*arguments: str) -> int:
    """Run the command line in this process and return its exit code."""
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    return int(exit_.value.code or 0)


def imported_by(code: str) -> set[str]:
    """Top-level modules that a new interpreter has loaded after `code`."""
    code += "\nimport sys\nprint('\\n' + ' '.join({name.partition('.')[0] for name in sys.modules}))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return set(output.splitlines()[-1].split())


def test_importing_the_package_costs_nothing():
    assert not imported_by("import vllm_selfspec") & (HEAVY | {"pydantic", "numpy", "typer", "rich"})


def test_config_class_is_exported_lazily():
    loaded = imported_by("from vllm_selfspec import SelfSpecConfig; assert SelfSpecConfig().method == 'selfspec'")
    assert "pydantic" in loaded
    assert not loaded & HEAVY


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help_loads_no_engine(arguments: list[str]):
    code = (
        f"from vllm_selfspec.cli import main\ntry: main({arguments})\nexcept SystemExit as exit: assert not exit.code"
    )
    loaded = imported_by(code)
    assert "typer" in loaded
    assert not loaded & HEAVY


def test_help_of_the_program_loads_no_command():
    assert "pydantic" not in imported_by(
        "from vllm_selfspec.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass"
    )


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]):
    assert run("--help") == 0
    output = capsys.readouterr().out
    assert all(name in output for name in COMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]):
    assert run("--version") == 0
    assert capsys.readouterr().out == f"vllm-selfspec {__version__}\n"


@pytest.mark.parametrize("arguments", [["frobnicate"], ["rollout", "--frobnicate"], ["rollout", "--n", "0"]])
def test_unknown_words_exit_with_2(arguments: list[str]):
    assert run(*arguments) == 2


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--prompts", "no.jsonl"], "--prompts: there is no file no.jsonl"),
        (["--drafter", "{weights: int8}"], "--drafter: not valid JSON"),
        (["--drafter", "[1]"], "--drafter: needs a JSON object"),
        (["--drafter", '{"weigths": "int8"}'], "drafter.weigths"),
        (["--control", '{"mode": "sometimes"}'], "control.mode"),
        (["--engine-args", '{"model": "x"}'], "--engine-args: model cannot be given there"),
        (["--num-speculative-tokens", "1000"], "num_speculative_tokens"),
        (["--model", "/no/such/folder"], "--model: there is no folder /no/such/folder"),
        (["--out", "/dev/null/results"], "--out: the folder /dev/null/results cannot be made"),
    ],
)
def test_rollout_names_the_wrong_option(options: list[str], sentence: str, tmp_path, monkeypatch, capsys):
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert run("rollout", "--model", str(checkpoint), *options) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("vllm-selfspec: ")
    assert captured.err.count("\n") == 1
    assert sentence in captured.err
    assert not (tmp_path / "runs").exists()


def test_report_of_a_file_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run("report", str(tmp_path / "none.json")) == 2
    assert "there is no file" in capsys.readouterr().err
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"kind": "bench"}))
    assert run("report", str(other)) == 2
    assert "is no saved rollout" in capsys.readouterr().err
    damaged = tmp_path / "damaged.json"
    damaged.write_text(json.dumps({"kind": "rollout", "rounds": []}))
    assert run("report", str(damaged)) == 2
    assert "damaged" in capsys.readouterr().err
