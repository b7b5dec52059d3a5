"""Errors that a person at the command line reads as one sentence, and files that no error leaves half written."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


class UsageError(ValueError):
    """The input is wrong: the message names the option or field and says how to mend it. Exit code 2."""


class EngineError(RuntimeError):
    """An engine process could not start or died: the message says why and where its log is. Exit code 1."""


def write_whole(path: Path, text: str) -> None:
    """Write a file that is whole or, where that fails, what it was.

    Raises:
        EngineError: it cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        why = error.strerror or error
        raise EngineError(f"{path} cannot be written ({why}): free space, or name another folder") from error
