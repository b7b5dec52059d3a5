"""Samples to a JSONL file, one line each, so that an interruption or a full disk costs no finished line."""

import os
import stat
from collections.abc import AsyncIterable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

from vllm_selfspec.rollout.types import OutputFullError, Sample


class SampleWriter:
    """Appends samples to a JSONL file. Every line that was written is in the operating system's hands at once.

    A context manager. `written` counts the complete lines that this writer has added.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.written = 0
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise OutputFullError(
                f"output: cannot open {self.path} ({error.strerror}); choose another path", 0, []
            ) from (error)
        status = os.fstat(self._fd)
        self._regular, self._end = stat.S_ISREG(status.st_mode), status.st_size

    def write(self, sample: Sample) -> None:
        """Add one line.

        Raises:
            OutputFullError: it does not fit (disk full, quota, file size limit). The file ends with the last complete
                line and the error carries the sample.
        """
        line = memoryview(sample.model_dump_json().encode() + b"\n")
        size = len(line)
        try:
            while line:  # a nearly full disk takes a part before it refuses the rest
                line = line[os.write(self._fd, line) :]
        except OSError as error:
            if self._regular:
                os.ftruncate(self._fd, self._end)
            raise OutputFullError(
                f"output: {self.path} cannot take sample {self.written + 1} ({error.strerror}); free space or choose "
                f"another path: {self.written} samples are complete in the file",
                self.written,
                [sample],
            ) from error
        self._end += size
        self.written += 1

    def close(self) -> None:
        """Close the file. May be called again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


async def write_samples(path: str | os.PathLike[str], samples: AsyncIterable[Sample]) -> int:
    """Write a stream of samples as they finish. Returns how many.

    Raises:
        OutputFullError: as `SampleWriter.write`; the stream is left open, so the caller can go on reading it.
    """
    with SampleWriter(path) as writer:
        async for sample in samples:
            writer.write(sample)
        return writer.written


def read_samples(path: str | os.PathLike[str]) -> Iterable[Sample]:
    """The samples of a JSONL file, in the order in which they finished."""
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            yield Sample.model_validate_json(line)
