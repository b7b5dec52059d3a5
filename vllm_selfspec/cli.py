"""The `vllm-selfspec` command.

Each sub-command lives in a module of its own that is imported only when that sub-command is asked for, so that
`vllm-selfspec --help` answers at once: neither torch nor vLLM is imported to parse a command line.
"""

import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from vllm_selfspec import __version__
from vllm_selfspec.errors import EngineError, UsageError

# name: (module, function, what `--help` of the whole program says)
COMMANDS: dict[str, tuple[str, str, str]] = {
    "rollout": (
        "vllm_selfspec.commands.rollout",
        "rollout",
        "Generate prompts x samples, plain and self-speculative, and compare.",
    ),
    "bench": ("vllm_selfspec.commands.bench", "bench", "Compare ways of speculating with plain decoding."),
    "calibrate": (
        "vllm_selfspec.commands.calibrate",
        "calibrate",
        "Turn measured step times into a profile of a machine.",
    ),
    "train-exit": (
        "vllm_selfspec.commands.train_exit",
        "train_exit",
        "Train an exit head for early-exit drafts.",
    ),
    "simulate": (
        "vllm_selfspec.commands.simulate",
        "simulate",
        "Simulate rollouts on a profile, and compare draft length policies.",
    ),
    "report": ("vllm_selfspec.commands.report", "report", "Print and compare saved rollouts."),
    "doctor": ("vllm_selfspec.commands.doctor", "doctor", "Check this installation, and say how to mend it."),
}


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"vllm-selfspec {__version__}")
        raise typer.Exit


def _program(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Lossless self-speculative decoding for RL rollouts on stock vLLM."""


def _not_asked_for() -> None:
    """Stand in for a command that is only listed."""


def build_app(arguments: Sequence[str]) -> typer.Typer:
    """Return the command line program, with only the sub-command imported that `arguments` ask for."""
    asked_for = next((argument for argument in arguments if not argument.startswith("-")), None)
    app = typer.Typer(
        add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown"
    )
    app.callback()(_program)
    for name, (module, function, summary) in COMMANDS.items():
        if name == asked_for:
            command: Callable[..., Any] = getattr(importlib.import_module(module), function)
            app.command(name)(command)
        else:
            app.command(name, help=summary)(_not_asked_for)
    return app


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Exit codes: 0 fine, 1 failed, 2 wrong input (one sentence says what to mend), 130 interrupted.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        build_app(arguments)(args=arguments, prog_name="vllm-selfspec")
    except UsageError as error:
        print(f"vllm-selfspec: {error}", file=sys.stderr)
        sys.exit(2)
    except EngineError as error:
        print(f"vllm-selfspec: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
