"""The file that a benchmark writes: made sure of before anything is measured, then written whole after every case."""

import argparse
import json
from pathlib import Path
from typing import Any

from vllm_selfspec.errors import UsageError, write_whole
from vllm_selfspec.results import new_file


def new_out(parser: argparse.ArgumentParser, path: str | Path | None) -> Path | None:
    """The value of --out. Ends the script with one sentence where a file is there already or none can be made."""
    try:
        return None if path is None else new_file(Path(path))
    except UsageError as error:
        parser.error(str(error))


def save(path: Path | None, record: dict[str, Any]) -> None:
    """Write what was measured so far."""
    if path is not None:
        write_whole(path, json.dumps(record, indent=1, default=str) + "\n")
